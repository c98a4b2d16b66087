"""Whatever bytes a client sends: an upstream sees no request that a strict server would not have read from them."""

import asyncio
import contextlib
from collections.abc import Callable, Sequence

import uvloop
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st

from gateway.config import Settings
from gateway.paths import RELAYED, passed_on
from tests.gateway.conftest import Running, running
from tests.gateway.strict import Request, requests_in, strict_upstream

MakeSettings = Callable[..., Settings]
ROUTING = """
version: 1
models: {{m: {{upstream: nim, base_url: "{url}", model: m}}}}
default: {{serve: m}}
"""
SMUGGLED = b"GET /v1/files/smuggled HTTP/1.1\r\nhost: g\r\n\r\n"
LAST = b"GET /healthz HTTP/1.1\r\nhost: g\r\nconnection: close\r\n\r\n"
TARGETS = [b"/v1/chat/completions", b"/v1/completions?a=b", b"/v1/files", b"/v1/files/../batches", b"/v1/nothing"]
ENDS = [b"\r\n", b"\n", b"\r", b"\r\r\n", b"\r\n ", b"\r\n\t", b"\x00\r\n", b""]
HEADERS = [
    *(b"Content-Length: 0", b"Content-Length: 5", b"Content-Length: 60", b"content-length: +5", b"Content-Length : 9"),
    *(b"Content-Length: 0x10", b"Content-Length: 5, 5", b"Content-Length: 5 ", b"Content_Length: 5"),
    *(b"Transfer-Encoding: chunked", b"transfer-encoding: xchunked", b"Transfer-Encoding: gzip, chunked"),
    *(b"Transfer-Encoding:\x0bchunked", b"Transfer-Encoding : chunked", b"Transfer-Encoding: chunked, identity"),
    *(b"Transfer-Encoding: identity", b"Transfer-Encoding: \tCHUNKED", b'Transfer-Encoding: "chunked"', b" chunked"),
    *(b"Connection: close", b"Connection: upgrade", b"Upgrade: h2c", b"Connection: content-length, x"),
    *(b"X: a\r\n b", b"X: a\rContent-Length: 5", b"X: a\nContent-Length: 5", b"X: \x00", b"X\xff: y", b": y", b"x"),
    *(b"x y: z", b"Expect: 100-continue"),
]  # fmt: skip
BYTES = [
    b"\r\n",
    b"\n",
    b"\r",
    b"\x00",
    b":",
    b"0",
    b"1",
    b"f",
    b";",
    b"0\r\n\r\n",
    SMUGGLED,
    b"\r\n" + SMUGGLED,
    b"HTTP/1.1",
]


@st.composite
def messages(draw: st.DrawFn) -> bytes:
    """One request, right or with its framing in doubt; its body looks like another one."""
    text = draw(
        st.sampled_from([b'{"model":"m"}', b'{"model":"m","x":1}' + SMUGGLED, SMUGGLED, b"0\r\n\r\n" + SMUGGLED])
    )
    chunked = draw(st.booleans())
    body = text
    if chunked:
        body, at = b"", 0
        while at < len(text):
            size = draw(st.integers(1, len(text) - at))
            body += b"%x\r\n%b\r\n" % (size, text[at : at + size])
            at += size
        body += b"0\r\n" + draw(st.sampled_from([b"", b"X-Late: 1\r\n", b"Content-Length: 5\r\n"])) + b"\r\n"
    framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % len(text)
    lines = [framing, *draw(st.lists(st.sampled_from(HEADERS), max_size=2))]
    draw(st.randoms(use_true_random=False)).shuffle(lines)
    ends = [draw(st.sampled_from(ENDS)) if draw(st.integers(0, 7)) == 0 else b"\r\n" for _ in lines]
    if draw(st.integers(0, 3)) == 0 and body:
        at = draw(st.integers(0, len(body)))
        body = body[:at] + draw(st.sampled_from(BYTES)) + body[at + draw(st.sampled_from([0, 0, 1, 4])) :]
    method, target = draw(st.sampled_from([b"POST", b"POST", b"GET", b"DELETE"])), draw(st.sampled_from(TARGETS))
    version = draw(st.sampled_from([b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0"]))
    head = b"%b %b %b\r\nHost: g\r\n" % (method, target, version)
    return head + b"".join(line + end for line, end in zip(lines, ends, strict=True)) + b"\r\n" + body


def goes_up_as(request: Request) -> Request | None:
    """What the upstream may see of a request; None: it is not the upstream's business."""
    path, question, query = request.target.partition("?")
    relayed = (
        path if request.method == "POST" and path in RELAYED else passed_on(request.method.encode(), path.encode())
    )
    return Request(request.method, f"{relayed}{question}{query}", request.body) if relayed else None


async def send(gateway: Running, data: bytes, cuts: Sequence[int]) -> None:
    """Send, cut anywhere, and read until the gateway closes: the last request asks for it, or its patience ends."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(gateway.url.rpartition(":")[2]))
    at = sorted(cut % (len(data) + 1) for cut in cuts)
    for start, end in zip([0, *at], [*at, len(data)], strict=True):
        if not writer.is_closing():
            writer.write(data[start:end])
            await asyncio.sleep(0)
    with contextlib.suppress(ConnectionError):
        while await asyncio.wait_for(reader.read(65_536), 20):
            pass
    writer.transport.abort()


def test_an_upstream_sees_what_a_strict_server_would_have(settings: MakeSettings) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        stack = contextlib.AsyncExitStack()
        fake = runner.run(stack.enter_async_context(strict_upstream()))
        edge = {"head_timeout": 0.1, "stall_timeout": 0.1}
        gateway = runner.run(stack.enter_async_context(running(settings(ROUTING.format(url=fake.url), edge=edge))))

        @effort(max_examples=250, deadline=None)
        @given(st.lists(messages(), min_size=1, max_size=3), st.lists(st.integers(0, 10_000), max_size=3))
        def check(sent: list[bytes], cuts: list[int]) -> None:
            fake.requests.clear()
            data = b"".join([*sent, LAST])
            runner.run(send(gateway, data, cuts))
            allowed = iter([goes_up_as(request) for request in requests_in(data)])
            assert fake.errors == []
            assert all(any(seen == each for each in allowed) for seen in fake.requests), fake.requests

        try:
            check()
        finally:
            runner.run(stack.aclose())
