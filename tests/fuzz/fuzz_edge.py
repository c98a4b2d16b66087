"""Chance against the gateway's two edges: spoilt requests from clients, spoilt replies from the upstream.

python -m tests.fuzz.fuzz_edge [--minutes 4] [--seed N] [--json FILE]

A real gateway serves. What must hold whatever comes: the worker lives, its memory and its descriptors are bounded, its
log has no traceback, it still answers, the upstream never gets bytes that a strict server objects to, and each exchange
that a client was told of is in the log once. Exits 1 where something of it does not.
"""

import argparse
import asyncio
import contextlib
import json
import random
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

from tests.gateway.served import CHAT, Served
from tests.gateway.strict import Reader

CLIENTS = 24
GROWTH = 64  # MiB that the worker may have more in the end than after its first cases
ROUTING = """
version: 1
models:
  m: {{upstream: nim, base_url: "{url}", model: other, timeouts: {{connect: 1, first_token: 0.5, total: 1}}}}
default: {{serve: m, include_usage: true}}
"""
EDGE = ["max_body = 300000", "head_timeout = 0.3", "stall_timeout = 0.5"]
ID = re.compile(rb"x-understudy-exchange-id: ([0-9a-f-]{36})\r\n")
TROUBLE = re.compile(r'Traceback|Fatal error|"level": "(error|critical)"|never retrieved')

BODIES = [
    b'{"model":"m","messages":[{"role":"user","content":"hello"}]}',
    b'{"messages":[{"role":"system","content":"a"},{"role":"user","content":"\\u00e9\\n"}],"model":"m","stream":true}',
    '{"model":"m","prompt":"日本語","metadata":{"workload_id":"w"},"user":"u"}'.encode(),
    b'{"model":"m","input":"x","tools":[{"type":"function","function":{"name":"f","parameters":{}}}]}',
    b'{"model":"m","model":"n","messages":[],"previous_response_id":"r","stream_options":{}}',
]
JSON_BITS = [
    *(b'"model"', b'"mod\\u0065l"', b"null", b"[", b"]", b"{", b"}", b",", b":", b'"', b"\\", b"1e999", b"-", b"\xff"),
    *(b"\\ud800", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"[" * 3000, b'{"a":' * 1500, b"\x00", b"NaN", b'"stream":true,'),
]
REQUEST_BITS = [
    *(b"\r\n", b"\n", b"\r", b"\x00", b" ", b":", b"\t", b"0", b"ffffffffffffffff", b";", b"\r\n\r\n", b"HTTP/1.1"),
    *(
        b"Content-Length: 7\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Connection: close\r\n",
        b"Expect: 100-continue\r\n",
    ),
    *(
        b"Connection: upgrade\r\nUpgrade: h2c\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: g\r\n\r\n",
        b"%2e%2e/",
        b"\xff\xfe",
    ),
    *(
        b"X: " + b"y" * 70_000,
        b"X: y\r\n" * 300,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"0\r\n\r\n",
        b"0\r\nX: y\r\n\r\n",
    ),
]
TARGETS = [CHAT, "/v1/completions?a=b", "/v1/responses", "/v1/embeddings", "/v1/files", "/v1/models", "/metrics", "/x"]
EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":1,"total_tokens":2}}\n\n'
WHOLE = b'{"id":"c","choices":[{"message":{"content":"a"}}],"usage":{"prompt_tokens":1,"completion_tokens":1}}'
REPLY_BITS = [
    *(
        b"\r\n",
        b"\n",
        b"\x00",
        b":",
        b"0\r\n\r\n",
        b"ffffffffffffffff",
        b"data: [DONE]\n\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
    ),
    *(
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 101 S\r\n\r\n",
        b"Content-Length: 5\r\n",
        b"Transfer-Encoding: gzip\r\n",
    ),
    *(
        b"X: " + b"y" * 300_000,
        b"Content-Encoding: gzip\r\n",
        b"Connection: close\r\n",
        b"\xff",
        b"data: {\n\n",
        b"1;x\r\n",
    ),
]


