"""Where an Elasticsearch log store is, and how it is to behave, from its URL. Does not load the client."""

import re
from dataclasses import dataclass, field
from typing import Final, Literal, get_args
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from gateway.errors import ConfigError

__all__ = ["ElasticTarget", "Refresh", "parse_elastic_url"]

Refresh = Literal["false", "wait_for", "true"]

SCHEMES: Final = ("elasticsearch+http", "elasticsearch+https")
DEFAULT_NAME: Final = "understudy-exchanges"
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,199}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ElasticTarget:
    """A server and an alias on it. Times in seconds.

    `refresh` is what `append` waits for: nothing (documents are seen by searches about a second later), the next
    refresh, or a refresh of its own. `settle` is how long `pairs` leaves a mirror alone after it was sent.
    """

    url: str
    name: str = DEFAULT_NAME
    user: str = ""
    password: str = field(default="", repr=False)
    ca: str = ""
    refresh: Refresh = "false"
    timeout: float = 30.0
    settle: float = 5.0


def parse_elastic_url(url: str) -> ElasticTarget:
    """`elasticsearch+http[s]://[user:password@]host[:port]/[name][?refresh=&timeout=&settle=&ca=]`.

    Raises ConfigError, whose message holds no part of the URL that may be secret.
    """
    try:
        parts = urlsplit(url)
        options = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
        refresh = options.pop("refresh", "false")
        target = ElasticTarget(
            url=_server(parts),
            name=parts.path.strip("/") or DEFAULT_NAME,
            user=unquote(parts.username or ""),
            password=unquote(parts.password or ""),
            ca=options.pop("ca", ""),
            refresh=next(known for known in get_args(Refresh) if known == refresh),
            timeout=float(options.pop("timeout", 30.0)),
            settle=float(options.pop("settle", 5.0)),
        )
    except (ValueError, StopIteration):
        raise ConfigError(
            "log_store_url: not understood; use elasticsearch+http://[user:password@]host:9200/[name], "
            "with ?refresh=false|wait_for|true, timeout=SECONDS, settle=SECONDS, ca=FILE"
        ) from None
    if options:
        raise ConfigError(f"log_store_url: unknown option {min(options)!r}; there are refresh, timeout, settle, ca")
    if not _NAME.fullmatch(target.name):
        raise ConfigError("log_store_url: the name behind the host is an alias: a-z, 0-9 and . _ - inside it")
    return target


def _server(parts: SplitResult) -> str:
    if parts.scheme not in SCHEMES or not parts.hostname:
        raise ValueError
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme.removeprefix('elasticsearch+')}://{host}:{parts.port or 9200}"
