"""The programs that measure, measured: against servers that do wrong on purpose, in known numbers."""

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.bench.side_by_side.processes import cores
from tests.bench.side_by_side.programs import (
    CannotMeasure,
    Held,
    Latencies,
    Programs,
    build,
    closed_loop_of,
    held_of,
    latencies_of,
    missing,
    request,
)
from tests.bench.side_by_side.targets import Place, chat, upstream
from tests.gateway.fakes import Received, Script, plain, sse
from tests.gateway.fakes import upstream as server
from tests.ports import free_port

RATE, SECONDS = 100, 0.5
EVENTS, GAP = 6, 0.02
RIGHT = plain(b"right")


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    if "cc" in missing() or "taskset" in missing():
        pytest.skip("NOT TESTED, the programs that make load: there is no C compiler (cc), or no taskset")
    folder = tmp_path_factory.mktemp("programs")
    build(folder)
    return Programs(folder, cores().load)


def bytes_and_close(wrong: bytes) -> Script:
    async def script(_request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(wrong)
        writer.close()

    return script


async def never(_request: Received, _writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(60)


async def late(request: Received, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(0.3)
    await RIGHT(request, writer)


async def load(programs: Programs, url: str, **more: int) -> Latencies:
    def run() -> Latencies:
        options = {"connections": 4, **more}
        return programs.open_loop(port(url), request(chat("Hello"), {}), "right", rate=RATE, seconds=SECONDS, **options)

    return await asyncio.to_thread(run)


def port(url: str) -> int:
    return urlsplit(url).port or 0


async def test_a_good_server_is_measured_in_milliseconds(programs: Programs) -> None:
    async with server(RIGHT) as fake:
        found = await load(programs, fake.url, length=5)
        assert len(fake.received) == 50
    assert found.unanswered == 0
    assert 0 < found.p50 <= found.p99 < 1000


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        (b"HTTP/1.1 500 No\r\ncontent-length: 5\r\n\r\nright", "bad_status"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nwrong", "bad_body"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nright!", "bad_length"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nright", "broken"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nnothing\r\n", "broken"),
        (b"no HTTP at all\r\n\r\n", "broken"),
        (b"", "broken"),
    ],
)
async def test_each_wrong_reply_is_found(programs: Programs, wrong: bytes, name: str) -> None:
    """Of 50 replies the eleventh is wrong, and the connection closes after it."""
    async with server(*[RIGHT] * 10, bytes_and_close(wrong), RIGHT) as fake:
        with pytest.raises(CannotMeasure, match=rf"of 50 requests, wrong: {{'{name}': 1}}"):
            await load(programs, fake.url, length=5)


async def test_a_stall_is_charged_to_every_request_that_it_kept_waiting(programs: Programs) -> None:
    """0.3 s at 100 a second over one connection: thirty requests wait, not one."""
    async with server(*[RIGHT] * 10, late, RIGHT) as fake:
        found = await load(programs, fake.url, connections=1)
    assert found.p99 >= 280
    assert found.p50 >= 30  # more than half of the 50 requests waited


async def test_requests_that_nobody_answers_count_as_waiting(programs: Programs) -> None:
    async with server(*[RIGHT] * 25, never) as fake:
        found = await load(programs, fake.url)
    assert found.unanswered == 25
    assert found.p99 > 3000


def streaming(spoil: Callable[[int, bytes], list[bytes]]) -> Script:
    """Events with their number and time, one a chunk; `spoil` says what goes out of each."""

    async def script(_request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        for at in range(EVENTS):
            for piece in spoil(at, b'data: {"content":"@%d:%d@"}\n\n' % (at, time.monotonic_ns())):
                writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            await asyncio.sleep(GAP)
        writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")

    return script


def only(number: int, instead: Callable[[bytes], list[bytes]]) -> Callable[[int, bytes], list[bytes]]:
    return lambda at, event: instead(event) if at == number else [event]


def merged(at: int, event: bytes) -> list[bytes]:
    """Event 2 comes with event 3, as one event of two lines."""
    both = event.replace(b"@3:", b"@2:")[:-1] + event
    return {2: [], 3: [both]}.get(at, [event])


@pytest.mark.parametrize(
    ("spoil", "events", "wrong"),
    [
        (only(2, lambda event: [event]), 18, (0, 0)),
        (only(2, lambda event: [event[:20], event[20:]]), 18, (0, 0)),
        (only(2, lambda event: []), 17, (1, 0)),
        (only(5, lambda event: []), 17, (1, 0)),
        (only(2, lambda event: [event.replace(b"@", b"#")]), 17, (1, 0)),
        (only(2, lambda event: [event, event]), 19, (0, 1)),
        (merged, 18, (0, 1)),
    ],
    ids=["whole", "two chunks", "dropped", "last dropped", "changed", "doubled", "merged"],
)
async def test_streams_count_what_became_of_each_event(
    programs: Programs, spoil: Callable[[int, bytes], list[bytes]], events: int, wrong: tuple[int, int]
) -> None:
    """Of three streams one is spoiled: what is lost, and what is merged or repeated."""
    async with server(streaming(spoil), streaming(only(0, lambda event: [event]))) as fake:
        found = await hold(programs, fake.url, 3)
    assert found.events == events
    assert (found.lost, found.merged) == wrong


async def test_a_stream_that_breaks_has_lost_the_rest(programs: Programs) -> None:
    async def breaks(_request: Received, writer: asyncio.StreamWriter) -> None:
        events = b"".join(b"data: @%d:%d@\n\n" % (at, time.monotonic_ns()) for at in range(2))
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n%s\r\n" % (len(events), events))
        writer.close()

    async with server(breaks) as fake:
        found = await hold(programs, fake.url, 1)
    assert (found.events, found.lost) == (2, EVENTS - 2)


async def test_what_does_not_come_is_late_not_lost(programs: Programs) -> None:
    events = [b"data: @%d:%d@\n\n" % (at, time.monotonic_ns()) for at in range(2)]
    async with server(sse(*events, end="hang")) as fake:
        found = await hold(programs, fake.url, 1, patience=0.5)
    assert (found.events, found.lost, found.late) == (2, 0, EVENTS - 2)


async def hold(programs: Programs, url: str, streams: int, patience: float = 20) -> Held:
    def run() -> Held:
        sent = request(chat("Hello", stream=True), {})
        return programs.hold(
            port(url), sent, streams=streams, events=EVENTS, ramp=0.03, patience=patience, steady=lambda *_: None
        )

    return await asyncio.to_thread(run)


def test_our_upstream_sends_what_was_asked_for_at_its_times(programs: Programs, tmp_path: Path) -> None:
    """Both programs together; between the marks every stream is open. An open loop can wait for the first token."""
    place = Place(
        folder=tmp_path, environments=tmp_path, cores=cores(), upstream=0, streams=True, program=programs.folder
    )
    marks: list[tuple[str, int]] = []
    with upstream(place, core=cores().upstream, port=free_port(), name="upstream") as target:
        sent = request(chat("Hello", stream=True, max_tokens=10), {})
        found = programs.hold(
            target.port, sent, streams=8, events=10, ramp=0.1, patience=5, steady=lambda *mark: marks.append(mark)
        )
        once = request(chat("Hello", stream=True, max_tokens=1), {})
        token = programs.open_loop(
            target.port, once, "data: [DONE]", rate=RATE, seconds=SECONDS, connections=4, first="@0:"
        )
    assert (found.events, found.lost, found.merged) == (80, 0, 0)
    assert [what for what, _ in marks] == ["open", "closing"]
    assert 8 <= marks[0][1] < marks[1][1] <= 80
    assert token.unanswered == 0


LOADED = {
    "requests": 9, "answered": 9, "bad_status": 0, "bad_length": 0, "bad_body": 0, "broken": 0, "unanswered": 0,
    "reconnected": 0, "latency_ms": {"n": 9, "p50": 0.2, "p99": 0.9, "max": 1.0},
}  # fmt: skip
HELD = {
    "streams": 2, "expected": 20, "events": 19, "lost": 1, "late": 3, "merged": 0, "repeated": 2, "unreadable": 0,
    "bad_status": 0, "broken": 0,
    **{name: {"n": 2, "p50": 1.0, "p99": 2.0, "max": 3.0} for name in ("ttft_ms", "delay_ms", "gap_ms")},
}  # fmt: skip
WRK = {"requests": 10, "bytes": 10_000, "microseconds": 2_000_000, "status": 0, "read": 0, "write": 0, "connect": 0}


def test_what_the_programs_print_is_read() -> None:
    assert latencies_of(json.dumps(LOADED)) == Latencies(p50=0.2, p99=0.9, unanswered=0)
    held = held_of(json.dumps(HELD))
    assert (held.events, held.lost, held.late, held.merged, held.gap_p99) == (19, 1, 3, 2, 2.0)
    assert closed_loop_of("wrk's own lines\n" + json.dumps(WRK) + "\n", least_bytes=850) == (10, 2.0)


@pytest.mark.parametrize("output", ["", "no JSON", "[]", "{}", '{"latency_ms": 1}'])
def test_what_nobody_can_read_is_said_to_be_that(output: str) -> None:
    for read in (latencies_of, held_of, lambda text: closed_loop_of(text, least_bytes=1)):
        with pytest.raises(CannotMeasure, match="nobody can read"):
            read(output)


def test_wrk_s_errors_and_short_replies_are_no_measurement() -> None:
    with pytest.raises(CannotMeasure, match="'status': 3"):
        closed_loop_of(json.dumps(WRK | {"status": 3}), least_bytes=850)
    with pytest.raises(CannotMeasure, match="less than 1001"):
        closed_loop_of(json.dumps(WRK), least_bytes=1001)
