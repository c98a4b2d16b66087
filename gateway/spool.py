"""The spool: append-only segments on local disk, where an exchange is safe before its reply's end goes to the client.

A segment starts with MAGIC and eight random bytes, its mark. Then frames follow, little-endian:

    mark · u32 crc32 of what follows · u32 header · u32 request · u32 response · the three parts

The header is JSON: an exchange's id and fields, and how to read its bodies; the bodies are the bytes as they passed.
`frame` in the header says which piece of the exchange this is (`Kind`); gateway.tail joins them again. The mark is
what reading finds the next frame by after damage: nobody who sends a body can know it. A call that is in flight is
noted beside the segments (gateway.inflight) as long as it lasts; a large one begins with a frame of its own instead.
"""

import asyncio
import contextlib
import errno
import fcntl
import os
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import orjson
import structlog
from isal.isal_zlib import crc32

from gateway.config import SpoolSettings
from gateway.ids import new_id
from gateway.inflight import InFlight
from gateway.outbox import Outbox
from gateway.telemetry import Metrics

__all__ = ["HEAD", "IN_FLIGHT", "MAGIC", "PIECE", "Corrupt", "Frame", "Kind", "Spool", "read_frames", "spool_size"]

log = structlog.get_logger(__name__)

MAGIC: Final = b"USPOOL1\n"
PIECE: Final = 256 * 1024  # bytes of a body that one frame holds at most
_MARK: Final = 8
HEAD: Final = len(MAGIC) + _MARK
_PREFIX: Final = struct.Struct("<8sIIII")
_SIZES: Final = struct.Struct("<III")
_BALLAST: Final = 4 * 1024 * 1024
_MOST_FRAMES: Final = 256  # of one write: each is two of the 1,024 parts that it may have
_MOST_BYTES: Final = 1024 * 1024  # of one write
IN_FLIGHT: Final = "in-flight"  # the file's name


class Kind(StrEnum):
    """Which piece of an exchange a frame holds."""

    WHOLE = "whole"  # all of it
    OPEN = "open"  # what is known before the upstream is called, with the request
    REQUEST = "request"  # a piece of a large request, in order, before OPEN
    RESPONSE = "response"  # a piece of a large reply, in order
    CLOSE = "close"  # how it ended, with the reply or the rest of it
    FEEDBACK = "feedback"  # no piece of one: what was said about one, whole, under an id of its own


_WHOLE: Final = Kind.WHOLE
_CLOSE: Final = Kind.CLOSE


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One record of a segment. `end` is the offset behind it."""

    header: dict[str, Any]
    request: bytes
    response: bytes
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Corrupt:
    """Bytes that are no frame; reading goes on behind them. A torn one reaches to the segment's end."""

    raw: bytes
    reason: str
    end: int

    @property
    def torn(self) -> bool:
        return self.reason == "torn"


class _Held:
    """A frame that is to be written."""

    __slots__ = ("exchange", "kind", "length", "parts")

    def __init__(self, kind: Kind, exchange: str, parts: tuple[bytes, bytes], length: int) -> None:
        self.kind = kind
        self.exchange = exchange
        self.parts = parts
        self.length = length


