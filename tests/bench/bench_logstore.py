"""What the SQL log stores cost: bytes with and without folding, and exchanges a second.

python -m tests.bench.bench_logstore [--json] [--fold-from BYTES] [--exchanges N] [--store sqlite|postgres]
"""

import argparse
import asyncio
import json
import random
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from gateway.ids import id_at
from gateway.logstore import LogStore, Query
from gateway.logstore.history import FOLD_FROM
from gateway.logstore.postgres import PostgresLogStore
from gateway.logstore.sqlite import SqliteLogStore
from gateway.records import JSON, Exchange, Usage
from tests.postgres import CannotRun, PostgresServer, running_postgres

BATCH = 500
TURNS = 10
START = 1_760_000_000_000  # milliseconds
OFF = sys.maxsize  # no group of messages is that long


@dataclass(frozen=True)
class Result:
    """One store under one traffic. `append_per_cpu_s` counts this process's CPU, not the server's."""

    traffic: str
    store: str
    folded: bool
    exchanges: int
    bytes: int
    append_per_s: int
    append_per_cpu_s: int
    scan_per_s: int


class Texts:
    """Reproducible prose."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        letters = "etaoinshrdlucmfwypvbgk"
        self._words = ["".join(self._random.choices(letters, k=self._random.randint(2, 9))) for _ in range(5000)]

    def of(self, size: int) -> str:
        return " ".join(self._random.choices(self._words, k=size // 4))[:size]


def tools(texts: Texts, size: int = 1500) -> list[JSON]:
    """A list of function tools, `size` bytes of JSON."""
    found: list[JSON] = []
    while len(json.dumps(found)) < size:
        parameters = {"type": "object", "properties": {"slot": {"type": "string", "description": texts.of(60)}}}
        name = f"tool_{len(found)}"
        found.append(
            {"type": "function", "function": {"name": name, "description": texts.of(90), "parameters": parameters}}
        )
    return found


def exchange(number: int, request: JSON, reply: JSON) -> Exchange:
    return Exchange(
        id=id_at(START + number * 20, number.to_bytes(10, "big")), timestamp=(START + number * 20) / 1000,
        workload_id="support-router", client_id="shop", session_id=f"session-{number % 500}", model="prod",
        status=200, latency_ms=412.7, ttft_ms=80.2, usage=Usage(input_tokens=512, output_tokens=64), cost_usd=0.0004,
        config_snapshot="1f0c88a31b2d", trace_id=f"{number:032x}", request=request,
        response={"id": f"chatcmpl-{number:024x}", "object": "chat.completion", "created": START // 1000 + number,
                  "model": "meta/llama-3.3-70b-instruct",
                  "choices": [{"index": 0, "message": reply, "finish_reason": "stop"}],
                  "usage": {"prompt_tokens": 512, "completion_tokens": 64, "total_tokens": 576}},
    )  # fmt: skip


def router(count: int) -> Iterator[Exchange]:
    """Single turns with the same system prompt and 1.5 KB of tools: what is new is a short question and a tool call."""
    texts = Texts(1)
    same, system = tools(texts), {"role": "system", "content": texts.of(900)}
    for number in range(count):
        call = {"name": f"tool_{number % 5}", "arguments": json.dumps({"slot": texts.of(20)})}
        reply = {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": f"call_{number:08x}", "type": "function", "function": call}],
        }
        messages = [system, {"role": "user", "content": texts.of(120)}]
        yield exchange(number, {"model": "prod", "messages": messages, "tools": same, "tool_choice": "auto"}, reply)


def conversations(count: int) -> Iterator[Exchange]:
    """Conversations of ten turns, side by side: each request sends everything that was said before."""
    texts = Texts(2)
    system = {"role": "system", "content": texts.of(400)}
    said: list[list[JSON]] = [[system] for _ in range(max(1, count // TURNS))]
    for number in range(count):
        history = said[number % len(said)]
        history.append({"role": "user", "content": texts.of(150)})
        reply = {"role": "assistant", "content": texts.of(500)}
        yield exchange(number, {"model": "prod", "messages": list(history), "temperature": 0.2}, reply)
        history.append(reply)


def unrelated(count: int) -> Iterator[Exchange]:
    """2 KB of payload of which nothing repeats."""
    texts = Texts(3)
    for number in range(count):
        request = {"model": "prod", "messages": [{"role": "user", "content": texts.of(1000)}]}
        yield exchange(number, request, {"role": "assistant", "content": texts.of(650)})


async def measured(store: LogStore, batches: list[list[Exchange]]) -> tuple[float, float, float]:
    """Seconds of appending, CPU seconds of appending, seconds of reading all."""
    try:
        await store.counts()
        began, cpu = time.perf_counter(), time.process_time()
        for batch in batches:
            await store.append(batch)
        append, cpu = time.perf_counter() - began, time.process_time() - cpu
        began = time.perf_counter()
        read = [found.id async for found in store.scan(Query())]
        assert len(read) == sum(map(len, batches))
        return append, cpu, time.perf_counter() - began
    finally:
        await store.close()


def sqlite_bytes(path: Path) -> int:
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    return path.stat().st_size


def postgres_bytes(server: PostgresServer, database: str) -> int:
    tables = "SELECT sum(pg_total_relation_size(oid)) FROM pg_class WHERE relkind = 'r'"
    return int(server.psql(f"{tables} AND relnamespace = 'understudy_log'::regnamespace", database))


def results(names: list[str], count: int, fold_from: int) -> Iterator[Result]:
    traffics: list[Callable[[int], Iterator[Exchange]]] = [router, conversations, unrelated]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(running_postgres()) if "postgres" in names else None
        for position, (traffic, name, folded) in enumerate(
            (t, n, f) for t in traffics for n in names for f in (False, True)
        ):
            source = iter(traffic(count))
            batches = list(iter(lambda source=source: list(islice(source, BATCH)), []))
            limit, database = fold_from if folded else OFF, f"bench_{position}"
            path = folder / f"{database}.db"
            store: LogStore = SqliteLogStore(path, fold_from=limit)
            if name == "postgres" and server is not None:
                server.psql(f"CREATE DATABASE {database}")
                store = PostgresLogStore(server.url(database).replace("+asyncpg", ""), fold_from=limit)
            append, cpu, scan = asyncio.run(measured(store, batches))
            size = postgres_bytes(server, database) if name == "postgres" and server else sqlite_bytes(path)
            yield Result(
                traffic.__name__, name, folded, count, size, *(round(count / each) for each in (append, cpu, scan))
            )


def main() -> int:
    """Print one line a measurement."""
    parser = argparse.ArgumentParser(description="Measure the SQL log stores.")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--fold-from", type=int, default=FOLD_FROM)
    parser.add_argument("--exchanges", type=int, default=5000)
    parser.add_argument("--store", choices=["sqlite", "postgres"], action="append")
    given = parser.parse_args()
    line = "{:<14} {:<9} {:<7} {:>9} {:>12} {:>10} {:>13} {:>10}"
    if not given.json:
        print(line.format("traffic", "store", "folded", "exchanges", "bytes", "append/s", "append/cpu s", "scan/s"))
    try:
        for result in results(given.store or ["sqlite", "postgres"], given.exchanges, given.fold_from):
            print(
                json.dumps(asdict(result)) if given.json else line.format(*map(str, asdict(result).values())),
                flush=True,
            )
    except CannotRun as why:
        print(why, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
