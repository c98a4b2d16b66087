"""What the commands share: rows as aligned columns, JSON as text, and who it is that asks."""

import getpass
from collections.abc import Iterable, Sequence
from typing import Any

import orjson

__all__ = ["columns", "dump", "user"]


def columns(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The rows below their headings, two spaces apart."""
    lines = [tuple(headings), *(tuple(row) for row in rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip() for cells in lines
    )


def dump(value: Any, *, pretty: bool = True) -> str:
    return orjson.dumps(value, option=orjson.OPT_INDENT_2 if pretty else None).decode()


def user() -> str:
    """The operating system's name for whoever runs the command."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose user id has no name
        return "unknown"
