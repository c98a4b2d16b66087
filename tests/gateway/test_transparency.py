"""What passes both ways untouched: headers but those of one hop, compressed bodies, odd framing, errors."""

import asyncio
import gzip
import zlib
from collections.abc import Callable

import brotli
import httpx
import pytest
import zstandard

from gateway.config import Settings
from gateway.records import Outcome
from tests.gateway.conftest import Running, running
from tests.gateway.fakes import Received, Script, ok, plain, raw, sse, upstream
from tests.gateway.test_protocol import ROUTING
from tests.gateway.wire import BODY, Wire, call

MakeSettings = Callable[..., Settings]
HELLO = b'{"choices":[{"index":0,"message":{"role":"assistant","content":"h\xc3\xa9"}}],"odd": 1.50}\n'

RATE_LIMITS = {
    "x-ratelimit-limit-requests": "60",
    "x-ratelimit-remaining-tokens": "149984",
    "x-ratelimit-reset-requests": "6m0s",
    "retry-after": "7",
    "retry-after-ms": "7000",
    "openai-organization": "org-1",
    "openai-processing-ms": "12",
    "x-request-id": "req_1",
    "cf-ray": "8a-ZRH",
    "strict-transport-security": "max-age=1",
    "x-empty": "",
}

FRAMES = {
    "comments": b": keep-alive\n\n:\n\ndata: {}\n\n: bye\n\n".replace(b"{}", HELLO[:-1]),
    "ids and retry": b"retry: 3000\n\nid: 1\nevent: message\ndata: " + HELLO + b"\nid\n\n",
    "crlf": b": ping\r\n\r\nid: 7\r\ndata: " + HELLO[:-1] + b"\r\n\r\n",
    "bare cr": b"data: " + HELLO[:-1] + b"\r\rdata: [DONE]\r\r",
    "no space": b"data:" + HELLO[:-1] + b"\n\ndata:[DONE]\n\n",
    "several data lines": b"data: " + HELLO[:23] + b"\ndata:" + HELLO[23:-1] + b"\nid: 2\n\n",
    "byte order mark": b"\xef\xbb\xbfdata: " + HELLO[:-1] + b"\n\n",
    "no last newline": b"data: " + HELLO[:-1] + b"\n\ndata: [DONE]",
    "after the end": b"data: " + HELLO[:-1] + b"\n\ndata: [DONE]\n\n: trailing\n\nevent: extra\ndata: 1\n\n",
    "not JSON": b"data: " + HELLO[:-1] + b"\n\ndata: {oops\n\ndata:\n\n\n\n\ndata: [1]\n\n\xff\xfe\n\n",
}


async def body_of(gateway: Running) -> tuple[httpx.Response, bytes]:
    """A call's reply, with its body as it came over the wire."""
    async with gateway.client.stream("POST", "/v1/chat/completions", content=BODY) as reply:
        return reply, b"".join([part async for part in reply.aiter_raw()])


