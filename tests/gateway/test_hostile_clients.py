"""Clients that send too much, too slowly, or what two servers could read in two ways: refused in time, and told why."""

import asyncio
import time
from collections.abc import Callable

import httpx
import orjson
import pytest

from gateway.config import Settings
from gateway.records import Outcome
from tests.gateway.conftest import Running, running
from tests.gateway.fakes import Received, chunk, ok, sse, upstream
from tests.gateway.wire import BODY, STREAM, Wire, call, chunked

MakeSettings = Callable[..., Settings]
ROUTING = """
version: 1
models: {{m: {{upstream: nim, base_url: "{url}", model: m}}}}
default: {{serve: m}}
"""
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: g\r\n"
LENGTH = b"content-length: %d\r\n" % len(BODY)
SMUGGLED = b"POST /v1/files HTTP/1.1\r\nhost: g\r\ncontent-length: 0\r\n\r\n"
CHUNKS = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
CHUNKED = b"transfer-encoding: chunked\r\n"


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        pytest.param(HEAD + LENGTH + CHUNKED + b"\r\n" + CHUNKS + SMUGGLED, 400, id="length and chunks"),
        pytest.param(HEAD + CHUNKED + LENGTH + b"\r\n" + CHUNKS + SMUGGLED, 400, id="chunks and length"),
        pytest.param(HEAD + LENGTH + LENGTH + b"\r\n" + BODY + SMUGGLED, 400, id="two lengths"),
        pytest.param(HEAD + b"content-length: 0\r\n" + LENGTH + b"\r\n" + BODY, 400, id="two lengths that differ"),
        pytest.param(HEAD + b"content-length: 5, 5\r\n\r\n" + BODY, 400, id="a list of lengths"),
        pytest.param(HEAD + b"content-length: +5\r\n\r\n" + BODY, 400, id="a signed length"),
        pytest.param(HEAD + b"content-length: 99999999999999999999\r\n\r\n", 400, id="a length beyond 64 bits"),
        pytest.param(HEAD + b"x: a\r\n content-length: 5\r\n\r\n" + SMUGGLED, 400, id="a folded line"),
        pytest.param(HEAD + b"content-length:\r\n 30\r\n\r\n" + SMUGGLED, 400, id="a folded length"),
        pytest.param(HEAD + b"content-length : 30\r\n\r\n" + SMUGGLED, 400, id="space before the colon"),
        pytest.param(HEAD + b" x: a\r\n\r\n" + SMUGGLED, 400, id="space before a name"),
        pytest.param(HEAD + b"x: a\ncontent-length: 30\r\n\r\n" + SMUGGLED, 400, id="a bare line feed"),
        pytest.param(HEAD + b"x: a\rcontent-length: 30\r\n\r\n" + SMUGGLED, 400, id="a bare carriage return"),
        pytest.param(HEAD.replace(b"\r\n", b"\n") + b"\n" + SMUGGLED, 400, id="line feeds alone"),
        pytest.param(HEAD + b"x: a\x00b\r\n\r\n", 400, id="NUL in a value"),
        pytest.param(HEAD + b"x\x00: a\r\n\r\n", 400, id="NUL in a name"),
        pytest.param(HEAD + b"transfer-encoding: xchunked\r\n\r\n" + CHUNKS, 501, id="xchunked"),
        pytest.param(HEAD + b"transfer-encoding: identity\r\n\r\n" + BODY, 501, id="identity"),
        pytest.param(HEAD + b"transfer-encoding: chunked, identity\r\n\r\n" + CHUNKS, 400, id="chunked, identity"),
        pytest.param(HEAD + CHUNKED * 2 + b"\r\n" + CHUNKS, 400, id="chunked twice"),
        pytest.param(HEAD + b"transfer-encoding: \x0bchunked\r\n\r\n" + CHUNKS, 400, id="chunked behind a control"),
        pytest.param(HEAD + b"transfer-encoding: gzip, chunked\r\n\r\n" + CHUNKS, 501, id="gzip, chunked"),
        pytest.param(HEAD + b"transfer-encoding: identity\r\n" + CHUNKED + b"\r\n" + CHUNKS, 501, id="identity first"),
        pytest.param(HEAD + CHUNKED + b"\r\n" + CHUNKS.replace(b"\r\n", b"\n"), 400, id="chunks with line feeds"),
        pytest.param(HEAD + CHUNKED + b"\r\n0x1e\r\n" + BODY + b"\r\n0\r\n\r\n", 400, id="a chunk's size as 0x1e"),
        pytest.param(HEAD + CHUNKED + b"\r\nfffffffffffffffff\r\n" + BODY, 400, id="a chunk beyond 64 bits"),
        pytest.param(HEAD + CHUNKED + b"\r\n3\r\n" + BODY + b"\r\n0\r\n\r\n", 400, id="more than the chunk's size"),
        pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, id="HTTP/2's preface"),
        pytest.param(HEAD.replace(b"1.1", b"2.0") + LENGTH + b"\r\n" + BODY, 505, id="HTTP/2.0"),
        pytest.param(HEAD.replace(b"1.1", b"0.9") + LENGTH + b"\r\n" + BODY, 505, id="HTTP/0.9"),
        pytest.param(b"POST /v1/chat/completions\r\n\r\n", 505, id="no version"),
        pytest.param(HEAD.replace(b"1.1", b"1.2") + b"\r\n", 400, id="HTTP/1.2"),
        pytest.param(HEAD.replace(b"host: g", b"x: y") + LENGTH + b"\r\n" + BODY, 400, id="no host"),
        pytest.param(HEAD.replace(b" HTTP", b"\t HTTP") + b"\r\n", 400, id="a tab in the line"),
        pytest.param(b"CONNECT g:443 HTTP/1.1\r\nhost: g\r\n\r\n" + SMUGGLED, 400, id="CONNECT"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, id="TLS"),
        pytest.param(b"\r\n\r\nhello\r\n\r\n", 400, id="no HTTP at all"),
        pytest.param(HEAD + b"x: y\r\n" * 300 + LENGTH + b"\r\n" + BODY, 431, id="300 headers"),
        pytest.param(HEAD + b"x: " + b"y" * 70_000 + b"\r\n" + LENGTH + b"\r\n" + BODY, 431, id="a header of 70 KB"),
        pytest.param(HEAD + b"x: " + b"y" * 700_000, 431, id="a header without an end"),
        pytest.param(HEAD.replace(b" HTTP", b"?" + b"q" * 70_000 + b" HTTP") + b"\r\n", 431, id="a query of 70 KB"),
        pytest.param(HEAD + CHUNKED + b"\r\n1;" + b"e" * 700_000, 431, id="an extension without an end"),
        pytest.param(HEAD + CHUNKED + b"\r\n" + CHUNKS[:-2] + b"t: " + b"t" * 700_000, 431, id="an endless trailer"),
    ],
)
async def test_what_could_be_read_in_two_ways_is_refused(settings: MakeSettings, sent: bytes, status: int) -> None:
    """With an error in OpenAI's shape, as the connection's last reply; no upstream hears of it."""
    async with upstream(ok()) as fake, running(settings(ROUTING.format(url=fake.url))) as gateway:
        wire = await Wire.to(gateway)
        await wire.send(sent)
        got, headers, body = await wire.reply()
        assert (got, headers["content-type"]) == (status, "application/json"), body
        assert set(orjson.loads(body)["error"]) == {"message", "type", "code", "param"}
        if status != 501:
            assert (headers["connection"], await wire.closed()) == ("close", True)
        await wire.close()
        logged = [exchange.status for exchange in await gateway.exchanges()]
        counted = f'understudy_unread_total{{status="{status}"}} 1.0' in await metrics(gateway)
    assert fake.received == []
    assert (logged, counted) in (([], True), ([status], False))


