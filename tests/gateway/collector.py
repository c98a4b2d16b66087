"""A stand-in for an OpenTelemetry collector: real OTLP receivers, over HTTP and over gRPC, that keep what they get."""

import contextlib
import gzip
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest, ExportLogsServiceResponse
from opentelemetry.proto.collector.logs.v1.logs_service_pb2_grpc import (
    LogsServiceServicer,
    add_LogsServiceServicer_to_server,
)
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2_grpc import (
    MetricsServiceServicer,
    add_MetricsServiceServicer_to_server,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)

PATHS: dict[str, Any] = {
    "/v1/traces": ExportTraceServiceRequest,
    "/v1/metrics": ExportMetricsServiceRequest,
    "/v1/logs": ExportLogsServiceRequest,
}


@dataclass
class Collector:
    """What came, as protobuf messages. With `refuses` everything is answered with 503, or UNAVAILABLE."""

    url: str = ""
    refuses: bool = False
    requests: list[Any] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)

    @property
    def resource_spans(self) -> list[Any]:
        return [
            one for request in self.requests if hasattr(request, "resource_spans") for one in request.resource_spans
        ]

    @property
    def spans(self) -> list[Any]:
        return [span for one in self.resource_spans for scope in one.scope_spans for span in scope.spans]

    @property
    def metrics(self) -> dict[str, Any]:
        """The last of each name."""
        found = {}
        for request in self.requests:
            for one in getattr(request, "resource_metrics", ()):
                found |= {metric.name: metric for scope in one.scope_metrics for metric in scope.metrics}
        return found

    @property
    def logs(self) -> list[Any]:
        found = [one for request in self.requests for one in getattr(request, "resource_logs", ())]
        return [record for one in found for scope in one.scope_logs for record in scope.log_records]


def attributes_of(thing: Any) -> dict[str, Any]:
    """A span's, a data point's or a resource's attributes as Python values."""
    found = {}
    for one in thing.attributes:
        kind = one.value.WhichOneof("value")
        value = getattr(one.value, kind)
        found[one.key] = [each.string_value for each in value.values] if kind == "array_value" else value
    return found


@contextlib.contextmanager
def http_collector() -> Iterator[Collector]:
    """An OTLP/HTTP receiver on a free port."""
    kept = Collector()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            if not kept.refuses:
                kept.headers.append({name.lower(): value for name, value in self.headers.items()})
                kept.requests.append(PATHS[self.path].FromString(body))
            self.send_response(503 if kept.refuses else 200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    kept.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield kept
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def grpc_collector() -> Iterator[Collector]:
    """An OTLP/gRPC receiver on a free port."""
    kept = Collector()

    class Receiver(TraceServiceServicer, MetricsServiceServicer, LogsServiceServicer):
        def Export(self, request: Any, context: Any) -> Any:
            if kept.refuses:
                context.abort(grpc.StatusCode.UNAVAILABLE, "refused")
            kept.headers.append(dict(context.invocation_metadata()))
            kept.requests.append(request)
            if isinstance(request, ExportTraceServiceRequest):
                return ExportTraceServiceResponse()
            return (
                ExportLogsServiceResponse()
                if isinstance(request, ExportLogsServiceRequest)
                else ExportMetricsServiceResponse()
            )

    server = grpc.server(ThreadPoolExecutor(2))
    receiver = Receiver()
    add_TraceServiceServicer_to_server(receiver, server)
    add_MetricsServiceServicer_to_server(receiver, server)
    add_LogsServiceServicer_to_server(receiver, server)
    kept.url = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield kept
    finally:
        server.stop(None).wait()
