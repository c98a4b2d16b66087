"""The edge where a call shows its key: found, judged and counted in memory, before a byte of its body is read."""

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any, Final

import structlog
from sqlalchemy.exc import SQLAlchemyError

from gateway.auth import Key, Refusal, Scope, authorise, bearer, digest_of, may_use, scope_of, without_credentials
from gateway.errors import RequestRefused
from gateway.exchanges import cost_of, rates
from gateway.keyring import Keyring
from gateway.limits import Limits
from gateway.metering import used
from gateway.tee import Inbound
from routing.errors import RoutingError
from routing.targets import Price

__all__ = ["Gate", "allow", "guarded"]

log = structlog.get_logger(__name__)

_PATIENCE: Final = 2.0  # seconds

Scopes = MutableMapping[str, Any]
ASGIApp = Callable[[Scopes, Any, Callable[[Any], Awaitable[None]]], Awaitable[None]]


class Account:
    """A key with its counters; what its replies use is charged to it."""

    __slots__ = ("_limits", "key")

    def __init__(self, key: Key, limits: Limits) -> None:
        self.key = key
        self._limits = limits

    def admit(self, now: float) -> Refusal | None:
        """Count one more request of data, where the key may make it."""
        key = self.key
        refusal = authorise(key, Scope.DATA, now, self._limits.spent(key, now) if key.limited else None)
        if refusal is None and key.rpm is not None:
            self._limits.count_request(key, now)
        return refusal

    def charge(self, end: bytes, price: Price | None, *, sent: int, size: int, stream: bool, encoding: str) -> None:
        """A reply is over: see `metering.used`."""
        usage = used(end, sent=sent, size=size, stream=stream, encoding=encoding)
        cost = cost_of(usage, rates(price)) or 0.0
        self._limits.count_reply(self.key, time.time(), usage.input_tokens + usage.output_tokens, cost)


class Gate:
    """Lets calls in. `problems` is told what the keys lack, as `/readyz` shows it."""

    def __init__(self, ring: Keyring, limits: Limits, problems: dict[str, str]) -> None:
        self._ring = ring
        self._limits = limits
        self._problems = problems
        self._keys: list[Key] | None = None  # those that `_accounts` was made of
        self._accounts: dict[str, Account] = {}
        self._take()

    def admit(self, call: Inbound) -> None:
        """Give the call its key's account and take the secret from its headers. Raises RequestRefused.

        A call without a key loses all its headers: what nobody stands behind is not logged or counted.
        """
        headers, call.headers = call.headers, []
        secret, now = bearer(headers), time.time()
        call.account = account = self._find(secret)
        if account is not None:
            call.headers = without_credentials(headers)
            refusal = account.admit(now)
        else:
            refusal = authorise(None, Scope.DATA, now, secret=secret)
        if refusal is not None:
            raise _refused(refusal)

    def check(self, path: str, headers: list[tuple[bytes, bytes]]) -> Key | None:
        """The key of a call that is not relayed; None where it needs none. Raises RequestRefused."""
        scope = scope_of(path)
        if scope is None:
            return None
        secret = bearer(headers)
        account = self._find(secret)
        key = account.key if account is not None else None
        refusal = authorise(key, scope, time.time(), secret=secret)
        if refusal is not None:
            raise _refused(refusal)
        return key

    async def start(self) -> None:
        """Ask the database before the first call, but not for long: a gateway starts without it."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_PATIENCE):
                await self.refresh()

    async def refresh(self) -> None:
        """Take in keys that were made or revoked. A dead database, or a full disk, changes nothing."""
        try:
            await self._ring.refresh()
            if self._problems.pop("keys", None) is not None:
                log.info("client keys are fresh again")
        except (SQLAlchemyError, RoutingError, OSError, ValueError, TypeError) as error:
            text = str(error).partition("\n")[0]
            if self._problems.get("keys") != text:
                self._problems["keys"] = text
                log.warning("the client keys that are known are used", known=len(self._accounts), error=text)
        self._take()  # what was read counts, even where it could not be kept

    def close(self) -> None:
        """Give the counters' slot free."""
        self._limits.close()

    def _find(self, secret: str) -> Account | None:
        if self._keys is None:
            raise RequestRefused(
                503, "no client key is known yet: the database is away", code="keys_unavailable", kind="server_error"
            )
        return self._accounts.get(digest_of(secret))

    def _take(self) -> None:
        keys = self._ring.keys
        if keys is None:
            return
        self._limits.grow(max((key.number for key in keys if key.limited), default=0))
        if keys is not self._keys:
            self._keys, self._accounts = keys, {key.digest: Account(key, self._limits) for key in keys}


def allow(key: Key, model: str) -> None:
    """Raises RequestRefused where the key's calls may not be routed to `model`."""
    refusal = may_use(key, model)
    if refusal is not None:
        raise _refused(refusal)


def guarded(app: ASGIApp, gate: Gate) -> ASGIApp:
    """The application, closed to calls whose key does not open it; the key is in the scope as `key`."""

    async def guard(scope: Scopes, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] == "http":
            try:
                scope["key"] = gate.check(scope["path"], scope["headers"])
            except RequestRefused as error:
                await _refuse(error, send)
                return
        await app(scope, receive, send)

    return guard


async def _refuse(error: RequestRefused, send: Callable[[Any], Awaitable[None]]) -> None:
    body = error.body
    head = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *error.headers]
    await send({"type": "http.response.start", "status": error.status, "headers": head})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def _refused(refusal: Refusal) -> RequestRefused:
    return RequestRefused(
        refusal.status, refusal.message, code=refusal.code, kind=refusal.kind, retry_after=refusal.retry_after
    )
