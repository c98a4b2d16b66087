"""The shipper: a process of its own that takes exchanges from the spool to the log store, each exactly once.

python -m gateway.ship [--config FILE] [--watch-fd N] [--once]
"""

import argparse
import asyncio
import base64
import contextlib
import fcntl
import os
import random
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Final, Protocol

import orjson
import structlog

from gateway.config import Settings, environment, load_settings
from gateway.errors import CannotRedact, RecordsRefused, StoreError
from gateway.exchanges import to_exchange
from gateway.feedback import readable
from gateway.logstore import LogStore
from gateway.logstore.open import open_log_store
from gateway.presidio import redactor_of
from gateway.records import Exchange, Feedback
from gateway.redact import Redactor
from gateway.signals import signals_of
from gateway.sinks import FileSink, open_sink
from gateway.spool import spool_size
from gateway.supervise import stop_on_signals
from gateway.tail import Batch, Elsewhere, Record, Tail, remove_taken
from gateway.telemetry import ShipMetrics, configure_logging
from gateway.tell import LATE, NAME, is_told
from gateway.tombstones import QUARANTINE, Tombstones

__all__ = ["Reader", "Shipper", "SinkReader", "StoreReader", "main"]

log = structlog.get_logger(__name__)

_BATCHES_A_PASS: Final = 20  # so that no folder keeps the others waiting
_SINK_LEAST: Final = 1_000  # exchanges that make a file worth while; a finished segment is written whatever it holds
_SINK_LIMIT: Final = 10_000


@dataclass(slots=True)
class Shipped:
    """What a shipper did since it started; `waiting` and `lag_seconds` are as of its last pass."""

    exchanges: int = 0
    feedback: int = 0
    feedback_quarantined: int = 0
    quarantined: int = 0
    forgotten: int = 0  # left out, for their client had been forgotten
    damaged: int = 0
    torn_bytes: int = 0
    segments: int = 0
    batches: int = 0
    waiting: int = 0
    lag_seconds: float = 0.0
    last_error: str = ""
    at: float = field(default_factory=time.time)


class Reader(Protocol):
    """Where exchanges are brought: the log store, or a sink beside it."""

    name: str
    least: int
    limit: int

    async def take(self, exchanges: Sequence[Exchange], place: str) -> None:
        """Store a batch; the same `place` may come again, with as many exchanges or more.

        Raises StoreError; RecordsRefused when all but some are stored, which never will be.
        """

    async def take_feedback(self, feedback: Sequence[Feedback]) -> None:
        """Store feedback, which may come again. Raises as `take` does."""


class StoreReader:
    """Brings exchanges and feedback to the log store."""

    name = "store"
    least = 1

    def __init__(self, store: LogStore, limit: int) -> None:
        self._store = store
        self.limit = limit

    async def take(self, exchanges: Sequence[Exchange], place: str) -> None:
        await self._store.append(exchanges)

    async def take_feedback(self, feedback: Sequence[Feedback]) -> None:
        await self._store.add_feedback(feedback)


class SinkReader:
    """Brings exchanges to files, named by the place in the spool where they begin. Feedback is not for them."""

    least = _SINK_LEAST
    limit = _SINK_LIMIT

    def __init__(self, sink: FileSink, url: str) -> None:
        self.name = f"sink-{blake2b(url.encode(), digest_size=6).hexdigest()}"
        self._sink = sink

    async def take(self, exchanges: Sequence[Exchange], place: str) -> None:
        await self._sink.write(place, exchanges)

    async def take_feedback(self, feedback: Sequence[Feedback]) -> None:
        pass


