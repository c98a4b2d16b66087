"""The way down: a reply to its client, byte for byte, and to the log; or the error in its place. On the hot path."""

import time
from functools import lru_cache
from typing import Final

from gateway.errors import Shed, UpstreamCut, UpstreamError, UpstreamTimeout, error_body
from gateway.include_usage import UsageFilter
from gateway.records import Outcome
from gateway.tee import Downstream, Tee
from gateway.upstream import Headers, Reply

__all__ = ["HOP_BY_HOP", "end_to_end", "give_up", "relay"]

HOP_BY_HOP: Final = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer transfer-encoding "
    b"upgrade".split()
)
_NAMES_NO_HEADER: Final = frozenset((b"keep-alive", b"Keep-Alive", b"close"))  # what most say of their connection

_OK: Final = Outcome.OK  # bound once: Python 3.11 takes 90 ns to look up a member of an enumeration


async def relay(reply: Reply, first: bytes, tee: Tee, down: Downstream) -> None:
    """Pass the reply on. The exchange is in the spool before the last byte is handed over."""
    passing = _Passing(reply, tee, down)
    chunk = first
    while not reply.complete:
        passing.pass_on(chunk)
        if down.slow:
            await down.drain()
        started = time.perf_counter()
        try:
            chunk = await reply.read(passing.take)
        finally:
            tee.call.waited += time.perf_counter() - started
    passing.end(chunk)


class _Passing:
    """A reply on its way."""

    def __init__(self, reply: Reply, tee: Tee, down: Downstream) -> None:
        """Begins it with the head."""
        self._outcome = _OK if reply.status < 400 else Outcome.UPSTREAM_ERROR
        self._tee = tee
        self._down = down
        self._usage = UsageFilter() if tee.asked_usage and tee.stream and not tee.encoding else None
        headers = _headers_down(reply.headers, tee)
        if self._usage is not None:
            headers = [header for header in headers if header[0] != b"content-length"]
        down.start(reply.status, headers)

    def take(self, chunk: bytes) -> bool:
        """Pass on what comes while it is waited for. False where the client is slow."""
        started = time.perf_counter()
        self.pass_on(chunk)
        self._tee.call.waited -= time.perf_counter() - started
        return not self._down.slow

    def pass_on(self, chunk: bytes) -> None:
        """Some bytes that are not the last; what they end, as `[DONE]` does, is in the log before."""
        if not chunk:
            return
        if self._tee.feed(chunk):
            self._tee.close(self._outcome)
        if self._usage is not None:
            chunk = self._usage.feed(chunk)
        if chunk:
            self._down.write(chunk)

    def end(self, chunk: bytes) -> None:
        """The last bytes, or none."""
        if chunk:
            self._tee.feed(chunk)
        self._tee.close(self._outcome)
        if self._usage is not None:
            chunk = self._usage.feed(chunk) + self._usage.flush()
        self._tee.call.finished = True
        self._down.end(chunk)


def give_up(error: UpstreamError, tee: Tee, down: Downstream) -> None:
    """No target answered: an error in OpenAI's shape; after the reply has begun, a stream that ends as broken."""
    if tee.status:
        tee.close(Outcome.TIMEOUT if isinstance(error, UpstreamTimeout) else Outcome.UPSTREAM_CUT, str(error))
        tee.call.finished = True
        return
    status, outcome, code = _verdict(error)
    shed = outcome is Outcome.SHED
    what = "the gateway has no room for this call" if shed else "the upstream did not answer"
    body = error_body(f"{what}: {error}", kind="server_error" if shed else "upstream_error", code=code)
    tee.status = status
    tee.feed(body)
    tee.close(outcome, str(error))
    tee.call.finished = True
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *_own_headers(tee)]
    if shed:
        headers.append((b"retry-after", b"1"))
    down.start(status, headers)
    down.end(body)


def _verdict(error: UpstreamError) -> tuple[int, Outcome, str]:
    """Status, outcome and code of a call that no target answered."""
    if isinstance(error, Shed):
        return 503, Outcome.SHED, "overloaded"
    if isinstance(error, UpstreamTimeout):
        return 504, Outcome.TIMEOUT, "timeout"
    return 502, Outcome.UPSTREAM_CUT if isinstance(error, UpstreamCut) else Outcome.UPSTREAM_ERROR, "unreachable"


def _headers_down(headers: Headers, tee: Tee) -> list[tuple[bytes, bytes]]:
    return [header for header in end_to_end(headers) if header[0] not in HOP_BY_HOP] + _own_headers(tee)


def end_to_end(headers: Headers) -> Headers:
    """Without those that `Connection` says are of this hop (RFC 9110, section 7.6.1)."""
    said = [value for name, value in headers if name == b"connection"]
    if not said or (len(said) == 1 and said[0] in _NAMES_NO_HEADER):
        return headers
    named = {name.strip().lower() for name in b",".join(said).split(b",")}
    return [(name, value) for name, value in headers if name not in named]


def _own_headers(tee: Tee) -> list[tuple[bytes, bytes]]:
    call = tee.call
    overhead = time.perf_counter() - call.received - call.waited
    return [
        (b"x-understudy-exchange-id", call.id.encode()),
        (b"x-understudy-model", _header_value(tee.target.name if tee.target else "")),
        (b"x-understudy-arm", tee.arm.encode()),
        (b"x-understudy-overhead-ms", b"%.3f" % (overhead * 1000)),
    ]


@lru_cache(maxsize=1024)
def _header_value(text: str) -> bytes:
    """Text as a header may carry it."""
    return "".join(c if " " <= c <= "~" else "?" for c in text).encode()
