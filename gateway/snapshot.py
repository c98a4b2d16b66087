"""The routing snapshot a worker decides on: routing.yaml and the rollouts' overlays, refreshed off the hot path."""

import asyncio
import gc
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import orjson
import structlog
from sqlalchemy.exc import SQLAlchemyError

from gateway.config import Settings, environment
from gateway.publish import Published, published_at, read_published, replace_file, signature_of, without_collecting
from gateway.tasks import beat
from gateway.telemetry import Metrics
from gateway.versions import PATIENCE, Versions
from routing.codec import overlay_from_dict, overlay_to_dict
from routing.errors import RoutingError
from routing.packed import unpack
from routing.rules import Rules, with_overlays
from routing.store import Rollouts
from routing.targets import Overlay, RouteTable

__all__ = ["Snapshot"]

log = structlog.get_logger(__name__)


class Snapshot:
    """Holds `table`. A wrong routing.yaml, or a dead database, changes nothing; `problems` tells of them.

    The rules are those that a Publisher left (gateway.publish), and the last overlays that were read are kept in a file
    as well: a worker that starts while the file is wrong and the database away routes as before. The file and the
    database are followed each on its own: a database that hangs holds up no change of the file.
    """

    def __init__(self, settings: Settings, rollouts: Rollouts, versions: Versions, metrics: Metrics) -> None:
        """Raises RulesError or OSError where nothing of use was published."""
        self._published = published_at(settings)
        self._cache = settings.run_dir / "overlays.json"
        self._rollouts = rollouts
        self._versions = versions
        self._metrics = metrics
        self._poll = settings.gateway.overlay_poll
        self._swapping = asyncio.Lock()
        self._signature = signature_of(self._published)
        published = read_published(self._published)
        self._rules: Rules = _unpacked(published)
        self._version = -1
        self._overlays: Mapping[str, Overlay] = _cached(self._cache)
        self._kept = self._overlays
        self.problems: dict[str, str] = {}
        self._heed(published)
        self.table: RouteTable = with_overlays(self._rules, self._overlays)

    async def run(self, *others: Callable[[], Awaitable[None]]) -> None:
        """Look for changes for ever, and have `others`, which never raise, look for theirs."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow_rules())
            group.create_task(self._follow_overlays())
            for refresh in others:
                group.create_task(self._follow(refresh))

    async def _follow(self, refresh: Callable[[], Awaitable[None]]) -> None:
        while True:
            await refresh()
            await self._versions.pause()

    async def _follow_rules(self) -> None:
        while True:
            signature = signature_of(self._published)
            if signature not in (self._signature, ()):
                await self._take_rules(signature)
            await beat()

    async def _follow_overlays(self) -> None:
        while True:
            try:
                async with asyncio.timeout(self._poll * PATIENCE):
                    await self._take_overlays()
                self._solved("database")
            except TimeoutError:
                self._problem("database", "it does not answer")
            except (SQLAlchemyError, RoutingError, OSError, ValueError) as error:
                self._problem("database", str(error).partition("\n")[0])
            if self._kept is not self._overlays:
                await asyncio.to_thread(self._keep, self._overlays)
            await self._versions.pause()

    async def _take_rules(self, signature: tuple[int, ...]) -> None:
        try:
            published = await asyncio.to_thread(read_published, self._published)
            if published.digest != self._rules.digest:
                rules = await asyncio.to_thread(_unpacked, published)
                async with self._swapping:
                    await self._swap(rules, self._overlays)
            self._heed(published)
        except (RoutingError, OSError) as error:
            self._refused(str(error))
        self._signature = signature

    async def _take_overlays(self) -> None:
        if await self._versions.of_overlays() == self._version:
            return
        version, overlays = await self._rollouts.current_overlays()
        async with self._swapping:
            if overlays != self._overlays:
                await self._swap(self._rules, overlays)
        self._version = version

    def _keep(self, overlays: Mapping[str, Overlay]) -> None:
        body = orjson.dumps({name: overlay_to_dict(overlay) for name, overlay in overlays.items()})
        try:
            replace_file(self._cache, body)
        except OSError as error:
            self._problem("cache", f"the overlays cannot be kept in {self._cache}: {error.strerror}")
        else:
            self._kept = overlays
            self._solved("cache")

    async def _swap(self, rules: Rules, overlays: Mapping[str, Overlay]) -> None:
        """The table is made in a thread; the event loop only exchanges it."""
        table = await asyncio.to_thread(with_overlays, rules, overlays)
        self._rules, self._overlays, self.table = rules, overlays, table
        self._metrics.reloaded("ok")
        log.info("routing snapshot", snapshot=table.snapshot, overlays=sorted(overlays))

    def _heed(self, published: Published) -> None:
        if published.problem:
            self._refused(published.problem)
        else:
            self._solved("routing")

    def _refused(self, why: str) -> None:
        if self._problem("routing", why):
            self._metrics.reloaded("refused")

    def _problem(self, what: str, text: str) -> bool:
        """Tell of it once; False where it is known."""
        if self.problems.get(what) == text:
            return False
        self.problems[what] = text
        log.warning("routing goes on with its last good snapshot", part=what, error=text)
        return True

    def _solved(self, what: str) -> None:
        if self.problems.pop(what, None) is not None:
            log.info("routing is fresh again", part=what)


def _unpacked(published: Published) -> Rules:
    """The collector never goes through them, not afterwards either: they hold no cycle, and end with their last use."""
    with without_collecting():
        rules = unpack(published.rules, environment())
        gc.freeze()
        return rules


def _cached(path: Path) -> Mapping[str, Overlay]:
    try:
        return {name: overlay_from_dict(value) for name, value in orjson.loads(path.read_bytes()).items()}
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError, OSError) as error:
        log.warning("the cached overlays cannot be read; starting without them", file=str(path), error=str(error))
        return {}
