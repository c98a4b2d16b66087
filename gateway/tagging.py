"""Finds out whom a call is from and what it belongs to, and gives its body another model. Pure."""

import re
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from gateway.fields import Fields, Tags
from routing.conversation import conversation_key

__all__ = ["conversation_of", "tag", "with_model"]

_KEY: Final = b'"model"'
_ESCAPED: Final = b"\\u006"  # each letter of `model` as JSON may escape it
_VALUE: Final = re.compile(rb'\s*:\s*("(?:[^"\\]++|\\.)*+")', re.DOTALL)
_EMPTY: Final = re.compile(rb"\s*\}")
_MAX_TAG: Final = 256


_messages = msgspec.json.Decoder(list[msgspec.Raw])
_values = msgspec.json.Decoder(dict[str, msgspec.Raw])


def tag(headers: Mapping[str, str], fields: Fields) -> Tags:
    """Headers win over body metadata. `headers` has lower-case names."""
    given = fields.metadata
    metadata = {k: v for k, v in given.items() if isinstance(v, str)} if isinstance(given, dict) else {}
    return Tags(
        workload=_clean(headers.get("x-workload-id") or metadata.get("workload_id")),
        client=_clean(headers.get("x-client-id") or metadata.get("client_id")),
        session=_clean(headers.get("x-session-id") or metadata.get("session_id")),
        user=_clean(fields.user or fields.safety_identifier or metadata.get("user_id")),
        metadata=metadata,
    )


def conversation_of(fields: Fields) -> str:
    """The sticky key of a conversation that names itself by nothing else; "" where there are no messages."""
    first: list[Any] = []
    try:
        for message in _messages.decode(fields.messages) if len(fields.messages) else ():
            first.append(msgspec.json.decode(message))
            if isinstance(first[-1], dict) and first[-1].get("role") == "user":
                break
    except (msgspec.DecodeError, RecursionError):
        return ""
    return conversation_key(first)


def with_model(body: bytes, fields: Fields, name: str) -> bytes:
    """The same bytes with another top-level `model`; a `model` that is no text is the upstream's to refuse.

    Where `model` may be there twice, or stands beside another key of that name further in, the object is written anew
    from the bytes of its values, the last of a key: whoever reads it reads what the gateway has read.
    """
    last = body.rfind(_KEY)  # rfind looks through a body three times as fast as find, count and in
    if (b"\\" not in body or body.rfind(_ESCAPED) < 0) and (last < 0 or body.rfind(_KEY, 0, last) < 0):
        if last < 0:
            start = body.index(b"{") + 1
            comma = b"" if _EMPTY.match(body, start) else b","
            return body[:start] + b'"model":' + msgspec.json.encode(name) + comma + body[start:]
        if isinstance(fields.model, str):
            if fields.model == name:
                return body
            start, end = _value(body, last + len(_KEY), fields.model)
            around = memoryview(body)  # so that a large one is copied once
            return b"".join((around[:start], msgspec.json.encode(name), around[end:]))
        if fields.model is not None:
            return body
    values = _values.decode(body)
    if isinstance(fields.model, str | None):
        values["model"] = msgspec.Raw(msgspec.json.encode(name))
    return msgspec.json.encode(values)


def _value(body: bytes, behind: int, text: str) -> tuple[int, int]:
    """Where the string that is `text` stands, behind its key; mostly it is written without escapes."""
    start, plain = body.index(b'"', behind), b'"%b"' % text.encode("utf-8", "surrogatepass")
    if body.startswith(plain, start):
        return start, start + len(plain)
    return _VALUE.match(body, behind).span(1)  # type: ignore[union-attr]  # it is a text


def _clean(value: Any) -> str:
    return value[:_MAX_TAG] if isinstance(value, str) else ""
