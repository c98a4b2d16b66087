"""The control plane by HTTP: what commands can ask, with the same answers, the same history and the same refusals."""

import asyncio
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.logstore.sqlite import SqliteLogStore
from gateway.records import Arm
from routing.evidence import Gate, Slices, Verdict, read
from routing.rollout import Observed
from tests.flywheel.control import START, Plane, served
from tests.flywheel.examples import live
from tests.routing.examples import reading

ROOT = Path(__file__).parents[2]
JSON = dict[str, Any]


@pytest.fixture
async def plane(tmp_path: Path) -> AsyncIterator[Plane]:
    async with served(tmp_path) as made:
        yield made


async def verb(plane: Plane, name: str, word: str, **body: Any) -> JSON:
    reply = await plane.post(f"/api/rollouts/{name}/{word}", **body)
    assert reply.status_code == 200, reply.text
    answer: JSON = reply.json()
    return answer


async def test_a_rollout_from_start_to_undo(plane: Plane) -> None:
    """Each verb answers with where the rollout stands then; the history says who, when and why."""
    name = await plane.start(who="ann")
    assert (await verb(plane, "support-router", "pause", why="freeze", who="bob"))["state"] == "paused"
    assert (await verb(plane, name, "resume"))["state"] == "shadow"
    assert (await verb(plane, name, "promote"))["reason"] == "approved"
    promoted = await verb(plane, name, "promote", full=True)
    assert (promoted["state"], promoted["weight"], promoted["exit_code"]) == ("promoted", 100, 0)
    assert (await verb(plane, "support-router", "undo", why="complaint"))["state"] == "aborted"
    told = (await plane.client.get(f"/api/rollouts/{name}/history")).json()
    assert [(entry["event"], entry["who"], entry["why"]) for entry in told] == [
        ("started", "ann", "first adapter"),
        ("paused", "bob", "freeze"),
        ("resumed", "api", ""),
        ("approved", "api", ""),
        ("promoted", "api", ""),
        ("aborted", "api", "complaint"),
    ]
    assert len({entry["config_snapshot"] for entry in told} - {""}) == 1
    assert await plane.rollouts.current_overlays() == (3, {})


async def test_a_start_says_what_each_gate_will_need_and_abort_ends_it(plane: Plane) -> None:
    reply = (await plane.post("/api/rollouts", **START)).json()
    assert [gate["metric"] for gate in reply["expected"]] == ["tool_name", "error_rate", "latency_p95_ms"]
    other = (await plane.post("/api/rollouts", **START | {"candidate": "small-1b:a2"}, supersede=True)).json()
    assert (await plane.client.get(f"/api/rollouts/{reply['id']}")).json()["state"] == "superseded"
    aborted = await verb(plane, other["id"], "abort", why="wrong adapter")
    assert aborted["reason"] == "aborted by hand: wrong adapter"
    assert (await plane.client.get("/api/rollouts?live=true")).json() == []
    assert len((await plane.client.get("/api/rollouts")).json()) == 2


async def test_commands_read_what_the_api_reads(plane: Plane) -> None:
    """With evidence, traffic and classes that are short of pairs: nothing is lost on either way."""
    name = await plane.start()
    sliced = Gate(metric="tool_name", kind="guard", threshold=0.8, slices=Slices(floor=0.7, classes=("pay", "refund")))
    seen = Observed(
        readings=(reading(Verdict.RUNNING), read(sliced, 30, 32, {"pay": (29, 30), "refund": (1, 2)})), pairs=32
    )
    await plane.rollouts.apply(name, seen, who="controller", why="", now=5.0)
    since = (await plane.rollouts.get(name)).step_started_at
    logs = SqliteLogStore(plane.settings.data_dir / "log.db")
    shared = {"workload_id": "support-router", "rollout": name, "session_id": "s", "timestamp": since + 1}
    await logs.append([live(n, "hello", arm=Arm.CANDIDATE if n < 9 else Arm.INCUMBENT, **shared) for n in range(30)])
    await logs.close()
    for path, words in (
        (f"/api/rollouts/{name}/status", ["rollout", "status", name]),
        ("/api/rollouts/support-router/status", ["rollout", "get", "support-router"]),
        ("/api/rollouts", ["rollout", "list"]),
        (f"/api/rollouts/{name}/history", ["rollout", "history", name]),
        ("/api/audit?kind=rollout", ["audit", "list", "--kind", "rollout"]),
    ):
        said = await plane.command(*words, "--json")
        assert (await plane.client.get(path)).json() == json.loads(said.stdout), path
    shown = (await plane.client.get(f"/api/rollouts/{name}/status")).json()
    assert (shown["traffic"]["actual"], shown["observed"]["pairs"]) == (0.3, 32)
    assert "only one sticky key" in shown["traffic"]["warning"]
    assert shown["observed"]["readings"][1]["slices"][1]["name"] == "refund"
    cheap = (await plane.client.get(f"/api/rollouts/{name}")).json()
    assert cheap == shown | {"traffic": None}


