"""The table of calls in flight: what is noted is found again, what is wiped leaves no byte, damage costs one note."""

import os
import struct
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.config import SpoolSettings
from gateway.inflight import SLOT, InFlight, notes
from gateway.spool import IN_FLIGHT, Kind, Spool
from gateway.tail import Batch, Tail, remove_taken
from gateway.telemetry import Metrics

NAMES = st.sampled_from("abcdef")
DOINGS = st.lists(st.one_of(st.tuples(NAMES, st.binary(min_size=1, max_size=SLOT)), NAMES), max_size=30)


@given(DOINGS)
def test_what_is_noted_and_not_wiped_is_found(tmp_path_factory: pytest.TempPathFactory, doings: list[object]) -> None:
    """Whatever comes and goes; a call that finds no room or is too large is refused."""
    path = tmp_path_factory.mktemp("table") / IN_FLIGHT
    table, held = InFlight(path, 4096 + 3 * SLOT), dict[str, bytes]()
    for doing in doings:
        if isinstance(doing, str):
            table.wipe(doing)
            held.pop(doing, None)
        elif isinstance(doing, tuple) and doing[0] not in held:
            name, request = doing
            fits = len(held) < 3 and len(request) + len(name) + 12 <= SLOT
            assert table.note(name, name.encode(), request) == fits
            if fits:
                held[name] = request
    assert dict(note for note in notes(path) if note) == {name.encode(): request for name, request in held.items()}
    for name in held:
        table.wipe(name)
    table.close()
    assert not any(path.read_bytes()[8:])


def test_a_damaged_note_costs_no_other(tmp_path: Path) -> None:
    """Nor is it taken for a call; one whose head is not written yet was never sent."""
    path = tmp_path / IN_FLIGHT
    table = InFlight(path, 4096 + 4 * SLOT)
    for name in ("a", "b", "c"):
        assert table.note(name, name.encode(), b"q" * 100)
    table.close()
    with path.open("r+b") as file:
        file.seek(4096 + 40)
        file.write(b"!")
        file.seek(4096 + 2 * SLOT)
        file.write(struct.pack("<III", 7, 2**31, 2**31))
    assert list(notes(path)) == [None, (b"b", b"q" * 100), None]


@pytest.mark.parametrize("content", [b"", b"USFLY01", b"something else" * 9000])
def test_a_file_that_is_no_table_holds_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / IN_FLIGHT).write_bytes(content)
    assert list(notes(tmp_path / IN_FLIGHT)) == list(notes(tmp_path / "nothing")) == []


def folder_of(tmp_path: Path) -> Path:
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    return folder


def seen(batch: Batch | None) -> list[tuple[str, bool, bytes, bytes]]:
    assert batch is not None
    return [(one.header["id"], one.ended, one.request, one.response) for one in batch.records]


def test_a_killed_worker_leaves_what_was_in_flight(tmp_path: Path) -> None:
    """Calls of every size, with what had come of their replies; those that ended come once."""
    writer = Spool(tmp_path, SpoolSettings(), Metrics())
    assert writer.begin({"id": "done"}, b"ask") is Kind.WHOLE
    assert writer.append({"id": "done", "frame": Kind.WHOLE}, b"ask", (b"answer",))
    assert writer.begin({"id": "small"}, b"s" * 100) is Kind.WHOLE
    assert writer.begin({"id": "large"}, b"l" * SLOT) is Kind.CLOSE
    writer.pieces({"id": "small"}, Kind.RESPONSE, b"so far", 0)
    living = Tail(folder_of(tmp_path), "store")
    assert seen(living.next(10)) == [("done", True, b"ask", b"answer")]
    living.acknowledge()
    writer.close()
    left = [("large", False, b"l" * SLOT, b""), ("small", False, b"s" * 100, b"so far")]
    for tail in (living, Tail(folder_of(tmp_path), "store")):
        assert sorted(seen(tail.next(10))) == left
    tail.acknowledge()
    assert Tail(folder_of(tmp_path), "store").next(10) is None
    assert remove_taken(folder_of(tmp_path), [tail]) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("restarted", [False, True])
def test_killed_between_the_end_and_the_wiping(tmp_path: Path, restarted: bool) -> None:
    """The exchange is in a segment and still noted: it ended, and comes once."""
    writer = Spool(tmp_path, SpoolSettings(), Metrics())
    table = folder_of(tmp_path) / IN_FLIGHT
    assert writer.begin({"id": "a"}, b"ask")
    noted = table.read_bytes()
    assert writer.append({"id": "a", "frame": Kind.WHOLE}, b"ask", (b"answer",))
    tail = Tail(folder_of(tmp_path), "store")
    if restarted:
        tail.next(10)
        tail.acknowledge()
        tail = Tail(folder_of(tmp_path), "store")
    writer.close()
    table.write_bytes(noted)
    batch = tail.next(10)
    assert seen(batch) == [("a", True, b"ask", b"answer")] if not restarted else batch is None or not batch.records


def test_damage_in_the_table_is_counted(tmp_path: Path) -> None:
    writer = Spool(tmp_path, SpoolSettings(), Metrics())
    assert writer.begin({"id": "a"}, b"ask")
    assert writer.begin({"id": "b"}, b"ask")
    writer.close()
    table = folder_of(tmp_path) / IN_FLIGHT
    with table.open("r+b") as file:
        file.seek(4096 + 12)
        file.write(b"x")
    batch = Tail(folder_of(tmp_path), "store").next(10)
    assert [one[0] for one in seen(batch)] == ["b"]
    assert batch is not None
    assert [corrupt.reason for _, corrupt in batch.damaged] == ["in flight"]


def test_a_spool_without_room_for_a_table(tmp_path: Path) -> None:
    """Calls then begin with a frame in a segment."""
    writer = Spool(tmp_path, SpoolSettings(max_total=8192, segment=4096), Metrics())
    assert not os.path.exists(folder_of(tmp_path) / IN_FLIGHT)
    assert writer.begin({"id": "a"}, b"ask") is Kind.CLOSE
    assert writer.append({"id": "a", "frame": Kind.CLOSE}, b"", (b"answer",))
    writer.close()
    assert seen(Tail(folder_of(tmp_path), "store").next(10)) == [("a", True, b"ask", b"answer")]


def test_a_full_spool_notes_nothing(tmp_path: Path) -> None:
    writer = Spool(tmp_path, SpoolSettings(max_total=1_000_000), Metrics())
    while writer.append({"id": "x"}, b"q" * 100_000):
        pass
    assert writer.begin({"id": "a"}, b"ask") is None
    writer.close()
    assert orjson.dumps("a") not in (folder_of(tmp_path) / IN_FLIGHT).read_bytes()
