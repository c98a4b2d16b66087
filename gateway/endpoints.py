"""The data plane's edge: what happens to a relayed call before and after the proxy; all else is ordinary FastAPI."""

import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import structlog

from gateway.errors import RequestRefused, error_body
from gateway.gate import Gate
from gateway.ids import new_id
from gateway.outbox import Outbox
from gateway.paths import RELAYED
from gateway.proxy import Proxy, log_full
from gateway.tee import Downstream, Inbound, Sink
from gateway.tracing import Tracing
from gateway.upstream import Headers

__all__ = ["Endpoints"]

log = structlog.get_logger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]


class Endpoints:
    """The application that a worker serves: relayed calls by the methods below, the others as an ASGI application."""

    def __init__(
        self,
        *,
        proxy: Proxy,
        spool: Sink,
        outbox: Outbox,
        control: ASGIApp,
        max_body: int,
        gate: Gate | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self._gate = gate
        self._tracing = tracing
        self._proxy = proxy
        self._spool = spool
        self._control = control
        self.outbox = outbox
        self.max_body = max_body
        self.spool_part = proxy.spool_part
        self.gone = proxy.gone
        self.unread = proxy.unread

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._control(scope, receive, send)

    def inbound(self, method: str, path: str, query: str, headers: Headers) -> Inbound:
        """A call whose head is here."""
        return Inbound(
            id=new_id(),
            timestamp=time.time(),
            received=time.perf_counter(),
            method=method,
            passed_on=method != "POST" or path not in RELAYED,
            path=path,
            query=query,
            headers=headers,
            body=b"",
            trace=None if self._tracing is None else self._tracing.begin(headers),
        )

    def admit(self, call: Inbound) -> None:
        """Raises RequestRefused for a call whose body need not be read."""
        if self._gate is not None:
            self._gate.admit(call)
        if self._spool.refusing:
            raise log_full()
        for name, value in call.headers:
            if name == b"content-length" and value.isdigit() and int(value) > self.max_body:
                raise self.too_large()
            if name == b"transfer-encoding" and value.lower() != b"chunked":
                raise RequestRefused(501, "of transfer codings only `chunked` is understood", code="bad_http")

    async def serve(self, call: Inbound, down: Downstream) -> None:
        """Serve a call whose body is here. Whatever happens, the client is told or cut off, and the log knows."""
        call.received = time.perf_counter()
        try:
            await self._proxy.handle(call, down)
        except RequestRefused as error:
            self.refuse(call, error, down)
        except Exception:
            log.exception("a call failed", exchange=call.id)
            if not down.started:
                _answer(call, 500, error_body("the gateway failed", kind="server_error", code="internal"), [], down)

    def refuse(self, call: Inbound, error: RequestRefused, down: Downstream) -> None:
        """Log a refusal and tell the client."""
        self._proxy.refuse(call, error)
        if error.status == 413:
            down.keep_alive = False  # what is still to come of the body is not read
        _answer(call, error.status, error.body, error.headers, down)

    def too_large(self) -> RequestRefused:
        """The refusal of a body above the limit."""
        return RequestRefused(413, f"the request body is larger than {self.max_body} bytes", code="request_too_large")


def _answer(call: Inbound, status: int, body: bytes, headers: Headers, down: Downstream) -> None:
    call.finished = True
    own = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"x-understudy-exchange-id", call.id.encode()),
    ]
    down.start(status, [*own, *headers])
    down.end(body)
