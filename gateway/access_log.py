"""The access log: a line of JSON for an exchange, written by a thread of the teller's process."""

import random
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

from gateway.records import Arm, Exchange, Outcome
from gateway.sender import Sender
from gateway.telemetry import TellMetrics

__all__ = ["AccessLog", "line_of"]


class AccessLog:
    """Appends to a file, which may be moved away at any time, or to `stdout`. `sample` is of what went well."""

    def __init__(self, where: str, sample: float, metrics: TellMetrics) -> None:
        self._path = None if where == "stdout" else Path(where)
        self._sample = sample
        self._sender = Sender("access log", self._write, dropped=metrics.access_log_dropped, delay=0.1)

    def add(self, exchanges: Iterable[tuple[Exchange, str]]) -> None:
        """Exchanges with their methods. Mirrors are nobody's access, and left out."""
        wanted = [one for one in exchanges if one[0].arm is not Arm.MIRROR and self._is_wanted(one[0])]
        self._sender.offer(line_of(exchange, method) for exchange, method in wanted)

    def close(self, seconds: float) -> None:
        self._sender.close(seconds)

    def _is_wanted(self, exchange: Exchange) -> bool:
        """All that failed; of the others a share, the same ones whoever asks."""
        return exchange.outcome is not Outcome.OK or random.Random(exchange.id).random() < self._sample

    def _write(self, lines: list[bytes]) -> bool:
        data = b"".join(lines)
        try:
            if self._path is None:
                sys.stdout.buffer.write(data)
                sys.stdout.flush()
            else:
                with self._path.open("ab") as file:
                    file.write(data)
        except OSError:
            return False
        return True


def line_of(exchange: Exchange, method: str) -> bytes:
    """One line, in the shape of the process log's lines: `event`, `level` and `timestamp` beside what is told."""
    usage, ok = exchange.usage, exchange.outcome is Outcome.OK
    told: dict[str, Any] = {
        "exchange": exchange.id,
        "method": method,
        "path": exchange.path,
        "status": exchange.status,
        "outcome": exchange.outcome,
        "workload": exchange.workload_id,
        "client": exchange.client_id,
        "session": exchange.session_id,
        "model": exchange.model,
        "arm": exchange.arm,
        "stream": exchange.stream,
        "latency_ms": exchange.latency_ms,
        "ttft_ms": exchange.ttft_ms,
        "input_tokens": usage.input_tokens if usage else None,
        "output_tokens": usage.output_tokens if usage else None,
        "cost_usd": exchange.cost_usd,
        "failed_tries": len(exchange.attempts),
        "trace_id": exchange.trace_id,
        "error": exchange.error,
        "event": "exchange",
        "level": "info" if ok else "warning",
        "timestamp": datetime.fromtimestamp(exchange.timestamp, UTC).isoformat(timespec="microseconds")[:-6] + "Z",
    }
    return orjson.dumps(told) + b"\n"