async def test_a_command_and_the_api_leave_the_same_history(plane: Plane) -> None:
    """But for the ids, the moment and who asked."""
    verbs = ("pause", "resume", "promote", "abort")
    by_http = await plane.start(who="ann")
    for word in verbs:
        await verb(plane, by_http, word, who="ann", why=f"to {word}")
    options = ["--candidate", START["candidate"], "--why", START["why"], "--who", "bob", "--json"]
    started = json.loads((await plane.command("rollout", "start", "support-router", *options)).stdout)
    for word in verbs:
        done = await plane.command("rollout", word, started["id"], "--why", f"to {word}", "--who", "bob")
        assert done.exit_code == 0

    async def told(name: str, who: str) -> list[JSON]:
        entries = (await plane.client.get(f"/api/rollouts/{name}/history")).json()
        assert {entry["who"] for entry in entries} == {who}
        return [{k: v for k, v in entry.items() if k not in ("id", "rollout_id", "at", "who")} for entry in entries]

    assert await told(by_http, "ann") == await told(started["id"], "bob")


async def test_of_two_clients_at_once_one_wins(plane: Plane) -> None:
    """Both saw the same version, and each asked for something that is possible in either state."""
    name = await plane.start()
    for _ in range(5):
        version = (await plane.client.get(f"/api/rollouts/{name}")).json()["version"]
        async with httpx.AsyncClient(base_url=plane.url) as other:
            both = await asyncio.gather(
                plane.client.post(f"/api/rollouts/{name}/pause", json={"if_version": version}),
                other.post(f"/api/rollouts/{name}/pause", json={"if_version": version}),
            )
        won, lost = sorted(both, key=lambda reply: reply.status_code)
        assert (won.status_code, lost.status_code) == (200, 409)
        assert lost.json()["error"]["code"] == "conflict"
        await verb(plane, name, "resume", if_version=won.json()["version"])
    events = [entry.event for entry in await plane.rollouts.history(rollout_id=name)]
    assert events == ["started", *["paused", "resumed"] * 5]


async def test_refusals_say_what_a_command_says(plane: Plane) -> None:
    name = await plane.start()

    async def same(status: int, code: str, reply: httpx.Response, *words: str) -> None:
        done = await plane.command("rollout", *words)
        error = reply.json()["error"]
        assert (reply.status_code, error["code"]) == (status, code)
        assert error["message"] == str(done.exception)

    post = plane.post
    await same(409, "refused", await post(f"/api/rollouts/{name}/resume"), "resume", name)
    await same(404, "not_found", await post("/api/rollouts/nothing/pause"), "pause", "nothing")
    await same(409, "refused", await post("/api/rollouts/nothing/undo"), "undo", "nothing")
    await same(404, "not_found", await plane.client.get("/api/rollouts/nothing/history"), "history", "nothing")
    for body in (
        {"workload": "nowhere", "candidate": "small-1b"},
        {"workload": "support-router", "candidate": "tiny"},
        {"workload": "support-router", "candidate": "small-1b:a2"},
    ):
        status, code = (404, "not_found") if body["workload"] == "nowhere" else (409, "refused")
        await same(
            status,
            code,
            await post("/api/rollouts", **body),
            "start",
            body["workload"],
            "--candidate",
            body["candidate"],
        )
    await post(f"/api/rollouts/{name}/promote", full=True)
    await post(f"/api/rollouts/{name}/undo")
    options = ["start", "support-router", "--candidate", "small-1b:a1"]
    await same(409, "refused", await post("/api/rollouts", **START), *options)
    hasty = await post("/api/rollouts", **START | {"why": ""}, despite_cooldown=True)
    await same(409, "refused", hasty, *options, "--despite-cooldown")
    assert (await post("/api/rollouts", **START, despite_cooldown=True)).status_code == 201