class Shipper:
    """Tails every worker's segments in order. A segment is deleted when all of it is acknowledged by all readers."""

    def __init__(
        self,
        settings: Settings,
        readers: Sequence[Reader],
        *,
        redactor: Redactor | None = None,
        metrics: ShipMetrics | None = None,
        told: bool = False,
    ) -> None:
        """The first reader keeps account of what cannot be read. `told`: a teller, see gateway.tell, reads too."""
        self.done = Shipped()
        self._settings = settings
        self._readers = readers
        self._redactor = redactor or Redactor()
        self._metrics = metrics or ShipMetrics()
        self._root = settings.spool_dir
        self._tails: dict[tuple[Path, str], Tail] = {}
        self._lag = 0.0
        self._tombstones = Tombstones(self._root)
        self._told = told

    async def run(self, stop: asyncio.Event) -> None:
        """Ship until `stop`; back off with jitter while a store is down. Ends with a last pass."""
        pause = self._settings.spool.ship_interval
        while True:
            stopping = stop.is_set()
            moved = 0
            try:
                moved = await self.ship_once()
                pause = self._settings.spool.ship_interval
                self.done.last_error = ""
            except StoreError as error:
                pause = min(pause * 2, 5.0)
                self.done.last_error = str(error)
                log.warning("exchanges wait in the spool", error=str(error), retry_s=round(pause, 2))
            self._write_status()
            if stopping:
                return
            if moved < self._settings.spool.ship_batch:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), pause * random.uniform(0.75, 1.25))

    async def ship_all(self) -> None:
        """Ship what is there now, and say so in the status. Raises StoreError."""
        try:
            while await self.ship_once():
                pass
        finally:
            self._write_status()

    async def ship_once(self) -> int:
        """One pass over all folders; how many records the first reader took.

        Raises the StoreError of a reader that failed, after the others have had their turn.
        """
        moved, failures = 0, []
        self._lag = 0.0
        for folder in sorted(path for path in self._root.iterdir() if path.is_dir()):
            tails = [self._tail(folder, reader) for reader in self._readers]
            for reader, tail in zip(self._readers, tails, strict=True):
                try:
                    taken = await self._drain(reader, tail)
                except StoreError as error:
                    failures.append(error)
                else:
                    moved += taken if reader is self._readers[0] else 0
            others = [Elsewhere(folder, NAME, LATE)] if self._told else []
            self.done.segments += remove_taken(folder, [*tails, *others])
            if not folder.exists():
                for reader in self._readers:
                    del self._tails[folder, reader.name]
        self.done.lag_seconds = round(self._lag, 3)
        if failures:
            raise failures[0]
        return moved

    def _tail(self, folder: Path, reader: Reader) -> Tail:
        key = (folder, reader.name)
        if key not in self._tails:
            self._tails[key] = Tail(folder, reader.name)
        return self._tails[key]

    async def _drain(self, reader: Reader, tail: Tail) -> int:
        """Bring what is there to one reader, up to a number of batches."""
        moved = 0
        for _ in range(_BATCHES_A_PASS):
            batch = tail.next(reader.limit, least=reader.least)
            if batch is None:
                break
            with self._tombstones.held():
                moved += await self._take(reader, tail, batch)
        return moved

    async def _take(self, reader: Reader, tail: Tail, batch: Batch) -> int:
        """Bring one batch to a reader and acknowledge it; how many records it took."""
        first = reader is self._readers[0]
        exchanges = self._exchanges([one for one in batch.records if not one.is_feedback], keep=first)
        if exchanges:
            self._lag = max(self._lag, time.time() - exchanges[0].timestamp)
            started = time.perf_counter()
            place = f"{tail.folder.name}-{batch.start.segment:08d}-{batch.start.offset:010d}"
            refused = await self._bring(reader, exchanges, place)
            exchanges = [exchange for exchange in exchanges if exchange.id not in refused]
            if first:
                self._metrics.shipped(len(exchanges), time.perf_counter() - started, batch.size)
        feedback = await self._bring_feedback(reader, [one for one in batch.records if one.is_feedback], keep=first)
        if first:
            self._account(batch, tail.folder)
            self.done.exchanges += len(exchanges)
            self.done.batches += 1
        tail.acknowledge()
        return len(exchanges) + feedback

    def _exchanges(self, records: Sequence[Record], *, keep: bool) -> list[Exchange]:
        """What may be stored: not what a forgotten client sent, nor what is no exchange."""
        found: list[Exchange] = []
        cover = self._tombstones.cover
        for record in records:
            forgotten = cover(record.header.get("client_id"), record.header.get("timestamp"))
            made = None if forgotten else self._exchange(record, keep=keep)
            if made is not None and not cover(made.client_id, made.timestamp):
                found.append(made)
            elif keep and (forgotten or made is not None):
                self.done.forgotten += 1
        return found

    async def _bring(self, reader: Reader, exchanges: Sequence[Exchange], place: str) -> frozenset[str]:
        """Have a reader take a batch; the ids of those that it never will, which go to quarantine."""
        refused: dict[str, str] = {}
        try:
            await reader.take(exchanges, place)
        except RecordsRefused as error:
            refused |= error.reasons
        except (TypeError, ValueError):  # a body that was read, but is nested deeper than writers go
            storable = [exchange for exchange in exchanges if _is_storable(exchange)]
            refused |= {one.id: "its JSON is nested too deep" for one in exchanges if not _is_storable(one)}
            await reader.take(storable, place)
        clients = {exchange.id: exchange.client_id for exchange in exchanges}
        for name, reason in refused.items():
            entry = {"id": name, "client": clients.get(name, ""), "reader": reader.name, "reason": reason}
            self._quarantine(entry)
        return frozenset(refused)

    async def _bring_feedback(self, reader: Reader, records: Sequence[Record], *, keep: bool) -> int:
        """Have a reader take what was said; how much. What nobody can read or store goes to quarantine, unsaid."""
        if not records:
            return 0
        found, wrong = readable(records, self._redactor, self._tombstones.cover)
        taken = len(found)
        try:
            await reader.take_feedback(found)
        except RecordsRefused as error:
            wrong |= error.reasons
            taken -= len(error.reasons)
        if keep:
            self.done.feedback += taken
            self.done.feedback_quarantined += len(wrong)
            for name, reason in wrong.items():
                self._set_aside({"feedback": name, "reader": reader.name, "reason": reason})
        return taken

    def _exchange(self, record: Record, *, keep: bool) -> Exchange | None:
        """The record as an exchange that may be stored; one that is none goes to quarantine, where `keep` says so."""
        mode = record.header.get("pii")
        try:
            exchange = to_exchange(record)
            return self._redactor.redact_exchange(exchange, mode) if mode else exchange
        except (ValueError, KeyError, TypeError, AttributeError, CannotRedact) as error:
            if keep:
                entry: dict[str, object] = {"id": record.header.get("id"), "reason": f"{type(error).__name__}: {error}"}
                if not mode:  # what may hold personal data and was not masked is not kept
                    raw = orjson.dumps(record.header) + record.request + record.response
                    entry["raw"] = base64.b64encode(raw).decode()
                self._quarantine(entry)
            return None

    def _account(self, batch: Batch, folder: Path) -> None:
        """Count what was damaged. Its bytes are not kept: nobody can tell whose they were."""
        for place, corrupt in batch.damaged:
            where = {"folder": folder.name, "segment": place.segment, "offset": place.offset}
            if corrupt.torn:
                self.done.torn_bytes += len(corrupt.raw)
                log.warning("spool: a torn tail was cut", bytes=len(corrupt.raw), **where)
            else:
                self.done.damaged += 1
                self._metrics.damaged()
                self._quarantine(where | {"reason": corrupt.reason, "bytes": len(corrupt.raw)})

    def _quarantine(self, entry: Mapping[str, object]) -> None:
        self.done.quarantined += 1
        self._set_aside(entry)

    def _set_aside(self, entry: Mapping[str, object]) -> None:
        """What cannot be shipped is kept aside, visible, and never in the way."""
        with contextlib.suppress(OSError), (self._root / QUARANTINE).open("ab") as file:
            file.write(orjson.dumps(entry) + b"\n")
        self._metrics.quarantined()
        log.error("spool: a record was quarantined", reason=entry["reason"])

    def _write_status(self) -> None:
        self.done.at = time.time()
        self.done.waiting = spool_size(self._root)
        self._metrics.waiting(self.done.waiting, self.done.lag_seconds)
        status = {name: getattr(self.done, name) for name in Shipped.__slots__}
        path = self._settings.run_dir / "ship.json"
        temporary = path.with_suffix(".tmp")
        with contextlib.suppress(OSError):  # a full disk stops nothing
            temporary.write_bytes(orjson.dumps(status))
            temporary.replace(path)


