"""Reads one worker's spool folder: joins frames to records, in batches, and remembers what has been taken.

Several readers (the log store's, each sink's) may stand at different places; a segment goes when none needs it.
"""

import contextlib
import fcntl
import os
import struct
import time
import zlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import orjson
import structlog

from gateway.inflight import notes
from gateway.spool import IN_FLIGHT, Corrupt, Frame, Kind, read_frames

__all__ = ["Batch", "Elsewhere", "Place", "Record", "Tail", "remove_taken", "segments", "writer_lives"]

log = structlog.get_logger(__name__)

_PLACE: Final = struct.Struct("<QQI")
_MAX_BATCH: Final = 32 * 1024 * 1024  # bytes
_REST: Final = 1 << 62  # where the last piece of a body stands: behind all others


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """A position in a folder: the segment's number and the offset in it."""

    segment: int = 0
    offset: int = 0


_KINDS: Final = frozenset(Kind)
_END: Final = Place(2**63, 0)


@dataclass(slots=True, kw_only=True)
class Record:
    """The frames of one exchange, joined. One that never ended was in flight when its worker was killed.

    Feedback is a record too, of one frame.
    """

    header: dict[str, Any] = field(default_factory=dict)
    opened: bool = False
    ended: bool = False
    segments: set[int] = field(default_factory=set)
    _request: list[tuple[int, bytes]] = field(default_factory=list)
    _response: list[tuple[int, bytes]] = field(default_factory=list)

    def add(self, frame: Frame, segment: int) -> None:
        """Take in one frame, in whatever order they come."""
        kind = frame.header.get("frame", Kind.WHOLE)
        at = frame.header.get("at", _REST)
        if not self.ended:
            self.header |= frame.header
        self.opened |= kind in (Kind.OPEN, Kind.WHOLE, Kind.FEEDBACK)
        self.ended |= kind in (Kind.CLOSE, Kind.WHOLE, Kind.FEEDBACK)
        self.segments.add(segment)
        if frame.request:
            self._request.append((at, frame.request))
        if frame.response:
            self._response.append((at, frame.response))

    @property
    def whole(self) -> bool:
        return self.opened and self.ended

    @property
    def is_feedback(self) -> bool:
        return self.header.get("frame") == Kind.FEEDBACK

    @property
    def size(self) -> int:
        return sum(len(body) for _, body in (*self._request, *self._response))

    @property
    def request(self) -> bytes:
        return _in_order(self._request)

    @property
    def response(self) -> bytes:
        return _in_order(self._response)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What a reader is to take next. `start` stays the same when what was not acknowledged is read again."""

    records: Sequence[Record]
    damaged: Sequence[tuple[Place, Corrupt]]
    start: Place
    size: int


class Tail:
    """One reader of one folder. `name` tells readers apart; their places survive a restart."""

    def __init__(self, folder: Path, name: str) -> None:
        """Reads what stands before the reader's place, for the exchanges that were open there."""
        self.folder = folder
        self._path = folder / f"{name}.place"
        self.taken = _read_place(self._path)
        self._place = self.taken
        self._open: dict[str, Record] = {}
        self._records: list[Record] = []
        self._damaged: list[tuple[Place, Corrupt]] = []
        self._size = 0
        self._complete = False
        self._ended = ""  # the exchange that ended last
        self._opens_path = folder / f"{name}.open"
        self._rebuild()

    def next(self, limit: int, *, least: int = 1) -> Batch | None:
        """The next batch, of at most `limit` records; None when fewer than `least` are there and more may come.

        Until it is acknowledged, the same records come again, perhaps with others behind them.
        """
        if len(self._records) < limit and self._size < _MAX_BATCH:
            self._read(limit)
        if self._place == self.taken and not self._records:
            return None
        if not self._records and not self._damaged:
            self.acknowledge()  # only beginnings of exchanges
            return None
        if len(self._records) < min(least, limit) and not self._complete and not self._damaged:
            return None
        return Batch(records=self._records, damaged=self._damaged, start=self.taken, size=self._size)

    def acknowledge(self) -> None:
        """The last batch is safe where the reader brought it."""
        self.taken = self._place
        _write_place(self._path, self.taken)
        self._records, self._damaged, self._size, self._complete = [], [], 0, False

    @property
    def finished(self) -> bool:
        """True when a dead writer's folder has been taken whole."""
        return self.taken == _END

    def needs(self, segment: int) -> bool:
        """True when the segment holds something that was not taken yet."""
        waiting = (*self._open.values(), *self._records)
        return segment >= self.taken.segment or any(segment in record.segments for record in waiting)

    def forget(self, segment: int) -> None:
        """The segment is about to go. Keep the ids of what began before it and is open: others may have ended in it.

        Raises OSError; the segment then has to stay.
        """
        waiting = {**self._open, **{record.header["id"]: record for record in self._records}}
        ids = [name for name, record in waiting.items() if min(record.segments) < segment]
        temporary = self._opens_path.with_suffix(".tmp")
        temporary.write_bytes(orjson.dumps({"before": segment, "ids": ids}))
        temporary.replace(self._opens_path)

    def _read(self, limit: int) -> None:
        alive = writer_lives(self.folder)  # asked before reading: what a dead writer left is complete
        numbers = segments(self.folder)
        for number in numbers:
            if number < self._place.segment:
                continue
            offset = self._place.offset if number == self._place.segment else 0
            final = not alive or number != numbers[-1]
            with _frames(segment_path(self.folder, number), offset, final=final) as frames:
                for frame in frames:
                    start, self._place = self._place, Place(number, frame.end)
                    self._take(frame, start)
                    if len(self._records) >= limit or self._size >= _MAX_BATCH:
                        return
            if final:
                self._place, self._complete = Place(number + 1, 0), True
        if not alive and self._place != _END:
            self._in_flight(numbers[-1] if numbers else 0)
            self._place, self._complete = _END, True
            self._records.extend(self._open.values())
            self._open.clear()

    def _in_flight(self, last: int) -> None:
        """What a killed worker noted and did not end; it may have been killed between an end and wiping the note."""
        for note in notes(self.folder / IN_FLIGHT):
            header = _header(note[0]) if note is not None else None
            if note is None or header is None:
                self._damaged.append((self._place, Corrupt(raw=b"", reason="in flight", end=self._place.offset)))
            elif header.get("id") != self._ended:
                self._joined(Frame(header=header | {"frame": Kind.OPEN}, request=note[1], response=b"", end=0), last)

    def _take(self, frame: Frame | Corrupt, start: Place) -> None:
        if isinstance(frame, Corrupt):
            self._damaged.append((start, frame))
            return
        record = self._joined(frame, self._place.segment)
        if record is None:
            self._damaged.append((start, Corrupt(raw=b"", reason="no exchange", end=frame.end)))
        elif record.whole:
            del self._open[record.header["id"]]
            self._records.append(record)
            self._size += record.size

    def _joined(self, frame: Frame, segment: int) -> Record | None:
        """The frame's record, with the frame in it. None when the frame names no exchange."""
        exchange, kind = frame.header.get("id"), frame.header.get("frame", Kind.WHOLE)
        if not isinstance(exchange, str) or kind not in _KINDS:
            return None
        record = self._open.setdefault(exchange, Record())
        record.add(frame, segment)
        if record.ended:
            self._ended = exchange
        return record

    def _rebuild(self) -> None:
        before, ids = _read_opens(self._opens_path)
        for number in segments(self.folder):
            if number > self.taken.segment or self.finished:
                return
            with _frames(segment_path(self.folder, number)) as frames:
                for frame in frames:
                    if number == self.taken.segment and frame.end > self.taken.offset:
                        return
                    if isinstance(frame, Corrupt) or (number < before and frame.header.get("id") not in ids):
                        continue
                    record = self._joined(frame, number)
                    if record is not None and record.ended:  # also when its beginning is gone: it was taken
                        del self._open[frame.header["id"]]


