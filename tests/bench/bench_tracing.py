"""What tracing costs a call, in the worker: the same call through Proxy.handle with it on, off, on, off.

python -m tests.bench.bench_tracing [--calls 5000] [--rounds 9]

No socket and no disk, but a log's headers are written as JSON, because tracing makes them longer. Making spans and
sending them is the teller's: see bench_spans.
"""

import argparse
import asyncio
import gc
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import orjson

from gateway.app import build
from gateway.config import Settings
from gateway.signals import Sampling
from gateway.spool import Kind
from gateway.tee import Inbound
from gateway.tracing import Tracing
from tests.bench.bench_handle import BODY, HEADERS, ROUTING, AtOnce, NoLog, Nowhere

CALLER = (b"traceparent", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
KINDS = {
    "off": (None, HEADERS),
    "on, a new trace": (Tracing(Sampling()), HEADERS),
    "on, the caller's trace": (Tracing(Sampling()), [*HEADERS, CALLER]),
    "on, not sampled": (Tracing(Sampling(bound=0)), HEADERS),
}


class Written(NoLog):
    """A sink that writes headers as the spool does, and keeps nothing."""

    def begin(self, header: dict[str, Any], *_: Any) -> Kind:
        orjson.dumps(header)
        return Kind.WHOLE

    def append(self, header: dict[str, Any], *_: Any) -> bool:
        return bool(orjson.dumps(header))


async def measure(folder: Path, calls: int, rounds: int) -> dict[str, list[float]]:
    """Microseconds a call, by kind and round."""
    settings = Settings(data_dir=folder / "data", routing_file=folder / "routing.yaml")
    proxy: Any = build(settings, spool=Written())._proxy  # type: ignore[arg-type]
    proxy._upstream = AtOnce()

    down = Nowhere()

    async def once(tracing: Tracing | None, headers: list[tuple[bytes, bytes]]) -> None:
        call = Inbound(
            id="x",
            timestamp=0.0,
            received=time.perf_counter(),
            path="/v1/chat/completions",
            query="",
            headers=headers,
            body=BODY,
            trace=None if tracing is None else tracing.begin(headers),
        )
        await proxy.handle(call, down)

    gc.freeze()
    gc.set_threshold(50_000, 20, 50)  # as in a worker
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(rounds):
        for kind, (tracing, headers) in KINDS.items():
            started = time.process_time()
            for _ in range(calls):
                await once(tracing, headers)
            found[kind].append((time.process_time() - started) / calls * 1e6)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--calls", type=int, default=5_000)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "routing.yaml").write_text(ROUTING.format(model="", route=""))
        found = asyncio.run(measure(Path(folder), arguments.calls, arguments.rounds))
    off = min(found["off"])
    for kind, figures in found.items():
        print(f"{kind}: {median(figures):.1f} us a call, {min(figures):.1f} at best, {min(figures) - off:+.1f}")


if __name__ == "__main__":
    main()
