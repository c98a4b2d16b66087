"""Providers that do not speak OpenAI's protocol, through litellm: the one file that imports it, in a thread."""

import asyncio
import base64
import contextlib
import gc
import logging
import os
import threading
from array import array
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Final, TypeVar

import orjson
import structlog

from gateway.errors import ConnectError, MissingExtra, RequestRefused, UpstreamCut, UpstreamError, UpstreamTimeout
from gateway.publish import without_collecting
from gateway.upstream import UpstreamRequest
from gateway.upstream.provider_errors import told
from gateway.upstream.provider_request import CHAT, EMBEDDINGS, arguments
from routing.targets import Model

__all__ = ["LitellmUpstream", "installed", "missing"]

log = structlog.get_logger(__name__)
T = TypeVar("T")

_DONE: Final = b"data: [DONE]\n\n"
_LAST: Final = 0.5  # seconds that litellm gets for what it does behind a call
_SHUT: Final = 64  # chunks that may have come already when a stream is given up
# What litellm reads when it is imported: nothing is fetched from anywhere, neither lists of its own nor what a client's
# message links to.
_SWITCHES: Final = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_LOCAL_ANTHROPIC_BETA_HEADERS": "True",
    "LITELLM_LOCAL_BLOG_POSTS": "True",
    "MAX_IMAGE_URL_DOWNLOAD_SIZE_MB": "0",
    "LITELLM_LOG": "CRITICAL",
}


def installed() -> bool:
    """Whether litellm is there, without the seconds that importing it takes."""
    return find_spec("litellm") is not None


def missing() -> MissingExtra:
    """What is wrong where it is not."""
    return MissingExtra("upstream: litellm", "litellm")


@dataclass(frozen=True, slots=True)
class _Answer:
    """A reply's head with its first bytes; `stream` is litellm's, where more is to come."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes
    stream: Any = None


class LitellmUpstream:
    """Calls providers on an event loop of its own, in a thread: what litellm takes is not the worker's loop's time.

    Nothing is loaded before a model needs it. One for a worker, mirrors included: litellm's pools are global.
    """

    def __init__(self) -> None:
        self._engine: _Engine | None = None
        self._seen: object = None

    def prepare(self, models: Mapping[str, Model]) -> None:
        """Begin to load litellm where one of `models` will need it; the same ones again cost nothing."""
        if models is self._seen:
            return
        self._seen = models
        if any(model.upstream == "litellm" for model in models.values()):
            self._started()

    async def send(self, model: Model, request: UpstreamRequest) -> "LitellmReply":
        """Send, and wait for the reply's first bytes: a provider's error is known only then.

        What it takes to load litellm counts for the deadline of the first token.
        """
        loop = asyncio.get_running_loop()
        began, deadline = loop.time(), model.timeouts.first_token
        try:
            kind, asked = arguments(model, request)
        except RequestRefused as error:
            return LitellmReply(self, model, _refused(error), began)
        try:
            async with asyncio.timeout(deadline):
                engine = self._started()
                await asyncio.shield(asyncio.wrap_future(engine.loaded))
                answer = await engine.run(_answered(engine.litellm, kind, model, asked))
        except TimeoutError as error:
            raise UpstreamTimeout(f"{model.model}: first token deadline of {deadline:g} s passed") from error
        except ImportError as error:
            raise ConnectError(f"{model.name}: {missing()}") from error
        return LitellmReply(self, model, answer, began)

    async def close(self) -> None:
        """End the thread, with what still runs in it."""
        engine, self._engine = self._engine, None
        if engine is not None:
            await asyncio.to_thread(engine.stop)

    def _started(self) -> "_Engine":
        if self._engine is None:
            self._engine = _Engine()
        return self._engine

    async def next(self, model: Model, stream: Any, due: float) -> bytes | None:
        """A stream's next event, None at its end."""
        assert self._engine is not None  # it has begun the stream
        try:
            async with asyncio.timeout_at(due):
                return await self._engine.run(_next(model, stream))
        except TimeoutError as error:
            deadline = model.timeouts.total
            raise UpstreamTimeout(f"{model.model}: total deadline of {deadline:g} s passed") from error

    def give_up(self, stream: Any) -> None:
        """End a stream that nobody wants any more, and its connection."""
        if self._engine is not None:
            self._engine.forget(_shut(stream))


