"""An OpenAI-compatible upstream that is strict: what it does not know or like it refuses, as OpenAI does.

`x-request-digest` in each reply is of everything that reached it: method, path, query, headers, body. Two clients that
get the same digest sent the same.
"""

import contextlib
import email
import email.policy
import json
import re
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.conformance import answers
from tests.conformance.answers import CREATED, JSON, MODEL, SCHEMAS
from tests.ports import free_port

KEY = "sk-conformance"
FAIL = re.compile(r"please fail: (\d{3})")
LIMITS = {
    "x-ratelimit-limit-requests": "60",
    "x-ratelimit-remaining-requests": "59",
    "x-ratelimit-reset-requests": "1s",
    "openai-processing-ms": "12",
    "openai-version": "2020-10-01",
}
_OF_THE_HOP = {"host", "connection", "content-length", "transfer-encoding", "expect"}
_STREAMS = {
    "/v1/chat/completions": (answers.chat, answers.chat_events),
    "/v1/completions": (answers.completion, answers.completion_events),
    "/v1/responses": (answers.response, answers.response_events),
}


class Refused(Exception):
    """An error in OpenAI's shape."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        self.status = status
        self.body = {"message": message, "type": _kind(status), "param": param, "code": code}
        self.headers = {"retry-after": "1", "retry-after-ms": "900"} if status in (429, 503) else {}


def _kind(status: int) -> str:
    return {401: "authentication_error", 429: "requests"}.get(
        status, "server_error" if status >= 500 else "invalid_request_error"
    )


@dataclass
class StrictUpstream:
    """The server at `url` (which ends in `/v1`), with the files and responses that it keeps."""

    url: str = ""
    calls: int = 0
    files: dict[str, tuple[JSON, bytes]] = field(default_factory=dict)
    responses: dict[str, JSON] = field(default_factory=dict)

    def app(self) -> Starlette:
        routes = [
            Route("/v1/models", self._guarded(self._models)),
            Route("/v1/models/{name}", self._guarded(self._model)),
            Route("/v1/files", self._guarded(self._upload), methods=["POST"]),
            Route("/v1/files", self._guarded(self._files)),
            Route("/v1/files/{name}", self._guarded(self._file), methods=["GET", "DELETE"]),
            Route("/v1/files/{name}/content", self._guarded(self._content)),
            Route("/v1/responses/{name}", self._guarded(self._stored), methods=["GET", "DELETE"]),
        ]
        routes += [Route(path, self._guarded(self._answer), methods=["POST"]) for path in SCHEMAS]
        return Starlette(routes=routes, exception_handlers={404: _unknown, 405: _unknown})

    def _guarded(self, endpoint: Any) -> Any:
        async def guard(request: Request) -> Response:
            self.calls += 1
            body = await request.body()
            try:
                if request.headers.get("authorization") != f"Bearer {KEY}":
                    raise Refused(401, "Incorrect API key provided", code="invalid_api_key")
                reply: Response = endpoint(request, body)
            except Refused as why:
                reply = JSONResponse({"error": why.body}, why.status, headers=why.headers)
            reply.headers.update(LIMITS)
            reply.headers["x-request-digest"] = reply.headers["x-request-id"] = _digest(request, body)
            return reply

        return guard

    # -- endpoints

    def _answer(self, request: Request, body: bytes) -> Response:
        path = request.url.path
        asked = _read(request, body)
        for wrong in SCHEMAS[path].iter_errors(asked):
            raise Refused(400, wrong.message, param=".".join(map(str, wrong.absolute_path)) or None)
        if found := FAIL.search(json.dumps(asked)):
            raise Refused(int(found[1]), "you asked for it", code="asked_for")
        if asked.get("model", MODEL) != MODEL:
            raise Refused(404, f"The model `{asked['model']}` does not exist", code="model_not_found", param="model")
        if path == "/v1/embeddings":
            return JSONResponse(answers.embeddings(asked))
        if path == "/v1/moderations":
            return JSONResponse({"id": "modr-1", "model": "m", "results": [{"flagged": False, "categories": {}}]})
        whole, events = _STREAMS[path]
        if path == "/v1/responses":
            self._keep(asked)
        if asked.get("stream"):
            return StreamingResponse(_sse(path, events(asked)), media_type="text/event-stream; charset=utf-8")
        return Response(json.dumps(whole(asked), indent=2, ensure_ascii=False), media_type="application/json")

    def _keep(self, asked: JSON) -> None:
        before = asked.get("previous_response_id")
        if before is not None and before not in self.responses:
            raise Refused(400, f"Previous response with id '{before}' not found.", param="previous_response_id")
        if asked.get("store", True):
            whole = answers.response({k: v for k, v in asked.items()})
            self.responses[whole["id"]] = whole

    def _stored(self, request: Request, _body: bytes) -> Response:
        name = request.path_params["name"]
        if name not in self.responses:
            raise Refused(404, f"Response with id '{name}' not found.")
        if request.method == "DELETE":
            del self.responses[name]
            return JSONResponse({"id": name, "object": "response", "deleted": True})
        return JSONResponse(self.responses[name])

    def _upload(self, request: Request, body: bytes) -> Response:
        fields = _form(request, body)
        if set(fields) != {"purpose", "file"} or not fields["file"][0]:
            raise Refused(400, f"'purpose' and 'file' are wanted, not {sorted(fields)}")
        filename, content = fields["file"]
        name = f"file-{answers.digest(filename, content.hex())}"
        told = {"id": name, "object": "file", "bytes": len(content), "created_at": CREATED, "filename": filename}
        told |= {"purpose": fields["purpose"][1].decode(), "status": "processed", "expires_at": None}
        self.files[name] = (told, content)
        return JSONResponse(told)

    def _files(self, request: Request, _body: bytes) -> Response:
        wanted = request.query_params.get("purpose")
        data = [told for told, _ in self.files.values() if wanted in (None, told["purpose"])]
        return JSONResponse({"object": "list", "data": data, "has_more": False})

    def _file(self, request: Request, _body: bytes) -> Response:
        name = request.path_params["name"]
        if name not in self.files:
            raise Refused(404, f"No such File object: {name}", param="id")
        if request.method == "DELETE":
            del self.files[name]
            return JSONResponse({"id": name, "object": "file", "deleted": True})
        return JSONResponse(self.files[name][0])

    def _content(self, request: Request, _body: bytes) -> Response:
        if request.path_params["name"] not in self.files:
            raise Refused(404, "No such File object", param="id")
        return Response(self.files[request.path_params["name"]][1], media_type="application/octet-stream")

    def _models(self, _request: Request, _body: bytes) -> Response:
        return JSONResponse({"object": "list", "data": [_MODEL]})

    def _model(self, request: Request, _body: bytes) -> Response:
        if request.path_params["name"] != MODEL:
            raise Refused(404, "The model does not exist", code="model_not_found", param="model")
        return JSONResponse(_MODEL)


_MODEL = {"id": MODEL, "object": "model", "created": CREATED, "owned_by": "system"}


async def _unknown(request: Request, _why: Exception) -> Response:
    return JSONResponse({"error": {"message": f"Invalid URL ({request.method} {request.url.path})"}}, 404)


def _no_doubles(pairs: list[tuple[str, Any]]) -> JSON:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key is given twice")
    return dict(pairs)


def _read(request: Request, body: bytes) -> JSON:
    if request.headers.get("content-type", "").partition(";")[0] != "application/json":
        raise Refused(415, "the content type is not application/json")
    try:
        asked = json.loads(body.decode(), object_pairs_hook=_no_doubles)
    except ValueError as error:
        raise Refused(400, f"We could not parse the JSON body of your request: {error}") from error
    if not isinstance(asked, dict):
        raise Refused(400, "the body is no object")
    return asked


def _form(request: Request, body: bytes) -> dict[str, tuple[str, bytes]]:
    """The parts of a form by name, each with its file's name and its content."""
    kind = request.headers.get("content-type", "")
    if not kind.startswith("multipart/form-data; boundary="):
        raise Refused(400, "multipart/form-data with a boundary is wanted")
    message = email.message_from_bytes(b"content-type: %b\r\n\r\n" % kind.encode() + body, policy=email.policy.HTTP)
    if not message.is_multipart() or message.defects:
        raise Refused(400, f"the form is broken: {message.defects}")
    return {
        part.get_param("name", header="content-disposition"): (  # type: ignore[misc]
            part.get_filename() or "",
            part.get_payload(decode=True) or b"",
        )
        for part in message.iter_parts()  # type: ignore[attr-defined]
    }


