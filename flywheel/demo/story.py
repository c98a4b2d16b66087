"""The story that the demo plays: traffic, log, training, rehearsal, hand-over, failure, report. Every part is real."""

import asyncio
import hashlib
import itertools
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any

import orjson
from sqlalchemy.ext.asyncio import AsyncEngine

from flywheel.demo import figures, grammar
from flywheel.demo.setting import FLOOR, WORKLOAD, Options, Setting
from flywheel.demo.standin import GENERATED_ITEMS
from flywheel.demo.traffic import Traffic
from flywheel.demo.workload import Item, Workload, WorkloadError, load, sample
from flywheel.observe import mirror_sums
from flywheel.report import (
    DemoReport,
    Exchanges,
    Experiments,
    Gate,
    Mirrors,
    RolloutStep,
    RolloutStory,
    Stage,
)
from flywheel.runs import Run, Runs, RunState, new_run_id
from gateway.errors import ConfigError, UnderstudyError
from gateway.logstore import LogStore, Query
from gateway.logstore.open import open_log_store
from migrations.upgrade import upgrade
from routing.rollout import Rollout, State
from routing.rules import load as load_rules
from routing.rules import startable
from routing.store import Entry, Rollouts, connect
from routing.targets import Ref

__all__ = ["Narrator", "Story", "play", "workload_of"]

PATIENCE = 600.0  # seconds that one stage may take at most
OVER = (State.PROMOTED, State.PAUSED, State.ABORTED, State.SUPERSEDED)


class Narrator:
    """What is told while the story plays. This one is silent; the CLI's draws bars."""

    def say(self, text: str) -> None:
        """A line that stays."""

    def progress(self, text: str, done: float, total: float | None) -> None:
        """How far the stage under way is."""


