"""Joining the spool's frames: whatever the order, the damage and the moment of death, exchanges come out once."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.config import SpoolSettings
from gateway.spool import Kind, Spool
from gateway.tail import Batch, Tail, remove_taken, segment_path, segments
from gateway.telemetry import Metrics


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Spool]:
    made = Spool(tmp_path, SpoolSettings(segment=4096), Metrics())
    yield made
    made.close()


def folder_of(tmp_path: Path) -> Path:
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    return folder


def exchange(writer: Spool, name: str, *, close: bool = True, size: int = 10) -> None:
    writer.append({"id": name, "frame": Kind.OPEN}, b"q" * size)
    if close:
        writer.append({"id": name, "frame": Kind.CLOSE, "status": 200}, b"", [b"r" * size])


def names(batch: Batch | None) -> list[str]:
    return [] if batch is None else [record.header["id"] for record in batch.records]


def test_an_open_exchange_is_waited_for(tmp_path: Path, writer: Spool) -> None:
    """As long as its worker lives, its end may still come; then request and reply are one record."""
    exchange(writer, "slow", close=False)
    exchange(writer, "quick")
    tail = Tail(folder_of(tmp_path), "store")
    assert names(tail.next(10)) == ["quick"]
    tail.acknowledge()
    assert tail.next(10) is None
    writer.append({"id": "slow", "frame": Kind.CLOSE}, b"", [b"end"])
    batch = tail.next(10)
    assert batch is not None
    (record,) = batch.records
    assert (record.request, record.response, record.ended) == (b"q" * 10, b"end", True)


def test_a_killed_worker_leaves_its_open_exchanges(tmp_path: Path) -> None:
    """With their requests, once, also for a reader that starts anew."""
    writer = Spool(tmp_path, SpoolSettings(), Metrics())
    exchange(writer, "done")
    exchange(writer, "open", close=False)
    writer.pieces({"id": "upload"}, Kind.REQUEST, b"part", 0)
    writer.close()
    tail = Tail(folder_of(tmp_path), "store")
    batch = tail.next(10)
    assert names(batch) == ["done", "open", "upload"]
    assert batch is not None
    assert [record.ended for record in batch.records] == [True, False, False]
    assert batch.records[1].request == b"q" * 10
    tail.acknowledge()
    assert Tail(folder_of(tmp_path), "store").next(10) is None
    assert remove_taken(folder_of(tmp_path), [tail]) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_batch_comes_again_until_it_is_acknowledged(tmp_path: Path, writer: Spool) -> None:
    """From the same place, with what has come since behind it."""
    exchange(writer, "a")
    tail = Tail(folder_of(tmp_path), "store")
    first = tail.next(10)
    exchange(writer, "b")
    second = tail.next(10)
    assert first is not None
    assert second is not None
    assert names(second) == ["a", "b"]
    assert second.start == first.start
    anew = Tail(folder_of(tmp_path), "store").next(10)
    assert anew is not None
    assert (names(anew), anew.start) == (["a", "b"], first.start)


def test_a_segment_stays_while_something_in_it_is_open(tmp_path: Path, writer: Spool) -> None:
    """A long stream began in it; a reader that starts anew still finds its request there."""
    exchange(writer, "long", close=False)
    for n in range(20):
        exchange(writer, str(n), size=400)
    folder = folder_of(tmp_path)
    tail = Tail(folder, "store")
    assert len(names(tail.next(100))) == 20
    tail.acknowledge()
    assert remove_taken(folder, [tail]) > 0
    assert 1 in segments(folder)
    writer.append({"id": "long", "frame": Kind.CLOSE}, b"", [b"end"])
    anew = Tail(folder, "store")
    batch = anew.next(10)
    assert batch is not None
    assert [(record.header["id"], record.request) for record in batch.records] == [("long", b"q" * 10)]
    anew.acknowledge()
    remove_taken(folder, [anew])
    assert 1 not in segments(folder)


def test_a_segment_stays_until_every_reader_has_it(tmp_path: Path, writer: Spool) -> None:
    """A sink that is behind keeps the segment; one that wants many at once waits for a whole segment."""
    for n in range(20):
        exchange(writer, str(n), size=400)
    folder = folder_of(tmp_path)
    store, sink = Tail(folder, "store"), Tail(folder, "sink-0")
    while store.next(5):
        store.acknowledge()
    assert remove_taken(folder, [store, sink]) == 0
    taken = []
    while batch := sink.next(1000, least=1000):
        taken += names(batch)
        sink.acknowledge()
    assert 0 < len(taken) <= 20
    assert remove_taken(folder, [store, sink]) > 0


def test_large_bodies_are_joined(tmp_path: Path, writer: Spool) -> None:
    """Pieces of request and reply, in their places, with the rest behind."""
    writer.pieces({"id": "x"}, Kind.REQUEST, b"one", 0)
    writer.pieces({"id": "x"}, Kind.REQUEST, b"two", 3)
    writer.append({"id": "x", "frame": Kind.OPEN}, b"three")
    writer.pieces({"id": "x"}, Kind.RESPONSE, b"four", 0)
    writer.append({"id": "x", "frame": Kind.CLOSE}, b"", [b"fi", b"ve"])
    batch = Tail(folder_of(tmp_path), "store").next(10)
    assert batch is not None
    (record,) = batch.records
    assert (record.request, record.response) == (b"onetwothree", b"fourfive")


@pytest.fixture(scope="module")
def twelve(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """A dead worker's folder with twelve exchanges over several segments, and how large each is."""
    root = tmp_path_factory.mktemp("spool")
    writer = Spool(root, SpoolSettings(segment=4096), Metrics())
    wanted = {f"{n:02d}": (n * 379) % 1500 for n in range(12)}
    for name, size in wanted.items():
        exchange(writer, name, close=int(name) % 3 > 0, size=size)
        if int(name) >= 3 and int(name) % 3 == 0:
            late = f"{int(name) - 3:02d}"
            writer.append({"id": late, "frame": Kind.CLOSE}, b"", [b"r" * wanted[late]])
    writer.append({"id": "09", "frame": Kind.CLOSE}, b"", [b"r" * wanted["09"]])
    writer.close()
    return folder_of(root), wanted


