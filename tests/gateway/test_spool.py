"""The spool: what is appended is read back, torn tails and damage cost only themselves."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.config import SpoolSettings
from gateway.spool import HEAD, PIECE, Corrupt, Frame, Kind, Spool, read_frames
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


def written(folder: Path, n: int) -> tuple[Path, list[Frame]]:
    """A segment of `n` frames, and what they are."""
    writer = spool(folder)
    for number in range(n):
        writer.append({"id": str(number)}, b"r" * 40, [b"%d" % number])
    writer.close()
    path = segments(folder)[0]
    return path, [frame for frame in read_frames(path) if isinstance(frame, Frame)]


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, list[Frame]]:
    """The bytes of a segment of five frames, and the frames."""
    path, whole = written(tmp_path_factory.mktemp("spool"), 5)
    return path.read_bytes(), whole


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("spool") / "00000001.seg"


@given(cut=st.integers(min_value=0, max_value=500))
def test_a_torn_tail_costs_only_itself(five: tuple[bytes, list[Frame]], path: Path, cut: int) -> None:
    """A segment that ends anywhere gives all the whole frames before; what is left is told, once it is final."""
    raw, whole = five
    data = raw[:cut]
    path.write_bytes(data)
    intact = [frame for frame in whole if frame.end <= len(data)]
    assert list(read_frames(path, final=False)) == intact
    *found, last = [*read_frames(path), None]
    if len(data) not in (0, HEAD, *(frame.end for frame in whole)):
        last = found.pop()
        assert isinstance(last, Corrupt)
        assert last.torn
    assert found == intact


@given(data=st.data())
def test_damage_costs_only_the_frames_it_hits(five: tuple[bytes, list[Frame]], path: Path, data: st.DataObject) -> None:
    """Bytes changed, cut out or put in, anywhere behind the head: every frame that is still whole comes out."""
    raw, whole = five
    at = data.draw(st.integers(HEAD, len(raw) - 1))
    gone = data.draw(st.integers(0, 90))
    put = data.draw(st.binary(max_size=90))
    path.write_bytes(raw[:at] + put + raw[at + gone :])
    starts = [HEAD, *(frame.end for frame in whole)]
    untouched = [
        frame.header["id"] for frame, start in zip(whole, starts, strict=False) if frame.end <= at or start >= at + gone
    ]
    found = [frame.header["id"] for frame in read_frames(path) if isinstance(frame, Frame)]
    assert [one for one in found if one in untouched] == untouched


@given(raw=st.binary(max_size=300))
def test_any_file_is_read_without_an_exception(path: Path, raw: bytes) -> None:
    """What is no segment at all gives no frame."""
    path.write_bytes(raw)
    assert [frame for frame in read_frames(path) if isinstance(frame, Frame)] == []


def test_a_frame_inside_a_body_is_no_frame(tmp_path: Path) -> None:
    """A client that sends the bytes of a segment cannot have them taken for exchanges, not even after damage."""
    inner, _ = written(tmp_path / "inner", 1)
    writer = spool(tmp_path / "outer")
    writer.append({"id": "victim"}, inner.read_bytes(), [])
    writer.append({"id": "next"}, b"", [])
    writer.close()
    path = segments(tmp_path / "outer")[0]
    raw = bytearray(path.read_bytes())
    raw[HEAD + 9] ^= 1
    path.write_bytes(raw)
    first, second = read_frames(path)
    assert isinstance(first, Corrupt)
    assert isinstance(second, Frame)
    assert second.header["id"] == "next"


def test_a_large_body_passes_in_pieces(tmp_path: Path) -> None:
    """No frame holds more of a body than a piece."""
    writer = spool(tmp_path)
    writer.pieces({"id": "x"}, Kind.REQUEST, b"a" * (2 * PIECE + 5), 100)
    writer.close()
    found = [(frame.header["at"], len(frame.request)) for frame in read_frames(segments(tmp_path)[0])]
    assert found == [(100, PIECE), (100 + PIECE, PIECE), (100 + 2 * PIECE, 5)]


def test_the_folder_has_a_cap(tmp_path: Path) -> None:
    """Calls are refused before the cap, so that those in flight keep their room; at the cap exchanges are dropped."""
    writer = spool(tmp_path, max_total=64_000, on_full="refuse")
    while not writer.refusing:
        assert writer.append(HEADER, b"x" * 1000)
    assert writer.append(HEADER, b"x" * 1000)
    for _ in range(20):
        writer.append(HEADER, b"x" * 1000)
    assert not writer.append(HEADER, b"x" * 1000)
    assert sum(path.stat().st_size for path in segments(tmp_path)) < 66_000
    writer.close()