def spoilt(data: bytes, bits: list[bytes], rng: random.Random, most: int = 4) -> bytes:
    """The bytes with some put in, some left out, repeated or changed, or with their end cut off."""
    for _ in range(rng.randint(0, most)):
        at = rng.randint(0, len(data))
        size = rng.choice((0, 0, 1, 2, 9, 40))
        match rng.randrange(5):
            case 0 | 1:
                data = data[:at] + rng.choice(bits) + data[at + size :]
            case 2:
                data = data[:at] + data[at : at + size] * 2 + data[at + size :]
            case 3:
                data = data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
            case _:
                data = data[: at + size]
    return data


def chunked(body: bytes, rng: random.Random) -> bytes:
    size = rng.choice((1, 5, 64, 4096))
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def request(rng: random.Random) -> bytes:
    """One request: spoilt in its JSON, or in its bytes, or not at all."""
    kind = rng.choice(("json", "json", "bytes", "bytes", "right", "large"))
    body = spoilt(rng.choice(BODIES), JSON_BITS if kind == "json" else [b""], rng, 5 if kind == "json" else 0)
    if kind == "large":
        body = (
            b'{"messages":[{"role":"user","content":"'
            + b"x" * rng.choice((1000, 70_000, 400_000))
            + b'"}],"model":"m"}'
        )
    method = rng.choice(("POST", "POST", "POST", "POST", "GET", "DELETE", "HEAD", "OPTIONS"))
    version = rng.choice(("1.1", "1.1", "1.1", "1.1", "1.0"))
    head = f"{method} {rng.choice((CHAT, *TARGETS))} HTTP/{version}\r\nHost: g\r\nContent-Type: application/json\r\n"
    if rng.random() < 0.3:
        data = head.encode() + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(body, rng)
    else:
        data = head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body
    return spoilt(data, REQUEST_BITS, rng) if kind == "bytes" else data


def reply(rng: random.Random) -> bytes:
    """One reply of the upstream: whole or streamed, spoilt or not."""
    status = rng.choice((b"200 OK", b"200 OK", b"200 OK", b"400 Bad", b"429 Many", b"503 Away", b"204 No"))
    stream = rng.random() < 0.5
    body = EVENT * rng.randint(0, 5) + USAGE + b"data: [DONE]\n\n" if stream else WHOLE
    head = b"HTTP/1.1 " + status + b"\r\ncontent-type: " + (b"text/event-stream" if stream else b"application/json")
    match rng.randrange(3):
        case 0:
            data = head + b"\r\ncontent-length: %d\r\n\r\n" % len(body) + body
        case 1:
            data = head + b"\r\ntransfer-encoding: chunked\r\n\r\n" + chunked(body, rng)
        case _:
            data = head + b"\r\n\r\n" + body
    return spoilt(data, REPLY_BITS, rng) if rng.random() < 0.6 else data


