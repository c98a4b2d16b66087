"""From known rounds to the report, the table and the plot; and what the command makes of its arguments."""

import re
import xml.etree.ElementTree as ET
from typing import Any

import pytest

from tests.bench.side_by_side.__main__ import INSTALLED, TARGETS, arguments
from tests.bench.side_by_side.install import pinned
from tests.bench.side_by_side.report import FIGURES, as_report, plot, table
from tests.bench.side_by_side.rounds import Measured, Round

ABOUT = {"versions": {"nginx": "1.22.1"}, "commit": "abc", "date": "2026-11-21T00:00:00Z", "machine": {}, "method": {}}


def one_round(more: float) -> Round:
    """Ours makes a fifth of nginx's requests/s; `more` is a noise that hits direct and target alike."""
    direct = {"one_p50_ms": 0.1 + more, "one_p99_ms": 0.2 + more, "many_p50_ms": 0.1 + more, "many_p99_ms": 0.3 + more}
    ours = {"one_p50_ms": 0.3 + more, "one_p99_ms": 0.9 + more, "many_p50_ms": 0.2 + more, "many_p99_ms": 1.6 + more}
    rate = {"requests_per_s": 10_000 + 100 * more, "cpu_us_per_request": 75.04, "cpu_us_per_event": 22.2}
    return {
        "direct": direct | {"requests_per_s": 200_000.0, "event_gap_p99_ms": 0.1},
        "nginx": {"requests_per_s": 50_000.0, "cpu_us_per_request": 15.0},
        "understudy-nolog": {"requests_per_s": 12_000.0},
        "understudy": ours | rate | {"resident_mb": 99.4, "event_gap_p99_ms": 0.4},
    }


@pytest.fixture
def report() -> dict[str, Any]:
    once = {"many_streams_events_lost": 0.0, "many_streams_events_merged": 1.0, "shipped_per_s": 8000.0}
    measured = Measured(
        [dict(reversed(one_round(more).items())) for more in (0.0, 2.0, 1.0)],
        {"portkey": ["it does not start"], "nginx": ["streams: refused"]},
        {"understudy": once | {"shipper_cpu_us_per_exchange": 61.0, "teller_cpu_us_per_exchange": 189.0}},
    )
    return as_report(measured, list(TARGETS), {"litellm": "pip failed"}, ABOUT)


def test_each_target_has_the_six_figures(report: dict[str, Any]) -> None:
    named = ["direct", "nginx", "understudy", "understudy-nolog"]
    assert list(report["targets"]) == list(report["details"]) == named
    assert {tuple(figures) for figures in report["targets"].values()} == {FIGURES}
    assert report["targets"]["understudy"] == {
        "requests_per_s": 10_100,
        "cpu_us_per_request": 75.0,
        "added_p50_ms": 0.2,
        "added_p99_ms": 1.3,
        "cpu_us_per_event": 22.2,
        "resident_mb": 99.4,
    }
    assert report["targets"]["nginx"]["added_p50_ms"] is None
    assert {"versions", "commit", "date"} <= set(report)


def test_who_was_not_measured_is_named_with_the_reason(report: dict[str, Any]) -> None:
    assert report["not_measured"] == {"litellm": "pip failed", "portkey": "it does not start"}
    assert report["problems"] == {"nginx": ["streams: refused"]}
    shown = table(report)
    assert "litellm was not measured: pip failed" in shown
    assert "nginx: streams: refused" in shown


def test_the_spread_is_that_of_the_rounds(report: dict[str, Any]) -> None:
    details = report["details"]["understudy"]
    assert details["requests_per_s"] == {"median": 10_100, "min": 10_000, "max": 10_200}
    assert details["added_many_p99_ms"] == {"median": 1.3, "min": 1.3, "max": 1.3}


def test_goals_say_whether_they_are_met(report: dict[str, Any]) -> None:
    goals = {goal["goal"]: goal for goal in report["goals"]}
    assert goals["requests/s, times nginx's"] == {
        "goal": "requests/s, times nginx's", "at_least": 0.2, "value": 0.202, "met": True
    }  # fmt: skip
    assert goals["requests/s, times ours without the log"]["value"] == 0.842
    assert goals["requests/s, times ours without the log"]["met"] is False
    assert goals["requests/s, times LiteLLM's"]["met"] is None
    assert goals["added p99, ms"]["met"] is False
    assert goals["of 1,000 streams, events lost or merged"] == {
        "goal": "of 1,000 streams, events lost or merged", "at_most": 0, "value": 1.0, "met": False
    }  # fmt: skip


def test_the_table_has_a_row_for_each_target(report: dict[str, Any]) -> None:
    rows = [line for line in table(report).splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1
    assert "| understudy | 10,100 ±1% | 75.0 |" in rows[4]
    assert "understudy: 1 of the events of 1,000 streams were merged" in table(report)
    assert "8,000 exchanges a second when the load is gone; 8,000 requests/s can be sustained" in table(report)
    assert "189 us an exchange; 4,000 requests/s with every span sent" in table(report)


def test_the_plot_is_svg_with_a_bar_for_each_figure(report: dict[str, Any]) -> None:
    drawn = ET.fromstring(plot(report))
    bars = [bar for bar in drawn if bar.tag.endswith("rect")]
    known = [value for each in report["targets"].values() for name, value in each.items() if value]
    assert len(bars) == len(known) - 1 - 1  # without memory and the p50
    assert {"200,000", "10,100", "75.00"} <= {text.text for text in drawn}
    assert all(0 < float(bar.attrib["width"]) <= 480 for bar in bars)


def test_every_peer_that_is_installed_is_pinned() -> None:
    assert INSTALLED == ("litellm", "portkey", "vllm-router", "sglang-router")
    for name in INSTALLED:
        assert re.fullmatch(r"[0-9.a-z]+", pinned(name))


def test_direct_is_always_measured() -> None:
    assert arguments(["--only", "understudy,nginx"]).names == ["direct", "nginx", "understudy"]
    assert arguments([]).names == list(TARGETS)


@pytest.mark.parametrize(
    "wrong", [["--only", "nginy"], ["--rounds", "0"], ["--seconds", "0.5"], ["--record"], ["--what"]]
)
def test_wrong_arguments_are_named(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        arguments(wrong)
    assert ended.value.code == 2
    assert wrong[0] in capsys.readouterr().err


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        arguments(["--help"])
    assert 'make bench BENCH_ARGS="--only nginx,understudy --rounds 1 --seconds 2"' in capsys.readouterr().out
