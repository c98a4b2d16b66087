"""Fixtures that every package's tests share: a real PostgreSQL, started and stopped by the suite."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.postgres import CannotRun, PostgresServer, running_postgres

_NUMBERS = itertools.count()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """One server for the session, without durability, in a folder of its own that is removed afterwards."""
    try:
        with running_postgres("fsync=off", "full_page_writes=off", "synchronous_commit=off") as server:
            yield server
    except CannotRun as why:
        pytest.skip(str(why))


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    """The URL of a fresh, empty database, dropped afterwards."""
    name = f"test_{next(_NUMBERS)}"
    postgres_server.psql(f"CREATE DATABASE {name}")
    yield postgres_server.url(name)
    postgres_server.psql(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """The URL of a SQLite file that is not there yet."""
    return f"sqlite+aiosqlite:///{tmp_path / 'control.db'}"


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def database_url(request: pytest.FixtureRequest) -> str:
    """The URL of an empty database, once of each kind."""
    return str(request.getfixturevalue(f"{request.param}_url"))
