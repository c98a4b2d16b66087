"""Upstreams behind an HTTP proxy: by httpx, which knows CONNECT, logins and TLS in TLS. Not for speed."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from gateway.errors import ConnectError, ConnectTimeout, UpstreamCut, UpstreamTimeout
from gateway.tasks import Tasks
from gateway.upstream import UpstreamRequest
from gateway.upstream.direct import IDLE_SECONDS, MAX_IDLE
from gateway.upstream.tls import Contexts
from routing.targets import Model

if TYPE_CHECKING:
    import httpx

__all__ = ["ProxiedUpstream"]

_ENDS: Final = frozenset((204, 304))


class ProxiedUpstream:
    """A client for each proxy and file of certificates. Nothing is loaded before a model needs it."""

    def __init__(self) -> None:
        self._clients: dict[tuple[str, str], httpx.AsyncClient] = {}
        self._tls = Contexts()
        self._closing = Tasks()

    async def send(self, model: Model, request: UpstreamRequest) -> "ProxiedReply":
        """Send and wait for the reply's head; path, headers and body go up as they are."""
        client = await self._client(model)
        limits, loop = model.timeouts, asyncio.get_running_loop()
        began = loop.time()
        try:
            async with asyncio.timeout(limits.first_token):
                response = await client.send(_request(model, request), stream=True)
        except TimeoutError as error:
            raise UpstreamTimeout(
                f"{model.base_url}: first token deadline of {limits.first_token:g} s passed"
            ) from error
        except Exception as error:
            raise _mapped(error, model) from error
        return ProxiedReply(self._closing, model, response, began + limits.total)

    async def close(self) -> None:
        """Drop the idle connections."""
        await self._closing.close()
        for client in self._clients.values():
            await client.aclose()
        self._clients.clear()

    async def _client(self, model: Model) -> "httpx.AsyncClient":
        assert model.proxy is not None  # ChosenUpstream has looked
        key = (model.proxy, model.ca_file)
        found = self._clients.get(key)
        if found is None:
            try:
                found = self._clients.setdefault(key, await asyncio.to_thread(self._opened, *key))
            except OSError as error:
                raise ConnectError(f"{model.base_url}: ca_file {model.ca_file}: {error.strerror or error}") from error
        return found

    def _opened(self, proxy: str, ca_file: str) -> "httpx.AsyncClient":
        """Takes a tenth of a second the first time, and so is not for the event loop."""
        import httpx

        limits = httpx.Limits(max_connections=None, max_keepalive_connections=MAX_IDLE, keepalive_expiry=IDLE_SECONDS)
        return httpx.AsyncClient(verify=self._tls.of(ca_file), proxy=proxy, trust_env=False, limits=limits)


class ProxiedReply:
    """See gateway.upstream.Reply."""

    __slots__ = ("_closing", "_due", "_left", "_model", "_parts", "_response", "complete", "headers", "status")

    def __init__(self, closing: Tasks, model: Model, response: "httpx.Response", due: float) -> None:
        self._closing = closing
        self._model = model
        self._response = response
        self._parts: AsyncIterator[bytes] = response.aiter_raw()
        self._due = due
        self.status = response.status_code
        self.headers = [(name.lower(), value) for name, value in response.headers.raw]
        self._left = _length(self.status, self.headers)
        self.complete = False

    async def read(self, each: Callable[[bytes], bool] | None = None) -> bytes:
        """The next bytes of the body; b"" at the end. Nothing goes to `each`."""
        if self.complete:
            return b""
        try:
            async with asyncio.timeout_at(self._due):
                part = await anext(self._parts, b"")
        except TimeoutError as error:
            total = self._model.timeouts.total
            raise UpstreamTimeout(f"{self._model.base_url}: total deadline of {total:g} s passed") from error
        except Exception as error:
            raise _mapped(error, self._model) from error
        if self._left is not None:
            self._left -= len(part)
        self.complete = not part or self._left == 0
        return part

    def close(self) -> None:
        """Give the connection back, or drop it if the reply is not complete."""
        if not self._response.is_closed:
            self._closing.spawn("close", self._finished())

    async def _finished(self) -> None:
        if self.complete:
            await anext(self._parts, b"")  # lets httpx see the end, so that the connection can be kept
        await self._response.aclose()


def _request(model: Model, request: UpstreamRequest) -> "httpx.Request":
    """As it is: of httpx's own only Host and Content-Length."""
    import httpx

    connect = model.timeouts.connect
    timeout = {"connect": connect, "pool": connect, "read": None, "write": None}
    url = f"{model.base_url}{request.path}"
    headers = list(request.headers)
    return httpx.Request(request.method, url, headers=headers, content=request.body, extensions={"timeout": timeout})


def _mapped(error: Exception, model: Model) -> Exception:
    """httpx's errors as ours; the proxy's login is in none of them."""
    import httpx

    where = f"{model.base_url} by proxy {urlsplit(model.proxy or '').hostname}"
    if isinstance(error, httpx.ConnectTimeout | httpx.PoolTimeout):
        return ConnectTimeout(f"{where}: no connection within {model.timeouts.connect:g} s")
    if isinstance(error, httpx.ConnectError | httpx.ProxyError):
        return ConnectError(f"{where}: {error}")
    if isinstance(error, httpx.TransportError):
        return UpstreamCut(f"{where}: {error or type(error).__name__}")
    return error


def _length(status: int, headers: list[tuple[bytes, bytes]]) -> int | None:
    if status in _ENDS:
        return 0
    return next((int(value) for name, value in headers if name == b"content-length" and value.isdigit()), None)
