"""One run, stage by stage: what each stage does, and how a run goes on after a kill. Finished stages stay finished."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import structlog

from flywheel import dataset, evaluate, serve, training
from flywheel.adapters import Adapter, Adapters
from flywheel.curate import CurateOptions, curate
from flywheel.incumbent import startable_policy
from flywheel.rank import Entrant, Ranking, rank
from flywheel.runs import Run, RunConflict, Runs, RunState, Stage, StageState
from flywheel.train import Hyperparameters
from gateway.errors import UnderstudyError
from gateway.logstore import LogStore, Query
from gateway.records import JSON, Exchange
from gateway.tasks import Tasks
from routing.audit import Fact
from routing.errors import Conflict, NotFound, Refused, RoutingError, Unavailable
from routing.rules import FlywheelPolicy, Rules
from routing.store import Rollouts
from routing.targets import Model, Ref

__all__ = ["Context", "CycleError", "drive", "plan", "resolve", "stopped"]

log = structlog.get_logger(__name__)

READ_CAP = 20_000  # exchanges that one run looks at, newest first
_PROGRESS_EVERY = 1.0


class CycleError(UnderstudyError):
    """A stage cannot be done as things are; the message says what to change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What stages work with. All of it is the controller's; `rules` gives the newest good ones."""

    runs: Runs
    adapters: Adapters
    rollouts: Rollouts
    log_store: LogStore
    client: httpx.AsyncClient
    tasks: Tasks
    artifacts: Path
    python: Path
    max_lora_rank: int
    rules: Callable[[], Rules]
    env: Mapping[str, str]
    now: Callable[[], float] = time.time
    evaluation: evaluate.EvaluateOptions = field(default_factory=evaluate.EvaluateOptions)

    def folder(self, run: Run) -> Path:
        return (self.artifacts / "runs" / run.id).absolute()

    def model(self, name: str) -> Model:
        """Raises CycleError where routing.yaml lacks it."""
        model = self.rules().table.models.get(name)
        if model is None:
            raise CycleError(f"routing.yaml has no model {name} any more, which this run is about")
        return model


@dataclass(slots=True)
class Progress:
    """What a running stage last said of itself."""

    value: JSON = field(default_factory=dict)

    def say(self, value: JSON) -> None:
        self.value = value


StageFunction = Callable[[Run, str, Context, Progress], Awaitable[JSON]]


def resolve(policy: FlywheelPolicy, overrides: Mapping[str, Any]) -> JSON:
    """A run's options: the policy's, where the one who asked for the run said nothing else."""
    options = {
        "base_models": list(policy.base_models),
        "experiments": list(policy.experiments),
        "seed": policy.seed,
        "limit": policy.limit,
        "min_records": policy.min_records,
        "test_fraction": policy.test_fraction,
        "validation_fraction": policy.validation_fraction,
        "training": dict(policy.training),
        "start_rollout": policy.start_rollout,
        "labels": "as_logged",
    }
    return options | {key: value for key, value in overrides.items() if value is not None}


def plan(options: JSON) -> list[str]:
    """The stages, in order; with several base models each of theirs has `@<model>` behind it."""
    several = len(options["base_models"]) > 1
    stages = ["curate"]
    for model in options["base_models"]:
        behind = f"@{model}" if several else ""
        if "base" in options["experiments"]:
            stages.append(f"evaluate:base{behind}")
        if "customized" in options["experiments"]:
            stages += [f"{kind}{behind}" for kind in ("train", "load", "evaluate:customized")]
    return [*stages, "rank"]


async def drive(run_id: str, context: Context) -> None:
    """Bring a run to its end, from wherever it stands. Cancelling the task leaves it where it can be taken up.

    Returns early where somebody else changed the run or the database went away: call it again.
    """
    run = await context.runs.get(run_id)
    try:
        if run.state is RunState.QUEUED:
            run = await _begin(run, context)
        while run.state is RunState.RUNNING:
            stage = run.next_stage()
            if stage is None:
                run = await context.runs.finish(run, state=RunState.COMPLETED, now=context.now())
                log.info("run completed", run=run.id, workload=run.workload)
            else:
                run = await _step(run, stage, context)
    except RunConflict:
        log.info("run was changed by somebody else", run=run_id)


