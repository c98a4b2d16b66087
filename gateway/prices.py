"""What providers' models cost, out of litellm's table: read as a file, without importing litellm."""

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import orjson
import structlog

from routing.targets import Price

__all__ = ["listed_price"]

log = structlog.get_logger(__name__)

_FILE: Final = "model_prices_and_context_window_backup.json"  # what litellm.model_cost is made of, USD a token
_MILLION: Final = 1e6


def listed_price(model: str) -> Price | None:
    """The price of PROVIDER/NAME; None where the table has none, or litellm is not installed. Never a guess of 0.

    The plain price: what is cheaper from a cache, or dearer beyond a length, is counted at it too.
    """
    provider, _, name = model.partition("/")
    table = _table()
    entry = table.get(model)
    if entry is None:
        entry = table.get(name, {})
        if not str(entry.get("litellm_provider", "")).startswith(provider):
            return None
    read, written = entry.get("input_cost_per_token"), entry.get("output_cost_per_token", 0.0)
    if not isinstance(read, int | float) or not isinstance(written, int | float):
        return None
    return Price(input=round(read * _MILLION, 9), output=round(written * _MILLION, 9))


def _table() -> dict[str, dict[str, Any]]:
    found = find_spec("litellm")
    if found is None or not found.submodule_search_locations:
        return {}
    return _read(Path(found.submodule_search_locations[0]) / _FILE)


@cache
def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        table: dict[str, dict[str, Any]] = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        log.warning("litellm's prices cannot be read; they are unknown", file=str(path), error=str(error))
        return {}
    return table