class LitellmReply:
    """The reply of a provider, as OpenAI would have sent it; see gateway.upstream.Reply."""

    __slots__ = ("_body", "_due", "_model", "_stream", "_upstream", "complete", "headers", "status")

    def __init__(self, upstream: LitellmUpstream, model: Model, answer: _Answer, began: float) -> None:
        self._upstream = upstream
        self._model = model
        self._body: bytes | None = answer.body
        self._stream = answer.stream
        self._due = began + model.timeouts.total
        self.status = answer.status
        self.headers = answer.headers
        self.complete = False

    async def read(self, each: Callable[[bytes], bool] | None = None) -> bytes:
        """The next event of a stream, or the whole body; b"" at the end. Nothing goes to `each`."""
        if self._body is not None:
            body, self._body = self._body, None
            self.complete = self._stream is None
            return body
        if self._stream is None:
            return b""
        event = await self._upstream.next(self._model, self._stream, self._due)
        if event is not None:
            return event
        self._stream, self.complete = None, True
        return _DONE

    def close(self) -> None:
        """Give up what is still to come."""
        if self._stream is not None:
            stream, self._stream = self._stream, None
            self._upstream.give_up(stream)


class _Engine:
    """The thread: imports litellm, then runs its event loop until it is stopped."""

    litellm: ModuleType  # these two once it is loaded
    _loop: asyncio.AbstractEventLoop

    def __init__(self) -> None:
        self.loaded: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="litellm", daemon=True)
        self._thread.start()

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Have the thread's loop do it. Who is cancelled here cancels it there."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    def forget(self, work: Coroutine[Any, Any, None]) -> None:
        """Have the thread's loop do it some time."""
        asyncio.run_coroutine_threadsafe(work, self._loop)

    def stop(self) -> None:
        """End the thread; one that is still importing ends with the process."""
        if self.loaded.done() and self.loaded.exception() is None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    def _run(self) -> None:
        try:
            self.litellm = _imported()
        except Exception as error:  # noqa: BLE001 -- whatever the import raises is told to each call
            log.error(
                "providers cannot be called", error=str(missing() if isinstance(error, ModuleNotFoundError) else error)
            )
            self.loaded.set_exception(error if isinstance(error, ImportError) else ImportError(str(error)))
            return
        self._loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self._loop)
        self.loaded.set_result(None)
        try:
            self._loop.run_forever()
        finally:
            self._loop.run_until_complete(_settled())
            for task in asyncio.all_tasks(self._loop):
                task.cancel()
            self._loop.run_until_complete(asyncio.sleep(0))
            self._loop.close()


def _imported() -> ModuleType:
    """litellm, quiet: it keeps, prints and sends nothing of a call. Its objects are left to no later collection."""
    for name, value in _SWITCHES.items():
        os.environ.setdefault(name, value)  # noqa: TID251 -- what it is told has no other way
    with without_collecting():
        import litellm

        gc.freeze()
    litellm.suppress_debug_info = True
    litellm.telemetry = False
    for logger in ("LiteLLM", "LiteLLM Router", "LiteLLM Proxy", "httpx"):
        logging.getLogger(logger).disabled = True  # they would print the provider's URL, and with some the key in it
    return litellm


async def _settled() -> None:
    """What litellm does behind a call, which is nothing for us, is done: dropped, it would be complained of."""
    with contextlib.suppress(ImportError, AttributeError, TimeoutError):  # its own affair, and may move
        from litellm.litellm_core_utils.logging_worker import GLOBAL_LOGGING_WORKER

        async with asyncio.timeout(_LAST):
            await GLOBAL_LOGGING_WORKER.flush()