def stopped(stage: Stage, *, now: float) -> Stage:
    """The stage at which a run was cancelled."""
    return replace(stage, state=StageState.CANCELLED, finished_at=now, progress=None)


async def _begin(run: Run, context: Context) -> Run:
    policy = context.rules().flywheels.get(run.workload)
    if policy is None:
        error = f"workload {run.workload} has no flywheel section in routing.yaml"
        return await context.runs.finish(run, state=RunState.FAILED, now=context.now(), error=error)
    options = resolve(policy, run.options)
    log.info("run begins", run=run.id, workload=run.workload, options=options)
    return await context.runs.begin(run, options=options, stages=plan(options))


async def _step(run: Run, stage: Stage, context: Context) -> Run:
    stage = replace(stage, state=StageState.RUNNING, started_at=stage.started_at or context.now())
    run = await context.runs.save_stage(run, stage)
    try:
        result = await _performed(run, stage.name, context)
    except Unavailable:
        raise  # the control database: the run itself is fine, and the next tick takes it up
    except (UnderstudyError, RoutingError) as error:
        return await _failed(run, stage, str(error), context)
    except Exception as error:
        log.exception("stage failed", run=run.id, stage=stage.name)
        return await _failed(run, stage, f"{type(error).__name__}: {error}", context)
    done = replace(stage, state=StageState.COMPLETED, finished_at=context.now(), result=result, progress=None)
    log.info("stage completed", run=run.id, stage=stage.name, seconds=done.seconds)
    fact = _dataset_fact(run, result, context.now()) if stage.name == "curate" else None
    return await context.runs.save_stage(run, done, fact)


def _dataset_fact(run: Run, result: JSON, now: float) -> Fact:
    """The dataset for the audit log: its digest, and the counts that say what became of each exchange read."""
    body = {"run": run.id, "workload": run.workload, **result}
    return Fact(at=now, who=f"run {run.id}", kind="dataset", subject=body.pop("content_hash"), body=body)


async def _failed(run: Run, stage: Stage, error: str, context: Context) -> Run:
    log.warning("run failed", run=run.id, stage=stage.name, error=error)
    over = replace(stage, state=StageState.FAILED, finished_at=context.now(), error=error)
    told = f"{stage.name}: {error}"
    return await context.runs.finish(run, state=RunState.FAILED, now=context.now(), error=told, stage=over)


async def _performed(run: Run, name: str, context: Context) -> JSON:
    progress = Progress()
    saver = context.tasks.spawn(f"progress {run.id}", _save_progress(run.id, name, progress, context))
    try:
        kind, _, model = name.partition("@")
        return await _STAGES[kind](run, model or run.options["base_models"][0], context, progress)
    finally:
        saver.cancel()


async def _save_progress(run_id: str, name: str, progress: Progress, context: Context) -> None:
    saved: JSON = {}
    while True:
        await asyncio.sleep(_PROGRESS_EVERY)
        if progress.value != saved:
            saved = progress.value
            with suppress(Unavailable):  # only a display: the next one may get through
                await context.runs.save_progress(run_id, name, saved)


async def _curate(run: Run, _model: str, context: Context, progress: Progress) -> JSON:
    folder = context.folder(run) / "dataset"
    if dataset.exists(folder):
        built = await asyncio.to_thread(dataset.read, folder)
    else:
        query = Query(workload=run.workload, newest_first=True, limit=READ_CAP, until=run.created_at)
        exchanges = [exchange async for exchange in context.log_store.scan(query)]
        progress.say({"read": len(exchanges)})
        built = await asyncio.to_thread(_build, run, exchanges, folder, context.now())
    return {"content_hash": built.content_hash, "folder": str(folder), **built.report}


