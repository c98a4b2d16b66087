"""What the strict upstream answers: a function of the request alone, so that two clients can be compared. Pure."""

import base64
import json
import struct
from collections.abc import Iterator
from hashlib import sha256
from typing import Any

from jsonschema import Draft202012Validator

JSON = dict[str, Any]
CREATED = 1_763_712_000
MODEL = "gpt-4o-mini"

_TEXT: JSON = {"type": "string"}
_ANY: JSON = {}
_PARTS: JSON = {"type": ["string", "array", "null"]}
_MESSAGE: JSON = {
    "type": "object",
    "required": ["role"],
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
        "content": _PARTS,
        "name": _TEXT,
        "tool_calls": {"type": "array", "minItems": 1},
        "tool_call_id": _TEXT,
        "refusal": {"type": ["string", "null"]},
    },
    "additionalProperties": False,
}
_COMMON: JSON = {"model": _TEXT, "user": _TEXT, "metadata": {"type": "object"}, "temperature": {"type": "number"}}
_SAMPLING: JSON = {"top_p": {"type": "number"}, "seed": {"type": "integer"}, "stop": _ANY}
_STREAM: JSON = {
    "stream": {"type": "boolean"},
    "stream_options": {
        "type": "object",
        "properties": {"include_usage": {"type": "boolean"}},
        "additionalProperties": False,
    },
}


def _schema(required: str, **properties: JSON) -> Draft202012Validator:
    return Draft202012Validator(
        {
            "type": "object",
            "required": required.split(),
            "properties": {**_COMMON, **properties},
            "additionalProperties": False,
        }
    )


SCHEMAS = {
    "/v1/chat/completions": _schema(
        "model messages",
        messages={"type": "array", "minItems": 1, "items": _MESSAGE},
        max_tokens={"type": "integer"},
        max_completion_tokens={"type": "integer"},
        n={"type": "integer"},
        tools={"type": "array", "minItems": 1},
        tool_choice=_ANY,
        parallel_tool_calls={"type": "boolean"},
        response_format={"type": "object", "required": ["type"]},
        store={"type": "boolean"},
        **_SAMPLING,
        **_STREAM,
    ),
    "/v1/completions": _schema(
        "model prompt", prompt=_ANY, max_tokens={"type": "integer"}, echo={"type": "boolean"}, **_SAMPLING, **_STREAM
    ),
    "/v1/embeddings": _schema(
        "model input", input=_ANY, encoding_format={"enum": ["float", "base64"]}, dimensions={"type": "integer"}
    ),
    "/v1/responses": _schema(
        "model input",
        input=_ANY,
        instructions=_TEXT,
        max_output_tokens={"type": "integer"},
        tools={"type": "array"},
        tool_choice=_ANY,
        text={"type": "object"},
        store={"type": "boolean"},
        previous_response_id=_TEXT,
        stream={"type": "boolean"},
    ),
    "/v1/moderations": _schema("input", input=_ANY),
}


def digest(*parts: Any) -> str:
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def text_of(content: Any) -> str:
    """Of a message's content, in chat's and in the responses API's shape."""
    if isinstance(content, list):
        return " ".join(str(part.get("text", part["type"])) for part in content)
    return str(content or "")


def instance(schema: JSON) -> Any:
    """A value that a JSON schema allows, always the same."""
    if "enum" in schema or "const" in schema:
        return schema.get("const", (schema.get("enum") or [None])[0])
    for several in ("anyOf", "oneOf"):
        if several in schema:
            return instance(schema[several][0])
    kind = schema.get("type", "object")
    match kind[0] if isinstance(kind, list) else kind:
        case "object":
            return {name: instance(inner) for name, inner in schema.get("properties", {}).items()}
        case "array":
            return [instance(schema.get("items", {"type": "string"}))]
        case "integer" | "number":
            return 7
        case "boolean":
            return True
        case _:
            return "Zürich"


def _usage(request: JSON, text: str) -> JSON:
    asked = len(json.dumps(request.get("messages", request.get("prompt", ""))).split())
    return {"prompt_tokens": asked, "completion_tokens": len(text), "total_tokens": asked + len(text)}


