"""The commands db, routes and rollout, on a real file and a real SQLite database."""

import asyncio
import json
import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from flywheel.cli import app
from gateway.config import load_settings
from routing.evidence import Gate, Slices, Verdict, read
from routing.rollout import Observed
from routing.store import Rollouts, connect
from tests.routing.examples import ENV, ROUTING_YAML, reading

ROOT = Path(__file__).parents[2]

Command = Callable[..., Result]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs `understudy …` in a folder with a routing.yaml."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "routing.yaml").write_text(ROUTING_YAML)
    runner = CliRunner(env=ENV)
    return lambda *words, **options: runner.invoke(app, list(words), **options)


@pytest.fixture
def upgraded(command: Command) -> Command:
    assert command("db", "upgrade").exit_code == 0
    return command


def output(result: Result) -> Any:
    return json.loads(result.stdout)


def started(command: Command, candidate: str = "small-1b:a1", *more: str) -> str:
    result = command("rollout", "start", "support-router", "--candidate", candidate, "--who", "ann", "--json", *more)
    return str(output(result)["id"])


def test_db_status_before_and_after_an_upgrade(command: Command) -> None:
    before = command("db", "status", "--json")
    assert (before.exit_code, output(before)["current"]) == (1, None)
    assert "-> " in command("db", "upgrade").stdout
    after = command("db", "status", "--json")
    assert after.exit_code == 0
    assert output(after)["current"] == output(after)["head"]


def test_routes_check(command: Command) -> None:
    result = command("routes", "check", "--json")
    assert result.exit_code == 0
    assert output(result)["workloads"] == 2
    assert command("routes", "check").stdout.startswith("routing.yaml: ok, 3 models, 2 workloads")


def test_a_wrong_file_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    """The whole command, as a process: no traceback."""
    wrong = tmp_path / "routing.yaml"
    wrong.write_text(ROUTING_YAML.replace("serve: prod-70b", "serve: prod").replace(", api_key: env:NIM_API_KEY", ""))
    words = [sys.executable, "-m", "flywheel.cli", "routes", "check", str(wrong)]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert 'workloads.support-router.serve: no model "prod"; did you mean "prod-70b"?' in done.stderr


def test_routes_show_with_and_without_a_rollout(upgraded: Command) -> None:
    plain = upgraded("routes", "show", "--json")
    assert output(plain)["overlays"] == {}
    assert "sk-not-to-be-shown" not in plain.stdout
    started(upgraded)
    assert output(upgraded("routes", "show", "--json"))["overlays"]["support-router"]["mirror"] == 0.2
    assert "small-1b:a1" in upgraded("routes", "show").stdout


def test_routes_explain(upgraded: Command, tmp_path: Path) -> None:
    started(upgraded)
    upgraded("rollout", "promote", "support-router", "--full")
    told = output(upgraded("routes", "explain", "--header", "X-Workload-Id=support-router", "--json"))
    assert (told["workload"], told["target"]) == ("support-router", "small-1b:a1")
    assert told["because"] == "header x-workload-id names it"
    assert told["fallbacks"] == ["prod-70b", "backup"]
    body = tmp_path / "request.json"
    body.write_text(json.dumps({"model": "gpt-4o-mini", "user": "u1", "tools": [{"function": {"name": "refund"}}]}))
    told = output(upgraded("routes", "explain", "--body", str(body), "--json"))
    assert (told["workload"], told["target"], told["sticky"]) == ("plain", "small-1b", "user u1")
    told = output(
        upgraded("routes", "explain", "--body", "-", "--json", input='{"metadata": {"workload_id": "plain"}}')
    )
    assert told["because"] == "metadata.workload_id names it"
    told = output(upgraded("routes", "explain", "--header", "x-litellm-tags=workload_id:plain,user_id:u2", "--json"))
    assert (told["workload"], told["sticky"]) == ("plain", "user u2")
    assert "no rule matched" in upgraded("routes", "explain").stdout


def test_routes_tell_which_of_several_models_serves(upgraded: Command, tmp_path: Path) -> None:
    """show has every share; explain the one of a conversation, and that it is drawn where none is given."""
    several = "serve: [{model: small-1b, weight: 75}, {model: backup, weight: 25}]"
    (tmp_path / "routing.yaml").write_text(ROUTING_YAML.replace("serve: small-1b", several))
    assert "small-1b 75 %, backup 25 %" in upgraded("routes", "show").stdout
    words = ("routes", "explain", "--header", "x-workload-id=plain", "--json")
    assert output(upgraded(*words))["arm"].startswith("drawn for each conversation: small-1b 75 %, backup 25 %")
    told = [output(upgraded(*words, "--conversation", f"c{i}")) for i in range(12)]
    assert {(one["target"], one["arm"]) for one in told} == {
        ("small-1b", "incumbent (75 % of serve)"),
        ("backup", "incumbent (25 % of serve)"),
    }


