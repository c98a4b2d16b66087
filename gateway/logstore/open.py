"""Opens the log store that a URL names."""

from pathlib import Path

from gateway.errors import ConfigError, MissingExtra
from gateway.logstore import LogStore
from gateway.logstore.sqlite import SqliteLogStore

__all__ = ["open_log_store"]

_KNOWN = "sqlite:///PATH or elasticsearch+http[s]://[user:password@]host:9200/[name]"


def open_log_store(url: str) -> LogStore:
    """The store that the URL names. Opening does no I/O.

    Raises ConfigError for any other URL, without its secrets; MissingExtra where a client library is not installed.
    """
    scheme, _, path = url.partition(":///")
    if scheme == "sqlite" and path:
        return SqliteLogStore(Path("/" + path.lstrip("/")) if path.startswith("/") else Path(path))
    if url.startswith("elasticsearch+"):
        return _elasticsearch(url)
    raise ConfigError(f"log_store_url: {url.partition('://')[0]!r} is no log store; use {_KNOWN}")


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
