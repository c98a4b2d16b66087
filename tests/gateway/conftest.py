"""A gateway in this process, on a real socket, with its spool and log store in a temporary folder."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import uvicorn

from gateway.app import build
from gateway.config import GatewaySettings, Settings, SpoolSettings
from gateway.logstore import LogStore, Query
from gateway.logstore.open import open_log_store
from gateway.protocol import server_config
from gateway.records import Exchange
from gateway.ship import Shipper, StoreReader
from tests.gateway.served import Served


@dataclass
class Running:
    """A gateway that serves: a client for it, and its log after everything has been shipped."""

    client: httpx.AsyncClient
    settings: Settings
    store: LogStore

    @property
    def url(self) -> str:
        return str(self.client.base_url)

    async def exchanges(self, kind: str = "any") -> list[Exchange]:
        await Shipper(self.settings, [StoreReader(self.store, 500)]).ship_once()
        return [exchange async for exchange in self.store.scan(Query(kind=kind))]

    async def exchange(self) -> Exchange:
        """The only one."""
        (one,) = await self.exchanges()
        return one


@contextlib.asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[Running]:
    """Serve until the block ends."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(100)
    server = uvicorn.Server(server_config(build(settings), settings.gateway.model_copy(update={"drain": 2})))
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    while not server.started:
        if serving.done():
            await serving
        await asyncio.sleep(0.005)
    store = open_log_store(settings.log_store)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        async with httpx.AsyncClient(base_url=url, timeout=10) as client:
            yield Running(client=client, settings=settings, store=store)
    finally:
        server.should_exit = True
        await serving
        await store.close()


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., Settings]:
    """Settings for a routing.yaml that is given as text."""

    def make(routing: str, *, edge: Mapping[str, object] | None = None, **spool: object) -> Settings:
        (tmp_path / "routing.yaml").write_text(routing)
        return Settings(
            data_dir=tmp_path / "data",
            routing_file=tmp_path / "routing.yaml",
            gateway=GatewaySettings(**{"max_body": 100_000, **(edge or {})}),
            spool=SpoolSettings(**spool),
        )

    return make


@pytest.fixture(
    params=[
        "sqlite",
        pytest.param("postgres", marks=pytest.mark.postgres),
        pytest.param("elasticsearch", marks=pytest.mark.elasticsearch),
    ]
)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty store of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/log.db"
    return str(request.getfixturevalue(f"{request.param}_url"))


@pytest.fixture
async def store(url: str) -> AsyncIterator[LogStore]:
    """One of each implementation, empty."""
    opened = open_log_store(url)
    yield opened
    await opened.close()


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    """A gateway as real processes, two workers; not started yet; stopped at the end."""
    made = Served.make(tmp_path)
    yield made
    if made.process is not None and made.process.returncode is None:
        await made.stop()
