"""Packed bodies: unpacked by the name of their encoding, bounded, cut off or not what they say."""

import contextlib
import gzip
import zlib

import brotli
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from gateway.encodings import CannotUnpack, unpacked

PACK = {
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "deflate": zlib.compress,
    "br": brotli.compress,
    "zstd": zstandard.compress,
    "identity": bytes,
    "": bytes,
    "gzip, br": lambda body: brotli.compress(gzip.compress(body)),
}
MOST = 1_000_000


@given(st.binary(max_size=5000), st.sampled_from(sorted(PACK)))
def test_what_was_packed_comes_out(body: bytes, encoding: str) -> None:
    assert unpacked(PACK[encoding](body), encoding, MOST) == body


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd"])
def test_no_more_than_is_wanted(encoding: str) -> None:
    """A bomb of 100 MB stays packed but for its beginning."""
    bomb = PACK[encoding](b"x" * 100_000_000)
    assert len(bomb) < 200_000
    assert unpacked(bomb, encoding, MOST) == b"x" * MOST


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd"])
def test_what_came_of_a_body_that_was_cut(encoding: str) -> None:
    """As the log wants it of a stream that broke."""
    body = b"".join(b"data: %d\n\n" % n for n in range(50_000))
    packed = PACK[encoding](body)
    found = unpacked(packed[: len(packed) // 2], encoding, 10 * MOST)
    assert body.startswith(found)
    assert len(found) > 1000


@pytest.mark.parametrize(
    ("body", "encoding"), [(b"not packed", "gzip"), (b"not packed", "deflate"), (b"{}", "zstd"), (b"{}", "compress")]
)
def test_what_it_is_not(body: bytes, encoding: str) -> None:
    with pytest.raises(CannotUnpack, match=f"packed as {encoding}|says that it is {encoding}"):
        unpacked(body, encoding, MOST)


@given(st.binary(max_size=300), st.sampled_from(["gzip", "deflate", "br", "zstd", "br, gzip", ","]))
def test_any_bytes_are_unpacked_or_refused(body: bytes, encoding: str) -> None:
    with contextlib.suppress(CannotUnpack):
        assert len(unpacked(body * 9, encoding, 100)) <= max(100, len(body) * 9 * (encoding == ","))
