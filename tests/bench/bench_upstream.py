"""What the ways up cost: choosing one, loading litellm beside live traffic, and a call by each of them.

python -m tests.bench.bench_upstream
"""

import asyncio
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from timeit import repeat

import uvloop

from gateway.upstream import Upstream, UpstreamRequest
from gateway.upstream.chosen import ChosenUpstream
from gateway.upstream.direct import DirectUpstream
from gateway.upstream.via_litellm import LitellmUpstream
from routing.targets import Model
from tests.gateway.anthropic import TEXT, message, stream, text
from tests.gateway.fakes import ok, upstream

ROUNDS, CALLS, EVENTS = 200_000, 300, 2_000
BODY = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hi" * 500}]}).encode()
REQUEST = UpstreamRequest(path="/chat/completions", headers=[(b"content-type", b"application/json")], body=BODY)


def choosing(pool: Upstream, model: Model) -> float:
    """Nanoseconds to make the coroutine of a call, and to drop it."""
    return min(repeat(lambda: pool.send(model, REQUEST).close(), number=ROUNDS, repeat=7)) / ROUNDS * 1e9


async def worst_gap(providers: LitellmUpstream, model: Model) -> tuple[float, float, float]:
    """Seconds to load litellm; the longest and the 99th percentile of what a loop that wakes each ms was late."""
    began, late = time.perf_counter(), []
    providers.prepare({"m": model})
    loading = asyncio.ensure_future(providers.send(model, REQUEST))
    while not loading.done():
        before = time.perf_counter()
        await asyncio.sleep(0.001)
        late.append(time.perf_counter() - before - 0.001)
    (await loading).close()
    late.sort()
    return time.perf_counter() - began, late[-1], late[len(late) * 99 // 100]


async def cpu_per_call(pool: Upstream, model: Model) -> float:
    """Microseconds of CPU time, the fake upstream's included."""

    async def call() -> None:
        reply = await pool.send(model, REQUEST)
        while not reply.complete:
            await reply.read()
        reply.close()

    for _ in range(CALLS // 3):
        await call()
    began = time.process_time()
    for _ in range(CALLS):
        await call()
    return (time.process_time() - began) / CALLS * 1e6


async def cpu_per_event(pool: Upstream, model: Model) -> float:
    """Microseconds of CPU time for an event of a stream, the fake upstream's included."""
    streamed = UpstreamRequest(path=REQUEST.path, headers=REQUEST.headers, body=BODY[:-1] + b', "stream": true}')
    began = time.process_time()
    reply = await pool.send(model, streamed)
    while not reply.complete:
        await reply.read()
    return (time.process_time() - began) / EVENTS * 1e6


async def beside(pool: Upstream, direct: Model, provider: Model) -> tuple[float, float]:
    """The median and the 99th percentile, in ms, of direct calls while a provider is called without a pause."""
    stop = asyncio.Event()

    async def busy() -> None:
        while not stop.is_set():
            reply = await pool.send(provider, REQUEST)
            reply.close()

    running = asyncio.ensure_future(busy())
    took = []
    for _ in range(CALLS):
        began = time.perf_counter()
        reply = await pool.send(direct, REQUEST)
        await reply.read()
        reply.close()
        took.append((time.perf_counter() - began) * 1000)
        await asyncio.sleep(0.002)
    stop.set()
    await running
    took.sort()
    return took[CALLS // 2], took[CALLS * 99 // 100]


async def measure() -> None:
    sys.setswitchinterval(0.001)  # as a worker does
    providers = LitellmUpstream()
    chosen, alone = ChosenUpstream(providers), DirectUpstream()
    async with upstream(ok()) as fake, upstream(message(TEXT)) as anthropic:
        direct = Model(name="d", upstream="openai", base_url=fake.url, model="big")
        url = anthropic.url.removesuffix("/v1")
        claude = Model(
            name="c", upstream="litellm", base_url=url, model="anthropic/claude-sonnet-4-5", api_key="k" * 20
        )
        print(f"choosing: {choosing(alone, direct):.0f} ns direct alone, {choosing(chosen, direct):.0f} ns chosen")
        print(f"direct, litellm not loaded: {await cpu_per_call(chosen, direct):.0f} us CPU a call, fake included")
        before = int(Path("/proc/self/statm").read_text().split()[1]) * 4 // 1024
        seconds, worst, usual = await worst_gap(providers, claude)
        late = f"{worst * 1e3:.0f} ms at most, p99 {usual * 1e3:.1f} ms"
        print(f"loading litellm: {seconds:.1f} s; the loop was late by {late}")
        print(f"direct, litellm loaded: {await cpu_per_call(chosen, direct):.0f} us")
        print(f"a provider: {await cpu_per_call(chosen, claude):.0f} us")
        async with upstream(stream(text(*("x" * EVENTS)))) as streaming:
            telling = replace(claude, base_url=streaming.url.removesuffix("/v1"))
            print(f"a provider's stream: {await cpu_per_event(chosen, telling):.0f} us an event")
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4 // 1024
        print(f"resident: {before} MB without litellm, {resident} MB with it")
        median, tail = await beside(chosen, direct, claude)
        print(f"direct beside a provider's calls: p50 {median:.2f} ms, p99 {tail:.2f} ms")
    await chosen.close()
    await providers.close()


if __name__ == "__main__":
    uvloop.run(measure())