async def metrics(gateway: Running) -> str:
    return (await gateway.client.get("/metrics")).text


async def test_garbage_behind_a_request_does_not_come_before_its_reply(settings: MakeSettings) -> None:
    """Pipelined: what was whole is answered, in its turn; the connection ends behind it."""
    async with upstream(ok()) as fake, running(settings(ROUTING.format(url=fake.url))) as gateway:
        for behind in (b"garbage\r\n\r\n", chunked(BODY, 7)[:-5] + b"Z", HEAD + b"content-length: x\r\n\r\n"):
            wire = await Wire.to(gateway)
            await wire.send(call() + call() + behind)
            assert [(await wire.reply())[0] for _ in range(2)] == [200, 200]
            assert await wire.reader.read(12) in (b"", b"HTTP/1.1 400")
            await wire.close()
        assert len(fake.received) == 6


async def test_nothing_is_answered_behind_the_last_reply(
    settings: MakeSettings, caplog: pytest.LogCaptureFixture
) -> None:
    """The client asked for the end; what it sent behind that, calls and garbage, is let go."""
    get = b"GET /healthz HTTP/1.1\r\nhost: g\r\n\r\n"
    async with upstream(ok()) as fake, running(settings(ROUTING.format(url=fake.url))) as gateway:
        wire = await Wire.to(gateway)
        await wire.send(call(extra="connection: close\r\n") + get + call() + b"garbage\r\n\r\n")
        assert ((await wire.reply())[0], await wire.closed()) == (200, True)
        await wire.close()
    assert len(fake.received) == 1
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def test_a_thousand_requests_in_one_packet_are_answered_one_by_one(settings: MakeSettings) -> None:
    refused = HEAD + b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n"
    offer = b"GET /healthz HTTP/1.1\r\nhost: g\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n"
    async with upstream(ok()) as fake, running(settings(ROUTING.format(url=fake.url))) as gateway:
        wire = await Wire.to(gateway)
        await wire.send(call() + refused * 1000 + offer * 1000 + call())
        wanted = [200, *[501] * 1000, *[200] * 1001]
        assert [(await wire.reply())[0] for _ in wanted] == wanted
        await wire.close()
        assert len(await gateway.exchanges()) == 1002