async def _answered(litellm: ModuleType, kind: str, model: Model, asked: dict[str, Any]) -> _Answer:
    """One call in the thread's loop. Raises UpstreamError where no answer came; a provider's error is an answer."""
    import httpx  # litellm has it

    limit = model.timeouts
    asked["timeout"] = httpx.Timeout(float(round(limit.total + 0.5)), connect=limit.connect)
    wanted = asked.pop("encoding_format", None) if kind == EMBEDDINGS else None
    call = {CHAT: litellm.acompletion, EMBEDDINGS: litellm.aembedding}[kind]
    try:
        reply = await call(**asked)
        if asked.get("stream"):
            return await _streaming(model, reply)
        body = _as_base64(reply.model_dump(mode="json")) if wanted == "base64" else reply.model_dump_json()
    except Exception as error:  # noqa: BLE001 -- litellm and the providers' libraries raise what they like
        return _failed(error, model)
    data = body.encode()
    return _Answer(200, [*_head(b"application/json", len(data)), *_passed(reply)], data)


async def _streaming(model: Model, stream: Any) -> _Answer:
    headers = [(b"content-type", b"text/event-stream"), *_passed(stream)]
    try:
        return _Answer(200, headers, _event(model, stream, await anext(stream)), stream)
    except StopAsyncIteration as error:
        raise UpstreamCut(f"{model.model}: the stream ended before it began") from error


async def _next(model: Model, stream: Any) -> bytes | None:
    try:
        return _event(model, stream, await anext(stream))
    except StopAsyncIteration:
        return None
    except UpstreamError:
        raise
    except Exception as error:  # as above; here the client has had a part already
        raise UpstreamCut(f"{model.model}: the stream broke: {told(error, model).message}") from error


def _event(model: Model, stream: Any, chunk: Any) -> bytes:
    """A chunk as an event. litellm makes up an end for a stream that has none: that is a cut."""
    finished = any(choice.finish_reason for choice in chunk.choices)
    known = getattr(stream, "received_finish_reason", True) or getattr(stream, "intermittent_finish_reason", None)
    if finished and not known:
        raise UpstreamCut(f"{model.model}: the stream ended inside the reply")
    said = chunk.model_dump(mode="json", exclude_none=True, exclude_unset=True)
    if "usage" in said and not any(choice.get("delta") or choice.get("finish_reason") for choice in said["choices"]):
        said["choices"] = []  # as OpenAI does it
    return b"data: " + orjson.dumps(said) + b"\n\n"


async def _shut(stream: Any) -> None:
    """Close a stream's connection. litellm's own aclose leaves it open, so it is cancelled while it reads."""
    for _ in range(_SHUT):
        reading = asyncio.ensure_future(anext(stream, None))
        await asyncio.sleep(0)
        reading.cancel()
        try:
            if await reading is None:
                break
        except asyncio.CancelledError:
            break
        except Exception:  # noqa: BLE001 -- it is over, as it was meant to be
            break
    with contextlib.suppress(Exception):
        await stream.aclose()


def _failed(error: Exception, model: Model) -> _Answer:
    if isinstance(error, UpstreamError):
        raise error
    found = told(error, model)
    if found.failure is not None:
        raise found.failure(f"{model.model}: {found.message}") from error
    return _Answer(found.status, [*_head(b"application/json", len(found.body)), *found.headers], found.body)


def _refused(error: RequestRefused) -> _Answer:
    body = error.body
    return _Answer(error.status, _head(b"application/json", len(body)), body)


def _head(kind: bytes, length: int) -> list[tuple[bytes, bytes]]:
    return [(b"content-type", kind), (b"content-length", b"%d" % length)]


def _passed(reply: Any) -> Sequence[tuple[bytes, bytes]]:
    """The provider's rate limits, under OpenAI's names where litellm knows them."""
    hidden: dict[str, Any] = getattr(reply, "_hidden_params", None) or {}
    headers: dict[str, Any] = hidden.get("additional_headers") or {}
    return [
        (name.lower().encode(), str(value).encode("latin-1", "replace"))
        for name, value in headers.items()
        if name.lower().startswith("x-ratelimit-")
    ]


def _as_base64(reply: dict[str, Any]) -> str:
    """Embeddings as a client of OpenAI's asks for them: little-endian floats of 32 bits."""
    for item in reply.get("data") or ():
        if isinstance(item.get("embedding"), list):
            item["embedding"] = base64.b64encode(array("f", item["embedding"]).tobytes()).decode()
    return orjson.dumps(reply).decode()