def _spoken(request: JSON, last: str, wanted: JSON | None) -> str:
    """The text of an answer: in the form that was asked for, else the question back to front."""
    if wanted is not None:
        return json.dumps(instance(wanted), ensure_ascii=False)
    return f"{last[::-1]} — ✓" if last else "…"


def chat_messages(request: JSON) -> list[JSON]:
    """The answer's message for each choice: a call of each tool, once; else text."""
    last = request["messages"][-1]
    if request.get("tools") and last["role"] != "tool" and request.get("tool_choice") != "none":
        calls = [
            {
                "id": f"call_{digest(index, tool)}",
                "type": "function",
                "function": {
                    "name": tool["function"]["name"],
                    "arguments": json.dumps(instance(tool["function"].get("parameters", {})), ensure_ascii=False),
                },
            }
            for index, tool in enumerate(request["tools"])
        ]
        return [{"role": "assistant", "content": None, "refusal": None, "tool_calls": calls}]
    form = request.get("response_format", {"type": "text"})
    wanted = {"json_schema": form.get("json_schema", {}).get("schema"), "json_object": {"type": "object"}}
    text = _spoken(request, text_of(last["content"]), wanted.get(form["type"]))
    return [
        {"role": "assistant", "content": f"{text}{' again' * n}", "refusal": None} for n in range(request.get("n", 1))
    ]


def chat(request: JSON) -> JSON:
    messages = chat_messages(request)
    return {
        "id": f"chatcmpl-{digest(request)}",
        "object": "chat.completion",
        "created": CREATED,
        "model": request["model"],
        "service_tier": "default",
        "system_fingerprint": "fp_1",
        "choices": [
            {
                "index": index,
                "message": message,
                "logprobs": None,
                "finish_reason": "tool_calls" if "tool_calls" in message else "stop",
            }
            for index, message in enumerate(messages)
        ],
        "usage": _usage(request, str(messages)),
    }


def pieces(text: str, size: int = 5) -> list[str]:
    return [text[at : at + size] for at in range(0, len(text), size)]


def chat_events(request: JSON) -> Iterator[JSON]:
    """The same answer in chunks: role, pieces, finish reason, and the tokens where they were asked for."""
    whole = chat(request)
    head = {k: whole[k] for k in ("id", "created", "model", "system_fingerprint")} | {"object": "chat.completion.chunk"}
    asked = request.get("stream_options", {}).get("include_usage", False)
    more = {"usage": None} if asked else {}
    for choice in whole["choices"]:
        index, message = choice["index"], choice["message"]
        deltas = [{"role": "assistant", "content": "" if message["content"] else None}]
        deltas += [{"content": piece} for piece in pieces(message["content"] or "")]
        for number, call in enumerate(message.get("tool_calls", [])):
            deltas.append({"tool_calls": [call | {"index": number, "function": call["function"] | {"arguments": ""}}]})
            deltas += [
                {"tool_calls": [{"index": number, "function": {"arguments": piece}}]}
                for piece in pieces(call["function"]["arguments"])
            ]
        for delta in deltas:
            yield head | {"choices": [{"index": index, "delta": delta, "finish_reason": None}]} | more
        yield head | {"choices": [{"index": index, "delta": {}, "finish_reason": choice["finish_reason"]}]} | more
    if asked:
        yield head | {"choices": [], "usage": whole["usage"]}


def completion(request: JSON) -> JSON:
    prompts = request["prompt"] if isinstance(request["prompt"], list) else [request["prompt"]]
    texts = [_spoken(request, str(prompt), None) for prompt in prompts]
    return {
        "id": f"cmpl-{digest(request)}",
        "object": "text_completion",
        "created": CREATED,
        "model": request["model"],
        "choices": [
            {"index": index, "text": text, "logprobs": None, "finish_reason": "stop"}
            for index, text in enumerate(texts)
        ],
        "usage": _usage(request, "".join(texts)),
    }


def completion_events(request: JSON) -> Iterator[JSON]:
    whole = completion(request)
    for choice in whole["choices"]:
        for piece in pieces(choice["text"]):
            yield {k: whole[k] for k in ("id", "object", "created", "model")} | {
                "choices": [choice | {"text": piece, "finish_reason": None}]
            }
        yield whole | {"choices": [choice | {"text": ""}]}


