"""Clients that were forgotten: what the spool still holds of them is left out when it is shipped.

Each line of `spool/forgotten.jsonl` has a time and a salted digest of a client's id, never the id itself. A lock beside
the file orders forgetting and shipping: whoever adds a tombstone waits for the batch under way, and no later one misses
it. The same lock holds the quarantine file, which a batch may append to.
"""

import base64
import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Collection, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

import orjson

from gateway.records import JSON

__all__ = ["QUARANTINE", "Tombstones"]

QUARANTINE: Final = "quarantine.jsonl"


class Tombstones:
    """One spool's. `held` is for the shipper, around each batch; `add` for whoever erases."""

    def __init__(self, spool_dir: Path) -> None:
        self._root = spool_dir
        self._path = spool_dir / "forgotten.jsonl"
        self._seen = (0, 0)
        self._lines: list[tuple[bytes, str, float]] = []
        self._until: dict[str, float] = {}

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """While this is held no tombstone is added; those that are there have been read.

        A disk too full for the lock's file does not stop the shipper: it is what makes room.
        """
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):
                stack.enter_context(self._lock(fcntl.LOCK_SH))
            self._read()
            yield

    def cover(self, client: object, timestamp: object) -> bool:
        """Whether an exchange was made by a forgotten client before it was forgotten."""
        if not self._lines or not isinstance(client, str) or not client:
            return False
        if client not in self._until:
            if len(self._until) > 10_000:
                self._until.clear()
            matching = (until for salt, digest, until in self._lines if _digest(client, salt) == digest)
            self._until[client] = max(matching, default=float("-inf"))
        return not isinstance(timestamp, int | float) or timestamp < self._until[client]

    def add(self, clients: Collection[str], at: float) -> int:
        """Forget the clients up to `at`, on disk when it returns; how many lines left the quarantine."""
        self._root.mkdir(parents=True, exist_ok=True)
        with self._lock(fcntl.LOCK_EX):
            lines = b""
            for client in clients:
                salt = os.urandom(16)
                entry = {"until": at, "salt": salt.hex(), "client": _digest(client, salt)}
                lines += orjson.dumps(entry) + b"\n"
            with self._path.open("ab") as file:
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())
            return _without(self._root / QUARANTINE, lambda line: _is_of(line, clients))

    @contextlib.contextmanager
    def _lock(self, kind: int) -> Iterator[None]:
        descriptor = os.open(self._root / "forgotten.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, kind)
            yield
        finally:
            os.close(descriptor)

    def _read(self) -> None:
        try:
            found = self._path.stat()
        except FileNotFoundError:
            return
        if (found.st_mtime_ns, found.st_size) == self._seen:
            return
        self._lines, self._until = [], {}
        for line in self._path.read_bytes().splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # torn by a crash: that call has not returned
                entry = orjson.loads(line)
                self._lines.append((bytes.fromhex(entry["salt"]), entry["client"], float(entry["until"])))
        self._seen = (found.st_mtime_ns, found.st_size)


def _digest(client: str, salt: bytes) -> str:
    return blake2b(client.encode("utf-8", "surrogatepass"), key=salt, digest_size=16).hexdigest()


def _without(path: Path, unwanted: Callable[[bytes], bool]) -> int:
    """The file without some of its lines, whole at any time; how many went."""
    removed, temporary = 0, path.with_suffix(".tmp")
    try:
        with path.open("rb") as source, temporary.open("wb") as kept:
            for line in source:
                if unwanted(line):
                    removed += 1
                else:
                    kept.write(line)
            kept.flush()
            os.fsync(kept.fileno())
    except FileNotFoundError:
        return 0
    if removed:
        temporary.replace(path)
    else:
        temporary.unlink()
    return removed


def _is_of(line: bytes, clients: Collection[str]) -> bool:
    """By the entry's client, else by the header that its raw bytes begin with, else by the client's id anywhere."""
    try:
        entry: JSON = orjson.loads(line)
        raw = base64.b64decode(entry.get("raw", ""))
    except (ValueError, TypeError, AttributeError):
        return any(client.encode("utf-8", "replace") in line for client in clients)
    named = entry.get("client") or _header(raw).get("client_id")
    if isinstance(named, str) and named:
        return named in clients
    return any(client.encode("utf-8", "replace") in part for client in clients for part in (line, raw))


def _header(raw: bytes) -> dict[str, Any]:
    try:
        header, _ = json.JSONDecoder().raw_decode(raw.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return {}
    return header if isinstance(header, dict) else {}
