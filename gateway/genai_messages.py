"""What was said in an exchange, as OpenTelemetry's conventions for generative AI write messages. Pure."""

from typing import Any

import orjson

from gateway.records import JSON, Exchange

__all__ = ["content_of"]


def content_of(exchange: Exchange) -> dict[str, Any]:
    """The attributes that hold the messages, each as JSON text; what the exchange has nothing for is left out."""
    request, response = exchange.request or {}, exchange.response or {}
    messages = _listed(request.get("messages", request.get("input", request.get("prompt"))))
    system = [part for said in messages if said.get("role") in ("system", "developer") for part in _parts(said)]
    if isinstance(instructions := request.get("instructions"), str):
        system.insert(0, {"type": "text", "content": instructions})
    asked = [_message(said) for said in messages if said.get("role") not in ("system", "developer")]
    found = {
        "gen_ai.system_instructions": system,
        "gen_ai.input.messages": asked,
        "gen_ai.output.messages": _output(response),
    }
    try:
        return {name: orjson.dumps(value).decode() for name, value in found.items() if value}
    except TypeError:  # nested deeper than JSON is written
        return {}


def _output(response: JSON) -> list[JSON]:
    """What the model said, of chat, text completions or the responses API."""
    choices = [one for one in _list(response.get("choices")) if isinstance(one, dict)]
    said = [
        _message(_dict(one.get("message")) or {"content": one.get("text")}, "assistant")
        | {"finish_reason": one.get("finish_reason") or ""}
        for one in choices
    ]
    return said or [_message(one, "assistant") for one in _list(response.get("output")) if isinstance(one, dict)]


def _message(said: JSON, role: str = "user") -> JSON:
    return {"role": str(said.get("role") or role), "parts": _parts(said)}


def _parts(said: JSON) -> list[JSON]:
    if said.get("type") == "function_call":
        return [_call(said, said.get("call_id"))]
    if said.get("type") == "function_call_output":
        return [{"type": "tool_call_response", "id": said.get("call_id"), "response": said.get("output")}]
    if said.get("role") == "tool":
        return [{"type": "tool_call_response", "id": said.get("tool_call_id"), "response": said.get("content")}]
    content = said.get("content")
    parts = [_part(one) for one in ([content] if isinstance(content, str) else _list(content))]
    calls = [one for one in _list(said.get("tool_calls")) if isinstance(one, dict)]
    return parts + [_call(_dict(one.get("function")), one.get("id")) for one in calls]


def _part(one: Any) -> JSON:
    """Text is told as the conventions want it; what else there is, an image say, as it came."""
    if isinstance(one, str):
        return {"type": "text", "content": one}
    part = _dict(one)
    return {"type": "text", "content": part["text"]} if isinstance(part.get("text"), str) else part


def _call(function: JSON, identifier: Any) -> JSON:
    name, arguments = function.get("name"), function.get("arguments")
    return {"type": "tool_call", "id": identifier, "name": name, "arguments": arguments}


def _listed(value: Any) -> list[JSON]:
    """The messages of a request: a list of them, one text, or several."""
    said = [value] if isinstance(value, str) else _list(value)
    return [{"content": one} if isinstance(one, str) else one for one in said if isinstance(one, str | dict)]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _dict(value: Any) -> JSON:
    return value if isinstance(value, dict) else {}
