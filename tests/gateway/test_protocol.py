"""A client's connection, byte by byte: relayed and ordinary calls on one wire, in order, however the bytes arrive."""

import asyncio
import random
from collections.abc import Callable, Sequence

import orjson
import pytest

from gateway.config import Settings
from gateway.records import Outcome
from tests.gateway.conftest import running
from tests.gateway.fakes import DONE, as_asked, chunk, ok, plain, raw, sse, upstream
from tests.gateway.wire import BODY, STREAM, Wire, call, chunked

MakeSettings = Callable[..., Settings]
ROUTING = """
version: 1
models: {{m: {{upstream: nim, base_url: "{url}", model: m}}}}
default: {{serve: m}}
"""
GET = b"GET /healthz HTTP/1.1\r\nhost: g\r\n\r\n"
UNKNOWN = b"POST /v1/nothing HTTP/1.1\r\nhost: g\r\ncontent-length: 2\r\n\r\n{}"


def split(data: bytes, rng: random.Random) -> Sequence[bytes]:
    """The bytes in pieces, cut anywhere."""
    at = sorted(rng.sample(range(1, len(data)), min(len(data) - 1, rng.choice((0, 1, 3, 12)))))
    return [data[start:end] for start, end in zip([0, *at], [*at, len(data)], strict=True)]


async def test_any_mix_of_calls_on_one_connection_however_cut(settings: MakeSettings) -> None:
    """Pipelined relayed, streamed, chunked, ordinary and unknown calls: each is answered, whole and in its turn."""
    kinds = {
        "whole": (call(), 200),
        "stream": (call(STREAM), 200),
        "chunked": (chunked(BODY, 7), 200),
        "query": (call(path="/v1/completions?api-version=1"), 200),
        "get": (GET, 200),
        "unknown": (UNKNOWN, 404),
        "bad": (call(b"[1]"), 400),
    }
    rng = random.Random(5)
    logged = 0
    async with upstream(as_asked()) as fake, running(settings(ROUTING.format(url=fake.url))) as gateway:
        for _ in range(40):
            wire = await Wire.to(gateway)
            names = rng.choices(list(kinds), k=rng.randint(1, 6))
            await wire.send(*split(b"".join(kinds[name][0] for name in names), rng))
            for name in names:
                status, headers, body = await wire.reply()
                assert status == kinds[name][1], (names, name)
                relayed = name not in ("get", "unknown")
                assert ("x-understudy-exchange-id" in headers) == relayed
                assert not relayed or name != "stream" or body.endswith(b"data: [DONE]\n\n")
                logged += relayed
            await wire.close()
        assert len(await gateway.exchanges()) == logged


async def test_a_client_may_wait_to_be_asked_for_the_body(settings: MakeSettings) -> None:
    """100 Continue; and where the length alone is too much, 413 instead, and the connection ends."""
    async with upstream(ok()) as fake, running(settings(ROUTING.format(url=fake.url))) as gateway:
        wire = await Wire.to(gateway)
        head, _, body = call(extra="expect: 100-continue\r\n").partition(b"\r\n\r\n")
        await wire.send(head + b"\r\n\r\n")
        assert await asyncio.wait_for(wire.reader.readuntil(b"\r\n\r\n"), 20) == b"HTTP/1.1 100 Continue\r\n\r\n"
        await wire.send(body)
        assert (await wire.reply())[0] == 200
        await wire.close()

        wire = await Wire.to(gateway)
        await wire.send(b"POST /v1/chat/completions HTTP/1.1\r\nhost: g\r\nexpect: 100-continue\r\n")
        await wire.send(b"content-length: 100001\r\n\r\n")
        status, headers, _ = await wire.reply()
        assert (status, headers["connection"]) == (413, "close")
        assert await wire.closed()
        await wire.close()
        assert {exchange.status for exchange in await gateway.exchanges()} == {200, 413}


async def test_an_offer_of_another_protocol_is_passed_over(settings: MakeSettings) -> None:
    """As Java's client and `curl --http2` make it: the call is served, its body too, and what follows."""
    offer = "connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABk\r\n"
    get = GET.replace(b"host: g", b"host: g\r\nconnection: upgrade\r\nupgrade: websocket")
    requests = (
        call(extra=offer) + get + call() + chunked(BODY, 7).replace(b"host: g", b"host: g\r\n" + offer.encode()[:-2])
    )
    rng = random.Random(5)
    async with upstream(ok()) as fake, running(settings(ROUTING.format(url=fake.url))) as gateway:
        for _ in range(20):
            wire = await Wire.to(gateway)
            await wire.send(*split(requests, rng))
            assert [(await wire.reply())[0] for _ in range(4)] == [200, 200, 200, 200]
            await wire.close()
    assert [one.body for one in fake.received] == [BODY] * 60
    assert not {"upgrade", "http2-settings", "connection"} & {name for one in fake.received for name in one.headers}


