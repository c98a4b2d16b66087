"""`understudy routes` on a log: an exchange explained, workloads suggested for what has none."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from flywheel.cli import app
from gateway.config import load_settings
from gateway.errors import ConfigError
from gateway.fields import read_fields
from gateway.ids import id_at
from gateway.logstore.open import open_log_store
from gateway.records import Arm, Attempt, Exchange
from gateway.tagging import conversation_of
from tests.routing.examples import ENV, ROUTING_YAML

AT = 1_763_712_000
Command = Callable[..., Result]


def exchange(n: int, **more: Any) -> Exchange:
    made = {
        "id": id_at((AT + n) * 1000, n.to_bytes(10, "big")),
        "timestamp": float(AT + n),
        "workload_id": "default",
        "model": "prod-70b",
        "status": 200,
        "request": {"model": "gpt-4o", "messages": [{"role": "user", "content": f"question {n}"}]},
        "config_snapshot": "abc",
    }
    return Exchange(**(made | more))


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs `understudy routes …` in a folder with a routing.yaml and an up-to-date database."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "routing.yaml").write_text(ROUTING_YAML)
    runner = CliRunner(env=ENV)
    assert runner.invoke(app, ["db", "upgrade"]).exit_code == 0
    return lambda *words: runner.invoke(app, list(words))


def store(*exchanges: Exchange) -> None:
    async def append() -> None:
        log = open_log_store(load_settings(None).log_store)
        await log.append(exchanges)
        await log.close()

    asyncio.run(append())


def explained(command: Command, found: Exchange) -> Any:
    store(found)
    result = command("routes", "explain", "--exchange", found.id, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_an_exchange_is_matched_by_today_s_table_beside_what_was_decided_then(command: Command) -> None:
    """It was untagged then; a rule takes it now."""
    told = explained(command, exchange(1, request={"model": "gpt-4o-mini", "messages": []}))
    assert (told["workload"], told["target"], told["today"]) == ("plain", "small-1b", "another")
    assert told["because"].startswith("its match holds, and no earlier one does")
    then = {"workload": "default", "target": "prod-70b", "arm": "incumbent", "outcome": "ok", "snapshot": "abc"}
    assert told["then"] == then
    text = command("routes", "explain", "--exchange", exchange(1).id).stdout
    assert "then       workload default; target prod-70b; arm incumbent; outcome ok; snapshot abc" in text


def test_a_workload_that_a_header_named_is_taken_as_it_was(command: Command) -> None:
    told = explained(command, exchange(2, workload_id="support-router"))
    assert (told["workload"], told["target"], told["today"]) == ("support-router", "prod-70b", "the same")
    assert told["because"] == (
        "it was support-router then, by a header, the key or another table; by its body it is default now"
    )


def test_what_the_body_says_needs_no_guess(command: Command) -> None:
    named = {"metadata": {"workload_id": "plain"}, "messages": []}
    told = explained(command, exchange(3, workload_id="plain", model="small-1b", request=named))
    assert (told["because"], told["today"]) == ("metadata.workload_id names it", "the same")
    gone = explained(command, exchange(4, workload_id="retired"))
    assert gone["workload"] == "default"
    assert gone["because"].endswith("retired is no workload of the table any more")
    masked = explained(command, exchange(5, request=None))
    assert masked["because"] == "the log keeps no body of it, and neither headers nor keys"


def test_a_conversation_has_the_sticky_key_that_the_gateway_gives_it(command: Command, tmp_path: Path) -> None:
    """Each turn repeats the first messages; what failed before is told."""
    (tmp_path / "routing.yaml").write_text(ROUTING_YAML.replace("sticky: [session, user]", "sticky: [conversation]"))
    first = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    later = [*first, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "Refund, please"}]
    failed = (Attempt(model="small-1b:a1", arm=Arm.CANDIDATE, error="status 500"),)
    key = conversation_of(read_fields(json.dumps({"messages": first}).encode()))
    for n, messages in ((6, first), (7, later)):
        made = exchange(n, workload_id="support-router", request={"messages": messages}, attempts=failed)
        told = explained(command, made)
        assert told["sticky"] == f"conversation {key}"
        assert told["then"]["before"] == ["small-1b:a1 (candidate): status 500"]


def test_an_exchange_that_is_not_there_and_a_request_beside_one(command: Command) -> None:
    missing = command("routes", "explain", "--exchange", exchange(9).id)
    assert isinstance(missing.exception, ConfigError)
    assert "no exchange" in str(missing.exception)
    both = command("routes", "explain", "--exchange", exchange(9).id, "--header", "a=b")
    assert "drop --header and --body" in str(both.exception)


def asks(*tools: str, system: str = "") -> dict[str, Any]:
    messages = [{"role": "system", "content": system}] if system else []
    body: dict[str, Any] = {"model": "m", "messages": [*messages, {"role": "user", "content": "hello"}]}
    return body | ({"tools": [{"type": "function", "function": {"name": name}} for name in tools]} if tools else {})


def test_what_is_suggested_can_be_pasted_and_takes_the_traffic(command: Command, tmp_path: Path) -> None:
    """Larger tool sets come first, for a smaller one would match their requests as well."""
    store(
        *(exchange(n, request=asks("find")) for n in range(3)),
        *(exchange(n, request=asks("find", "book")) for n in range(3, 5)),
        *(exchange(n, request=asks(system=f"You sort the mail of 2026-11-{n}.")) for n in range(5, 9)),
        *(exchange(n, request=asks(system="You sort post.")) for n in (12, 13)),
        exchange(9, request=asks()),
        exchange(10, workload_id="plain"),
        exchange(11, request={**asks("find"), "metadata": {"workload_id": "desk"}}),
    )
    told = command("routes", "suggest").stdout
    head, _, sections = told.partition("\n\n")
    assert head.splitlines()[0] == "# untagged: 13 of 14 exchanges (92.9%); read: 13"
    assert "# 4      30.8%  system prompt  You sort the mail of #" in told
    assert "# besides: 1 without tools and system prompt" in told
    (tmp_path / "routing.yaml").write_text(ROUTING_YAML.replace("workloads:\n", f"workloads:\n{sections}\n"))
    assert command("routes", "check").exit_code == 0
    for n, workload in ((1, "find"), (3, "book-find"), (11, "desk"), (12, "you-sort-post"), (9, "default")):
        explained = command("routes", "explain", "--exchange", exchange(n).id, "--json").stdout
        assert json.loads(explained)["workload"] == workload


def test_suggestions_as_json_of_some_of_the_log(command: Command) -> None:
    store(*(exchange(n, request=asks("find" if n < 3 else "book")) for n in range(5)))
    told = json.loads(command("routes", "suggest", "--json", "--number", "4").stdout)
    assert (told["untagged"], told["live"], told["read"]) == (5, 5, 4)
    assert [(group["name"], group["count"], group["share"]) for group in told["groups"]] == [
        ("book", 2, 0.5), ("find", 2, 0.5)
    ]  # fmt: skip
    assert told["groups"][0]["match"] == {"tools": ["book"]}
    assert json.loads(command("routes", "suggest", "--json", "--since", "2099-01-01").stdout)["groups"] == []
    assert command("routes", "suggest", "--since", "2099-01-01").stdout.startswith("# untagged: 5 of 5 exchanges")
    assert "besides: 2 in 1 smaller groups" in command("routes", "suggest", "--top", "1").stdout
