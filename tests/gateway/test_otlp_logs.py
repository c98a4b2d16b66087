"""Log lines over OTLP: of a process of our own, over HTTP and over gRPC, beside the lines on its standard error."""

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest

from gateway.config import environment
from gateway.otlp_metrics import MetricSender
from gateway.records import Exchange
from gateway.telemetry import TellMetrics
from tests.gateway.collector import Collector, attributes_of, grpc_collector, http_collector

PROGRAM = """
import logging, structlog
from gateway.telemetry import configure_logging
configure_logging("test")
log = structlog.get_logger()
log.info("began", workers=2, path=("a", "b"))
try:
    1 / 0
except ZeroDivisionError:
    log.exception("a call failed")
logging.getLogger("some.library").warning("odd: %s", 1)
"""
RECEIVERS = pytest.mark.parametrize(
    ("protocol", "receiver"), [("http/protobuf", http_collector), ("grpc", grpc_collector)]
)
Receiver = Callable[[], AbstractContextManager[Collector]]


@RECEIVERS
def test_each_line_is_a_record(protocol: str, receiver: Receiver) -> None:
    """What was logged last is sent before the process ends; the standard error has the same lines."""
    with receiver() as collector:
        sent = {"OTEL_EXPORTER_OTLP_LOGS_ENDPOINT": collector.url, "OTEL_EXPORTER_OTLP_LOGS_PROTOCOL": protocol}
        if protocol != "grpc":
            sent["OTEL_EXPORTER_OTLP_LOGS_ENDPOINT"] += "/v1/logs"
        command = [sys.executable, "-c", PROGRAM]
        done = subprocess.run(command, env=environment() | sent, capture_output=True, text=True, check=True, timeout=60)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["event"] for line in lines] == ["began", "a call failed", "odd: 1"]
    began, failed, foreign = collector.logs
    assert [record.body.string_value for record in collector.logs] == ["began", "a call failed", "odd: 1"]
    assert [record.severity_text for record in collector.logs] == ["info", "error", "warning"]
    assert [record.severity_number for record in collector.logs] == [9, 17, 13]
    assert attributes_of(began) == {"workers": 2, "path": "('a', 'b')", "process": "test"}
    assert "ZeroDivisionError" in attributes_of(failed)["exception.stacktrace"]
    assert attributes_of(foreign) == {"process": "test"}
    assert began.time_unix_nano > 0


@RECEIVERS
def test_metrics_are_sent_once_more_at_the_end(
    protocol: str, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interval is a minute; here of one process, which shares no folder."""
    with receiver() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        sender = MetricSender(protocol, environment(), TellMetrics())
        sender.observe(Exchange(id="x", timestamp=0.0, workload_id="w", model="prod", latency_ms=5.0), "nim")
        sender.close(10)
    (point,) = collector.metrics["gen_ai.server.request.duration"].histogram.data_points
    assert point.sum == 0.005
    assert 0 < point.start_time_unix_nano <= point.time_unix_nano


def test_variables_that_cannot_be_used_are_told() -> None:
    """And the process runs on, with its lines where they always are."""
    sent = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}
    sent["OTEL_EXPORTER_OTLP_COMPRESSION"] = "zip"
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment() | sent, capture_output=True, text=True, check=True, timeout=60)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["event"] for line in lines] == ["telemetry", "began", "a call failed", "odd: 1"]
    assert "no logs are sent" in lines[0]["problem"]
