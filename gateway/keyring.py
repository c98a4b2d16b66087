"""The keys that a worker knows: read from the database when they change, kept on disk for when there is none."""

import asyncio
import fcntl
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import structlog

from gateway.auth import Key
from gateway.keys import Keys

__all__ = ["Keyring"]

log = structlog.get_logger(__name__)


class _Cache(msgspec.Struct):
    """The file's content; `read_at` (epoch seconds) is when the database was asked."""

    read_at: float
    keys: list[Key]


class Keyring:
    """Holds `keys`, those that are not revoked; None while nobody knows them. The file has digests, never a secret.

    All workers write the same file; whoever asked the database last has the last word, so that a worker which was
    slow never brings a revoked key back.
    """

    def __init__(
        self,
        keys: Keys,
        cache: Path,
        *,
        version: Callable[[], Awaitable[int]] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`version` tells whether there is something new, instead of the database."""
        self._store = keys
        self._ask = version or keys.version
        self._cache = cache
        self._clock = clock
        self._version: int | None = None
        kept = _read(cache)
        self.keys: list[Key] | None = kept.keys if kept is not None else None

    async def refresh(self) -> bool:
        """Take in what has changed; True where it did. Raises Unavailable, or OSError where the file cannot be kept.

        A version counts as taken in when it is on disk as well: a full disk is tried again.
        """
        asked_at = self._clock()
        version = await self._ask()
        if version == self._version:
            return False
        self.keys = found = list(await self._store.unrevoked())
        await asyncio.to_thread(_keep, self._cache, _Cache(asked_at, found))
        self._version = version
        log.info("client keys", usable=len(found))
        return True


def _read(path: Path) -> _Cache | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Cache)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        log.warning("the cached client keys cannot be read", file=str(path), error=str(error))
        return None


def _keep(path: Path, fresh: _Cache) -> None:
    """Replace the file, unless it holds what was read later."""
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        there = _read(path)
        if there is not None and there.read_at > fresh.read_at:
            return
        temporary = path.with_suffix(".tmp")
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as out:
            out.write(msgspec.json.encode(fresh))
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(path)
