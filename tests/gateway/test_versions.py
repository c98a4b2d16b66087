"""One process asks the control database what is new, all others look at its answers; without, they ask themselves."""

import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from gateway.config import GatewaySettings, Settings
from gateway.keys import Keys
from gateway.versions import Announcer, Versions, board_of
from migrations.upgrade import upgrade
from routing.errors import Unavailable
from routing.store import Rollouts, connect
from tests.gateway.test_reload import promoted

POLL = 0.25
SECOND = 1_000_000_000


@pytest.fixture
def made(tmp_path: Path) -> Settings:
    settings = Settings(
        data_dir=tmp_path, routing_file=tmp_path / "routing.yaml", gateway=GatewaySettings(auth="on", overlay_poll=POLL)
    )
    settings.run_dir.mkdir(parents=True)
    return settings


@pytest.fixture
async def engine(made: Settings) -> AsyncIterator[AsyncEngine]:
    await upgrade(made.database)
    opened = connect(made.database)
    yield opened
    await opened.dispose()


@pytest.fixture
async def nothing(tmp_path: Path) -> AsyncIterator[AsyncEngine]:
    """A database that does not answer: who asks it finds out."""
    opened = connect(f"sqlite+aiosqlite:///{tmp_path}/nowhere/control.db")
    yield opened
    await opened.dispose()


async def announce(settings: Settings) -> None:
    announcer = Announcer(settings)
    try:
        await announcer.announce()
    finally:
        await announcer.close()


async def test_who_looks_at_the_page_asks_no_database(
    made: Settings, engine: AsyncEngine, nothing: AsyncEngine
) -> None:
    await announce(made)
    versions = Versions(nothing, poll=POLL, board=board_of(made))
    assert (await versions.of_overlays(), await versions.of_keys()) == (0, 0)
    keys = Keys(engine)
    key, _ = await keys.create(who="ann", now=1.0)
    await announce(made)
    assert await versions.of_keys() == 1 == await keys.version()
    await keys.revoke(key.id, who="ann", now=2.0)
    await promoted(made.database)
    await announce(made)
    laid = await Rollouts(engine).overlay_version()
    assert laid > 0
    assert (await versions.of_overlays(), await versions.of_keys()) == (laid, 2)


@pytest.mark.parametrize("later", [2 * POLL + 1, -1])
async def test_an_old_answer_is_none(made: Settings, engine: AsyncEngine, nothing: AsyncEngine, later: float) -> None:
    """Nor is one that was put down before the machine started anew, when its clock stood higher."""
    await announce(made)
    about = {"poll": POLL, "board": board_of(made), "clock": lambda: time.monotonic_ns() + int(later * SECOND)}
    with pytest.raises(Unavailable):
        await Versions(nothing, **about).of_keys()
    await Keys(engine).create(who="ann", now=1.0)
    assert await Versions(engine, **about).of_keys() == 1


async def test_a_page_that_cannot_be_had_costs_nothing_else(
    made: Settings, engine: AsyncEngine, capfd: pytest.CaptureFixture[str]
) -> None:
    """Neither the one who writes it nor those who read it."""
    made.run_dir.rmdir()
    await announce(made)
    assert await Versions(engine, poll=POLL, board=board_of(made)).of_overlays() == 0
    made.run_dir.mkdir()
    board_of(made).write_bytes(b"short")
    assert await Versions(engine, poll=POLL, board=board_of(made)).of_overlays() == 0
    said = capfd.readouterr().out
    assert "each worker asks the control database for itself" in said
    assert "the control database is asked by this process" in said


async def test_without_keys_their_table_is_not_asked_for(made: Settings, nothing: AsyncEngine) -> None:
    """So a database of before there were keys serves a gateway that wants none."""
    await upgrade(made.database)
    await announce(made.model_copy(update={"gateway": GatewaySettings(auth="off", overlay_poll=POLL)}))
    versions = Versions(nothing, poll=POLL, board=board_of(made))
    assert await versions.of_overlays() == 0
    with pytest.raises(Unavailable):
        await versions.of_keys()