def _header(raw: bytes) -> dict[str, Any] | None:
    with contextlib.suppress(orjson.JSONDecodeError):
        header = orjson.loads(raw)
        return header if isinstance(header, dict) else None
    return None


class Elsewhere:
    """A reader of the folder in another process, that is waited for: not longer than `seconds` after the last write."""

    def __init__(self, folder: Path, name: str, seconds: float) -> None:
        self._folder, self._path, self._seconds = folder, folder / f"{name}.place", seconds

    @property
    def finished(self) -> bool:
        return _read_place(self._path) == _END or self._is_old(self._folder)

    def needs(self, segment: int) -> bool:
        """True when the segment holds something that it has not taken yet, and still may."""
        return segment >= _read_place(self._path).segment and not self._is_old(segment_path(self._folder, segment))

    def forget(self, segment: int) -> None:
        """It takes nothing twice, and so need not know what was before."""

    def _is_old(self, path: Path) -> bool:
        return time.time() - path.stat().st_mtime > self._seconds


def remove_taken(folder: Path, tails: Iterable[Tail | Elsewhere]) -> int:
    """Delete the segments that no reader needs, and a dead writer's empty folder; how many segments."""
    readers = list(tails)
    removed, kept = 0, False
    for number in segments(folder):
        if any(tail.needs(number) for tail in readers) or (kept and not _forgotten(readers, number)):
            kept = True
            continue
        segment_path(folder, number).unlink()
        removed += 1
    if readers and all(tail.finished for tail in readers) and not segments(folder):
        with contextlib.suppress(OSError):
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()
    return removed


