"""What a turn of the event loop has to send: sent in a row at its end, behind what the log has to write before it.

A write wakes whoever reads at the other end, mostly on another core, which takes an interrupt; those that follow in a
row find it awake. The log's frames of the same turn are one write as well.
"""

import asyncio
from collections.abc import Callable
from typing import Final

__all__ = ["Outbox"]

_MOST: Final = 256 * 1024  # bytes; more do not wait, so that a slow reader is noticed


class Outbox:
    """One event loop's. What has to happen before anything is sent is `before`: gateway.spool.Spool.commit."""

    def __init__(self) -> None:
        self.before: Callable[[], object] = _nothing
        self._waiting: list[tuple[asyncio.Transport, bytes]] = []
        self._size = 0
        self._awake = False

    def put(self, transport: asyncio.Transport, data: bytes) -> None:
        """Send `data` at the end of this turn. Before anything else is done with the transport, `flush` is due."""
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
            asyncio.get_running_loop().call_soon(self._turn)

    def flush(self) -> None:
        """Send at once what waits. What is for a connection that has closed since goes nowhere."""
        self.before()
        waiting, self._waiting, self._size = self._waiting, [], 0
        for transport, data in waiting:
            if not transport.is_closing():
                transport.write(data)

    def _turn(self) -> None:
        self._awake = False
        self.flush()


def _nothing() -> None:
    """Nothing has to happen before."""
