"""Opens the log store that a URL names."""

from pathlib import Path
from typing import Final

from gateway.errors import ConfigError
from gateway.logstore import LogStore
from gateway.logstore.postgres import PostgresLogStore
from gateway.logstore.sqlite import SqliteLogStore

__all__ = ["open_log_store"]

_POSTGRES: Final = ("postgresql", "postgres", "postgresql+asyncpg")


def open_log_store(url: str) -> LogStore:
    """The store behind `sqlite:///PATH` or `postgresql://USER:PASSWORD@HOST:PORT/DATABASE`.

    Opening does no I/O. Raises ConfigError for any other URL.
    """
    scheme, found, rest = url.partition("://")
    if scheme == "sqlite" and rest.startswith("/") and len(rest) > 1:
        path = rest[1:]
        return SqliteLogStore(Path("/" + path.lstrip("/")) if path.startswith("/") else Path(path))
    if scheme in _POSTGRES:
        return PostgresLogStore(f"postgresql://{rest}")
    named = repr(scheme) if found else "it"  # without a scheme, all of it may be a secret
    raise ConfigError(
        f"log_store_url: {named} is no log store; use sqlite:///PATH or postgresql://USER:PASSWORD@HOST:PORT/DATABASE"
    )
