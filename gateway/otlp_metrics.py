"""Metrics over OTLP: what /metrics has of all processes, read at intervals in one place, by the SDK's exporter."""

import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import structlog
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    HistogramDataPoint,
    Metric,
    MetricExportResult,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.metrics.export import Histogram as HistogramData
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.samples import Sample

from gateway.otlp import SCOPE, exporter_of, resource_of
from gateway.records import Arm, Exchange
from gateway.signals import Protocol
from gateway.spans import OPERATIONS, error_of, provider_name
from gateway.telemetry import TellMetrics, registry_of

__all__ = ["GenAI", "MetricSender", "converted"]

log = structlog.get_logger(__name__)

_SECONDS: Final = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_FIRST: Final = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_TOKENS: Final = tuple(4.0**power for power in range(14))
_LABELS: Final = {
    "operation": "gen_ai.operation.name",
    "provider": "gen_ai.provider.name",
    "request_model": "gen_ai.request.model",
    "response_model": "gen_ai.response.model",
    "token_type": "gen_ai.token.type",
    "error_type": "error.type",
}
_UNITS: Final = {"seconds": "s", "bytes": "By", "duration": "s", "token": "s", "usage": "{token}"}


class GenAI:
    """OpenTelemetry's metrics for generative AI, of logged exchanges; at /metrics with `_` for `.`.

    `request_model` is the routing table's name: what clients write there may be anything.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        made: dict[str, Any] = {"registry": registry or CollectorRegistry()}
        labels = ["operation", "provider", "request_model", "response_model"]
        self._usage = Histogram(
            "gen_ai_client_token_usage", "Tokens of a call", [*labels, "token_type"], buckets=_TOKENS, **made
        )
        self._called = Histogram(
            "gen_ai_client_operation_duration",
            "Seconds of a call, as the gateway saw its upstreams",
            [*labels, "error_type"],
            buckets=_SECONDS,
            **made,
        )
        self._served = Histogram(
            "gen_ai_server_request_duration",
            "Seconds of a call, as its client saw the gateway",
            [*labels, "error_type"],
            buckets=_SECONDS,
            **made,
        )
        self._first = Histogram(
            "gen_ai_server_time_to_first_token", "Seconds to a stream's first byte", labels, buckets=_FIRST, **made
        )

    def observe(self, exchange: Exchange, provider: str) -> None:
        """Count one exchange. A mirror is no client's, and counts as a call of its upstream alone."""
        if exchange.path not in OPERATIONS or not exchange.model:
            return
        answered = (exchange.response or {}).get("model")
        answered = answered if isinstance(answered, str) else ""
        labels = (OPERATIONS[exchange.path], provider_name(provider), exchange.model, answered)
        seconds, error = exchange.latency_ms / 1000, error_of(exchange)
        if exchange.usage is not None:
            self._usage.labels(*labels, "input").observe(exchange.usage.input_tokens)
            self._usage.labels(*labels, "output").observe(exchange.usage.output_tokens)
        self._called.labels(*labels, error).observe(seconds)
        if exchange.arm is Arm.MIRROR:
            return
        self._served.labels(*labels, error).observe(seconds)
        if exchange.stream and exchange.ttft_ms is not None:
            self._first.labels(*labels).observe(exchange.ttft_ms / 1000)


