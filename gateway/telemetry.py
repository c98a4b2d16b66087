"""Metrics and logs of a process.

What each call counts is counted in plain memory, and told to the library ten times a second: a value that processes
share is a file, and five of them written a call would cost 14 us.
"""

import logging
import sys
from bisect import bisect_right
from collections import defaultdict
from importlib import import_module
from math import inf
from pathlib import Path
from typing import Any, TextIO

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from gateway.config import environment
from gateway.errors import ConfigError
from gateway.signals import signals_of
from gateway.tasks import beat

__all__ = ["Metrics", "ShipMetrics", "TellMetrics", "configure_logging", "exposition", "registry_of"]

_SECONDS = (
    0.00005,
    0.0001,
    0.0002,
    0.0005,
    0.001,
    0.002,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1,
    2.5,
    5,
    10,
    30,
    60,
)


_HEADER_BYTES = 900  # of an exchange's two frames, beside its bodies


class _Times:
    """Observations that a histogram with _SECONDS as its buckets has not been told of yet."""

    def __init__(self) -> None:
        self.seen: list[float] = []  # seconds

    def tell(self, histogram: Any) -> None:
        """The library takes one observation at a time; what it adds them to takes sums."""
        if not self.seen:
            return
        seen, self.seen = sorted(self.seen), []
        below = 0
        for bucket, bound in zip(histogram._buckets, (*_SECONDS, inf), strict=True):
            upto = bisect_right(seen, bound)
            if upto > below:
                bucket.inc(upto - below)
                below = upto
        histogram._sum.inc(sum(seen))


