"""What the teller makes of the spool: exchanges a second to the access log, metrics and spans, and its CPU for one.

python -m tests.bench.bench_spans [--exchanges 20000]

Each exchange of 2 KB makes two spans. The collector is a process of its own, which only counts bytes.
"""

import argparse
import contextlib
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from prometheus_client import CollectorRegistry

from gateway.config import GatewaySettings, Settings, environment
from gateway.redact import Redactor
from gateway.signals import signals_of
from gateway.spool import Kind, Spool
from gateway.telemetry import Metrics, TellMetrics
from gateway.tell import Teller, channels_of
from tests.bench.bench_spool import bodies, header

COLLECTOR = """
import asyncio
async def take(reader, writer):
    while True:
        try:
            head = await reader.readuntil(b"\\r\\n\\r\\n")
        except asyncio.IncompleteReadError:
            return writer.close()
        size = int(head.lower().partition(b"content-length:")[2].split(b"\\r\\n")[0])
        await reader.readexactly(size)
        writer.write(b"HTTP/1.1 200 OK\\r\\ncontent-length: 0\\r\\n\\r\\n")
async def main():
    server = await asyncio.start_server(take, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()
asyncio.run(main())
"""
KINDS = {
    "access log": (),
    "metrics": ("OTEL_METRICS_EXPORTER",),
    "spans": ("OTEL_TRACES_EXPORTER",),
    "all three": ("OTEL_METRICS_EXPORTER", "OTEL_TRACES_EXPORTER"),
}


def tells(folder: Path, exchanges: int, access_log: str) -> str:
    """Exchanges a second, the process's CPU for one, and what became of the spans."""
    request, reply = bodies(2048)
    settings = Settings(data_dir=folder, gateway=GatewaySettings(access_log=access_log))
    settings.run_dir.mkdir(parents=True)
    spool = Spool(settings.spool_dir, settings.spool, Metrics())
    for n in range(exchanges):
        trace = {"trace_id": f"{n + 1:032x}", "span": (n * 8 + 1, "b7ad6b7169203331", "", None), "provider": "nim"}
        one = header(client_id=f"c{n % 50}") | trace
        spool.append({name: one[name] for name in ("id", "trace_id", "span")} | {"frame": Kind.OPEN}, request)
        tries = ((time.time(), "prod-70b", "nim", "llama-70b", "nim", 8000, ""),)
        spool.append(one | {"frame": Kind.CLOSE, "span_end": (time.time(), tries)}, b"", (reply,))
    spool.close()
    registry = CollectorRegistry()
    metrics = TellMetrics(registry)
    channels = channels_of(settings, signals_of(environment()), metrics)
    teller = Teller(settings.spool_dir, channels, redactor=Redactor(), metrics=metrics)
    used, started = sum(resource.getrusage(resource.RUSAGE_SELF)[:2]), time.perf_counter()
    told = 0
    while told < exchanges:
        told += (now := teller.tell_once())
        if not now:
            time.sleep(0.005)
    teller.close()
    seconds = time.perf_counter() - started
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2]) - used
    sent = registry.get_sample_value("understudy_spans_sent_total") or 0
    return f"{exchanges / seconds:,.0f} a second, {used / exchanges * 1e6:.0f} us of CPU each, {sent:,.0f} spans sent"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--exchanges", type=int, default=20_000)
    arguments = parser.parse_args()
    collector = subprocess.Popen([sys.executable, "-c", COLLECTOR], stdout=subprocess.PIPE, text=True)
    with contextlib.ExitStack() as stack:
        stack.callback(collector.wait)
        stack.callback(collector.kill)
        assert collector.stdout is not None
        port = collector.stdout.readline().strip()
        for name, variables in KINDS.items():
            os.environ |= {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}"}
            for variable in ("OTEL_METRICS_EXPORTER", "OTEL_TRACES_EXPORTER"):
                os.environ[variable] = "otlp" if variable in variables else "none"
            with tempfile.TemporaryDirectory() as folder:
                log = "off" if name in ("metrics", "spans") else f"{folder}/access.log"
                print(f"{name}: {tells(Path(folder, 'data'), arguments.exchanges, log)}")


if __name__ == "__main__":
    main()
