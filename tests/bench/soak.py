"""The long forms of the log's fault tests, and memory over time. Writes its result beside itself.

python -m tests.bench.soak [--minutes 10] [--kills 50] [--clients 64] [--only kills store disk memory]
"""

import argparse
import asyncio
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from tests.gateway.fakes import as_asked, upstream
from tests.gateway.faults import disk_full, kill_workers, parity, store_faults
from tests.gateway.served import Load, Served
from tests.postgres import running_postgres

RESULT = Path(__file__).with_name("soak.json")


async def kills(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    found = await kill_workers(folder, kills=arguments.kills, clients=arguments.clients)
    return found | {"passed": found["lost"] == found["doubled"] == 0}


async def store(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    with running_postgres() as server:
        server.psql("CREATE DATABASE faults")
        found = await store_faults(folder, server, "faults", seconds=arguments.minutes * 60 / 4, clients=16)
    passed = found["client_errors"] == found["lost"] == found["doubled"] == 0
    return found | {"passed": passed and found["logged"] == found["answered"]}


async def disk(folder: Path, _arguments: argparse.Namespace) -> dict[str, Any]:
    serve = await disk_full(folder / "serve", on_full="serve")
    refuse = await disk_full(folder / "refuse", on_full="refuse")
    counted = serve["logged"] + serve["dropped"] == serve["called_upstream"]
    return {"serve": serve, "refuse": refuse, "passed": counted and refuse["logged"] == refuse["called_upstream"]}


async def memory(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Resident memory of each process under steady load: the last half against the first, start-up left out."""
    served = Served.make(folder)
    samples: dict[str, list[int]] = {}
    async with upstream(as_asked()) as fake:
        served.route_to(fake.url)
        await served.start()
        load = Load()
        asking = asyncio.ensure_future(load.run(served, 16))
        end = time.monotonic() + arguments.minutes * 60
        while time.monotonic() < end:
            await asyncio.sleep(min(2.0, arguments.minutes))
            for name, pid in pids(served):
                samples.setdefault(name, []).append(resident(pid))
            load.seconds.clear()
            load.statuses.clear()
        load.stop.set()
        await asking
        assert await served.stop() == 0
    await served.ship_leftovers()
    largest = {name: round(max(values) / 2**20, 1) for name, values in samples.items()}
    growth = {name: grown(values) for name, values in samples.items()}
    counted = parity(load, await served.logged())
    return {
        "exchanges": len(load.ids), **counted, "resident_mib": largest,
        "growth": growth, "passed": counted["lost"] == counted["doubled"] == 0 and max(growth.values()) <= 1.05,
    }  # fmt: skip


def pids(served: Served) -> list[tuple[str, int]]:
    assert served.process is not None
    workers = [(f"worker {n}", pid) for n, pid in enumerate(served.pids("gateway.worker"))]
    return [("serve", served.process.pid), *workers, *(("shipper", pid) for pid in served.pids("gateway.ship"))]


def resident(pid: int) -> int:
    """Bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def grown(values: list[int]) -> float:
    """The mean of the last half over that of the first, without the first tenth, in which caches fill."""
    steady = values[len(values) // 10 :]
    middle = len(steady) // 2
    first, last = steady[:middle] or steady, steady[middle:]
    return round(sum(last) / len(last) / (sum(first) / len(first)), 4)


SCENARIOS: dict[str, Callable[[Path, argparse.Namespace], Awaitable[dict[str, Any]]]] = {
    "kills": kills, "store": store, "disk": disk, "memory": memory,
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Exit code 1: a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    arguments = parser.parse_args(argv)
    results: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    for name in arguments.only:
        folder = Path(tempfile.mkdtemp(prefix="understudy-soak-"))
        started = time.monotonic()
        try:
            results[name] = asyncio.run(SCENARIOS[name](folder, arguments))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        results[name] |= {"seconds": round(time.monotonic() - started), "date": time.strftime("%Y-%m-%d")}
        results["machine"] = {"cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}
        RESULT.write_text(json.dumps(results, indent=2) + "\n")
        print(name, json.dumps(results[name]))
    return 0 if all(results[name]["passed"] for name in arguments.only) else 1


if __name__ == "__main__":
    raise SystemExit(main())
