"""From rounds to bench-report.json, a table and a plot. Pure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from statistics import median
from typing import Any, Final

from tests.bench.side_by_side.rounds import Measured, Round

__all__ = ["FIGURES", "as_report", "goals", "plot", "table"]

JSON = dict[str, Any]
FIGURES: Final = (
    "requests_per_s",
    "cpu_us_per_request",
    "added_p50_ms",
    "added_p99_ms",
    "cpu_us_per_event",
    "resident_mb",
)
OURS: Final = "understudy"
_DIGITS: Final = {"requests_per_s": 0, "cpu_us_per_request": 1, "cpu_us_per_event": 1, "resident_mb": 1}


def as_report(measured: Measured, asked: Sequence[str], not_measured: Mapping[str, str], about: JSON) -> JSON:
    """`targets` has the six figures of each; `details` all that was measured, with its spread over the rounds.

    What a target added is its figure less that of `direct` in the same round; `added_p50_ms` and `added_p99_ms` are of
    one connection or of many, whichever is worse. A figure that could not be measured is null, `problems` says why.
    """
    names = [name for name in asked if any(name in each for each in measured.rounds)]
    details = {name: _details(measured, name) for name in names}
    return {
        "targets": {name: _figures(details[name]) for name in names},
        **about,
        "not_measured": {name: why for name, why in not_measured.items() if name not in names}
        | {name: "; ".join(why) for name, why in measured.problems.items() if name not in names},
        "problems": {name: why for name, why in measured.problems.items() if name in names},
        "goals": [goal.as_json() for goal in goals(details)],
        "details": details,
    }


def _details(measured: Measured, name: str) -> JSON:
    rounds = [_with_added(each, name) for each in measured.rounds if name in each]
    figures = sorted({figure for each in rounds for figure in each})
    found = {figure: _spread([each[figure] for each in rounds if figure in each]) for figure in figures}
    return found | {figure: _spread([value]) for figure, value in measured.once.get(name, {}).items()}


def _with_added(figures: Round, name: str) -> dict[str, float]:
    """A round's figures of one target, and for each latency how much of it `direct` did not have."""
    mine, bare = figures[name], figures.get("direct", {})
    return mine | {
        f"added_{figure}": value - bare[figure]
        for figure, value in mine.items()
        if figure.endswith("_ms") and figure in bare
    }


def _spread(values: Sequence[float]) -> JSON:
    return {"median": round(median(values), 4), "min": round(min(values), 4), "max": round(max(values), 4)}


def _figures(details: JSON) -> JSON:
    found: JSON = {name: _median(details, name) for name in FIGURES if not name.startswith("added")}
    found |= {f"added_{each}_ms": _worse(details, f"added_{{}}_{each}_ms") for each in ("p50", "p99")}
    return {name: None if found[name] is None else round(found[name], _DIGITS.get(name, 3)) for name in FIGURES}


def _median(details: JSON, name: str) -> float | None:
    return details[name]["median"] if name in details else None


