"""What the commands share: aligned columns, JSON as text, progress, a reader that leaves, and who it is that asks."""

import getpass
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import orjson
import typer

__all__ = ["Progress", "columns", "dump", "until_reader_leaves", "user"]

PROGRESS_SECONDS = 0.25


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


@contextmanager
def until_reader_leaves() -> Iterator[None]:
    """End the command quietly, as done, when whoever reads its output has had enough: `| head`."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to flush at exit
        raise typer.Exit(0) from None


class Progress:
    """A line on the terminal that is written over; nothing where stderr is none. `say` puts a line of its own above."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._shown = sys.stderr.isatty()
        self._clock = clock
        self._next = clock() + PROGRESS_SECONDS
        self._width = 0

    def at(self, text: str) -> None:
        """Where it stands; told a few times a second at most."""
        if self._shown and self._clock() >= self._next:
            self._next = self._clock() + PROGRESS_SECONDS
            sys.stderr.write(f"\r{text:<{self._width}}")
            sys.stderr.flush()
            self._width = len(text)

    def say(self, text: str) -> None:
        self.clear()
        sys.stderr.write(f"{text}\n")

    def clear(self) -> None:
        if self._width:
            sys.stderr.write(f"\r{'':<{self._width}}\r")
            self._width = 0
