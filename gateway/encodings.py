"""A body unpacked as its `content-encoding` says: gzip, deflate, br, zstd, and several of them in a row. Pure."""

import io
import zlib
from collections.abc import Callable
from typing import Final

import brotli
import zstandard

__all__ = ["CannotUnpack", "unpacked"]


class CannotUnpack(ValueError):
    """The encoding is none that is known here, or the body is not what it says."""


def unpacked(body: bytes, encoding: str, most: int) -> bytes:
    """The first `most` bytes of the unpacked body; of one that was cut off, what came. Raises CannotUnpack.

    `encoding` is lower case; "" and `identity` stand for none.
    """
    names = [name.strip() for name in encoding.split(",")]
    for name in reversed(names):
        if name in ("", "identity") or not body:
            continue
        if name not in _UNPACK:
            raise CannotUnpack(f"a reply is packed as {name}, which cannot be read here")
        try:
            body = _UNPACK[name](body, most)
        except (zlib.error, brotli.error, zstandard.ZstdError) as error:
            raise CannotUnpack(f"a reply says that it is {name}, and is not: {error}") from error
    return body


def _gzip(body: bytes, most: int) -> bytes:
    return zlib.decompressobj(wbits=zlib.MAX_WBITS | 32).decompress(body, most)


def _deflate(body: bytes, most: int) -> bytes:
    return zlib.decompressobj().decompress(body, most)


def _brotli(body: bytes, most: int) -> bytes:
    decoder = brotli.Decompressor()
    parts = [decoder.process(body, output_buffer_limit=most)]
    while (room := most - sum(map(len, parts))) > 0 and not decoder.can_accept_more_data():
        parts.append(decoder.process(b"", output_buffer_limit=room))
    return b"".join(parts)[:most]


def _zstd(body: bytes, most: int) -> bytes:
    return zstandard.ZstdDecompressor().stream_reader(io.BytesIO(body), read_across_frames=True).read(most)


_UNPACK: Final[dict[str, Callable[[bytes, int], bytes]]] = {
    "gzip": _gzip,
    "x-gzip": _gzip,
    "deflate": _deflate,
    "br": _brotli,
    "zstd": _zstd,
}
