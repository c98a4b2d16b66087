"""A thread that hands things on in batches: its queue is bounded, what does not fit is counted, and nobody waits."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

import structlog

__all__ = ["Sender"]

T = TypeVar("T")

log = structlog.get_logger(__name__)


class Sender(Generic[T]):
    """`send` takes a batch, in the thread, and says whether it arrived; what did not is dropped, not tried again.

    `dropped` is told how many, and why: `queue_full` or `not_delivered`.
    """

    def __init__(
        self,
        name: str,
        send: Callable[[list[T]], bool],
        *,
        dropped: Callable[[str, int], None],
        limit: int = 8192,
        batch: int = 512,
        delay: float = 1.0,
    ) -> None:
        """`delay` is how many seconds a batch waits to become full."""
        self._name = name
        self._send = send
        self._dropped = dropped
        self._limit, self._batch, self._delay = limit, min(batch, limit), delay
        self._queue: deque[T] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._delivers = True
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """The other side takes what it gets, and has enough for now: who can wait with the next, should."""
        return self._delivers and len(self._queue) * 2 >= self._limit

    def offer(self, things: Iterable[T]) -> None:
        """Take what there is room for, at once."""
        wanted = list(things)
        with self._changed:
            room = max(0, self._limit - len(self._queue))
            self._queue.extend(wanted[:room])
            if len(self._queue) >= self._batch:
                self._changed.notify()
        if len(wanted) > room:
            self._dropped("queue_full", len(wanted) - room)

    def close(self, seconds: float) -> None:
        """Send what is there, for so long; what is left then is dropped."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(seconds)
        if self._queue:
            self._dropped("not_delivered", len(self._queue))

    def _run(self) -> None:
        while things := self._next():
            delivered = self._sent(things)
            if not delivered:
                self._dropped("not_delivered", len(things))
            if delivered != self._delivers:
                self._delivers = delivered
                log.warning("delivered again" if delivered else "not delivered, and dropped", what=self._name)

    def _sent(self, things: list[T]) -> bool:
        try:
            return self._send(things)
        except Exception:  # a fence: what is wrong with one batch must not end the thread
            log.exception("a batch failed", what=self._name)
            return False

    def _next(self) -> list[T]:
        """The next batch, full or old enough; none when it is time to end."""
        with self._changed:
            until = time.monotonic() + self._delay
            while not self._closing and len(self._queue) < self._batch:
                left = until - time.monotonic()
                if left <= 0 and self._queue:
                    break
                self._changed.wait(left if left > 0 else self._delay)
            return [self._queue.popleft() for _ in range(min(self._batch, len(self._queue)))]
