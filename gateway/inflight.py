"""Calls in flight: a table in a small file that is mapped into memory, so that noting a call costs no system call.

A worker notes each call here before it goes upstream, and wipes the note when the whole exchange is in a segment. What
a killed worker leaves in its table was in flight. The file starts with MAGIC; then slots of SLOT bytes follow:

    u32 crc32 of what follows · u32 header · u32 request · header · request        (little-endian; a free slot is zeros)
"""

import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from isal.isal_zlib import crc32

__all__ = ["MAGIC", "SLOT", "InFlight", "notes"]

MAGIC: Final = b"USFLY01\n"
SLOT: Final = 16 * 1024  # bytes: most calls fit, the others begin with a frame in a segment
_MOST: Final = 512
_HEAD: Final = 4096  # slots start at a page
_PREFIX: Final = struct.Struct("<III")
_SIZES: Final = struct.Struct("<II")
_ZEROS: Final = bytes(SLOT)


class InFlight:
    """One worker's table. The same few slots are used again and again, so their memory stays warm."""

    def __init__(self, path: Path, budget: int) -> None:
        """A table of at most `budget` bytes; without slots where the disk has no room for it, which is no reason not to
        start. The room is taken at once: a mapped file must never find the disk full."""
        self.fd = -1
        self._held: dict[str, tuple[int, int]] = {}  # by exchange: offset and length
        self._free: list[int] = []
        slots = min(_MOST, (budget - _HEAD) // SLOT)
        if slots <= 0:
            return
        size = _HEAD + slots * SLOT
        try:
            self.fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
            os.posix_fallocate(self.fd, 0, size)
            self._map = mmap.mmap(self.fd, size)
        except OSError:
            self.close()  # a file without a name would hold its room all the same
            path.unlink(missing_ok=True)
            return
        self._map[: len(MAGIC)] = MAGIC
        self._free = [_HEAD + at * SLOT for at in reversed(range(slots))]

    def note(self, exchange: str, header: bytes, request: bytes) -> bool:
        """Note a call. False when it is too large or no slot is free."""
        head, body = len(header), len(request)
        length = _PREFIX.size + head + body
        if length > SLOT or not self._free:
            return False
        sizes = _SIZES.pack(head, body)
        start = self._free.pop()
        middle = start + _PREFIX.size + head
        table = self._map
        table[start + _PREFIX.size : middle] = header
        table[middle : start + length] = request
        # Last, so that a note counts when all of it is there.
        table[start : start + _PREFIX.size] = crc32(request, crc32(header, crc32(sizes))).to_bytes(4, "little") + sizes
        self._held[exchange] = start, length
        return True

    def wipe(self, exchange: str) -> None:
        """Forget a call, and every byte of it; nothing when it was not noted."""
        held = self._held.pop(exchange, None)
        if held is not None:
            start, length = held
            self._map[start : start + length] = _ZEROS[:length]
            self._free.append(start)

    def close(self) -> None:
        """Wiped calls are gone already; those still noted stay for the reader."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            self._free = []


def notes(path: Path) -> Iterator[tuple[bytes, bytes] | None]:
    """Header and request of each call that a dead worker's table holds; None for one that is damaged.

    There is none where there is no table, or one that cannot be read.
    """
    try:
        raw = path.read_bytes()
    except OSError:
        return
    if not raw.startswith(MAGIC):
        return
    for start in range(_HEAD, len(raw) - SLOT + 1, SLOT):
        slot = memoryview(raw)[start : start + SLOT]
        crc, head, body = _PREFIX.unpack_from(slot)
        if not (crc or head or body):
            continue  # free, or its worker was killed while it noted a call: that had not gone up yet
        end = _PREFIX.size + head + body
        whole = end <= SLOT and crc32(slot[4:end]) == crc
        middle = _PREFIX.size + head
        yield (bytes(slot[_PREFIX.size : middle]), bytes(slot[middle:end])) if whole else None