@dataclass(slots=True)
class Story:
    """One play of the demo. `at_stage` is called as each stage begins: tests break things there."""

    options: Options
    setting: Setting
    workload: Workload
    traffic: Traffic
    runs: Runs
    rollouts: Rollouts
    store: LogStore
    engine: AsyncEngine
    narrator: Narrator
    at_stage: Callable[[str], object] = str
    stages: list[Stage] = field(default_factory=list)
    run: Run | None = None
    rollout: Rollout | None = None
    gate: Gate | None = None
    promoted: bool = False

    async def play(self) -> DemoReport:
        """All of it, in order. Raises UnderstudyError when a part does not answer; outcomes are in the report."""
        async with self.stage("start the stand-in, the gateway and the controller"):
            await self._start()
        async with self.stage("send traffic"):
            await self._send_records()
        async with self.stage("wait for vLLM"):
            await self.setting.ready("vllm", f"{self.setting.vllm_url}/models", PATIENCE)
        await self._fly()
        if self.rollout is not None:
            async with self.stage("rehearse and hand over"):
                await self._rehearse()
        if self.promoted:
            async with self.stage("traffic goes to the adapter"):
                await self._check_served()
            async with self.stage("break the candidate on purpose"):
                await self._break()
        async with self.stage("report"):
            return await self._report()

    @asynccontextmanager
    async def stage(self, name: str) -> AsyncIterator[None]:
        """Time a stage."""
        self.at_stage(name)
        self.narrator.say(name)
        started = time.monotonic()
        yield
        self.stages.append(Stage(name=name, seconds=round(time.monotonic() - started, 2)))

    async def _start(self) -> None:
        names = ["vllm", "gateway", "controller", *(() if self.options.upstream else ("stand-in",))]
        self.setting.start(*names)
        if not self.options.upstream:
            await self.setting.ready("stand-in", f"{self.setting.upstream_url}/models", 60)
        await self.setting.ready("gateway", f"{self.setting.gateway_url}/readyz", 60)

    async def _send_records(self) -> None:
        items = self.workload.items[: self.options.records]
        done = itertools.count(1)
        await self.traffic.send(
            items,
            concurrency=16,
            on_done=lambda: self.narrator.progress("exchanges", next(done), len(items)),
        )
        await self._shipped()
        ledger = self.traffic.ledger
        logged = (await self.store.counts(WORKLOAD)).live
        self.narrator.say(
            f"{ledger.sent} exchanges went in ({ledger.streamed} streamed), {logged} are in the log store: "
            + ("equal" if logged == ledger.sent else "NOT EQUAL")
        )

    async def _shipped(self) -> set[str]:
        """Wait until the spool has been shipped as far as the clients' replies; the ids that the log store has."""
        until = time.monotonic() + 60
        while True:
            found = {one.id async for one in self.store.scan(Query(workload=WORKLOAD))}
            if self.traffic.ledger.texts.keys() <= found or time.monotonic() > until:
                return found
            await asyncio.sleep(0.2)

    async def _fly(self) -> None:
        """One turn of the flywheel; the controller does it, the story watches."""
        options: dict[str, Any] = {}
        if self.options.shuffled:
            options = {"labels": "permuted", "start_rollout": False}
        now = time.time()
        run_id = new_run_id(now, os.urandom(2).hex())
        await self.runs.create(run_id=run_id, workload=WORKLOAD, options=options, who="demo", now=now)
        self.run = await self._watch_run(run_id)
        if self.run.state is not RunState.COMPLETED:
            raise UnderstudyError(f"the flywheel run ended {self.run.state}: {self.run.error}")
        for stage in self.run.stages:
            self.stages.append(Stage(name=f"run: {stage.name}", seconds=stage.seconds or 0.0))
        ranked = self.run.result("rank")
        self.narrator.say(ranked["why"])
        if self.options.shuffled:
            self.narrator.say("labels were shuffled: the bad adapter is forced into shadow all the same")
            self.rollout = await self._force()
        elif ranked["rollout"]:
            self.rollout = await self.rollouts.get(ranked["rollout"])
        else:
            self.narrator.say(f"no rollout: {ranked['rollout_why']}")

    async def _watch_run(self, run_id: str) -> Run:
        told: set[str] = set()
        until = time.monotonic() + 2 * PATIENCE
        while time.monotonic() < until:
            run = await self.runs.get(run_id)
            for stage in run.stages:
                if stage.started_at and stage.name not in told:
                    told.add(stage.name)
                    self.at_stage(f"run: {stage.name}")
                    self.narrator.say(f"run: {stage.name}")
                if stage.state == "running" and stage.progress:
                    self.narrator.progress(stage.name, *_share(stage.progress))
            if not run.active:
                return run
            await asyncio.sleep(0.3)
        raise UnderstudyError(f"the flywheel run {run_id} took too long; see {self.setting.log('controller')}")

    async def _force(self) -> Rollout:
        """What `understudy rollout start` does."""
        assert self.run is not None
        rules = load_rules(self.setting.settings.routing_file, self.setting.env)
        candidate = Ref(model="small", adapter=self.run.result("load")["adapter"])
        return await self.rollouts.start(
            rollout_id=f"rollout-{self.run.id.removeprefix('run-')}",
            workload=WORKLOAD,
            candidate=candidate,
            policy=startable(rules, WORKLOAD, candidate),
            salt=self.run.id,
            who="demo",
            why="labels were shuffled; the gate is to refuse this adapter",
            now=time.time(),
            config_snapshot=rules.table.snapshot,
        )

    async def _rehearse(self) -> None:
        """Live traffic, mirrored and scored, then shared out, until the rollout is decided."""
        told = ""
        async with self._flowing():
            until = time.monotonic() + PATIENCE
            while time.monotonic() < until:
                rollout = await self._refresh()
                step = f"{rollout.state}, step {rollout.step + 1} of {len(rollout.policy.steps)}"
                if step != told:
                    told = step
                    self.at_stage(f"rollout: {step}")
                    self.narrator.say(f"rollout: {step}")
                if rollout.state in OVER:
                    break
                self._tell_gate()
                await asyncio.sleep(0.2)
        rollout = await self._refresh()
        self.promoted = rollout.state is State.PROMOTED
        if rollout.state in (State.SHADOW, State.CANARY):
            self.narrator.say("the rollout was not decided in time")
        self.narrator.say(f"rollout: {rollout.state}: {rollout.reason}")

    async def _refresh(self) -> Rollout:
        assert self.rollout is not None
        self.rollout = await self.rollouts.get(self.rollout.id)
        seen = await self.rollouts.observed(self.rollout.id)
        for reading in seen[1].readings if seen else ():
            if reading.kind == "prove" and not self.promoted:
                self.gate = Gate(
                    metric=reading.metric,
                    floor=reading.threshold,
                    estimate=reading.estimate,
                    lower=reading.lower,
                    upper=reading.upper,
                    n=reading.n,
                    verdict=reading.verdict,
                )
        return self.rollout

    def _tell_gate(self) -> None:
        if self.gate is not None and self.gate.estimate is not None:
            gate = self.gate
            self.narrator.progress(
                f"{gate.metric} {gate.estimate:.3f} on {gate.n} pairs, floor {gate.floor:.2f}: {gate.verdict}",
                gate.n,
                None,
            )

    @asynccontextmanager
    async def _flowing(self) -> AsyncIterator[None]:
        """Fresh live traffic, until the block ends; replies under way are waited for."""
        flowing = True
        fresh = self._fresh()
        items = itertools.takewhile(lambda _: flowing, fresh)
        task = asyncio.ensure_future(self.traffic.send(items, concurrency=8))
        try:
            yield
        finally:
            flowing = False
            await task

    def _fresh(self) -> Iterator[Item]:
        """Items that the run has not seen; around again when they are used up."""
        return itertools.cycle(self.workload.items[self.options.records :] or self.workload.items)

    async def _check_served(self) -> None:
        before = self.traffic.ledger.served.copy()
        await self.traffic.send(itertools.islice(self._fresh(), 20), concurrency=4)
        served = self.traffic.ledger.served - before
        self.narrator.say("reply headers say: " + ", ".join(f"{name} served {n}" for name, n in served.items()))
        if set(served) != {str(self.rollout and self.rollout.candidate)}:
            raise UnderstudyError(f"after promotion other models served too: {dict(served)}")

    async def _break(self) -> None:
        """vLLM stops answering while none of its replies has begun: clients must not notice."""
        await asyncio.sleep(0.5)  # mirrors of the last calls end
        errors = len(self.traffic.ledger.errors)
        self.setting.freeze("vllm")
        async with self._flowing():
            until = time.monotonic() + 90
            while time.monotonic() < until:
                if (await self._refresh()).state is not State.PROMOTED:
                    break
                await asyncio.sleep(0.1)
        before = self.traffic.ledger.served.copy()
        await self.traffic.send(itertools.islice(self._fresh(), 20), concurrency=4)
        served = self.traffic.ledger.served - before
        assert self.rollout is not None
        self.narrator.say(
            f"vLLM stopped answering: {len(self.traffic.ledger.errors) - errors} client errors, the rollout is "
            f"{self.rollout.state} ({self.rollout.reason}), served now by {', '.join(served)}"
        )

    async def _report(self) -> DemoReport:
        found = await self._shipped()
        ledger = self.traffic.ledger
        logged = (await self.store.counts(WORKLOAD)).live
        lost = len(ledger.texts.keys() - found)
        exchanges = Exchanges(
            sent=ledger.sent,
            logged=logged,
            lost=lost,
            duplicated=logged - len(found),
            client_errors=len(ledger.errors),
        )
        history = await self.rollouts.history(rollout_id=self.rollout.id) if self.rollout else []
        outcome, verdict = self._verdict(exchanges)
        return DemoReport(
            outcome=outcome,
            verdict=verdict,
            exchanges=exchanges,
            rollout=RolloutStory(
                final_state=self.rollout.state if self.rollout else "none",
                promoted=self.promoted,
                history=tuple(_step(entry) for entry in history),
            ),
            gate=self.gate or Gate(metric="tool_name", floor=FLOOR, verdict="pending"),
            mirrors=await self._mirrors(),
            stages=tuple(self.stages),
            client_error_examples=ledger.errors[:5],
            **await asyncio.to_thread(self._measured),
            **self._named(),
        )

    def _measured(self) -> dict[str, Any]:
        assert self.run is not None
        by_text = {item.text: item for item in self.workload.items}
        gold = {exchange: by_text[text] for exchange, text in self.traffic.ledger.texts.items()}
        base, customized = self.run.result("evaluate:base"), self.run.result("evaluate:customized")
        incumbent = self.run.result("rank")["incumbent"]
        return {
            "experiments": Experiments(
                incumbent=figures.incumbent_figures(base, incumbent, gold),
                base=figures.experiment_figures(base, gold),
                customized=figures.experiment_figures(customized, gold),
            ),
            "control": figures.control_figures(self.run, gold),
            "data": figures.data_figures(self.run, self.workload, gold),
        }

    async def _mirrors(self) -> Mirrors | None:
        if self.rollout is None:
            return None
        sums = await mirror_sums(self.engine, self.store, self.rollout)
        until = time.monotonic() + 10
        while sums.pending and time.monotonic() < until:
            await asyncio.sleep(0.3)
            sums = await mirror_sums(self.engine, self.store, self.rollout)
        return Mirrors(
            eligible=sums.eligible,
            not_sampled=sums.not_sampled,
            over_budget=sums.over_budget,
            shed=sums.shed,
            failed=sums.failed + sums.pending,  # never came back
            scored=sums.scored,
        )

    def _named(self) -> dict[str, Any]:
        assert self.run is not None
        trained = self.run.result("train")
        manifest = self.options.base / "manifest.json"
        base = orjson.loads(manifest.read_bytes()) if manifest.exists() else {}
        production = (
            self.options.upstream or f"stand-in ({self.options.latency_ms:g} ms, {self.options.wrong:.0%} wrong)"
        )
        return {
            "models": {
                "production": production,
                "base": {"path": str(self.options.base), **base},
                "adapter": trained["adapter"],
                "hyperparameters": trained.get("hyperparameters", {}),
            },
            "seeds": {
                "data": self.options.seed,
                "split": self.run.options["seed"],
                "training": self.run.options["seed"],
            },
            "versions": {"understudy": version("understudy"), **trained.get("versions", {})},
        }

    def _verdict(self, exchanges: Exchanges) -> tuple[Any, str]:
        counted = exchanges.sent == exchanges.logged or self.options.retries
        if exchanges.lost or exchanges.duplicated or exchanges.client_errors or not counted:
            return "failed", f"{exchanges.lost} exchanges lost, {exchanges.client_errors} client errors"
        if self.promoted and self.rollout is not None:
            if self.rollout.state is not State.ABORTED:
                return "failed", f"the candidate stopped answering, but the rollout is still {self.rollout.state}"
            return "promoted", "The adapter was promoted; when it stopped answering, the rollout went back unseen."
        assert self.run is not None
        ranked = self.run.result("rank")
        if self.rollout is None:
            return "rejected", f"The adapter is not good enough and was not rolled out: {ranked['rollout_why']}"
        if self.rollout.state is State.ABORTED:
            return "rejected", f"The gate refused the adapter in shadow: {self.rollout.reason}"
        return "rejected", f"The adapter was not promoted: the rollout is {self.rollout.state}: {self.rollout.reason}"


