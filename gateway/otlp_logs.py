"""The process's log lines over OTLP, beside the standard error: a processor of structlog's that hands on a copy."""

import atexit
import time
from collections.abc import Mapping, MutableMapping
from typing import Any, Final

from opentelemetry._logs import LogRecord, SeverityNumber
from opentelemetry.sdk._logs import ReadableLogRecord
from opentelemetry.sdk._logs.export import LogRecordExportResult

from gateway.otlp import SCOPE, exporter_of, resource_of
from gateway.sender import Sender
from gateway.signals import Protocol

__all__ = ["LogSender"]

_SEVERITIES: Final = {
    "debug": SeverityNumber.DEBUG,
    "info": SeverityNumber.INFO,
    "warning": SeverityNumber.WARN,
    "error": SeverityNumber.ERROR,
    "critical": SeverityNumber.FATAL,
}
_NAMES: Final = {"exception": "exception.stacktrace"}
_OWN: Final = frozenset(("event", "level", "timestamp", "_record", "_from_structlog"))


class LogSender:
    """Sends log lines in a thread; what was sent last is sent within two seconds of the process's end."""

    def __init__(self, protocol: Protocol, environment: Mapping[str, str]) -> None:
        self._exporter = exporter_of("logs", protocol)
        self._resource = resource_of(environment)
        self._sender: Sender[MutableMapping[str, Any]] = Sender(
            "logs over OTLP", self._send, dropped=lambda _reason, _count: None, limit=2048
        )
        atexit.register(self._sender.close, 2.0)

    def __call__(self, _logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        """As structlog's processors are called; the line goes on as it is."""
        self._sender.offer([dict(event) | {"": time.time_ns()}])
        return event

    def _send(self, events: list[MutableMapping[str, Any]]) -> bool:
        records = [self._record(event) for event in events]
        return bool(self._exporter.export(records) is LogRecordExportResult.SUCCESS)

    def _record(self, event: MutableMapping[str, Any]) -> ReadableLogRecord:
        at, level = event.pop(""), event.get("level", "info")
        told = {_NAMES.get(name, name): _plain(value) for name, value in event.items() if name not in _OWN}
        record = LogRecord(
            timestamp=at,
            observed_timestamp=at,
            severity_text=level,
            severity_number=_SEVERITIES.get(level, SeverityNumber.INFO),
            body=str(event.get("event", "")),
            attributes=told,
        )
        return ReadableLogRecord(log_record=record, resource=self._resource, instrumentation_scope=SCOPE)


def _plain(value: Any) -> str | bool | int | float:
    return value if isinstance(value, str | bool | int | float) else str(value)
