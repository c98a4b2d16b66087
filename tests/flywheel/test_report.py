"""The demo's report: its JSON keys, the page with and without figures, escaping, and how it looks in a browser."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from rich.console import Console

from flywheel.report import DemoReport, print_report, render_html, write
from tests.browser import CHROMIUM

VERDICT = "The customized model took over: 93.4 % of the held-out tools right, for 2 % of the cost."

FULL: dict[str, Any] = {
    "outcome": "promoted",
    "verdict": VERDICT,
    "exchanges": {"sent": 2411, "logged": 2411, "lost": 0, "duplicated": 0, "client_errors": 0},
    "experiments": {
        "incumbent": {
            "n": 274,
            "tool_name": 0.956,
            "tool_name_and_arguments": 0.956,
            "interval": [0.925, 0.975],
            "latency_p50_ms": 301.2,
            "latency_p95_ms": 318.9,
            "usd_per_1000": 0.1412,
        },
        "base": {
            "n": 274,
            "tool_name": 0.102,
            "tool_name_and_arguments": 0.0,
            "interval": [0.072, 0.144],
            "latency_p50_ms": 88.0,
            "latency_p95_ms": 121.0,
            "usd_per_1000": 0.0031,
            "agreement": 0.099,
        },
        "customized": {
            "n": 274,
            "tool_name": 0.934,
            "tool_name_and_arguments": 0.883,
            "interval": [0.898, 0.958],
            "latency_p50_ms": 64.0,
            "latency_p95_ms": 97.0,
            "usd_per_1000": 0.0024,
            "agreement": 0.901,
        },
    },
    "control": {"name": "TF-IDF with logistic regression", "n": 274, "tool_name": 0.969},
    "gate": {
        "metric": "tool_call_match",
        "floor": 0.8,
        "estimate": 0.897,
        "lower": 0.823,
        "upper": 0.951,
        "n": 156,
        "verdict": "successful",
    },
    "rollout": {
        "final_state": "aborted",
        "history": [
            {
                "at": 1795000000.0,
                "who": "demo",
                "event": "start",
                "from_state": None,
                "to_state": "shadow",
                "reason": "",
            },
            {
                "at": 1795000021.0,
                "who": "controller",
                "event": "gates passed",
                "from_state": "shadow",
                "to_state": "canary",
                "reason": "tool_call_match at least 0.80: lower bound 0.823 after 156 pairs",
            },
            {
                "at": 1795000042.5,
                "who": "controller",
                "event": "gates passed",
                "from_state": "canary",
                "to_state": "promoted",
                "reason": "weight 100",
            },
            {
                "at": 1795000060.0,
                "who": "gateway",
                "event": "breaker open",
                "from_state": "promoted",
                "to_state": "aborted",
                "reason": "3 failures in a row: no connection",
            },
        ],
    },
    "stages": [
        {"name": "start the servers", "seconds": 48.2},
        {"name": "send traffic", "seconds": 39.9},
        {"name": "evaluate the base model", "seconds": 21.0},
        {"name": "train", "seconds": 69.3},
        {"name": "evaluate the customized model", "seconds": 19.1},
        {"name": "rehearse and promote", "seconds": 61.0},
        {"name": "break it", "seconds": 6.4},
    ],
    "models": {
        "incumbent": {"name": "stand-in", "latency_ms": 300, "wrong": 0.04},
        "base": "tiny-llama, 0.23 M parameters",
        "adapter": "support-router-20261121-0f3a9c21",
    },
    "seeds": {"data": 7, "split": 7, "training": 7},
    "versions": {"understudy": "0.1.0", "python": "3.11.7", "vllm": "0.32.0", "torch": "2.13.0"},
    "data": {"name": "support-router", "records": 685, "train": 411, "test": 274, "templates_on_both_sides": 0},
    "mirrors": {"eligible": 800, "not_sampled": 640, "over_budget": 0, "shed": 3, "failed": 1, "scored": 156},
}

EARLY = {
    "outcome": "failed",
    "verdict": "vLLM did not start.",
    "exchanges": {"sent": 0, "logged": 0, "lost": 0, "duplicated": 0, "client_errors": 0},
}


def visible(page: str) -> str:
    """The page's text, without its style and its tags."""
    return re.sub(r"<[^>]+>", " ", re.sub(r"<style>.*?</style>", "", page, flags=re.S))


def test_json_keeps_every_key_and_figure() -> None:
    written = json.loads(DemoReport.model_validate(FULL).to_json())
    for key, value in FULL.items():
        if key != "experiments":
            assert written[key] == value
    for name, figures in FULL["experiments"].items():
        assert {key: written["experiments"][name][key] for key in figures} == figures


