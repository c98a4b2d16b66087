"""What a turn of the event loop has to send: sent in a row behind its end, behind what the log has to write before it.

A write wakes whoever reads at the other end, mostly on another core, which takes an interrupt; those that follow in a
row find it awake. The log's frames of the same turn are one write as well.
"""

import asyncio
from collections.abc import Callable
from typing import Final

import structlog

__all__ = ["Outbox"]

log = structlog.get_logger(__name__)

_MOST: Final = 256 * 1024  # bytes; more do not wait, so that a slow reader is noticed


class Outbox:
    """One event loop's. What has to happen before anything is sent is `before`: gateway.spool.Spool.commit.

    A call that is alone in its turn, as far as `expect` was told, does not wait for the end of it. To count wrong costs
    a little time, or an interrupt more.
    """

    def __init__(self) -> None:
        self.before: Callable[[], object] = _nothing
        self._waiting: list[tuple[asyncio.Transport, bytes]] = []
        self._size = 0
        self._awake = False
        self._expected = 0  # that will run and may put something
        self._late = 0  # of those, whose turn is over when `_turn` runs

    def expect(self) -> None:
        """Somebody was woken who is likely to put something in the next turn."""
        self._expected += 1

    def put(self, transport: asyncio.Transport, data: bytes) -> None:
        """Send `data` at the end of this turn. Before anything else is done with the transport, `flush` is due."""
        if self._expected > 0:
            self._expected -= 1
        if self._late > 0:
            self._late -= 1
        if not (self._expected or self._waiting):
            self.before()
            _send(transport, data)
            return
        self._waiting.append((transport, data))
        self._size += len(data)
        if self._size > _MOST:
            self.flush()
        else:
            self.wake()

    def wake(self) -> None:
        """Flush at the end of this turn, also when nothing is to be sent."""
        if not self._awake:
            self._awake = True
            self._late = self._expected
            asyncio.get_running_loop().call_soon(self._turn)

    def flush(self) -> None:
        """Send at once what waits. What is for a connection that has closed since goes nowhere; one fails by itself."""
        self.before()
        waiting, self._waiting, self._size = self._waiting, [], 0
        for transport, data in waiting:
            _send(transport, data)

    def _turn(self) -> None:
        self._awake = False
        self._expected -= self._late  # who was woken after that runs later
        self._late = 0
        self.flush()


def _send(transport: asyncio.Transport, data: bytes) -> None:
    if transport.is_closing():
        return
    try:
        transport.write(data)
    except Exception:
        log.exception("a connection could not be written to")
        transport.abort()


def _nothing() -> None:
    """Nothing has to happen before."""
