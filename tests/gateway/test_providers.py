"""A provider that does not speak OpenAI's protocol, through a running gateway: its replies, errors, cuts and prices."""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx
import openai
import orjson
import pytest
from click.testing import Result
from typer.testing import CliRunner

from flywheel.cli import app
from gateway.config import Settings
from gateway.prices import listed_price
from gateway.records import Exchange, Outcome
from gateway.upstream import UpstreamRequest
from gateway.upstream.via_litellm import LitellmUpstream
from routing.codec import overlay_to_dict
from routing.targets import Model, Overlay, Price, Ref, Timeouts
from tests.gateway.anthropic import BEGIN, TEXT, TOOL, event, message, refusal, stream, text, tool
from tests.gateway.conftest import Running, running
from tests.gateway.fakes import FakeUpstream, hang, ok, plain, sse, upstream
from tests.gateway.proxies import proxy
from tests.gateway.served import Served
from tests.gateway.test_direct import authority

MakeSettings = Callable[..., Settings]
KEY = "a-key-do-not-tell"
ROUTING = """
version: 1
models:
  claude:
    upstream: litellm
    model: {name}
    api_key: env:FAKE_ANTHROPIC_KEY
    {address}
    {model}
  prod: {{upstream: nim, base_url: "{prod}", model: big}}
default: {{{route}}}
"""
BODY = {"model": "any", "messages": [{"role": "user", "content": "hi"}]}
TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}]
CHAT = "/v1/chat/completions"
DEAD = "http://127.0.0.1:9"
# The first call waits until litellm is loaded, on a busy machine for half a minute.
PATIENT = "timeouts: {first_token: 120s}"


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_ANTHROPIC_KEY", KEY)


def routing(
    fake: FakeUpstream | str, *, route: str = "serve: claude", model: str = PATIENT, prod: str = "http://127.0.0.1:9/v1",
    name: str = "anthropic/claude-sonnet-4-5",
) -> str:  # fmt: skip
    url = fake if isinstance(fake, str) else fake.url.removesuffix("/v1")
    return ROUTING.format(address=f"base_url: {url}", route=route, model=model, prod=prod, name=name)


async def ask(gateway: Running, **body: object) -> httpx.Response:
    return await gateway.client.post(CHAT, json=BODY | body, timeout=120)


def client(gateway: Running) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0, timeout=120)


async def test_a_reply_is_openai_s_logged_and_priced(settings: MakeSettings) -> None:
    """With openai's own client: text, a tool call and tokens; the provider gets its own key and protocol."""
    limits = "anthropic-ratelimit-requests-remaining: 9\r\n"
    async with upstream(message(TEXT, TOOL, stop="tool_use", extra=limits)) as fake:
        async with running(settings(routing(fake))) as gateway:
            told = await client(gateway).chat.completions.with_raw_response.create(
                model="any", messages=[{"role": "user", "content": "hi"}], tools=TOOLS, temperature=0.5,
                metadata={"workload_id": "w"}, extra_headers={"authorization": "Bearer client-secret"},
            )  # fmt: skip
            exchange = await gateway.exchange()
    reply, received = told.parse(), fake.received[0]
    assert told.headers["x-ratelimit-remaining-requests"] == "9"
    choice = reply.choices[0]
    assert (choice.message.content, choice.finish_reason) == ("hello", "tool_calls")
    assert [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or ()] == [
        ("look_up", '{"order": 7}')
    ]
    assert received.line == "POST /v1/messages HTTP/1.1"
    assert (received.headers["x-api-key"], "authorization" in received.headers) == (KEY, False)
    assert received.json["model"] == "claude-sonnet-4-5"
    assert received.json["tools"][0]["name"] == "look_up"
    assert set(received.json) == {"model", "messages", "tools", "temperature", "max_tokens"}
    assert (exchange.outcome, exchange.model, exchange.status) == (Outcome.OK, "claude", 200)
    assert exchange.usage is not None
    assert (exchange.usage.input_tokens, exchange.usage.output_tokens) == (12, 5)
    assert exchange.cost_usd == pytest.approx((12 * 3 + 5 * 15) / 1e6)  # litellm's table
    assert exchange.response is not None
    assert exchange.response["choices"][0]["message"]["content"] == "hello"
    assert KEY not in str(exchange)


