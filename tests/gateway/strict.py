"""An upstream that reads requests with h11, strictly, and a reading of a client's bytes by the same measure."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import h11

REPLY = [
    h11.Response(status_code=200, headers=[("content-type", "application/json"), ("content-length", "2")]),
    h11.Data(data=b"{}"),
    h11.EndOfMessage(),
]


@dataclass(frozen=True)
class Request:
    """One request: what a server acts on."""

    method: str
    target: str
    body: bytes


@dataclass
class Reader:
    """Requests from bytes as they come; `error` says why there will be no more.

    `empty_lines` lets them stand before a request, as RFC 9112, section 2.2, would have it.
    """

    empty_lines: bool = False
    requests: list[Request] = field(default_factory=list)
    error: str = ""
    _connection: h11.Connection = field(default_factory=lambda: h11.Connection(h11.SERVER, 1 << 20))
    _head: h11.Request | None = None
    _body: bytes = b""

    def feed(self, data: bytes) -> bytes:
        """The replies to what is whole now."""
        out = b""
        try:
            self._receive(data)
            while not self.error:
                event = self._connection.next_event()
                if isinstance(event, h11.Request):
                    self._head, self._body = event, b""
                elif isinstance(event, h11.Data):
                    self._body += bytes(event.data)
                elif isinstance(event, h11.EndOfMessage):
                    out += self._answered()
                else:
                    break
        except h11.RemoteProtocolError as error:
            self.error = str(error)
        return out

    def _answered(self) -> bytes:
        assert self._head is not None
        self.requests.append(Request(self._head.method.decode(), self._head.target.decode(), self._body))
        replies = b"".join(self._connection.send(each) or b"" for each in REPLY)
        if self._connection.our_state is not h11.DONE:
            self.error = "closed"
            return replies
        data, _ = self._connection.trailing_data
        self._head, self._connection = None, h11.Connection(h11.SERVER, 1 << 20)
        self._receive(data)
        return replies

    def _receive(self, data: bytes) -> None:
        if self.empty_lines and self._head is None:
            data = data.lstrip(b"\r\n")
        if data:
            self._connection.receive_data(data)


def requests_in(data: bytes) -> list[Request]:
    """The requests that a strict server takes from one connection's bytes, one after the other, until it objects."""
    reader = Reader(empty_lines=True)
    reader.feed(data)
    return reader.requests


@dataclass
class StrictUpstream:
    """Answers each request with `{}`; `errors` are the bytes that it could not read as one."""

    url: str = ""
    requests: list[Request] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        strict = Reader()
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65_536):
                before = len(strict.requests)
                replies = strict.feed(data)
                self.requests += strict.requests[before:]
                writer.write(replies)
                if strict.error:
                    self.errors.append(strict.error)
                    break
        writer.close()


@contextlib.asynccontextmanager
async def strict_upstream() -> AsyncIterator[StrictUpstream]:
    """On a free loopback port."""
    made = StrictUpstream()
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    made.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    try:
        yield made
    finally:
        server.close()
