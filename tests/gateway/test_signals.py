"""The OTEL_* variables: which signals are on, how they are sent, and OpenTelemetry's samplers as two values."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace import sampling
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    TraceFlags,
    set_span_in_context,
)

from gateway.signals import Sampling, Signals, signals_of
from gateway.tracing import Tracing

HOST = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}


def test_nothing_is_sent_unless_somebody_asks() -> None:
    """Neither without variables, nor with those that say how only, nor with the SDK disabled."""
    assert signals_of({}) == Signals()
    assert not signals_of({"OTEL_SERVICE_NAME": "shop", "OTEL_TRACES_SAMPLER": "always_on"}).any
    assert not signals_of(HOST | {"OTEL_SDK_DISABLED": "True"}).any
    assert not signals_of({"OTEL_EXPORTER_OTLP_ENDPOINT": " "}).any


@pytest.mark.parametrize(
    ("environment", "traces", "metrics", "logs"),
    [
        (HOST, "http/protobuf", "http/protobuf", "http/protobuf"),
        (HOST | {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "grpc", "grpc", "grpc"),
        (HOST | {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "grpc"}, "grpc", "http/protobuf", "http/protobuf"),
        (HOST | {"OTEL_METRICS_EXPORTER": "none", "OTEL_LOGS_EXPORTER": "none"}, "http/protobuf", None, None),
        (HOST | {"OTEL_METRICS_EXPORTER": "prometheus"}, "http/protobuf", None, "http/protobuf"),
        ({"OTEL_EXPORTER_OTLP_LOGS_ENDPOINT": "http://c/v1/logs"}, None, None, "http/protobuf"),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, "http/protobuf", None, None),
    ],
)
def test_each_signal_is_switched_by_its_own_variables(
    environment: dict[str, str], traces: str | None, metrics: str | None, logs: str | None
) -> None:
    """The general ones count where it has none."""
    found = signals_of(environment)
    assert (found.traces, found.metrics, found.logs) == (traces, metrics, logs)
    assert found.problems == ()


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER: zipkin is not known here"),
        (HOST | {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/json"}, "http/json is not known here"),
        (HOST | {"OTEL_TRACES_SAMPLER": "jaeger_remote"}, "jaeger_remote is not known here; parentbased_always_on"),
        (HOST | {"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "half"}, "half is no number"),
        (HOST | {"OTEL_PROPAGATORS": "b3"}, "only tracecontext"),
    ],
)
def test_what_is_not_understood_is_told_and_stops_nothing(environment: dict[str, str], told: str) -> None:
    """Such variables may be there for other programs."""
    (problem,) = signals_of(environment).problems
    assert told in problem


@given(
    name=st.sampled_from([*sampling._KNOWN_SAMPLERS]),
    ratio=st.floats(0, 1),
    trace_id=st.integers(1, 2**128 - 1),
    parent=st.sampled_from([None, 0, 1]),
)
def test_sampling_decides_as_the_sdk_does(name: str, ratio: float, trace_id: int, parent: int | None) -> None:
    """For every built-in sampler, with and without a caller who decided."""
    environment = HOST | {"OTEL_TRACES_SAMPLER": name, "OTEL_TRACES_SAMPLER_ARG": repr(ratio)}
    ours = Tracing(signals_of(environment).sampling)
    theirs = sampling._KNOWN_SAMPLERS[name]
    if isinstance(theirs, type):
        theirs = theirs(ratio)  # the ratio's; the others are made already
    headers, context = [], None
    if parent is not None:
        headers = [(b"traceparent", b"00-%032x-00000000000000aa-%02x" % (trace_id, parent))]
        span = NonRecordingSpan(SpanContext(trace_id, 0xAA, is_remote=True, trace_flags=TraceFlags(parent)))
        context = set_span_in_context(span)
    begun = ours.begin(headers)
    told: dict[str, object] = {}
    begun.begin_log(told)
    decided = theirs.should_sample(context, int(begun.trace_id, 16), "a call").decision
    assert ("span" in told) == (decided is sampling.Decision.RECORD_AND_SAMPLE)


def test_content_is_captured_only_where_asked_for() -> None:
    """By the variable that OpenTelemetry's own instrumentations read."""
    name = "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"
    assert not signals_of(HOST).capture_content
    assert signals_of(HOST | {name: "true"}).capture_content
    assert signals_of(HOST | {name: "SPAN_ONLY"}).capture_content
    assert not signals_of(HOST | {name: "NO_CONTENT"}).capture_content
    assert signals_of(HOST).sampling == Sampling()
