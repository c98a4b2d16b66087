"""Breakers: a worker's own quick judgement that a candidate is not answering. Pure; the clock's time comes in."""

from routing.targets import Breaker

__all__ = ["Breakers"]


class Breakers:
    """By target: failures in a row, and until when it is open. After that time one call may try it again."""

    def __init__(self) -> None:
        self._failures: dict[str, int] = {}
        self._open_until: dict[str, float] = {}

    def open_at(self, now: float) -> frozenset[str]:
        """The names of the targets that are not to be called."""
        if not self._open_until:
            return _NONE
        return frozenset(name for name, until in self._open_until.items() if now < until)

    def failed(self, target: str, policy: Breaker, now: float) -> bool:
        """Count a failure; True when this one opened the breaker."""
        count = self._failures[target] = self._failures.get(target, 0) + 1
        if count < policy.failures:
            return False
        was_open = now < self._open_until.get(target, 0.0)
        self._open_until[target] = now + policy.open_seconds
        return not was_open

    def succeeded(self, target: str) -> None:
        if target in self._failures:
            del self._failures[target]
            self._open_until.pop(target, None)


_NONE: frozenset[str] = frozenset()