def test_further_figures_stand_in_the_json() -> None:
    report = DemoReport.model_validate({**FULL, "pretraining": {"text": "hwu64", "seconds": 240}})
    assert json.loads(report.to_json())["pretraining"] == {"text": "hwu64", "seconds": 240}


def test_an_unknown_outcome_is_refused() -> None:
    with pytest.raises(ValidationError, match="outcome"):
        DemoReport.model_validate({**FULL, "outcome": "fine"})


def test_the_page_shows_the_figures_and_needs_nothing_from_outside() -> None:
    page = render_html(DemoReport.model_validate(FULL))
    text = visible(page)
    for figure in (VERDICT, "93.4 %", "89.8 to 95.8 %", "64 ms", "$0.0024", "82.3 to 95.1 %", "96.9 %", "2411"):
        assert figure in text
    assert not re.search(r"https?://|<script|<link|<img|@import|url\(", page)


def test_what_was_not_measured_is_said() -> None:
    page = render_html(DemoReport.model_validate(EARLY))
    text = visible(page)
    assert "vLLM did not start." in text
    assert "No request was sent." in text
    assert text.count("not measured") >= 9
    assert "No rollout was started." in text
    assert "None" not in text


def test_one_missing_experiment_leaves_the_others() -> None:
    shown = {**FULL, "experiments": {**FULL["experiments"], "customized": None}}
    text = visible(render_html(DemoReport.model_validate(shown)))
    assert "95.6 %" in text
    assert "not measured" in text


def test_a_wrong_account_is_said() -> None:
    counts = {"sent": 10, "logged": 9, "lost": 1, "duplicated": 0, "client_errors": 0}
    mirrors = {**FULL["mirrors"], "shed": 0}
    text = visible(render_html(DemoReport.model_validate({**FULL, "exchanges": counts, "mirrors": mirrors})))
    assert "do not agree" in text
    assert "do NOT add up" in text


def test_everything_from_outside_is_escaped() -> None:
    bad = '<script>alert("x")</script>'
    hostile = {
        **FULL,
        "verdict": bad,
        "data": {**FULL["data"], "name": bad},
        "models": {bad: bad, "m": {bad: bad}},
        "gate": {**FULL["gate"], "metric": bad, "verdict": bad},
        "stages": [{"name": bad, "seconds": 1.0}],
        "rollout": {"final_state": bad, "history": [{"at": bad, "who": bad, "event": bad, "reason": bad}]},
    }
    page = render_html(DemoReport.model_validate(hostile))
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 12


def test_writing_makes_both_files(tmp_path: Path) -> None:
    as_json, as_page = write(DemoReport.model_validate(FULL), tmp_path / "new")
    assert as_json.name == "demo-report.json"
    assert json.loads(as_json.read_text())["outcome"] == "promoted"
    assert as_page.name == "demo-report.html"
    assert as_page.read_text().startswith("<!doctype html>")


def test_a_written_report_can_be_read_again(tmp_path: Path) -> None:
    report = DemoReport.model_validate(FULL)
    as_json, _ = write(report, tmp_path)
    assert DemoReport.model_validate_json(as_json.read_text()) == report


@pytest.mark.parametrize("values", [FULL, EARLY], ids=["full", "early"])
def test_the_terminal_shows_it_too(values: dict[str, Any]) -> None:
    console = Console(width=140)
    with console.capture() as shown:
        print_report(DemoReport.model_validate(values), console)
    text = shown.get()
    assert values["verdict"] in text
    assert ("93.4 %" if values is FULL else "not measured") in text


def test_the_terminal_takes_reasons_as_text_not_as_markup() -> None:
    history = [{"at": 1.0, "who": "me", "event": "abort", "reason": "[red]no[/red] [/nothing]"}]
    values = {**FULL, "rollout": {"final_state": "aborted", "history": history}}
    console = Console(width=140)
    with console.capture() as shown:
        print_report(DemoReport.model_validate(values), console)
    assert "[red]no[/red] [/nothing]" in shown.get()


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("values", [FULL, EARLY], ids=["full", "early"])
def test_chromium_draws_the_page(values: dict[str, Any], tmp_path: Path) -> None:
    _, page = write(DemoReport.model_validate(values), tmp_path)
    picture = tmp_path / "report.png"
    subprocess.run(
        [
            str(CHROMIUM),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--window-size=1100,2200",
            f"--screenshot={picture}",
            page.as_uri(),
        ],
        check=True,
        capture_output=True,
        timeout=120,
    )
    drawn = picture.read_bytes()
    assert drawn.startswith(b"\x89PNG")
    assert (int.from_bytes(drawn[16:20], "big"), int.from_bytes(drawn[20:24], "big")) == (1100, 2200)
    assert len(drawn) > 20_000  # an empty page of this size takes a tenth of it