async def test_a_stream_is_openai_s_and_assembled(settings: MakeSettings) -> None:
    script = stream(text("hel", "lo"), tool('{"order"', ": 7}", index=1), stop="tool_use")
    async with upstream(script) as fake:
        async with running(settings(routing(fake, route="serve: claude, include_usage: true"))) as gateway:
            parts = [
                chunk
                async for chunk in await client(gateway).chat.completions.create(
                    model="any", messages=[{"role": "user", "content": "hi"}], tools=TOOLS, stream=True
                )
            ]
            raw = await ask(gateway, stream=True, stream_options={"include_usage": True})
            exchanges = await gateway.exchanges()
    assert fake.received[0].json["stream"] is True
    assert "".join(part.choices[0].delta.content or "" for part in parts) == "hello"
    calls = [call for part in parts for call in part.choices[0].delta.tool_calls or ()]
    assert calls[0].function is not None
    assert calls[0].function.name == "look_up"
    assert "".join(call.function.arguments or "" for call in calls if call.function) == '{"order": 7}'
    assert parts[-1].choices[0].finish_reason == "tool_calls"
    assert raw.headers["content-type"] == "text/event-stream"
    assert raw.content.endswith(b"\n\ndata: [DONE]\n\n")
    assert b'"prompt_tokens":12' in raw.content
    for exchange in exchanges:
        assert (exchange.outcome, exchange.stream) == (Outcome.OK, True)
        assert exchange.response is not None
        assembled = exchange.response["choices"][0]["message"]
        assert assembled["content"] == "hello"
        assert assembled["tool_calls"][0]["function"] == {"name": "look_up", "arguments": '{"order": 7}'}
        assert exchange.usage is not None
        assert (exchange.usage.input_tokens, exchange.usage.output_tokens) == (12, 5)


@pytest.mark.parametrize("streamed", [False, True])
async def test_the_provider_s_errors_keep_status_and_retry_after(settings: MakeSettings, streamed: bool) -> None:
    script = (
        refusal("529 Overloaded", "overloaded_error", "Overloaded", extra="retry-after: 7\r\n"),
        refusal("429 Too Many Requests", "rate_limit_error", "slow down, " + KEY, extra="retry-after: 3\r\n"),
        refusal("400 Bad Request", "invalid_request_error", "max_tokens: too many"),
    )
    async with upstream(*script) as fake:
        async with running(settings(routing(fake))) as gateway:
            replies = [await ask(gateway, stream=streamed) for _ in script]
            exchanges = await gateway.exchanges()
    assert [reply.status_code for reply in replies] == [529, 429, 400]
    assert [reply.headers.get("retry-after") for reply in replies] == ["7", "3", None]
    assert [reply.json()["error"]["message"] for reply in replies] == [
        "Overloaded",
        "slow down, ***",
        "max_tokens: too many",
    ]
    assert [reply.json()["error"]["type"] for reply in replies] == [
        "overloaded_error", "rate_limit_error", "invalid_request_error",
    ]  # fmt: skip
    assert {exchange.outcome for exchange in exchanges} == {Outcome.UPSTREAM_ERROR}
    assert len(fake.received) == 3  # litellm does not try again by itself
    assert KEY not in str(exchanges)


async def test_retries_and_fallbacks_are_the_gateway_s(settings: MakeSettings) -> None:
    """429 then an answer; then overloaded until the fallback, which speaks OpenAI's protocol, has it."""
    busy = refusal("429 Too Many Requests", "rate_limit_error", "slow down", extra="retry-after: 0\r\n")
    over = refusal("529 Overloaded", "overloaded_error", "Overloaded")
    model = f"{PATIENT}\n    retries: {{attempts: 1, backoff: 10ms}}"
    async with upstream(busy, message(TEXT), over) as fake, upstream(ok()) as prod:
        made = routing(fake, model=model, route="serve: claude, fallbacks: [prod]", prod=prod.url)
        async with running(settings(made)) as gateway:
            first, second = await ask(gateway), await ask(gateway)
            exchanges = await gateway.exchanges()
    assert (first.status_code, first.headers["x-understudy-model"]) == (200, "claude")
    assert (second.status_code, second.headers["x-understudy-model"]) == (200, "prod")
    assert sorted([attempt.error for attempt in exchange.attempts] for exchange in exchanges) == [
        ["status 429"], ["status 529"],
    ]  # fmt: skip


async def test_a_provider_that_is_not_there_is_a_failed_connection(settings: MakeSettings) -> None:
    model = f"{PATIENT}\n    retries: {{attempts: 1, on: [connect], backoff: 1ms}}"
    async with running(settings(routing("http://127.0.0.1:9", model=model))) as gateway:
        reply = await ask(gateway)
        exchange = await gateway.exchange()
    assert (reply.status_code, reply.json()["error"]["code"]) == (502, "unreachable")
    assert len(exchange.attempts) == 2


