"""Our CPU time a request as a ratio to nginx's, measured in turns: about the same on fast machines and slow ones.

Recorded in cpu_ratio.json by `make bench BENCH_ARGS="--short --record"`.
"""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Final

from tests.bench.side_by_side.ours import OURS
from tests.bench.side_by_side.programs import CannotMeasure
from tests.bench.side_by_side.rounds import Plan, Say, closed_loop, measure
from tests.bench.side_by_side.targets import PEERS

__all__ = ["LIMIT", "RECORDED", "Ratio", "measure_ratio", "recorded"]

RECORDED: Final = Path(__file__).with_name("cpu_ratio.json")
LIMIT: Final = 1.2
QUIET: Final = 0.75
ROUNDS: Final = 5
SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """The median over the rounds, and their spread; `core_share` is how much of its core ours had under full load."""

    ratio: float
    lowest: float
    highest: float
    understudy_us: float
    nginx_us: float
    core_share: float

    @property
    def quiet(self) -> bool:
        """Whether ours can be blamed: others on its core drive our code out of the caches, and nginx's less."""
        return self.core_share >= QUIET

    def too_high(self, before: float) -> bool:
        """More than LIMIT allows, compared with what was recorded."""
        return self.ratio > before * LIMIT


def measure_ratio(folder: Path, environments: Path, say: Say) -> Ratio:
    """Our CPU time a request, everything on, over nginx's, in short rounds. Raises CannotMeasure."""
    starts = {"nginx": PEERS["nginx"], "understudy": OURS["understudy"]}
    plan = Plan(rounds=ROUNDS, seconds=SECONDS, seed=1, plain=[closed_loop], streamed=[], once=False)
    measured = measure(starts, plan, folder, environments, say)
    if measured.problems:
        raise CannotMeasure(str(measured.problems))
    ours, theirs = ([each[name]["cpu_us_per_request"] for each in measured.rounds] for name in ("understudy", "nginx"))
    ratios = [mine / nginx for mine, nginx in zip(ours, theirs, strict=True)]
    return Ratio(
        ratio=round(median(ratios), 2),
        lowest=round(min(ratios), 2),
        highest=round(max(ratios), 2),
        understudy_us=round(median(ours), 1),
        nginx_us=round(median(theirs), 1),
        core_share=round(median(each["understudy"]["core_share"] for each in measured.rounds), 2),
    )


def recorded() -> float | None:
    """The ratio that was recorded last."""
    with contextlib.suppress(FileNotFoundError):
        return float(json.loads(RECORDED.read_text())["ratio"])
    return None
