"""What Anthropic's API answers at /v1/messages, as scripts for a fake upstream: a protocol that is not OpenAI's."""

from collections.abc import Sequence

import orjson

from tests.gateway.fakes import Script, plain, sse

USAGE = {"input_tokens": 12, "output_tokens": 5}
TEXT = {"type": "text", "text": "hello"}
TOOL = {"type": "tool_use", "id": "tu_1", "name": "look_up", "input": {"order": 7}}


def message(*content: dict, stop: str = "end_turn", extra: str = "") -> Script:
    """A whole reply."""
    body = {
        "id": "msg_1", "type": "message", "role": "assistant", "model": "claude-sonnet-4-5", "content": list(content),
        "stop_reason": stop, "usage": USAGE,
    }  # fmt: skip
    return plain(orjson.dumps(body), extra=extra)


def refusal(status: str, kind: str, text: str, *, extra: str = "") -> Script:
    """An error."""
    body = {"type": "error", "error": {"type": kind, "message": text}}
    return plain(orjson.dumps(body), status=status, extra=extra)


def event(kind: str, **more: object) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (kind.encode(), orjson.dumps({"type": kind} | more))


def text(*deltas: str, index: int = 0) -> list[bytes]:
    """The events of a text block."""
    parts = [{"type": "text_delta", "text": delta} for delta in deltas]
    return block(index, {"type": "text", "text": ""}, parts)


def tool(*deltas: str, index: int = 0) -> list[bytes]:
    """The events of a tool call whose arguments come in parts."""
    parts = [{"type": "input_json_delta", "partial_json": delta} for delta in deltas]
    return block(index, TOOL | {"input": {}}, parts)


def block(index: int, begin: dict, parts: Sequence[dict]) -> list[bytes]:
    return [
        event("content_block_start", index=index, content_block=begin),
        *(event("content_block_delta", index=index, delta=part) for part in parts),
        event("content_block_stop", index=index),
    ]


BEGIN = event(
    "message_start",
    message={
        "id": "msg_2", "type": "message", "role": "assistant", "model": "claude-sonnet-4-5", "content": [],
        "stop_reason": None, "usage": {"input_tokens": 12, "output_tokens": 1},
    },
)  # fmt: skip


def ending(stop: str = "end_turn") -> list[bytes]:
    delta = {"stop_reason": stop, "stop_sequence": None}
    return [event("message_delta", delta=delta, usage={"output_tokens": 5}), event("message_stop")]


def stream(*blocks: list[bytes], stop: str = "end_turn", gap: float = 0.0) -> Script:
    """A whole stream."""
    return sse(BEGIN, *(one for events in blocks for one in events), *ending(stop), gap=gap)
