"""The upstream's client against servers that break rules, and against h11 as an oracle: the same reply, or none."""

import asyncio
import re
from collections.abc import Sequence

import h11
import pytest
import uvloop
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st

from gateway.errors import UpstreamCut, UpstreamTimeout
from gateway.upstream import UpstreamRequest
from gateway.upstream.direct import HIGH_WATER, MAX_BARE, MAX_IDLE, DirectUpstream
from routing.targets import Model, Timeouts
from tests.gateway.fakes import FakeUpstream, Received, Script, plain, raw, upstream

REQUEST = UpstreamRequest(path="/chat/completions", headers=[(b"x", b"y")], body=b"{}")
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"
HEAD = b"HTTP/1.1 200 OK\r\n"
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"

Got = tuple[int | None, list[tuple[bytes, bytes]], bytes, bool]  # status, headers, body, whether it came whole


def model(fake: FakeUpstream, **timeouts: float) -> Model:
    return Model(
        name="m", upstream="nim", base_url=fake.url, model="m", timeouts=Timeouts(**{"first_token": 5} | timeouts)
    )


async def ask(client: DirectUpstream, to: Model, request: UpstreamRequest = REQUEST) -> Got:
    """The reply to the one request, as far as it came."""
    status, headers, body = None, [], b""
    try:
        reply = await client.send(to, request)
        status, headers = reply.status, reply.headers
        try:
            while chunk := await reply.read():
                body += chunk
            return status, headers, body, reply.complete
        finally:
            reply.close()
    except UpstreamCut:
        return status, headers, body, False


def keep(data: bytes) -> Script:
    return raw(data, close=False)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"HTTP/1.1 100 Continue\r\n\r\n" + OK, id="100"),
        pytest.param(b"HTTP/1.1 103 Early Hints\r\nlink: a\r\n\r\nHTTP/1.1 102 P\r\n\r\n" + OK, id="103 and 102"),
        pytest.param(CHUNKED + b"1\r\n{\r\n1;a=b\r\n}\r\n0\r\n\r\n", id="chunks"),
        pytest.param(CHUNKED + b"2\r\n{}\r\n0\r\nx: y\r\n\r\n", id="trailers"),
        pytest.param(HEAD + b"\r\n{}", id="until the end of the connection"),
        pytest.param(b"HTTP/1.0 200 OK\r\n\r\n{}", id="HTTP/1.0"),
        pytest.param(OK + b"HTTP/1.1 500 Other\r\ncontent-length: 1\r\n\r\n!", id="another reply behind it"),
        pytest.param(OK + b"garbage", id="garbage behind it"),
    ],
)
async def test_replies_in_every_form(data: bytes) -> None:
    """Interim answers and trailers are left out; what nobody asked for is not the next call's reply."""
    async with upstream(raw(data), raw(OK)) as fake:
        client = DirectUpstream()
        for _ in range(2):
            status, headers, body, complete = await ask(client, model(fake))
            assert (status, body, complete) == (200, b"{}", True)
            assert {name for name, _ in headers} <= {b"content-length", b"transfer-encoding"}
        assert fake.connections == 2
        await client.close()


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"garbage\r\n\r\n", id="garbage"),
        pytest.param(b"\x16\x03\x01\x02\x00", id="TLS"),
        pytest.param(HEAD, id="half a head"),
        pytest.param(b"HTTP/1.1 101 Switching\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n" + OK, id="101"),
        pytest.param(b"HTTP/1.1 101 Switching\r\n\r\n" + OK, id="101 to nothing"),
        pytest.param(b"HTTP/1.1 099 Odd\r\n\r\n" + OK, id="status 99"),
        pytest.param(
            HEAD + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", id="length and chunks"
        ),
        pytest.param(HEAD + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}", id="two lengths"),
        pytest.param(HEAD + b"transfer-encoding: gzip, chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", id="gzip, chunked"),
        pytest.param(HEAD + b"transfer-encoding: gzip\r\n\r\n{}", id="gzip to the end"),
        pytest.param(HEAD + b"x: y\r\n z\r\ncontent-length: 2\r\n\r\n{}", id="a folded line"),
        pytest.param(HEAD + b"x: y\r\n" * 60_000 + b"\r\n", id="headers without end"),
        pytest.param(b"HTTP/1.1 100 Continue\r\n\r\n" * 30_000, id="interim answers without end"),
        pytest.param(CHUNKED + b"1\r\n{\r\nzz\r\n", id="a chunk that is none"),
        pytest.param(CHUNKED + b"1\r\n{\r\n1;" + b"e" * 2 * MAX_BARE, id="an extension without end"),
        pytest.param(CHUNKED + b"1\r\n{\r\n0\r\nt: " + b"t" * 2 * MAX_BARE, id="a trailer without end"),
        pytest.param(CHUNKED + b"1\r\n{\r\n0\r\ncontent-length: 9\r\n\r\n", id="a length behind the body"),
        pytest.param(CHUNKED + b"1\r\n{\r\n", id="cut between chunks"),
        pytest.param(HEAD + b"content-length: 3\r\n\r\n{}", id="cut within its length"),
    ],
)
async def test_what_is_no_whole_reply_is_cut(data: bytes) -> None:
    """And asked for once: a connection that has brought a byte is not replaced."""
    async with upstream(plain(b"{}"), raw(data)) as fake:
        client = DirectUpstream()
        assert (await ask(client, model(fake)))[2:] == (b"{}", True)
        status, _, body, complete = await ask(client, model(fake))
        assert (status, body, complete) in (
            (None, b"", False),
            (200, b"", False),
            (200, b"{", False),
            (200, b"{}", False),
        )
        assert len(fake.received) == (3 if data == b"" else 2)
        await client.close()


