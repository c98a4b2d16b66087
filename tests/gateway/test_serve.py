"""`understudy serve` as real processes: nothing that a client was given whole is ever lost, whoever is killed."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from gateway.logstore import Query
from gateway.logstore.sqlite import SqliteLogStore
from gateway.records import Outcome
from tests.gateway.fakes import chunk, ok, sse, upstream

ROUTING = "version: 1\nmodels:\n  prod: {{upstream: nim, base_url: '{url}', model: big}}\ndefault: {{serve: prod}}\n"


@dataclass
class Served:
    """A gateway's processes: started, killed and started again on one port and one data folder."""

    folder: Path
    port: int
    process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Return when its own workers answer; those of a killed one may still do, while they have the port."""
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "flywheel.cli", "serve", "--config", str(self.folder / "understudy.toml"),
            start_new_session=True,
        )  # fmt: skip
        async with asyncio.timeout(30), httpx.AsyncClient() as client:
            while len(children(self.process.pid)) < 3:  # two workers and the shipper are started once it has the port
                await asyncio.sleep(0.05)
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if (await client.get(f"http://127.0.0.1:{self.port}/healthz")).status_code == 200:
                        return
                await asyncio.sleep(0.05)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()

    async def stop(self) -> int:
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)
        return await asyncio.wait_for(self.process.wait(), 30)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    """Not started yet; stopped at the end."""
    made = Served(tmp_path, free_port())
    (tmp_path / "understudy.toml").write_text(
        f'data_dir = "{tmp_path}/data"\nrouting_file = "{tmp_path}/routing.yaml"\n'
        f"[gateway]\nport = {made.port}\nworkers = 2\ndrain = 3\n"
    )
    yield made
    if made.process is not None and made.process.returncode is None:
        await made.stop()


async def answered(served: Served, n: int, stop: asyncio.Event) -> set[str]:
    """Ask until `stop`, `n` at a time; the ids of the exchanges whose replies came whole."""
    ids: set[str] = set()

    async def ask(client: httpx.AsyncClient) -> None:
        while not stop.is_set():
            try:
                reply = await client.post("/v1/chat/completions", json={"model": "m", "messages": []})
                assert reply.status_code == 200
                ids.add(reply.headers["x-understudy-exchange-id"])
            except httpx.TransportError:
                await asyncio.sleep(0.02)

    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{served.port}", timeout=5) as client:
        await asyncio.gather(*(ask(client) for _ in range(n)))
    return ids


async def ship_leftovers(folder: Path) -> None:
    """What a shipper that was killed last had not shipped yet: whoever is alive does it."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gateway.ship", "--once", "--config", str(folder / "understudy.toml")
    )
    assert await process.wait() == 0
    assert list(folder.glob("data/spool/*/*.seg")) == []


async def logged(folder: Path) -> list[str]:
    store = SqliteLogStore(folder / "data" / "log.db")
    try:
        return [exchange.id async for exchange in store.scan(Query())]
    finally:
        await store.close()


def children(pid: int) -> list[tuple[int, str]]:
    """The pids and command lines of a process's children."""
    listing = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [
        (int(child), Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode()) for child in listing
    ]


@pytest.mark.parametrize("victim", ["parent", "gateway.worker", "gateway.ship"])
async def test_kill_9_loses_no_answered_exchange(served: Served, victim: str) -> None:
    """Under load a process is killed, twice; every reply that a client got whole is in the log store exactly once."""
    async with upstream(ok()) as fake:
        (served.folder / "routing.yaml").write_text(ROUTING.format(url=fake.url))
        await served.start()
        stop = asyncio.Event()
        asking = asyncio.ensure_future(answered(served, 8, stop))
        for _ in range(2):
            await asyncio.sleep(0.5)
            assert served.process is not None
            if victim == "parent":
                served.kill()
                await served.process.wait()
                await served.start()
            else:
                (pid, *_) = [pid for pid, line in children(served.process.pid) if victim in line]
                os.kill(pid, signal.SIGKILL)
        await asyncio.sleep(0.5)
        stop.set()
        ids = await asking
        assert await served.stop() == 0
    await ship_leftovers(served.folder)
    found = await logged(served.folder)
    assert len(ids) > 50
    assert ids <= set(found)
    assert len(found) == len(set(found))


