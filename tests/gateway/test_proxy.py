"""The request path against upstreams that behave in every way: bytes untouched, each call logged with its outcome."""

import asyncio
from collections.abc import Callable

import httpx
import orjson
import pytest

from gateway.config import Settings
from gateway.records import Arm, Outcome
from routing.request import system_fingerprint, tools_of
from tests.gateway.conftest import running
from tests.gateway.fakes import DONE, REPLY, chunk, hang, ok, plain, raw, sse, upstream

ROUTING = """
version: 1
models:
  prod: {{upstream: nim, base_url: "{prod}", model: big, timeouts: {{connect: 1s, first_token: 500ms, total: 1s}}}}
  backup: {{upstream: nim, base_url: "{backup}", model: reserve}}
workloads:
  router:
    match: {{header: {{x-workload-id: router}}}}
    serve: prod
    fallbacks: [backup]
default: {{serve: prod}}
"""
BODY = b'{"model": "gpt-4",  "messages": [{"role": "user", "content": "say \\"model\\": hi"}], "x_extra": 1.50}'
MakeSettings = Callable[..., Settings]


def routing(prod: str, backup: str = "http://127.0.0.1:9/v1") -> str:
    return ROUTING.format(prod=prod, backup=backup)


async def post(client: httpx.AsyncClient, body: bytes = BODY, **headers: str) -> httpx.Response:
    return await client.post(
        "/v1/chat/completions", content=body, headers={"content-type": "application/json"} | headers
    )


async def test_reply_passes_byte_for_byte_and_is_logged(settings: MakeSettings) -> None:
    """Unknown fields, odd spacing and foreign headers arrive as sent; only `model` changes on the way up."""
    body = b'{ "id":"1",  "choices": [ ], "odd": 1.0e3 }\n'
    async with upstream(plain(body, extra="x-ratelimit-remaining: 7\r\nconnection: keep-alive\r\n")) as fake:
        async with running(settings(routing(fake.url))) as gateway:
            reply = await post(gateway.client, authorization="Bearer mine")
            exchange = await gateway.exchange()
    assert reply.content == body
    assert reply.headers["x-ratelimit-remaining"] == "7"
    assert "connection" not in reply.headers
    assert fake.received[0].body == BODY.replace(b'"gpt-4"', b'"big"')
    assert fake.received[0].headers["authorization"] == "Bearer mine"
    assert fake.received[0].line == "POST /v1/chat/completions HTTP/1.1"
    assert reply.headers["x-understudy-exchange-id"] == exchange.id
    assert reply.headers["x-understudy-model"] == "prod"
    assert reply.headers["x-understudy-arm"] == "incumbent"
    assert float(reply.headers["x-understudy-overhead-ms"]) >= 0
    assert (exchange.outcome, exchange.status, exchange.workload_id) == (Outcome.OK, 200, "default")
    assert exchange.request == orjson.loads(BODY)
    assert exchange.response == {"id": "1", "choices": [], "odd": 1000.0}


async def test_tags_usage_and_cost_are_logged(settings: MakeSettings) -> None:
    """Workload, client and session come from headers; tokens from the reply."""
    async with upstream(ok()) as fake, running(settings(routing(fake.url))) as gateway:
        await post(gateway.client, **{"x-workload-id": "router", "x-client-id": "shop", "x-session-id": "s1"})
        await post(gateway.client, **{"x-workload-id": "not-written-down-yet"})
        first, second = await gateway.exchanges()
    assert (first.workload_id, first.client_id, first.session_id) == ("router", "shop", "s1")
    assert first.usage is not None
    assert (first.usage.input_tokens, first.usage.output_tokens) == (5, 1)
    assert second.workload_id == "not-written-down-yet"