def _is_storable(exchange: Exchange) -> bool:
    try:
        orjson.dumps((exchange.request, exchange.response))
    except (TypeError, ValueError):
        return False
    return True


async def _serve(settings: Settings, watch_fd: int | None, once: bool) -> None:
    for folder in (settings.spool_dir, settings.run_dir):
        folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(settings.spool_dir / "ship.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    await asyncio.to_thread(fcntl.flock, lock, fcntl.LOCK_EX)  # one shipper a spool; the next waits for it
    store = open_log_store(settings.log_store)
    sinks = [SinkReader(open_sink(url), url) for url in settings.log_sinks]
    readers: list[Reader] = [StoreReader(store, settings.spool.ship_batch), *sinks]
    told = is_told(settings, signals_of(environment()))
    shipper = Shipper(settings, readers, redactor=redactor_of(settings.privacy), told=told)
    try:
        if once:
            await shipper.ship_all()
            return
        await shipper.run(stop_on_signals(watch_fd))
    finally:
        await store.close()
        os.close(lock)


def main(argv: list[str] | None = None) -> int:
    """Run until stopped; exit 0. With --once, 1 when the store could not be reached."""
    parser = argparse.ArgumentParser(prog="python -m gateway.ship", description="Ship the spool to the log store.")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--watch-fd", type=int)
    parser.add_argument("--once", action="store_true")
    arguments = parser.parse_args(argv)
    configure_logging("ship")
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with contextlib.suppress(OSError):
        os.nice(5)
    try:
        asyncio.run(_serve(load_settings(arguments.config), arguments.watch_fd, arguments.once))
    except StoreError as error:
        log.error("not all was shipped", error=str(error))
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