def _worse(details: JSON, name: str) -> float | None:
    found = [_median(details, name.format(connections)) for connections in ("one", "many")]
    return max((value for value in found if value is not None), default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What our target is held to; `value` is None where it was not measured."""

    what: str
    value: float | None
    least: float | None = None
    most: float | None = None

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        return (self.least is None or self.value >= self.least) and (self.most is None or self.value <= self.most)

    def as_json(self) -> JSON:
        bound = {"at_least": self.least} if self.least is not None else {"at_most": self.most}
        return {
            "goal": self.what,
            **bound,
            "value": None if self.value is None else round(self.value, 3),
            "met": self.met,
        }


def goals(details: Mapping[str, JSON]) -> list[Goal]:
    """The goals of the gateway with everything on; empty where it was not measured."""
    if OURS not in details:
        return []
    mine = details[OURS]

    def rate(name: str) -> float | None:
        theirs, ours = _median(details.get(name, {}), "requests_per_s"), _median(mine, "requests_per_s")
        return ours / theirs if theirs and ours else None

    wrong = [_median(mine, f"many_streams_events_{how}") for how in ("lost", "merged")]
    return [
        Goal(what="requests/s, times nginx's", value=rate("nginx"), least=0.2),
        Goal(what="requests/s, times LiteLLM's", value=rate("litellm"), least=100),
        Goal(what="requests/s, times Portkey's", value=rate("portkey"), least=15),
        Goal(what="requests/s, times vllm-router's", value=rate("vllm-router"), least=1),
        Goal(what="requests/s, times sglang-router's", value=rate("sglang-router"), least=1),
        Goal(what="requests/s, times ours without the log", value=rate("understudy-nolog"), least=0.85),
        Goal(what="added p50, ms", value=_worse(mine, "added_{}_p50_ms"), most=0.3),
        Goal(what="added p99, ms", value=_worse(mine, "added_{}_p99_ms"), most=1),
        Goal(what="added time to first token p50, ms", value=_worse(mine, "added_first_token_{}_p50_ms"), most=0.3),
        Goal(what="added time to first token p99, ms", value=_worse(mine, "added_first_token_{}_p99_ms"), most=1),
        Goal(what="added gap between events p99, ms", value=_median(mine, "added_event_gap_p99_ms"), most=1),
        Goal(what="CPU of a relayed event, us", value=_median(mine, "cpu_us_per_event"), most=25),
        Goal(what="of 1,000 streams, events lost or merged", most=0,
             value=None if None in wrong else sum(value for value in wrong if value is not None)),
    ]  # fmt: skip


_COLUMNS: Final[Mapping[str, tuple[str, int]]] = {
    "requests/s": ("requests_per_s", 0),
    "CPU us a request": ("cpu_us_per_request", 1),
    "requests/s, 40 KB prompts among them": ("mix_requests_per_s", 0),
    "added p50, p99 ms: one connection": ("added_one", 2),
    "many": ("added_many", 2),
    "added first token p50, p99 ms": ("added_first_token_many", 2),
    "added gap p99 ms": ("added_event_gap_p99_ms", 2),
    "CPU us an event": ("cpu_us_per_event", 1),
    "MB": ("resident_mb", 0),
}


def table(report: JSON) -> str:
    """The table as Markdown, what could not be measured, and how our goals stand."""
    lines = ["| | " + " | ".join(_COLUMNS) + " |", "|---|" + "---|" * len(_COLUMNS)]
    for name, details in report["details"].items():
        cells = [_cell(details, figure, digits) for figure, digits in _COLUMNS.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", *(f"{name} was not measured: {why}" for name, why in report["not_measured"].items())]
    lines += [f"{name}: {why}" for name, reasons in report["problems"].items() for why in reasons]
    lines += [line for name, details in report["details"].items() for line in _fell_behind(name, details)]
    ours = report["details"].get(OURS, {})
    lines += _said_of_what_is_behind(ours)
    lines += [_said(goal) for goal in report["goals"]]
    return "\n".join(lines)


def _said_of_what_is_behind(ours: JSON) -> list[str]:
    """The shipper's and the teller's cost, and the rate at which one core at idle priority is enough for them."""
    shipped, spent = _median(ours, "shipped_per_s"), _median(ours, "shipper_cpu_us_per_exchange")
    rate, told = _median(ours, "requests_per_s"), _median(ours, "teller_cpu_us_per_exchange")
    if shipped is None or spent is None or rate is None:
        return []
    lines = [
        f"shipper, at idle priority on the load's core: {spent:.0f} us of CPU an exchange, {shipped:,.0f} exchanges a "
        f"second when the load is gone; {min(rate, shipped):,.0f} requests/s can be sustained"
    ]
    if told:
        both = min(rate, 1e6 / (spent + told))
        lines.append(
            f"teller of spans, beside it: {told:.0f} us an exchange; {both:,.0f} requests/s with every span sent"
        )
    return lines


def _fell_behind(name: str, details: JSON) -> list[str]:
    """What did not come in time, or came wrong."""
    lines = [
        f"{name}: {details[f'{prefix}events_{kind}']['max']:,.0f} of the events of {what} were {how}"
        for prefix, what in (("", "256 streams"), ("many_streams_", "1,000 streams"))
        for kind, how in (("lost", "lost"), ("late", "not there in time"), ("merged", "merged"))
        if details.get(f"{prefix}events_{kind}", {}).get("max")
    ]
    late = [details[figure]["max"] for figure in details if figure.endswith("_unanswered")]
    return [*lines, f"{name}: up to {max(late):,.0f} requests were not answered in time"] if any(late) else lines


def _cell(details: JSON, figure: str, digits: int) -> str:
    if figure.startswith("added") and not figure.endswith("_ms"):
        pair = [_cell(details, f"{figure}_{each}_ms", digits) for each in ("p50", "p99")]
        return ", ".join(pair) if any(pair) else ""
    if figure not in details:
        return ""
    spread = details[figure]
    value = f"{spread['median']:,.{digits}f}"
    if figure != "requests_per_s" or not spread["median"]:
        return value
    return f"{value} ±{(spread['max'] - spread['min']) / 2 / spread['median']:.0%}"


def _said(goal: JSON) -> str:
    bound = f"at least {goal['at_least']}" if "at_least" in goal else f"at most {goal['at_most']}"
    stands = {True: "met", False: "NOT MET", None: "not measured"}[goal["met"]]
    value = "" if goal["value"] is None else f"{goal['value']:,}, "
    return f"{goal['goal']}: {value}{bound}: {stands}"


_PANELS: Final = (
    ("requests_per_s", "requests a second, one core"),
    ("cpu_us_per_request", "us of CPU a request"),
    ("added_p99_ms", "added p99 at 200 a second, ms"),
    ("cpu_us_per_event", "us of CPU a relayed event"),
)
_WIDTH, _BAR, _LEFT, _LONGEST = 760, 20, 150, 480


def plot(report: JSON) -> str:
    """Bars as SVG, on a logarithmic scale: peers lie three powers of ten apart."""
    parts, top = [], 34
    for figure, title in _PANELS:
        rows = {name: value[figure] for name, value in report["targets"].items() if value[figure]}
        parts.append(f'<text x="8" y="{top}" font-weight="bold">{escape(title)} (logarithmic)</text>')
        top += 12
        for name, value in rows.items():
            parts += _bar(name, value, list(rows.values()), top)
            top += _BAR
        top += 34
    style = "font-family:sans-serif;font-size:13px;background:white"
    inner = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{top}" style="{style}">\n{inner}\n</svg>\n'
    )


def _bar(name: str, value: float, all_of_them: Sequence[float], top: int) -> list[str]:
    size = [math.log10(max(each, 0.001)) for each in all_of_them]
    low, high = min(size) - 0.5, max(size)
    length = round((math.log10(max(value, 0.001)) - low) / (high - low) * _LONGEST)
    colour = "#1a7f5a" if name.startswith(OURS) else "#9aa5b1"
    middle = top + _BAR - 6
    return [
        f'<text x="{_LEFT - 8}" y="{middle}" text-anchor="end">{escape(name)}</text>',
        f'<rect x="{_LEFT}" y="{top + 2}" width="{length}" height="{_BAR - 5}" fill="{colour}"/>',
        f'<text x="{_LEFT + length + 6}" y="{middle}">{value:,.{0 if value >= 100 else 2}f}</text>',
    ]
