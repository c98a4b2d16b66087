"""Which versions of the overlays and of the client keys the control database holds: one process asks, for all workers.

A worker is to know soon of a rollout's next step or of a revoked key. To ask the database itself, four times a second,
took 2 % of its core, and its calls waited for that; so the gateway's parent asks, and leaves the answers on a page of
shared memory. Where there are no fresh answers, since the parent or the database does not give any, a worker asks for
itself, and so finds out and tells what is wrong.
"""

import asyncio
import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import structlog
from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from gateway.config import Settings
from gateway.keys import KEYS_VERSION, Keys
from gateway.tasks import beat
from routing.errors import RoutingError
from routing.store import OVERLAY_VERSION, Rollouts, connect
from routing.tables import reading

__all__ = ["PATIENCE", "Announcer", "Versions", "board_of"]

log = structlog.get_logger(__name__)

PATIENCE: Final = 20  # polls that a database may take to answer

_FRESH: Final = 2  # polls, and a second for the database, that an answer counts for
_OVERLAYS, _KEYS = 0, 2  # each is two words of eight bytes: the version, and when it was asked for
_WORDS: Final = 4
_SIZE: Final = 8 * _WORDS
_NANO: Final = 1_000_000_000


class Versions:
    """What a worker knows of them; without `board`, what the database says. The engine is the caller's."""

    def __init__(
        self,
        engine: AsyncEngine,
        *,
        poll: float,
        board: Path | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._rollouts, self._keys = Rollouts(engine), Keys(engine)
        self._poll = poll
        self._clock = clock
        self._fresh = int((_FRESH * poll + 1) * _NANO)
        self._words = memoryview(bytes(_SIZE)).cast("q") if board is None else _mapped(board)

    async def of_overlays(self) -> int:
        """Grows with every change of an overlay. Raises Unavailable."""
        told = self._told(_OVERLAYS)
        return await self._rollouts.overlay_version() if told is None else told

    async def of_keys(self) -> int:
        """Grows with every key that is made or revoked. Raises Unavailable."""
        told = self._told(_KEYS)
        return await self._keys.version() if told is None else told

    async def pause(self) -> None:
        """Until it is worth while to ask again: soon where that is only a look at the page."""
        if self._told(_OVERLAYS) is None:
            await asyncio.sleep(self._poll)
        else:
            await beat()

    def _told(self, at: int) -> int | None:
        """The time is read first: a version that was put down since is only newer."""
        asked = self._words[at + 1]
        version = self._words[at]
        return version if asked and 0 <= self._clock() - asked < self._fresh else None


class Announcer:
    """Asks the database every `overlay_poll` seconds, and puts the versions on the page."""

    def __init__(self, settings: Settings) -> None:
        """Raises Unavailable for a database URL that is none."""
        self._poll = settings.gateway.overlay_poll
        self._wanted = {_OVERLAYS: OVERLAY_VERSION}
        if settings.gateway.authenticates:
            self._wanted[_KEYS] = KEYS_VERSION
        self._engine = connect(settings.database)
        self._words = _made(board_of(settings))

    async def run(self) -> None:
        """For ever. What goes wrong leaves the answers to grow old: the workers will say what it is."""
        try:
            while True:
                try:
                    async with asyncio.timeout(self._poll * PATIENCE):
                        await self.announce()
                except (SQLAlchemyError, RoutingError, OSError, ValueError) as error:  # TimeoutError is an OSError
                    log.debug("versions", error=str(error))
                await asyncio.sleep(self._poll)
        finally:
            await self.close()

    async def announce(self) -> None:
        """Ask, and tell, once. Raises Unavailable."""
        asked = time.monotonic_ns()
        async with reading(self._engine) as connection:
            found = (await connection.execute(select(*self._wanted.values()))).one()
        for at, version in zip(self._wanted, found, strict=True):
            self._words[at] = version
            self._words[at + 1] = asked  # last; both are aligned words, which are stored in one piece

    async def close(self) -> None:
        """Let go of the database."""
        await self._engine.dispose()


def board_of(settings: Settings) -> Path:
    """The page's file."""
    return settings.run_dir / "versions"


def _made(path: Path) -> memoryview:
    """Empty, with its room taken: a hole in the file would kill whoever writes to it on a full disk.

    Where it cannot be had the workers have none, or one whose answers are old, and ask for themselves.
    """
    try:
        with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b", buffering=0) as file:
            file.write(bytes(_SIZE))
            return memoryview(mmap.mmap(file.fileno(), _SIZE)).cast("q")
    except (OSError, ValueError) as error:
        log.warning("each worker asks the control database for itself", file=str(path), error=str(error))
        return memoryview(bytearray(_SIZE)).cast("q")


def _mapped(path: Path) -> memoryview:
    """As it is found; empty where it cannot be used."""
    try:
        with path.open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), _SIZE, access=mmap.ACCESS_READ)).cast("q")
    except (OSError, ValueError) as error:
        log.warning("the control database is asked by this process", file=str(path), error=str(error))
        return memoryview(bytes(_SIZE)).cast("q")
