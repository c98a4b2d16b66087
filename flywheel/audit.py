"""What was done to the log that cannot be undone: a line each in `audit.jsonl`, appended and never changed."""

import os
from hashlib import blake2b
from pathlib import Path
from typing import Final

import orjson

from gateway.records import JSON

__all__ = ["FILE", "digest_of", "record"]

FILE: Final = "audit.jsonl"


def record(data_dir: Path, *, at: float, who: str, what: str, **details: object) -> None:
    """Append an entry; it is on disk when this returns. Raises OSError."""
    entry: JSON = {"at": at, "who": who, "what": what, **details}
    data_dir.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(data_dir / FILE, os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, orjson.dumps(entry) + b"\n")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest_of(text: str, salt: str) -> str:
    """What stands in an entry for a name that it must not hold: whoever knows name and salt can find it again."""
    return blake2b(text.encode("utf-8", "surrogatepass"), key=salt.encode()[:64], digest_size=16).hexdigest()
