"""What litellm raised, as a reply in OpenAI's shape or as an upstream's failure. Knows its exceptions by form. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import orjson

from gateway.errors import (
    ConnectError,
    ConnectTimeout,
    UpstreamCut,
    UpstreamError,
    UpstreamTimeout,
    error_body,
)
from routing.targets import Model

__all__ = ["Told", "told"]

_PASSED: Final = ("retry-after", "retry-after-ms")
_SECRET: Final = 6  # characters; what is shorter could be a word
# By the name of the class, of httpx, httpcore, aiohttp, botocore and Python: all providers' libraries end in these.
_FAILURES: Final[dict[str, type[UpstreamError]]] = {
    "ConnectTimeout": ConnectTimeout,
    "ConnectTimeoutError": ConnectTimeout,
    "ConnectionTimeoutError": ConnectTimeout,
    "ConnectError": ConnectError,
    "ProxyError": ConnectError,
    "ClientConnectorError": ConnectError,
    "EndpointConnectionError": ConnectError,
    "ConnectionRefusedError": ConnectError,
    "gaierror": ConnectError,
    "ReadTimeout": UpstreamTimeout,
    "ReadTimeoutError": UpstreamTimeout,
    "SocketTimeoutError": UpstreamTimeout,
    "ServerTimeoutError": UpstreamTimeout,
    "Timeout": UpstreamTimeout,
    "TimeoutError": UpstreamTimeout,
    "ReadError": UpstreamCut,
    "WriteError": UpstreamCut,
    "RemoteProtocolError": UpstreamCut,
    "ClientPayloadError": UpstreamCut,
    "ServerDisconnectedError": UpstreamCut,
    "ConnectionResetError": UpstreamCut,
}


@dataclass(frozen=True, slots=True)
class Told:
    """An error as the client is to have it. `failure` is set where no reply came: then there is only the message."""

    status: int
    headers: list[tuple[bytes, bytes]]
    message: str
    body: bytes
    failure: type[UpstreamError] | None = None


def told(error: BaseException, model: Model) -> Told:
    """The provider's status, Retry-After, rate limits and message; litellm's own where no provider was reached.

    litellm wraps what the provider said, often under another status: what is said is looked for at the root.
    """
    chain = list(_chain(error))
    status, headers = _http(chain)
    failure = None if status else _failure(chain)
    status = status or _status(error)
    message, kind, code = _said(str(error).partition("\nTraceback (most recent call last)")[0])
    if any(isinstance(one, ImportError) for one in chain):
        failure = ConnectError
    message = _without_secrets(message, model)
    body = error_body(message, kind=kind, code=code)
    return Told(status, headers, message, body, failure)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _http(chain: list[BaseException]) -> tuple[int, list[tuple[bytes, bytes]]]:
    """The status and some headers of the reply at the chain's root; litellm's own replies have no headers."""
    for error in reversed(chain):
        reply = getattr(error, "response", None)
        status, headers = getattr(reply, "status_code", None), getattr(reply, "headers", None)
        if isinstance(status, int) and 400 <= status <= 599 and headers:
            return status, _kept(headers)
    return 0, []


def _kept(headers: Any) -> list[tuple[bytes, bytes]]:
    return [
        (name.lower().encode("latin-1"), value.encode("latin-1"))
        for name, value in headers.items()
        if name.lower() in _PASSED or "ratelimit" in name.lower()
    ]


def _failure(chain: list[BaseException]) -> type[UpstreamError] | None:
    for error in reversed(chain):
        for kind in type(error).__mro__:
            if kind.__name__ in _FAILURES:
                return _FAILURES[kind.__name__]
    return None


def _status(error: BaseException) -> int:
    status = getattr(error, "status_code", None)
    return status if isinstance(status, int) and 400 <= status <= 599 else 502


def _said(text: str) -> tuple[str, str, str | None]:
    """Message, type and code: the provider's own JSON where it is inside of `text`, else `text`."""
    try:
        inner = orjson.loads(text[text.index("{") : text.rindex("}") + 1])
    except (ValueError, orjson.JSONDecodeError):
        return text.strip(), "upstream_error", None
    found = inner.get("error", inner) if isinstance(inner, dict) else None
    if not isinstance(found, dict) or not isinstance(found.get("message"), str):
        return text.strip(), "upstream_error", None
    kind, code = found.get("type") or found.get("status"), found.get("code")
    return (
        found["message"],
        kind if isinstance(kind, str) else "upstream_error",
        code if isinstance(code, str) else None,
    )


def _without_secrets(text: str, model: Model) -> str:
    secrets = [model.api_key, *(value for _, value in model.options)]
    for secret in secrets:
        if isinstance(secret, str) and len(secret) >= _SECRET:
            text = text.replace(secret, "***")
    return text
