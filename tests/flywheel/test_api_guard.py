"""Who may ask the control plane: an admin's key where keys are wanted, and no other site's page through a browser."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from gateway.auth import Scope
from tests.flywheel.control import START, Plane, served

PATHS = ("/api/rollouts", "/api/rollouts/r1", "/api/keys", "/api/openapi.json", "/api/nothing")


@pytest.fixture
async def plane(tmp_path: Path) -> AsyncIterator[Plane]:
    """Without keys, on loopback."""
    async with served(tmp_path) as made:
        yield made


@pytest.fixture
async def locked(tmp_path: Path) -> AsyncIterator[Plane]:
    """Where the gateway wants keys."""
    async with served(tmp_path, "[gateway]", 'auth = "on"') as made:
        yield made


def showing(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


def refused(reply: httpx.Response) -> tuple[int, str]:
    assert reply.headers["content-type"] == "application/json"
    return reply.status_code, reply.json()["error"]["code"]


async def test_only_an_admin_s_key_opens_it(locked: Plane) -> None:
    data, feedback, admin = [await locked.secret("shop", scope) for scope in Scope]
    for path in PATHS:
        reply = await locked.client.get(path)
        assert refused(reply) == (401, "missing_api_key")
        assert reply.headers["www-authenticate"] == "Bearer"
        assert refused(await locked.client.get(path, headers=showing("us-nonsense"))) == (401, "invalid_api_key")
        for secret in (data, feedback):
            assert refused(await locked.client.get(path, headers=showing(secret))) == (403, "scope_missing")
    assert (await locked.client.get("/api/rollouts", headers=showing(admin))).status_code == 200
    for path in ("/", "/healthz"):
        assert (await locked.client.get(path)).status_code == 200


async def test_a_revoked_or_expired_key_opens_nothing_at_once(locked: Plane) -> None:
    admin, other = await locked.secret("ann"), await locked.secret("bob")
    expired = (await locked.keys.create(who="t", now=1.0, scopes=[Scope.ADMIN], expires_at=2.0))[1]
    assert refused(await locked.client.get("/api/keys", headers=showing(expired))) == (401, "expired_api_key")
    listed = (await locked.client.get("/api/keys", headers=showing(admin))).json()
    mine = next(key["id"] for key in listed if key["client"] == "bob")
    done = await locked.client.post(f"/api/keys/{mine}/revoke", json={}, headers=showing(admin))
    assert (done.status_code, done.json()["revoked_by"]) == (200, "ann")
    assert refused(await locked.client.get("/api/keys", headers=showing(other))) == (401, "invalid_api_key")


async def test_the_key_says_who_asks(locked: Plane) -> None:
    locked.client.headers.update(showing(await locked.secret("ann")))
    name = await locked.start()
    lying = await locked.post(f"/api/rollouts/{name}/pause", who="bob")
    assert refused(lying) == (400, "bad_request")
    assert "the key's owner" in lying.json()["error"]["message"]
    assert (await locked.post(f"/api/rollouts/{name}/pause", who="ann")).status_code == 200
    assert {entry.who for entry in await locked.rollouts.history()} == {"ann"}
    made = (await locked.post("/api/keys", client="shop")).json()
    assert (await locked.client.get("/api/keys")).json()[-1]["created_by"] == "ann"
    assert made["id"] == "key-2"


async def test_two_approvers_are_two_owners_of_keys(locked: Plane) -> None:
    locked.rules_say("approval: manual", "approval: manual\n      approvers: 2")
    ann, again, bob = [showing(await locked.secret(name)) for name in ("ann", "ann", "bob")]
    name = (await locked.client.post("/api/rollouts", json=START, headers=ann)).json()["id"]

    async def promote(headers: dict[str, str]) -> httpx.Response:
        return await locked.client.post(f"/api/rollouts/{name}/promote", json={}, headers=headers)

    assert (await promote(ann)).json()["approved"] == -1
    second = await promote(again)
    assert refused(second) == (409, "refused")
    assert "ann has approved this already" in second.json()["error"]["message"]
    approved = (await promote(bob)).json()
    assert (approved["approved"], [each["approver"] for each in approved["approvals"]]) == (0, ["ann", "bob"])


async def test_one_approves_by_http_and_another_by_a_command(tmp_path: Path) -> None:
    """Also where only the control plane wants keys, and not the gateway."""
    async with served(tmp_path, 'auth = "on"') as plane:
        plane.rules_say("approval: manual", "approval: manual\n      approvers: 2")
        plane.client.headers.update(showing(await plane.secret("ann")))
        name = await plane.start()
        assert (await plane.post(f"/api/rollouts/{name}/promote")).json()["approved"] == -1
        done = await plane.command("rollout", "promote", name, "--json", UNDERSTUDY_KEY=await plane.secret("bob"))
        assert json.loads(done.stdout)["approved"] == 0


async def test_without_keys_two_approvers_are_refused_as_a_command_refuses_them(plane: Plane) -> None:
    plane.rules_say("approval: manual", "approval: manual\n      approvers: 2")
    name = await plane.start()
    reply = await plane.post(f"/api/rollouts/{name}/promote", who="ann")
    assert refused(reply) == (409, "refused")
    assert "2 different approvers are wanted" in reply.json()["error"]["message"]


OTHERS = (
    {"origin": "http://evil.example"},
    {"origin": "null"},
    {"origin": "http://127.0.0.1:1"},
    {"origin": "http://localhost"},
    {"origin": "http://["},
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
)


async def test_another_site_s_page_is_refused(plane: Plane) -> None:
    """Whatever it reads or writes; but a link to the page itself may be followed from anywhere."""
    promotion = f"/api/rollouts/{await plane.start()}/promote"
    for headers in OTHERS:
        for method, path in (("GET", "/api/rollouts"), ("POST", promotion), ("OPTIONS", "/api/keys")):
            reply = await plane.client.request(method, path, json={"full": True}, headers=headers)
            assert refused(reply) == (403, "cross_origin"), headers
            assert "access-control-allow-origin" not in reply.headers
        assert (await plane.client.get("/", headers=headers)).status_code == 200
    assert len(await plane.rollouts.history()) == 1


async def test_what_a_browser_sends_without_asking_is_no_json(plane: Plane) -> None:
    """A form or a fetch without preflight can't say application/json: even where a browser names no origin."""
    promotion = f"/api/rollouts/{await plane.start()}/promote"
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "text/application/json"):
        reply = await plane.client.post(promotion, content=b'{"full": true}', headers={"content-type": kind})
        assert refused(reply) == (415, "wrong_content_type"), kind
    assert len(await plane.rollouts.history()) == 1


