"""A stand-in for the production model: an OpenAI-compatible server that answers from a workload's known answers."""

import argparse
import asyncio
import hashlib
import json
import re
import sys
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from flywheel.demo import grammar
from flywheel.demo.workload import Item, Workload, WorkloadError, load

FINGERPRINT = "stand-in"
# More generated items than a demo sends: a generated workload holds every smaller one of its seed.
GENERATED_ITEMS = 6_000
_ARGUMENT_PIECE = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What the stand-in says: a call, or a text when it has no answer."""

    tool: str | None = None
    arguments: str = "{}"
    text: str | None = None


class BadRequest(ValueError):
    """The request cannot be answered; the message goes to the client as it is."""


class StandIn:
    """Looks answers up by the last user message; names another tool for a share of the texts, fixed by seed.

    Arguments come in the order of the tool's schema, as from a server that holds its replies to it.
    """

    def __init__(self, workload: Workload, *, wrong: float, seed: int) -> None:
        self._items = {item.text: item for item in workload.items}
        self._by_tool: dict[str, list[Item]] = {}
        for item in workload.items:
            self._by_tool.setdefault(item.tool, []).append(item)
        functions = (tool["function"] for tool in workload.tools)
        self._order = {function["name"]: list(function["parameters"]["properties"]) for function in functions}
        self._wrong = wrong
        self._seed = seed

    def answer(self, body: Mapping[str, Any]) -> Reply:
        """The reply to a chat completion request. Unknown texts, and tools that were not offered, get plain text."""
        item = self._items.get(_last_user_text(body))
        offered = _offered(body)
        if item is None or item.tool not in offered or body.get("tool_choice") == "none":
            return Reply(text="This is a stand-in for a production model; it knows no answer to that.")
        call = self._mistake(item, offered) if self.is_wrong(item.text) else item
        arguments = {name: call.arguments[name] for name in self._order[call.tool] if name in call.arguments}
        return Reply(tool=call.tool, arguments=json.dumps(arguments, ensure_ascii=False))

    def is_wrong(self, text: str) -> bool:
        """Whether this text is one of those that get a wrong tool."""
        return self._draw("wrong", text) < self._wrong * 2**64

    def _mistake(self, item: Item, offered: Sequence[str]) -> Item:
        others = [tool for tool in sorted(self._by_tool) if tool != item.tool and tool in offered]
        if not others:
            return item
        candidates = self._by_tool[others[self._draw("tool", item.text) % len(others)]]
        model = candidates[self._draw("arguments", item.text) % len(candidates)]
        arguments = {name: item.arguments.get(name, value) for name, value in model.arguments.items()}
        return Item(text=item.text, tool=model.tool, arguments=arguments, template=item.template)

    def _draw(self, purpose: str, text: str) -> int:
        return int.from_bytes(hashlib.sha256(f"{self._seed}\0{purpose}\0{text}".encode()).digest()[:8], "big")


def create_app(workload: Workload, *, latency_s: float = 0.3, wrong: float = 0.04, seed: int = 7) -> Starlette:
    """The server: `/v1/chat/completions`, streamed or not, and `/v1/models`."""
    stand_in = StandIn(workload, wrong=wrong, seed=seed)

    async def completions(request: Request) -> Response:
        try:
            body = _parse(await request.body())
            reply = stand_in.answer(body)
        except BadRequest as error:
            return _error(str(error))
        await asyncio.sleep(latency_s)
        if body.get("stream"):
            return StreamingResponse(_stream(body, reply), media_type="text/event-stream")
        return JSONResponse(_completion(body, reply))

    async def models(_: Request) -> Response:
        data = [{"id": "stand-in", "object": "model", "created": 0, "owned_by": "stand-in"}]
        return JSONResponse({"object": "list", "data": data})

    return Starlette(routes=[Route("/v1/chat/completions", completions, methods=["POST"]), Route("/v1/models", models)])


def _error(message: str) -> JSONResponse:
    error = {"message": message, "type": "invalid_request_error", "code": None, "param": None}
    return JSONResponse({"error": error}, status_code=400)


def _parse(raw: bytes) -> Mapping[str, Any]:
    try:
        body = json.loads(raw)
    except ValueError as error:
        raise BadRequest(f"The body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise BadRequest("The body must be a JSON object.")
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise BadRequest("'messages' must be a list of objects that is not empty.")
    return body


def _last_user_text(body: Mapping[str, Any]) -> str:
    content = next((m.get("content") for m in reversed(body["messages"]) if m.get("role") == "user"), None)
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def _offered(body: Mapping[str, Any]) -> list[str]:
    tools = body.get("tools") or []
    try:
        return [tool["function"]["name"] for tool in tools]
    except (TypeError, KeyError) as error:
        raise BadRequest('\'tools\' must be a list of {"type": "function", "function": {"name": ...}}.') from error


def _usage(body: Mapping[str, Any], reply: Reply) -> dict[str, int]:
    """Words and signs counted as tokens: near enough for a stand-in's bill."""
    said = json.dumps([body["messages"], body.get("tools") or []], ensure_ascii=False)
    prompt = len(re.findall(r"\w+|[^\w\s\"]", said))
    completion = len(re.findall(r"\w+|[^\w\s]", reply.text or f"{reply.tool} {reply.arguments}"))
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _envelope(body: Mapping[str, Any], kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": body.get("model") or "stand-in",
        "system_fingerprint": FINGERPRINT,
    }