def _digest(request: Request, body: bytes) -> str:
    """Without what belongs to one hop, and with one name for the boundaries that each client draws anew."""
    headers = sorted(
        (name, value) for name, value in request.headers.items() if name not in _OF_THE_HOP and name != "content-type"
    )
    kind, _, boundary = request.headers.get("content-type", "").partition("boundary=")
    text = body.replace(boundary.strip('"').encode(), b"BOUNDARY") if boundary else body
    return answers.digest(request.method, request.url.path, request.url.query, headers, kind, text.hex())


async def _sse(path: str, events: Iterator[JSON]) -> AsyncIterator[str]:
    """As OpenAI frames each: names before the responses API's events, `[DONE]` at the end of the others."""
    for event in events:
        name = f"event: {event['type']}\n" if path == "/v1/responses" else ""
        yield f"{name}data: {json.dumps(event, separators=(',', ':'))}\n\n"
    if path != "/v1/responses":
        yield "data: [DONE]\n\n"


@contextlib.contextmanager
def strict_upstream() -> Iterator[StrictUpstream]:
    """The server on a free port, in a thread of its own, until the block ends."""
    fake = StrictUpstream()
    port = free_port()
    fake.url = f"http://127.0.0.1:{port}/v1"
    config = uvicorn.Config(fake.app(), port=port, log_level="error", access_log=False, date_header=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
        assert thread.is_alive(), "the upstream did not start"
    try:
        yield fake
    finally:
        server.should_exit = True
        thread.join()