def _build(run: Run, exchanges: Sequence[Exchange], folder: Path, now: float) -> dataset.Dataset:
    options = CurateOptions(
        seed=run.options["seed"],
        limit=run.options["limit"],
        minimum=run.options["min_records"],
        test_fraction=run.options["test_fraction"],
        validation_fraction=run.options["validation_fraction"],
        permute_labels=run.options["labels"] == "permuted",
    )
    lineage = {"run": run.id, "read_cap_reached": len(exchanges) == READ_CAP}
    return dataset.write(folder, curate(exchanges, options), workload=run.workload, created_at=now, lineage=lineage)


async def _evaluate_base(run: Run, name: str, context: Context, progress: Progress) -> JSON:
    model = context.model(name)
    return await _evaluate(run, f"base@{name}", model, model.model, context, progress)


async def _evaluate_customized(run: Run, name: str, context: Context, progress: Progress) -> JSON:
    trained = _train_result(run, name)
    return await _evaluate(run, f"customized@{name}", context.model(name), trained["adapter"], context, progress)


async def _evaluate(run: Run, label: str, model: Model, served_as: str, context: Context, progress: Progress) -> JSON:
    built = await asyncio.to_thread(dataset.read, context.folder(run) / "dataset")
    path = context.folder(run) / "evaluate" / label / "predictions.jsonl"
    rows = await evaluate.evaluate(
        built.cases(),
        evaluate.Endpoint(base_url=model.base_url, model=served_as, api_key=model.api_key),
        path,
        context.client,
        options=context.evaluation,
        on_progress=lambda done, total: progress.say({"done": done, "total": total}),
    )
    summary = evaluate.summarise(rows, model.price, concurrency=context.evaluation.concurrency)
    return {**summary, "model": model.name, "served_as": served_as, "predictions": str(path)}


async def _train(run: Run, name: str, context: Context, progress: Progress) -> JSON:
    folder = context.folder(run) / "train" / name
    manifest = training.finished(folder) or await _trained(run, name, folder, context, progress)
    kept = _adapter(run, name, manifest, folder, context.now())
    await context.adapters.keep(kept)
    return {**manifest, "adapter": kept.name, "path": kept.path, "model": name}


async def _trained(run: Run, name: str, folder: Path, context: Context, progress: Progress) -> JSON:
    model = context.model(name)
    built = await asyncio.to_thread(dataset.read, context.folder(run) / "dataset")
    base = await _base_model(model, run.options["training"], context)
    ingredients = {
        "dataset": built.content_hash,
        "base_model": base,
        "training": run.options["training"],
        "seed": run.options["seed"],
    }
    adapter = training.adapter_name(run.workload, created_at=run.created_at, ingredients=ingredients)
    request = {
        "base_model": base,
        "train": str(built.train),
        "validation": str(built.validation),
        "hyperparameters": run.options["training"],
        "seed": run.options["seed"],
        "adapter_name": adapter,
    }
    return await training.train_in_child(context.python, folder, request, env=context.env, on_progress=progress.say)


async def _base_model(model: Model, wanted: JSON, context: Context) -> str:
    """What the server serves as the base, after checking that it would take what is to be trained."""
    server = serve.Server(model.base_url, context.client, api_key=model.api_key)
    await server.wait_ready(context.evaluation.patience)
    root = (await server.models()).get(model.model, {}).get("root")
    plan = serve.AdapterPlan(
        base_model=str(root or model.model),
        served_as=model.model,
        rank=int(wanted.get("rank", Hyperparameters().rank)),
    )
    await server.check_adapter(plan, max_lora_rank=context.max_lora_rank)
    return plan.base_model


