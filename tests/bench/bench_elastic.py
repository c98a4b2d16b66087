"""How fast exchanges go into Elasticsearch and into files: python -m tests.bench.bench_elastic [--json].

Starts a server of its own (512 MB heap) as the tests do, or uses the one that ELASTICSEARCH_URL names.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from random import Random

from gateway.ids import id_at
from gateway.logstore import Query
from gateway.logstore.open import open_log_store
from gateway.records import Exchange, Usage
from gateway.sinks import open_sink
from tests.elasticsearch_server import ElasticsearchServer

BATCH = 500
PAYLOAD = 2048
GOAL = 3000


@dataclass(frozen=True)
class Row:
    """One measurement: exchanges a second over all of it, and how long a batch took."""

    what: str
    exchanges: int
    per_second: float
    p50_ms: float
    p99_ms: float


def exchanges(count: int) -> list[Exchange]:
    """Exchanges of about 2 KB, bodies of words that compress as text does, the same at every run."""
    random = Random(7)
    words = ["".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=random.randint(2, 10))) for _ in range(3000)]
    now = int(time.time() * 1000)

    def text(size: int) -> str:
        return " ".join(random.choices(words, k=size // 7))

    return [
        Exchange(
            id=id_at(now + n, random.randbytes(10)), timestamp=(now + n) / 1000, workload_id="bench", client_id="c",
            model="m", status=200, latency_ms=12.5, usage=Usage(input_tokens=300, output_tokens=80), cost_usd=0.001,
            request={"model": "m", "messages": [{"role": "user", "content": text(PAYLOAD * 3 // 4)}]},
            response={"choices": [{"message": {"role": "assistant", "content": text(PAYLOAD // 4)}}]},
        )
        for n in range(count)
    ]  # fmt: skip


async def timed(
    what: str, batches: list[list[Exchange]], take: Callable[[int, list[Exchange]], Awaitable[None]]
) -> Row:
    took = []
    for number, batch in enumerate(batches):
        began = time.perf_counter()
        await take(number, batch)
        took.append(time.perf_counter() - began)
    count = sum(map(len, batches))
    cuts = statistics.quantiles(took, n=100)
    return Row(what, count, round(count / sum(took)), round(cuts[49] * 1000, 1), round(cuts[98] * 1000, 1))


def split(sent: list[Exchange]) -> list[list[Exchange]]:
    return [sent[start : start + BATCH] for start in range(0, len(sent), BATCH)]


async def measure(server: str, count: int) -> list[Row]:
    batches = split(exchanges(count))
    store = open_log_store(f"elasticsearch+{server}/bench-{os.getpid()}")
    rows = []
    try:
        await store.append(exchanges(BATCH))  # makes the index
        rows.append(await timed("append, server just started", split(exchanges(count)), lambda _, it: store.append(it)))
        for batch in split(exchanges(count)):  # until its compiler has seen enough
            await store.append(batch)
        rows.append(await timed("append", batches, lambda _, batch: store.append(batch)))
        rows.append(await timed("append, all there already", batches, lambda _, batch: store.append(batch)))
        await asyncio.sleep(1.5)
        began = time.perf_counter()
        read = sum([1 async for _ in store.scan(Query(kind="any"))])
        took = time.perf_counter() - began
        rows.append(Row("scan", read, round(read / took), 0.0, 0.0))
    finally:
        await store.close()
    for format in ("parquet", "jsonl"):
        with tempfile.TemporaryDirectory() as folder:
            sink = open_sink(f"file://{folder}?format={format}")
            rows.append(await timed(f"write {format}", batches, lambda n, batch, to=sink: to.write(str(n), batch)))
    return rows


def show(rows: list[Row]) -> None:
    print(f"batches of {BATCH}, about {PAYLOAD} bytes each; {os.cpu_count()} cores, Python {platform.python_version()}")
    print(f"{'':<28}{'exchanges':>10}{'a second':>10}{'batch p50 ms':>14}{'p99 ms':>10}")
    for row in rows:
        print(f"{row.what:<28}{row.exchanges:>10}{row.per_second:>10.0f}{row.p50_ms:>14.1f}{row.p99_ms:>10.1f}")
    print(f"goal of the whole shipping: {GOAL} a second")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--exchanges", type=int, default=30_000)
    arguments = parser.parse_args()
    server = ElasticsearchServer(os.environ.get("ELASTICSEARCH_URL"))
    if server.own:
        server.start()
    try:
        rows = asyncio.run(measure(server.url, arguments.exchanges))
        server.forget(f"bench-{os.getpid()}")
    finally:
        if server.own:
            server.stop()
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        show(rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