WRONG = [
    ("/api/rollouts/x/pause", b"{", "the body: JSON decode error"),
    ("/api/rollouts/x/pause", b'{"whi": "typo"}', "whi: Extra inputs are not permitted"),
    ("/api/rollouts/x/pause", b'{"why": 5}', "why: Input should be a valid string"),
    ("/api/rollouts/x/pause", b'{"why": "a\\u0000b"}', "why: wants Unicode text without the character 0"),
    ("/api/rollouts/x/pause", b'{"why": "\\ud800"}', "why: Input should be a valid string"),
    ("/api/rollouts/x/pause", b'{"if_version": -1}', "if_version: Input should be greater than or equal to 0"),
    ("/api/rollouts/x/pause", b"[]", "the body: "),
    ("/api/rollouts/x/pause", b"\xff", "parsing the body"),
    ("/api/rollouts/x/pause", b"[" * 60_000, "the body"),
    ("/api/rollouts/x/pause", b"", "the body: Field required"),
    ("/api/rollouts/x/pause", b'{"who": "%s"}' % (b"x" * 256), "who: String should have at most 255 characters"),
    ("/api/rollouts/a%00b/pause", b"{}", "name: wants Unicode text"),
    ("/api/rollouts", b'{"workload": "support-router"}', "candidate: Field required"),
    ("/api/rollouts", b'{"workload": "w", "candidate": "small-1b:\\ud800"}', "candidate: wants Unicode text"),
    ("/api/keys", b'{"models": ["\\ud800"]}', "models.0: wants Unicode text"),
    ("/api/keys", b'{"scopes": ["root"]}', "scopes: 'root' is not a valid scope; write some of data, feedback"),
    ("/api/keys", b'{"scopes": []}', "scopes: a key that may do nothing is no key"),
    ("/api/keys", b'{"rpm": 0}', "rpm: Input should be greater than or equal to 1"),
    ("/api/keys", b'{"client": "\\n"}', "client: wants at most 255 printable ASCII characters"),
    ("/api/keys", b'{"expires": "2020-01-01"}', "expires: 2020-01-01: that moment has passed"),
    ("/api/keys", b'{"expires": "soon"}', "write 90d, 12h or 30m"),
]  # fmt: skip


async def test_what_cannot_be_used_is_a_400(plane: Plane) -> None:
    for path, content, says in WRONG:
        reply = await plane.client.post(path, content=content, headers={"content-type": "application/json"})
        error = reply.json()["error"]
        assert (reply.status_code, error["type"], error["code"]) == (400, "invalid_request_error", "bad_request")
        assert says in error["message"]
        assert "Traceback" not in reply.text
    assert await plane.keys.list() == []


async def test_unknown_paths_and_methods_answer_in_the_same_shape(plane: Plane) -> None:
    for method, path, status in (("GET", "/api/nothing", 404), ("DELETE", "/api/keys", 415), ("PUT", "/healthz", 405)):
        reply = await plane.client.request(method, path)
        assert reply.status_code == status
        assert set(reply.json()["error"]) == {"message", "type", "code", "param"}
    assert (await plane.client.get("/api/rollouts?limit=0")).json()["error"]["param"] == "limit"


async def test_without_tables_or_rules_it_says_so_and_serves_on(tmp_path: Path) -> None:
    async with served(tmp_path, upgraded=False) as plane:
        reply = await plane.client.get("/api/rollouts")
        assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
        assert "understudy db upgrade" in reply.json()["error"]["message"]
        assert (await plane.command("db", "upgrade")).exit_code == 0
        name = await plane.start()
        plane.rules_say("version: 1", "version: [")
        reply = await plane.post("/api/rollouts", **START, supersede=True)
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "routing_file")
        assert "routing.yaml:" in reply.json()["error"]["message"]
        assert (await verb(plane, name, "undo", why="a broken file stops no undo"))["state"] == "aborted"


