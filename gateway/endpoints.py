"""The data plane's HTTP edge: a raw ASGI callable for the calls that are relayed; all else is ordinary FastAPI."""

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

from gateway.errors import RequestRefused, error_body
from gateway.ids import new_id
from gateway.proxy import Proxy, Send, log_full
from gateway.spool import PIECE
from gateway.tee import Inbound, Sink

__all__ = ["RELAYED", "Endpoints"]

RELAYED: Final = frozenset(("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"))

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]


class Endpoints:
    """The application that a worker serves."""

    def __init__(self, *, proxy: Proxy, spool: Sink, control: ASGIApp, max_body: int) -> None:
        self._proxy = proxy
        self._spool = spool
        self._control = control
        self._max_body = max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] in RELAYED and scope["method"] == "POST":
            await self._relay(scope, receive, send)
        else:
            await self._control(scope, receive, send)

    async def _relay(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = Inbound(
            id=new_id(),
            timestamp=time.time(),
            received=time.perf_counter(),
            path=scope["path"],
            query=scope["query_string"].decode("latin-1"),
            headers=scope["headers"],
            body=b"",
        )
        watcher = None
        try:
            if self._spool.refusing:
                raise log_full()
            if not await self._read_body(call, receive):
                self._proxy.gone(call)
                return
            task = asyncio.current_task()
            watcher = asyncio.get_running_loop().create_task(_watch(call, receive, task))
            await self._proxy.handle(call, send)
        except RequestRefused as error:
            self._proxy.refuse(call, error)
            await _refused(call, error, send)
        finally:
            if watcher is not None:
                watcher.cancel()

    async def _read_body(self, call: Inbound, receive: Receive) -> bool:
        """Take in the whole body; False when the client left before its end. Raises RequestRefused for a large one."""
        for name, value in call.headers:
            if name == b"content-length" and value.isdigit() and int(value) > self._max_body:
                raise _too_large(self._max_body)
        parts: list[bytes] = []
        size = fresh = 0
        message = await receive()
        while message["type"] == "http.request":
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._max_body:
                raise _too_large(self._max_body)
            if not message.get("more_body", False):
                call.body = parts[0] if len(parts) == 1 else b"".join(parts)
                call.received = time.perf_counter()
                return True
            fresh += 1
            if size - call.spooled >= PIECE:
                self._proxy.spool_part(call, b"".join(parts[-fresh:]))
                fresh = 0
            message = await receive()
        call.body = b"".join(parts)
        return False


async def _watch(call: Inbound, receive: Receive, task: "asyncio.Task[Any] | None") -> None:
    """End the call when its client leaves: what is read from the upstream then is wasted money."""
    while (await receive())["type"] != "http.disconnect":
        pass
    if task is not None and not call.finished:
        call.gone = True
        task.cancel()


def _too_large(limit: int) -> RequestRefused:
    return RequestRefused(413, f"the request body is larger than {limit} bytes", code="request_too_large")


async def _refused(call: Inbound, error: RequestRefused, send: Send) -> None:
    body = error_body(str(error), kind=error.kind, code=error.code, param=error.param)
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"x-understudy-exchange-id", call.id.encode()),
    ]
    if error.status in (413, 503):
        headers.append((b"connection", b"close") if error.status == 413 else (b"retry-after", b"1"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
