"""The hot path stays as fast as it was: our CPU per request over nginx's, measured here, against what is recorded."""

from pathlib import Path

import pytest

from gateway.compiled import built
from tests.bench.side_by_side.cpu_ratio import LIMIT, Ratio, measure_ratio, recorded
from tests.bench.side_by_side.programs import CannotMeasure, missing

TRIES = 3


def ratio(value: float, *, core_share: float = 1.0) -> Ratio:
    return Ratio(ratio=value, lowest=value, highest=value, understudy_us=10 * value, nginx_us=10, core_share=core_share)


def test_a_fifth_more_is_too_much() -> None:
    assert not ratio(5.9).too_high(5.0)
    assert ratio(6.1).too_high(5.0)


def test_only_a_target_that_had_its_core_is_blamed() -> None:
    assert ratio(9, core_share=0.95).quiet
    assert not ratio(9, core_share=0.3).quiet


def test_cpu_per_request_is_what_was_recorded(tmp_path: Path) -> None:
    """The short form of `make bench`. What is too much is measured again: only what stays too much is our fault."""
    if lacking := missing():
        pytest.skip(f"NOT TESTED, the speed of the hot path: {', '.join(lacking)} not found (`make services`)")
    if built() is None:
        pytest.skip("NOT TESTED, the speed of the hot path: these sources are not compiled (`make compiled`)")
    before = recorded()
    assert before is not None
    for number in range(TRIES):
        try:
            found = measure_ratio(_folder(tmp_path, number), tmp_path, print)
        except CannotMeasure as why:
            pytest.skip(f"NOT TESTED, the speed of the hot path: {why}")
        if not found.too_high(before):
            return
        if not found.quiet:
            pytest.skip(f"NOT TESTED, the speed of the hot path: the machine is too busy: {found}, recorded {before}")
    pytest.fail(f"{found} is more than {LIMIT - 1:.0%} above the recorded {before}; what has become slower?")


def _folder(path: Path, number: int) -> Path:
    made = path / f"try-{number}"
    made.mkdir()
    return made
