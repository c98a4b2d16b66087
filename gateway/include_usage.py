"""Asks an upstream for the tokens of a stream where the client did not, and keeps the answer from the client. Pure."""

from typing import Final

import msgspec
import orjson

from gateway.fields import Fields

__all__ = ["UsageFilter", "with_usage"]

_MAX_EVENT: Final = 1024 * 1024


def with_usage(body: bytes, fields: Fields) -> bytes | None:
    """The body of a streamed call that asks for usage too; None where there is nothing to add."""
    if fields.stream is not True:
        return None
    given = bytes(fields.stream_options)
    options = orjson.loads(given) if given else None
    if options is None and not given:
        start = body.index(b"{") + 1
        return body[:start] + b'"stream_options":{"include_usage":true},' + body[start:]
    if options is not None and (not isinstance(options, dict) or options.get("include_usage") is True):
        return None
    return msgspec.json.encode(
        msgspec.json.decode(body) | {"stream_options": (options or {}) | {"include_usage": True}}
    )


class UsageFilter:
    """Passes a stream's events on, all but the one that holds only usage. Events are passed whole."""

    def __init__(self) -> None:
        self._held = b""

    def feed(self, chunk: bytes) -> bytes:
        """What the client may have now."""
        held = self._held + chunk
        end = max(held.rfind(b"\n\n") + 2, held.rfind(b"\r\n\r\n") + 4, held.rfind(b"\r\r") + 2)
        if end < 4:
            end = 0
        if len(held) - end > _MAX_EVENT:  # no stream of events: as it is
            end = len(held)
        self._held = held[end:]
        return self._without_usage(held[:end])

    def flush(self) -> bytes:
        """What is left at the stream's end."""
        held, self._held = self._held, b""
        return held

    def _without_usage(self, events: bytes) -> bytes:
        if b'"usage"' not in events:
            return events
        separator = b"\r\n\r\n" if b"\r\n\r\n" in events else b"\n\n"
        kept = [event for event in events.split(separator) if not _only_usage(event)]
        return separator.join(kept)


def _only_usage(event: bytes) -> bool:
    """True for `{"choices": [], "usage": {…}}`, the event that `include_usage` adds."""
    if b'"usage"' not in event:
        return False
    data = b"\n".join(line[5:] for line in event.splitlines() if line.startswith(b"data:"))
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError:
        return False
    return isinstance(value, dict) and value.get("choices") == [] and isinstance(value.get("usage"), dict)