async def test_stream_passes_event_by_event_and_is_assembled(settings: MakeSettings) -> None:
    """Comments, ids and odd framing reach the client; the log holds the reply that a plain call would have had."""
    events = [
        b": ping\n\n", chunk("he"), b"id: 7\nretry: 10\n" + chunk("llo"),
        b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}\n\n', DONE,
    ]  # fmt: skip
    async with upstream(sse(*events)) as fake, running(settings(routing(fake.url))) as gateway:
        reply = await post(gateway.client)
        exchange = await gateway.exchange()
    assert reply.content == b"".join(events)
    assert exchange.stream
    assert exchange.response is not None
    assert exchange.response["choices"][0]["message"]["content"] == "hello"
    assert exchange.usage is not None
    assert exchange.usage.output_tokens == 2
    assert exchange.ttft_ms is not None


async def test_exchange_is_spooled_before_the_end_mark_is_sent(settings: MakeSettings) -> None:
    """When the client sees [DONE] the exchange is on disk, though the upstream has not closed its stream."""
    async with upstream(sse(chunk("a"), DONE, end="hang")) as fake, running(settings(routing(fake.url))) as gateway:
        async with gateway.client.stream("POST", "/v1/chat/completions", content=BODY) as reply:
            async for part in reply.aiter_raw():
                if b"[DONE]" in part:
                    break
            exchange = await gateway.exchange()
    assert exchange.outcome is Outcome.OK


async def test_cut_stream_is_broken_for_the_client_too(settings: MakeSettings) -> None:
    """Never a clean end: the client's HTTP library says so, and the log keeps what came."""
    async with upstream(sse(chunk("par"), end="cut")) as fake, running(settings(routing(fake.url))) as gateway:
        with pytest.raises(httpx.RemoteProtocolError):
            await post(gateway.client)
        exchange = await gateway.exchange()
    assert exchange.outcome is Outcome.UPSTREAM_CUT
    assert exchange.response is not None
    assert exchange.response["choices"][0]["message"]["content"] == "par"


async def test_client_that_leaves_ends_the_upstream_call(settings: MakeSettings) -> None:
    """The upstream's connection is dropped at once and the exchange is logged as client_gone."""
    async with upstream(sse(chunk("a"), end="hang")) as fake, running(settings(routing(fake.url))) as gateway:
        async with gateway.client.stream("POST", "/v1/chat/completions", content=BODY) as reply:
            await anext(reply.aiter_raw())
        async with asyncio.timeout(1):
            while not (found := await gateway.exchanges()):
                await asyncio.sleep(0.01)
    assert found[0].outcome is Outcome.CLIENT_GONE


async def test_client_that_leaves_before_the_reply(settings: MakeSettings) -> None:
    """No reply has begun: still one exchange, with its outcome."""
    async with upstream(hang) as fake, running(settings(routing(fake.url))) as gateway:
        with pytest.raises(httpx.ReadTimeout):
            await gateway.client.post("/v1/chat/completions", content=BODY, timeout=0.1)
        async with asyncio.timeout(1):
            while not (found := await gateway.exchanges()):
                await asyncio.sleep(0.01)
    assert found[0].outcome is Outcome.CLIENT_GONE


async def test_deadline_for_the_first_token(settings: MakeSettings) -> None:
    """504 in OpenAI's shape."""
    async with upstream(hang) as fake, running(settings(routing(fake.url))) as gateway:
        reply = await post(gateway.client)
        exchange = await gateway.exchange()
    assert reply.status_code == 504
    assert reply.json()["error"]["code"] == "timeout"
    assert exchange.outcome is Outcome.TIMEOUT


async def test_deadline_for_the_whole_reply(settings: MakeSettings) -> None:
    """A stream that goes on for too long ends as broken."""
    async with upstream(sse(chunk("a"), end="hang")) as fake, running(settings(routing(fake.url))) as gateway:
        with pytest.raises(httpx.RemoteProtocolError):
            await post(gateway.client)
        exchange = await gateway.exchange()
    assert exchange.outcome is Outcome.TIMEOUT