async def test_keys_are_made_listed_and_revoked(plane: Plane) -> None:
    wanted = {"client": "shop", "scopes": ["data", "feedback"], "rpm": 5, "daily_usd": 0.5, "expires": "90d"}
    made = (await plane.post("/api/keys", **wanted, who="ann")).json()
    secret = made.pop("secret")
    key = await plane.keys.find(secret)
    assert key is not None
    assert (key.id, key.client, key.rpm) == (made["id"], "shop", 5)
    listed = (await plane.client.get("/api/keys")).json()
    assert listed == json.loads((await plane.command("keys", "list", "--json")).stdout)
    assert (listed[0]["state"], listed[0]["created_by"]) == ("active", "ann")
    assert secret[3:20] not in json.dumps(listed)
    for _ in range(2):
        revoked = (await plane.post(f"/api/keys/{made['id']}/revoke", who="bob")).json()
        assert (revoked["state"], revoked["revoked_by"]) == ("revoked", "bob")
    assert await plane.keys.find(secret) is None
    audit = (await plane.client.get("/api/audit?kind=key")).json()
    assert [(entry["kind"], entry["who"], entry["subject"]) for entry in audit] == [
        ("key.revoked", "bob", made["id"]),
        ("key.created", "ann", made["id"]),
    ]
    assert audit[1]["body"]["scopes"] == ["data", "feedback"]
    assert key.digest not in json.dumps(audit)
    reply = await plane.post("/api/keys/key-9/revoke")
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "not_found")


async def test_every_route_is_described_with_its_reply_and_its_refusals(plane: Plane) -> None:
    """The document is what clients are made from: no route without a model, a description and its errors."""
    document = (await plane.client.get("/api/openapi.json")).json()
    operations = {
        f"{method} {path}": operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    assert {f"post /api/rollouts/{{name}}/{word}" for word in ("promote", "pause", "resume", "abort", "undo")} | {
        "get /api/rollouts", "post /api/rollouts", "get /api/rollouts/{name}", "get /api/rollouts/{name}/status",
        "get /api/rollouts/{name}/history", "get /api/keys", "post /api/keys", "post /api/keys/{key_id}/revoke",
        "get /healthz", "get /api/audit",
    } == set(operations)  # fmt: skip
    for name, operation in operations.items():
        assert operation["description"], name
        done = operation["responses"].get("200") or operation["responses"]["201"]
        schema = done["content"]["application/json"]["schema"]
        assert "$ref" in schema or "$ref" in schema["items"], name
        if name != "get /healthz":
            assert {"400", "401", "403", "404", "409", "503"} <= set(operation["responses"]), name
            assert operation["security"], name
        for parameter in operation.get("parameters", []):
            assert parameter["description"], (name, parameter["name"])
        if "requestBody" in operation:
            body = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
            for field in document["components"]["schemas"][body]["properties"].values():
                assert field["description"], (body, field)


CURL = re.compile(r"^    \$ (curl .*(?:\\\n.*)*)\n((?:    [^$\s].*\n)*)", re.MULTILINE)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
async def test_the_examples_of_the_readme_work(plane: Plane) -> None:
    """Each `curl` of the section, in order; what is shown below it is in the answer."""
    section = (ROOT / "flywheel" / "README.md").read_text().partition("## Control plane")[2].partition("\n## ")[0]
    examples = CURL.findall(section)
    assert len(examples) >= 6
    for command, shown in examples:
        words = shlex.split(command.replace("\\\n", "").replace("127.0.0.1:8090", f"127.0.0.1:{plane.port}"))
        done = await asyncio.to_thread(subprocess.run, words, capture_output=True, text=True, check=True)
        for part in shown.strip().strip("{}").split("…"):
            assert part.strip(" ,\n") in done.stdout, (command, done.stdout)
