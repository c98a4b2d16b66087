"""The pass-through upstream: HTTP/1.1 on asyncio protocols, with a keep-alive pool of our own."""

import asyncio
import contextlib
import socket
from collections import deque
from collections.abc import Awaitable, Callable
from functools import lru_cache
from typing import Any, Final
from urllib.parse import urlsplit

import httptools

from gateway.errors import ConnectError, ConnectTimeout, UpstreamCut, UpstreamError, UpstreamTimeout
from gateway.outbox import Outbox
from gateway.upstream import UpstreamRequest
from gateway.upstream.tls import Contexts, refusal
from routing.proxies import port_of
from routing.targets import Model, Timeouts

__all__ = ["DirectUpstream", "Resolve"]

IDLE_SECONDS: Final = 4.0  # below the 5 s after which uvicorn, and so vLLM, closes an idle connection
HIGH_WATER: Final = 256 * 1024  # bytes read ahead of a slow client before the upstream is paused
MAX_IDLE: Final = 256  # connections kept for an origin
MAX_AGE: Final = 60.0  # seconds that a connection is used for: by then a name may stand for another address
SMALL: Final = 64 * 1024  # bytes of a request that are copied behind its head
MAX_BARE: Final = 256 * 1024  # bytes of a reply on end that are none of its body: head, interim answers, trailers

Origin = tuple[str, str, int, str]  # scheme, host, port, and the certificates that it is trusted by
Resolve = Callable[[str, int], Awaitable[list[str]]]
"""The addresses of a host, as text, in the order in which to try them. Raises OSError."""


