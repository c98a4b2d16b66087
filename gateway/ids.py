"""UUIDv7: ids that sort by time (RFC 9562, section 5.7)."""

import os
import time
from typing import Final

__all__ = ["id_at", "new_id", "time_of"]


_LAST: Final = 2**48 - 1  # milliseconds
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
    """The UUIDv7 of a Unix time in milliseconds and ten bytes, of which 74 bits count: equal for equal arguments.

    A time before 1970 or after the year 10889, which no UUIDv7 can say, is the nearest that it can.
    """
    since, digits = min(max(stamp, 0), _LAST).to_bytes(6, "big").hex(), entropy.hex()
    return f"{since[:8]}-{since[8:]}-7{digits[:3]}-{'89ab'[entropy[9] & 3]}{digits[3:6]}-{digits[6:18]}"


def time_of(identifier: str) -> float:
    """Epoch seconds at which a UUIDv7 was made. Raises ValueError for other text."""
    return int(identifier[:8] + identifier[9:13], 16) / 1000
