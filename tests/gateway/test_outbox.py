"""The outbox: what a turn of the loop sends leaves in order at its end, behind what the log has of it."""

import asyncio
from pathlib import Path

from gateway.config import SpoolSettings
from gateway.inflight import notes
from gateway.outbox import Outbox
from gateway.spool import IN_FLIGHT, Kind, Spool, read_frames
from gateway.telemetry import Metrics

HEADER = {"id": "x"}


class Wire(asyncio.Transport):
    """asyncio's side of a connection: tells what is written to it, and what `look` sees at that moment."""

    def __init__(self, told: list[object], look: object = None) -> None:
        super().__init__()
        self.told, self.look, self.closed = told, look, False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.told.append(self.look() if callable(self.look) else bytes(data))

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    abort = close


def logged_ids(folder: Path) -> list[str]:
    """The exchanges in a spool's segments."""
    return [frame.header["id"] for path in sorted(folder.glob("*/*.seg")) for frame in read_frames(path)]


def busy() -> Outbox:
    """One of a turn in which others are to run as well, so that nothing leaves before its end."""
    outbox = Outbox()
    for _ in range(9):
        outbox.expect()
    return outbox


async def turn() -> None:
    await asyncio.sleep(0)
    await asyncio.sleep(0)


async def test_a_turns_bytes_leave_in_order_at_its_end() -> None:
    told: list[object] = []
    outbox = Outbox()
    outbox.before = lambda: told.append("before")
    one, two = Wire(told), Wire(told)
    outbox.expect()
    outbox.expect()
    outbox.put(one, b"1")
    outbox.put(two, b"2")
    outbox.put(one, b"3")
    assert told == []
    await turn()
    assert told == ["before", b"1", b"2", b"3"]


async def test_who_is_alone_does_not_wait() -> None:
    told: list[object] = []
    outbox, wire = Outbox(), Wire(told)
    outbox.put(wire, b"1")
    outbox.expect()
    outbox.put(wire, b"2")
    assert told == [b"1", b"2"]


async def test_who_had_nothing_to_send_is_not_waited_for_again() -> None:
    told: list[object] = []
    outbox, wire = Outbox(), Wire(told)
    outbox.expect()
    outbox.expect()
    outbox.put(wire, b"1")
    assert told == []
    await turn()
    outbox.expect()
    outbox.put(wire, b"2")
    assert told == [b"1", b"2"]


async def test_who_is_woken_while_bytes_wait_is_expected_in_the_next_turn() -> None:
    """The loop reads from sockets between two turns, and what waits is sent at the beginning of the second."""
    told: list[object] = []
    outbox, wire = Outbox(), Wire(told)
    outbox.expect()
    outbox.expect()
    outbox.put(wire, b"1")
    outbox.expect()
    outbox.expect()
    await turn()
    assert told == [b"1"]
    outbox.put(wire, b"2")
    outbox.put(wire, b"3")
    assert told == [b"1"]
    await turn()
    assert told == [b"1", b"2", b"3"]


async def test_a_flush_sends_what_waits_once() -> None:
    """Before a connection is closed."""
    told: list[object] = []
    outbox, wire = busy(), Wire(told)
    outbox.put(wire, b"last")
    assert told == []
    outbox.flush()
    wire.close()
    assert told == [b"last"]
    await turn()
    assert told == [b"last"]


async def test_what_is_for_a_closed_connection_goes_nowhere() -> None:
    told: list[object] = []
    outbox, gone, here = busy(), Wire(told), Wire(told)
    outbox.put(gone, b"lost")
    outbox.put(here, b"kept")
    gone.close()
    await turn()
    assert told == [b"kept"]


async def test_a_connection_that_fails_costs_no_other_its_bytes() -> None:
    """What asyncio's transports raise that were told of an end before."""
    told: list[object] = []
    outbox, broken, here = busy(), Wire(told, look=lambda: 1 // 0), Wire(told)
    outbox.put(broken, b"lost")
    outbox.put(here, b"kept")
    await turn()
    assert told == [b"kept"]
    assert broken.closed


async def test_much_does_not_wait() -> None:
    """So that the transport can say that its reader is slow."""
    told: list[object] = []
    outbox, wire = busy(), Wire(told)
    for _ in range(5):
        outbox.put(wire, bytes(64 * 1024))
    assert len(told) == 5


async def test_exchanges_are_in_the_log_before_anything_of_their_turn_is_sent(tmp_path: Path) -> None:
    """And their notes are wiped only then: whenever the worker is killed, one of the two is there."""
    outbox, told = busy(), list[object]()
    spool = Spool(tmp_path, SpoolSettings(), Metrics(), outbox)
    (table,) = tmp_path.glob(f"*/{IN_FLIGHT}")
    wire = Wire(told, look=lambda: (logged_ids(tmp_path), list(notes(table))))
    for name in "ab":
        assert spool.begin({"id": name}, b"ask") is Kind.WHOLE
        assert spool.append({"id": name, "frame": Kind.WHOLE}, b"ask", [b"reply"])
        outbox.put(wire, b"reply")
    assert logged_ids(tmp_path) == []
    assert len(list(notes(table))) == 2
    await turn()
    assert told == [(["a", "b"], [])] * 2
    spool.close()


async def test_what_ends_no_exchange_is_in_the_log_at_once(tmp_path: Path) -> None:
    """Feedback is told that it was kept, a large call's first frame stands for its note."""
    spool = Spool(tmp_path, SpoolSettings(), Metrics(), Outbox())
    assert spool.append({"id": "end"}, b"")
    for kind in (Kind.OPEN, Kind.REQUEST, Kind.RESPONSE, Kind.FEEDBACK):
        assert spool.append({"id": kind.value, "frame": kind}, b"")
        assert logged_ids(tmp_path)[-1] == kind
    spool.close()


async def test_a_closed_spool_holds_nothing_back(tmp_path: Path) -> None:
    spool = Spool(tmp_path, SpoolSettings(), Metrics(), Outbox())
    spool.append(HEADER, b"")
    spool.close()
    assert logged_ids(tmp_path) == ["x"]


async def test_a_turn_is_held_up_to_a_size(tmp_path: Path) -> None:
    """Of small exchanges as well as of large ones; and a segment's end comes between."""
    spool = Spool(tmp_path, SpoolSettings(segment=4096), Metrics(), Outbox())
    for n in range(256):
        spool.append({"id": str(n)}, b"")
    assert logged_ids(tmp_path) == [str(n) for n in range(256)]
    for n in range(5):
        spool.append({"id": f"large {n}"}, bytes(250_000))
    assert logged_ids(tmp_path)[256:] == [f"large {n}" for n in range(5)]
    spool.append(HEADER, b"")
    spool.close()
    assert logged_ids(tmp_path)[261:] == ["x"]
    assert len(list(tmp_path.glob("*/*.seg"))) > 1