async def test_too_large_a_body_in_the_second_place_is_refused_there(settings: MakeSettings) -> None:
    async with upstream(ok()) as fake, running(settings(ROUTING.format(url=fake.url))) as gateway:
        wire = await Wire.to(gateway)
        await wire.send(call() + chunked(b"x" * 150_000, 50_000))
        assert [(await wire.reply())[0] for _ in range(2)] == [200, 413]
        await wire.close()
        assert {exchange.status for exchange in await gateway.exchanges()} == {200, 413}


async def test_trailers_are_no_headers(settings: MakeSettings) -> None:
    """They come after the key was checked and are left behind."""
    late = b"0\r\nauthorization: Bearer other\r\nx-workload-id: other\r\n\r\n"
    async with upstream(ok()) as fake, running(settings(ROUTING.format(url=fake.url))) as gateway:
        wire = await Wire.to(gateway)
        await wire.send(chunked(BODY, 7)[:-5] + late + call())
        assert [(await wire.reply())[0] for _ in range(2)] == [200, 200]
        await wire.close()
        assert {exchange.workload_id for exchange in await gateway.exchanges()} == {"default"}
    assert not {"authorization", "x-workload-id"} & set(fake.received[0].headers)
    assert [one.body for one in fake.received] == [BODY, BODY]


async def test_a_client_that_says_nothing_or_too_little_is_let_go(settings: MakeSettings) -> None:
    """Also one that keeps sending: neither empty lines nor a header's next byte buy more time."""
    edge = {"head_timeout": 0.3}

    async def drip(start: bytes, byte: bytes) -> bytes:
        wire = await Wire.to(gateway)
        await wire.send(start)
        reading = asyncio.ensure_future(wire.reader.read(4000))
        while not reading.done():
            wire.writer.write(byte)
            await asyncio.sleep(0.02)
        wire.writer.transport.abort()
        return await reading

    async with upstream(ok()) as fake, running(settings(ROUTING.format(url=fake.url), edge=edge)) as gateway:
        begun = time.monotonic()
        silent, lines, header, line = await asyncio.gather(
            drip(b"", b""), drip(b"\r\n", b"\r\n"), drip(HEAD + b"x: ", b"y"), drip(b"P", b"")
        )
        assert time.monotonic() < begun + 5
        assert (silent, lines) == (b"", b"")
        assert header.startswith(b"HTTP/1.1 408 ")
        assert line.startswith(b"HTTP/1.1 408 ")
        assert 'understudy_unread_total{status="408"} 2.0' in await metrics(gateway)


async def test_a_body_that_stands_still_is_refused_and_a_steady_one_is_not(settings: MakeSettings) -> None:
    """Bytes count when they make 64 KiB within the time, or the end; the refused call is in the log."""
    edge = {"stall_timeout": 0.6, "max_body": 10_000_000}
    body = orjson.dumps({"model": "m", "messages": [{"role": "user", "content": "x" * 1_200_000}]})

    async def dripping() -> tuple[int, dict[str, str], bytes]:
        wire = await Wire.to(gateway)
        await wire.send(call(body)[:300])
        reply = asyncio.ensure_future(wire.reply())
        while not reply.done():
            wire.writer.write(b"x")
            await asyncio.sleep(0.05)
        wire.writer.transport.abort()
        return await reply

    async def steady() -> tuple[int, dict[str, str], bytes]:
        wire = await Wire.to(gateway)
        data = call(body)
        for at in range(0, len(data), 70_000):
            await wire.send(data[at : at + 70_000])
            await asyncio.sleep(0.1)
        reply = await wire.reply()
        await wire.close()
        return reply

    async with upstream(ok()) as fake, running(settings(ROUTING.format(url=fake.url), edge=edge)) as gateway:
        slow, fine = await asyncio.gather(dripping(), steady())
        assert (slow[0], slow[1]["connection"], fine[0]) == (408, "close", 200)
        found = {exchange.status: exchange.outcome for exchange in await gateway.exchanges()}
    assert found == {408: Outcome.REFUSED, 200: Outcome.OK}
    assert [one.body for one in fake.received] == [body]


