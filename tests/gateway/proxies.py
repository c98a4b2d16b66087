"""An HTTP proxy on a real socket, as it stands at the edge of a company's network: CONNECT, and requests passed on."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit


@dataclass
class FakeProxy:
    """Connects every name to `to`; `lines` are the first lines of what it was asked, `logins` who asked."""

    to: Mapping[str, tuple[str, int]]
    login: str = ""
    lines: list[str] = field(default_factory=list)
    logins: list[str] = field(default_factory=list)
    url: str = ""

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        line, _, rest = head.partition(b"\r\n")
        method, target, _ = line.decode().split(" ")
        self.lines.append(f"{method} {target}")
        fields = dict(part.lower().split(b": ", 1) for part in rest.split(b"\r\n") if part)
        self.logins.append(fields.get(b"proxy-authorization", b"").decode())
        if self.login and self.logins[-1] != self.login:
            writer.write(b"HTTP/1.1 407 Proxy Authentication Required\r\ncontent-length: 0\r\n\r\n")
            return
        parts = urlsplit(f"//{target}" if method == "CONNECT" else target)
        there, back = await asyncio.open_connection(*self.to[parts.hostname or ""])
        if method == "CONNECT":
            writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        else:
            back.write(f"{method} {parts.path}?{parts.query} HTTP/1.1\r\n".replace("? ", " ").encode() + rest)
        await asyncio.gather(_copy(reader, back), _copy(there, writer))


async def _copy(source: asyncio.StreamReader, to: asyncio.StreamWriter) -> None:
    try:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(65536):
                to.write(data)
                await to.drain()
    finally:
        to.close()


@contextlib.asynccontextmanager
async def proxy(to: Mapping[str, tuple[str, int]], login: str = "") -> AsyncIterator[FakeProxy]:
    """`to` has each host that it knows with the address where it really is."""
    fake = FakeProxy(to, login)
    tasks: set[asyncio.Task] = set()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        tasks.add(task)
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
                await fake.handle(reader, writer)
        finally:
            tasks.discard(task)
            writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    fake.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield fake
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        if tasks:
            await asyncio.wait(list(tasks))
