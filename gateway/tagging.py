"""Reads from one call what routing and the log need: model, stream, tools, workload, client, session. Pure."""

import re
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from gateway.errors import RequestRefused
from routing.conversation import conversation_key

__all__ = ["Fields", "Tags", "conversation_of", "read_fields", "tag", "with_model"]

_TOKEN: Final = re.compile(rb'"(?:[^"\\]|\\.)*"|[{}\[\]]')
_MODEL: Final = re.compile(rb'"model"\s*:\s*("(?:[^"\\]|\\.)*"|null)')
_MAX_TAG: Final = 256


class Fields(msgspec.Struct):
    """The fields of a request body that the gateway reads; what it does not read stays bytes."""

    model: Any = None
    stream: Any = None
    metadata: Any = None
    user: Any = None
    safety_identifier: Any = None
    previous_response_id: Any = None
    conversation: Any = None
    stream_options: msgspec.Raw = msgspec.Raw()
    tools: msgspec.Raw = msgspec.Raw()
    messages: msgspec.Raw = msgspec.Raw()
    input: msgspec.Raw = msgspec.Raw()
    instructions: msgspec.Raw = msgspec.Raw()
    tensorzero_tags: Any = msgspec.field(default=None, name="tensorzero::tags")
    tensorzero_episode: Any = msgspec.field(default=None, name="tensorzero::episode_id")


_fields = msgspec.json.Decoder(Fields)


class Tags(msgspec.Struct, frozen=True, kw_only=True):
    """Who sent a call and what it belongs to; "" where nothing says so."""

    workload: str
    client: str
    session: str
    user: str
    metadata: Mapping[str, str]


def read_fields(body: bytes) -> Fields:
    """Parse a request body once. Raises RequestRefused (400) when it is not a JSON object."""
    try:
        return _fields.decode(body)
    except msgspec.ValidationError as error:
        raise RequestRefused(400, "the request body must be a JSON object", code="invalid_json") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestRefused(400, f"the request body is not JSON: {error}", code="invalid_json") from error


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
    try:
        return conversation_key(msgspec.json.decode(bytes(fields.messages) or b"[]"))
    except (msgspec.DecodeError, RecursionError):
        return ""


def with_model(body: bytes, fields: Fields, name: str) -> bytes:
    """The same bytes with another value of the top-level `model`."""
    if fields.model == name or not isinstance(fields.model, str | None):
        return body  # a model that is no text is the upstream's to refuse
    value = msgspec.json.encode(name)
    span = _first_key_model(body) or _top_level_model(body)
    if span is None and fields.model is not None:  # its key is written with escapes: only a rewrite finds it
        return msgspec.json.encode(msgspec.json.decode(body) | {"model": name})
    if span is None:
        start = body.index(b"{") + 1
        comma = b"" if body[start:].lstrip().startswith(b"}") else b","
        return body[:start] + b'"model":' + value + comma + body[start:]
    return body[: span[0]] + value + body[span[1] :]


def _first_key_model(body: bytes) -> tuple[int, int] | None:
    """The quick way for most bodies: one `model` key, before anything is nested."""
    found = _MODEL.search(body)
    if found is None or body.count(b'"model"') != 1:
        return None
    before = body[: found.start()]
    return found.span(1) if before.count(b"{") == 1 and b"[" not in before else None


def _top_level_model(body: bytes) -> tuple[int, int] | None:
    """Where the last top-level `model` value stands: what a JSON parser takes when a key is given twice."""
    depth, span = 0, None
    for token in _TOKEN.finditer(body):
        text = token.group()
        if text in (b"{", b"["):
            depth += 1
        elif text in (b"}", b"]"):
            depth -= 1
        elif depth == 1 and text == b'"model"' and (match := _MODEL.match(body, token.start())):
            span = match.span(1)
    return span


def _clean(value: Any) -> str:
    return value[:_MAX_TAG] if isinstance(value, str) else ""
