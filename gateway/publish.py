"""Reads routing.yaml off the request's way: one process reads and checks it, and leaves the rules for the workers."""

import asyncio
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec
import structlog

from gateway.config import Settings, environment
from gateway.prices import listed_price
from routing.errors import RulesError
from routing.packed import pack, unpack
from routing.rules import Rules, load

__all__ = [
    "Published",
    "Publisher",
    "published_at",
    "read_published",
    "replace_file",
    "signature_of",
    "without_collecting",
]

log = structlog.get_logger(__name__)

_LOOK: Final = 0.05  # seconds between two looks at a file


class Published(msgspec.Struct, array_like=True, frozen=True):
    """The last good rules, packed, and what is wrong with the file now; "" for nothing."""

    digest: str
    problem: str
    rules: bytes


_decoder = msgspec.msgpack.Decoder(Published)


class Publisher:
    """Watches routing.yaml. A file that is being written is left alone until it rests; a wrong one changes no rules.

    What is published stays on disk, without secrets: with it a gateway starts while its file is wrong.
    """

    def __init__(self, settings: Settings) -> None:
        self._file = settings.routing_file
        self._to = published_at(settings)
        self._content: bytes | None = None
        self._seen: tuple[int, ...] = ()
        self._taken: tuple[int, ...] | None = None
        self._last = Published("", "", b"")
        self._failing = ""

    def start(self) -> Rules:
        """Publish what the file says now, else what is there from before. Raises RulesError where neither is of use."""
        content = _content(self._file)
        try:
            rules = self._load()
        except RulesError as error:
            try:
                self._last = read_published(self._to)
                rules = unpack(self._last.rules, environment())
            except (RulesError, OSError):
                raise error from None
            log.error("routing.yaml cannot be used; the last good one serves", error=str(error))
            self._write(Published(self._last.digest, str(error), self._last.rules))
        else:
            self._write(Published(rules.digest, "", pack(rules)))
        self._content = content
        return rules

    async def run(self) -> None:
        """Look for changes for ever."""
        while True:
            try:
                if signature_of(self._file) != self._taken:
                    await asyncio.to_thread(self.look)
                self._failing = ""
            except OSError as error:
                if self._failing != str(error):
                    log.error("a change of routing.yaml cannot be published; trying again", error=str(error))
                self._failing = str(error)
            await asyncio.sleep(_LOOK)

    def look(self) -> None:
        """Publish a changed file once it was the same at two looks. Raises OSError where that cannot be written."""
        signature = signature_of(self._file)
        resting, self._seen = signature == self._seen, signature
        if not resting or signature == self._taken:
            return
        content = _content(self._file)
        if content is None or content != self._content:
            self._publish()
            self._content = content
        self._taken = signature

    def _publish(self) -> None:
        try:
            rules = self._load()
        except RulesError as error:
            self._write(Published(self._last.digest, str(error), self._last.rules))
        else:
            self._write(Published(rules.digest, "", pack(rules)))

    def _load(self) -> Rules:
        with without_collecting():
            return load(self._file, environment(), listed_price)

    def _write(self, published: Published) -> None:
        replace_file(self._to, msgspec.msgpack.encode(published))
        self._last = published


def published_at(settings: Settings) -> Path:
    """The file by which rules are handed to the workers."""
    return settings.run_dir / "rules.bin"


def read_published(path: Path) -> Published:
    """Raises OSError where it is not there, and RulesError where it is not what a Publisher wrote."""
    try:
        return _decoder.decode(path.read_bytes())
    except msgspec.DecodeError as error:
        raise RulesError(f"{path}: not what was published: {error}") from error


def replace_file(path: Path, data: bytes) -> None:
    """Write a whole file at once: who reads it meanwhile reads the one before. Several processes may do so."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(data)
    temporary.replace(path)


def signature_of(path: Path) -> tuple[int, ...]:
    """Changes whenever the file does; () where there is none."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_mtime_ns, found.st_size, found.st_ino


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


@contextmanager
def without_collecting() -> Iterator[None]:
    """Rules are some 100,000 objects, none of them garbage; the collector would stop everything to find that out."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