def split_everywhere(body: bytes) -> Script:
    """A stream of which each byte is an HTTP chunk and a write of its own."""

    async def script(_request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        for at in range(len(body)):
            writer.write(b"1\r\n%c\r\n" % body[at])
            await writer.drain()
            await asyncio.sleep(0)
        writer.write(b"0\r\n\r\n")

    return script


async def test_headers_of_the_upstream_pass(settings: MakeSettings) -> None:
    """Rate limits, ids, doubled and empty ones, and bytes beyond ASCII."""
    odd = "set-cookie: a=1; Path=/\r\nset-cookie: b=2\r\nx-latin: \xe9\r\n"
    extra = "".join(f"{name}: {value}\r\n" for name, value in RATE_LIMITS.items()) + odd
    head = f"HTTP/1.1 429 Too Many Requests\r\ncontent-length: {len(HELLO)}\r\n{extra}\r\n"
    async with upstream(raw(head.encode("latin-1") + HELLO, close=False)) as fake:
        async with running(settings(ROUTING.format(url=fake.url))) as gateway:
            reply, body = await body_of(gateway)
    assert (reply.status_code, body) == (429, HELLO)
    assert {name: reply.headers[name] for name in RATE_LIMITS} == RATE_LIMITS
    assert reply.headers.get_list("set-cookie") == ["a=1; Path=/", "b=2"]
    assert (b"x-latin", b"\xe9") in reply.headers.raw


async def test_headers_of_one_hop_do_not_pass_down(settings: MakeSettings) -> None:
    """Neither those that HTTP names nor those that `Connection` does; trailers are no headers."""
    head = (
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n"
        b"connection: keep-alive, X-Hop\r\nx-hop: 1\r\nkeep-alive: timeout=5\r\nproxy-authenticate: Basic\r\n"
        b"proxy-connection: keep-alive\r\nupgrade: h2c\r\ntrailer: x-trailer\r\nx-end: to end\r\n\r\n"
    )
    script = raw(head + b"%x\r\n%b\r\n0\r\nx-trailer: 1\r\n\r\n" % (len(HELLO), HELLO), close=False)
    async with upstream(script) as fake, running(settings(ROUTING.format(url=fake.url))) as gateway:
        reply, body = await body_of(gateway)
    assert body == HELLO
    known = {"content-type", "transfer-encoding", "x-end"}
    assert {name for name in reply.headers if not name.startswith("x-understudy-")} == known
    assert reply.headers["transfer-encoding"] == "chunked"


async def test_headers_of_one_hop_do_not_pass_up(settings: MakeSettings) -> None:
    """The same on the way up; whatever else the client sends is there, once, in its order."""
    hop = (
        "connection: keep-alive, X-Hop\r\nx-hop: 1\r\nkeep-alive: 5\r\nte: trailers\r\ntrailer: x-t\r\n"
        "proxy-authorization: Basic eA==\r\nproxy-connection: keep-alive\r\nupgrade: h2c\r\n"
    )
    passed = "accept: */*\r\nAccept-Encoding: br;q=0.5, gzip\r\nx-odd: a\tb  c\r\nuser-agent: me/1 (x; y)\r\n"
    async with upstream(ok()) as fake, running(settings(ROUTING.format(url=fake.url))) as gateway:
        wire = await Wire.to(gateway)
        await wire.send(call(extra=hop + passed))
        assert (await wire.reply())[0] == 200
        await wire.close()
    assert list(fake.received[0].headers.items()) == [
        ("host", fake.url.removeprefix("http://").removesuffix("/v1")),
        ("content-type", "application/json"),
        ("accept", "*/*"),
        ("accept-encoding", "br;q=0.5, gzip"),
        ("x-odd", "a\tb  c"),
        ("user-agent", "me/1 (x; y)"),
        ("content-length", str(len(BODY))),
    ]


async def test_trailers_of_a_client_are_no_headers(settings: MakeSettings) -> None:
    """What comes after the body can't name a workload, nor reach the upstream as a header."""
    request = (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: g\r\ntransfer-encoding: chunked\r\n\r\n"
        b"%x\r\n%b\r\n0\r\nx-workload-id: smuggled\r\nx-trailer: 1\r\n\r\n" % (len(BODY), BODY)
    )
    async with upstream(ok()) as fake, running(settings(ROUTING.format(url=fake.url))) as gateway:
        wire = await Wire.to(gateway)
        await wire.send(request, call())
        assert [(await wire.reply())[0] for _ in range(2)] == [200, 200]
        await wire.close()
        exchanges = await gateway.exchanges()
    assert {exchange.workload_id for exchange in exchanges} == {"default"}
    assert not {"x-trailer", "x-workload-id"} & {*fake.received[0].headers, *fake.received[1].headers}


@pytest.mark.parametrize(
    ("encoding", "packed", "read"),
    [
        ("gzip", gzip.compress(HELLO), True),
        ("deflate", zlib.compress(HELLO), True),
        ("br", brotli.compress(HELLO), True),
        ("zstd", zstandard.compress(HELLO), True),
        ("gzip, br", brotli.compress(gzip.compress(HELLO)), True),
        ("x-unheard-of", bytes(range(256)), False),
        ("gzip", b"no gzip at all", False),
    ],
)
async def test_compressed_bodies(settings: MakeSettings, encoding: str, packed: bytes, read: bool) -> None:
    """Byte for byte, with their encoding's name; the log has the JSON where it can be had."""
    async with upstream(plain(packed, extra=f"content-encoding: {encoding}\r\nvary: accept-encoding\r\n")) as fake:
        async with running(settings(ROUTING.format(url=fake.url))) as gateway:
            reply, body = await body_of(gateway)
            exchange = await gateway.exchange()
    assert (body, reply.headers["content-encoding"], reply.headers["vary"]) == (packed, encoding, "accept-encoding")
    assert reply.headers["content-length"] == str(len(packed))
    assert exchange.outcome is Outcome.OK
    if read:
        assert exchange.response is not None
        assert exchange.response["odd"] == 1.5


async def test_a_compressed_stream(settings: MakeSettings) -> None:
    """Flushed event by event, as some servers do; read for the log all the same."""
    packer = zlib.compressobj(wbits=31)
    events = [packer.compress(event) + packer.flush(zlib.Z_SYNC_FLUSH) for event in FRAMES["crlf"].splitlines(True)]
    events.append(packer.flush())

    async def script(_request: Received, writer: asyncio.StreamWriter) -> None:
        head = "content-type: text/event-stream\r\ncontent-encoding: gzip\r\ntransfer-encoding: chunked\r\n\r\n"
        writer.write(f"HTTP/1.1 200 OK\r\n{head}".encode())
        for event in events:
            writer.write(b"%x\r\n%b\r\n" % (len(event), event))
            await writer.drain()
        writer.write(b"0\r\n\r\n")

    async with upstream(script) as fake, running(settings(ROUTING.format(url=fake.url))) as gateway:
        reply, body = await body_of(gateway)
        exchange = await gateway.exchange()
    assert (body, reply.headers["content-encoding"]) == (b"".join(events), "gzip")
    assert exchange.response is not None
    assert exchange.response["choices"][0]["message"]["content"] == "hé"


@pytest.mark.parametrize("name", FRAMES)
async def test_odd_framing(settings: MakeSettings, name: str) -> None:
    """In one piece and cut at every byte: the client gets every byte, and the log the reply that they frame."""
    frames = FRAMES[name]
    async with upstream(sse(frames), split_everywhere(frames)) as fake:
        async with running(settings(ROUTING.format(url=fake.url))) as gateway:
            for _ in range(2):
                reply, body = await body_of(gateway)
                assert (reply.status_code, body) == (200, frames)
            exchanges = await gateway.exchanges()
    for exchange in exchanges:
        assert (exchange.outcome, exchange.stream) == (Outcome.OK, True)
        assert exchange.response is not None
        assert exchange.response["choices"][0]["message"]["content"] == "hé"
        assert exchange.response["odd"] == 1.5


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (
            "400 Bad Request",
            b'{"error":{"message":"no","type":"invalid_request_error","x":[1.50]}}',
            "application/json",
        ),
        ("401 Unauthorized", b'{"error" : null}', "application/json"),
        ("404 Not Found", b"<html>\r\n404 \xe9</html>", "text/html; charset=latin-1"),
        ("413 Payload Too Large", b"", "text/plain"),
        ("422 Unprocessable Entity", b'{"detail":[{"loc":["body"]}]}', "application/json"),
        ("429 Too Many Requests", b'{"error":{"code":"rate_limit_exceeded"}}', "application/json"),
        ("451 Unavailable For Legal Reasons", b"\x00\xff", "application/octet-stream"),
        ("500 Internal Server Error", b"Traceback (most recent call last)", "text/plain"),
        ("502 Bad Gateway", b"<html>nginx</html>", "text/html"),
        ("503 Service Unavailable", b'{"error":"loading"}', "application/json"),
        ("529 Overloaded", b"{}", "application/json"),
        ("307 Temporary Redirect", b"over there", "text/plain"),
    ],
)
async def test_errors_pass_with_status_and_body(settings: MakeSettings, status: str, body: bytes, kind: str) -> None:
    """Of a plain call and of one that asks for a stream; redirects are the client's to follow."""
    extra = "location: http://elsewhere.test/\r\nwww-authenticate: Bearer\r\n"
    async with upstream(plain(body, status=status, extra=extra, content_type=kind)) as fake:
        async with running(settings(ROUTING.format(url=fake.url))) as gateway:
            wire = await Wire.to(gateway)
            await wire.send(call(), call(b'{"model": "m", "messages": [], "stream": true}'))
            for _ in range(2):
                got, headers, told = await wire.reply()
                assert (got, told, headers["content-type"]) == (int(status[:3]), body, kind)
                assert headers["location"] == "http://elsewhere.test/"
                assert headers["www-authenticate"] == "Bearer"
            await wire.close()
            exchanges = await gateway.exchanges()
    outcome = Outcome.OK if status < "400" else Outcome.UPSTREAM_ERROR
    assert [(exchange.status, exchange.outcome) for exchange in exchanges] == [(int(status[:3]), outcome)] * 2
    assert len(fake.received) == 2


async def test_an_interim_reply_is_not_the_reply(settings: MakeSettings) -> None:
    """103 Early Hints, with headers of its own, and the real one behind it."""
    final = b"HTTP/1.1 200 OK\r\nx-final: 1\r\ncontent-length: %d\r\n\r\n%b" % (len(HELLO), HELLO)
    script = raw(b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n" + final, close=False)
    async with upstream(script) as fake, running(settings(ROUTING.format(url=fake.url))) as gateway:
        reply, body = await body_of(gateway)
    assert (reply.status_code, body, "link" in reply.headers, reply.headers["x-final"]) == (200, HELLO, False, "1")