async def by_system(host: str, port: int) -> list[str]:
    """The system's answer, asked anew for each connection."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


class DirectUpstream:
    """A pool of connections by origin. One event loop, no locks.

    A name is resolved for each connection, its addresses are tried in turn. A connection is kept for `idle` seconds
    after its last reply and for `age` seconds in all, so that a name whose address changes is followed. Requests leave
    by `outbox`, with all that this turn of the loop sends.
    """

    def __init__(
        self,
        outbox: Outbox | None = None,
        *,
        resolve: Resolve = by_system,
        idle: float = IDLE_SECONDS,
        age: float = MAX_AGE,
    ) -> None:
        self.outbox = outbox or Outbox()
        self.idle_seconds, self.age = idle, age
        self._resolve = resolve
        self._idle: dict[Origin, deque[_Connection]] = {}
        self._sweeping: asyncio.TimerHandle | None = None
        self._tls = Contexts()

    async def send(self, model: Model, request: UpstreamRequest) -> "DirectReply":
        """Send and wait for the reply's head.

        A kept connection that turns out to be closed before any byte of the reply is replaced once by a fresh one: the
        upstream has let go of it in the same moment. A request that must not be done twice is not sent again.
        """
        origin, prefix, host = _target(model.base_url, model.ca_file)
        data = _serialise(request, prefix, host)
        connection = self._take(origin)
        if connection is not None:
            try:
                return await connection.exchange(data, model.timeouts)
            except _Stale as stale:
                if stale.sent and not request.repeatable:
                    raise UpstreamCut(f"{model.name}: the upstream closed the connection without a reply") from stale
        connection = await self._connect(origin, model.timeouts.connect)
        try:
            return await connection.exchange(data, model.timeouts)
        except _Stale as error:
            raise UpstreamCut(f"{model.name}: the upstream closed the connection without a reply") from error

    async def close(self) -> None:
        """Drop the idle connections."""
        for connections in self._idle.values():
            for connection in connections:
                connection.drop()
        self._idle.clear()
        if self._sweeping is not None:
            self._sweeping.cancel()

    def keep(self, connection: "_Connection") -> None:
        """Take back a connection whose reply is complete."""
        idle = self._idle.setdefault(connection.origin, deque())
        if len(idle) >= MAX_IDLE:
            connection.drop()
            return
        connection.idle_since = connection.loop.time()
        idle.append(connection)
        if self._sweeping is None:
            self._sweeping = connection.loop.call_later(self.idle_seconds, self._sweep, connection.loop)

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        """Drop what was idle for too long, before its server does; the oldest stand first."""
        self._sweeping = None
        for connections in self._idle.values():
            while connections and not connections[0].usable():
                connections.popleft().drop()
        if any(self._idle.values()):
            self._sweeping = loop.call_later(self.idle_seconds / 2, self._sweep, loop)

    def _take(self, origin: Origin) -> "_Connection | None":
        idle = self._idle.get(origin)
        while idle:
            connection = idle.pop()
            if connection.usable():
                return connection
            connection.drop()
        return None

    async def _connect(self, origin: Origin, seconds: float) -> "_Connection":
        where = _named(origin)
        try:
            async with asyncio.timeout(seconds):
                addresses = await self._resolve(origin[1], origin[2])
                for address in addresses[:-1]:
                    with contextlib.suppress(OSError):  # TimeoutError is one too, and its cancellation comes again
                        return await self._connect_to(address, origin)
                return await self._connect_to(addresses[-1], origin)
        except TimeoutError as error:
            raise ConnectTimeout(f"{where}: no connection within {seconds:g} s") from error
        except OSError as error:
            raise ConnectError(f"{where}: {refusal(error)}") from error

    async def _connect_to(self, address: str, origin: Origin) -> "_Connection":
        scheme, host, port, ca_file = origin
        loop = asyncio.get_running_loop()
        secured = scheme == "https"
        made: Any = lambda: _Connection(self, loop, origin)  # noqa: E731  # a protocol by its methods, not by its base
        connection: _Connection
        _, connection = await loop.create_connection(
            made,
            address,
            port,
            ssl=self._tls.of(ca_file) if secured else None,
            server_hostname=host if secured else None,
        )
        return connection


class DirectReply:
    """The reply on one connection; see gateway.upstream.Reply."""

    __slots__ = ("_connection", "complete", "headers", "status")

    def __init__(self, connection: "_Connection", status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self._connection: _Connection | None = connection
        self.status = status
        self.headers = headers
        self.complete = False

    async def read(self, each: Callable[[bytes], bool] | None = None) -> bytes:
        """The next bytes of the body; b"" at the end, or where `each` wants no more."""
        if self._connection is None:
            return b""
        return await self._connection.read(each)

    def close(self) -> None:
        """Give the connection back, or drop it if the reply is not complete."""
        if self._connection is not None:
            connection, self._connection = self._connection, None
            connection.release()


class _Stale(UpstreamError):
    """The connection ended before the first byte of a reply; `sent`: the request may have reached the upstream."""

    def __init__(self, *, sent: bool) -> None:
        super().__init__("closed")
        self.sent = sent


class _Connection:
    """One connection, an asyncio protocol: parses replies with httptools and hands their bytes to whoever waits."""

    def __init__(self, pool: DirectUpstream, loop: asyncio.AbstractEventLoop, origin: Origin) -> None:
        self.pool = pool
        self.loop = loop
        self.origin = origin
        self.idle_since = 0.0
        self._end = loop.time() + pool.age
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._reply: DirectReply | None = None
        self._headers: list[tuple[bytes, bytes]] = []
        self._buffer = bytearray()
        self._waiter: asyncio.Future[None] | None = None
        self._error: Exception | None = None  # for who waits, or will
        self._each: Callable[[bytes], bool] | None = None  # takes bytes while somebody waits
        self._sated = False  # it wants no more for now
        self._timer: asyncio.TimerHandle | None = None  # one for the connection's life, set anew when it goes off
        self._deadline = 0.0  # of the exchange in work; 0 where there is none
        self._limit = ("", 0.0)  # which deadline that is, and how long
        self._timeouts = Timeouts()
        self._started = 0.0
        self._paused = False
        self._until_close = False
        self._bare = 0  # bytes of the reply since one of its body came
        self._body_begun = False
        self._reusable = True

    # -- called by the pool and the reply

    def usable(self) -> bool:
        transport = self._transport
        if transport is None or transport.is_closing() or not self._reusable:
            return False
        now = self.loop.time()
        return now < self._end and now - self.idle_since < self.pool.idle_seconds

    async def exchange(self, data: list[bytes], timeouts: Timeouts) -> DirectReply:
        """Write a request, wait for the head of its reply. Raises _Stale, UpstreamTimeout, UpstreamCut."""
        if self._transport is None or self._transport.is_closing():
            raise _Stale(sent=False)
        self._begin(timeouts)
        try:
            self._send(self._transport, data)
            while self._reply is None:
                if self._error is not None:
                    raise self._error
                await self._wait()
        except BaseException:
            self.drop()
            raise
        return self._reply

    async def read(self, each: Callable[[bytes], bool] | None) -> bytes:
        while not self._buffer:
            if self._reply is None or self._reply.complete:
                return b""
            if self._error is not None:
                raise self._error
            if self._sated:
                break
            self._each = each
            await self._wait()
        self._sated = False
        chunk = bytes(self._buffer)
        self._buffer.clear()
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()
        return chunk

    def release(self) -> None:
        self._deadline = 0.0
        reply, self._reply = self._reply, None
        complete = reply is not None and reply.complete and self._reusable and not self._paused
        if complete and self._transport is not None and not self._transport.get_write_buffer_size():
            self._buffer.clear()
            self.pool.keep(self)
        else:
            self.drop()

    def drop(self) -> None:
        self._forget_deadline()
        if self._transport is not None:
            self._transport.abort()

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    def eof_received(self) -> None:
        """The transport closes itself."""

    def pause_writing(self) -> None:
        """Nothing to do: a request is written at once."""

    def resume_writing(self) -> None:
        """Nothing to do."""

    def data_received(self, data: bytes) -> None:
        if (self._reply is None and not self._deadline) or (self._reply is not None and self._reply.complete):
            self._reusable = False  # bytes that no request asked for: nothing on this connection can be trusted
            self.drop()
            return
        held = len(self._buffer)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._reusable = False
            self._broken(f"not HTTP/1.1: {error}")
        self._bare = self._bare + len(data) if len(self._buffer) == held else 0
        if self._bare > MAX_BARE:
            self._reusable = False
            self._broken(f"more than {MAX_BARE} bytes of headers")
        if self._each is not None and self._hands_on(self._each):
            return
        if len(self._buffer) > HIGH_WATER and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self._reusable = False
        if self._reply is not None and not self._reply.complete:
            if self._until_close and exc is None and self._error is None:
                self._reply.complete = True
            else:
                self._broken("the connection ended inside the reply")
        elif self._reply is None and self._bare:
            self._broken("the connection ended inside the reply's head")
        elif self._reply is None and self._error is None:
            self._error = _Stale(sent=True)
        self._forget_deadline()
        self._wake()

    # -- httptools callbacks

    def on_message_begin(self) -> None:
        if self._reply is not None:  # one request, one reply
            raise self._broken("bytes behind the reply")

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:
            if status < 100 or status == 101:
                raise self._broken(f"status {status} without being asked")
            return
        headers, self._headers = self._headers, []  # trailers go nowhere
        framed = False
        for name, value in headers:
            if name == b"content-length":
                framed = True
            elif name == b"transfer-encoding":
                framed = True
                if value.lower() != b"chunked":
                    raise self._broken(f"transfer coding {value.decode('latin-1')}")
        self._until_close = not framed and status not in (204, 304)
        self._reply = DirectReply(self, status, headers)

    def on_body(self, body: bytes) -> None:
        if not self._body_begun:
            self._body_begun = True
            self._set_deadline("total", self._timeouts.total)
        self._buffer += body

    def on_message_complete(self) -> None:
        if self._reply is None:  # an interim 1xx answer: the real one follows on the same parser
            self._headers = []
            return
        self._reply.complete = True
        self._reusable = self._reusable and self._parser.should_keep_alive() and not self._until_close
        self._deadline = 0.0

    # -- inside

    def _send(self, transport: asyncio.Transport, data: list[bytes]) -> None:
        if len(data[1]) <= SMALL:
            self.pool.outbox.put(transport, b"".join(data))
        else:
            transport.writelines(data)

    def _begin(self, timeouts: Timeouts) -> None:
        self._reply, self._error, self._headers, self._body_begun, self._bare = None, None, [], False, 0
        self._sated = False
        self._timeouts, self._started = timeouts, self.loop.time()
        self._set_deadline("first token", timeouts.first_token)

    @property
    def _name(self) -> str:
        return _named(self.origin)

    async def _wait(self) -> None:
        self._waiter = self.loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = self._each = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
            self.pool.outbox.expect()

    def _hands_on(self, each: Callable[[bytes], bool]) -> bool:
        """Hand what has come to who waits, without waking him; False where there is something else to tell him."""
        if self._reply is None or self._reply.complete or self._error is not None:
            return False
        if not self._buffer:
            return True
        chunk = bytes(self._buffer)
        self._buffer.clear()
        try:
            self._sated = not each(chunk)
        except Exception as error:  # noqa: BLE001 -- it is raised to who waits
            self._error, self._reusable = error, False
            self.drop()  # what still came would have a hole before it
        return not self._sated and self._error is None

    def _fail(self, error: UpstreamError) -> None:
        if self._error is None:
            self._error = error
        self._wake()

    def _broken(self, what: str) -> UpstreamCut:
        error = UpstreamCut(f"{self._name}: {what}")
        self._fail(error)
        return error

    def _set_deadline(self, what: str, seconds: float) -> None:
        """The exchange is to end `seconds` after its start. A timer that goes off earlier looks again then."""
        self._limit = (what, seconds)
        self._deadline = self._started + seconds
        if self._timer is None or self._timer.when() > self._deadline:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self.loop.call_at(self._deadline, self._look_at_the_clock)

    def _forget_deadline(self) -> None:
        self._deadline = 0.0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look_at_the_clock(self) -> None:
        self._timer = None
        if not self._deadline:
            return
        if self.loop.time() < self._deadline:
            self._timer = self.loop.call_at(self._deadline, self._look_at_the_clock)
            return
        self._deadline = 0.0
        self._reusable = False
        what, seconds = self._limit
        self._fail(UpstreamTimeout(f"{self._name}: {what} deadline of {seconds:g} s passed"))


def _named(origin: Origin) -> str:
    scheme, host, port, _ = origin
    return f"{scheme}://{host}:{port}"


@lru_cache(maxsize=1024)
def _target(base_url: str, ca_file: str) -> tuple[Origin, str, str]:
    """(origin, path prefix, Host header) of a base URL."""
    parts = urlsplit(base_url)
    host = parts.hostname or ""
    return (parts.scheme, host, port_of(parts), ca_file), parts.path.rstrip("/"), parts.netloc.rpartition("@")[2]


def _serialise(request: UpstreamRequest, prefix: str, host: str) -> list[bytes]:
    head = [f"{request.method} {prefix}{request.path} HTTP/1.1\r\nhost: {host}\r\n".encode("latin-1")]
    for name, value in request.headers:
        head += (name, b": ", value, b"\r\n")
    head.append(b"content-length: %d\r\n\r\n" % len(request.body))
    return [b"".join(head), request.body]