async def test_an_upstream_that_answers_early() -> None:
    """It says no before it has the body: its reply counts, and its connection is not used again."""

    async def early(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        connections.append(writer)
        writer.write(b"HTTP/1.1 413 No\r\ncontent-length: 2\r\n\r\nno")

    connections: list[asyncio.StreamWriter] = []
    server = await asyncio.start_server(early, "127.0.0.1", 0, limit=1024)
    fake = FakeUpstream(scripts=[], url=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1")
    client = DirectUpstream()
    large = UpstreamRequest(path="/chat/completions", headers=[], body=b"x" * 30_000_000)
    for number in (1, 2):
        status, _, body, complete = await ask(client, model(fake), large)
        assert (status, body, complete, len(connections)) == (413, b"no", True, number)
    server.close()
    for writer in connections:
        writer.transport.abort()
    await client.close()


@pytest.mark.parametrize(("repeatable", "times"), [(True, 3), (False, 2)])
async def test_a_kept_connection_that_ends_without_a_byte(*, repeatable: bool, times: int) -> None:
    """Nobody knows whether the request was taken: only one that may be done twice is sent again."""
    request = UpstreamRequest(path="/batches", headers=[], body=b"{}", repeatable=repeatable)
    async with upstream(plain(b"{}"), raw(b""), plain(b"[]")) as fake:
        client = DirectUpstream()
        await ask(client, model(fake))
        got = await ask(client, model(fake), request)
        assert (got[2:], len(fake.received)) == ((b"[]", True) if repeatable else (b"", False), times)
        await client.close()


async def test_a_fresh_connection_that_ends_without_a_byte_is_not_replaced() -> None:
    async with upstream(raw(b"")) as fake:
        client = DirectUpstream()
        assert not (await ask(client, model(fake)))[3]
        assert len(fake.received) == 1
        await client.close()


async def test_an_idle_connection_is_used_for_a_while_only() -> None:
    """And not after the upstream closed it, or has sent what nobody asked for."""
    async with upstream(plain(b"{}")) as fake:
        patient, hasty = DirectUpstream(idle=60), DirectUpstream(idle=0)
        for client, connections in ((patient, 1), (hasty, 4)):
            for _ in range(3):
                assert (await ask(client, model(fake)))[3]
            assert fake.connections == connections
            await client.close()
    async with upstream(keep(OK), keep(OK + b"HTTP/1.1 200 OK\r\n"), keep(OK)) as fake:
        client = DirectUpstream(idle=60)
        for _ in range(4):
            assert (await ask(client, model(fake)))[3]
        assert fake.connections == 2
        await client.close()


async def test_only_so_many_idle_connections_are_kept() -> None:
    many = MAX_IDLE + 20
    at_once = asyncio.Barrier(many)

    async def script(_request: Received, writer: asyncio.StreamWriter) -> None:
        await at_once.wait()
        writer.write(OK)

    async with upstream(script) as fake:
        client = DirectUpstream(idle=60)
        for connections in (many, many + 20):
            got = await asyncio.gather(*(ask(client, model(fake)) for _ in range(many)))
            assert all(complete for *_, complete in got)
            assert fake.connections == connections
        await client.close()


async def test_what_nobody_reads_stays_with_the_upstream() -> None:
    """No more than a bounded part of a reply is read ahead of whoever takes it."""
    sent = 0

    async def script(_request: Received, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(HEAD + b"\r\n")
        while sent < 100_000_000:
            writer.write(b"x" * 65_536)
            await writer.drain()
            sent += 65_536
        writer.close()

    async with upstream(script) as fake:
        client = DirectUpstream()
        reply = await client.send(model(fake), REQUEST)
        before = -1
        while sent != before:
            before = sent
            await asyncio.sleep(0.2)
        assert sent < 30_000_000  # the kernel's buffers hold most of it
        chunk = await reply.read()
        assert len(chunk) <= HIGH_WATER + 256 * 1024
        got = len(chunk)
        while chunk := await reply.read():
            got += len(chunk)
        assert (got, reply.complete) == (sent, True)
        reply.close()
        await client.close()


async def test_deadlines_hold_for_an_upstream_that_only_talks() -> None:
    """Interim answers are no first token; bytes without an end are no whole reply."""

    def again(start: bytes, more: bytes) -> Script:
        async def script(_request: Received, writer: asyncio.StreamWriter) -> None:
            writer.write(start)
            while not writer.is_closing():
                writer.write(more)
                await asyncio.sleep(0.05)

        return script

    interim, endless = again(b"", b"HTTP/1.1 102 Processing\r\n\r\n"), again(CHUNKED, b"1\r\nx\r\n")
    for script, words in ((interim, "first token deadline"), (endless, "total deadline")):
        async with upstream(script) as fake:
            client = DirectUpstream()
            with pytest.raises(UpstreamTimeout, match=words):
                await ask(client, model(fake, first_token=0.4, total=0.4))
            await client.close()


# -- h11 says what a reply is


STATUS_LINE = re.compile(rb"[\r\n]*(HTTP/1\.1 (\d)\d\d)(?: [^\r\n]*)?(?=\r\n)")


def strictly(data: bytes) -> bytes:
    """Without what our client overlooks: empty lines before a reply, and what a reason phrase is made of."""
    out = b""
    while found := STATUS_LINE.match(data):
        end = data.find(b"\r\n\r\n", found.end()) + 4
        if found[2] != b"1" or end < 4:
            return out + found[1] + b" Reason" + data[found.end() :]
        out, data = out + found[1] + b" Reason" + data[found.end() : end], data[end:]
    return out + data


def by_h11(data: bytes) -> Got:
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=1 << 20)
    connection.send(h11.Request(method="POST", target="/", headers=[("host", "g")]))
    connection.send(h11.EndOfMessage())
    connection.receive_data(strictly(data))
    connection.receive_data(b"")
    status, headers, body = None, [], b""
    try:
        while True:
            event = connection.next_event()
            if isinstance(event, h11.Response):
                status, headers = event.status_code, list(event.headers)
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                return status, headers, body, True
            elif isinstance(event, h11.ConnectionClosed) or event in (h11.NEED_DATA, h11.PAUSED):
                return status, headers, body, False
    except h11.RemoteProtocolError:
        return status, headers, body, False


@st.composite
def replies(draw: st.DrawFn) -> bytes:
    """A right reply."""
    interim = draw(st.lists(st.sampled_from([b"100 Continue\r\n", b"103 Hints\r\nlink: </a>\r\n"]), max_size=2))
    status = draw(
        st.sampled_from([b"200 OK", b"201 Created", b"204 No", b"304 Not", b"400 Bad", b"429 Many", b"503 Un"])
    )
    values = draw(st.lists(st.text("abc :;,\t", max_size=6), max_size=3))
    headers = [b"x-%d: %b" % (number, value.encode()) for number, value in enumerate(values)]
    if draw(st.booleans()):
        headers.append(
            draw(st.sampled_from([b"Connection: close", b"Connection: keep-alive", b"Keep-Alive: timeout=5"]))
        )
    body = b"" if status[:3] in (b"204", b"304") else draw(st.binary(max_size=40))
    framing = draw(st.sampled_from(["length", "chunks", "end"])) if body else "length"
    if framing == "length" and status[:3] not in (b"204", b"304"):
        headers.append(b"Content-Length: %d" % len(body))
    elif framing == "chunks":
        headers.append(b"Transfer-Encoding: chunked")
        body = chunks(draw, body)
    draw(st.randoms(use_true_random=False)).shuffle(headers)
    lines = [b"HTTP/1.1 " + status, *headers]
    return b"".join(b"HTTP/1.1 %b\r\n" % one for one in interim) + b"\r\n".join(lines) + b"\r\n\r\n" + body


def chunks(draw: st.DrawFn, body: bytes) -> bytes:
    out, at = b"", 0
    while at < len(body):
        size = draw(st.integers(1, len(body) - at))
        out += b"%x%b\r\n%b\r\n" % (size, draw(st.sampled_from([b"", b";a=b"])), body[at : at + size])
        at += size
    return out + b"0\r\n" + draw(st.sampled_from([b"", b"x-late: 1\r\n"])) + b"\r\n"


HOSTILE = [
    *(b"\r\n", b"\n", b"\r", b"\x00", b" ", b":", b"0", b"5", b"ff", b"\xff", b"\t", b"chunked", b"-1", b"0\r\n\r\n"),
    *(
        b"Content-Length: 3\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Connection: close\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
    ),
]


@st.composite
def spoilt(draw: st.DrawFn) -> bytes:
    """A reply with bytes put in, left out, or the end cut off."""
    data = draw(replies())
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        size = draw(st.sampled_from([0, 0, 1, 2, 8]))
        data = data[:at] + draw(st.sampled_from([*HOSTILE, b""])) + data[at + size :]
    return data[: draw(st.integers(0, len(data)))] if draw(st.integers(0, 3)) == 0 else data


def ours(data: bytes, cuts: Sequence[int]) -> Got:
    """What the client makes of a server that sends these bytes, cut anywhere, and closes."""

    async def script(_request: Received, writer: asyncio.StreamWriter) -> None:
        at = sorted(cut % (len(data) + 1) for cut in cuts)
        for start, end in zip([0, *at], [*at, len(data)], strict=True):
            writer.write(data[start:end])
            await writer.drain()
            await asyncio.sleep(0)
        writer.close()

    async def main() -> Got:
        async with upstream(script) as fake:
            client = DirectUpstream()
            try:
                return await ask(client, model(fake))
            finally:
                await client.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main())


def plain_headers(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    return [(name, value.strip()) for name, value in headers]


CUTS = st.lists(st.integers(0, 10_000), max_size=4)


@effort(max_examples=100, deadline=None)
@given(replies(), CUTS)
def test_a_right_reply_is_what_h11_reads(data: bytes, cuts: list[int]) -> None:
    status, headers, body, complete = ours(data, cuts)
    assert (status, plain_headers(headers), body, complete) == by_h11(data)
    assert complete


@effort(max_examples=400, deadline=None)
@given(spoilt(), CUTS)
def test_a_spoilt_reply_is_what_h11_reads_or_cut(data: bytes, cuts: list[int]) -> None:
    """Never another status, header or body than a strict reader's, and never whole where that says it is not."""
    status, headers, body, complete = ours(data, cuts)
    theirs = by_h11(data)
    if complete:
        assert (status, plain_headers(headers), body, True) == theirs
    elif status is not None and theirs[0] is not None:
        assert (status, plain_headers(headers)) == theirs[:2]
        assert theirs[2].startswith(body) or body.startswith(theirs[2])
