"""One relayed call on its client's connection: takes the request's body in, and writes the reply."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol, cast

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from gateway.endpoints import Endpoints
from gateway.errors import RequestRefused
from gateway.outbox import Outbox
from gateway.spool import PIECE
from gateway.tee import Inbound

__all__ = ["Relayed", "Wire"]

_NO_BODY: Final = frozenset((204, 304))


class Wire(Protocol):
    """The client's connection: gateway.protocol.Connection."""

    endpoints: Endpoints
    outbox: Outbox
    serving: "Relayed | None"
    transport: asyncio.Transport
    flow: FlowControl
    loop: asyncio.AbstractEventLoop
    tasks: set[asyncio.Task[None]]
    patience: Mapping[str, float]

    def finish(self, *, whole: bool) -> None: ...

    def on_response_complete(self) -> None: ...


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
        "_refusal",
        "_size",
        "_task",
        "_wants_100",
        "keep_alive",
        "response_complete",
        "started",
        "whole",
    )

    def __init__(self, connection: Wire, call: Inbound, *, keep_alive: bool, wants_100: bool) -> None:
        self._connection = connection
        self._call = call
        self._wants_100 = wants_100
        self._parts: list[bytes] = []
        self._fresh = 0  # parts that are not in the spool yet, counted from the last
        self._size = 0
        self._refusal: RequestRefused | None = None
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
            if self._refusal is not None:
                raise self._refusal
        except RequestRefused as error:
            self.keep_alive = self.keep_alive and (self.whole or not self._wants_100)  # will the body come at all?
            endpoints.refuse(self._call, error, self)
            return
        if self._wants_100 and not self.whole:
            self._connection.outbox.put(self._connection.transport, b"HTTP/1.1 100 Continue\r\n\r\n")

    def take(self, body: bytes) -> None:
        """More of the request's body; a large one goes to the spool as it comes."""
        if self.response_complete or self._refusal is not None:
            return
        self._parts.append(body)
        self._fresh += 1
        self._size += len(body)
        endpoints = self._connection.endpoints
        if self._size > endpoints.max_body:
            self.turn_down(endpoints.too_large())
        elif self._size - self._call.spooled >= PIECE:
            endpoints.spool_part(self._call, b"".join(self._parts[-self._fresh :]))
            self._fresh = 0

    def turn_down(self, error: RequestRefused) -> None:
        """Refuse this call, of which no more will be read, when it is its turn."""
        self.keep_alive = False
        if self is self._connection.serving:
            self._connection.endpoints.refuse(self._call, error, self)
        elif self.response_complete:
            self._connection.finish(whole=False)
        else:
            self._refusal = error

    def serve(self) -> None:
        """All of the request is here."""
        if self.response_complete:
            return
        self._call.body = b"".join(self._parts)
        self._parts = []
        connection = self._connection
        self._task = connection.loop.create_task(self._served())
        connection.tasks.add(self._task)
        connection.outbox.expect()

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
                connection.outbox.flush()
                connection.transport.close()

    # -- the reply

    @property
    def slow(self) -> bool:
        """Whether the client has yet to take what was written."""
        return bool(self._connection.flow.write_paused)

    async def drain(self) -> None:
        """Wait until the client has taken most of what was written. One that takes nothing for long has gone."""
        connection = self._connection
        while connection.flow.write_paused:
            waiting = connection.transport.get_write_buffer_size()
            try:
                async with asyncio.timeout(connection.patience["end"]):
                    await connection.flow.drain()
            except TimeoutError:
                if connection.transport.get_write_buffer_size() >= waiting:
                    connection.transport.abort()

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
        self._connection.outbox.put(self._connection.transport, b"".join(out))

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
        connection.outbox.put(connection.transport, b"".join(out))
        self.response_complete = True
        connection.serving = None
        if not self.keep_alive:
            connection.finish(whole=self.whole)
        connection.on_response_complete()