@pytest.mark.parametrize(
    "failure",
    [hang, plain(b"{}", status="503 Service Unavailable"), raw(b"garbage\r\n\r\n"), raw(b""), sse(end="cut")],
    ids=["hangs", "503", "garbage", "closes", "cuts before the first byte"],
)
async def test_fallback_before_the_first_byte(settings: MakeSettings, failure: Callable[..., object]) -> None:
    """Whatever the first target does before its first byte, the client gets the fallback's reply."""
    async with (
        upstream(failure) as bad,
        upstream(ok()) as good,
        running(settings(routing(bad.url, good.url))) as gateway,
    ):
        reply = await post(gateway.client, **{"x-workload-id": "router"})
        exchange = await gateway.exchange()
    assert reply.json() == REPLY
    assert reply.headers["x-understudy-model"] == "backup"
    assert good.received[0].json["model"] == "reserve"
    assert exchange.outcome is Outcome.OK
    assert [attempt.model for attempt in exchange.attempts] == ["prod"]


async def test_no_upstream_at_all(settings: MakeSettings) -> None:
    """502 in OpenAI's shape, and the exchange is logged."""
    async with running(settings(routing("http://127.0.0.1:9/v1"))) as gateway:
        reply = await post(gateway.client)
        exchange = await gateway.exchange()
    assert reply.status_code == 502
    assert reply.json()["error"]["type"] == "upstream_error"
    assert exchange.outcome is Outcome.UPSTREAM_ERROR


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [(b'{"model":', 400, "invalid_json"), (b"[1]", 400, "invalid_json"), (b"x" * 200_000, 413, "request_too_large")],
)
async def test_bad_requests_are_refused_in_openai_shape(
    settings: MakeSettings, body: bytes, status: int, code: str
) -> None:
    """The gateway's own refusals are exchanges too."""
    async with running(settings(routing("http://127.0.0.1:9/v1"))) as gateway:
        reply = await post(gateway.client, body)
        exchange = await gateway.exchange()
    assert reply.status_code == status
    assert set(reply.json()["error"]) == {"message", "type", "code", "param"}
    assert reply.json()["error"]["code"] == code
    assert exchange.outcome is Outcome.REFUSED


async def test_stale_connection_is_replaced_unseen(settings: MakeSettings) -> None:
    """A kept connection that the upstream closed in between costs nothing but a new one."""

    async def once(request: object, writer: asyncio.StreamWriter) -> None:
        await ok()(request, writer)  # type: ignore[arg-type]
        await asyncio.sleep(0.05)
        writer.close()

    async with upstream(once, ok()) as fake, running(settings(routing(fake.url))) as gateway:
        assert (await post(gateway.client)).status_code == 200
        await fake.lost.wait()
        assert (await post(gateway.client)).status_code == 200
    assert fake.connections == 2


async def test_connections_are_kept(settings: MakeSettings) -> None:
    """Ten calls one after the other use one connection."""
    async with upstream(ok()) as fake, running(settings(routing(fake.url))) as gateway:
        for _ in range(10):
            assert (await post(gateway.client)).status_code == 200
    assert fake.connections == 1


