"""Replaying the held-out set against a server that is slow, flaky or talks rubbish, and going on after a kill."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.responses import JSONResponse, PlainTextResponse, Response

from flywheel import dataset
from flywheel.curate import CurateOptions, curate
from flywheel.dataset import Case
from flywheel.evaluate import (
    Endpoint,
    EvaluateOptions,
    EvaluationError,
    evaluate,
    predictions,
    quantile,
    summarise,
)
from gateway.records import JSON
from routing.targets import Price
from tests.flywheel.examples import asks, call, live, right_answer, traffic
from tests.flywheel.fake_vllm import FakeVllm, fake_vllm

QUICK = EvaluateOptions(patience=2.0)


def _answers(_model: str, body: dict[str, Any]) -> dict[str, Any]:
    """Right about the weather, wrong about music."""
    text = body["messages"][-1]["content"]
    return right_answer(text) if "weather" in text else call("get_weather", {})


@pytest.fixture
def vllm() -> Iterator[FakeVllm]:
    with fake_vllm(_answers) as fake:
        yield fake


@pytest.fixture
def cases(tmp_path: Path) -> list[Case]:
    curated = curate(traffic(50), CurateOptions(minimum=2))
    return dataset.write(tmp_path / "dataset", curated, workload="desk", created_at=0.0, lineage={}).cases()


async def _evaluate(
    cases: list[Case], vllm: FakeVllm, path: Path, options: EvaluateOptions = QUICK, model: str = "tiny"
) -> tuple[list[JSON], list[tuple[int, int]]]:
    told: list[tuple[int, int]] = []
    async with httpx.AsyncClient() as client:
        rows = await evaluate(
            cases,
            Endpoint(base_url=vllm.url, model=model),
            path / "out" / "predictions.jsonl",
            client,
            options=options,
            on_progress=lambda done, total: told.append((done, total)),
        )
    return rows, told


async def test_every_case_is_asked_once_and_scored(tmp_path: Path, vllm: FakeVllm, cases: list[Case]) -> None:
    rows, told = await _evaluate(cases, vllm, tmp_path)
    assert [row["id"] for row in rows] == [case.id for case in cases]
    assert sum(row["scores"]["tool_name"] for row in rows) == 10
    assert {row["scores"]["reason"] for row in rows} == {"same", "names_differ"}
    assert vllm.asked == {"tiny": 20}
    assert told[0] == (0, 20)
    assert told[-1] == (20, 20)
    assert vllm.most_at_once <= QUICK.concurrency


async def test_the_request_goes_out_as_logged_but_for_what_a_replay_must_change(tmp_path: Path, vllm: FakeVllm) -> None:
    logged = asks("weather x #Oslo", stream=True, stream_options={"include_usage": True}, tool_choice="auto", seed=3)
    warm = {**asks("weather y #Oslo"), "temperature": 0.7, "max_tokens": 9}
    odd = [live(50, "weather x #Oslo", request=logged), live(51, "weather y #Oslo", request=warm)]
    curated = curate([*traffic(20), *odd], CurateOptions(minimum=2, test_fraction=0.9))
    found = dataset.write(tmp_path / "d", curated, workload="desk", created_at=0.0, lineage={}).cases()
    await _evaluate(found, vllm, tmp_path)
    by_text = {body["messages"][-1]["content"]: body for body in vllm.bodies}
    sent = by_text["weather x #Oslo"]
    assert {"stream", "stream_options"} & sent.keys() == set()
    assert (sent["model"], sent["temperature"], sent["max_tokens"]) == ("tiny", 0, 256)
    assert (sent["tool_choice"], sent["seed"], sent["tools"]) == ("auto", 3, logged["tools"])
    assert (by_text["weather y #Oslo"]["temperature"], by_text["weather y #Oslo"]["max_tokens"]) == (0.7, 9)


@pytest.mark.parametrize("status", [404, 429, 502, 503])
async def test_a_server_that_is_away_for_a_moment_costs_nothing(
    tmp_path: Path, vllm: FakeVllm, cases: list[Case], status: int
) -> None:
    vllm.trouble = [JSONResponse({}, status_code=status) for _ in range(6)]
    rows, _ = await _evaluate(cases, vllm, tmp_path)
    assert [row["error"] for row in rows if row["error"]] == []


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (PlainTextResponse("<html>"), "not JSON: <html>"),
        (JSONResponse([1]), "no message in the reply"),
        (JSONResponse({"choices": []}), "no message in the reply"),
        (JSONResponse({"message": "too long"}, status_code=400), "HTTP 400"),
    ],
)
async def test_rubbish_is_an_answer_that_scores_nothing(
    tmp_path: Path, vllm: FakeVllm, cases: list[Case], reply: Response, error: str
) -> None:
    vllm.trouble = [reply]
    rows, _ = await _evaluate(cases, vllm, tmp_path)
    (failed,) = [row for row in rows if row["error"]]
    assert failed["error"].startswith(error)
    assert failed["scores"] == {"tool_name": 0.0, "tool_call": 0.0, "reason": "no_reply"}
    assert summarise(rows, None, concurrency=4)["failed"] == 1


async def test_a_request_that_crashes_the_server_again_and_again_is_a_failure_of_the_model(
    tmp_path: Path, vllm: FakeVllm, cases: list[Case]
) -> None:
    vllm.trouble = [JSONResponse({}, status_code=500) for _ in range(3)]
    rows, _ = await _evaluate(cases[:1], vllm, tmp_path)
    assert rows[0]["error"].startswith("HTTP 500")


async def test_a_server_that_stays_away_is_no_verdict(tmp_path: Path, vllm: FakeVllm, cases: list[Case]) -> None:
    """The evaluation fails, says so, and leaves no row behind that would count against the model."""
    with pytest.raises(EvaluationError, match="gave no answer as gone for 1 s"):
        await _evaluate(cases, vllm, tmp_path, EvaluateOptions(patience=1.0), model="gone")
    assert list(predictions(tmp_path / "out" / "predictions.jsonl")) == []


async def test_an_evaluation_goes_on_after_its_last_whole_line(
    tmp_path: Path, vllm: FakeVllm, cases: list[Case]
) -> None:
    """A kill tears the last line: that case is asked again, the others are not."""
    whole, _ = await _evaluate(cases, vllm, tmp_path)
    path = tmp_path / "out" / "predictions.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:7]) + lines[7][:40])
    vllm.asked.clear()
    again, told = await _evaluate(cases, vllm, tmp_path)
    assert vllm.asked == {"tiny": 13}
    assert told[0] == (7, 20)
    assert [row["scores"] for row in again] == [row["scores"] for row in whole]
    assert {json.loads(line)["id"] for line in path.read_text().splitlines()} == {case.id for case in cases}


async def test_a_slow_server_shows_in_the_latency(tmp_path: Path, vllm: FakeVllm, cases: list[Case]) -> None:
    vllm.delay = 0.05
    rows, _ = await _evaluate(cases[:4], vllm, tmp_path)
    assert min(row["latency_ms"] for row in rows) >= 50


async def test_the_summary_counts_and_prices(tmp_path: Path, vllm: FakeVllm, cases: list[Case]) -> None:
    rows, _ = await _evaluate(cases, vllm, tmp_path)
    summary = summarise(rows, Price(input=1.0, output=2.0), concurrency=4)
    assert (summary["n"], summary["tool_name"]["correct"], summary["tool_name"]["share"]) == (20, 10, 0.5)
    assert summary["interval"] == [0.2993, 0.7007]  # Wilson, 10 of 20
    assert summary["usd_per_1000"] == 0.07  # 50 tokens at 1 and 10 at 2 dollars a million
    assert summary["latency_concurrency"] == 4
    assert summarise([], None, concurrency=4)["tool_name"]["share"] is None


@pytest.mark.parametrize(("share", "value"), [(0.5, 5.0), (0.95, 10.0), (0.0, 1.0), (1.0, 10.0), (0.91, 10.0)])
def test_quantiles_are_of_the_nearest_rank(share: float, value: float) -> None:
    assert quantile([float(n) for n in range(1, 11)], share) == value
    assert quantile([], share) is None
