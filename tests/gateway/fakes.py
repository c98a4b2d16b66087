"""A scripted upstream on a real socket: a stand-in for servers that misbehave, byte by byte. For tests of failure."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import orjson

Script = Callable[["Received", asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Received:
    """One request as it arrived."""

    line: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> dict:
        return orjson.loads(self.body)


@dataclass
class FakeUpstream:
    """Answers every request with the script's next entry; the last one is used again and again."""

    scripts: list[Script]
    received: list[Received] = field(default_factory=list)
    connections: int = 0
    url: str = ""
    port: int = 0
    lost: asyncio.Event = field(default_factory=asyncio.Event)

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while line := await reader.readline():
                request = await _read(line, reader)
                self.received.append(request)
                script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
                await script(request, writer)
                if writer.is_closing():
                    return
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.lost.set()
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


async def _read(line: bytes, reader: asyncio.StreamReader) -> Received:
    headers = {}
    while (header := await reader.readline()) not in (b"\r\n", b""):
        name, _, value = header.decode("latin-1").partition(":")
        headers[name.lower()] = value.strip()
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return Received(line=line.decode().strip(), headers=headers, body=body)


@contextlib.asynccontextmanager
async def upstream(
    *scripts: Script, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1", port: int = 0
) -> AsyncIterator[FakeUpstream]:
    """A server on a free loopback port, closed at the end together with its connections."""
    fake = FakeUpstream(scripts=list(scripts))
    tasks: set[asyncio.Task] = set()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        tasks.add(task)
        try:
            await fake.handle(reader, writer)
        except asyncio.CancelledError:
            writer.transport.abort()
        finally:
            tasks.discard(task)

    server = await asyncio.start_server(accept, host, port, ssl=tls)
    fake.port = server.sockets[0].getsockname()[1]
    fake.url = f"https://localhost:{fake.port}/v1" if tls else f"http://{host}:{fake.port}/v1"
    try:
        yield fake
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        if tasks:
            await asyncio.wait(list(tasks))


REPLY = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "model": "big",
    "x_unknown": {"kept": True},
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "hello"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 5, "completion_tokens": 1, "total_tokens": 6},
}


def plain(body: bytes, *, status: str = "200 OK", extra: str = "", content_type: str = "application/json") -> Script:
    """A whole reply with a content-length."""

    async def script(_request: Received, writer: asyncio.StreamWriter) -> None:
        head = f"HTTP/1.1 {status}\r\ncontent-type: {content_type}\r\ncontent-length: {len(body)}\r\n{extra}\r\n"
        writer.write(head.encode() + body)
        await writer.drain()

    return script


def ok(reply: dict = REPLY) -> Script:
    return plain(orjson.dumps(reply))


def sse(*events: bytes, gap: float = 0.0, end: str = "chunk", content_type: str = "text/event-stream") -> Script:
    """A chunked stream, one HTTP chunk an event. `end` is how it stops: `chunk` properly, `cut` in the middle,
    `hang` never."""

    async def script(_request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(f"HTTP/1.1 200 OK\r\ncontent-type: {content_type}\r\ntransfer-encoding: chunked\r\n\r\n".encode())
        for event in events:
            writer.write(b"%x\r\n%s\r\n" % (len(event), event))
            await writer.drain()
            if gap:
                await asyncio.sleep(gap)
        if end == "chunk":
            writer.write(b"0\r\n\r\n")
            await writer.drain()
        elif end == "hang":
            await asyncio.Event().wait()
        else:
            writer.transport.abort()

    return script


def as_asked() -> Script:
    """A stream of ten events where the request asks for one, else a whole reply."""
    whole, stream = ok(), sse(*(chunk(f"{n} ") for n in range(10)), DONE)

    async def script(request: Received, writer: asyncio.StreamWriter) -> None:
        await (stream if request.json.get("stream") else whole)(request, writer)

    return script


def raw(data: bytes, *, close: bool = True) -> Script:
    """Bytes as given, whatever they are."""

    async def script(_request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await writer.drain()
        if close:
            writer.close()

    return script


async def hang(_request: Received, _writer: asyncio.StreamWriter) -> None:
    """Never an answer."""
    await asyncio.Event().wait()


def chunk(text: str, **more: object) -> bytes:
    """One SSE event with a content delta."""
    event = {"id": "c1", "object": "chat.completion.chunk", "model": "big"} | more
    event["choices"] = [{"index": 0, "delta": {"content": text}, "finish_reason": None}]
    return b"data: " + orjson.dumps(event) + b"\n\n"


DONE = b"data: [DONE]\n\n"