def _adapter(run: Run, model: str, manifest: JSON, folder: Path, now: float) -> Adapter:
    return Adapter(
        name=manifest["adapter_name"],
        workload=run.workload,
        run_id=run.id,
        model=model,
        base_model=manifest["base_model"],
        path=str(folder / "adapter"),
        sha256=str(manifest["sha256"].get("adapter_model.safetensors", "")),
        rank=manifest["hyperparameters"]["rank"],
        created_at=now,
        manifest=manifest,
    )


async def _load(run: Run, name: str, context: Context, _progress: Progress) -> JSON:
    model, trained = context.model(name), _train_result(run, name)
    server = serve.Server(model.base_url, context.client, api_key=model.api_key)
    await server.wait_ready(context.evaluation.patience)
    await server.load_adapter(trained["adapter"], trained["path"])
    return {"adapter": trained["adapter"], "model": name}


async def _rank(run: Run, _model: str, context: Context, _progress: Progress) -> JSON:
    built = await asyncio.to_thread(dataset.read, context.folder(run) / "dataset")
    ranking = rank(_entrants(run), context.rules().rollouts.get(run.workload))
    rollout, why = await _start_rollout(run, ranking, context)
    cases = built.cases()
    times = sorted(case.latency_ms for case in cases)
    costs = [case.cost_usd for case in cases if case.cost_usd is not None]
    return {
        "table": ranking.table(),
        "best": ranking.best.name,
        "passes": ranking.passes,
        "why": ranking.why,
        "rollout": rollout,
        "rollout_why": why,
        "incumbent": {
            "n": len(cases),
            "latency_p50_ms": evaluate.quantile(times, 0.50),
            "latency_p95_ms": evaluate.quantile(times, 0.95),
            "usd_per_1000": round(1000 * sum(costs) / len(costs), 6) if costs else None,
        },
    }


def _entrants(run: Run) -> list[Entrant]:
    entrants = []
    for stage in run.stages:
        kind, _, model = stage.name.partition("@")
        model = model or run.options["base_models"][0]
        if kind == "evaluate:base" and stage.result:
            entrants.append(Entrant(model=model, adapter=None, experiment="base", summary=stage.result))
        if kind == "evaluate:customized" and stage.result:
            adapter = _train_result(run, model)["adapter"]
            entrants.append(Entrant(model=model, adapter=adapter, experiment="customized", summary=stage.result))
    return entrants


async def _start_rollout(run: Run, ranking: Ranking, context: Context) -> tuple[str | None, str]:
    """The id of the run's rollout and why it was started, or None and why it was not."""
    best, rules = ranking.best, context.rules()
    if not ranking.passes:
        return None, ranking.why
    if best.adapter is None:
        return None, f"{best.name} is best as it is: no adapter to roll out; `understudy rollout start` can do it"
    if not run.options["start_rollout"]:
        return None, "the run was to start no rollout; `understudy rollout start` can do it"
    rollout_id = f"rollout-{run.id.removeprefix('run-')}"
    with suppress(NotFound):
        return (await context.rollouts.get(rollout_id)).id, ranking.why
    candidate = Ref(model=best.model, adapter=best.adapter)
    try:
        rollout = await context.rollouts.start(
            rollout_id=rollout_id,
            workload=run.workload,
            candidate=candidate,
            policy=await startable_policy(rules, run.workload, candidate, context.rollouts, context.log_store),
            salt=rollout_id,
            who=f"run {run.id}",
            why=ranking.why,
            now=context.now(),
            config_snapshot=rules.table.snapshot,
        )
    except (Refused, Conflict, NotFound) as error:
        return None, str(error)
    return rollout.id, ranking.why


def _train_result(run: Run, model: str) -> JSON:
    several = len(run.options["base_models"]) > 1
    return run.result(f"train@{model}" if several else "train")


_STAGES: Mapping[str, StageFunction] = {
    "curate": _curate,
    "evaluate:base": _evaluate_base,
    "train": _train,
    "load": _load,
    "evaluate:customized": _evaluate_customized,
    "rank": _rank,
}