def test_routes_explain_says_which_conditions_held(command: Command, tmp_path: Path) -> None:
    """The fingerprints that it shows of a request are those that the file takes."""
    request = {
        "model": "any",
        "messages": [{"role": "system", "content": "You give refunds."}, {"role": "user", "content": "hello"}],
        "tools": [{"type": "function", "function": {"name": "refund", "parameters": {"type": "object"}}}],
    }
    body = tmp_path / "request.json"
    body.write_text(json.dumps(request))
    words = ("routes", "explain", "--body", str(body), "--json")
    untold = output(command(*words))
    assert untold["because"] == "no rule matched"
    for rule, told in (
        (f"{{tools_fingerprint: '{untold['tools']}'}}", f"tools_fingerprint {untold['tools']}"),
        (f"{{system_fingerprint: '{untold['system']}'}}", f"system_fingerprint {untold['system']}"),
        (
            "{system_pattern: '(?i)REFUND', path: /v1/chat/completions}",
            "path /v1/chat/completions, system_pattern (?i)REFUND",
        ),
    ):
        text = ROUTING_YAML.replace("{model: [gpt-4o-mini, gpt-4.1-mini]}", rule)
        (tmp_path / "routing.yaml").write_text(text)
        found = output(command(*words))
        assert (found["workload"], found["because"]) == (
            "plain",
            f"its match holds, and no earlier one does: {told}",
        )
    other = output(command(*words, "--path", "/v1/responses", "--default-workload", "support-router"))
    assert other["because"] == "the client's key stands for it"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--header", "x"], "write it as name=value"),
        (["--body", "gone.json"], "No such file"),
        (["--body", "-"], "not JSON"),
    ],
)
def test_routes_explain_of_bad_input(upgraded: Command, words: list[str], text: str) -> None:
    assert text in str(upgraded("routes", "explain", *words).exception)


def test_a_start_tells_what_each_gate_will_need(upgraded: Command) -> None:
    words = ("rollout", "start", "support-router", "--candidate", "small-1b:a1")
    told = upgraded(*words).stdout.splitlines()[1:]
    assert [line.split(":")[0] for line in told] == [
        "  tool_name (prove)",
        "  error_rate (guard)",
        "  latency_p95_ms (guard)",
    ]
    assert re.search(r"a candidate at 0\.9 passes after about \d+ pairs; one at 0\.6 is ended after about \d+", told[0])
    assert "holds from 20 samples on" in told[1]
    again = output(upgraded(*words, "--supersede", "--json"))
    assert again["expected"][0]["metric"] == "tool_name"
    assert 50 < again["expected"][0]["to_pass"] < 150


def test_a_comparison_that_the_log_is_too_young_for_is_refused(upgraded: Command, tmp_path: Path) -> None:
    text = ROUTING_YAML.replace("guard: {at_most: 900}", "guard: {at_most: 1.2x}")
    (tmp_path / "routing.yaml").write_text(text)
    refused = upgraded("rollout", "start", "support-router", "--candidate", "small-1b:a1").exception
    assert "and the log has 0: let it serve for a while, or write at_most" in str(refused)
    assert output(upgraded("rollout", "list", "--json")) == []


def test_status_names_the_classes_that_are_short_of_pairs(upgraded: Command, tmp_path: Path) -> None:
    name = started(upgraded)
    gate = Gate(metric="tool_name", kind="guard", threshold=0.8, slices=Slices(floor=0.7, classes=("pay", "refund")))
    seen = Observed(readings=(read(gate, 30, 32, {"pay": (29, 30), "refund": (1, 2)}),), pairs=32)

    async def observe() -> None:
        engine = connect(f"sqlite+aiosqlite:///{tmp_path}/understudy-data/control.db")
        try:
            await Rollouts(engine).apply(name, seen, who="controller", why="", now=1.0)
        finally:
            await engine.dispose()

    asyncio.run(observe())
    told = upgraded("rollout", "status", "support-router").stdout.splitlines()
    assert told[1] == "tool_name: too few pairs yet of 1 of 2 classes: refund (2)"


