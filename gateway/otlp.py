"""OpenTelemetry's SDK: resource, exporters, and our spans as its own. Loaded only where a signal is sent."""

import logging
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.metadata import version
from typing import Any, Final

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

from gateway.errors import ConfigError
from gateway.sender import Sender
from gateway.signals import Protocol
from gateway.spans import Span, Value
from gateway.telemetry import TellMetrics

__all__ = ["SCOPE", "SpanSender", "exporter_of", "resource_of"]

SCOPE: Final = InstrumentationScope("understudy", version("understudy"))
_SAMPLED: Final = TraceFlags(TraceFlags.SAMPLED)
_KINDS: Final = {"server": SpanKind.SERVER, "client": SpanKind.CLIENT}
_MODULES: Final[dict[Protocol, str]] = {"http/protobuf": "http", "grpc": "grpc"}
_EXPORTERS: Final = {
    "traces": ("trace_exporter", "OTLPSpanExporter"),
    "metrics": ("metric_exporter", "OTLPMetricExporter"),
    "logs": ("_log_exporter", "OTLPLogExporter"),
}


def resource_of(environment: Mapping[str, str]) -> Resource:
    """What OTEL_RESOURCE_ATTRIBUTES and OTEL_SERVICE_NAME say; the service is `understudy` where they do not."""
    named = environment.get("OTEL_SERVICE_NAME") or "service.name=" in environment.get("OTEL_RESOURCE_ATTRIBUTES", "")
    own = {} if named else {"service.name": "understudy"}
    return Resource.create({"service.version": SCOPE.version or "", **own})


def exporter_of(signal: str, protocol: Protocol) -> Any:
    """The SDK's OTLP exporter, which reads endpoint, headers, TLS and timeout from the environment itself.

    Its own complaints are left out: whoever uses it says once that nothing is delivered. Raises ConfigError.
    """
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
    module, name = _EXPORTERS[signal]
    exporter = getattr(import_module(f"opentelemetry.exporter.otlp.proto.{_MODULES[protocol]}.{module}"), name)
    try:
        return exporter()
    except Exception as error:  # whatever it makes of a variable that it cannot read
        raise ConfigError(f"OTEL_EXPORTER_OTLP_*: no {signal} are sent: {type(error).__name__}: {error}") from error


class SpanSender:
    """Sends spans in a thread of its own. The SDK's batch processor does the same, but counts no losses."""

    def __init__(self, protocol: Protocol, environment: Mapping[str, str], metrics: TellMetrics) -> None:
        self._exporter = exporter_of("traces", protocol)
        self._resource = resource_of(environment)
        self._limits = SpanLimits()
        self._metrics = metrics
        numbers = {name: environment.get(f"OTEL_BSP_{name}", "") for name in _BATCHING}
        limit, batch, delay = (int(text) if text.isdigit() else _BATCHING[name] for name, text in numbers.items())
        self._sender = Sender(
            "spans", self._send, dropped=metrics.spans_dropped, limit=limit, batch=batch, delay=delay / 1000
        )
        self.offer = self._sender.offer

    @property
    def busy(self) -> bool:
        return self._sender.busy

    def close(self, seconds: float) -> None:
        """Send what waits, for so long."""
        self._sender.close(seconds)
        self._exporter.shutdown()

    def _send(self, spans: Sequence[Span]) -> bool:
        result = self._exporter.export([self._readable(span) for span in spans])
        if result is not SpanExportResult.SUCCESS:
            return False
        self._metrics.spans_sent(len(spans))
        return True

    def _readable(self, span: Span) -> ReadableSpan:
        state = TraceState.from_header([span.state]) if span.state else None
        parent = None
        if span.parent:
            parent = SpanContext(span.trace_id, span.parent, span.remote, _SAMPLED, state)
        link = None
        if span.link is not None:
            link = Link(SpanContext(*span.link, is_remote=False, trace_flags=_SAMPLED))
        return ReadableSpan(
            name=span.name,
            context=SpanContext(span.trace_id, span.span_id, False, _SAMPLED, state),
            parent=parent,
            resource=self._resource,
            attributes=self._bounded(span.attributes),
            links=() if link is None else (link,),
            kind=_KINDS[span.kind],
            status=Status(StatusCode.ERROR, span.told or None) if span.error else Status(StatusCode.UNSET),
            start_time=span.started,
            end_time=span.ended,
            instrumentation_scope=SCOPE,
        )

    def _bounded(self, attributes: Mapping[str, Value]) -> Mapping[str, Value]:
        """Values no longer than OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT; ours are fewer than any sensible count."""
        most = self._limits.max_span_attribute_length
        if most is None:
            return attributes
        return {name: value[:most] if isinstance(value, str) else value for name, value in attributes.items()}


_BATCHING: Final = {"MAX_QUEUE_SIZE": 8192, "MAX_EXPORT_BATCH_SIZE": 512, "SCHEDULE_DELAY": 1000}