WRONG_HOSTS = (
    "evil.example",
    "evil.example:8090",
    "127.0.0.1.evil.example",
    "localhost.evil.example",
    "",
    "[::1",
    "x@127.0.0.1",
    "127.0.0.1/x",
    "[127.0.0.1]x",
    "127.0.0.1:x",
    "127.0.0.1 x",
)
RIGHT_HOSTS = ("localhost:9", "LOCALHOST", "[::1]:8090", "10.1.2.3", "rollouts.example", "Rollouts.Example:443")


async def test_a_name_that_was_made_to_resolve_here_is_refused(tmp_path: Path) -> None:
    """DNS rebinding: the browser takes the attacker's name for the origin, and sends it as Host."""
    async with served(tmp_path, 'hosts = ["rollouts.example"]') as plane:
        for path in ("/api/rollouts", "/", "/healthz"):
            for host in WRONG_HOSTS:
                assert refused(await plane.client.get(path, headers={"host": host})) == (403, "unknown_host"), host
            for host in RIGHT_HOSTS:
                assert (await plane.client.get(path, headers={"host": host})).status_code == 200, host


async def test_its_own_page_may_ask(plane: Plane) -> None:
    name = await plane.start()
    headers = {"origin": plane.url, "sec-fetch-site": "same-origin"}
    assert (await plane.client.get("/api/rollouts", headers=headers)).status_code == 200
    assert (await plane.client.post(f"/api/rollouts/{name}/pause", json={}, headers=headers)).status_code == 200


async def test_every_reply_is_kept_from_frames_caches_and_guesses(plane: Plane) -> None:
    for path in ("/", "/healthz", "/api/rollouts", "/api/nothing"):
        headers = (await plane.client.get(path)).headers
        assert headers["cache-control"] == "no-store"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; ")
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert "server" not in headers


async def test_a_body_without_length_or_end_is_refused_before_it_is_read(plane: Plane) -> None:
    big = await plane.client.post("/api/keys", content=b" " * 65_537, headers={"content-type": "application/json"})
    assert refused(big) == (413, "request_too_large")
    reader, writer = await asyncio.open_connection("127.0.0.1", plane.port)
    head = f"POST /api/keys HTTP/1.1\r\nhost: 127.0.0.1:{plane.port}\r\ncontent-type: application/json\r\n"
    writer.write(head.encode() + b"transfer-encoding: chunked\r\n\r\n5\r\nabcde\r\n")
    assert (await reader.readline()).startswith(b"HTTP/1.1 411")
    await asyncio.wait_for(reader.read(), 10)  # and the connection ends
    writer.close()
    assert await plane.keys.list() == []
