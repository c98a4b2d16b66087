"""routing.yaml as it stands, read again when it has changed, off the event loop's time."""

import asyncio
from collections.abc import Mapping
from pathlib import Path

from routing.errors import RulesError
from routing.rules import Rules, load

__all__ = ["RulesFile"]


class RulesFile:
    """The rules for those who ask now and then."""

    def __init__(self, path: Path, env: Mapping[str, str]) -> None:
        self._path = path
        self._env = env
        self._read: tuple[tuple[int, int, int], Rules] | None = None
        self._lock = asyncio.Lock()

    async def rules(self) -> Rules:
        """Raises RulesError while the file is wrong."""
        async with self._lock:
            found = self._signature()
            if self._read is None or found is None or self._read[0] != found:
                rules = await asyncio.to_thread(load, self._path, self._env)
                self._read = (found, rules) if found is not None else None
                return rules
            return self._read[1]

    async def snapshot(self) -> str:
        """The name of the rules in force, for the history; "" while the file is wrong, which stops no abort."""
        try:
            return (await self.rules()).table.snapshot
        except RulesError:
            return ""

    def _signature(self) -> tuple[int, int, int] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino
