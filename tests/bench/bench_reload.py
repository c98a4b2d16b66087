"""What a changed routing.yaml of 1,000 workloads costs: `python -m tests.bench.bench_reload [--workers N]`.

The first figures are CPU time, which other processes on the machine do not lengthen: reading the file, and the longest
time that taking the rules in kept a worker's event loop from running. The last is by the clock, from the file's change
until every worker of `understudy serve` routes by it.
"""

import argparse
import asyncio
import gc
import sys
import tempfile
import time
from pathlib import Path

import httpx

from gateway.config import Settings
from gateway.publish import Publisher, signature_of
from gateway.snapshot import Snapshot
from gateway.telemetry import Metrics
from gateway.versions import Versions
from routing.rules import parse
from routing.store import Rollouts, connect
from tests.gateway.served import Served

WORKLOADS, ROUNDS = 1000, 5
WORKLOAD = """\
  w{n}:
    match: {{header: {{x-team: t{n}}}, model: [m{n}, gpt-4o], system_pattern: '(?i)desk {n}{edition}\\b'}}
    serve: prod
    fallbacks: [small]
    mirror: [{{model: small, sample: 0.1}}]
    rollout:
      steps: [{{mirror: 0.2, min_pairs: 200}}, {{weight: 5, hold: 10m}}, {{weight: 100}}]
      gates:
        - {{metric: tool_name, prove: {{at_least: .80}}}}
        - {{metric: error_rate, guard: {{at_most: 0.01}}}}
    flywheel: {{base_models: [small]}}
"""


def routing(edition: int) -> str:
    """A file of 1,000 workloads; another edition has other patterns."""
    models = "".join(
        f"  {name}: {{upstream: vllm, base_url: http://127.0.0.1:9/v1, model: {name}, adapters: true}}\n"
        for name in ("prod", "small")
    )
    workloads = "".join(WORKLOAD.format(n=n, edition=edition) for n in range(WORKLOADS))
    return f"version: 1\nmodels:\n{models}workloads:\n{workloads}default: {{serve: prod}}\n"


async def longest_hold(folder: Path) -> float:
    """Seconds of CPU time between two turns of the event loop, at most, while new rules are taken in."""
    settings = Settings(data_dir=folder, routing_file=folder / "routing.yaml")
    settings.run_dir.mkdir(exist_ok=True)
    engine = connect(settings.database)
    rollouts, versions = Rollouts(engine), Versions(engine, poll=settings.gateway.overlay_poll)
    longest = []
    for edition in range(ROUNDS):
        settings.routing_file.write_text(routing(2 * edition))
        publisher = Publisher(settings)
        publisher.start()
        snapshot = Snapshot(settings, rollouts, versions, Metrics())
        before = snapshot.table.snapshot
        settings.routing_file.write_text(routing(2 * edition + 1))
        publisher.look()
        publisher.look()
        taking = asyncio.ensure_future(snapshot._take_rules(signature_of(settings.run_dir / "rules.bin")))
        hold, last = 0.0, time.process_time()
        while not taking.done():
            await asyncio.sleep(0)
            now = time.process_time()
            hold, last = max(hold, now - last), now
        assert snapshot.table.snapshot != before
        longest.append(hold)
    await engine.dispose()
    return sorted(longest)[len(longest) // 2]


async def until_live(folder: Path, workers: int) -> float:
    """Seconds from the file's change until no worker routes by the old one."""
    served = Served.make(folder, workers=workers)
    file = folder / "routing.yaml"
    file.write_text(routing(0))
    await served.start()
    url = f"http://127.0.0.1:{served.port}/readyz"
    limits = httpx.Limits(max_keepalive_connections=0)
    try:
        async with httpx.AsyncClient(limits=limits) as client:
            old = (await client.get(url)).json()["snapshot"]
            fresh = folder / "fresh.yaml"
            fresh.write_text(routing(1))
            started = time.perf_counter()
            fresh.replace(file)
            last = 0.0
            while (now := time.perf_counter() - started) < 5:
                if (await client.get(url)).json()["snapshot"] == old:
                    last = now
        return last
    finally:
        await served.stop()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.bench_reload", description="What a reload costs.")
    parser.add_argument("--workers", type=int, default=2, help="of the gateway, for the time until it is live")
    workers = parser.parse_args().workers
    sys.setswitchinterval(0.001)  # as gateway.worker does
    text = routing(0)
    gc.disable()  # as gateway.publish does
    start = time.process_time()
    parse(text, "routing.yaml", {})
    print(f"reading {len(text):,} bytes: {(time.process_time() - start) * 1000:.0f} ms")
    gc.enable()
    gc.freeze()  # as gateway.worker does
    with tempfile.TemporaryDirectory() as folder:
        print(f"the event loop waits at most: {asyncio.run(longest_hold(Path(folder))) * 1000:.1f} ms")
    with tempfile.TemporaryDirectory() as folder:
        print(f"live in each of {workers} workers after: {asyncio.run(until_live(Path(folder), workers)):.2f} s")


if __name__ == "__main__":
    main()
