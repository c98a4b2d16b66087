"""`understudy serve` as real processes, which tests start, load, kill and read the log of."""

import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from gateway.config import load_settings
from gateway.logstore import Query
from gateway.logstore.open import open_log_store
from gateway.records import Exchange
from tests.ports import free_port

ROUTING = "version: 1\nmodels:\n  prod: {{upstream: nim, base_url: '{url}', model: big}}\ndefault: {{serve: prod}}\n"
CHAT = "/v1/chat/completions"


@dataclass
class Served:
    """A gateway's processes: started, killed and started again on one port and one data folder."""

    folder: Path
    port: int
    workers: int = 2
    process: asyncio.subprocess.Process | None = None
    log: Path | None = None  # what the processes write; None: where this one does

    @classmethod
    def make(
        cls,
        folder: Path,
        *,
        top: Sequence[str] = (),
        edge: Sequence[str] = (),
        spool: Sequence[str] = (),
        workers: int = 2,
    ) -> "Served":
        """Not started yet. `top`, `edge` and `spool` are more lines of its settings file."""
        made = cls(folder, free_port(), workers)
        lines = [f'data_dir = "{folder}/data"', f'routing_file = "{folder}/routing.yaml"', *top]
        lines += ["[gateway]", f"port = {made.port}", f"workers = {workers}", "drain = 3", *edge, "[spool]", *spool]
        made.config.write_text("\n".join(lines) + "\n")
        return made

    @property
    def config(self) -> Path:
        return self.folder / "understudy.toml"

    def route_to(self, url: str) -> None:
        (self.folder / "routing.yaml").write_text(ROUTING.format(url=url))

    async def start(self) -> None:
        """Return when its own workers answer; those of a killed one may still do, while they have the port."""
        command = ("-m", "flywheel.cli", "serve", "--config", str(self.config))
        with self.log.open("ab") if self.log else contextlib.nullcontext() as errors:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, *command, start_new_session=True, stderr=errors
            )
        async with asyncio.timeout(60), httpx.AsyncClient() as client:
            while (
                len(children(self.process.pid)) <= self.workers
            ):  # they and the shipper are started once it has the port
                await asyncio.sleep(0.05)
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if (await client.get(f"http://127.0.0.1:{self.port}/healthz")).status_code == 200:
                        return
                await asyncio.sleep(0.05)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()

    def pids(self, module: str) -> list[int]:
        """The process ids of its children that run a module."""
        assert self.process is not None
        return [pid for pid, line in children(self.process.pid) if module in line]

    async def stop(self) -> int:
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)
        return await asyncio.wait_for(self.process.wait(), 60)

    async def ship_leftovers(self) -> None:
        """What a shipper that was killed last had not shipped yet: whoever is alive does it."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "gateway.ship", "--once", "--config", str(self.config)
        )
        assert await process.wait() == 0
        assert list(self.folder.glob("data/spool/*/*.seg")) == []

    async def logged(self) -> list[Exchange]:
        """Everything in the log store."""
        store = open_log_store(load_settings(self.config).log_store)
        try:
            return [exchange async for exchange in store.scan(Query(kind="any"))]
        finally:
            await store.close()


@dataclass
class Load:
    """Clients that ask, each again as soon as it is answered, until `stop`; every second one streams."""

    ids: set[str] = field(default_factory=set)  # of the exchanges whose replies came whole
    statuses: list[int] = field(default_factory=list)
    broken: int = 0  # calls that ended with the connection
    seconds: list[float] = field(default_factory=list)
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self, served: Served, clients: int) -> None:
        limits = httpx.Limits(max_connections=clients)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{served.port}", timeout=20, limits=limits) as client:
            await asyncio.gather(*(self._ask(client, stream=n % 2 > 0) for n in range(clients)))

    async def _ask(self, client: httpx.AsyncClient, *, stream: bool) -> None:
        while not self.stop.is_set():
            started = time.perf_counter()
            try:
                reply = await client.post(CHAT, json={"model": "m", "messages": [], "stream": stream})
            except httpx.TransportError:
                self.broken += 1
                await asyncio.sleep(0.02)
                continue
            self.seconds.append(time.perf_counter() - started)
            self.statuses.append(reply.status_code)
            if reply.status_code == 200:
                assert not stream or reply.content.endswith(b"data: [DONE]\n\n")
                self.ids.add(reply.headers["x-understudy-exchange-id"])


def children(pid: int) -> list[tuple[int, str]]:
    """The pids and command lines of a process's children."""
    listing = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [
        (int(child), Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode()) for child in listing
    ]