class Spool:
    """One worker's writer. Writing is synchronous: `writev` to the page cache, no lock and no disk sync.

    With an `outbox`, the frames that end the exchanges of one turn of the loop are one write, before anything is sent.
    """

    def __init__(self, folder: Path, settings: SpoolSettings, metrics: Metrics, outbox: Outbox | None = None) -> None:
        """Raises OSError when the folder cannot be made. A full disk is no reason not to start."""
        self._settings = settings
        self._outbox = outbox
        self._held: list[_Held] = []
        self._held_size = 0
        self._metrics = metrics
        self._root = folder
        self._folder = folder / new_id()
        self._folder.mkdir(parents=True)
        self._lock = os.open(self._folder / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)  # tells the shipper that this folder's writer lives
        self._ballast = self._folder / "ballast"
        self._low = False  # the disk has run full, and has not got room again
        self._number = 0
        self._size = 0
        self._opened = 0.0
        self._mark = b""
        self._dirty = asyncio.Event()
        self._finished: list[int] = []  # segments that are full, still to be synced and closed
        self._total = spool_size(folder)
        self._count = 0  # exchanges since the metrics were told
        self._fd = -1
        self._open_segment()
        self._in_flight = InFlight(self._folder / IN_FLIGHT, self._share(_BALLAST * 2))
        self._hold_ballast()
        if outbox is not None:
            outbox.before = self.commit

    @property
    def full(self) -> bool:
        """True when no more calls should be let in, so that those in flight keep their room."""
        room = min(_BALLAST * 16, self._settings.max_total // 8)
        return self._low or self._total >= self._settings.max_total - room

    @property
    def refusing(self) -> bool:
        """True when the spool is full and the setting says to refuse calls rather than lose their log."""
        return self._settings.on_full == "refuse" and self.full

    def begin(self, header: dict[str, Any], request: bytes) -> Kind | None:
        """Keep what is known of a call before it goes upstream; the frame that is to end it. None: there is no room.

        A CLOSE goes on from here; a WHOLE has to repeat the request.
        """
        if self._total < self._settings.max_total and self._in_flight.note(header["id"], orjson.dumps(header), request):
            return _WHOLE
        return _CLOSE if self.append(header | {"frame": Kind.OPEN}, request) else None

    def append(self, header: dict[str, Any], request: bytes, response: Sequence[bytes] = ()) -> bool:
        """Hand one frame to the kernel. False when there is no room for it; a lost exchange is counted by reason.

        The end of an exchange is handed over at the end of the turn where there is an outbox; its True says that there
        should be room.
        """
        kind = header.get("frame", _WHOLE)
        exchange = header["id"]
        if self._total >= self._settings.max_total:
            return self._lost(kind, exchange, "spool_full")
        if self._size >= self._settings.segment:
            self._rotate()
        if self._fd < 0 and not self._open_segment():
            return self._lost(kind, exchange, "disk_full")
        parts, length = _frame(self._mark, orjson.dumps(header), request, response)
        self._held.append(_Held(kind, exchange, parts, length))
        self._held_size += length
        self._total += length
        full = len(self._held) >= _MOST_FRAMES or self._held_size >= _MOST_BYTES
        if self._outbox is None or not _ends(kind) or full:
            return self.commit()
        self._outbox.wake()
        return True

    def commit(self) -> bool:
        """Hand to the kernel what is held. False when there was no room for the last frame of it."""
        if not self._held:
            return True
        frames, self._held, self._held_size = self._held, [], 0
        if not (self._write(frames) or (self._drop_ballast() and self._write(frames))):
            return [self._write_one(frame) for frame in frames][-1]
        for frame in frames:
            self._done(frame)
        return True

    def _write_one(self, frame: _Held) -> bool:
        """The disk is full, but perhaps not for this one."""
        if not self._write([frame]):
            self._total -= frame.length
            return self._lost(frame.kind, frame.exchange, "disk_full")
        self._done(frame)
        return True

    def _done(self, frame: _Held) -> None:
        if _ends(frame.kind):
            self._count += 1
            self._in_flight.wipe(frame.exchange)

    def pieces(self, call: dict[str, Any], kind: Kind, body: bytes, at: int) -> None:
        """A part of a large body as it passes, in frames of at most PIECE bytes; `at` is its offset in the body."""
        for start in range(0, len(body), PIECE):
            part = body[start : start + PIECE]
            header = call | {"frame": kind, "at": at + start}
            self.append(header, part if kind is Kind.REQUEST else b"", (part,) if kind is Kind.RESPONSE else ())

    def record(self, header: dict[str, Any], request: bytes, response: Sequence[bytes] = ()) -> bool:
        """A whole exchange at once, however large."""
        call = {"id": header["id"]}
        if len(request) > PIECE:
            self.pieces(call, Kind.REQUEST, request, 0)
            request = b""
        if sum(map(len, response)) > PIECE:
            self.pieces(call, Kind.RESPONSE, b"".join(response), 0)
            response = ()
        return self.append(header, request, response)

    async def run(self) -> None:
        """Off the request's way: sync to disk by the setting, keep the folder's size known and the ballast there."""
        loop = asyncio.get_running_loop()
        pause = 0.0 if self._settings.fsync == "always" else self._settings.fsync_interval
        measured = 0.0
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._dirty.wait()
            if self._dirty.is_set():
                self._dirty.clear()
                self._tell()
                await loop.run_in_executor(None, self._sync)
            if loop.time() - measured > 1.0:
                measured = loop.time()
                self._total = await loop.run_in_executor(None, spool_size, self._root)
                self._metrics.spool_bytes(self._total)
                if time.monotonic() - self._opened > self._settings.segment_age:
                    self._rotate()  # so that what has been shipped leaves the disk, also when nobody calls
                self._hold_ballast()
            await asyncio.sleep(pause)

    def close(self) -> None:
        """Let the shipper have everything."""
        self.commit()
        self._tell()
        self._sync()
        self._in_flight.close()
        for fd in (self._fd, self._lock):
            if fd >= 0:
                os.close(fd)
        self._ballast.unlink(missing_ok=True)

    def _tell(self) -> None:
        count, self._count = self._count, 0
        self._metrics.spooled(count)

    def _lost(self, kind: Kind, exchange: str, reason: str) -> bool:
        if _ends(kind):
            self._in_flight.wipe(exchange)
        if kind is not Kind.OPEN:  # without it, all is in the frame that ends the exchange
            what = "" if _ends(kind) else "_feedback" if kind is Kind.FEEDBACK else "_piece"
            self._metrics.dropped(reason + what)
        return False

    def _sync(self) -> None:
        finished, self._finished = self._finished, []
        wanted = self._settings.fsync != "never"
        for fd in (*finished, self._fd, self._in_flight.fd):
            if wanted and fd >= 0:
                with contextlib.suppress(OSError):  # what the disk does not take now is tried at the next sync
                    os.fdatasync(fd)
        for fd in finished:
            os.close(fd)

    def _write(self, frames: Sequence[_Held]) -> bool:
        """Whether all of them are written; otherwise none is."""
        parts: list[bytes] = []
        length = 0
        for frame in frames:
            parts += frame.parts
            length += frame.length
        try:
            written = os.writev(self._fd, parts)
        except OSError as error:
            written = 0
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                log.error("spool: append failed", folder=str(self._folder), error=error.strerror)
        if written != length:
            os.ftruncate(self._fd, self._size)
            return False
        self._size += length
        self._dirty.set()
        return True

    def _rotate(self) -> None:
        self.commit()
        if self._size > HEAD:
            self._finished.append(self._fd)
            self._dirty.set()
            self._fd = -1
            self._open_segment()
        else:
            self._opened = time.monotonic()

    def _open_segment(self) -> bool:
        path = self._folder / f"{self._number + 1:08d}.seg"
        mark = os.urandom(_MARK)
        try:
            fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o600)
            if os.write(fd, MAGIC + mark) != HEAD:
                raise OSError(errno.ENOSPC, "no space left")
        except OSError as error:
            log.error("spool: no new segment", path=str(path), error=error.strerror)
            with contextlib.suppress(OSError, UnboundLocalError):
                os.close(fd)
                path.unlink()
            return False
        self._fd, self._mark, self._number = fd, mark, self._number + 1
        self._size = HEAD
        self._opened = time.monotonic()
        return True

    def _hold_ballast(self) -> None:
        """Keep some disk space for the exchanges that are in flight when the disk runs full."""
        if self._ballast.exists():
            return
        size = max(PIECE, self._share(_BALLAST))
        try:
            fd = os.open(self._ballast, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, size)
            finally:
                os.close(fd)
        except OSError:
            self._low = True
            self._ballast.unlink(missing_ok=True)
        else:
            self._low = False

    def _share(self, most: int) -> int:
        """How many bytes a file beside the segments may take."""
        disk = os.statvfs(self._folder)
        return min(most, self._settings.max_total // 16, disk.f_bavail * disk.f_frsize // 8)

    def _drop_ballast(self) -> bool:
        """Make room by giving the ballast up; False when it is gone already."""
        if not self._low:
            log.error("spool: the disk is full", folder=str(self._folder), on_full=self._settings.on_full)
            self._low = True
        try:
            self._ballast.unlink()
        except FileNotFoundError:
            return False
        return True


def read_frames(path: Path, offset: int = 0, *, final: bool = True) -> Iterator[Frame | Corrupt]:
    """The frames of a segment from `offset` on.

    Of a segment that is still written to (not `final`), an unfinished frame at the end is left for the next reading;
    of a final one, it is a Corrupt that is torn. Damage costs the damaged frames alone: the others are found again.
    """
    with path.open("rb") as file:
        head = file.read(HEAD)
        if len(head) < HEAD or not head.startswith(MAGIC):
            if final and head:
                raw = head + file.read()
                yield Corrupt(raw=raw, reason="torn" if MAGIC.startswith(head[: len(MAGIC)]) else "magic", end=len(raw))
            return
        mark = head[len(MAGIC) :]
        offset = max(offset, HEAD)
        file.seek(offset)
        while prefix := file.read(_PREFIX.size):
            frame = _next(file, prefix, mark, offset)
            if frame is None:
                rest = prefix + file.read()
                found = _resume(rest, mark) if final or len(rest) > 2 * PIECE else 0
                if not found and not final:
                    return  # the writer is in the middle of it, or has not come to it
                raw = rest[: found or len(rest)]
                frame = Corrupt(raw=raw, reason="damaged" if found else "torn", end=offset + len(raw))
                file.seek(frame.end)
            offset = frame.end
            yield frame


def _next(file: Any, prefix: bytes, mark: bytes, offset: int) -> Frame | Corrupt | None:
    """The frame that starts with `prefix`; None when none does. The file stands behind it, or anywhere."""
    if len(prefix) < _PREFIX.size:
        return None
    found, crc, *sizes = _PREFIX.unpack(prefix)
    if found != mark:
        return None
    body = file.read(sum(sizes))
    if len(body) != sum(sizes) or crc32(body, crc32(prefix[12:])) != crc:
        file.seek(offset + len(prefix))
        return None
    end = offset + len(prefix) + len(body)
    head, request = sizes[0], sizes[1]
    try:
        header = orjson.loads(body[:head])
    except orjson.JSONDecodeError:
        return Corrupt(raw=body, reason="header", end=end)
    return Frame(header=header, request=body[head : head + request], response=body[head + request :], end=end)


def _resume(rest: bytes, mark: bytes) -> int:
    """Where in `rest`, behind its start, the next whole frame begins; 0 when there is none."""
    at = rest.find(mark, 1)
    while at > 0:
        prefix = rest[at : at + _PREFIX.size]
        if len(prefix) == _PREFIX.size:
            _, crc, *sizes = _PREFIX.unpack(prefix)
            body = rest[at + _PREFIX.size : at + _PREFIX.size + sum(sizes)]
            if len(body) == sum(sizes) and crc32(body, crc32(prefix[12:])) == crc:
                return at
        at = rest.find(mark, at + 1)
    return 0


def _ends(kind: Kind) -> bool:
    """Whether the frame is an exchange's last."""
    return kind is _WHOLE or kind is _CLOSE


def _frame(mark: bytes, head: bytes, request: bytes, response: Sequence[bytes]) -> tuple[tuple[bytes, bytes], int]:
    """The frame's parts, and how long they are together."""
    sizes = _SIZES.pack(len(head), len(request), sum(map(len, response)))
    summed = b"".join((sizes, head, request, *response))
    return (mark + crc32(summed).to_bytes(4, "little"), summed), _MARK + 4 + len(summed)


def spool_size(folder: Path) -> int:
    """Bytes of all workers' segments."""
    total = 0
    for path in folder.glob("*/*.seg"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # the shipper was quicker
            continue
    return total
