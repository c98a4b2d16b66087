"""From a spooled record to an exchange: bodies parsed, streams assembled, tokens and price worked out. Pure."""

import contextlib
from collections.abc import Mapping
from typing import Any

import orjson

from gateway.assemble import assemble, usage_of
from gateway.encodings import CannotUnpack, unpacked
from gateway.records import JSON, Arm, Attempt, Exchange, MirrorFate, Outcome, Usage
from gateway.tail import Record
from routing.targets import Price

__all__ = ["body_of", "cost_of", "rates", "to_exchange"]

_NOT_FIELDS = ("frame", "at", "pii", "assembled", "span", "span_end", "method", "provider")
_MAX_BODY = 64 * 1024 * 1024


def to_exchange(record: Record) -> Exchange:
    """The exchange that a record holds; one that never ended has the outcome `gateway_killed`.

    Raises ValueError, KeyError or TypeError for a record that is none.
    """
    header: dict[str, Any] = {name: value for name, value in record.header.items() if name not in _NOT_FIELDS}
    counted = header.pop("usage", None)
    price = header.pop("price", None)
    if not record.ended:
        header |= {"arm": header.get("arm", Arm.INCUMBENT), "outcome": Outcome.GATEWAY_KILLED}
        header["stream"] = record.response.startswith((b"data:", b":", b"event:"))
    response = body_of(record.response, header)
    usage = Usage(**counted) if counted else usage_of(response)
    header.pop("encoding", None)
    return Exchange(
        **header
        | {
            "arm": Arm(header["arm"]),
            "outcome": Outcome(header["outcome"]),
            "mirror": MirrorFate(header.get("mirror", MirrorFate.NONE)),
            "attempts": tuple(Attempt(**attempt) for attempt in header.get("attempts", ())),
            "usage": usage,
            "cost_usd": cost_of(usage, price),
            "request": _parsed(record.request),
            "response": response,
        }
    )


def body_of(raw: bytes, header: Mapping[str, Any]) -> JSON | None:
    """A reply's bytes as JSON, unpacked and assembled as its header says."""
    body = _decoded(raw, header.get("encoding", ""))
    if not header.get("stream") or header.get("assembled") or header.get("status", 0) >= 400:
        return _parsed(body)
    return assemble(body) or _raw(body)


def rates(price: Price | None) -> tuple[float, float] | None:
    """A price as a record keeps it: USD for a million tokens, read and written."""
    return None if price is None else (price.input, price.output)


def cost_of(usage: Usage | None, price: tuple[float, float] | None) -> float | None:
    """USD; `price` as `rates` gives it. None where nothing was counted, or nobody knows the price."""
    if usage is None or price is None:
        return None
    return (usage.input_tokens * price[0] + usage.output_tokens * price[1]) / 1e6


def _parsed(body: bytes) -> JSON | None:
    if not body:
        return None
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        return _raw(body)
    return value if isinstance(value, dict) else {"value": value}


def _raw(body: bytes) -> JSON | None:
    return {"raw": body.decode("utf-8", "replace")} if body else None


def _decoded(body: bytes, encoding: str) -> bytes:
    with contextlib.suppress(CannotUnpack):
        return unpacked(body, encoding, _MAX_BODY)
    return body
