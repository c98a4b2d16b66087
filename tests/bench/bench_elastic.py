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
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from random import Random

from gateway.ids import id_at
from gateway.logstore import LogStore, Query
from gateway.logstore.open import open_log_store
from gateway.records import Exchange, Usage
from gateway.sinks import FileSink, open_sink
from tests.elasticsearch_server import ElasticsearchServer

BATCH = 500
PAYLOAD = 2048
GOAL = 3000


@dataclass(frozen=True)
class Row:
    """One measurement: exchanges a second over all of it, how long a batch took, processor time for each exchange."""

    what: str
    exchanges: int
    per_second: int
    p50_ms: float
    p99_ms: float
    own_us: int
    server_us: int


class Meter:
    """Takes the time of work on batches, and what it cost here and in the server."""

    def __init__(self, server: ElasticsearchServer) -> None:
        self.rows: list[Row] = []
        self._server = server

    async def measure(self, what: str, work: AsyncIterator[int]) -> None:
        """`work` yields how many exchanges it has just dealt with."""
        counts, took = [], []
        own, its = time.process_time(), self._server.cpu_seconds()
        began = time.perf_counter()
        async for count in work:
            counts.append(count)
            took.append(time.perf_counter() - began)
            began = time.perf_counter()
        total, cuts = sum(counts), statistics.quantiles(took, n=100)
        own, its = time.process_time() - own, self._server.cpu_seconds() - its
        self.rows.append(
            Row(
                what=what,
                exchanges=total,
                per_second=round(total / sum(took)),
                p50_ms=round(cuts[49] * 1000, 1),
                p99_ms=round(cuts[98] * 1000, 1),
                own_us=round(own / total * 1e6),
                server_us=round(its / total * 1e6),
            )
        )


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


def split(sent: list[Exchange]) -> list[list[Exchange]]:
    return [sent[start : start + BATCH] for start in range(0, len(sent), BATCH)]


async def append(store: LogStore, batches: list[list[Exchange]]) -> AsyncIterator[int]:
    for batch in batches:
        await store.append(batch)
        yield len(batch)


async def scan(store: LogStore) -> AsyncIterator[int]:
    seen = 0
    async for _ in store.scan(Query(kind="any")):
        seen += 1
        if seen % BATCH == 0:
            yield BATCH


async def write(sink: FileSink, batches: list[list[Exchange]]) -> AsyncIterator[int]:
    for number, batch in enumerate(batches):
        await sink.write(str(number), batch)
        yield len(batch)


async def run(server: ElasticsearchServer, count: int) -> list[Row]:
    meter = Meter(server)
    batches = split(exchanges(count))
    store = open_log_store(f"elasticsearch+{server.url}/bench-{os.getpid()}")
    try:
        await store.append(exchanges(BATCH))  # makes the index
        await meter.measure("append, server just started", append(store, split(exchanges(count))))
        for batch in split(exchanges(count)):  # until its compiler has seen enough
            await store.append(batch)
        await meter.measure("append", append(store, batches))
        await meter.measure("append, all there already", append(store, batches))
        await asyncio.sleep(1.5)  # the server's refresh
        await meter.measure("scan", scan(store))
    finally:
        await store.close()
    for format in ("parquet", "jsonl"):
        with tempfile.TemporaryDirectory() as folder:
            await meter.measure(f"write {format}", write(open_sink(f"file://{folder}?format={format}"), batches))
    return meter.rows


def show(rows: list[Row]) -> None:
    load = " ".join(f"{load:.1f}" for load in os.getloadavg())
    print(f"batches of {BATCH}, {PAYLOAD} bytes each; {os.cpu_count()} cores, load {load}, {platform.python_version()}")
    print(f"{'':<28}{'exchanges':>10}{'a second':>10}{'batch p50 ms':>14}{'p99 ms':>9}{'us here':>9}{'us there':>10}")
    for row in rows:
        numbers = f"{row.exchanges:>10}{row.per_second:>10}{row.p50_ms:>14.1f}{row.p99_ms:>9.1f}"
        print(f"{row.what:<28}{numbers}{row.own_us:>9}{row.server_us:>10}")
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
        rows = asyncio.run(run(server, arguments.exchanges))
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
