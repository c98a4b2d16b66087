"""Writes exchanges as lines: to stdout, or to a file that is there whole or not at all."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from flywheel.cli.output import Progress
from flywheel.exchange_lines import FORMATS, Format
from gateway.errors import ConfigError
from gateway.logstore import LogStore, Query

__all__ = ["target", "write"]


@contextmanager
def target(path: Path | None) -> Iterator[BinaryIO]:
    """Stdout for None. A file gets its name when the block ended well; what stood there before stays until then.

    Raises ConfigError where it cannot be written.
    """
    if path is None:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    try:
        place = path.resolve()
        with _replaced(place) if place.is_file() or not place.exists() else place.open("wb") as file:
            yield file
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error


@contextmanager
def _replaced(path: Path) -> Iterator[BinaryIO]:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


async def write(store: LogStore, query: Query, form: Format, out: BinaryIO, progress: Progress) -> tuple[int, int]:
    """How many exchanges were written, and how many left out because the format has no form for them."""
    encode = FORMATS[form]
    written = left_out = 0
    async for exchange in store.scan(query):
        text = encode(exchange)
        if text is None:
            left_out += 1
            continue
        out.write(text + b"\n")
        written += 1
        progress.at(f"{written:,} exchanges")
    progress.clear()
    return written, left_out