class MetricSender:
    """Sends all metrics every OTEL_METRIC_EXPORT_INTERVAL milliseconds, and at the end."""

    def __init__(self, protocol: Protocol, environment: Mapping[str, str], own: TellMetrics) -> None:
        """`own` are this process's metrics: all there are where no folder is shared."""
        self._exporter = exporter_of("metrics", protocol)
        self._own = own.registry
        self._resource = resource_of(environment)
        folder = environment.get("PROMETHEUS_MULTIPROC_DIR")
        self._shared = Path(folder) if folder else None
        self._started = time.time_ns() if self._shared is None else _began(self._shared)
        self._genai = GenAI(own.registry)
        self.observe = self._genai.observe
        interval = environment.get("OTEL_METRIC_EXPORT_INTERVAL", "")
        self._interval = int(interval) / 1000 if interval.isdigit() and int(interval) else 60.0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def close(self, seconds: float) -> None:
        """Send once more, for so long."""
        self._closing.set()
        self._thread.join(seconds)
        self._exporter.shutdown()

    def _run(self) -> None:
        ending, delivers = False, True
        while not ending:
            ending = self._closing.wait(self._interval)
            delivered = self._sent()
            if delivered != delivers:
                delivers = delivered
                log.warning("delivered again" if delivered else "not delivered", what="metrics")

    def _sent(self) -> bool:
        try:
            return self._send()
        except Exception:  # a fence: what is wrong at one time must not end the thread
            log.exception("metrics could not be read")
            return False

    def _send(self) -> bool:
        registry = self._own if self._shared is None else registry_of(self._shared)
        metrics = converted(registry.collect(), self._started, time.time_ns())
        scope = ScopeMetrics(scope=SCOPE, metrics=metrics, schema_url="")
        data = ResourceMetrics(resource=self._resource, scope_metrics=[scope], schema_url="")
        return bool(self._exporter.export(MetricsData([data])) is MetricExportResult.SUCCESS)


def converted(families: Iterable[Family], started: int, now: int) -> list[Metric]:
    """Prometheus's metrics as OpenTelemetry's, cumulative since `started`; both times in Unix nanoseconds."""
    return [
        Metric(name=_name(family.name), description=family.documentation, unit=_unit(family.name), data=data)
        for family in families
        if (data := _data(family, started, now)) is not None and data.data_points
    ]


def _data(family: Family, started: int, now: int) -> Sum | Gauge | HistogramData | None:
    if family.type == "histogram":
        return HistogramData(_histograms(family.samples, started, now), AggregationTemporality.CUMULATIVE)
    is_sum = family.type == "counter"
    points = [
        NumberDataPoint(_attributes(sample.labels), started if is_sum else 0, now, sample.value)
        for sample in family.samples
        if not sample.name.endswith("_created")
    ]
    if is_sum:
        return Sum(points, AggregationTemporality.CUMULATIVE, is_monotonic=True)
    return Gauge(points) if family.type == "gauge" else None


def _histograms(samples: Sequence[Sample], started: int, now: int) -> list[HistogramDataPoint]:
    """Buckets that each count what is in them; Prometheus's count what is below, too."""
    series: dict[tuple[tuple[str, str], ...], dict[str, float]] = {}
    for sample in samples:
        labels = dict(sample.labels)
        bound = labels.pop("le", "")
        kind = sample.name.rpartition("_")[2]
        if kind in ("bucket", "sum", "count"):
            series.setdefault(tuple(sorted(labels.items())), {})[bound or kind] = sample.value
    found: list[HistogramDataPoint] = []
    for key, values in series.items():
        total = values.pop("sum", 0.0)
        values.pop("count", None)
        bounds = sorted(float(bound) for bound in values)
        below = [value for _, value in sorted((float(bound), value) for bound, value in values.items())]
        counts = [int(upper - lower) for lower, upper in zip([0.0, *below], below, strict=False)]
        none: Any = None  # the least and the greatest, which Prometheus does not know
        found.append(
            HistogramDataPoint(
                _attributes(dict(key)), started, now, sum(counts), total, counts, bounds[:-1], none, none
            )
        )
    return found


def _attributes(labels: Mapping[str, str]) -> dict[str, str]:
    return {_LABELS.get(name, name): value for name, value in labels.items() if value}


def _name(name: str) -> str:
    """OpenTelemetry's metrics by its names, ours by the names that /metrics has."""
    if not name.startswith("gen_ai_"):
        return name
    _, _, side, rest = name.split("_", 3)
    first, _, second = rest.rpartition("_")
    return f"gen_ai.{side}.{first}.{second}" if rest != "time_to_first_token" else f"gen_ai.{side}.{rest}"


def _unit(name: str) -> str:
    return _UNITS.get(name.rpartition("_")[2], "")


def _began(shared: Path) -> int:
    """When the gateway began to count: it empties the folder then, and marks it."""
    try:
        return (shared / "started").stat().st_mtime_ns
    except FileNotFoundError:
        return time.time_ns()
