"""A client's connection: uvicorn's HTTP protocol, with a short way for the calls that are relayed.

Such a call costs one task and no ASGI messages; every other call goes the ASGI way, as under plain uvicorn. What is not
HTTP/1.1, too large a head, or too slow ends the connection, after the replies that are under way.
"""

import asyncio
import resource
from collections.abc import Mapping
from typing import Any, Final, Literal, cast

import httptools
import structlog
import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from gateway.config import GatewaySettings
from gateway.endpoints import Endpoints
from gateway.errors import RequestRefused
from gateway.outbox import Outbox
from gateway.paths import RELAYED, passed_on
from gateway.relayed import Relayed

__all__ = ["server_config"]

log = structlog.get_logger(__name__)

_PATHS: Final = {path.encode(): path for path in RELAYED}
_VERSIONS: Final = frozenset(("1.0", "1.1"))
_MAX_HEADERS: Final = 256
_PROGRESS: Final = 64 * 1024  # bytes of a body that are to come within `stall_timeout`, where its end does not
_CHUNK_COST: Final = 5  # bytes that the smallest chunk spends on one byte of a body
_KEEP_ALIVE: Final = 5.0  # seconds
_OTHER_FILES: Final = 128  # descriptors that are no connections

Awaited = Literal["", "request", "head", "body", "end"]


