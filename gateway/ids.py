"""UUIDv7: ids that sort by time (RFC 9562, section 5.7)."""

import os
import time
from typing import Final

__all__ = ["id_at", "new_id", "time_of"]


_AT_ONCE: Final = 256
_ENTROPY: Final = 10  # bytes for an id
_random: list[bytes] = []  # asked of the system for many ids at once: a system call for each would be half of its cost


def new_id() -> str:
    """A fresh UUIDv7 as text: 48 bits of Unix milliseconds, then 74 random bits."""
    if not _random:
        entropy = os.urandom(_ENTROPY * _AT_ONCE)
        _random.extend(entropy[at : at + _ENTROPY] for at in range(0, len(entropy), _ENTROPY))
    return id_at(time.time_ns() // 1_000_000, _random.pop())


def id_at(stamp: int, entropy: bytes) -> str:
    """The UUIDv7 of a Unix time in milliseconds and ten bytes, of which 74 bits count: equal for equal arguments."""
    tail = int.from_bytes(entropy, "big")
    high = stamp << 16 | 0x7000 | tail >> 68
    digits = f"{high << 64 | 1 << 63 | tail & (1 << 62) - 1:032x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def time_of(identifier: str) -> float:
    """Epoch seconds at which a UUIDv7 was made. Raises ValueError for other text."""
    return int(identifier[:8] + identifier[9:13], 16) / 1000