def _forgotten(readers: Iterable[Tail | Elsewhere], number: int) -> bool:
    try:
        for tail in readers:
            tail.forget(number)
    except OSError as error:
        log.warning("spool: a segment stays", segment=number, error=error.strerror)
        return False
    return True


@contextlib.contextmanager
def _frames(path: Path, offset: int = 0, *, final: bool = True) -> Iterator[Iterator[Frame | Corrupt]]:
    """Who leaves in the middle closes the file: compiled, a generator that is dropped does not."""
    frames = read_frames(path, offset, final=final)
    try:
        yield frames
    finally:
        if isinstance(frames, Generator):
            frames.close()


def segments(folder: Path) -> list[int]:
    """The numbers of a folder's segments, in order."""
    return sorted(int(path.stem) for path in folder.glob("*.seg") if path.stem.isdecimal())


def segment_path(folder: Path, number: int) -> Path:
    return folder / f"{number:08d}.seg"


def writer_lives(folder: Path) -> bool:
    """True while the worker that writes to the folder holds its lock."""
    try:
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _in_order(pieces: Sequence[tuple[int, bytes]]) -> bytes:
    if len(pieces) == 1:
        return pieces[0][1]
    return b"".join(body for _, body in sorted(pieces, key=lambda piece: piece[0]))


def _read_place(path: Path) -> Place:
    try:
        raw = path.read_bytes()
        segment, offset, crc = _PLACE.unpack(raw)
    except (FileNotFoundError, struct.error):
        return Place()
    return Place(segment, offset) if zlib.crc32(raw[:16]) == crc else Place()


def _read_opens(path: Path) -> tuple[int, frozenset[str]]:
    try:
        kept = orjson.loads(path.read_bytes())
    except (FileNotFoundError, orjson.JSONDecodeError):
        return 0, frozenset()
    return kept["before"], frozenset(kept["ids"])


def _write_place(path: Path, place: Place) -> None:
    """Overwritten in place: a full disk is no obstacle. Without it, all is taken again, which ids make harmless."""
    raw = struct.pack("<QQ", place.segment, place.offset)
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        try:
            os.pwrite(descriptor, raw + struct.pack("<I", zlib.crc32(raw)), 0)
        finally:
            os.close(descriptor)
    except OSError as error:
        log.warning("spool: the reader's place is not kept", path=str(path), error=error.strerror)