def server_config(endpoints: Endpoints, settings: GatewaySettings) -> uvicorn.Config:
    """How uvicorn serves a worker's application; with no more connections than there are descriptors for two each."""
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    most = settings.max_connections
    if descriptors != resource.RLIM_INFINITY:
        most = min(most, max(1, (descriptors - _OTHER_FILES) // 2))
    patience = {
        "request": _KEEP_ALIVE,
        "head": settings.head_timeout,
        "body": settings.stall_timeout,
        "end": settings.stall_timeout,
    }
    bound = {
        "endpoints": endpoints,
        "outbox": endpoints.outbox,
        "max_connections": most,
        "max_head": settings.max_head,
        "patience": patience,
        "beat": min(patience.values()),
    }
    return uvicorn.Config(
        endpoints,
        http=type("BoundConnection", (Connection,), bound),
        ws="none",
        proxy_headers=False,
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        timeout_keep_alive=int(_KEEP_ALIVE),
        timeout_graceful_shutdown=int(settings.drain),
    )


class Connection(HttpToolsProtocol):
    """One client. `cycle` is the request that came last, be it relayed or uvicorn's; `serving` the one in work."""

    endpoints: Endpoints
    outbox: Outbox
    max_connections: int
    max_head: int
    patience: Mapping[str, float]  # seconds, by what is awaited of the client
    beat: float  # seconds, the least of them: so often the one timer looks, while anything is
    serving: Relayed | None = None
    _awaited: Awaited = ""
    _since = 0.0  # of the loop's clock
    _packet = 0  # bytes that came last
    _fed = 0  # bytes of the message, those of its first packet left out; -1 within that
    _body = 0  # bytes of them that are the request's body
    _seen = 0  # `_body` when somebody last looked how it comes along
    _deaf = False  # what still comes is thrown away
    _objection: RequestRefused | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        self._await("head")
        if len(self.connections) > self.max_connections:
            self._say(RequestRefused(503, "the gateway has too many connections", code="overloaded"))
            transport.close()

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        self._packet = len(data)
        try:
            while data:
                data = self._fed_to_parser(data)
        except httptools.HttpParserError as error:
            if self._deaf:
                return
            if isinstance(error, httptools.HttpParserCallbackError) and self._objection is None:
                log.exception("a request could not be taken in")
            self._cut_short(self._objection or RequestRefused(400, f"this is not HTTP/1.1: {error}", code="bad_http"))
        if self._awaited:
            self._watch()

    def on_message_begin(self) -> None:
        if self._deaf:
            raise EOFError  # within the packet whose first request was the last
        self.url = b""
        self.headers = []
        self.expect_100_continue = False
        self._awaited, self._since, self._fed, self._body = "head", 0.0, -1, 0

    def on_headers_complete(self) -> None:
        version, headers = self.parser.get_http_version(), self.headers
        plain = version in _VERSIONS and 0 < len(headers) <= _MAX_HEADERS and headers[0][0] == b"host"
        if not plain or self._fed + self._packet > self.max_head:
            self._object(version)
        if self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT":
            return  # _fed_to_parser hears of it
        self.headers = []  # trailers go nowhere
        path, _, query = self.url.partition(b"?")
        method = self.parser.get_method()
        relayed = _PATHS.get(path) if method == b"POST" else None
        if relayed is None and (relayed := passed_on(method, path)) is None:
            self._to_asgi(headers)
            return
        self._awaited, self._since = "body", 0.0
        keep_alive = version != "1.0" and self.parser.should_keep_alive()
        call = self.endpoints.inbound(method.decode(), relayed, query.decode("latin-1"), headers)
        before, relay = self.cycle, Relayed(self, call, keep_alive=keep_alive, wants_100=self.expect_100_continue)
        self.cycle = cast(Any, relay)
        if before is None or before.response_complete:
            self._start(relay)
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((self.cycle, self.app))

    def on_body(self, body: bytes) -> None:
        self._body += len(body)
        relay: Any = self.cycle
        if isinstance(relay, Relayed):
            relay.take(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self._deaf or self._awaited == "head":  # "head": an upgrade
            return
        self._awaited = ""
        relay: Any = self.cycle
        if not isinstance(relay, Relayed):
            super().on_message_complete()
        elif relay is self.serving:
            relay.whole = True
            relay.serve()
        else:
            relay.whole = True
        if relay.response_complete:
            self._await("request")

    def connection_lost(self, exc: Exception | None) -> None:
        left: list[Any] = [self.serving, *(cycle for cycle, _ in self.pipeline)]
        self.serving = None
        self.pipeline.clear()
        self._awaited = ""
        if self.timeout_keep_alive_task is not None:
            self.timeout_keep_alive_task.cancel()
            self.timeout_keep_alive_task = None
        if isinstance(cast(Any, self.cycle), Relayed):
            self.cycle = cast(Any, None)
        super().connection_lost(exc)
        for relay in left:
            if isinstance(relay, Relayed):
                relay.left()

    def on_response_complete(self) -> None:
        if self.pipeline and self._awaited != "end":
            # Not at once: a thousand refusals would be as many calls deep.
            self.loop.call_soon(super().on_response_complete)
            return
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self._deaf:
            self._hang_up()
        elif not self._awaited:
            self._await("request")

    def shutdown(self) -> None:
        """The worker is to stop: an idle connection closes, behind a reply that is written."""
        self.outbox.flush()
        super().shutdown()

    def finish(self, *, whole: bool) -> None:
        """Close behind a reply; `whole`: all of its request has come."""
        if not whole or self._deaf:
            self._hang_up()
        else:
            self._close()

    def timeout_keep_alive_handler(self) -> None:
        """One timer a connection instead of one a request: it looks for how long the client has owed something."""
        self.timeout_keep_alive_task = None
        if not self._awaited:
            return
        now = self.loop.time()
        due = self._since + self.patience[self._awaited]
        if now >= due and self._awaited == "body" and (self._body - self._seen >= _PROGRESS or self.flow.read_paused):
            self._since, self._seen = now, self._body
            due = now + self.patience["body"]
        if now < due:
            self._wake_at(min(due, now + self.beat))
        elif self._awaited == "end":
            self.transport.abort()
        elif self._awaited == "request" or self.headers is None:
            self._close()
        else:
            self._cut_short(RequestRefused(408, f"the request's {self._awaited} came too slowly", code="timeout"))

    def _unset_keepalive_if_required(self) -> None:
        """The timer stays."""

    def _await(self, what: Awaited) -> None:
        self._awaited, self._since = what, self.loop.time()
        if self.timeout_keep_alive_task is None:
            self._wake_at(self._since + self.beat)

    def _wake_at(self, when: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_at(when, self.timeout_keep_alive_handler)

    def _watch(self) -> None:
        """Not all of a message is here: it has a time to come in, and little besides its body to come with."""
        if not self._since:
            self._seen = self._body
            self._await(self._awaited)
        self._fed = self._fed + self._packet if self._fed >= 0 else 0
        if self._fed - self._body > self.max_head + _CHUNK_COST * self._body and not self._deaf:
            self._cut_short(self._too_much())

    def _fed_to_parser(self, data: bytes) -> bytes:
        """What is still to be fed: an upgrade is offered in vain, so the request is fed again without the offer.

        For the parser all that follows such a head, a body too, is another protocol's.
        """
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            version = self.parser.get_http_version().encode()
            head = [b"%b %b HTTP/%b\r\n" % (self.parser.get_method(), self.url, version)]
            head += [b"%b: %b\r\n" % header for header in self.headers if header[0] != b"upgrade"]
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
            return b"".join(head) + b"\r\n" + data[upgrade.args[0] :]
        return b""

    def _object(self, version: str) -> None:
        """Raises RequestRefused for a head that is none to go on with."""
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if version not in _VERSIONS:
            self._objection = RequestRefused(505, f"HTTP/{version} is not spoken here", code="bad_http")
        elif len(self.headers) > _MAX_HEADERS or size > self.max_head:
            self._objection = self._too_much()
        elif version == "1.1" and not any(name == b"host" for name, _ in self.headers):
            self._objection = RequestRefused(400, "the request has no Host header", code="bad_http")
        if self._objection is not None:
            raise self._objection

    def _too_much(self) -> RequestRefused:
        most = f"{self.max_head} bytes or {_MAX_HEADERS} fields"
        return RequestRefused(431, f"the request has headers of more than {most}", code="headers_too_large")

    def _cut_short(self, error: RequestRefused) -> None:
        """Nothing more is read from this client. It is told why, after the replies that are under way."""
        partial = self._awaited == "body"
        self._deaf, self._awaited = True, ""
        cycle: Any = self.cycle
        queued = bool(self.pipeline) and cast(Any, self.pipeline[0][0]) is cycle
        if partial and isinstance(cycle, Relayed):
            cycle.turn_down(error)
        elif partial and queued:
            self.pipeline.popleft()
        elif self.pipeline or not (partial or cycle is None or cycle.response_complete):
            return  # on_response_complete ends it
        else:
            if not partial or not (cycle.response_started or cycle.response_complete):
                self._say(error)
            if partial and not cycle.response_complete:
                self._close()  # the application waits for a body
            else:
                self._hang_up()

    def _say(self, error: RequestRefused) -> None:
        """The reply to what is no call, and so no exchange: it is counted."""
        self.endpoints.unread(error)
        body = error.body
        own = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
        ]
        head = b"".join(b"%b: %b\r\n" % header for header in (*own, *error.headers))
        self.outbox.flush()
        self.transport.write(STATUS_LINE[error.status] + head + b"\r\n" + body)

    def _hang_up(self) -> None:
        """End the connection, but hear the client out: to close on unread bytes would cost it the reply."""
        if self.transport.is_closing() or self._awaited == "end":
            return
        self._deaf = True
        self._await("end")
        self.outbox.flush()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        else:
            self.transport.close()

    def _close(self) -> None:
        """End the connection, with what is written; a client that does not take it has as long as a slow one."""
        self._deaf = True
        self.outbox.flush()
        self.transport.close()
        self._await("end")

    def _start(self, relay: Relayed) -> None:
        self.serving = relay
        relay.admit()
        if relay.whole and not relay.response_complete:
            relay.serve()

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        if isinstance(cycle, Relayed):
            self._start(cycle)
        else:
            super()._start_asgi_task(cycle, app)

    def _to_asgi(self, headers: list[tuple[bytes, bytes]]) -> None:
        """Do what uvicorn does at a message's begin, and then what it does at the end of the headers."""
        url, expected = self.url, self.expect_100_continue
        if not _has_path(url):
            self._objection = RequestRefused(400, "the request names no path", code="bad_http")
            raise self._objection
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expected
        self.headers.extend(headers)
        super().on_headers_complete()
        self._awaited, self._since, self.headers = "body", 0.0, []


def _has_path(url: bytes) -> bool:
    try:
        return bool(httptools.parse_url(url).path)
    except httptools.HttpParserInvalidURLError:
        return False
