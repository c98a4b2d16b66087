"""What a reply used, read from its last bytes: for limits that must hold before the log knows. Pure."""

import re
from typing import Final

from gateway.encodings import CannotUnpack, unpacked
from gateway.records import Usage

__all__ = ["END", "used"]

END: Final = 8192  # bytes at a reply's end, within which its usage stands
_MARK: Final = b'"usage"'  # inside a JSON string its quotes would be escaped
_READ: Final = re.compile(rb'"(?:prompt|input)_tokens"\s*:\s*(\d{1,15})\b')
_WRITTEN: Final = re.compile(rb'"(?:completion|output)_tokens"\s*:\s*(\d{1,15})\b')
_OBJECT: Final = 1024  # bytes of a usage object, details included
_UNPACKED: Final = 8 * 1024 * 1024  # bytes: what a compressed reply may become
_TOKEN: Final = 4  # bytes of text
_EVENT: Final = 200  # bytes of an event, which carries a token


def used(end: bytes, *, sent: int, size: int, stream: bool, encoding: str) -> Usage:
    """The tokens of a reply of `size` bytes to a request of `sent` bytes; `end` is the reply's last bytes, or all.

    Where the upstream does not say, a guess from the sizes: a call whose client left, or a stream without usage, is
    not free.
    """
    if encoding:
        end = _unpacked(end, encoding) if len(end) == size else b""
    return _said(end[-END:]) or _guess(sent, size, stream)


def _said(end: bytes) -> Usage | None:
    at = end.rfind(_MARK)
    while at >= 0:
        read = _READ.search(end, at, at + _OBJECT)
        if read is not None:
            written = _WRITTEN.search(end, at, at + _OBJECT)
            return Usage(input_tokens=int(read[1]), output_tokens=int(written[1]) if written else 0)
        at = end.rfind(_MARK, 0, at)
    return None


def _unpacked(body: bytes, encoding: str) -> bytes:
    try:
        return unpacked(body, encoding, _UNPACKED)
    except CannotUnpack:
        return b""


def _guess(sent: int, size: int, stream: bool) -> Usage:
    return Usage(input_tokens=sent // _TOKEN, output_tokens=size // (_EVENT if stream else _TOKEN))