def embeddings(request: JSON) -> JSON:
    given = request["input"]
    inputs = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
    data = []
    for index, one in enumerate(inputs):
        seed = sha256(json.dumps(one).encode()).digest()
        vector = [byte / 256 - 0.5 for byte in seed[: request.get("dimensions", 8)]]
        packed = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
        plain = request.get("encoding_format", "float") == "float"
        data.append({"object": "embedding", "index": index, "embedding": vector if plain else packed})
    usage = {"prompt_tokens": len(inputs), "total_tokens": len(inputs)}
    return {"object": "list", "data": data, "model": request["model"], "usage": usage}


def response(request: JSON) -> JSON:
    """An answer of the responses API, finished."""
    given = request["input"]
    last = given if isinstance(given, str) else text_of(given[-1].get("content", given[-1].get("output")))
    identifier = digest(request)
    if request.get("tools") and not any(isinstance(one, dict) and "output" in one for one in given):
        output = [
            {
                "id": f"fc_{digest(tool)}",
                "type": "function_call",
                "status": "completed",
                "call_id": f"call_{digest(tool)}",
                "name": tool["name"],
                "arguments": json.dumps(instance(tool["parameters"]), ensure_ascii=False),
            }
            for tool in request["tools"]
        ]
    else:
        form = request.get("text", {}).get("format", {})
        text = _spoken(request, last, form.get("schema"))
        part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
        output = [
            {
                "id": f"msg_{identifier}",
                "type": "message",
                "status": "completed",
                "role": "assistant",
                "content": [part],
            }
        ]
    size = len(json.dumps(output))
    return {
        "id": f"resp_{identifier}",
        "object": "response",
        "created_at": CREATED,
        "status": "completed",
        "error": None,
        "incomplete_details": None,
        "instructions": request.get("instructions"),
        "max_output_tokens": request.get("max_output_tokens"),
        "metadata": request.get("metadata", {}),
        "model": request["model"],
        "output": output,
        "parallel_tool_calls": True,
        "previous_response_id": request.get("previous_response_id"),
        "temperature": 1.0,
        "text": request.get("text", {"format": {"type": "text"}}),
        "tool_choice": "auto",
        "tools": request.get("tools", []),
        "top_p": 1.0,
        "usage": {
            "input_tokens": 5,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": size,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 5 + size,
        },
    }


def response_events(request: JSON) -> Iterator[JSON]:
    """The typed events of the same answer, numbered."""
    for number, event in enumerate(_response_events(response(request))):
        yield event | {"sequence_number": number}


def _response_events(whole: JSON) -> Iterator[JSON]:
    begun = whole | {"status": "in_progress", "output": [], "usage": None}
    yield {"type": "response.created", "response": begun}
    yield {"type": "response.in_progress", "response": begun}
    for index, item in enumerate(whole["output"]):
        at = {"item_id": item["id"], "output_index": index}
        if item["type"] == "function_call":
            opened = item | {"status": "in_progress", "arguments": ""}
            yield {"type": "response.output_item.added", "output_index": index, "item": opened}
            for piece in pieces(item["arguments"]):
                yield {"type": "response.function_call_arguments.delta", "delta": piece} | at
            said = {"arguments": item["arguments"], "name": item["name"]}
            yield {"type": "response.function_call_arguments.done"} | said | at
        else:
            part, at = item["content"][0], at | {"content_index": 0}
            opened = item | {"status": "in_progress", "content": []}
            yield {"type": "response.output_item.added", "output_index": index, "item": opened}
            yield {"type": "response.content_part.added", "part": part | {"text": ""}} | at
            for piece in pieces(part["text"]):
                yield {"type": "response.output_text.delta", "delta": piece, "logprobs": []} | at
            yield {"type": "response.output_text.done", "text": part["text"], "logprobs": []} | at
            yield {"type": "response.content_part.done", "part": part} | at
        yield {"type": "response.output_item.done", "output_index": index, "item": item}
    yield {"type": "response.completed", "response": whole}
