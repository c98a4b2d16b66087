"""How a rollout is shown on a terminal: as a line, as a panel, in listings."""

from collections.abc import Iterable
from datetime import UTC, datetime

from rich.console import Group
from rich.table import Table
from rich.text import Text

from flywheel.cli.output import columns
from flywheel.shares import Shares
from flywheel.status import Seen, View, weight
from routing.evidence import GateReading
from routing.rollout import Rollout
from routing.store import Entry

__all__ = ["history_lines", "line", "listing", "panel", "scarce"]


def line(rollout: Rollout) -> str:
    """One line: where it stands and what it waits for."""
    return (
        f"{rollout.workload}  {rollout.candidate}  {_state(rollout)}  step {rollout.step + 1}/"
        f"{len(rollout.policy.steps)}  weight {weight(rollout)} %  {rollout.reason}".rstrip()
    )


def panel(view: View, now: float) -> Group:
    """The whole picture: steps, wanted and actual share, the gates with estimate, bounds and counts, what it awaits."""
    rollout = view.rollout
    parts: list[Text | Table] = [
        Text(f"rollout {rollout.id}"),
        Text(f"{rollout.workload}  {rollout.candidate}  {_state(rollout)}  {_steps(rollout)}"),
    ]
    if view.shares is not None:
        parts.append(Text(_traffic(rollout, view.shares)))
        if view.shares.warning:
            parts.append(Text(f"note: {view.shares.warning}"))
    parts += _looked_at(rollout, view.seen, now)
    step = [approval for approval in rollout.approvals if approval.step == rollout.step and approval.approver]
    if step:
        names = ", ".join(approval.approver for approval in step)
        parts.append(Text(f"approved by {names} ({len(step)} of {rollout.policy.approvers})"))
    if rollout.reason:
        parts.append(Text(rollout.reason))
    return Group(*parts)


def _looked_at(rollout: Rollout, seen: Seen, now: float) -> list[Text | Table]:
    if seen is None:
        return [Text("the controller has not looked yet (is `understudy work` running?)")]
    at, observed = seen
    step = rollout.current_step
    needs = [f"held {max(0.0, now - rollout.step_started_at):.0f} s of {step.hold_seconds:g} s"]
    if step.weight:
        needs.insert(0, f"{observed.exchanges} exchanges of the candidate of {max(1, step.min_exchanges)}")
    if step.min_pairs or not step.weight:
        needs.insert(0, f"{observed.pairs} pairs of {max(1, step.min_pairs)}")
    since = "since the promotion" if rollout.promoted else "this step"
    told = f"{observed.pairs} pairs, {observed.exchanges} exchanges" if rollout.promoted else ", ".join(needs)
    table = Table(box=None, pad_edge=False)
    for heading in ("gate", "kind", "verdict", "estimate", "between", "wanted", "n"):
        table.add_column(heading)
    for reading in observed.readings:
        table.add_row(*(Text(cell) for cell in _cells(reading)))
    told_at = Text(f"{since}: {told}; the controller looked {max(0.0, now - at):.0f} s ago")
    return [told_at, table, *map(Text, scarce(seen))]


def _cells(reading: GateReading) -> tuple[str, ...]:
    digits = 6 if reading.metric == "cost_usd" else 3
    estimate = "-" if reading.estimate is None else f"{reading.estimate:.{digits}f}"
    between = f"{reading.lower:.{digits}f} .. {reading.upper:.{digits}f}"
    wanted = reading.wanted or f"{reading.threshold:g}"
    return reading.metric, reading.kind, reading.verdict, estimate, between, wanted, str(reading.n)


def scarce(seen: Seen) -> list[str]:
    """The classes that have too few pairs to be held to their floor yet, by name: a line for each such gate."""
    return [
        f"{reading.metric}: too few pairs yet of {len(reading.scarce)} of {len(reading.slices)} classes: "
        + ", ".join(f"{each.name} ({each.n})" for each in reading.slices if each.name in reading.scarce)
        for reading in (seen[1].readings if seen else ())
        if reading.scarce
    ]


def _steps(rollout: Rollout) -> str:
    """All steps, the present one in brackets: `shadow ▸ [5] ▸ 25 ▸ 100`."""
    names = [str(step.weight) if step.weight else "shadow" for step in rollout.policy.steps]
    if rollout.live and not rollout.promoted:
        names[rollout.step] = f"[{names[rollout.step]}]"
    return " ▸ ".join(names)


def _traffic(rollout: Rollout, found: Shares) -> str:
    wanted = f"traffic: wanted {weight(rollout)} %"
    if found.actual is None:
        return f"{wanted}, nothing has come in since this step began"
    return (
        f"{wanted}, actual {found.actual:.1%} of the last {found.exchanges} exchanges of this step "
        f"({found.keys} distinct sticky keys)"
    )


def _state(rollout: Rollout) -> str:
    return f"{rollout.state}, degraded" if rollout.degraded else str(rollout.state)


def listing(rollouts: Iterable[Rollout]) -> str:
    return columns(
        ("ROLLOUT", "WORKLOAD", "CANDIDATE", "STATE", "STEP", "WEIGHT", "REASON"),
        (
            (
                each.id,
                each.workload,
                str(each.candidate),
                _state(each),
                f"{each.step + 1}/{len(each.policy.steps)}",
                f"{weight(each)} %",
                each.reason,
            )
            for each in rollouts
        ),
    )


def history_lines(entries: Iterable[Entry]) -> str:
    """Times are UTC."""
    return columns(
        ("AT", "ROLLOUT", "EVENT", "FROM", "TO", "WHO", "REASON", "WHY"),
        (
            (
                datetime.fromtimestamp(entry.at, UTC).strftime("%Y-%m-%d %H:%M:%S"),
                entry.rollout_id,
                entry.event,
                entry.from_state or "-",
                entry.to_state,
                entry.who,
                entry.reason,
                entry.why,
            )
            for entry in entries
        ),
    )
