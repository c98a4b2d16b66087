"""Compares two replies to one request, without a model's help: tool names, whole calls, and plain text. Pure."""

import json
import unicodedata
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gateway.records import JSON

__all__ = ["Call", "Scores", "calls_of", "canonical", "message_of", "normalised", "score"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One tool call. `arguments` is the parsed object, or the raw text where it is not a JSON object."""

    name: str
    arguments: Any

    @property
    def valid(self) -> bool:
        return isinstance(self.arguments, dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Agreement of a reply with its reference, 1.0 or 0.0, and the reason in one word.

    `tool_name`: the same tools are called, in any order; to call or not to call is part of it. `tool_call`: with the
    same arguments too. Where neither reply calls a tool, both say whether the normalised texts are equal.
    """

    tool_name: float
    tool_call: float
    reason: str

    def metrics(self) -> dict[str, float]:
        return {"tool_name": self.tool_name, "tool_call": self.tool_call}


def score(reference: JSON | None, candidate: JSON | None) -> Scores:
    """Compare two chat completion responses. A reply that is missing or has no message scores 0: `no_reply`."""
    expected, got = message_of(reference), message_of(candidate)
    if expected is None:
        return Scores(tool_name=0.0, tool_call=0.0, reason="no_reference")
    if got is None:
        return Scores(tool_name=0.0, tool_call=0.0, reason="no_reply")
    wanted, made = calls_of(expected), calls_of(got)
    if not wanted and not made:
        same = normalised(_text(expected)) == normalised(_text(got))
        return Scores(tool_name=float(same), tool_call=float(same), reason="same" if same else "text_differs")
    if not made:
        return Scores(tool_name=0.0, tool_call=0.0, reason="missed_call")
    if not wanted:
        return Scores(tool_name=0.0, tool_call=0.0, reason="false_call")
    if Counter(call.name for call in wanted) != Counter(call.name for call in made):
        return Scores(tool_name=0.0, tool_call=0.0, reason="names_differ")
    if not all(call.valid for call in made):
        return Scores(tool_name=1.0, tool_call=0.0, reason="arguments_invalid")
    if Counter(map(_key, wanted)) != Counter(map(_key, made)):
        return Scores(tool_name=1.0, tool_call=0.0, reason="arguments_differ")
    return Scores(tool_name=1.0, tool_call=1.0, reason="same")


def message_of(response: JSON | None) -> JSON | None:
    """The first choice's message, or None where the response has no such thing."""
    choices = response.get("choices") if isinstance(response, Mapping) else None
    first = choices[0] if isinstance(choices, list) and choices else None
    message = first.get("message") if isinstance(first, Mapping) else None
    return dict(message) if isinstance(message, Mapping) else None


def calls_of(message: Mapping[str, Any]) -> list[Call]:
    """The message's tool calls; one without a name is kept with an empty one, so that it cannot agree."""
    calls = message.get("tool_calls")
    return [_call(entry) for entry in calls] if isinstance(calls, list) else []


def canonical(value: Any) -> str:
    """One text for all values that mean the same: 1 and 1.0, `New  York` and `new york`, keys in any order."""
    return json.dumps(_reduced(value), sort_keys=True, ensure_ascii=False)


def normalised(text: str) -> str:
    """NFKC, without case, with single spaces, trimmed."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _call(entry: Any) -> Call:
    function = entry.get("function") if isinstance(entry, Mapping) else None
    if not isinstance(function, Mapping):
        return Call(name="", arguments=None)
    raw = function.get("arguments")
    return Call(name=str(function.get("name") or ""), arguments=_parsed(raw) if isinstance(raw, str) else raw)


def _parsed(raw: str) -> Any:
    if not raw.strip():
        return {}  # a call of a tool without arguments: some servers send an empty text
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return raw
    return value if isinstance(value, dict) else raw


def _key(call: Call) -> tuple[str, str]:
    return call.name, canonical(call.arguments)


def _text(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        return " ".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return content if isinstance(content, str) else ""


def _reduced(value: Any) -> Any:
    match value:
        case bool() | None:
            return value
        case float():
            return int(value) if value.is_integer() else value
        case str():
            return normalised(value)
        case list() | tuple():
            return [_reduced(entry) for entry in value]
        case Mapping():
            return {str(key): _reduced(entry) for key, entry in value.items()}
        case _:
            return value