async def test_a_call_in_flight_at_kill_9_is_found_again(served: Served) -> None:
    """With its request, and what had come of the reply, as `gateway_killed`."""
    async with upstream(sse(chunk("half"), end="hang")) as fake, httpx.AsyncClient(timeout=10) as client:
        (served.folder / "routing.yaml").write_text(ROUTING.format(url=fake.url))
        await served.start()
        body = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "in flight"}]}
        url = f"http://127.0.0.1:{served.port}/v1/chat/completions"
        reply = await client.send(client.build_request("POST", url, json=body), stream=True)
        parts = reply.aiter_raw()
        await anext(parts)
        assert served.process is not None
        for pid, line in children(served.process.pid):
            if "gateway.worker" in line:
                os.kill(pid, signal.SIGKILL)
        with pytest.raises(httpx.TransportError):
            await anext(parts)
        await served.stop()
    await ship_leftovers(served.folder)
    store = SqliteLogStore(served.folder / "data" / "log.db")
    (found,) = [exchange async for exchange in store.scan(Query())]
    await store.close()
    assert (found.id, found.outcome) == (reply.headers["x-understudy-exchange-id"], Outcome.GATEWAY_KILLED)
    assert found.request == body


async def test_drain_lets_replies_finish(served: Served) -> None:
    """SIGTERM while a reply is under way: it ends whole, and is logged."""
    gate = asyncio.Event()
    asked = asyncio.Event()

    async def slow(request: object, writer: asyncio.StreamWriter) -> None:
        asked.set()
        await gate.wait()
        await ok()(request, writer)  # type: ignore[arg-type]

    async with upstream(slow) as fake, httpx.AsyncClient(timeout=10) as client:
        (served.folder / "routing.yaml").write_text(ROUTING.format(url=fake.url))
        await served.start()
        call = asyncio.ensure_future(
            client.post(f"http://127.0.0.1:{served.port}/v1/chat/completions", json={"model": "m", "messages": []})
        )
        await asked.wait()
        ending = asyncio.ensure_future(served.stop())
        await asyncio.sleep(0.3)
        gate.set()
        assert (await call).status_code == 200
        assert await ending == 0
    assert len(await logged(served.folder)) == 1


@pytest.mark.parametrize(
    ("routing", "message"),
    [
        (
            ROUTING.format(url="http://127.0.0.1:9/v1").replace("serve: prod", "serve: gone"),
            "routing.yaml:4: default.serve",
        ),
        ("version: 1\nmodles: {}\n", "routing.yaml:2: modles"),
    ],
)
async def test_wrong_routing_is_one_line(served: Served, routing: str, message: str) -> None:
    """File, line and key; no traceback; exit code 2."""
    (served.folder / "routing.yaml").write_text(routing)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "flywheel.cli", "serve", "--config", str(served.folder / "understudy.toml"),
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    _, stderr = await process.communicate()
    assert process.returncode == 2
    assert message in stderr.decode()
    assert "Traceback" not in stderr.decode()


async def test_network_needs_a_word(served: Served) -> None:
    """An address that others reach is refused unless the setting says so."""
    (served.folder / "routing.yaml").write_text(ROUTING.format(url="http://127.0.0.1:9/v1"))
    text = (served.folder / "understudy.toml").read_text().replace("[gateway]", '[gateway]\nhost = "0.0.0.0"')
    (served.folder / "understudy.toml").write_text(text)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "flywheel.cli", "serve", "--config", str(served.folder / "understudy.toml"),
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    _, stderr = await process.communicate()
    assert process.returncode == 2
    assert "open_to_network" in stderr.decode()