async def test_a_tunnel_is_refused(settings: MakeSettings) -> None:
    """CONNECT is no offer, and never goes up."""
    async with upstream(ok()) as fake, running(settings(ROUTING.format(url=fake.url))) as gateway:
        wire = await Wire.to(gateway)
        await wire.send(b"CONNECT example.test:443 HTTP/1.1\r\nhost: example.test\r\n\r\n")
        assert (await asyncio.wait_for(wire.reader.read(16), 20)).startswith(b"HTTP/1.1 4")
        await wire.close()
    assert fake.received == []


async def test_a_body_without_a_length_is_bounded_too(settings: MakeSettings) -> None:
    async with upstream(ok()) as fake, running(settings(ROUTING.format(url=fake.url))) as gateway:
        wire = await Wire.to(gateway)
        await wire.send(chunked(b'{"model": "' + b"x" * 100_001, 9_000))
        assert (await wire.reply())[0] == 413
        await wire.close()
        assert fake.received == []


async def test_connections_end_when_the_client_says_so(settings: MakeSettings) -> None:
    """HTTP/1.0 and `connection: close`: one reply, then the end."""
    async with upstream(ok()) as fake, running(settings(ROUTING.format(url=fake.url))) as gateway:
        for request in (call(version="1.0"), call(extra="connection: close\r\n")):
            wire = await Wire.to(gateway)
            await wire.send(request)
            status, headers, _ = await wire.reply()
            assert (status, headers["connection"]) == (200, "close")
            assert await wire.closed()
            await wire.close()


async def test_replies_without_a_body(settings: MakeSettings) -> None:
    """204 has neither length nor chunks, and the connection goes on."""

    async with upstream(plain(b"", status="204 No Content"), ok()) as fake:
        async with running(settings(ROUTING.format(url=fake.url))) as gateway:
            wire = await Wire.to(gateway)
            await wire.send(call(), call())
            first, second = await wire.reply(), await wire.reply()
            await wire.close()
    assert (first[0], first[2], "transfer-encoding" in first[1]) == (204, b"", False)
    assert second[0] == 200


async def test_a_client_that_leaves_in_the_middle_of_its_request(settings: MakeSettings) -> None:
    """The upstream is not called, and the call is accounted for, with what had come of it."""
    async with upstream(ok()) as fake, running(settings(ROUTING.format(url=fake.url))) as gateway:
        wire = await Wire.to(gateway)
        await wire.send(call()[:-5])
        await wire.close()
        found = []
        while not found:
            found = await gateway.exchanges()
            await asyncio.sleep(0.01)
    assert [exchange.outcome for exchange in found] == [Outcome.CLIENT_GONE]
    assert fake.received == []


async def test_a_slow_client_holds_the_upstream_back(settings: MakeSettings) -> None:
    """What nobody takes is not read: the gateway holds a bounded part of a long stream, and then delivers all of it."""
    big = b"data: " + b"x" * 65_536 + b"\n\n"
    sent: list[int] = []

    async def script(_request: object, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        for number in range(600):
            writer.write(b"%x\r\n%b\r\n" % (len(big), big))
            await writer.drain()
            sent.append(number)
        writer.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(DONE), DONE))

    async with upstream(script) as fake, running(settings(ROUTING.format(url=fake.url))) as gateway:
        wire = await Wire.to(gateway)
        await wire.send(call(STREAM))
        before = -1
        while len(sent) != before:  # until nothing moves any more
            before = len(sent)
            await asyncio.sleep(0.3)
        assert len(sent) < 500
        _, _, body = await wire.reply()
        await wire.close()
    assert len(body) == 600 * len(big) + len(DONE)


async def test_a_cut_stream_has_no_end(settings: MakeSettings) -> None:
    """A killed upstream looks like one: the reply's last chunk never comes."""
    async with upstream(sse(chunk("a"), end="cut")) as fake:
        async with running(settings(ROUTING.format(url=fake.url))) as gateway:
            wire = await Wire.to(gateway)
            await wire.send(call(STREAM))
            got = await asyncio.wait_for(wire.reader.read(), 20)
            await wire.close()
    assert orjson.loads(got.partition(b"data: ")[2].partition(b"\n")[0])
    assert not got.endswith(b"0\r\n\r\n")


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize(
    "framed",
    [
        b"content-length: 28\r\n\r\n" + DONE * 2,
        b"transfer-encoding: chunked\r\n\r\n1c\r\n" + DONE * 2 + b"\r\n0\r\n\r\n",
        b"\r\n" + DONE * 2,
    ],
    ids=["length", "chunks", "end of the connection"],
)
async def test_no_reply_ends_with_its_connection(settings: MakeSettings, framed: bytes, version: str) -> None:
    """However the upstream's did, and whatever the client speaks: what stops in the middle never looks like the end."""
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
    async with upstream(raw(head + framed)) as fake, running(settings(ROUTING.format(url=fake.url))) as gateway:
        wire = await Wire.to(gateway)
        await wire.send(call(STREAM, version=version))
        status, headers, body = await wire.reply()
        await wire.close()
    assert (status, body) == (200, DONE * 2)
    assert {"content-length", "transfer-encoding"} & set(headers)