def test_a_rollout_by_hand_from_start_to_undo(upgraded: Command) -> None:
    """Each verb answers with where the rollout stands; status says it by its exit code as well."""
    name = started(upgraded)
    assert upgraded("rollout", "status", "support-router").exit_code == 0
    assert upgraded("rollout", "pause", "support-router", "--why", "freeze").exit_code == 0
    assert upgraded("rollout", "status", name).exit_code == 3
    assert upgraded("rollout", "resume", name).exit_code == 0
    assert "approved" in upgraded("rollout", "promote", name).stdout
    promoted = output(upgraded("rollout", "promote", name, "--full", "--json"))
    assert (promoted["state"], promoted["weight"]) == ("promoted", 100)
    assert upgraded("rollout", "status", name, "--watch").exit_code == 0
    undone = output(upgraded("rollout", "undo", "support-router", "--why", "no", "--json"))
    assert (undone["state"], undone["weight"]) == ("aborted", 0)
    assert upgraded("rollout", "status", "support-router").exit_code == 1
    entries = output(upgraded("rollout", "history", "support-router", "--json"))
    assert [entry["event"] for entry in entries] == ["started", "paused", "resumed", "approved", "promoted", "aborted"]
    assert (entries[0]["who"], entries[1]["why"]) == ("ann", "freeze")
    assert len({entry["config_snapshot"] for entry in entries}) == 1
    assert "freeze" in upgraded("rollout", "history").stdout


def test_what_was_taken_back_rests_and_may_be_started_all_the_same(upgraded: Command) -> None:
    started(upgraded)
    upgraded("rollout", "promote", "support-router", "--full")
    upgraded("rollout", "undo", "support-router", "--why", "complaint")
    words = ["rollout", "start", "support-router", "--candidate", "small-1b:a1"]
    refused = str(upgraded(*words).exception)
    assert "small-1b:a1 was taken back (undone) and rests until " in refused
    assert "--despite-cooldown" in refused
    assert "give --why" in str(upgraded(*words, "--despite-cooldown").exception)
    assert upgraded(*words, "--despite-cooldown", "--why", "it was the network").exit_code == 0
    assert "despite_cooldown" in upgraded("rollout", "history", "support-router").stdout


def test_two_approvers_without_authentication_are_told_what_to_do(upgraded: Command, tmp_path: Path) -> None:
    text = ROUTING_YAML.replace("approval: manual", "approval: manual\n      approvers: 2")
    (tmp_path / "routing.yaml").write_text(text)
    started(upgraded)
    for words in (["promote", "support-router"], ["promote", "support-router", "--full"]):
        told = str(upgraded("rollout", *words).exception)
        assert "2 different approvers are wanted" in told
        assert "switch authentication on (gateway.auth)" in told
    assert output(upgraded("rollout", "get", "support-router", "--json"))["state"] == "shadow"


