"""Brings a control database to the newest revision, and says where it stands; needs no alembic.ini."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from routing.errors import Unavailable
from routing.tables import available, connect

__all__ = ["config", "status", "upgrade"]

_LOCK = 7_238_113  # any number that nothing else in the database locks


async def upgrade(url: str) -> None:
    """Run the revisions that `url` lacks, all in one transaction; others who upgrade at the same time wait.

    Creates the folder of a SQLite file. Raises Unavailable.
    """
    _make_folder(url)
    engine = connect(url)
    try:
        with available():
            async with engine.begin() as connection:
                if engine.dialect.name == "postgresql":
                    await connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
                await connection.run_sync(_upgrade)
    finally:
        await engine.dispose()


async def status(url: str) -> tuple[str | None, str]:
    """The revision that the database has (None before the first), and the newest there is. Raises Unavailable."""
    head = ScriptDirectory.from_config(config()).get_current_head()
    if head is None:
        raise Unavailable("this installation has no migrations")
    file = _sqlite_file(url)
    if file is not None and not file.exists():
        return None, head  # connecting would create it
    engine = connect(url)
    try:
        with available():
            async with engine.connect() as connection:
                return await connection.run_sync(_current), head
    finally:
        await engine.dispose()


def config(connection: Connection | None = None) -> Config:
    """Alembic's configuration, with the connection to run on."""
    made = Config()
    made.set_main_option("script_location", str(Path(__file__).parent))
    made.attributes["connection"] = connection
    return made


def _upgrade(connection: Connection) -> None:
    command.upgrade(config(connection), "head")


def _current(connection: Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()


def _sqlite_file(url: str) -> Path | None:
    try:
        parsed = make_url(url)
    except ArgumentError:
        return None  # connect says what is wrong
    if parsed.get_backend_name() != "sqlite" or parsed.database in (None, "", ":memory:"):
        return None
    return Path(str(parsed.database))


def _make_folder(url: str) -> None:
    file = _sqlite_file(url)
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Unavailable(f"control database: {file.parent}: {error.strerror}") from error
