"""The demo's report: its model, its JSON, a self-contained web page of it, and tables for the terminal."""

from collections.abc import Mapping
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

__all__ = [
    "Control",
    "Data",
    "DemoReport",
    "Exchanges",
    "Experiment",
    "Experiments",
    "Gate",
    "Mirrors",
    "RolloutStep",
    "RolloutStory",
    "Stage",
    "print_report",
    "render_html",
    "write",
]

Outcome = Literal["promoted", "rejected", "failed"]

NOT_MEASURED = "not measured"


class _Part(BaseModel):
    """A part of the report. Further figures are kept: they stand in the JSON, not on the page."""

    model_config = ConfigDict(frozen=True, extra="allow")


class Exchanges(_Part):
    """Counts. `client_errors` are requests that a client saw fail."""

    sent: int
    logged: int
    lost: int
    duplicated: int
    client_errors: int

    @property
    def clean(self) -> bool:
        return self.sent == self.logged and not (self.lost or self.duplicated or self.client_errors)


class Experiment(_Part):
    """Figures on the held-out set. Shares are 0..1; `interval` is the 95 % interval of `tool_name`."""

    n: int
    tool_name: float
    tool_name_and_arguments: float | None = None
    interval: tuple[float, float] | None = None
    latency_p50_ms: float | None = None
    latency_p95_ms: float | None = None
    usd_per_1000: float | None = None
    agreement: float | None = None


class Experiments(_Part):
    """None is one that was not measured, because the demo ended before it."""

    incumbent: Experiment | None = None
    base: Experiment | None = None
    customized: Experiment | None = None


class Control(_Part):
    """A simple classifier on the same split: what the task costs without a language model."""

    name: str
    n: int
    tool_name: float


class Gate(_Part):
    """The floor was written before training. `lower` and `upper` are the anytime-valid bounds of `estimate`."""

    metric: str
    floor: float
    estimate: float | None = None
    lower: float | None = None
    upper: float | None = None
    n: int = 0
    verdict: str


class RolloutStep(_Part):
    """One row of the rollout's history. `at` is epoch seconds, or a time as text."""

    at: float | str
    who: str
    event: str
    from_state: str | None = None
    to_state: str | None = None
    reason: str = ""


class RolloutStory(_Part):
    final_state: str
    history: tuple[RolloutStep, ...] = ()


class Stage(_Part):
    name: str
    seconds: float


class Data(_Part):
    """What was played, and how it was split."""

    name: str
    records: int
    train: int
    test: int
    templates_on_both_sides: int | None = None


class Mirrors(_Part):
    """Each eligible exchange ends as one of the other five."""

    eligible: int
    not_sampled: int
    over_budget: int
    shed: int
    failed: int
    scored: int

    @property
    def adds_up(self) -> bool:
        return self.eligible == self.not_sampled + self.over_budget + self.shed + self.failed + self.scored


class DemoReport(_Part):
    """Everything that one demo measured. What it did not reach is None or empty."""

    outcome: Outcome
    verdict: str
    exchanges: Exchanges
    experiments: Experiments = Experiments()
    control: Control | None = None
    gate: Gate | None = None
    rollout: RolloutStory | None = None
    stages: tuple[Stage, ...] = ()
    models: Mapping[str, Any] = {}
    seeds: Mapping[str, Any] = {}
    versions: Mapping[str, Any] = {}
    data: Data | None = None
    mirrors: Mirrors | None = None

    def to_json(self) -> str:
        return self.model_dump_json(indent=2) + "\n"

    @property
    def contestants(self) -> tuple[tuple[str, Experiment | None], ...]:
        """The experiments in the order in which they are shown."""
        found = self.experiments
        return ("incumbent", found.incumbent), ("base", found.base), ("customized", found.customized)

    @property
    def total_seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)


