"""The teller: a process of its own that reads the spool beside the shipper, and tells others of each exchange.

python -m gateway.tell [--config FILE] [--watch-fd N]

It makes spans, metrics of tokens and times, and the access log. It holds up neither traffic nor the log: what cannot
be delivered is dropped and counted.
"""

import argparse
import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import structlog

from gateway.access_log import AccessLog
from gateway.config import Settings, environment, load_settings
from gateway.errors import CannotRedact, ConfigError
from gateway.exchanges import to_exchange
from gateway.presidio import redactor_of
from gateway.records import Exchange
from gateway.redact import Redactor
from gateway.signals import Signals, signals_of
from gateway.spans import Span, spans_of, without_content
from gateway.supervise import stop_on_signals
from gateway.tail import Record, Tail, segments
from gateway.telemetry import TellMetrics, configure_logging
from gateway.tombstones import Tombstones

__all__ = ["LATE", "NAME", "Channels", "Teller", "channels_of", "is_told", "main"]

log = structlog.get_logger(__name__)

NAME: Final = "telemetry"  # of its place in a folder of the spool
LATE: Final = 60.0  # seconds after which a call is not worth a span, nor its segment's room on disk
_BATCH: Final = 500
_BATCHES_A_PASS: Final = 20
_PATIENCE: Final = 3.0  # seconds that each channel has at the end


class SpanChannel(Protocol):
    """Where spans go: gateway.otlp.SpanSender. While it is `busy`, exchanges wait in the spool."""

    @property
    def busy(self) -> bool: ...

    def offer(self, things: Sequence[Span]) -> None: ...

    def close(self, seconds: float) -> None: ...


class MetricChannel(Protocol):
    """Metrics made of exchanges: gateway.otlp_metrics.MetricSender."""

    def observe(self, exchange: Exchange, provider: str) -> None: ...

    def close(self, seconds: float) -> None: ...


class Channels(NamedTuple):
    """Where a teller tells; None where nowhere. `content` says that spans have the messages."""

    spans: SpanChannel | None = None
    metrics: MetricChannel | None = None
    access_log: AccessLog | None = None
    content: bool = False


def is_told(settings: Settings, signals: Signals) -> bool:
    """Whether there is something for a teller to do."""
    return bool(signals.traces or signals.metrics or settings.gateway.access_log != "off")


def channels_of(settings: Settings, signals: Signals, metrics: TellMetrics) -> Channels:
    """What the settings and the OTEL_* variables want, less what these do not allow. Loads OpenTelemetry if used."""
    access_log = None
    if settings.gateway.access_log != "off":
        access_log = AccessLog(settings.gateway.access_log, settings.gateway.access_log_sample, metrics)
    spans = _made("gateway.otlp", "SpanSender", signals.traces, metrics)
    sender = _made("gateway.otlp_metrics", "MetricSender", signals.metrics, metrics)
    return Channels(spans, sender, access_log, signals.capture_content)


def _made(module: str, name: str, protocol: str | None, metrics: TellMetrics) -> Any:
    """A channel over OTLP; None where it is off, or its variables cannot be used."""
    if protocol is None:
        return None
    try:
        return getattr(import_module(module), name)(protocol, environment(), metrics)
    except (ConfigError, ValueError) as error:
        log.error("telemetry", problem=str(error))
        return None


