"""Opens the log store that a URL names."""

from pathlib import Path

from gateway.errors import ConfigError
from gateway.logstore import LogStore
from gateway.logstore.sqlite import SqliteLogStore

__all__ = ["open_log_store"]


def open_log_store(url: str) -> LogStore:
    """The store behind `sqlite:///PATH`. Opening does no I/O. Raises ConfigError for any other URL."""
    scheme, _, path = url.partition(":///")
    if scheme == "sqlite" and path:
        return SqliteLogStore(Path("/" + path.lstrip("/")) if path.startswith("/") else Path(path))
    raise ConfigError(f"log_store_url: {url.partition('://')[0]!r} is no log store; use sqlite:///PATH")
