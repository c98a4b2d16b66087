"""What Proxy.handle costs by itself: one call from parsed head to logged reply, with an upstream that answers at once.

python -m tests.bench.bench_handle [--calls 20000] [--rounds 7] [--model 'limits: {concurrent: 64}'] [--route 'k: v']

No socket and no disk: the figure is the gateway's own work, which the configuration can make more or less.
"""

import argparse
import asyncio
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from gateway.app import build
from gateway.config import Settings
from gateway.spool import Kind
from gateway.tee import Inbound
from gateway.upstream import UpstreamRequest
from routing.targets import Model

ROUTING = """
version: 1
models:
  prod: {{upstream: nim, base_url: 'http://127.0.0.1:9/v1', model: big, {model}}}
  other: {{upstream: nim, base_url: 'http://127.0.0.1:9/v1', model: small}}
default: {{serve: prod, {route}}}
"""
REPLY = b'{"choices":[{"message":{"role":"assistant","content":"' + b"x" * 800 + b'"}}]}'
BODY = b'{"model":"m","messages":[{"role":"user","content":"' + b"x" * 800 + b'"}]}'
HEADERS = [(b"host", b"x"), (b"content-type", b"application/json"), (b"user-agent", b"bench"), (b"accept", b"*/*")]


class AtOnce:
    """An upstream whose whole reply is there when it is asked for."""

    async def send(self, _model: Model, _request: UpstreamRequest) -> "AtOnce":
        self.status = 200
        self.headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(REPLY))]
        self.complete = True
        return self

    async def read(self) -> bytes:
        return REPLY

    def close(self) -> None:
        pass


class Nowhere:
    """A client that takes everything at once."""

    keep_alive = started = True
    slow = False

    async def drain(self) -> None:
        pass

    def start(self, *_: Any) -> None:
        pass

    write = end = start


class NoLog:
    """A sink that keeps nothing."""

    refusing = False

    def begin(self, *_: Any) -> Kind:
        return Kind.WHOLE

    def append(self, *_: Any) -> bool:
        return True

    pieces = record = append


async def measure(folder: Path, calls: int, rounds: int) -> list[float]:
    """Microseconds a call, by round."""
    settings = Settings(data_dir=folder / "data", routing_file=folder / "routing.yaml")
    proxy: Any = build(settings, spool=NoLog())._proxy  # type: ignore[arg-type]
    proxy._upstream = AtOnce()

    down = Nowhere()

    async def once() -> None:
        now = time.perf_counter()
        call = Inbound(
            id="x", timestamp=0.0, received=now, path="/v1/chat/completions", query="", headers=HEADERS, body=BODY
        )
        await proxy.handle(call, down)

    found = []
    for _ in range(rounds):
        started = time.process_time()
        for _ in range(calls):
            await once()
        found.append((time.process_time() - started) / calls * 1e6)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--model", default="", help="more of the model's section")
    parser.add_argument("--route", default="", help="more of the route's section")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        routing = ROUTING.format(model=arguments.model, route=arguments.route)
        Path(folder, "routing.yaml").write_text(routing)
        found = asyncio.run(measure(Path(folder), arguments.calls, arguments.rounds))
    print(f"{median(found):.1f} us a call, {min(found):.1f} at best")


if __name__ == "__main__":
    main()