class Teller:
    """Tails every worker's segments, as gateway.ship does, with places of its own."""

    def __init__(self, spool: Path, channels: Channels, *, redactor: Redactor, metrics: TellMetrics) -> None:
        self._root = spool
        self._channels = channels
        self._redactor = redactor
        self._metrics = metrics
        self._tails: dict[Path, Tail] = {}
        self._tombstones = Tombstones(spool)

    async def run(self, stop: asyncio.Event, interval: float) -> None:
        """Tell until `stop`, looking every `interval` seconds. Ends with a last pass."""
        while True:
            stopping = stop.is_set()
            told = self.tell_once()
            if stopping:
                return
            if told < _BATCH:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), interval)
            else:
                await asyncio.sleep(0)

    def tell_once(self) -> int:
        """One pass over all folders; how many records were read."""
        folders = sorted(path for path in self._root.iterdir() if path.is_dir())
        self._tails = {folder: self._tails.get(folder) or Tail(folder, NAME) for folder in folders}
        return sum(self._drain(tail) for tail in self._tails.values() if not tail.finished)

    def close(self) -> None:
        """Deliver what waits, for some seconds. Blocks."""
        for channel in (self._channels.access_log, self._channels.spans, self._channels.metrics):
            if channel is not None:
                channel.close(_PATIENCE)

    def _drain(self, tail: Tail) -> int:
        told, spans = 0, self._channels.spans
        self._count_skipped(tail)
        for _ in range(_BATCHES_A_PASS):
            if spans is not None and spans.busy:
                break
            try:
                batch = tail.next(_BATCH)
            except FileNotFoundError:  # too late: the shipper needs its room
                break
            if batch is None:
                break
            with self._tombstones.held():
                self._tell([found for one in batch.records if (found := self._exchange(one)) is not None])
            tail.acknowledge()
            told += len(batch.records)
        return told

    def _count_skipped(self, tail: Tail) -> None:
        """Count the segments that went before they were read to their end."""
        at, there = tail.taken.segment, segments(tail.folder)
        if 0 < at < min(there, default=0):
            self._metrics.skipped(there[0] - at)

    def _exchange(self, record: Record) -> tuple[Exchange, Mapping[str, Any]] | None:
        """What may be told of a record, with its header; None for feedback, and for what the log would not keep."""
        header, cover = record.header, self._tombstones.cover
        if record.is_feedback or cover(header.get("client_id"), header.get("timestamp")):
            return None
        try:
            exchange = to_exchange(record)
            if mode := header.get("pii"):
                exchange = self._redactor.redact_exchange(without_content(exchange), mode)
        except (ValueError, KeyError, TypeError, AttributeError, CannotRedact):  # the shipper keeps account of these
            return None
        return exchange, header

    def _tell(self, calls: Sequence[tuple[Exchange, Mapping[str, Any]]]) -> None:
        channels = self._channels
        if channels.access_log is not None:
            channels.access_log.add((exchange, header.get("method", "POST")) for exchange, header in calls)
        if channels.metrics is not None:
            for exchange, header in calls:
                channels.metrics.observe(exchange, header.get("provider", ""))
        if channels.spans is not None:
            channels.spans.offer([span for call in calls for span in self._spans(*call)])

    def _spans(self, exchange: Exchange, header: Mapping[str, Any]) -> Sequence[Span]:
        """The spans of a call; none of one that ended too long ago."""
        try:
            spans = spans_of(exchange, header, content=self._channels.content and not header.get("pii"))
        except (TypeError, ValueError, IndexError):  # a frame that no gateway of this version wrote
            self._metrics.spans_dropped("unreadable", 1)
            return ()
        if spans and spans[0].ended < (time.time() - LATE) * 1e9:
            self._metrics.spans_dropped("late", len(spans))
            return ()
        return spans


async def _serve(settings: Settings, watch_fd: int | None) -> None:
    settings.spool_dir.mkdir(parents=True, exist_ok=True)
    metrics = TellMetrics()
    channels = channels_of(settings, signals_of(environment()), metrics)
    teller = Teller(settings.spool_dir, channels, redactor=redactor_of(settings.privacy), metrics=metrics)
    try:
        await teller.run(stop_on_signals(watch_fd), settings.spool.ship_interval)
    finally:
        teller.close()


def main(argv: list[str] | None = None) -> int:
    """Run until stopped; exit 0."""
    parser = argparse.ArgumentParser(prog="python -m gateway.tell", description="Spans, metrics and the access log.")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--watch-fd", type=int)
    arguments = parser.parse_args(argv)
    configure_logging("tell")
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with contextlib.suppress(OSError):
        os.nice(10)  # behind the shipper
    asyncio.run(_serve(load_settings(arguments.config), arguments.watch_fd))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