def percent(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{100 * value:.1f} %"


def interval(bounds: tuple[float | None, float | None] | None) -> str:
    if bounds is None or bounds[0] is None or bounds[1] is None:
        return NOT_MEASURED
    return f"{100 * bounds[0]:.1f} to {100 * bounds[1]:.1f} %"


def milliseconds(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:,.1f} ms" if value < 10 else f"{value:,.0f} ms"


def dollars(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"${value:,.4f}" if value < 1 else f"${value:,.2f}"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


def clock(at: float | str) -> str:
    return at if isinstance(at, str) else datetime.fromtimestamp(at, UTC).strftime("%H:%M:%S")


def render_html(report: DemoReport) -> str:
    """The report as one page without scripts or outside files; everything from the report is escaped."""
    page = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "web"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for shape in (percent, interval, milliseconds, dollars, duration, clock):
        page.filters[shape.__name__] = shape
    starts = list(accumulate((stage.seconds for stage in report.stages), initial=0.0))
    return page.get_template("report.html").render(report=report, starts=starts, not_measured=NOT_MEASURED)


def write(report: DemoReport, folder: Path) -> tuple[Path, Path]:
    """Write demo-report.json and demo-report.html into `folder`; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    as_json, as_page = folder / "demo-report.json", folder / "demo-report.html"
    as_json.write_text(report.to_json(), encoding="utf-8")
    as_page.write_text(render_html(report), encoding="utf-8")
    return as_json, as_page


def print_report(report: DemoReport, console: Console) -> None:
    """The report for the terminal, in an order that ends with what matters most."""
    if report.stages:
        console.print(_stages(report))
    if report.rollout is not None and report.rollout.history:
        console.print(_history(report.rollout))
    console.print(_experiments(report))
    if report.gate is not None:
        console.print(_gate(report.gate))
    console.print(_accounting(report))
    colour = {"promoted": "green", "rejected": "yellow", "failed": "red"}[report.outcome]
    console.print(Panel(Text(report.verdict), title=report.outcome, border_style=colour))


def _table(title: str, first: str, *others: str, right: bool = True) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column(first)
    for other in others:
        table.add_column(other, justify="right" if right else "left")
    return table


def _row(table: Table, *cells: object) -> None:
    """Cells are text, never markup: reasons and names come from outside."""
    table.add_row(*(Text(str(cell)) for cell in cells))


def _experiments(report: DemoReport) -> Table:
    table = _table(
        "On the held-out set", "", "n", "tool name", "95 % interval", "with arguments", "p50", "p95", "per 1,000"
    )
    for name, found in report.contestants:
        if found is None:
            _row(table, name, *[NOT_MEASURED] * 7)
            continue
        _row(
            table,
            name,
            found.n,
            percent(found.tool_name),
            interval(found.interval),
            percent(found.tool_name_and_arguments),
            milliseconds(found.latency_p50_ms),
            milliseconds(found.latency_p95_ms),
            dollars(found.usd_per_1000),
        )
    if report.control is not None:
        control = report.control
        _row(table, f"control: {control.name}", control.n, percent(control.tool_name), *[""] * 5)
    return table


def _gate(gate: Gate) -> Table:
    table = _table("The gate", "metric", "floor", "estimate", "bounds", "pairs", "verdict")
    bounds = interval((gate.lower, gate.upper))
    _row(table, gate.metric, percent(gate.floor), percent(gate.estimate), bounds, gate.n, gate.verdict)
    return table


def _history(rollout: RolloutStory) -> Table:
    title = f"The rollout, which ended {rollout.final_state}"
    table = _table(title, "time (UTC)", "who", "event", "state", "reason", right=False)
    for step in rollout.history:
        moved = f"{step.from_state or '-'} > {step.to_state or '-'}"
        _row(table, clock(step.at), step.who, step.event, moved, step.reason)
    return table


def _stages(report: DemoReport) -> Table:
    table = _table("Stages", "stage", "time")
    for stage in report.stages:
        _row(table, stage.name, duration(stage.seconds))
    _row(table, "together", duration(report.total_seconds))
    return table


def _accounting(report: DemoReport) -> Table:
    table = _table("Exchanges", "sent", "logged", "lost", "duplicated", "client errors")
    table.columns[0].justify = "right"
    found = report.exchanges
    _row(table, found.sent, found.logged, found.lost, found.duplicated, found.client_errors)
    return table