def test_two_approvers_with_keys_of_their_own(
    upgraded: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two keys of one client are one approver; a key without the scope admin is none."""
    text = ROUTING_YAML.replace("approval: manual", "approval: manual\n      approvers: 2")
    (tmp_path / "routing.yaml").write_text(text)
    monkeypatch.setenv("UNDERSTUDY_GATEWAY__AUTH", "on")
    started(upgraded)

    def key(client: str, scopes: str) -> str:
        made = upgraded("keys", "create", "--client", client, "--scopes", scopes, "--json")
        return str(output(made)["secret"])

    def promote(secret: str) -> Result:
        monkeypatch.setenv("UNDERSTUDY_KEY", secret)
        return upgraded("rollout", "promote", "support-router")

    assert "without the scope admin" in str(promote(key("app", "data")).exception)
    assert promote(key("ann", "admin")).exit_code == 0
    assert "ann has approved this already" in str(promote(key("ann", "admin")).exception)
    assert promote(key("bob", "admin")).exit_code == 0
    shown = upgraded("rollout", "get", "support-router").stdout
    assert "approved by ann, bob (2 of 2)" in shown


def test_waiting_ends_with_the_same_codes_as_status(upgraded: Command) -> None:
    started(upgraded)
    waited = upgraded("rollout", "promote", "support-router", "--wait", "--timeout", "0.1")
    assert (waited.exit_code, waited.stdout.splitlines()[-1].endswith("approved")) == (4, True)
    assert upgraded("rollout", "promote", "support-router", "--full", "--wait").exit_code == 0
    more = ["--candidate", "small-1b:a2", "--wait", "--timeout", "0.1", "--json"]
    result = upgraded("rollout", "start", "support-router", *more)
    assert (result.exit_code, output(result)["state"]) == (4, "shadow")
    assert upgraded("rollout", "promote", "support-router").exit_code == 0
    assert upgraded("rollout", "promote", "support-router").exit_code != 0  # refused: approved already


def test_a_degraded_rollout_is_shown_as_such_everywhere(upgraded: Command, tmp_path: Path) -> None:
    """A flag beside promoted, which waits for a person; resume closes the case."""
    text = ROUTING_YAML.replace("approval: manual", "approval: manual\n      on_drift: mark")
    (tmp_path / "routing.yaml").write_text(text)
    name = started(upgraded)
    upgraded("rollout", "promote", name, "--full")

    async def harm() -> None:
        engine = connect(load_settings().database)
        event = Observed(readings=(reading(Verdict.FAILED),))
        await Rollouts(engine).apply(name, event, who="controller", why="", now=time.time())
        await engine.dispose()

    asyncio.run(harm())
    assert upgraded("rollout", "status", name).exit_code == 3
    assert "promoted, degraded" in upgraded("rollout", "status", name, "--watch").stdout
    assert "promoted, degraded" in upgraded("rollout", "list").stdout
    shown = upgraded("rollout", "get", name).stdout
    assert "promoted, degraded" in shown
    assert "degraded: tool_name failed: 0 of 100 pairs agree" in shown
    assert "tool_name failed" in output(upgraded("rollout", "get", name, "--json"))["degraded"]["why"]
    assert "degraded" in upgraded("rollout", "history", name).stdout
    resumed = upgraded("rollout", "resume", name, "--why", "a holiday")
    assert (resumed.exit_code, "degraded" in resumed.stdout) == (0, False)
    assert upgraded("rollout", "status", name).exit_code == 0


def test_the_live_view_on_a_terminal(upgraded: Command, tmp_path: Path) -> None:
    """The whole command, on a terminal of its own."""
    started(upgraded)
    words = [sys.executable, "-m", "flywheel.cli", "rollout", "status", "support-router", "--watch", "--timeout", "1"]
    keyboard, terminal = pty.openpty()
    environment = {**os.environ, **ENV, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "120"}
    done = subprocess.run(words, cwd=tmp_path, env=environment, stdout=terminal, stderr=terminal, timeout=60)
    os.close(terminal)
    shown = os.read(keyboard, 65536).decode()
    os.close(keyboard)
    assert done.returncode == 4
    assert "[shadow] ▸ 5 ▸ 100" in shown
    assert "traffic: wanted 0 %, nothing has come in since this step began" in shown
    assert "the controller has not looked yet" in shown


def test_abort_and_supersede(upgraded: Command) -> None:
    first = started(upgraded)
    second = started(upgraded, "small-1b:a2", "--supersede")
    assert output(upgraded("rollout", "get", first, "--json"))["state"] == "superseded"
    aborted = output(upgraded("rollout", "abort", second, "--why", "wrong one", "--json"))
    assert aborted["reason"] == "aborted by hand: wrong one"
    assert output(upgraded("rollout", "list", "--live", "--json")) == []
    listed = upgraded("rollout", "list", "--workload", "support-router")
    assert first in listed.stdout
    assert second in listed.stdout


def test_watching_ends_with_the_timeouts_own_code(upgraded: Command) -> None:
    started(upgraded)
    result = upgraded("rollout", "status", "support-router", "--watch", "--timeout", "0.1", "--json")
    assert result.exit_code == 4
    assert output(result)["state"] == "shadow"


def test_get_without_a_controller_says_so(upgraded: Command) -> None:
    started(upgraded)
    assert "the controller has not looked yet" in upgraded("rollout", "get", "support-router").stdout


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["start", "nowhere", "--candidate", "small-1b"], "no workload nowhere"),
        (["start", "support-router", "--candidate", "tiny"], 'no model "tiny"'),
        (["get", "nothing"], "no rollout nothing"),
        (["history", "nothing"], "no rollout nothing"),
        (["undo", "support-router"], "nothing to undo"),
        (["promote", "support-router"], "no rollout support-router"),
    ],
)
def test_what_cannot_be_done_says_why(upgraded: Command, words: list[str], text: str) -> None:
    assert text in str(upgraded("rollout", *words).exception)


def test_an_undo_needs_no_usable_file(upgraded: Command, tmp_path: Path) -> None:
    started(upgraded)
    (tmp_path / "routing.yaml").write_text("broken: [")
    assert upgraded("rollout", "undo", "support-router").exit_code == 0


@pytest.mark.parametrize("group", ["db", "routes", "rollout"])
def test_every_verb_has_an_example(command: Command, group: str) -> None:
    listed = command(group, "--help").stdout.split("Commands:")[1]
    verbs = [line.split()[0] for line in listed.splitlines() if line.startswith("  ") and line[2] != " "]
    assert verbs
    for verb in verbs:
        assert f"understudy {group} {verb}" in command(group, verb, "--help").stdout
