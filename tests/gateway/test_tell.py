"""The teller: each exchange once, never at the cost of the log; all signals of `understudy serve`, two workers."""

import asyncio
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from structlog.testing import capture_logs

from gateway.config import Settings, SpoolSettings, environment
from gateway.redact import Redactor
from gateway.signals import signals_of
from gateway.spans import Span
from gateway.spool import Spool
from gateway.tail import Elsewhere, remove_taken, segment_path, segments
from gateway.telemetry import Metrics, TellMetrics
from gateway.tell import LATE, NAME, Channels, Teller, channels_of
from tests.gateway.collector import attributes_of, http_collector
from tests.gateway.fakes import ok, upstream
from tests.gateway.served import CHAT, Served
from tests.gateway.test_spans import BODY
from tests.ports import free_port


async def until(holds: Callable[[], object]) -> None:
    """Wait until it does."""
    async with asyncio.timeout(30):
        while not holds():
            await asyncio.sleep(0.05)


async def ask(served: Served, calls: int) -> list[httpx.Response]:
    """Each on a connection of its own, so that both workers have some."""
    replies = []
    for _ in range(calls):
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{served.port}", timeout=20) as client:
            replies.append(await client.post(CHAT, json=BODY))
    return replies


async def metric(served: Served, name: str) -> float:
    async with httpx.AsyncClient() as client:
        text = (await client.get(f"http://127.0.0.1:{served.port}/metrics")).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return sum(sample.value for sample in samples if sample.name == name)


async def test_all_signals_of_all_workers_arrive(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call is two spans, once; the metrics are those of /metrics, over all workers; each process's log comes."""
    with http_collector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        monkeypatch.setenv("OTEL_SERVICE_NAME", "shop")
        monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "300")
        log = served.folder / "access.log"
        monkeypatch.setenv("UNDERSTUDY_GATEWAY__ACCESS_LOG", str(log))
        async with upstream(ok()) as fake:
            served.route_to(fake.url)
            await served.start()
            replies = await ask(served, 20)
            await until(lambda: len(collector.spans) >= 40)
            await until(lambda: "understudy_spans_sent" in collector.metrics)
            assert await metric(served, "understudy_spans_sent_total") == 40
            assert await served.stop() == 0
        exchanges = [attributes_of(span)["understudy.exchange_id"] for span in collector.spans if span.kind == 2]
        ids = [reply.headers["x-understudy-exchange-id"] for reply in replies]
        assert sorted(exchanges) == sorted(ids)
        assert {attributes_of(one.resource)["service.name"] for one in collector.resource_spans} == {"shop"}
        counted = collector.metrics["understudy_exchanges"].sum.data_points
        assert sum(point.as_double for point in counted) == 20
        (usage,) = [
            point
            for point in collector.metrics["gen_ai.client.token.usage"].histogram.data_points
            if attributes_of(point)["gen_ai.token.type"] == "input"
        ]
        assert (usage.count, usage.sum) == (20, 100)
        (told,) = [record for record in collector.logs if record.body.string_value == "gateway"]
        assert (told.severity_text, attributes_of(told)["process"]) == ("info", "serve")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert sorted(line["exchange"] for line in lines) == sorted(ids)
    assert len({line["trace_id"] for line in lines}) == 20


