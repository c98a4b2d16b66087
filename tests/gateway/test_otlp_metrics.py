"""Metrics over OTLP: Prometheus's own, converted, and OpenTelemetry's for generative AI."""

from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.sdk.metrics.export import MetricsData, ResourceMetrics, ScopeMetrics
from opentelemetry.sdk.resources import Resource
from opentelemetry.semconv._incubating.metrics import gen_ai_metrics
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from gateway.otlp import SCOPE
from gateway.otlp_metrics import GenAI, converted
from gateway.records import Arm, Exchange, Usage
from tests.gateway.collector import attributes_of

CALL = Exchange(
    id="x",
    timestamp=0.0,
    workload_id="w",
    model="prod",
    stream=True,
    latency_ms=30.0,
    ttft_ms=6.0,
    usage=Usage(input_tokens=5, output_tokens=100),
    response={"model": "big"},
)


def sent(registry: CollectorRegistry) -> dict:
    """The registry's metrics as the SDK's exporter encodes them."""
    scope = ScopeMetrics(scope=SCOPE, metrics=converted(registry.collect(), 1, 2), schema_url="")
    data = MetricsData([ResourceMetrics(resource=Resource.get_empty(), scope_metrics=[scope], schema_url="")])
    (found,) = encode_metrics(data).resource_metrics
    return {metric.name: metric for metric in found.scope_metrics[0].metrics}


def test_counters_and_gauges_keep_name_labels_and_value() -> None:
    """A counter is a sum since the gateway's start."""
    registry = CollectorRegistry()
    Counter("understudy_exchanges", "How they ended", ["outcome"], registry=registry).labels("ok").inc(3)
    Gauge("understudy_spool_bytes", "Its size", registry=registry).set(7)
    Counter("understudy_unused", "Never counted", ["reason"], registry=registry)
    found = sent(registry)
    assert set(found) == {"understudy_exchanges", "understudy_spool_bytes"}
    counter = found["understudy_exchanges"]
    (point,) = counter.sum.data_points
    assert (counter.description, counter.sum.is_monotonic, counter.sum.aggregation_temporality) == (
        "How they ended",
        True,
        2,
    )
    assert (attributes_of(point), point.as_double, point.start_time_unix_nano) == ({"outcome": "ok"}, 3.0, 1)
    (point,) = found["understudy_spool_bytes"].gauge.data_points
    assert (point.as_double, found["understudy_spool_bytes"].unit) == (7.0, "By")


def test_a_histogram_s_buckets_count_each_for_itself() -> None:
    """Prometheus's count what is below, too."""
    registry = CollectorRegistry()
    made = Histogram("understudy_latency_seconds", "Time", ["arm"], buckets=(0.1, 1), registry=registry)
    for seconds in (0.05, 0.5, 0.6, 5):
        made.labels("incumbent").observe(seconds)
    (point,) = sent(registry)["understudy_latency_seconds"].histogram.data_points
    assert (list(point.explicit_bounds), list(point.bucket_counts)) == ([0.1, 1], [1, 2, 1])
    assert (point.count, round(point.sum, 3), attributes_of(point)) == (4, 6.15, {"arm": "incumbent"})
    assert not point.HasField("min")


def test_calls_are_counted_by_the_conventions() -> None:
    """Their names are OpenTelemetry's; a mirror is a call of an upstream, and nobody's request."""
    registry = CollectorRegistry()
    made = GenAI(registry)
    made.observe(CALL, "nim")
    made.observe(Exchange(id="y", timestamp=0, workload_id="w", model="small", arm=Arm.MIRROR, latency_ms=1), "vllm")
    made.observe(Exchange(id="z", timestamp=0, workload_id="w", model="prod", path="/v1/files"), "nim")
    found = sent(registry)
    assert set(found) == {
        gen_ai_metrics.GEN_AI_CLIENT_TOKEN_USAGE,
        gen_ai_metrics.GEN_AI_CLIENT_OPERATION_DURATION,
        gen_ai_metrics.GEN_AI_SERVER_REQUEST_DURATION,
        gen_ai_metrics.GEN_AI_SERVER_TIME_TO_FIRST_TOKEN,
    }
    tokens = found["gen_ai.client.token.usage"]
    assert tokens.unit == "{token}"
    about = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "nim",
        "gen_ai.request.model": "prod",
        "gen_ai.response.model": "big",
    }
    counted = {attributes_of(point)["gen_ai.token.type"]: point for point in tokens.histogram.data_points}
    assert attributes_of(counted["input"]) == about | {"gen_ai.token.type": "input"}
    assert (counted["input"].sum, counted["output"].sum) == (5, 100)
    (served,) = found["gen_ai.server.request.duration"].histogram.data_points
    assert (attributes_of(served), served.sum, found["gen_ai.server.request.duration"].unit) == (about, 0.03, "s")
    assert len(found["gen_ai.client.operation.duration"].histogram.data_points) == 2
    (first,) = found["gen_ai.server.time_to_first_token"].histogram.data_points
    assert (first.sum, found["gen_ai.server.time_to_first_token"].unit) == (0.006, "s")
