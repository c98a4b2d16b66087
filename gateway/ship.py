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
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import structlog

from gateway.assemble import assemble, usage_of
from gateway.config import Settings, load_settings
from gateway.errors import StoreError
from gateway.logstore import LogStore
from gateway.logstore.open import open_log_store
from gateway.records import JSON, Arm, Attempt, Exchange, MirrorFate, Outcome, Usage
from gateway.spool import Corrupt, Frame, read_frames
from gateway.supervise import stop_on_signals
from gateway.telemetry import configure_logging

__all__ = ["Shipper", "main", "to_exchange"]

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Shipped:
    """What a shipper did since it started."""

    exchanges: int = 0
    quarantined: int = 0
    torn_bytes: int = 0
    segments: int = 0
    batches: int = 0
    last_error: str = ""
    at: float = field(default_factory=time.time)


class Shipper:
    """Tails every worker's segments in order. A segment is deleted when all of it is acknowledged by the store."""

    def __init__(self, settings: Settings, store: LogStore) -> None:
        self.done = Shipped()
        self._settings = settings
        self._store = store
        self._root = settings.spool_dir
        self._offsets: dict[Path, int] = {}

    async def run(self, stop: asyncio.Event) -> None:
        """Ship until `stop`; back off with jitter while the store is down. Ends with a last pass."""
        pause = self._settings.spool.ship_interval
        while True:
            stopping = stop.is_set()
            try:
                moved = await self.ship_once()
                pause = self._settings.spool.ship_interval
                self.done.last_error = ""
            except StoreError as error:
                moved = 0
                pause = min(pause * 2, 5.0)
                self.done.last_error = str(error)
                log.warning(
                    "log store is not there; exchanges wait in the spool", error=str(error), retry_s=round(pause, 2)
                )
            self._write_status()
            if stopping:
                return
            if moved < self._settings.spool.ship_batch:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), pause * random.uniform(0.75, 1.25))

    async def ship_once(self) -> int:
        """One pass over all segments; returns how many exchanges were stored. Raises StoreError."""
        moved = 0
        for folder in sorted(path for path in self._root.iterdir() if path.is_dir()):
            alive = _writer_lives(folder)  # asked before reading: what a dead writer left is complete
            segments = sorted(folder.glob("*.seg"))
            for position, segment in enumerate(segments):
                moved += await self._ship_segment(segment)
                if position + 1 < len(segments) or not alive:
                    self._remove(segment)
            if not alive:
                with contextlib.suppress(OSError):
                    (folder / "lock").unlink(missing_ok=True)
                    folder.rmdir()
        return moved

    async def _ship_segment(self, segment: Path) -> int:
        moved = 0
        for batch, end in self._batches(segment):
            await self._store.append(batch)
            self._offsets[segment] = end
            moved += len(batch)
            self.done.exchanges += len(batch)
            self.done.batches += 1
        return moved

    def _batches(self, segment: Path) -> Iterator[tuple[list[Exchange], int]]:
        batch: list[Exchange] = []
        end = self._offsets.get(segment, 0)
        for frame in read_frames(segment, end):
            end = frame.end
            try:
                if isinstance(frame, Corrupt):
                    raise ValueError(frame.reason)
                batch.append(to_exchange(frame))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                self._quarantine(frame, segment, error)
            if len(batch) >= self._settings.spool.ship_batch:
                yield batch, end
                batch = []
        if batch:
            yield batch, end
        else:
            self._offsets[segment] = end

    def _quarantine(self, frame: Frame | Corrupt, segment: Path, error: Exception) -> None:
        """A record that cannot be read is kept aside, visible, and never in the way."""
        raw = frame.raw if isinstance(frame, Corrupt) else orjson.dumps(frame.header) + frame.request + frame.response
        entry = {
            "segment": segment.name,
            "reason": str(error) or type(error).__name__,
            "raw": base64.b64encode(raw).decode(),
        }
        with (self._root / "quarantine.jsonl").open("ab") as file:
            file.write(orjson.dumps(entry) + b"\n")
        self.done.quarantined += 1
        log.error("spool: a record was quarantined", segment=segment.name, reason=entry["reason"])

    def _remove(self, segment: Path) -> None:
        torn = segment.stat().st_size - self._offsets.pop(segment, 0)
        if torn > 0:
            self.done.torn_bytes += torn
            log.warning("spool: a torn tail was cut", segment=segment.name, bytes=torn)
        segment.unlink()
        self.done.segments += 1

    def _write_status(self) -> None:
        self.done.at = time.time()
        status = {name: getattr(self.done, name) for name in Shipped.__slots__}
        path = self._settings.run_dir / "ship.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(orjson.dumps(status))
        temporary.replace(path)


def to_exchange(frame: Frame) -> Exchange:
    """A spooled frame as an Exchange: bodies parsed, a stream assembled, tokens counted, the price worked out.

    Raises ValueError, KeyError or TypeError for a frame that is none.
    """
    header: dict[str, Any] = dict(frame.header)
    encoding, price = header.pop("encoding", ""), header.pop("price", (0.0, 0.0))
    body = _decoded(frame.response, encoding)
    response = (assemble(body) or _raw(body)) if header.get("stream") and header["status"] < 400 else _parsed(body)
    usage = usage_of(response)
    header["attempts"] = tuple(Attempt(**attempt) for attempt in header.get("attempts", ()))
    return Exchange(
        **header
        | {
            "arm": Arm(header["arm"]),
            "outcome": Outcome(header["outcome"]),
            "mirror": MirrorFate(header.get("mirror", MirrorFate.NONE)),
            "usage": usage,
            "cost_usd": _cost(usage, price),
            "request": _parsed(frame.request),
            "response": response,
        }
    )


def _cost(usage: Usage | None, price: tuple[float, float]) -> float | None:
    if usage is None:
        return None
    return (usage.input_tokens * price[0] + usage.output_tokens * price[1]) / 1e6


def _parsed(body: bytes) -> JSON | None:
    if not body:
        return None
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        return _raw(body)
    return value if isinstance(value, dict) else {"value": value}


def _raw(body: bytes) -> JSON | None:
    return {"raw": body.decode("utf-8", "replace")} if body else None


def _decoded(body: bytes, encoding: str) -> bytes:
    if encoding not in ("gzip", "deflate") or not body:
        return body
    decoder = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32 if encoding == "gzip" else zlib.MAX_WBITS)
    with contextlib.suppress(zlib.error):
        return decoder.decompress(body)
    return body


def _writer_lives(folder: Path) -> bool:
    try:
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


async def _serve(settings: Settings, watch_fd: int | None, once: bool) -> None:
    for folder in (settings.spool_dir, settings.run_dir):
        folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(settings.spool_dir / "ship.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    await asyncio.to_thread(fcntl.flock, lock, fcntl.LOCK_EX)  # one shipper a spool; the next waits for it
    store = open_log_store(settings.log_store)
    shipper = Shipper(settings, store)
    try:
        if once:
            await shipper.ship_once()
            return
        await shipper.run(stop_on_signals(watch_fd))
    finally:
        await store.close()
        os.close(lock)


def main(argv: list[str] | None = None) -> int:
    """Run until stopped; exit 0."""
    parser = argparse.ArgumentParser(prog="python -m gateway.ship", description="Ship the spool to the log store.")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--watch-fd", type=int)
    parser.add_argument("--once", action="store_true")
    arguments = parser.parse_args(argv)
    configure_logging("ship")
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with contextlib.suppress(OSError):
        os.nice(5)
    asyncio.run(_serve(load_settings(arguments.config), arguments.watch_fd, arguments.once))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
