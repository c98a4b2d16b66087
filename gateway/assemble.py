"""A streamed reply, assembled into the one that a call without streaming would have had. Pure; runs in the shipper."""

from collections.abc import Iterator
from typing import Any, TypeGuard

import orjson

from gateway.records import JSON, Usage

__all__ = ["assemble", "events", "usage_of"]


def assemble(raw: bytes) -> JSON | None:
    """One reply from the bytes of an SSE stream; of a broken stream, what came. None when no event was JSON."""
    whole: JSON | None = None
    choices: dict[int, JSON] = {}
    for event in events(raw):
        if event.get("type") in ("response.completed", "response.incomplete", "response.failed"):
            response = event.get("response")
            return response if isinstance(response, dict) else event
        whole = {**event, **{k: v for k, v in (whole or {}).items() if v is not None and k not in ("usage", "error")}}
        for key in ("usage", "error"):
            if event.get(key) is not None:
                whole[key] = event[key]
        for delta in _list(event.get("choices")):
            if isinstance(delta, dict):
                _merge_choice(choices.setdefault(_index(delta.get("index"), 0), {}), delta)
    if whole is None:
        return None
    if isinstance(kind := whole.get("object"), str):
        whole["object"] = kind.removesuffix(".chunk")
    if choices or "choices" in whole:
        whole["choices"] = [_finished(index, choices[index]) for index in sorted(choices)]
    return whole


def events(raw: bytes) -> Iterator[JSON]:
    """The JSON objects of a stream's `data:` fields; comments, other fields and the end mark are passed over."""
    for block in raw.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n\n"):
        data = b"\n".join(line[5:].removeprefix(b" ") for line in block.split(b"\n") if line.startswith(b"data:"))
        if not data or data == b"[DONE]":
            continue
        try:
            event = orjson.loads(data)
        except orjson.JSONDecodeError:
            continue
        if isinstance(event, dict):
            yield event


def usage_of(reply: JSON | None) -> Usage | None:
    """The tokens a reply counts, in chat's or in the responses API's names."""
    usage = (reply or {}).get("usage")
    if not isinstance(usage, dict):
        return None
    read = usage.get("prompt_tokens", usage.get("input_tokens"))
    written = usage.get("completion_tokens", usage.get("output_tokens", 0))
    if not _is_count(read) or not _is_count(written):
        return None
    return Usage(input_tokens=read, output_tokens=written)


def _is_count(value: Any) -> TypeGuard[int]:
    """An upstream may claim any number; one that 64 bits cannot hold counts nothing."""
    return isinstance(value, int) and 0 <= value < 2**63


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _index(value: Any, otherwise: int) -> int:
    return value if isinstance(value, int) else otherwise


def _dict_in(whole: JSON, key: str) -> dict[Any, Any]:
    """The object under that key, made where there is none: whatever an upstream wrote there before."""
    if not isinstance(whole.get(key), dict):
        whole[key] = {}
    found: dict[Any, Any] = whole[key]
    return found


def _merge_choice(into: JSON, delta: JSON) -> None:
    for key, value in delta.items():
        if key in ("delta", "message") and isinstance(value, dict):
            _merge_message(_dict_in(into, "message"), value)
        elif key == "logprobs" and isinstance(value, dict):
            kept = _dict_in(into, "logprobs")
            for name, entries in value.items():
                kept[name] = [*_list(kept.get(name)), *entries] if isinstance(entries, list) else entries
        elif key == "text" and isinstance(value, str):
            into["text"] = _text(into.get("text")) + value
        elif value is not None or key not in into:
            into[key] = value


def _merge_message(into: JSON, delta: JSON) -> None:
    for key, value in delta.items():
        if key == "tool_calls" and isinstance(value, list):
            calls = _dict_in(into, "tool_calls")
            for position, call in enumerate(value):
                if isinstance(call, dict):
                    _merge_call(calls.setdefault(_index(call.get("index"), position), {}), call)
        elif isinstance(value, str) and isinstance(into.get(key), str) and key != "role":
            into[key] += value
        elif value is not None or key not in into:
            into[key] = value


def _merge_call(into: JSON, delta: JSON) -> None:
    for key, value in delta.items():
        if key == "function" and isinstance(value, dict):
            function = _dict_in(into, "function")
            for part in ("name", "arguments"):
                function[part] = _text(function.get(part)) + _text(value.get(part))
        elif key != "index" and value is not None:
            into[key] = value


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _order(key: int | str) -> tuple[bool, int | str]:
    """Numbers first: an upstream that sends an object where a list belongs has texts for keys."""
    return isinstance(key, str), key


def _finished(index: int, choice: JSON) -> JSON:
    done: dict[str, Any] = {**choice, "index": index}
    message = done.get("message")
    if isinstance(message, dict):
        calls = message.get("tool_calls")
        if isinstance(calls, dict):
            message["tool_calls"] = [calls[key] for key in sorted(calls, key=_order)]
        message.setdefault("content", None)
    return done
