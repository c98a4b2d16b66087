"""Tombstones: what a forgotten client left in the spool is not shipped, and leaves the quarantine."""

from pathlib import Path

import pytest

from gateway.config import Settings, SpoolSettings
from gateway.logstore.sqlite import SqliteLogStore
from gateway.spool import Spool
from gateway.telemetry import Metrics
from gateway.tombstones import QUARANTINE, Tombstones
from tests.gateway.test_ship import header, shipper_of, stored


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    made = Settings(data_dir=tmp_path, spool=SpoolSettings(segment=4096, ship_interval=0.01))
    made.run_dir.mkdir()
    return made


async def test_a_running_shipper_takes_a_new_tombstone_in(settings: Settings) -> None:
    """In the live segment too; what the client sends afterwards is stored, and what others sent before."""
    store = SqliteLogStore(settings.data_dir / "log.db")
    writer = Spool(settings.spool_dir, settings.spool, Metrics())
    shipper = shipper_of(settings, store)
    writer.append(header(client_id="bob", timestamp=50.0), b"{}", [])
    assert await shipper.ship_once() == 1
    for name, at in (("ada", 99.0), ("bob", 99.0), ("ada", 101.0)):
        writer.append(header(client_id=name, timestamp=at), b"{}", [])
    Tombstones(settings.spool_dir).add(["ada"], 100.0)
    assert await shipper.ship_once() == 2
    found = {(one.client_id, one.timestamp) for one in await stored(store)}
    assert found == {("bob", 50.0), ("bob", 99.0), ("ada", 101.0)}
    assert shipper.done.forgotten == 1
    assert b"ada" not in (settings.spool_dir / "forgotten.jsonl").read_bytes()
    writer.close()
    await store.close()


async def test_quarantined_lines_of_the_client_go(settings: Settings) -> None:
    """Others stay; a poisoned record that comes later is not kept at all."""
    store = SqliteLogStore(settings.data_dir / "log.db")
    writer = Spool(settings.spool_dir, settings.spool, Metrics())
    for name in ("ada", "bob", "ada"):
        writer.append(header(client_id=name, arm="nobody"), b"{}", [])
    shipper = shipper_of(settings, store)
    assert await shipper.ship_once() == 0
    tombstones = Tombstones(settings.spool_dir)
    assert tombstones.add(["ada"], 100.0) == 2
    writer.append(header(client_id="ada", arm="nobody"), b"{}", [])
    assert await shipper.ship_once() == 0
    assert len((settings.spool_dir / QUARANTINE).read_bytes().splitlines()) == 1
    assert tombstones.add(["ada"], 100.0) == 0
    writer.close()
    await store.close()