async def test_a_collector_that_is_down_costs_spans_and_nothing_else(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients are served, the log is whole, what was dropped is counted, and the end does not wait for it."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "16")
    async with upstream(ok()) as fake:
        served.route_to(fake.url)
        await served.start()
        replies = await ask(served, 40)
        async with asyncio.timeout(30):
            while await metric(served, "understudy_spans_dropped_total") < 32:
                await asyncio.sleep(0.05)
        started = time.monotonic()
        assert await served.stop() == 0
        took = time.monotonic() - started
    await served.ship_leftovers()  # segments that the teller read after the shipper's last pass
    assert {reply.status_code for reply in replies} == {200}
    assert len(await served.logged()) == 40
    assert took < 25


def record(spool: Spool, number: int, ended: float, **more: object) -> None:
    """A whole exchange that was sampled."""
    header = {
        "id": f"{number:032x}",
        "timestamp": ended,
        "workload_id": "w",
        "arm": "incumbent",
        "outcome": "ok",
        "status": 200,
        "trace_id": f"{number + 1:032x}",
        "span": [number + 1, "", "", None],
        "span_end": [ended, []],
    }
    spool.append(header | more, b"{}", (b"{}",))


class Channel:
    """Keeps the spans that it is offered; `busy` is what the test says."""

    def __init__(self) -> None:
        self.busy = False
        self.spans: list[Span] = []
        self.offer = self.spans.extend

    def close(self, seconds: float) -> None:
        pass


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    made = Spool(tmp_path / "spool", SpoolSettings(fsync="never", segment=4096, segment_age=60), Metrics())
    yield made
    made.close()


def teller_of(tmp_path: Path, channel: Channel, registry: CollectorRegistry) -> Teller:
    metrics = TellMetrics(registry)
    return Teller(tmp_path / "spool", Channels(spans=channel), redactor=Redactor(), metrics=metrics)


async def test_a_call_that_ended_long_ago_is_not_told(spool: Spool, tmp_path: Path) -> None:
    """It is counted; so is a frame that cannot be understood, which costs no other."""
    channel, registry = Channel(), CollectorRegistry()
    record(spool, 1, time.time() - 3600)
    record(spool, 2, time.time(), span=[1, "odd"])
    record(spool, 3, time.time())
    assert teller_of(tmp_path, channel, registry).tell_once() == 3
    assert [span.trace_id for span in channel.spans] == [4]
    for reason in ("late", "unreadable"):
        assert registry.get_sample_value("understudy_spans_dropped_total", {"reason": reason}) == 1


async def test_each_exchange_is_told_once(spool: Spool, tmp_path: Path) -> None:
    """Also by a teller that is started again; a busy channel gets it later."""
    channel = Channel()
    record(spool, 1, time.time())
    teller_of(tmp_path, channel, CollectorRegistry()).tell_once()
    record(spool, 2, time.time())
    again = teller_of(tmp_path, channel, CollectorRegistry())
    channel.busy = True
    assert again.tell_once() == 0
    channel.busy = False
    assert again.tell_once() == 1
    assert [span.trace_id for span in channel.spans] == [2, 3]


async def test_a_segment_waits_for_the_teller_but_not_for_long(spool: Spool, tmp_path: Path) -> None:
    """A teller that is gone, or slower than the traffic, costs spans and no room; what went unread is counted."""
    folder = next(path for path in (tmp_path / "spool").iterdir() if path.is_dir())
    channel, registry = Channel(), CollectorRegistry()
    teller = teller_of(tmp_path, channel, registry)
    record(spool, 1, time.time())
    teller.tell_once()
    for number in range(2, 60):
        record(spool, number, time.time())
    numbers = segments(folder)
    waited_for = Elsewhere(folder, NAME, LATE)
    assert len(numbers) > 2
    assert remove_taken(folder, [waited_for]) == 0
    os.utime(segment_path(folder, numbers[0]), (0, 0))
    os.utime(segment_path(folder, numbers[1]), (0, 0))
    assert remove_taken(folder, [waited_for]) == 2
    teller.tell_once()
    assert registry.get_sample_value("understudy_telemetry_skipped_total") == 2
    assert max(span.trace_id for span in channel.spans) == 60
    assert remove_taken(folder, [waited_for]) == len(numbers) - 3


def test_variables_that_cannot_be_used_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever wrote them; the rest goes on without what they are about."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "zip")
    with capture_logs() as said:
        channels = channels_of(Settings(), signals_of(environment()), TellMetrics())
    assert channels == Channels()
    assert [line["problem"].partition(" are sent")[0] for line in said] == [
        "OTEL_EXPORTER_OTLP_*: no traces",
        "OTEL_EXPORTER_OTLP_*: no metrics",
    ]


async def test_a_call_that_was_in_flight_at_a_kill_is_told(tmp_path: Path) -> None:
    """Its span says so; the worker noted the trace before it called the upstream."""
    channel, spool = Channel(), Spool(tmp_path / "spool", SpoolSettings(fsync="never"), Metrics())
    about = {"id": "a" * 32, "timestamp": time.time(), "workload_id": "w", "arm": "incumbent"}
    spool.begin(about | {"trace_id": "b" * 32, "span": [7, "b7ad6b7169203331", "", None]}, b'{"model": "m"}')
    spool.close()
    teller_of(tmp_path, channel, CollectorRegistry()).tell_once()
    (span,) = channel.spans
    assert (span.span_id, span.parent, span.error) == (7, 0xB7AD6B7169203331, "gateway_killed")