class Metrics:
    """The gateway's metrics. Names and labels use the words of the design.

    What `exchange` counts is shown after the next `flush`; a killed worker takes a tenth of a second of it
    along.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        made: dict[str, Any] = {"registry": registry or CollectorRegistry()}
        self.registry: CollectorRegistry = made["registry"]
        self._exchanges = Counter(
            "understudy_exchanges", "Exchanges by how they ended", ["workload", "arm", "outcome"], **made
        )
        self._overhead = Histogram("understudy_overhead_seconds", "Time inside the gateway", buckets=_SECONDS, **made)
        self._latency = Histogram(
            "understudy_latency_seconds", "Request to reply's end", ["arm"], buckets=_SECONDS, **made
        )
        self._mirrors = Counter("understudy_mirrors", "What became of chances to be mirrored", ["fate"], **made)
        self._spooled = Counter("understudy_spooled", "Exchanges handed to the spool", **made)
        self._feedback = Counter("understudy_feedback", "Feedback handed to the spool", **made)
        self._dropped = Counter("understudy_dropped", "Exchanges that could not be logged", ["reason"], **made)
        self._bytes = Gauge("understudy_spool_bytes", "Size of the spool", multiprocess_mode="max", **made)
        self._breakers = Counter("understudy_breaker_opened", "Times a model's breaker opened", ["model"], **made)
        self._open = Gauge(
            "understudy_breaker_open", "Workers whose breaker is open", ["model"], multiprocess_mode="livesum", **made
        )
        self._tries = Counter(
            "understudy_failed_tries", "Calls of a model that failed before the first byte", ["model", "cause"], **made
        )
        self._queue = Histogram(
            "understudy_queue_seconds",
            "Waits for a place at a model, where there were any",
            ["model"],
            buckets=_SECONDS,
            **made,
        )
        self._untagged = Counter(
            "understudy_untagged", "Calls that no name, rule or key gave a workload: they went to default", **made
        )
        self._unread = Counter(
            "understudy_unread",
            "Requests turned down before they were calls: not HTTP, too large, too slow",
            ["status"],
            **made,
        )
        self._reloads = Counter("understudy_routing_reloads", "Routing snapshots taken in", ["result"], **made)
        self._children: dict[tuple[str, ...], Any] = {}
        self._ended: dict[tuple[str, str, str], int] = defaultdict(int)
        self._latencies: dict[str, _Times] = defaultdict(_Times)
        self._overheads = _Times()

    async def run(self) -> None:
        """Flush, for ever, and at the end."""
        try:
            while True:
                await beat()
                self.flush()
        finally:
            self.flush()

    def flush(self) -> None:
        """Show what was counted until now."""
        ended, self._ended = self._ended, defaultdict(int)
        for labels, count in ended.items():
            self._child(self._exchanges, *labels).inc(count)
        for arm, times in self._latencies.items():
            times.tell(self._child(self._latency, arm))
        self._overheads.tell(self._overhead)

    def exchange(self, workload: str, arm: str, outcome: str, latency: float, overhead: float) -> None:
        """Count an exchange; both times in seconds."""
        self._ended[workload, arm, outcome] += 1
        self._latencies[arm].seen.append(latency)
        self._overheads.seen.append(overhead)

    def mirror(self, fate: str) -> None:
        self._child(self._mirrors, fate).inc()

    def spooled(self, exchanges: int) -> None:
        self._spooled.inc(exchanges)

    def feedback(self) -> None:
        self._feedback.inc()

    def dropped(self, reason: str) -> None:
        self._child(self._dropped, reason).inc()

    def spool_bytes(self, size: int) -> None:
        self._bytes.set(size)

    def breaker_opened(self, model: str) -> None:
        self._child(self._breakers, model).inc()
        self._child(self._open, model).set(1)

    def breaker_closed(self, model: str) -> None:
        self._child(self._open, model).set(0)

    def failed_try(self, model: str, cause: str) -> None:
        self._child(self._tries, model, cause).inc()

    def queued(self, model: str, seconds: float) -> None:
        self._child(self._queue, model).observe(seconds)

    def untagged(self) -> None:
        self._untagged.inc()

    def unread(self, status: int) -> None:
        self._child(self._unread, str(status)).inc()

    def reloaded(self, result: str) -> None:
        self._child(self._reloads, result).inc()

    def _child(self, metric: Any, *labels: str) -> Any:
        key = (metric._name, *labels)
        child = self._children.get(key)
        if child is None:
            child = self._children[key] = metric.labels(*labels)
        return child


class ShipMetrics:
    """The shipper's metrics; they appear beside the workers' at `/metrics`."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        made: dict[str, Any] = {"registry": registry or CollectorRegistry()}
        live: dict[str, Any] = made | {"multiprocess_mode": "livemostrecent"}
        self._shipped = Counter("understudy_shipped", "Exchanges that the log store has acknowledged", **made)
        self._batch = Histogram("understudy_ship_batch_seconds", "Time to store a batch", buckets=_SECONDS, **made)
        self._quarantined = Counter("understudy_quarantined", "Records that could not be shipped", **made)
        self._damaged = Counter("understudy_spool_damaged", "Places in the spool that are no record", **made)
        self._waiting = Gauge("understudy_ship_waiting_bytes", "Bytes of segments that are not deleted yet", **live)
        self._lag = Gauge("understudy_ship_lag_seconds", "Age of the oldest exchange of the last batches", **live)
        self._behind = Gauge("understudy_ship_lag_records", "Exchanges that wait, by their mean size", **live)
        self._mean = 0.0

    def shipped(self, exchanges: int, seconds: float, size: int) -> None:
        """A batch that the store has; `size` is the bytes of its bodies."""
        self._shipped.inc(exchanges)
        self._batch.observe(seconds)
        if exchanges:
            self._mean = size / exchanges

    def quarantined(self) -> None:
        self._quarantined.inc()

    def damaged(self) -> None:
        self._damaged.inc()

    def waiting(self, size: int, seconds: float) -> None:
        self._waiting.set(size)
        self._lag.set(seconds)
        self._behind.set(size // (self._mean + _HEADER_BYTES))


class TellMetrics:
    """The teller's metrics; they appear beside the workers' at `/metrics`."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        made: dict[str, Any] = {"registry": self.registry}
        self._spans_sent = Counter("understudy_spans_sent", "Spans that the collector has taken", **made)
        self._spans_dropped = Counter("understudy_spans_dropped", "Spans that were not sent", ["reason"], **made)
        self._skipped = Counter("understudy_telemetry_skipped", "Segments of the spool that went untold", **made)
        self._access_log_dropped = Counter(
            "understudy_access_log_dropped", "Lines that the access log lacks", ["reason"], **made
        )

    def skipped(self, segments: int) -> None:
        self._skipped.inc(segments)

    def spans_sent(self, spans: int) -> None:
        self._spans_sent.inc(spans)

    def spans_dropped(self, reason: str, spans: int) -> None:
        self._spans_dropped.labels(reason).inc(spans)

    def access_log_dropped(self, reason: str, lines: int) -> None:
        self._access_log_dropped.labels(reason).inc(lines)


def exposition(metrics: Metrics, shared: Path | None) -> bytes:
    """Prometheus text: of all workers where they share a folder, else of this process."""
    metrics.flush()
    return generate_latest(metrics.registry if shared is None else registry_of(shared))


def registry_of(shared: Path) -> CollectorRegistry:
    """The metrics of all processes that share a folder, added up."""
    for pid in {int(file.stem.rpartition("_")[2]) for file in shared.glob("gauge_live*_*.db")}:
        if not Path(f"/proc/{pid}").exists():
            mark_process_dead(pid, str(shared))  # type: ignore[no-untyped-call]
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(shared))  # type: ignore[no-untyped-call]
    return registry


def configure_logging(process: str, *, level: str = "info", stream: TextIO = sys.stderr) -> None:
    """One JSON line an event, on `stream`; the standard library's loggers go the same way. Over OTLP too, if set."""
    sent, problem = _log_senders()
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso"),
        lambda _logger, _method, event: event | {"process": process},
    ]
    structlog.configure(
        processors=[*shared, structlog.processors.format_exc_info, *sent, structlog.processors.JSONRenderer()],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(stream),
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                *sent,
                structlog.processors.JSONRenderer(),
            ],
            foreign_pre_chain=shared,
        )
    )
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    if problem:
        structlog.get_logger(__name__).error("telemetry", problem=problem)


def _log_senders() -> tuple[list[Any], str]:
    """What sends log lines over OTLP, if anything does; and why it does not, where it should."""
    protocol = signals_of(environment()).logs
    if protocol is None:
        return [], ""
    try:
        return [import_module("gateway.otlp_logs").LogSender(protocol, environment())], ""
    except (ConfigError, ValueError) as error:
        return [], str(error)
