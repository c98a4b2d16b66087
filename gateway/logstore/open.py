"""Opens the log store that a URL names."""

from pathlib import Path
from typing import Final

from gateway.errors import ConfigError, MissingExtra
from gateway.logstore import LogStore
from gateway.logstore.postgres import PostgresLogStore
from gateway.logstore.sqlite import SqliteLogStore

__all__ = ["open_log_store"]

_POSTGRES: Final = ("postgresql", "postgres", "postgresql+asyncpg")
_KNOWN: Final = (
    "sqlite:///PATH, postgresql://USER:PASSWORD@HOST:PORT/DATABASE "
    "or elasticsearch+http[s]://[user:password@]host:9200/[name]"
)


def open_log_store(url: str) -> LogStore:
    """The store that the URL names. Opening does no I/O.

    Raises ConfigError for any other URL, without its secrets; MissingExtra where a client library is not installed.
    """
    scheme, found, rest = url.partition("://")
    if scheme == "sqlite" and rest.startswith("/") and len(rest) > 1:
        path = rest[1:]
        return SqliteLogStore(Path("/" + path.lstrip("/")) if path.startswith("/") else Path(path))
    if scheme in _POSTGRES:
        return PostgresLogStore(f"postgresql://{rest}")
    if scheme.startswith("elasticsearch+"):
        return _elasticsearch(url)
    named = repr(scheme) if found else "it"  # without a scheme, all of it may be a secret
    raise ConfigError(f"log_store_url: {named} is no log store; use {_KNOWN}")


def _elasticsearch(url: str) -> LogStore:
    from gateway.logstore.elastic_url import parse_elastic_url

    target = parse_elastic_url(url)
    try:
        from gateway.logstore.elastic import ElasticLogStore
    except ImportError as error:
        raise MissingExtra("log_store_url: Elasticsearch", "elasticsearch") from error
    try:
        return ElasticLogStore(target)
    except (ValueError, OSError) as error:  # a CA file that is not there or is none
        raise ConfigError(f"log_store_url: {error}") from error
