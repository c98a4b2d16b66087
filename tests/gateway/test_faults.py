"""Promises of the log, broken on purpose: kill -9, a dead log store, a full disk, everything down at start."""

import os
import subprocess
from pathlib import Path

import httpx
import pytest

from gateway.config import SpoolSettings
from gateway.outbox import Outbox
from gateway.spool import Spool
from gateway.telemetry import Metrics
from tests.gateway.fakes import ok, upstream
from tests.gateway.faults import ask, disk_full, kill_workers, small_disk, store_faults
from tests.gateway.served import Served
from tests.gateway.test_outbox import logged_ids
from tests.ports import free_port
from tests.postgres import running_postgres


async def test_workers_killed_under_load_lose_nothing(tmp_path: Path) -> None:
    """Streamed calls and others: every reply that came whole is in the log once."""
    found = await kill_workers(tmp_path, kills=3, clients=16)
    assert (found["lost"], found["doubled"]) == (0, 0)
    assert found["answered"] > 16


@pytest.mark.postgres
async def test_a_log_store_that_freezes_dies_and_comes_back(tmp_path: Path) -> None:
    """No client notices, and afterwards everything is there once."""
    with running_postgres() as server:
        server.psql("CREATE DATABASE faults")
        found = await store_faults(tmp_path, server, "faults", seconds=1.5, clients=4)
    assert (found["client_errors"], found["lost"], found["doubled"]) == (0, 0, 0)
    assert found["logged"] == found["answered"] > 20


@pytest.fixture(scope="module")
def may_mount(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A small file system can be mounted here."""
    folder = tmp_path_factory.mktemp("mount")
    mounted = os.geteuid() == 0 and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("a full disk needs root and the right to mount")
    subprocess.run(["umount", folder], check=True)


@pytest.mark.usefixtures("may_mount")
async def test_a_full_disk_and_serve(tmp_path: Path) -> None:
    """Every call is answered; each that was not logged is counted; afterwards all are logged again."""
    found = await disk_full(tmp_path / "disk", on_full="serve")
    assert (found["first_ok"], found["full_ok"], found["after_ok"]) == (5, 400, 5)
    assert found["dropped"] > 0
    assert found["logged"] + found["dropped"] == 410


@pytest.mark.usefixtures("may_mount")
async def test_a_full_disk_and_refuse(tmp_path: Path) -> None:
    """What cannot be logged is not sent upstream; what was is logged; afterwards calls are served again."""
    found = await disk_full(tmp_path / "disk", on_full="refuse")
    assert (found["first_ok"], found["after_ok"]) == (5, 5)
    assert found["full_refused"] > 0
    assert found["full_ok"] + found["full_refused"] == 400
    assert found["dropped"] == 0
    assert found["logged"] == found["called_upstream"] == 10 + found["full_ok"]


@pytest.mark.usefixtures("may_mount")
async def test_a_disk_that_fills_up_within_a_turn_costs_what_does_not_fit(tmp_path: Path) -> None:
    """The frames of a turn are one write; where that has no room, each is tried by itself."""
    with small_disk(folder := tmp_path / "disk", "2m"):
        spool = Spool(folder, SpoolSettings(), Metrics(), Outbox())
        kept = [spool.append({"id": str(n)}, bytes(200_000)) for n in range(30)]
        spool.commit()
        found = logged_ids(folder)
        assert 3 < len(found) < 12
        assert len(found) == len(set(found))
        assert not all(kept)
        assert spool.append({"id": "small"}, b"")
        spool.commit()
        assert logged_ids(folder) == [*found, "small"]
        spool.close()


async def test_it_starts_and_serves_with_every_store_down(tmp_path: Path) -> None:
    """Neither the control database nor the log store is there; the exchanges wait in the spool."""
    gone = f"127.0.0.1:{free_port()}"
    served = Served.make(
        tmp_path,
        top=[f'database_url = "postgresql+asyncpg://u@{gone}/d"', f'log_store_url = "postgresql://u@{gone}/d"'],
    )
    async with upstream(ok()) as fake, httpx.AsyncClient(base_url=f"http://127.0.0.1:{served.port}") as client:
        served.route_to(fake.url)
        await served.start()
        assert await ask(client, 3) == [200] * 3
        assert (await client.get("/healthz")).status_code == 200
        assert await served.stop() == 0
    assert sum(path.stat().st_size for path in tmp_path.glob("data/spool/*/*.seg")) > 3 * 16_000
