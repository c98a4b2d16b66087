"""The models equal the sum of the migrations, on every database, and upgrading is safe to repeat."""

import asyncio

from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection

import migrations.upgrade
from routing.tables import connect, metadata


def _differences(connection: Connection) -> list[object]:
    return list(compare_metadata(MigrationContext.configure(connection, opts={"compare_type": True}), metadata))


async def test_the_models_equal_the_sum_of_the_migrations(database_url: str) -> None:
    """A table or column that only one of the two knows fails here."""
    await migrations.upgrade.upgrade(database_url)
    engine = connect(database_url)
    async with engine.connect() as connection:
        assert await connection.run_sync(_differences) == []
    await engine.dispose()


async def test_status_before_and_after(database_url: str) -> None:
    """Status names no revision before, and the head after; upgrading again changes nothing."""
    current, head = await migrations.upgrade.status(database_url)
    assert current is None
    await migrations.upgrade.upgrade(database_url)
    await migrations.upgrade.upgrade(database_url)
    assert await migrations.upgrade.status(database_url) == (head, head)


async def test_two_upgrades_at_once(database_url: str) -> None:
    """Two processes that start together both succeed."""
    await asyncio.gather(migrations.upgrade.upgrade(database_url), migrations.upgrade.upgrade(database_url))
    current, head = await migrations.upgrade.status(database_url)
    assert current == head
