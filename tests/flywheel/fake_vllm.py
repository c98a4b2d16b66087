"""A fake vLLM on a real socket, for what a real one does rarely: fails, stalls, forgets its adapters, talks rubbish."""

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

Answer = Callable[[str, dict[str, Any]], dict[str, Any]]


@dataclass
class FakeVllm:
    """Answers `answer(model, body)`. `trouble` holds replies that the next chat calls get instead, one each."""

    answer: Answer
    root: str = "org/tiny"
    adapters: dict[str, str] = field(default_factory=dict)
    trouble: list[Response] = field(default_factory=list)
    asked: Counter[str] = field(default_factory=Counter)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    delay: float = 0.0
    refuse_loading: str = ""
    url: str = ""
    most_at_once: int = 0
    _at_once: int = 0

    async def chat(self, request: Request) -> Response:
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            return await self._chat(json.loads(await request.body()))
        finally:
            self._at_once -= 1

    async def _chat(self, body: dict[str, Any]) -> Response:
        self.asked[body["model"]] += 1
        self.bodies.append(body)
        await asyncio.sleep(self.delay)
        if self.trouble:
            return self.trouble.pop(0)
        if body["model"] not in {"tiny", *self.adapters}:
            return JSONResponse({"error": {"message": f"no model {body['model']}"}}, status_code=404)
        usage = {"prompt_tokens": 50, "completion_tokens": 10}
        return JSONResponse({**self.answer(body["model"], body), "usage": usage})

    async def models(self, _: Request) -> Response:
        entries = [{"id": "tiny", "root": self.root, "parent": None}]
        entries += [{"id": name, "root": path, "parent": "tiny"} for name, path in self.adapters.items()]
        return JSONResponse({"object": "list", "data": entries})

    async def load(self, request: Request) -> Response:
        body = json.loads(await request.body())
        self.asked["load"] += 1
        if self.refuse_loading:
            return JSONResponse({"error": {"message": self.refuse_loading}}, status_code=400)
        self.adapters[body["lora_name"]] = body["lora_path"]
        return PlainTextResponse(f"Success: LoRA adapter '{body['lora_name']}' added successfully.")

    async def unload(self, request: Request) -> Response:
        self.adapters.pop(json.loads(await request.body())["lora_name"], None)
        return PlainTextResponse("Success")


@contextmanager
def fake_vllm(answer: Answer) -> Iterator[FakeVllm]:
    """Runs one in a thread, on a free loopback port."""
    fake = FakeVllm(answer=answer)
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", fake.chat, methods=["POST"]),
            Route("/v1/models", fake.models),
            Route("/v1/load_lora_adapter", fake.load, methods=["POST"]),
            Route("/v1/unload_lora_adapter", fake.unload, methods=["POST"]),
        ]
    )
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", lifespan="off", ws="none")
    sock = config.bind_socket()
    fake.url = f"http://127.0.0.1:{sock.getsockname()[1]}/v1"
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([sock],), daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        server.should_exit = True
        thread.join(timeout=10)
        sock.close()