BROKEN = {
    "the connection ends": sse(BEGIN, *text("hel")[:2], end="cut"),
    "the stream ends without its last events": sse(BEGIN, *text("hel")),
    "an error within": sse(BEGIN, *text("hel"), event("error", error={"type": "overloaded_error", "message": "Over"})),
}


@pytest.mark.parametrize("script", BROKEN.values(), ids=BROKEN.keys())
async def test_a_stream_that_breaks_never_looks_finished(settings: MakeSettings, script: object) -> None:
    async with upstream(script) as fake:
        async with running(settings(routing(fake))) as gateway:
            got = b""
            async with gateway.client.stream("POST", CHAT, json=BODY | {"stream": True}, timeout=120) as reply:
                with pytest.raises(httpx.RemoteProtocolError):  # noqa: PT012 -- what came before is kept
                    async for part in reply.aiter_bytes():
                        got += part
            exchange = await gateway.exchange()
    assert b"hel" in got
    assert b"[DONE]" not in got
    assert b'"stop"' not in got
    assert exchange.outcome is Outcome.UPSTREAM_CUT


@contextlib.asynccontextmanager
async def that_stops(*events: bytes) -> AsyncIterator[tuple[str, asyncio.Queue[None]]]:
    """A provider that sends so much, then nothing; its queue gets an entry for each connection that is closed."""
    left: asyncio.Queue[None] = asyncio.Queue()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        if events:
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
            writer.writelines(b"%x\r\n%s\r\n" % (len(one), one) for one in events)
        with contextlib.suppress(ConnectionError):
            await reader.read()
        left.put_nowait(None)
        writer.close()

    async with await asyncio.start_server(handle, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", left


async def test_a_client_that_leaves_within_a_stream_ends_the_provider_s_call(settings: MakeSettings) -> None:
    async with that_stops(BEGIN, *text("hel")[:2]) as (url, left), running(settings(routing(url))) as gateway:
        async with gateway.client.stream("POST", CHAT, json=BODY | {"stream": True}, timeout=120) as reply:
            assert b"hel" in await anext(reply.aiter_bytes())
        await asyncio.wait_for(left.get(), 10)
        (exchange,) = await logged(gateway, 1)
    assert exchange.outcome is Outcome.CLIENT_GONE


async def test_a_client_that_leaves_before_the_reply_ends_the_provider_s_call(settings: MakeSettings) -> None:
    async with that_stops() as (url, left), running(settings(routing(url))) as gateway:
        with pytest.raises(httpx.ReadTimeout):
            await gateway.client.post(CHAT, json=BODY, timeout=1)
        await asyncio.wait_for(left.get(), 10)
        (exchange,) = await logged(gateway, 1)
    assert exchange.outcome is Outcome.CLIENT_GONE


async def logged(gateway: Running, count: int) -> list[Exchange]:
    """What the log has, once it has that many with an end."""
    async with asyncio.timeout(10):
        while len(found := await gateway.exchanges()) < count:
            await asyncio.sleep(0.02)
    return found


async def test_deadlines_hold(settings: MakeSettings) -> None:
    first = "timeouts: {first_token: 500ms}"
    async with upstream(message(TEXT), hang) as fake:
        async with running(settings(routing(fake))) as gateway:
            assert (await ask(gateway)).status_code == 200  # it is loaded now
        async with running(settings(routing(fake, model=first))) as gateway:
            late = await ask(gateway)
    assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
    total = "timeouts: {first_token: 120s, total: 1s}"
    async with upstream(sse(BEGIN, *text("hel")[:2], end="hang")) as fake:
        async with running(settings(routing(fake, model=total))) as gateway:
            with pytest.raises(httpx.RemoteProtocolError):
                await ask(gateway, stream=True)
            exchanges = await gateway.exchanges()
    assert sorted(exchange.outcome for exchange in exchanges) == [Outcome.OK, Outcome.TIMEOUT, Outcome.TIMEOUT]


async def test_what_no_provider_gets_is_refused(settings: MakeSettings) -> None:
    """An address, a key or a switch of litellm's in the body; paths that it does not serve. No call goes up."""
    async with upstream(message(TEXT)) as fake:
        async with running(settings(routing(fake))) as gateway:
            bad = [
                await ask(gateway, **{name: "http://127.0.0.1:9"}) for name in ("api_base", "api_key", "mock_response")
            ]
            other = [
                await gateway.client.post("/v1/responses", json={"model": "m", "input": "x"}),
                await gateway.client.post("/v1/completions", json={"model": "m", "prompt": "x"}),
                await gateway.client.get("/v1/files"),
            ]
            torn = await gateway.client.post(CHAT, content=b'{"model": "m", "messages": [], "user": "\\ud800"}')
            none = await gateway.client.post("/v1/embeddings", json={"model": "m", "input": "x"}, timeout=120)
    assert [(reply.status_code, reply.json()["error"]["param"]) for reply in bad] == [
        (400, "api_base"), (400, "api_key"), (400, "mock_response"),
    ]  # fmt: skip
    assert [(reply.status_code, reply.json()["error"]["code"]) for reply in other] == [(404, "unsupported_path")] * 3
    assert 400 <= none.status_code < 500
    assert none.json()["error"]["message"]
    assert (torn.status_code, "error" in torn.json()) == (400, True)
    assert fake.received == []


async def test_the_environment_s_proxy_and_authorities_are_heeded(
    settings: MakeSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """litellm knows them by itself; here they are what every other upstream goes by as well."""
    tls = authority(tmp_path / "ca.pem", "provider.test")
    async with upstream(message(TEXT), tls=tls) as fake, proxy({"provider.test": ("127.0.0.1", fake.port)}) as way:
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        for name in ("https_proxy", "no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HTTPS_PROXY", way.url)
        async with running(settings(routing("https://provider.test:7"))) as gateway:
            reply = await ask(gateway)
    assert (reply.status_code, way.lines) == (200, ["CONNECT provider.test:7"])


async def test_embeddings_of_a_provider_that_has_them(settings: MakeSettings) -> None:
    """As openai's client asks for them, in base64, and as plain numbers."""
    vectors = {
        "id": "e1",
        "embeddings": {"float": [[0.5, -1.0]]},
        "texts": ["x"],
        "meta": {"billed_units": {"input_tokens": 3}},
    }
    async with upstream(plain(orjson.dumps(vectors)), plain(orjson.dumps(vectors)), plain(b'{"odd": 1}')) as fake:
        url = f"{fake.url}/embed"
        async with running(settings(routing(url, name="cohere/embed-english-v3.0"))) as gateway:
            made = await client(gateway).embeddings.create(model="any", input="x")
            plainly = await gateway.client.post("/v1/embeddings", json={"model": "any", "input": ["x"]}, timeout=120)
            odd = await gateway.client.post("/v1/embeddings", json={"model": "any", "input": ["x"]}, timeout=120)
            exchanges = await gateway.exchanges()
    assert (odd.status_code >= 500, "Traceback" in odd.text) == (True, False)  # what litellm can't read
    assert made.data[0].embedding == [0.5, -1.0]
    assert plainly.json()["data"][0]["embedding"] == [0.5, -1.0]
    assert [exchange.usage.input_tokens for exchange in exchanges if exchange.usage] == [3, 3]


async def test_mirrors_reach_a_provider(settings: MakeSettings) -> None:
    route = "serve: prod, mirror: [{model: claude, sample: 1.0}]"
    async with upstream(message(TEXT)) as fake, upstream(ok()) as prod:
        async with running(settings(routing(fake, route=route, prod=prod.url))) as gateway:
            assert (await ask(gateway)).status_code == 200
            found = await logged(gateway, 2)
    (mirror,) = [exchange for exchange in found if exchange.mirror_of]
    assert (mirror.model, mirror.outcome) == ("claude", Outcome.OK)
    assert mirror.cost_usd == pytest.approx((12 * 3 + 5 * 15) / 1e6)


async def test_a_canary_at_a_provider_is_served_by_the_incumbent_where_it_fails(settings: MakeSettings) -> None:
    over = refusal("529 Overloaded", "overloaded_error", "Overloaded")
    async with upstream(message(TEXT), over, sse(BEGIN)) as fake, upstream(ok()) as prod:
        made = settings(routing(fake, route="serve: prod", prod=prod.url))
        made.run_dir.mkdir(parents=True)
        laid = Overlay(workload="default", rollout="r1", candidate=Ref(model="claude"), salt="s", weight=100)
        (made.run_dir / "overlays.json").write_bytes(orjson.dumps({"default": overlay_to_dict(laid)}))
        async with running(made) as gateway:
            replies = [await ask(gateway), await ask(gateway), await ask(gateway, stream=True)]
            exchanges = await gateway.exchanges()
    assert [reply.status_code for reply in replies] == [200] * 3
    assert [reply.headers["x-understudy-arm"] for reply in replies] == ["candidate", "incumbent", "incumbent"]
    assert [len(exchange.attempts) for exchange in exchanges] == [0, 1, 1]


async def test_a_reply_that_is_given_up_between_two_events_ends_its_connection() -> None:
    """Nobody reads at that moment; what has come already is passed over."""
    providers = LitellmUpstream()
    body = orjson.dumps(BODY | {"stream": True})
    request = UpstreamRequest(path="/chat/completions", headers=[], body=body)
    try:
        async with that_stops(BEGIN, *text(*"a long story")[:-1]) as (url, left):
            patient = Timeouts(first_token=120)
            model = Model(
                name="c", upstream="litellm", base_url=url, model="anthropic/claude-sonnet-4-5", api_key=KEY,
                timeouts=patient,
            )  # fmt: skip
            reply = await providers.send(model, request)
            assert b'"a"' in await reply.read()
            reply.close()
            reply.close()
            assert await reply.read() == b""
            await asyncio.wait_for(left.get(), 10)
    finally:
        await providers.close()


async def test_without_litellm_calls_say_what_to_install(
    settings: MakeSettings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fallback serves; without one it is a 502. All other models are served as ever."""
    monkeypatch.setitem(sys.modules, "litellm", None)
    async with upstream(ok()) as prod:
        async with running(settings(routing(DEAD))) as gateway:
            alone = await ask(gateway)
        async with running(settings(routing(DEAD, route="serve: claude, fallbacks: [prod]", prod=prod.url))) as gateway:
            behind = await ask(gateway)
    assert (alone.status_code, behind.status_code) == (502, 200)
    assert "pip install 'understudy[litellm]'" in alone.json()["error"]["message"]
    assert "pip install 'understudy[litellm]'" in capsys.readouterr().out


def test_routes_check_and_doctor_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what has no price. Nothing of it needs litellm itself."""
    file = tmp_path / "routing.yaml"
    file.write_text(routing(DEAD))
    monkeypatch.setenv("UNDERSTUDY_ROUTING_FILE", str(file))
    monkeypatch.setenv("UNDERSTUDY_DATA_DIR", str(tmp_path))

    def run(*words: str) -> Result:
        return CliRunner().invoke(app, words)

    assert orjson.loads(run("routes", "check", "--json").stdout)["price_unknown"] == []
    file.write_text(routing(DEAD, name="anthropic/nobody-knows"))
    told = run("routes", "check")
    assert (told.exit_code, "claude: litellm lists no price" in told.stderr) == (0, True)
    monkeypatch.setitem(sys.modules, "litellm", None)
    lacking = run("routes", "check")
    assert (lacking.exit_code, "claude: upstream: litellm needs" in lacking.stderr) == (0, True)
    assert "pip install 'understudy[litellm]'" in lacking.stderr
    (found,) = [
        finding
        for finding in orjson.loads(run("doctor", "--json").stdout)["findings"]
        if finding["check"] == "upstream claude"
    ]
    assert (found["level"], "pip install 'understudy[litellm]'" in found["mend"]) == ("missing", True)


async def test_other_calls_are_served_while_litellm_is_loaded(served: Served) -> None:
    """Real workers: the provider's call waits, all others do not; then it is answered."""
    async with upstream(stream(text("hello"))) as fake, upstream(ok()) as prod:
        more = "workloads: {w: {serve: claude}}\n"
        (served.folder / "routing.yaml").write_text(routing(fake, route="serve: prod", prod=prod.url) + more)
        served.config.write_text(served.config.read_text().replace("workers = 2", "workers = 1"))
        served.workers = 1
        await served.start()
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{served.port}", timeout=120) as client:
            waiting = asyncio.ensure_future(
                client.post(CHAT, json=BODY | {"stream": True}, headers={"x-workload-id": "w"})
            )
            others = [await client.post(CHAT, json=BODY) for _ in range(20)]
            assert not waiting.done()
            reply = await waiting
        assert await served.stop() == 0
    await served.ship_leftovers()
    exchanges = await served.logged()
    assert {other.status_code for other in others} == {200}
    assert reply.content.endswith(b"data: [DONE]\n\n")
    assert {exchange.outcome for exchange in exchanges} == {Outcome.OK}
    assert len(exchanges) == 21


def test_prices_are_litellm_s_and_never_made_up() -> None:
    assert listed_price("anthropic/claude-sonnet-4-5") == Price(input=3, output=15)
    assert listed_price("gemini/gemini-2.5-pro") == Price(input=1.25, output=10)
    assert listed_price("vertex_ai/gemini-2.5-pro") == Price(input=1.25, output=10)
    assert listed_price("bedrock/anthropic.claude-3-5-sonnet-20240620-v1:0") == Price(input=3, output=15)
    assert listed_price("openai/claude-sonnet-4-5") is None
    assert listed_price("anthropic/no-such-model") is None