def _call(reply: Reply) -> dict[str, Any]:
    function = {"name": reply.tool, "arguments": reply.arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def _completion(body: Mapping[str, Any], reply: Reply) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": reply.text}
    if reply.tool is not None:
        message["tool_calls"] = [_call(reply)]
    finish = "stop" if reply.tool is None else "tool_calls"
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
    return {**_envelope(body, "chat.completion"), "choices": [choice], "usage": _usage(body, reply)}


async def _stream(body: Mapping[str, Any], reply: Reply) -> AsyncIterator[bytes]:
    envelope = _envelope(body, "chat.completion.chunk")
    with_usage = bool((body.get("stream_options") or {}).get("include_usage"))
    extra: dict[str, Any] = {"usage": None} if with_usage else {}
    for delta in _deltas(reply):
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
        yield _event({**envelope, "choices": [choice], **extra})
    finish = "stop" if reply.tool is None else "tool_calls"
    choice = {"index": 0, "delta": {}, "logprobs": None, "finish_reason": finish}
    yield _event({**envelope, "choices": [choice], **extra})
    if with_usage:
        yield _event({**envelope, "choices": [], "usage": _usage(body, reply)})
    yield b"data: [DONE]\n\n"


def _deltas(reply: Reply) -> list[dict[str, Any]]:
    if reply.tool is None:
        words = re.findall(r"\S+\s*", reply.text or "")
        return [{"role": "assistant", "content": ""}, *({"content": word} for word in words)]
    head = _call(Reply(tool=reply.tool, arguments=""))
    pieces = [reply.arguments[at : at + _ARGUMENT_PIECE] for at in range(0, len(reply.arguments), _ARGUMENT_PIECE)]
    return [
        {"role": "assistant", "content": None},
        {"tool_calls": [{"index": 0, **head}]},
        *({"tool_calls": [{"index": 0, "function": {"arguments": piece}}]} for piece in pieces),
    ]


def _event(chunk: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(chunk, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until stopped. Exit code 2: the data cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m flywheel.demo.standin", description=__doc__)
    parser.add_argument("--data", default="generated", help="'generated', or a JSONL file with text, intent, slots")
    parser.add_argument("--label", default="intent", help="the key of the file that names the tool")
    parser.add_argument("--only", default="", help="the labels to keep, separated by commas; all when empty")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--latency-ms", type=float, default=300.0, help="how long each answer takes")
    parser.add_argument("--wrong", type=float, default=0.04, help="the share of texts answered with a wrong tool")
    parser.add_argument("--seed", type=int, default=7, help="of the generated data and of the wrong answers")
    args = parser.parse_args(argv)
    try:
        if args.data == "generated":
            workload = grammar.generate(GENERATED_ITEMS, args.seed)
        else:
            workload = load(args.data, args.label, tuple(name for name in args.only.split(",") if name))
    except WorkloadError as error:
        sys.stderr.write(f"stand-in: {error}\n")
        return 2
    app = create_app(workload, latency_s=args.latency_ms / 1_000, wrong=args.wrong, seed=args.seed)
    uvicorn.run(app, host=args.host, port=args.port, log_level="warning")
    return 0


if __name__ == "__main__":
    sys.exit(main())
