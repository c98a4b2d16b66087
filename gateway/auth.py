"""Who a call comes from and what it may do: secrets, keys, scopes, limits. Pure: no I/O, no clock, no randomness.

A secret is `us-`, 43 characters that carry 256 random bits, and 6 that are their CRC-32, so that a scanner of
repositories can tell a real one from a likely word, and a mistyped one is told apart from a revoked one.

Only the SHA-256 of a secret is ever stored. A slow, salted hash protects what people choose, which can be guessed; 256
random bits cannot be, so a fast hash gives nothing away and costs half a microsecond a call. For the same reason
finding a digest in a dict needs no comparison in constant time: whoever measures it learns about digests of secrets
of their own, and has to invert SHA-256 to use it.
"""

import math
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Final, NamedTuple

from gateway.key import Key, Scope

__all__ = [
    "Key",
    "Refusal",
    "Scope",
    "Spent",
    "authorise",
    "bearer",
    "digest_of",
    "identified",
    "may_use",
    "scope_of",
    "secret_of",
    "well_formed",
    "without_credentials",
]

_ALPHABET: Final = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_PREFIX: Final = "us-"
_RANDOM: Final = 43  # 62 ** 43 > 2 ** 256
_CHECK: Final = 6
_SECRET: Final = re.compile(rf"{_PREFIX}([0-9A-Za-z]{{{_RANDOM}}})([0-9A-Za-z]{{{_CHECK}}})")
_OURS: Final = re.compile(rb"us-[0-9A-Za-z]{49}")
_CREDENTIALS: Final = frozenset((b"authorization", b"x-api-key", b"api-key", b"cookie"))
_OPEN: Final = frozenset(("/healthz", "/readyz", "/metrics"))
MINUTE: Final = 60
DAY: Final = 86_400


class Spent(NamedTuple):
    """What a key has used: in this minute and in the one before, and today. Minutes and days begin at multiples."""

    requests: tuple[int, int] = (0, 0)
    tokens: tuple[int, int] = (0, 0)
    usd: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """The gateway's "no" to a call: an HTTP status, a stable word, OpenAI's `type`; `retry_after` in seconds."""

    status: int
    code: str
    message: str
    kind: str = "invalid_request_error"
    retry_after: int | None = None


def authorise(
    key: Key | None, scope: Scope, now: float, spent: Spent | None = None, secret: str = ""
) -> Refusal | None:
    """None where the call may go on. `key` is the one found for `secret`, `now` epoch seconds; `spent` where it counts.

    No message repeats any part of a secret.
    """
    if key is None:
        return _unknown(secret)
    if key.expires_at is not None and now >= key.expires_at:
        return Refusal(status=401, code="expired_api_key", message=f"{key.id} has expired; ask for another")
    if scope not in key.scopes:
        return Refusal(
            status=403,
            code="scope_missing",
            message=f"{key.id} may not do this: it needs the scope {scope}, and has {', '.join(sorted(key.scopes))}",
            kind="permission_error",
        )
    return None if spent is None else _over(key, now, spent)


def may_use(key: Key, model: str) -> Refusal | None:
    """None where the key's calls may be routed to `model`, a name of routing.yaml."""
    if not key.models or model in key.models:
        return None
    return Refusal(
        status=403,
        code="model_not_allowed",
        message=f"{key.id} may not use {model}, to which this call is routed",
        kind="permission_error",
    )


def scope_of(path: str) -> Scope | None:
    """What a path outside the relayed ones needs; None for what anybody may ask. What is not known is admin's."""
    if path in _OPEN:
        return None
    if path == "/v1/feedback":
        return Scope.FEEDBACK
    return Scope.DATA if path.startswith("/v1/") else Scope.ADMIN


def bearer(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The secret of the first `Authorization: Bearer` header; "" where there is none. Names are lower case."""
    for name, value in headers:
        if name == b"authorization":
            return value[7:].strip().decode("latin-1") if value[:7].lower() == b"bearer " else ""
    return ""


def without_credentials(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The headers that may go on: no Authorization, and no other credential in which one of our secrets stands."""
    return [
        (name, value)
        for name, value in headers
        if name not in _CREDENTIALS or (name != b"authorization" and not _OURS.search(value))
    ]


def identified(headers: Mapping[str, str], metadata: object, key: Key) -> tuple[dict[str, str], dict[str, str]]:
    """Headers and body metadata with what the key says: its client always, its workload where nothing names one."""
    sent = dict(headers)
    told = {k: v for k, v in metadata.items() if isinstance(v, str)} if isinstance(metadata, dict) else {}
    if key.client:
        sent["x-client-id"] = key.client
        if "client_id" in told:
            told["client_id"] = key.client
    if key.workload and not (sent.get("x-workload-id") or told.get("workload_id")):
        sent["x-workload-id"] = key.workload
    return sent, told


def secret_of(entropy: bytes) -> str:
    """The secret that carries 32 random bytes."""
    text = _base62(int.from_bytes(entropy), _RANDOM)
    return f"{_PREFIX}{text}{_checksum(text)}"


def well_formed(secret: str) -> bool:
    """Whether this has the form of a secret and its checksum holds: no key need exist for it."""
    found = _SECRET.fullmatch(secret)
    return found is not None and _checksum(found[1]) == found[2]


def digest_of(secret: str) -> str:
    """What is stored of a secret: its SHA-256 in hexadecimal."""
    return sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def _unknown(secret: str) -> Refusal:
    if not secret:
        return Refusal(
            status=401,
            code="missing_api_key",
            message="this gateway wants a key: Authorization: Bearer us-...; `understudy keys create` makes one",
        )
    why = (
        "it was revoked, or is another gateway's"
        if well_formed(secret)
        else "it is mistyped, or no key of this gateway"
    )
    return Refusal(status=401, code="invalid_api_key", message=f"the key is not valid: {why}")


def _over(key: Key, now: float, spent: Spent) -> Refusal | None:
    """The limit that is reached."""
    for what, limit, used in (("requests", key.rpm, spent.requests), ("tokens", key.tpm, spent.tokens)):
        if limit is not None and (seconds := _wait(limit, used, now % MINUTE)) > 0:
            return Refusal(
                status=429,
                code="rate_limit_exceeded",
                message=f"{key.id} has reached its limit of {limit} {what} a minute; try again in {seconds} s",
                kind=what,
                retry_after=seconds,
            )
    if key.daily_usd is not None and spent.usd >= key.daily_usd:
        return Refusal(
            status=429,
            code="insufficient_quota",
            message=f"{key.id} has spent its {key.daily_usd:g} USD of today (UTC)",
            kind="insufficient_quota",
            retry_after=math.ceil(DAY - now % DAY),
        )
    return None


def _wait(limit: int, used: tuple[int, int], second: float) -> int:
    """Whole seconds until there is room, 0 where there is; `second` is the minute's, 0 <= second < 60.

    What counts is this minute's use and what is left of the last one's, which fades evenly: it must be below `limit`.
    """
    now, before = used
    if now + before * (1 - second / MINUTE) < limit:
        return 0
    if now < limit:
        return math.floor(MINUTE * (1 - (limit - now) / before) - second) + 1
    return math.floor(2 * MINUTE - second - MINUTE * limit / now) + 1


def _base62(number: int, length: int) -> str:
    digits = []
    for _ in range(length):
        number, digit = divmod(number, 62)
        digits.append(_ALPHABET[digit])
    return "".join(reversed(digits))


def _checksum(text: str) -> str:
    return _base62(zlib.crc32(text.encode()), _CHECK)