async def test_who_uploads_too_much_hears_why(settings: MakeSettings) -> None:
    """The gateway hears a client out for a while: closing on bytes that nobody reads would take the reply away."""
    async with upstream(ok()) as fake, running(settings(ROUTING.format(url=fake.url))) as gateway:
        for _ in range(5):
            reply = await gateway.client.post("/v1/chat/completions", content=b"x" * 8_000_000)
            assert (reply.status_code, reply.json()["error"]["code"]) == (413, "request_too_large")


async def test_who_takes_nothing_of_a_reply_is_gone(settings: MakeSettings) -> None:
    """Its upstream is called off, whatever time the call had left."""
    big = b"data: " + b"x" * 65_536 + b"\n\n"
    edge = {"stall_timeout": 0.5}

    async def script(_request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        while not writer.is_closing():
            writer.write(b"%x\r\n%b\r\n" % (len(big), big))
            await writer.drain()

    async with upstream(script) as fake, running(settings(ROUTING.format(url=fake.url), edge=edge)) as gateway:
        wire = await Wire.to(gateway)
        wire.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await wire.send(call(STREAM))
        await asyncio.wait_for(fake.lost.wait(), 20)
        assert (await gateway.exchange()).outcome is Outcome.CLIENT_GONE
        wire.writer.transport.abort()


async def test_there_are_only_so_many_connections(settings: MakeSettings) -> None:
    """One too many is told so, and those that are there go on."""
    async with upstream(ok()) as fake:
        async with running(settings(ROUTING.format(url=fake.url), edge={"max_connections": 3})) as gateway:
            wires = [await Wire.to(gateway) for _ in range(3)]
            for wire in wires:
                await wire.send(call())
                assert (await wire.reply())[0] == 200
            extra = await Wire.to(gateway)
            status, headers, _ = await extra.reply()
            assert (status, headers["connection"], await extra.closed()) == (503, "close", True)
            for wire in wires:
                await wire.send(call())
                assert (await wire.reply())[0] == 200
                await wire.close()
            await extra.close()


async def test_the_content_type_is_the_upstreams_to_judge(settings: MakeSettings) -> None:
    """What is JSON goes up under the name it came with; what is none is refused under any."""
    async with upstream(ok()) as fake, running(settings(ROUTING.format(url=fake.url))) as gateway:
        for name in ("text/plain", "application/x-www-form-urlencoded", "application/json; charset=latin-1"):
            reply = await gateway.client.post("/v1/chat/completions", content=BODY, headers={"content-type": name})
            assert (reply.status_code, fake.received[-1].headers["content-type"]) == (200, name)
        files = {"file": ("a.txt", b"a")}
        refused: httpx.Response = await gateway.client.post("/v1/chat/completions", files=files)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_json")
    assert [one.body for one in fake.received] == [BODY] * 3


@pytest.mark.parametrize(
    "behind", [SMUGGLED, b"0\r\n\r\n" + SMUGGLED, b"0\r\n\r\n\x00garbage\r\n\r\n", b"0\r\n\r\nPOST /v1"]
)
async def test_a_refused_client_may_have_kept_its_body(
    settings: MakeSettings, behind: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """Behind a refusal without 100 Continue nobody knows what the next bytes are: the connection ends, in time."""
    edge = {"head_timeout": 0.1, "stall_timeout": 0.2}
    async with upstream(sse(chunk("a"))) as fake, running(settings(ROUTING.format(url=fake.url), edge=edge)) as gateway:
        wire = await Wire.to(gateway)
        await wire.send(HEAD + b"transfer-encoding: gzip, chunked\r\nexpect: 100-continue\r\n\r\n" + behind)
        status, headers, _ = await wire.reply()
        assert (status, headers["connection"], await wire.closed()) == (501, "close", True)
        async with asyncio.timeout(10):
            while not wire.writer.is_closing():  # until the gateway has closed its other side too
                wire.writer.write(b"x")
                await asyncio.sleep(0.01)
        assert len(await gateway.exchanges()) == 1
    assert fake.received == []
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def test_an_unknown_path_is_told_under_any_name(settings: MakeSettings) -> None:
    """The name that the client calls the gateway by is nothing to build an address of."""
    async with upstream(ok()) as fake, running(settings(ROUTING.format(url=fake.url))) as gateway:
        for host in ("[", "a]b", "g:x", "\xff"):
            wire = await Wire.to(gateway)
            await wire.send(f"GET /v1/nothing HTTP/1.1\r\nhost: {host}\r\n\r\n".encode("latin-1"))
            status, _, body = await wire.reply()
            assert (status, orjson.loads(body)["error"]["message"]) == (404, "GET /v1/nothing: Not Found")
            await wire.close()
