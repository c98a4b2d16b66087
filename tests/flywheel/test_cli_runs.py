"""`understudy runs` as a person uses it: what it says, its exit codes, and its JSON."""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from flywheel.cli.runs import app
from flywheel.runs import Runs, RunState, StageState
from migrations.upgrade import upgrade
from routing.store import connect
from tests.flywheel.examples import routing_yaml

RANK = {
    "table": [
        {
            "candidate": "small:desk-1",
            "experiment": "customized",
            "tool_name": 0.95,
            "tool_name_lower": 0.9,
            "tool_call": 0.8,
            "n": 40,
            "latency_p50_ms": 12.0,
            "latency_p95_ms": 20.0,
            "usd_per_1000": None,
            "failed": 0,
        }
    ],
    "best": "small:desk-1",
    "passes": True,
    "why": "passes",
    "rollout": "rollout-1",
    "rollout_why": "small:desk-1 passes",
}


class Command:
    """The group, run against one installation."""

    def __init__(self, folder: Path) -> None:
        self.config = folder / "understudy.toml"
        self.config.write_text(f'data_dir = "{folder}"\nrouting_file = "{folder}/routing.yaml"\n')
        routing_yaml(folder / "routing.yaml", base_url="http://127.0.0.1:9/v1")
        self.url = f"sqlite+aiosqlite:///{folder}/control.db"
        asyncio.run(upgrade(self.url))

    def __call__(self, *arguments: str) -> Result:
        return CliRunner().invoke(app, [*arguments, "--config", str(self.config)])

    def store(self, use: Callable[[Runs], Awaitable[Any]]) -> Any:
        async def run() -> Any:
            engine = connect(self.url)
            try:
                return await use(Runs(engine))
            finally:
                await engine.dispose()

        return asyncio.run(run())


@pytest.fixture
def runs(tmp_path: Path) -> Command:
    return Command(tmp_path)


def _started(runs: Command, *options: str) -> str:
    return str(json.loads(runs("start", "desk", "--json", *options).stdout)["id"])


def _finished(runs: Command, run_id: str, *, state: RunState, **rank: Any) -> None:
    async def act(store: Runs) -> None:
        run = await store.begin(await store.get(run_id), options={}, stages=["curate", "rank"])
        results = [{"read": 90, "kept": 80, "train": 50, "test": 30}, {**RANK, **rank}]
        for stage, result in zip(run.stages, results, strict=True):
            done = replace(stage, state=StageState.COMPLETED, started_at=1.0, finished_at=2.0, result=result)
            run = await store.save_stage(run, done)
        await store.finish(run, state=state, now=3.0, error="" if state is RunState.COMPLETED else "train: no memory")

    runs.store(act)


def test_a_run_is_asked_for_with_only_what_was_said(runs: Command) -> None:
    """The rest is the policy's, as it is when the controller takes the run up."""
    told = json.loads(runs("start", "desk", "--json", "--seed", "7", "--no-rollout", "--base-model", "small").stdout)
    assert told["state"] == "queued"
    assert told["options"] == {"seed": 7, "labels": "as_logged", "start_rollout": False, "base_models": ["small"]}
    assert re.fullmatch(r"run-\d{8}-\d{6}-[0-9a-f]{4}", told["id"])
    assert "is queued" in runs("start", "desk", "--labels", "permuted").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["start", "dask"], "no workload dask in routing.yaml; there are: desk"),
        (["start", "default"], "workload default has no flywheel section"),
        (["start", "desk", "--base-model", "large"], "no model large in routing.yaml"),
        (["start", "desk", "--base-model", "prod"], "model prod serves no adapters"),
        (["show", "run-9"], "no run run-9"),
        (["cancel", "run-9"], "no run run-9"),
    ],
)
def test_what_cannot_be_is_told_at_once(runs: Command, arguments: list[str], message: str) -> None:
    result = runs(*arguments)
    assert result.exit_code == 1  # the root command turns these into one line and exit code 2
    assert message in str(result.exception)


def test_runs_are_listed_and_shown(runs: Command) -> None:
    run_id = _started(runs)
    assert run_id in runs("list").stdout
    assert [run["id"] for run in json.loads(runs("list", "--json", "--workload", "desk").stdout)] == [run_id]
    assert "queued" in runs("show", run_id).stdout
    assert json.loads(runs("show", run_id, "--json").stdout)["workload"] == "desk"


@pytest.mark.parametrize(("state", "code"), [(RunState.COMPLETED, 0), (RunState.FAILED, 1)])
def test_the_exit_code_says_how_a_run_ended(runs: Command, state: RunState, code: int) -> None:
    run_id = _started(runs)
    _finished(runs, run_id, state=state)
    shown = runs("show", run_id, "--watch")
    assert (shown.exit_code, state.value in shown.stdout) == (code, True)
    changes = runs("show", run_id, "--watch", "--json").stdout.splitlines()
    assert [json.loads(change)["state"] for change in changes] == [state.value]


def test_cancelling(runs: Command) -> None:
    run_id = _started(runs)
    assert "is cancelled" in runs("cancel", run_id).stdout
    assert runs("show", run_id).exit_code == 3
    assert "nothing to cancel" in str(runs("cancel", run_id).exception)


@pytest.mark.parametrize(("passes", "code"), [(True, 0), (False, 1)])
def test_a_report_ranks_and_its_exit_code_says_whether_one_passed(runs: Command, passes: bool, code: int) -> None:
    run_id = _started(runs)
    _finished(runs, run_id, state=RunState.COMPLETED, passes=passes)
    text = runs("report", run_id)
    assert text.exit_code == code
    assert "95.0 %" in text.stdout
    assert json.loads(runs("report", run_id, "--json").stdout)["best"] == "small:desk-1"


def test_a_run_without_a_ranking_has_no_report(runs: Command) -> None:
    assert "has no ranking yet" in str(runs("report", _started(runs)).exception)


@pytest.mark.parametrize("verb", ["start", "list", "show", "cancel", "report"])
def test_every_verb_has_an_example(verb: str) -> None:
    shown = CliRunner().invoke(app, [verb, "--help"]).stdout
    assert f"understudy runs {verb}" in shown