async def play(
    options: Options,
    env: Mapping[str, str],
    narrator: Narrator,
    at_stage: Callable[["Story", str], object] | None = None,
) -> DemoReport:
    """Set the stage, play, and end every process that was started, whatever happens."""
    workload = workload_of(options)
    setting = Setting(options=options, env=env)
    await upgrade(setting.settings.database)
    engine = connect(setting.settings.database)
    store = open_log_store(setting.settings.log_store)
    traffic = Traffic(setting.gateway_url, workload, retries=options.retries)
    story = Story(
        options=options,
        setting=setting,
        workload=workload,
        traffic=traffic,
        runs=Runs(engine),
        rollouts=Rollouts(engine),
        store=store,
        engine=engine,
        narrator=narrator,
    )
    if at_stage is not None:
        story.at_stage = lambda name: at_stage(story, name)
    try:
        return await story.play()
    finally:
        await traffic.close()
        await setting.close()
        await store.close()
        await engine.dispose()


def workload_of(options: Options) -> Workload:
    """All items that may be sent: first the records of the run, then fresh ones. Raises ConfigError for wrong data."""
    if options.data == "generated":
        return grammar.generate(GENERATED_ITEMS, options.seed)
    try:
        whole = load(options.data, options.label, options.only)
        chosen = sample(whole, options.records, options.seed)
    except WorkloadError as error:
        raise ConfigError(str(error)) from error
    texts = {item.text for item in chosen.items}
    rest = [item for item in whole.items if item.text not in texts]
    rest.sort(key=lambda item: hashlib.sha256(f"{options.seed}|{item.text}".encode()).digest())
    return replace(whole, items=(*chosen.items, *rest))


def _share(progress: Mapping[str, Any]) -> tuple[float, float | None]:
    for done, total in (("done", "total"), ("step", "steps"), ("epoch", "epochs")):
        if done in progress:
            return float(progress[done]), float(progress[total]) if progress.get(total) else None
    return 0.0, None


def _step(entry: Entry) -> RolloutStep:
    return RolloutStep(
        at=entry.at,
        who=entry.who,
        event=entry.event,
        from_state=entry.from_state,
        to_state=entry.to_state,
        reason=entry.reason,
    )
