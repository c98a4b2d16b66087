"""A client's connection: uvicorn's HTTP protocol, with a short way for the calls that are relayed.

Such a call costs one task and no ASGI messages; every other call goes the ASGI way, as under plain uvicorn.
"""

import asyncio
from collections.abc import Sequence
from typing import Any, Final, cast

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from gateway.endpoints import Endpoints
from gateway.errors import RequestRefused
from gateway.paths import RELAYED, passed_on
from gateway.spool import PIECE
from gateway.tee import Inbound

__all__ = ["server_config"]

_PATHS: Final = {path.encode(): path for path in RELAYED}
_NO_BODY: Final = frozenset((204, 304))


def server_config(endpoints: Endpoints, *, drain: float) -> uvicorn.Config:
    """How uvicorn serves a worker's application; `drain` is how many seconds calls in flight have at the end."""
    return uvicorn.Config(
        endpoints,
        http=type("BoundConnection", (Connection,), {"endpoints": endpoints}),
        proxy_headers=False,
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        timeout_graceful_shutdown=int(drain),
    )


class Connection(HttpToolsProtocol):
    """One client. `cycle` is the request that came last, be it relayed or uvicorn's; `_serving` the one in work."""

    endpoints: Endpoints
    _serving: "Relayed | None" = None
    _idle_since = 0.0  # of the loop's clock; 0 while a request is on its way
    _offered = False  # the request in the parser offers to go on in another protocol

    def data_received(self, data: bytes) -> None:
        """As uvicorn's, but an offer to go on in another protocol (`Upgrade: h2c`) is passed over, and the call served.

        The parser stops at such a head and takes no body: a new one gets the head again, without the offer.
        """
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            again = self._head_without_offer() + data[offer.args[0] :]
            self._offered, self.parser = False, httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
            self.data_received(again)
        except httptools.HttpParserError:
            self.logger.warning("Invalid HTTP request received.")
            self.send_400_response("Invalid HTTP request received.")

    def _head_without_offer(self) -> bytes:
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        kept = [b"%b: %b\r\n" % header for header in self.headers if header[0] != b"upgrade"]
        return b"".join((b"%b %b HTTP/%b\r\n" % (method, self.url, version), *kept, b"\r\n"))

    def on_message_begin(self) -> None:
        self.url = b""
        self.headers = []
        self.expect_100_continue = False

    def on_headers_complete(self) -> None:
        path, _, query = self.url.partition(b"?")
        method = self.parser.get_method()
        if self.parser.should_upgrade() and method != b"CONNECT":
            self._offered = True
            return
        relayed = _PATHS.get(path) if method == b"POST" else None
        if relayed is None and (relayed := passed_on(method, path)) is None:
            self._to_asgi()
            return
        keep_alive = self.parser.get_http_version() != "1.0" and self.parser.should_keep_alive()
        call = self.endpoints.inbound(method.decode(), relayed, query.decode("latin-1"), self.headers)
        self.headers = []  # of what may come after the body: those are no headers of the call
        before, relay = self.cycle, Relayed(self, call, keep_alive=keep_alive, wants_100=self.expect_100_continue)
        self.cycle = cast(Any, relay)
        if before is None or before.response_complete:
            self._start(relay)
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((self.cycle, self.app))

    def on_body(self, body: bytes) -> None:
        relay: Any = self.cycle
        if isinstance(relay, Relayed):
            relay.take(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self._offered:
            return
        relay: Any = self.cycle
        if isinstance(relay, Relayed):
            relay.whole = True
            if relay is self._serving:
                relay.serve()
        else:
            super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        left: list[Any] = [self._serving, *(cycle for cycle, _ in self.pipeline)]
        self._serving = None
        self.pipeline.clear()
        if isinstance(cast(Any, self.cycle), Relayed):
            self.cycle = cast(Any, None)
        super().connection_lost(exc)
        for relay in left:
            if isinstance(relay, Relayed):
                relay.left()

    def on_response_complete(self) -> None:
        if self.pipeline:
            super().on_response_complete()
            return
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        self._idle_since = self.loop.time()
        if self.timeout_keep_alive_task is None:
            self._wake_at(self._idle_since + self.timeout_keep_alive)

    def timeout_keep_alive_handler(self) -> None:
        """One timer a connection instead of one a request: it looks when the connection was last in use."""
        self.timeout_keep_alive_task = None
        if not self._idle_since or self.transport.is_closing():
            return
        end = self._idle_since + self.timeout_keep_alive
        if self.loop.time() < end:
            self._wake_at(end)
        else:
            self.transport.close()

    def _unset_keepalive_if_required(self) -> None:
        self._idle_since = 0.0
        if self.transport.is_closing():
            super()._unset_keepalive_if_required()

    def _wake_at(self, when: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_at(when, self.timeout_keep_alive_handler)

    def _start(self, relay: "Relayed") -> None:
        self._serving = relay
        relay.admit()
        if relay.whole and not relay.response_complete:
            relay.serve()

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        if isinstance(cycle, Relayed):
            self._start(cycle)
        else:
            super()._start_asgi_task(cycle, app)

    def _to_asgi(self) -> None:
        """Do what uvicorn does at a message's begin, and then what it does at the end of the headers."""
        url, headers, expected = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expected
        self.headers.extend(headers)
        super().on_headers_complete()


class Relayed:
    """One relayed call: takes its body in, and writes its reply. See `gateway.tee.Downstream`.

    `response_complete`, `keep_alive` and `message_event` are what uvicorn's protocol reads of a request.
    """

    __slots__ = (
        "_call",
        "_chunked",
        "_connection",
        "_fresh",
        "_head",
        "_parts",
        "_size",
        "_task",
        "_wants_100",
        "keep_alive",
        "response_complete",
        "started",
        "whole",
    )

    def __init__(self, connection: Connection, call: Inbound, *, keep_alive: bool, wants_100: bool) -> None:
        self._connection = connection
        self._call = call
        self._wants_100 = wants_100
        self._parts: list[bytes] = []
        self._fresh = 0  # parts that are not in the spool yet, counted from the last
        self._size = 0
        self._head: list[bytes] = []
        self._chunked = False
        self._task: asyncio.Task[None] | None = None
        self.keep_alive = keep_alive
        self.response_complete = False
        self.started = False  # the reply's head is on its way
        self.whole = False  # all of the request is here

    # -- the request

    def admit(self) -> None:
        """It is this call's turn: say early what speaks against it, or ask for the body."""
        endpoints = self._connection.endpoints
        try:
            endpoints.admit(self._call)
        except RequestRefused as error:
            endpoints.refuse(self._call, error, self)
            return
        if self._wants_100 and not self.whole:
            self._connection.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def take(self, body: bytes) -> None:
        """More of the request's body; a large one goes to the spool as it comes."""
        if self.response_complete:
            return
        self._parts.append(body)
        self._fresh += 1
        self._size += len(body)
        endpoints = self._connection.endpoints
        if self._size > endpoints.max_body:
            endpoints.refuse(self._call, endpoints.too_large(), self)
        elif self._size - self._call.spooled >= PIECE:
            endpoints.spool_part(self._call, b"".join(self._parts[-self._fresh :]))
            self._fresh = 0

    def serve(self) -> None:
        """All of the request is here."""
        if self.response_complete:
            return
        self._call.body = b"".join(self._parts)
        connection = self._connection
        self._task = connection.loop.create_task(self._served())
        connection.tasks.add(self._task)

    def left(self) -> None:
        """The client has gone: what is read from the upstream now is wasted money."""
        call = self._call
        if self._task is None:
            if not self.response_complete:
                call.body = b"".join(self._parts)
                self._connection.endpoints.gone(call)
        elif not call.finished:
            call.gone = True
            self._task.cancel()

    async def _served(self) -> None:
        connection = self._connection
        try:
            await connection.endpoints.serve(self._call, self)
        finally:
            connection.tasks.discard(cast(Any, self._task))
            if not self.response_complete:
                connection.transport.close()

    # -- the reply

    @property
    def slow(self) -> bool:
        """Whether the client has yet to take what was written."""
        return bool(self._connection.flow.write_paused)

    async def drain(self) -> None:
        """Wait until the client has taken most of what was written."""
        await self._connection.flow.drain()

    def start(self, status: int, headers: Sequence[tuple[bytes, bytes]]) -> None:
        """The reply's head; it leaves with the first bytes of the body."""
        self.started = True
        head = [STATUS_LINE.get(status) or b"HTTP/1.1 %d \r\n" % status]
        chunked = status not in _NO_BODY
        for name, value in headers:
            if name == b"content-length":
                chunked = False
            head += (name, b": ", value, b"\r\n")
        if not self.keep_alive:
            head.append(b"connection: close\r\n")
        head.append(b"transfer-encoding: chunked\r\n\r\n" if chunked else b"\r\n")
        self._head, self._chunked = head, chunked

    def write(self, chunk: bytes) -> None:
        """Some bytes of the body."""
        out, self._head = self._head, []
        if self._chunked and chunk:
            out += (b"%x\r\n" % len(chunk), chunk, b"\r\n")
        else:
            out.append(chunk)
        self._connection.transport.write(b"".join(out))

    def end(self, chunk: bytes) -> None:
        """The last bytes of the body; the connection is free for the next request."""
        out, self._head = self._head, []
        if not self._chunked:
            out.append(chunk)
        elif chunk:
            out += (b"%x\r\n" % len(chunk), chunk, b"\r\n0\r\n\r\n")
        else:
            out.append(b"0\r\n\r\n")
        connection = self._connection
        if not connection.transport.is_closing():
            connection.transport.write(b"".join(out))
        self.response_complete = True
        connection._serving = None
        if not self.keep_alive:
            connection.transport.close()
        connection.on_response_complete()
