"""What `understudy runs` shows: tables, one-line summaries and exit codes. Pure."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, assert_never

from rich.console import Group
from rich.table import Table
from rich.text import Text

from flywheel.runs import Run, RunState, Stage

__all__ = ["exit_code", "line", "listing", "panel", "report_table"]


def exit_code(run: Run) -> int:
    """0 completed or under way, 1 failed, 3 cancelled."""
    match run.state:
        case RunState.QUEUED | RunState.RUNNING | RunState.CANCELLING | RunState.COMPLETED:
            return 0
        case RunState.FAILED:
            return 1
        case RunState.CANCELLED:
            return 3
        case _:
            assert_never(run.state)


def line(run: Run) -> str:
    """The run in one line, which changes when something happened."""
    stage = run.next_stage() if run.active else None
    at = f", {stage.name} {stage.state}{_progress(stage)}" if stage else ""
    return f"{run.id} {run.state}{at}{': ' + run.error if run.error else ''}"


def listing(runs: Sequence[Run]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("run", no_wrap=True)
    for column in ("workload", "state", "asked for", "by", "at"):
        table.add_column(column, overflow="fold")
    for run in runs:
        stage = run.next_stage()
        at = stage.name if stage and run.active else run.error[:60]
        table.add_row(run.id, run.workload, run.state.value, _time(run.created_at), run.who, at)
    return table


def panel(run: Run, now: float) -> Group:
    """The run with all its stages."""
    table = Table("stage", "state", "seconds", "", box=None, pad_edge=False)
    for stage in run.stages:
        began = stage.started_at
        seconds = stage.seconds if stage.seconds is not None or began is None else now - began
        told = stage.error or _progress(stage).strip() or _gist(stage)
        table.add_row(stage.name, stage.state.value, "" if seconds is None else f"{seconds:.1f}", Text(told))
    head = Text(f"run {run.id}  workload {run.workload}  {run.state}{': ' + run.error if run.error else ''}")
    return Group(head, table)


def report_table(run: Run) -> Group:
    """The ranking, best first, with what came of it. `call` is tool name and arguments together."""
    result, data = run.result("rank"), run.result("curate")
    table = Table(box=None, pad_edge=False)
    for column in ("candidate", "experiment", "tool name", "at least", "call", "p50 ms", "p95 ms", "$/1000"):
        table.add_column(column, overflow="fold")
    for row in result["table"]:
        table.add_row(
            row["candidate"],
            row["experiment"],
            _share(row["tool_name"]),
            _share(row["tool_name_lower"]),
            _share(row["tool_call"]),
            _number(row["latency_p50_ms"]),
            _number(row["latency_p95_ms"]),
            _number(row["usd_per_1000"], 4),
        )
    counts = f"{data['read']} exchanges read, {data['kept']} records: {data['train']} train, {data['test']} held out"
    ends = f"rollout {result['rollout']}" if result["rollout"] else "no rollout"
    return Group(Text(counts), table, Text(f"{ends}: {result['rollout_why']}"))


def _progress(stage: Stage) -> str:
    progress = stage.progress or {}
    if "total" in progress:
        return f" {progress['done']}/{progress['total']}"
    if "epochs" in progress:
        watched = progress.get("val_loss")
        loss = f"loss {progress.get('loss')}" if watched is None else f"val_loss {watched}"
        return f" epoch {progress.get('epoch')}/{progress['epochs']} {loss}"
    return ""


def _gist(stage: Stage) -> str:
    """What a completed stage found, in a few words."""
    result = stage.result or {}
    match stage.name.partition("@")[0]:
        case "curate" if result:
            return f"{result['train']} train, {result['test']} held out of {result['read']} read"
        case "evaluate:base" | "evaluate:customized" if result:
            return f"tool name {result['tool_name']['correct']}/{result['n']}, p50 {result['latency_p50_ms']} ms"
        case "train" | "load" if result:
            return str(result["adapter"])
        case "rank" if result:
            return str(result["rollout_why"])
        case _:
            return ""


def _share(value: Any) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _number(value: Any, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _time(at: float) -> str:
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M:%S}Z"
