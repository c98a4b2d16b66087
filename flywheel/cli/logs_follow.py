"""Follows the log: what is new comes as it arrives, oldest first, also after the store was away for a while."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Final

from gateway.errors import StoreError
from gateway.ids import id_at, time_of
from gateway.logstore import LogStore, Query
from gateway.records import Exchange

__all__ = ["Follower", "follow"]

POLL_SECONDS: Final = 0.5
LATE_SECONDS: Final = 600.0
LOOK_BACK_SECONDS: Final = 5.0
LOOK_BACK_SHARE: Final = 20  # a look back takes a twentieth of the time at most


class Follower:
    """Gives each exchange once. Ids sort by when a request came in, and what took long, or waited in the spool while
    the store was away, arrives behind later ones: so every few seconds it looks back, `LATE_SECONDS` far.
    """

    def __init__(self, store: LogStore, query: Query, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._query = replace(query, newest_first=False, limit=None)
        self._clock = clock
        self._seen: set[str] = set()
        self._newest = ""
        self._due = 0.0

    async def begin(self, number: int, now: float) -> list[Exchange]:
        """The newest `number` exchanges, oldest first. `now` in epoch seconds."""
        floor = id_at(int(max(0.0, now - LATE_SECONDS) * 1000), bytes(10))
        seen = {exchange.id async for exchange in self._store.scan(replace(self._query, after=floor))}
        newest = replace(self._query, newest_first=True, limit=number)
        shown = [exchange async for exchange in self._store.scan(newest)][::-1]
        self._seen = seen | {exchange.id for exchange in shown}
        self._newest = max(self._seen, default=floor)
        self._due = self._clock() + LOOK_BACK_SECONDS
        return shown

    async def fresh(self) -> AsyncIterator[Exchange]:
        """What has come since the last time. Raises StoreError; the next call goes on."""
        began = self._clock()
        looks_back = began >= self._due
        floor = id_at(int(max(0.0, time_of(self._newest) - LATE_SECONDS) * 1000), bytes(10))
        async for exchange in self._store.scan(replace(self._query, after=floor if looks_back else self._newest)):
            if exchange.id not in self._seen:
                self._seen.add(exchange.id)
                self._newest = max(self._newest, exchange.id)
                yield exchange
        if looks_back:
            self._seen = {each for each in self._seen if each > floor}
            now = self._clock()
            self._due = now + max(LOOK_BACK_SECONDS, LOOK_BACK_SHARE * (now - began))


async def follow(
    store: LogStore, query: Query, number: int, show: Callable[[Exchange], None], warn: Callable[[str], None]
) -> None:
    """Show the newest, then what comes, until cancelled. A store that is away is told once, and waited for."""
    follower = Follower(store, query)
    begun = away = False
    while True:
        try:
            if not begun:
                for exchange in await follower.begin(number, time.time()):
                    show(exchange)
                begun = True
            async for exchange in follower.fresh():
                show(exchange)
            if away:
                warn("the log store is back")
            away = False
        except StoreError as error:
            if not away:
                warn(f"the log store is away, waiting for it: {error}")
            away = True
        await asyncio.sleep(POLL_SECONDS)
