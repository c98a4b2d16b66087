"""The control plane's edge: no other site's page reaches it through a browser, and no key but an admin's opens it.

A page that somebody opens in a browser can make that browser send requests here. What it sends names its own origin, or
is no JSON, and is refused; and if its own name is made to resolve to this address (DNS rebinding), the Host is wrong.
"""

import ipaddress
import re
import time
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from dataclasses import dataclass
from typing import Any, Final

from gateway.auth import Scope, authorise, bearer
from gateway.errors import RequestRefused
from gateway.keys import Keys
from routing.errors import Unavailable

__all__ = ["Caller", "guarded"]

_OPEN: Final = frozenset(("/", "/healthz"))
_READS: Final = frozenset(("GET", "HEAD", "OPTIONS"))
_HOST: Final = re.compile(r"(?:\[([0-9a-f:.]+)\]|([0-9a-z._-]+))(?::\d+)?")
_MAX_BODY: Final = 65_536  # bytes
_HEADERS: Final = {
    b"cache-control": b"no-store",
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'",
    b"cross-origin-opener-policy": b"same-origin",
    b"cross-origin-resource-policy": b"same-origin",
    b"referrer-policy": b"no-referrer",
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
}

Scopes = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
ASGIApp = Callable[[Scopes, Any, Send], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who calls: the owner of the key that was shown, "" where authentication is off."""

    approver: str = ""

    def named(self, said: str) -> str:
        """Who it is for the history. Raises RequestRefused for one with a key that says another name."""
        if not self.approver:
            return said or "api"
        if said not in ("", self.approver):
            raise RequestRefused(
                400, f"who asks is {self.approver}, the key's owner: leave `who` out", code="bad_request", param="who"
            )
        return self.approver


def guarded(app: ASGIApp, *, hosts: Collection[str], keys: Keys | None) -> ASGIApp:
    """The application, closed to other sites and, with `keys`, to calls without an admin's; the Caller is in the scope.

    `hosts` are the names, in lower case, that may stand in Host beside IP addresses.
    """

    async def guard(scope: Scopes, receive: Any, send: Send) -> None:
        if scope["type"] != "http":
            return
        answer = _with_headers(send)
        try:
            headers = {name: value.decode("latin-1") for name, value in reversed(scope["headers"])}
            _check_origin(scope, headers, hosts)
            if scope["path"] not in _OPEN:
                scope["caller"] = await _caller(scope, keys)
                _check_body(scope, headers)
        except RequestRefused as error:
            await _refuse(error, answer)
        else:
            await app(scope, receive, answer)

    return guard


def _check_origin(scope: Scopes, headers: dict[bytes, str], hosts: Collection[str]) -> None:
    host = headers.get(b"host", "").lower()
    name = _name(host)
    if not (name in hosts or _is_address(name)):
        raise RequestRefused(
            403,
            f"Host {host[:100]!r} is no name of this control plane: ask by its address, or add the name to api.hosts",
            code="unknown_host",
            kind="permission_error",
        )
    if scope["path"] in _OPEN and scope["method"] in _READS:
        return
    origin, site = headers.get(b"origin"), headers.get(b"sec-fetch-site", "none")
    if site not in ("same-origin", "none") or (
        origin is not None and origin.lower() not in (f"http://{host}", f"https://{host}")
    ):
        raise RequestRefused(
            403, "a page of another site may not ask here", code="cross_origin", kind="permission_error"
        )


def _name(host: str) -> str:
    """The name or address without port and brackets; "" for what is no Host."""
    found = _HOST.fullmatch(host)
    return (found[1] or found[2]) if found else ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


async def _caller(scope: Scopes, keys: Keys | None) -> Caller:
    """Asks the database each time: a key that was revoked a moment ago opens nothing."""
    if keys is None:
        return Caller()
    secret = bearer(scope["headers"])
    try:
        key = await keys.find(secret) if secret else None
    except Unavailable as error:
        raise RequestRefused(503, str(error), code="unavailable", kind="server_error") from error
    refusal = authorise(key, Scope.ADMIN, time.time(), secret=secret)
    if refusal is not None:
        raise RequestRefused(refusal.status, refusal.message, code=refusal.code, kind=refusal.kind)
    assert key is not None
    return Caller(approver=key.owner)


def _check_body(scope: Scopes, headers: dict[bytes, str]) -> None:
    if scope["method"] in _READS:
        return
    if headers.get(b"content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise RequestRefused(415, "send content-type: application/json", code="wrong_content_type")
    length = headers.get(b"content-length", "")
    if not length.isdigit():
        raise RequestRefused(411, "send the body's content-length", code="length_required")
    if int(length) > _MAX_BODY:
        raise RequestRefused(413, f"the request body is larger than {_MAX_BODY} bytes", code="request_too_large")


def _with_headers(send: Send) -> Send:
    async def answer(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            head = message["headers"] = list(message["headers"])
            own = {name for name, _ in head}
            head += [(name, value) for name, value in _HEADERS.items() if name not in own]
        await send(message)

    return answer


async def _refuse(error: RequestRefused, send: Send) -> None:
    body = error.body
    head = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *error.headers]
    if error.status in (411, 413):
        head.append((b"connection", b"close"))  # what is still to come of the body is not read
    await send({"type": "http.response.start", "status": error.status, "headers": head})
    await send({"type": "http.response.body", "body": body, "more_body": False})
