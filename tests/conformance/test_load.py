"""NVIDIA's aiperf as load: it measures the gateway as any server, and each of its calls is in the log."""

import json
import time
from pathlib import Path

from gateway.records import Outcome
from tests.conformance.answers import MODEL
from tests.conformance.conftest import Ways
from tests.conformance.installed import ROOT, installed, output
from tests.conformance.upstream import KEY


def test_aiperf(ways: Ways, tmp_path: Path) -> None:
    """Three seconds of streams, four at a time. The tokenizer is the demo's: another would come from the internet."""
    folder = installed("NVIDIA's aiperf", "load")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"text": f"Question {n}: what is up?"}) + "\n" for n in range(8)))
    before, started = ways.upstream.calls, time.time()
    server = ("--model", MODEL, "--url", ways.through.removesuffix("/v1"), "--endpoint-type", "chat", "--api-key", KEY)
    asked = ("--input-file", str(prompts), "--custom-dataset-type", "single_turn", "--streaming")
    load = ("--concurrency", "4", "--benchmark-duration", "3", "--workers-max", "1")
    counted = ("--tokenizer", str(ROOT / "flywheel/demo/base"), "--artifact-dir", str(tmp_path / "found"))
    quiet = ("--ui", "none", "--no-gpu-telemetry", "--no-server-metrics")
    output(f"{folder}/bin/aiperf", "profile", *server, *asked, *load, *counted, *quiet)
    found = json.loads((tmp_path / "found/profile_export_aiperf.json").read_text())
    lines = (tmp_path / "found/profile_export.jsonl").read_text().splitlines()
    calls = ways.upstream.calls - before
    assert (found["error_summary"], found["was_cancelled"], found["is_complete"]) == ([], False, True)
    assert found["request_count"]["avg"] == len(lines) == calls > 10
    assert found["time_to_first_token"]["count"] == calls
    assert outcomes(ways, started, calls) == [Outcome.OK] * calls


def outcomes(ways: Ways, since: float, wanted: int) -> list[Outcome]:
    """Of the exchanges since a time, when there are as many as wanted; what is there after half a minute otherwise."""
    deadline = time.monotonic() + 30
    while True:
        found = [one.outcome for one in ways.runner.run(ways.served.logged()) if one.timestamp >= since]
        if len(found) >= wanted or time.monotonic() > deadline:
            return found
        time.sleep(0.2)
