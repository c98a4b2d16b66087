"""The shipper: each exchange once, whatever stands or falls; segments go when they are acknowledged, and not before."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from gateway.config import Settings, SpoolSettings
from gateway.errors import StoreError
from gateway.ids import new_id
from gateway.logstore import Query
from gateway.logstore.sqlite import SqliteLogStore
from gateway.records import Exchange
from gateway.ship import Shipper, StoreReader
from gateway.spool import Spool
from gateway.telemetry import Metrics


def header(**more: object) -> dict:
    return {
        "id": new_id(), "timestamp": 1.0, "workload_id": "w", "client_id": "", "session_id": "", "path": "/v1/x",
        "arm": "incumbent", "outcome": "ok", "status": 200,
    } | more  # fmt: skip


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    made = Settings(data_dir=tmp_path, spool=SpoolSettings(segment=4096, ship_interval=0.01))
    made.run_dir.mkdir()
    return made


def shipper_of(settings: Settings, store: SqliteLogStore) -> Shipper:
    return Shipper(settings, [StoreReader(store, settings.spool.ship_batch)])


class Failing(SqliteLogStore):
    """A store that is down for its first calls, as a database that restarts."""

    left = 3

    async def append(self, exchanges: Sequence[Exchange]) -> None:
        self.left -= 1
        if self.left >= 0:
            raise StoreError("down")
        await super().append(exchanges)


async def stored(store: SqliteLogStore) -> list[Exchange]:
    return [exchange async for exchange in store.scan(Query(kind="any"))]


async def test_everything_arrives_once_and_segments_go(settings: Settings) -> None:
    """Two workers, several segments; what a living writer still appends to stays."""
    store = SqliteLogStore(settings.data_dir / "log.db")
    writers = [Spool(settings.spool_dir, settings.spool, Metrics()) for _ in range(2)]
    for n in range(40):
        writers[n % 2].append(header(), b'{"a": 1}', [b"x" * 400])
    shipper = shipper_of(settings, store)
    assert await shipper.ship_once() == 40
    assert await shipper.ship_once() == 0
    assert len(list(settings.spool_dir.glob("*/*.seg"))) == 2
    for writer in writers:
        writer.append(header(), b"{}", [])
        writer.close()
    assert await shipper.ship_once() == 2
    assert [path for path in settings.spool_dir.iterdir() if path.is_dir()] == []
    assert len({exchange.id for exchange in await stored(store)}) == 42
    await store.close()


async def test_a_new_shipper_sends_again_and_nothing_doubles(settings: Settings) -> None:
    """A shipper that died after the store took a batch: its successor starts over, ids make it harmless."""
    store = SqliteLogStore(settings.data_dir / "log.db")
    writer = Spool(settings.spool_dir, settings.spool, Metrics())
    for _ in range(5):
        writer.append(header(), b"{}", [])
    await shipper_of(settings, store).ship_once()
    await shipper_of(settings, store).ship_once()
    assert len(await stored(store)) == 5
    writer.close()
    await store.close()


async def test_the_store_may_be_down_for_a_while(settings: Settings) -> None:
    """The spool holds everything until the store is back."""
    store = Failing(settings.data_dir / "log.db")
    writer = Spool(settings.spool_dir, settings.spool, Metrics())
    for _ in range(5):
        writer.append(header(), b"{}", [])
    stop = asyncio.Event()
    shipping = asyncio.ensure_future(shipper_of(settings, store).run(stop))
    async with asyncio.timeout(5):
        while len(await stored(store)) < 5:
            await asyncio.sleep(0.01)
    stop.set()
    await shipping
    writer.close()
    await store.close()


async def test_poison_is_kept_aside(settings: Settings) -> None:
    """A record that is no exchange goes to quarantine; its neighbours are shipped."""
    store = SqliteLogStore(settings.data_dir / "log.db")
    writer = Spool(settings.spool_dir, settings.spool, Metrics())
    writer.append(header(), b"{}", [])
    writer.append({"id": "no exchange"}, b"secret", [])
    writer.append(header(arm="nobody"), b"{}", [])
    writer.append(header(), b"{}", [])
    writer.close()
    shipper = shipper_of(settings, store)
    assert await shipper.ship_once() == 2
    assert shipper.done.quarantined == 2
    assert len((settings.spool_dir / "quarantine.jsonl").read_bytes().splitlines()) == 2
    await store.close()


async def test_a_torn_tail_is_cut_and_counted(settings: Settings) -> None:
    """What a power cut left half written is reported, and does not stay for ever."""
    store = SqliteLogStore(settings.data_dir / "log.db")
    writer = Spool(settings.spool_dir, settings.spool, Metrics())
    writer.append(header(), b"{}", [])
    writer.close()
    (segment,) = settings.spool_dir.glob("*/*.seg")
    with segment.open("ab") as file:
        file.write(b"\x40\x00\x00\x00torn")
    shipper = shipper_of(settings, store)
    assert await shipper.ship_once() == 1
    assert shipper.done.torn_bytes == 8
    assert not segment.exists()
    await store.close()


async def test_bodies_that_are_no_json_are_kept_as_text(settings: Settings) -> None:
    """An HTML error page of a proxy in between is still an exchange."""
    store = SqliteLogStore(settings.data_dir / "log.db")
    writer = Spool(settings.spool_dir, settings.spool, Metrics())
    writer.append(header(status=502, outcome="upstream_error"), b"not json", [b"<html>"])
    writer.close()
    await shipper_of(settings, store).ship_once()
    (exchange,) = await stored(store)
    assert (exchange.request, exchange.response) == ({"raw": "not json"}, {"raw": "<html>"})
    await store.close()


async def test_an_idle_gateway_gives_its_segment_free(tmp_path: Path) -> None:
    """What was shipped leaves the disk, also when nobody calls any more."""
    idle = Settings(data_dir=tmp_path, spool=SpoolSettings(segment_age=0.01))
    store = SqliteLogStore(tmp_path / "log.db")
    writer = Spool(idle.spool_dir, idle.spool, Metrics())
    writer.append(header(), b"distinctive", [])
    shipper, running = shipper_of(idle, store), asyncio.ensure_future(writer.run())
    async with asyncio.timeout(10):
        while any(b"distinctive" in path.read_bytes() for path in idle.spool_dir.glob("*/*.seg")):
            await shipper.ship_once()
            await asyncio.sleep(0.01)
    running.cancel()
    writer.close()
    await store.close()
