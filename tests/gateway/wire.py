"""A client that writes bytes as they are, and requests for it to write."""

import asyncio

import h11

from tests.gateway.conftest import Running

BODY = b'{"model": "m", "messages": []}'
STREAM = b'{"model": "m", "messages": [], "stream": true}'


def call(body: bytes = BODY, *, path: str = "/v1/chat/completions", version: str = "1.1", extra: str = "") -> bytes:
    head = f"POST {path} HTTP/{version}\r\nhost: g\r\ncontent-type: application/json\r\n{extra}"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


def chunked(body: bytes, size: int) -> bytes:
    """The call with its body in HTTP chunks."""
    parts = b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in (body[i : i + size] for i in range(0, len(body), size)))
    return b"POST /v1/chat/completions HTTP/1.1\r\nhost: g\r\ntransfer-encoding: chunked\r\n\r\n" + parts + b"0\r\n\r\n"


class Wire:
    """A client that sends bytes as they are, and reads replies with h11: an HTTP parser that is not the gateway's."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.parser = h11.Connection(h11.CLIENT)

    @classmethod
    async def to(cls, gateway: Running) -> "Wire":
        port = int(gateway.url.rpartition(":")[2])
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.writer.write(piece)
            await self.writer.drain()
            await asyncio.sleep(0)

    async def reply(self) -> tuple[int, dict[str, str], bytes]:
        """The next reply. Raises h11.RemoteProtocolError where it breaks off."""
        if self.parser.our_state is h11.DONE:
            self.parser.start_next_cycle()
        self.parser.send(h11.Request(method="POST", target="/", headers=[("host", "g")]))
        self.parser.send(h11.EndOfMessage())
        status, headers, body = 0, {}, []
        while True:
            event = self.parser.next_event()
            if event is h11.NEED_DATA:
                self.parser.receive_data(await asyncio.wait_for(self.reader.read(65536), 20))
            elif isinstance(event, h11.Response):
                status = event.status_code
                headers = {name.decode(): value.decode() for name, value in event.headers}
            elif isinstance(event, h11.Data):
                body.append(bytes(event.data))
            elif isinstance(event, h11.EndOfMessage):
                return status, headers, b"".join(body)

    async def closed(self) -> bool:
        return await asyncio.wait_for(self.reader.read(), 20) == b""

    async def close(self) -> None:
        self.writer.close()
        await self.writer.wait_closed()