async def test_rules_read_the_whole_request(settings: MakeSettings) -> None:
    """Client, path, tools and system prompt place a call; what nothing places is counted as untagged."""
    tools = [{"type": "function", "function": {"name": "refund", "parameters": {"type": "object"}}}]
    rules = {
        "by-client": "client: shop",
        "by-path": "path: /v1/embeddings",
        "by-tools": f"tools_fingerprint: '{tools_of(orjson.dumps(tools)).fingerprint}'",
        "by-prompt": f"system_fingerprint: '{system_fingerprint('You route.')}'",
        "by-pattern": "system_pattern: '(?i)shop in [A-Z]+'",
    }
    lines = "".join(f"  {name}: {{serve: prod, match: {{{rule}}}}}\n" for name, rule in rules.items())
    body = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
    asked: list[tuple[str, dict[str, object], dict[str, str]]] = [
        ("chat/completions", body, {"x-client-id": "shop"}),
        ("embeddings", {"model": "m", "input": ["a shop in Rome"]}, {}),
        ("chat/completions", body | {"tools": tools}, {}),
        ("chat/completions", body | {"messages": [{"role": "system", "content": " You\nroute."}]}, {}),
        ("responses", {"model": "m", "instructions": "For a shop in Rome.", "input": "hello"}, {}),
        ("responses", {"model": "m", "input": [{"role": "developer", "content": "For a shop in Rome."}]}, {}),
        ("chat/completions", body, {}),
    ]
    async with upstream(ok()) as fake:
        text = routing(fake.url).replace("default:", f"{lines}default:")
        async with running(settings(text)) as gateway:
            for path, sent, headers in asked:
                await gateway.client.post(f"/v1/{path}", json=sent, headers=headers)
            placed = [exchange.workload_id for exchange in await gateway.exchanges()]
            metrics = (await gateway.client.get("/metrics")).text
    assert placed == [*rules, "by-pattern", "default"]
    assert "understudy_untagged_total 1.0" in metrics


async def test_full_log_refuses_when_told_to(settings: MakeSettings) -> None:
    """`on_full: refuse` says no before the upstream is called."""
    async with upstream(ok()) as fake:
        made = settings(routing(fake.url), max_total=8192, on_full="refuse")
        async with running(made) as gateway:
            statuses = [(await post(gateway.client)).status_code for _ in range(40)]
    assert statuses[0] == 200
    assert statuses[-1] == 503
    assert len(fake.received) == statuses.count(200)


async def test_full_log_serves_when_told_to(settings: MakeSettings) -> None:
    """`on_full: serve` goes on, and counts each loss."""
    async with upstream(ok()) as fake, running(settings(routing(fake.url), max_total=8192)) as gateway:
        statuses = [(await post(gateway.client)).status_code for _ in range(40)]
        metrics = (await gateway.client.get("/metrics")).text
        logged = len(await gateway.exchanges())
    dropped = next(line for line in metrics.splitlines() if line.startswith("understudy_dropped_total{"))
    assert set(statuses) == {200}
    assert float(dropped.split()[-1]) == 40 - logged > 0


async def test_paths_that_are_not_ours(settings: MakeSettings) -> None:
    """Adapter loading and admin paths are closed to clients."""
    async with upstream(ok()) as fake, running(settings(routing(fake.url))) as gateway:
        for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/../v1/load_lora_adapter", "/admin"):
            reply = await gateway.client.post(path, content=b"{}")
            assert reply.status_code == 404
            assert "error" in reply.json()
        models = (await gateway.client.get("/v1/models")).json()
    assert fake.received == []
    assert [model["id"] for model in models["data"]] == ["prod", "backup"]


async def test_wrong_routing_changes_nothing_while_serving(settings: MakeSettings) -> None:
    """A bad edit is told in /readyz and the last good snapshot serves; a good one is live soon."""
    async with upstream(ok()) as one, upstream(ok()) as two:
        made = settings(routing(one.url))
        async with running(made) as gateway:
            made.routing_file.write_text("version: 1\nmodels: [")
            async with asyncio.timeout(3):
                while "routing" not in (await gateway.client.get("/readyz")).json()["problems"]:
                    await asyncio.sleep(0.02)
            assert (await post(gateway.client)).status_code == 200
            made.routing_file.write_text(routing(two.url))
            async with asyncio.timeout(3):
                while not two.received:
                    await post(gateway.client)
                    await asyncio.sleep(0.02)
    assert one.received


async def test_arm_of_a_plain_route(settings: MakeSettings) -> None:
    """Without a rollout everything is the incumbent's, and nothing is eligible for a mirror."""
    async with upstream(ok()) as fake, running(settings(routing(fake.url))) as gateway:
        await post(gateway.client)
        exchange = await gateway.exchange()
    assert exchange.arm is Arm.INCUMBENT
    assert exchange.mirror == "none"
