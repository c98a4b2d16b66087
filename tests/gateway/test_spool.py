"""The spool: what is appended is read back, torn tails and damage cost only themselves."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.config import SpoolSettings
from gateway.spool import MAGIC, Corrupt, Frame, Spool, read_frames
from gateway.telemetry import Metrics

HEADER = {"id": "x", "n": 1}


def spool(folder: Path, **settings: object) -> Spool:
    return Spool(folder, SpoolSettings(**settings), Metrics())


def segments(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.seg"))


def test_frames_are_read_back_before_the_writer_closes(tmp_path: Path) -> None:
    """Appended means handed to the kernel: no buffer of ours stands between."""
    writer = spool(tmp_path)
    assert writer.append(HEADER, b"request", [b"re", b"ply"])
    (frame,) = read_frames(segments(tmp_path)[0])
    assert frame == Frame(header=HEADER, request=b"request", response=b"reply", end=frame.end)
    writer.close()


def test_reading_goes_on_from_an_offset(tmp_path: Path) -> None:
    """The end of a frame is where the next reading starts."""
    writer = spool(tmp_path)
    writer.append(HEADER, b"1", [])
    (first,) = read_frames(segments(tmp_path)[0])
    writer.append(HEADER, b"2", [])
    (second,) = read_frames(segments(tmp_path)[0], first.end)
    assert second.request == b"2"
    writer.close()


def test_a_thousand_chunks_are_one_frame(tmp_path: Path) -> None:
    """More parts than one writev takes."""
    writer = spool(tmp_path)
    writer.append(HEADER, b"", [b"%d," % n for n in range(3000)])
    (frame,) = read_frames(segments(tmp_path)[0])
    assert frame.response == b"".join(b"%d," % n for n in range(3000))
    writer.close()


def test_segments_rotate_by_size(tmp_path: Path) -> None:
    """A full segment is left to the shipper and the next one begun."""
    writer = spool(tmp_path, segment=4096)
    for _ in range(10):
        writer.append(HEADER, b"x" * 1500, [])
    writer.close()
    assert len(segments(tmp_path)) == 4
    assert sum(len(list(read_frames(path))) for path in segments(tmp_path)) == 10


@given(cut=st.integers(min_value=0, max_value=400))
def test_a_torn_tail_costs_only_itself(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    """A segment that ends anywhere gives all the whole frames before, and no exception."""
    folder = tmp_path_factory.mktemp("spool")
    writer = spool(folder)
    for n in range(3):
        writer.append(HEADER, b"r" * 40, [b"%d" % n])
    writer.close()
    path = segments(folder)[0]
    whole = list(read_frames(path))
    data = path.read_bytes()[:cut]
    path.write_bytes(data)
    assert list(read_frames(path)) == [frame for frame in whole if frame.end <= len(data)]


@given(position=st.integers(min_value=len(MAGIC) + 20, max_value=len(MAGIC) + 60), flip=st.integers(1, 255))
def test_damage_inside_a_frame_is_reported_and_passed(
    tmp_path_factory: pytest.TempPathFactory, position: int, flip: int
) -> None:
    """The damaged frame is Corrupt; the ones behind it are read."""
    folder = tmp_path_factory.mktemp("spool")
    writer = spool(folder)
    for n in range(3):
        writer.append(HEADER, b"r" * 60, [b"%d" % n])
    writer.close()
    path = segments(folder)[0]
    data = bytearray(path.read_bytes())
    data[position] ^= flip
    path.write_bytes(data)
    first, *others = read_frames(path)
    assert isinstance(first, Corrupt)
    assert [frame.response for frame in others] == [b"1", b"2"]
