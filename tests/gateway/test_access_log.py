"""The access log: a line of JSON an exchange, errors always, off unless it is set; written by the shipper's process."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import structlog

from gateway.access_log import AccessLog, line_of
from gateway.config import GatewaySettings, Settings
from gateway.records import Arm, Exchange, Outcome, Usage
from gateway.signals import Signals
from gateway.telemetry import TellMetrics
from gateway.tell import channels_of, is_told
from tests.gateway.conftest import running
from tests.gateway.fakes import ok, plain, upstream
from tests.gateway.test_spans import CHAT, ROUTING, ship

MakeSettings = Callable[..., Settings]
EXCHANGE = Exchange(
    id="019a7b2c-5d1e-7f00-8a11-2b3c4d5e6f70",
    timestamp=1_700_000_000.25,
    workload_id="router",
    client_id="web",
    model="prod",
    status=200,
    latency_ms=12.5,
    usage=Usage(input_tokens=5, output_tokens=1),
    trace_id="0af7651916cd43dd8448eb211c80319c",
)


def exchange(number: int, **more: object) -> Exchange:
    return Exchange(**{"id": f"{number:032x}", "timestamp": 0.0, "workload_id": "w"} | more)


def logged(path: Path, exchanges: list[Exchange], sample: float = 1.0) -> list[dict]:
    written = AccessLog(str(path), sample, TellMetrics())
    written.add((one, "POST") for one in exchanges)
    written.close(10)
    return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


def test_it_is_off_unless_it_is_set() -> None:
    """And then nothing reads the spool for it."""
    assert GatewaySettings().access_log == "off"
    assert not is_told(Settings(), Signals())
    assert channels_of(Settings(), Signals(), TellMetrics()) == (None, None, None, False)


def test_a_line_is_what_structlog_would_have_written() -> None:
    """The same keys, and the time in the same form."""
    ours = json.loads(line_of(EXCHANGE, "POST"))
    told = {name: value for name, value in ours.items() if name not in ("event", "level", "timestamp")}
    out = io.StringIO()
    processors = [structlog.processors.add_log_level, structlog.processors.TimeStamper(fmt="iso")]
    logger = structlog.wrap_logger(structlog.PrintLogger(out), [*processors, structlog.processors.JSONRenderer()])
    logger.bind().info("exchange", **told)
    theirs = json.loads(out.getvalue())
    assert ours.pop("timestamp") == "2023-11-14T22:13:20.250000Z"
    assert len(theirs.pop("timestamp")) == len("2023-11-14T22:13:20.250000Z")
    assert ours == theirs
    assert (ours["status"], ours["outcome"], ours["input_tokens"]) == (200, "ok", 5)


def test_of_what_went_well_a_share_is_written_and_of_errors_all(tmp_path: Path) -> None:
    """The same ones, whoever writes them; mirrors are nobody's access."""
    well = [exchange(number) for number in range(1000)]
    failed = [exchange(number, outcome=Outcome.TIMEOUT) for number in range(1000, 1010)]
    mirrored = [exchange(number, outcome=Outcome.TIMEOUT, arm=Arm.MIRROR) for number in range(2000, 2010)]
    found = logged(tmp_path / "a.log", [*well, *failed, *mirrored], sample=0.1)
    again = logged(tmp_path / "b.log", [*well, *failed, *mirrored], sample=0.1)
    assert sum(line["outcome"] == "timeout" for line in found) == 10
    assert 60 <= sum(line["outcome"] == "ok" for line in found) <= 140
    assert found == again
    assert {line["level"] for line in found if line["outcome"] == "timeout"} == {"warning"}
    assert logged(tmp_path / "c.log", well, sample=0.0) == []


def test_standard_output_will_do(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    """For containers."""
    written = AccessLog("stdout", 1.0, TellMetrics())
    written.add([(EXCHANGE, "POST")])
    written.close(10)
    sys.stdout.flush()
    assert json.loads(capfdbinary.readouterr().out)["exchange"] == EXCHANGE.id


def test_a_file_that_cannot_be_written_is_counted(tmp_path: Path) -> None:
    """The exchanges are in the log all the same."""
    from prometheus_client import CollectorRegistry

    registry = CollectorRegistry()
    written = AccessLog(str(tmp_path / "nowhere" / "a.log"), 1.0, TellMetrics(registry))
    written.add([(EXCHANGE, "POST")])
    written.close(10)
    assert registry.get_sample_value("understudy_access_log_dropped_total", {"reason": "not_delivered"}) == 1


async def test_each_call_has_its_line(settings: MakeSettings, tmp_path: Path) -> None:
    """Refused ones, failed ones and those of other paths too; what was said is in none."""
    path = tmp_path / "access.log"
    async with upstream(ok(), plain(b"{}", status="500 Oops"), ok()) as fake:
        made = settings(ROUTING.format(url=fake.url))
        made = made.model_copy(update={"gateway": GatewaySettings(access_log=str(path))})
        async with running(made) as gateway:
            body = {"model": "m", "messages": [{"role": "user", "content": "secret word"}]}
            for headers in ({"x-client-id": "web"}, {}):
                await gateway.client.post(CHAT, json=body, headers=headers)
            await gateway.client.post(CHAT, content=b"not json")
            await gateway.client.get("/v1/files")
            await ship(gateway)
    text = path.read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    told = [(line["method"], line["path"], line["status"], line["outcome"]) for line in lines]
    assert told == [
        ("POST", CHAT, 200, "ok"),
        ("POST", CHAT, 500, "upstream_error"),
        ("POST", CHAT, 400, "refused"),
        ("GET", "/v1/files", 200, "ok"),
    ]
    assert lines[0]["client"] == "web"
    assert "secret" not in text