@dataclass
class Fuzz:
    """One run: what was done, what was seen of it, and what must not have been."""

    seed: int
    cases: int = 0
    replies: int = 0
    requests_up: int = 0
    ids: set[str] = field(default_factory=set)
    findings: list[str] = field(default_factory=list)

    async def upstream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Reads strictly; answers as the request's number has it, and sometimes ends there."""
        strict = Reader()
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65_536):
                before = len(strict.requests)
                strict.feed(data)
                if strict.error:
                    self.findings.append(f"the upstream got {data[:200]!r}: {strict.error}")
                    break
                for _ in strict.requests[before:]:
                    self.requests_up += 1
                    rng = random.Random(f"{self.seed} up {self.requests_up}")
                    writer.write(reply(rng))
                    if rng.random() < 0.4:
                        writer.close()
                        return
        writer.close()

    async def client(self, port: int, until: float) -> None:
        while time.monotonic() < until:
            self.cases += 1
            await self._case(port, random.Random(f"{self.seed} down {self.cases}"))

    async def _case(self, port: int, rng: random.Random) -> None:
        """Some requests on one connection, cut anywhere; then read on for a while, or leave."""
        got = b""
        with contextlib.suppress(OSError, TimeoutError, RuntimeError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                data = b"".join(request(rng) for _ in range(rng.choice((1, 1, 1, 2, 5))))
                cuts = sorted(rng.randint(0, len(data)) for _ in range(rng.choice((0, 0, 1, 4))))
                for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
                    writer.write(data[start:end])
                    await asyncio.wait_for(writer.drain(), 2)
                patience = rng.choice((0.0, 0.3, 0.3, 1.0))
                while patience and (more := await asyncio.wait_for(reader.read(65_536), patience)):
                    got += more
            finally:
                writer.transport.abort()
        self.replies += got.count(b"HTTP/1.1 ")
        self.ids.update(found.decode() for found in ID.findall(got))

    async def end(self, served: Served, pid: int, before: tuple[float, int]) -> dict[str, Any]:
        """See whether everything holds."""
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{served.port}", timeout=10) as client:
            if (await client.get("/healthz")).status_code != 200:
                self.findings.append("the gateway does not answer")
        if served.pids("gateway.worker") != [pid]:
            self.findings.append("the worker died")
            return {}
        for _ in range(100):
            if descriptors(pid) <= before[1]:
                break
            await asyncio.sleep(0.1)
        else:
            self.findings.append(f"{descriptors(pid)} descriptors are open, {before[1]} were")
        resident = memory(pid)
        if resident > before[0] + GROWTH:
            self.findings.append(f"the worker's memory grew from {before[0]:.0f} to {resident:.0f} MiB")
        if await served.stop() != 0:
            self.findings.append("the gateway did not end well")
        await served.ship_leftovers()
        logged = [exchange.id for exchange in await served.logged()]
        if lost := self.ids - set(logged):
            self.findings.append(f"{len(lost)} exchanges are not logged: {sorted(lost)[:3]}")
        if len(logged) != len(set(logged)):
            self.findings.append("exchanges are logged twice")
        assert served.log is not None
        told = [line for line in served.log.read_text().splitlines() if TROUBLE.search(line)]
        self.findings += [f"in the log: {line[:300]} ... {line[-900:]}" for line in told[:5]]
        return {"logged": len(logged), "resident_mib": [round(before[0]), round(resident)]}


async def fuzz(folder: Path, *, seconds: float, seed: int) -> dict[str, Any]:
    """Run for so long; what was done, and `findings`: [] where all held."""
    run = Fuzz(seed)
    served = Served.make(folder, edge=EDGE, workers=1)
    served.log = folder / "gateway.log"
    server = await asyncio.start_server(run.upstream, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    (folder / "routing.yaml").write_text(ROUTING.format(url=url))
    try:
        await served.start()
        pid = served.pids("gateway.worker")[0]
        at_first = descriptors(pid) + CLIENTS  # idle connections to the upstream
        until = time.monotonic() + seconds
        warm = time.monotonic() + seconds / 10
        await asyncio.gather(*(run.client(served.port, warm) for _ in range(CLIENTS)))
        before = memory(pid), at_first
        await asyncio.gather(*(run.client(served.port, until) for _ in range(CLIENTS)))
        found = await run.end(served, pid, before)
    finally:
        if served.process is not None and served.process.returncode is None:
            served.kill()
        server.close()
    done = {"cases": run.cases, "replies": run.replies, "requests_up": run.requests_up, "exchanges_seen": len(run.ids)}
    return {"seed": seed, "seconds": round(seconds), **done, **found, "findings": run.findings}


def memory(pid: int) -> float:
    """MiB that a process has resident."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 2**20


def descriptors(pid: int) -> int:
    """How many descriptors a process has open."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def main() -> Iterator[str]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000))
    parser.add_argument("--json", type=Path, help="where to record the run")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        done = asyncio.run(fuzz(Path(folder), seconds=arguments.minutes * 60, seed=arguments.seed))
    done["date"] = datetime.now(UTC).date().isoformat()
    text = json.dumps(done, indent=2)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    yield text
    if done["findings"]:
        sys.exit(1)


if __name__ == "__main__":
    for line in main():
        print(line)
