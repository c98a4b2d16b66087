"""The one owner of background tasks: each has a name, is kept referenced, and its failure is logged."""

import asyncio
from collections.abc import Coroutine
from typing import Any, Final

import structlog

__all__ = ["BEAT", "Tasks", "beat", "until_beat"]

log = structlog.get_logger(__name__)

BEAT: Final = 0.1  # seconds
_PATIENCE = 0.5  # seconds between two cancellations


async def beat() -> None:
    """Sleep until the next tenth of a second, as everybody here does who looks for changes.

    To wake an idle process costs more than most of them do then, and whoever calls in that moment waits for it.
    """
    await asyncio.sleep(until_beat(asyncio.get_running_loop().time()))


def until_beat(now: float) -> float:
    """Seconds until the next one, or until the one behind it: a timer may have gone off a little early."""
    rest = BEAT - now % BEAT
    return rest if rest > BEAT / 10 else rest + BEAT


class Tasks:
    """Tasks that live as long as their owner. `close` cancels what still runs and waits for it."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()

    def spawn(self, name: str, coro: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Start `coro` now. Needs a running loop."""
        task = asyncio.get_running_loop().create_task(coro, name=name)
        self._running.add(task)
        task.add_done_callback(self._finished)
        return task

    async def drain(self, seconds: float) -> int:
        """Wait up to `seconds` for what runs; returns how many tasks were still running."""
        if self._running:
            await asyncio.wait(set(self._running), timeout=seconds)
        return len(self._running)

    async def close(self) -> None:
        """Cancel what runs and wait until it is gone.

        More than once: `asyncio.wait_for` of Python 3.11 loses a cancellation that meets the end of what it waits for.
        """
        while self._running:
            for task in set(self._running):
                task.cancel()
            await asyncio.wait(set(self._running), timeout=_PATIENCE)

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("task failed", task=task.get_name(), exc_info=error)
