"""What is measured of each target: rounds in shuffled order, everybody else asleep while one is measured."""

import contextlib
import json
import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.side_by_side import targets
from tests.bench.side_by_side.processes import cores, cpu_seconds, resident_mb, signalled, wait_until_calm
from tests.bench.side_by_side.programs import CannotMeasure, Programs, request
from tests.bench.side_by_side.targets import CONTENT, REPLY, Place, Start, Target, chat
from tests.ports import free_port

__all__ = ["Measured", "Plan", "Round", "Say", "closed_loop", "measure", "whole_plan"]

RATE = 200  # requests a second of the open loops
EVENTS = 20  # a second of each stream
STREAMS, MANY_STREAMS = 256, 1000
CONNECTIONS = 32
TRIES = 4
CALM = 60.0  # seconds in which what a load left behind is shipped and told of, before the next begins
REST = 1.0  # seconds without a change after which work is done
PROMPT, LONG_PROMPT = "y" * 900, "z" * 40_000
FIRST = "@0:"  # how the first event's content begins
END = "data: [DONE]"
OUR_LOGGED = "understudy"

Round = dict[str, dict[str, float]]  # by target, by figure
Say = Callable[[str], None]
Scenario = Callable[[Target, Programs, float], dict[str, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much is measured; `seconds` is the length of a closed or open loop. `plain` and `streamed` by upstream."""

    rounds: int
    seconds: float
    seed: int
    plain: Sequence[Scenario]
    streamed: Sequence[Scenario]
    once: bool  # what is measured of our logged target alone, after the rounds


@dataclass(slots=True)
class Measured:
    """Every figure of every round; what could not be measured, by target; what was measured once."""

    rounds: list[Round]
    problems: dict[str, list[str]]
    once: dict[str, dict[str, float]]


def closed_loop(target: Target, programs: Programs, seconds: float) -> dict[str, float]:
    """As much as it takes, 1 KB each way."""
    return _saturated(target, programs, seconds, [chat(PROMPT)], warm=1)


def mix(target: Target, programs: Programs, seconds: float) -> dict[str, float]:
    """As much as it takes; every fourth prompt has 40 KB."""
    return _saturated(target, programs, seconds, [chat(PROMPT)] * 3 + [chat(LONG_PROMPT)], "mix_")


def _saturated(
    target: Target, programs: Programs, seconds: float, bodies: list[dict[str, Any]], prefix: str = "", warm: float = 0
) -> dict[str, float]:
    def load(length: float) -> tuple[int, float]:
        return programs.closed_loop(
            target.port, bodies, target.headers, seconds=length, connections=CONNECTIONS, least=len(CONTENT)
        )

    if warm:
        load(warm)
    requests, took, used, tries = 0, 0.0, 0.0, 0
    while used < seconds / 3 and tries < TRIES:  # once, unless others have the cores
        before = cpu_seconds(target.serving)
        more, lasted = load(seconds)
        requests, took, tries = requests + more, took + lasted, tries + 1
        used += cpu_seconds(target.serving) - before
    if not requests:
        raise CannotMeasure(f"no request was answered in {took:.0f} s")
    found = {"requests_per_s": requests / took, "cpu_us_per_request": used / requests * 1e6, "core_share": used / took}
    return {f"{prefix}{figure}": value for figure, value in found.items()}


def open_loop(target: Target, programs: Programs, seconds: float) -> dict[str, float]:
    """At fixed times, over one connection and over many."""
    sent = request(chat(PROMPT), target.headers)
    return _at_fixed_times(target, programs, seconds, sent, CONTENT, "", length=len(REPLY) if target.exact else None)


def first_token(target: Target, programs: Programs, seconds: float) -> dict[str, float]:
    """The same with streams of one event: the time until it is there."""
    sent = request(chat(PROMPT, stream=True, max_tokens=1), target.headers)
    return _at_fixed_times(target, programs, seconds, sent, END, "first_token_", first=FIRST)


def _at_fixed_times(
    target: Target, programs: Programs, seconds: float, sent: bytes, expect: str, prefix: str, **more: Any
) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, connections in (("one", 1), ("many", CONNECTIONS)):
        programs.open_loop(target.port, sent, expect, rate=RATE, seconds=0.3, connections=connections, **more)  # warm
        took = programs.open_loop(
            target.port, sent, expect, rate=RATE, seconds=seconds, connections=connections, **more
        )
        found |= {f"{prefix}{name}_p50_ms": took.p50, f"{prefix}{name}_p99_ms": took.p99}
        found |= {f"{prefix}{name}_unanswered": took.unanswered}
    return found


def streams(target: Target, programs: Programs, seconds: float) -> dict[str, float]:
    """256 streams at once, 20 events a second each."""
    return _held(target, programs, seconds, STREAMS, "")


def _held(target: Target, programs: Programs, seconds: float, count: int, prefix: str) -> dict[str, float]:
    """CPU time is taken while nothing but events happens, or over the whole where not all streams were open at once."""
    started = cpu_seconds(target.serving)
    marks: dict[str, tuple[int, float]] = {}
    memory = [resident_mb(target.workers)]

    def steady(what: str, events: int) -> None:
        marks[what] = events, cpu_seconds(target.serving)
        memory.append(resident_mb(target.workers))

    ramp, patience = (1.0, 6.0) if count <= STREAMS else (2.0, 20.0)
    events = round(EVENTS * (seconds + ramp))
    sent = request(chat(PROMPT, stream=True, max_tokens=events), target.headers)
    held = programs.hold(
        target.port, sent, streams=count, events=events, ramp=ramp, patience=ramp + seconds + patience, steady=steady
    )
    used, relayed = cpu_seconds(target.serving) - started, held.events
    if "open" in marks and marks["closing"][0] - marks["open"][0] >= held.events / 4:
        used, relayed = marks["closing"][1] - marks["open"][1], marks["closing"][0] - marks["open"][0]
    return {
        f"{prefix}{name}": value
        for name, value in {
            "cpu_us_per_event": used / max(1, relayed) * 1e6,
            "event_delay_p50_ms": held.delay_p50,
            "event_delay_p99_ms": held.delay_p99,
            "event_gap_p99_ms": held.gap_p99,
            "events": held.events,
            "events_lost": held.lost,
            "events_late": held.late,
            "events_merged": held.merged,
            "resident_mb": max(memory),
        }.items()
    }


def whole_plan(rounds: int, seconds: float, seed: int) -> Plan:
    """Everything."""
    plain, streamed = (closed_loop, mix, open_loop), (first_token, streams)
    return Plan(rounds=rounds, seconds=seconds, seed=seed, plain=plain, streamed=streamed, once=True)


def measure(starts: Mapping[str, Start], plan: Plan, folder: Path, environments: Path, say: Say) -> Measured:
    """Run everything. Targets that fail are in `problems`, with what they did until then."""
    measured = Measured([{} for _ in range(plan.rounds)], {}, {})
    for name, scenarios, extra in (("plain", plan.plain, _ship_and_tell), ("streams", plan.streamed, _many_streams)):
        if not scenarios:
            continue
        place = Place(
            folder=folder / f"{name}-targets",
            environments=environments,
            cores=cores(),
            upstream=free_port(),
            streams=name == "streams",
            program=folder,
        )
        place.folder.mkdir()
        with _started(starts, place, measured, say) as (running, programs):
            _rounds(running, programs, scenarios, plan, measured, say)
            if plan.once and (ours := running.get(OUR_LOGGED)) is not None:
                what = extra.__name__.strip("_").replace("_", " ")
                say(f"{OUR_LOGGED}: {what}")
                with _guarded(ours, what, measured, say), _awake(ours):
                    measured.once.setdefault(OUR_LOGGED, {}).update(extra(ours, programs, plan.seconds))
    return measured


@contextlib.contextmanager
def _started(
    starts: Mapping[str, Start], place: Place, measured: Measured, say: Say
) -> Iterator[tuple[dict[str, Target], Programs]]:
    """The targets that start, each asleep, in front of an upstream that is awake."""
    running: dict[str, Target] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(targets.upstream(place, core=place.cores.upstream, port=place.upstream, name="upstream"))
        for name, start in starts.items():
            say(f"starting {name}")
            try:
                running[name] = stack.enter_context(start(place))
                signalled(running[name].pids, signal.SIGSTOP)
            except CannotMeasure as why:
                measured.problems.setdefault(name, []).append(str(why))
                say(f"{name}: {why}")
        yield running, Programs(place.program, place.cores.load)


def _rounds(
    running: Mapping[str, Target],
    programs: Programs,
    scenarios: Sequence[Scenario],
    plan: Plan,
    measured: Measured,
    say: Say,
) -> None:
    order = random.Random(plan.seed)
    for number, figures in enumerate(measured.rounds, 1):
        for target in order.sample(list(running.values()), len(running)):
            names = ", ".join(scenario.__name__.replace("_", " ") for scenario in scenarios)
            say(f"round {number} of {plan.rounds}: {target.name}: {names}")
            with _awake(target):
                for scenario in scenarios:
                    with _guarded(target, scenario.__name__, measured, say):
                        wait_until_calm((*target.serving, *target.behind.values()), patience=CALM)
                        figures.setdefault(target.name, {}).update(scenario(target, programs, plan.seconds))


@contextlib.contextmanager
def _guarded(target: Target, what: str, measured: Measured, say: Say) -> Iterator[None]:
    try:
        yield
    except CannotMeasure as why:
        measured.problems.setdefault(target.name, []).append(f"{what}: {why}")
        say(f"{target.name}: {what}: {why}")


@contextlib.contextmanager
def _awake(target: Target) -> Iterator[None]:
    signalled(target.pids, signal.SIGCONT)
    try:
        yield
    finally:
        signalled(target.pids, signal.SIGSTOP)


def _many_streams(target: Target, programs: Programs, seconds: float) -> dict[str, float]:
    return _held(target, programs, seconds, MANY_STREAMS, "many_streams_")


def _ship_and_tell(target: Target, programs: Programs, seconds: float) -> dict[str, float]:
    """How fast the shipper works off what a load has left, and what the teller uses for its spans of that.

    One after the other, at idle priority on a core that nobody else wants then.
    """
    shipper, teller = target.behind["shipper"], target.behind["teller"]
    signalled((shipper, teller), signal.SIGSTOP)
    before = _shipped(target)
    closed_loop(target, programs, seconds)
    used, began = cpu_seconds([shipper]), time.monotonic()
    signalled((shipper,), signal.SIGCONT)
    exchanges = _worked_off(target, before, patience=max(15.0, 5 * seconds))
    took = time.monotonic() - began - REST
    found = {
        "shipped_per_s": exchanges / took,
        "shipper_cpu_us_per_exchange": (cpu_seconds([shipper]) - used) / exchanges * 1e6,
    }
    used = cpu_seconds([teller])
    signalled((teller,), signal.SIGCONT)
    time.sleep(REST)
    if wait_until_calm([teller], patience=max(30.0, 10 * seconds)):
        found["teller_cpu_us_per_exchange"] = (cpu_seconds([teller]) - used) / exchanges * 1e6
    return found


def _worked_off(target: Target, before: int, *, patience: float) -> int:
    """How many exchanges were shipped, when no more have been for REST seconds. Raises CannotMeasure when none are."""
    until = time.monotonic() + patience
    last, changed = before, time.monotonic()
    while time.monotonic() < until and (last == before or time.monotonic() - changed < REST):
        time.sleep(0.02)
        if (now := _shipped(target)) != last:
            last, changed = now, time.monotonic()
    if last == before:
        raise CannotMeasure(f"the shipper shipped nothing in {patience:.0f} s: it got no CPU time")
    return last - before


def _shipped(target: Target) -> int:
    """How many exchanges its shipper has shipped since it started."""
    assert target.shipped is not None
    return int(json.loads(target.shipped.read_text())["exchanges"])