def sizes(batch: Batch) -> list[tuple[str, int, int]]:
    return [(record.header["id"], len(record.request), len(record.response)) for record in batch.records]


@given(data=st.data())
def test_segments_in_any_order(
    twelve: tuple[Path, dict[str, int]], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Under each other's names, an end may come before its beginning: all exchanges come out, whole, once."""
    source, wanted = twelve
    folder = tmp_path_factory.mktemp("moved")
    numbers = segments(source)
    for old, new in zip(numbers, data.draw(st.permutations(numbers)), strict=True):
        shutil.copy(segment_path(source, old), segment_path(folder, new))
    tail = Tail(folder, "store")
    found: list[tuple[str, int, int]] = []
    while batch := tail.next(data.draw(st.integers(1, 5))):
        found += sizes(batch)
        tail.acknowledge()
    assert sorted(found) == [(name, size, size) for name, size in wanted.items()]


@given(data=st.data())
def test_readers_that_stop_anywhere(
    twelve: tuple[Path, dict[str, int]], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """A reader that is started anew after any batch goes on where it was, and no segment goes too early."""
    source, wanted = twelve
    folder = tmp_path_factory.mktemp("copy") / "worker"
    shutil.copytree(source, folder)
    found: list[tuple[str, int, int]] = []
    tail = Tail(folder, "store")
    while batch := tail.next(data.draw(st.integers(1, 5))):
        found += sizes(batch)
        tail.acknowledge()
        if data.draw(st.booleans()):
            remove_taken(folder, [tail])
            tail = Tail(folder, "store")
    assert sorted(found) == [(name, size, size) for name, size in wanted.items()]
