"""What the log's way costs: microseconds of event loop an exchange, and exchanges a second from spool to store.

python -m tests.bench.bench_spool [--json] [--store sqlite|postgres|elasticsearch ...] [--exchanges N]
"""

import argparse
import asyncio
import contextlib
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import orjson

from gateway.config import Settings, SpoolSettings
from gateway.errors import StoreError
from gateway.feedback import frame_of, read_feedback
from gateway.ids import new_id
from gateway.logstore.open import open_log_store
from gateway.ship import Shipper, StoreReader
from gateway.spool import Kind, Spool
from gateway.telemetry import Metrics
from routing.targets import Privacy
from tests.elasticsearch_server import ElasticsearchServer, Unavailable
from tests.postgres import CannotRun, running_postgres

APPENDS = 20_000


def header(**more: Any) -> dict[str, Any]:
    """As long as a real one."""
    return {
        "id": new_id(), "timestamp": time.time(), "workload_id": "support-router", "path": "/v1/chat/completions",
        "client_id": "web", "session_id": "5f0c", "config_snapshot": "d3b07384d113", "arm": "incumbent",
        "outcome": "ok", "status": 200, "latency_ms": 312.4, "ttft_ms": 311.2, "model": "prod-70b", "provider": "nim",
        "price": [0.6, 0.6],
    } | more  # fmt: skip


def bodies(size: int) -> tuple[bytes, bytes]:
    """A request and a reply of `size` bytes together."""
    said = "where is my parcel, it was to come on monday; " * (size // 40)
    request = orjson.dumps({"model": "m", "messages": [{"role": "user", "content": said[: size * 3 // 4]}]})
    message = {"role": "assistant", "content": said[: size // 4 - 150]}
    usage = {"prompt_tokens": 300, "completion_tokens": 20}
    return request, orjson.dumps({"choices": [{"index": 0, "message": message}], "usage": usage})


def appends(folder: Path, size: int) -> dict[str, float]:
    """Microseconds to note a call and to append its exchange, and for a plain write of the same bytes."""
    request, reply = bodies(size)
    spool = Spool(folder, SpoolSettings(fsync="never"), Metrics())
    started = time.perf_counter()
    for _ in range(APPENDS):
        one = header()
        kind = spool.begin({"id": one["id"], "timestamp": one["timestamp"], "workload_id": "w"}, request)
        spool.append(one | {"frame": kind}, request if kind is Kind.WHOLE else b"", (reply,))
    spooled = time.perf_counter() - started
    started = time.perf_counter()
    for _ in range(APPENDS):
        header() | {"frame": Kind.CLOSE}
    building = time.perf_counter() - started
    spool.close()
    data = request + reply
    with (folder / "plain").open("wb", buffering=0) as file:
        started = time.perf_counter()
        for _ in range(APPENDS):
            file.write(data)
        plain = time.perf_counter() - started
    return {"spool_us": (spooled - building) / APPENDS * 1e6, "plain_write_us": plain / APPENDS * 1e6}


def feedback(folder: Path) -> dict[str, float]:
    """Microseconds to read half a kilobyte of feedback, and to spool it."""
    call = {"type": "function", "function": {"name": "track_parcel", "arguments": orjson.dumps({"id": 7}).decode()}}
    said = {"exchange_id": new_id(), "rating": "down", "comment": "not my parcel " * 18, "correction": [call]}
    body, headers = orjson.dumps(said), {"content-type": "application/json", "x-client-id": "web"}
    spool = Spool(folder, SpoolSettings(fsync="never"), Metrics())
    started = time.perf_counter()
    for _ in range(APPENDS):
        one = read_feedback(body, headers, new_id(), time.time())
    reading = time.perf_counter() - started
    started = time.perf_counter()
    for _ in range(APPENDS):
        spool.append(*frame_of(one, Privacy()))
    spooling = time.perf_counter() - started
    spool.close()
    return {"read_us": reading / APPENDS * 1e6, "spool_us": spooling / APPENDS * 1e6}


async def ships(folder: Path, url: str, exchanges: int) -> dict[str, float]:
    """Exchanges of 2 KB a second from a full spool to a store, and the shipper's CPU for one."""
    request, reply = bodies(2048)
    settings = Settings(data_dir=folder)
    settings.run_dir.mkdir(parents=True)
    spool = Spool(settings.spool_dir, settings.spool, Metrics())
    for n in range(exchanges):
        one = header(client_id=f"c{n % 50}")
        body = request.replace(b"parcel", b"parcel %08d" % n)
        spool.append(one | {"frame": Kind.WHOLE}, body, (reply,))
    spool.close()
    store = open_log_store(url)
    shipper = Shipper(settings, [StoreReader(store, 500)])
    with contextlib.suppress(StoreError):
        await store.counts()
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    started = time.perf_counter()
    await shipper.ship_all()
    seconds = time.perf_counter() - started
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2]) - used
    await asyncio.sleep(2.0)  # Elasticsearch shows what it has once a second
    found = (await store.counts()).live
    await store.close()
    if found != exchanges:
        raise SystemExit(f"{url.partition(':')[0]}: {found} of {exchanges} exchanges arrived")
    return {"per_second": exchanges / seconds, "us_of_cpu": used / exchanges * 1e6}


def stores(names: list[str], folder: Path, stack: ExitStack) -> Iterator[tuple[str, str]]:
    """The URL of an empty store of each kind that can run here."""
    for name in names:
        try:
            if name == "sqlite":
                yield name, f"sqlite:///{folder}/log.db"
            elif name == "postgres":
                server = stack.enter_context(running_postgres())
                yield name, server.url("postgres").replace("+asyncpg", "")
            else:
                elastic = ElasticsearchServer(os.environ.get("ELASTICSEARCH_URL"))
                if elastic.own:
                    elastic.start()
                    stack.callback(elastic.stop)
                yield name, f"elasticsearch+{elastic.url}/bench"
        except (CannotRun, Unavailable) as error:
            sys.stderr.write(f"{name}: {error}\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.bench_spool", description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--store", nargs="*", default=["sqlite", "postgres", "elasticsearch"])
    parser.add_argument("--exchanges", type=int, default=20_000)
    arguments = parser.parse_args(argv)
    result: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        result["append 4 KB"] = appends(folder / "append", 4096)
        result["feedback"] = feedback(folder / "feedback")
        for store, url in stores(arguments.store, folder, stack):
            result[f"ship to {store}"] = asyncio.run(ships(folder / store, url, arguments.exchanges))
    if arguments.json:
        print(json.dumps(result, indent=2))
        return 0
    for what, figures in result.items():
        print(f"{what:22}", "  ".join(f"{name} {value:,.1f}" for name, value in figures.items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
