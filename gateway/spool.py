"""The spool: append-only segments on local disk, where an exchange is safe before its reply's end goes to the client.

A segment starts with MAGIC; then frames follow, little-endian:

    u32 length of what follows the crc · u32 crc32 of it · u32 header · u32 request · u32 response · the three parts

The header is JSON: an exchange's fields without its bodies (gateway.records), and how to read the bodies. The bodies
are the bytes as they passed.
"""

import asyncio
import fcntl
import os
import struct
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import orjson
import structlog

from gateway.config import SpoolSettings
from gateway.ids import new_id
from gateway.telemetry import Metrics

__all__ = ["MAGIC", "Corrupt", "Frame", "Spool", "read_frames"]

log = structlog.get_logger(__name__)

MAGIC: Final = b"USPOOL1\n"
_PREFIX: Final = struct.Struct("<IIIII")
_MAX_PARTS: Final = 512  # below IOV_MAX


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One record of a segment. `end` is the offset behind it."""

    header: dict[str, Any]
    request: bytes
    response: bytes
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Corrupt:
    """A frame whose checksum or header is wrong; reading goes on behind it."""

    raw: bytes
    reason: str
    end: int


class Spool:
    """One worker's writer. Appending is synchronous: one `writev` to the page cache, no lock and no disk sync."""

    def __init__(self, folder: Path, settings: SpoolSettings, metrics: Metrics) -> None:
        """Raises OSError when the folder cannot be made."""
        self._settings = settings
        self._metrics = metrics
        self._root = folder
        self._folder = folder / new_id()
        self._folder.mkdir(parents=True)
        self._lock = os.open(self._folder / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)  # tells the shipper that this folder's writer lives
        self._number = 0
        self._size = 0
        self._opened = 0.0
        self._dirty = False
        self._total = 0
        self._fd = self._open_segment()

    @property
    def refusing(self) -> bool:
        """True when the folder is full and the setting says to refuse calls rather than lose their log."""
        return self._settings.on_full == "refuse" and self._total >= self._settings.max_total

    def append(self, header: dict[str, Any], request: bytes, response: Sequence[bytes]) -> bool:
        """Hand one exchange to the kernel. False, counted by reason, when there is no room for it."""
        if self._total >= self._settings.max_total:
            self._metrics.dropped("spool_full")
            return False
        if self._size >= self._settings.segment or time.monotonic() - self._opened > self._settings.segment_age:
            self._rotate()
        parts = _frame(header, request, response)
        length = sum(map(len, parts))
        try:
            written = os.writev(self._fd, parts)
        except OSError as error:
            written = 0
            log.error("spool: append failed", folder=str(self._folder), error=error.strerror)
        if written != length:
            os.ftruncate(self._fd, self._size)
            self._metrics.dropped("disk_full")
            return False
        self._size += length
        self._total += length
        self._dirty = True
        self._metrics.spooled()
        return True

    async def run(self) -> None:
        """Off the request's way: sync to disk by the setting, and keep the folder's size known."""
        loop = asyncio.get_running_loop()
        measured = 0.0
        while True:
            await asyncio.sleep(self._settings.fsync_interval)
            if self._dirty and self._settings.fsync == "interval":
                self._dirty = False
                await loop.run_in_executor(None, os.fdatasync, self._fd)
            if loop.time() - measured > 1.0:
                measured = loop.time()
                self._total = await loop.run_in_executor(None, _folder_size, self._root)
                self._metrics.spool_bytes(self._total)

    def close(self) -> None:
        """Let the shipper have everything."""
        os.fsync(self._fd)
        os.close(self._fd)
        os.close(self._lock)

    def _rotate(self) -> None:
        if self._size > len(MAGIC):
            os.close(self._fd)
            self._fd = self._open_segment()
        else:
            self._opened = time.monotonic()

    def _open_segment(self) -> int:
        self._number += 1
        path = self._folder / f"{self._number:08d}.seg"
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o600)
        os.write(fd, MAGIC)
        self._size = len(MAGIC)
        self._opened = time.monotonic()
        return fd


def read_frames(path: Path, offset: int = 0) -> Iterator[Frame | Corrupt]:
    """The whole frames of a segment from `offset` on; an unfinished one at the end is left for the next reading."""
    with path.open("rb") as file:
        if offset == 0:
            if file.read(len(MAGIC)) != MAGIC:
                return
            offset = len(MAGIC)
        file.seek(offset)
        while len(prefix := file.read(_PREFIX.size)) == _PREFIX.size:
            length, crc, *sizes = _PREFIX.unpack(prefix)
            if length != 12 + sum(sizes):
                rest = file.read()
                yield Corrupt(raw=prefix + rest, reason="length", end=offset + _PREFIX.size + len(rest))
                return
            body = file.read(length - 12)
            if len(body) != length - 12:
                return
            offset += 8 + length
            yield _parse(prefix[8:], crc, sizes, body, offset)


def _parse(lengths: bytes, crc: int, sizes: list[int], body: bytes, end: int) -> Frame | Corrupt:
    if zlib.crc32(body, zlib.crc32(lengths)) != crc:
        return Corrupt(raw=body, reason="checksum", end=end)
    head, request = sizes[0], sizes[1]
    try:
        header = orjson.loads(body[:head])
    except orjson.JSONDecodeError:
        return Corrupt(raw=body, reason="header", end=end)
    return Frame(header=header, request=body[head : head + request], response=body[head + request :], end=end)


def _frame(header: dict[str, Any], request: bytes, response: Sequence[bytes]) -> list[bytes]:
    head = orjson.dumps(header)
    if len(response) > _MAX_PARTS:
        response = [b"".join(response)]
    size = sum(map(len, response))
    lengths = struct.pack("<III", len(head), len(request), size)
    crc = zlib.crc32(lengths)
    for part in (head, request, *response):
        crc = zlib.crc32(part, crc)
    return [struct.pack("<II", 12 + len(head) + len(request) + size, crc) + lengths, head, request, *response]


def _folder_size(folder: Path) -> int:
    total = 0
    for path in folder.glob("*/*.seg"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # the shipper was quicker
            continue
    return total
