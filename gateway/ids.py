"""UUIDv7: ids that sort by time (RFC 9562, section 5.7)."""

import os
import time

__all__ = ["id_at", "new_id", "time_of"]


def new_id() -> str:
    """A fresh UUIDv7 as text: 48 bits of Unix milliseconds, then 74 random bits."""
    return id_at(time.time_ns() // 1_000_000, os.urandom(10))


def id_at(stamp: int, entropy: bytes) -> str:
    """The UUIDv7 of a Unix time in milliseconds and ten bytes, of which 74 bits count: equal for equal arguments."""
    tail = int.from_bytes(entropy, "big")
    digits = f"{stamp:012x}7{tail >> 68:03x}{0x8 | (tail >> 66 & 0x3):x}{tail & (1 << 60) - 1:015x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def time_of(identifier: str) -> float:
    """Epoch seconds at which a UUIDv7 was made. Raises ValueError for other text."""
    return int(identifier[:8] + identifier[9:13], 16) / 1000
