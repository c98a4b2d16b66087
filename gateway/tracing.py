"""A call's place in a trace: W3C context in and out, sampling, and what the log keeps for its spans. On the hot path.

Nothing of OpenTelemetry is loaded here. What a span needs goes into the spool with the exchange; gateway.spans makes
the spans of it, in the teller's process.
"""

import re
import time
from collections.abc import Sequence
from functools import lru_cache
from random import getrandbits
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

from gateway.signals import Sampling, Signals
from gateway.upstream import Headers
from routing.proxies import port_of
from routing.targets import Target

__all__ = ["SpooledEnd", "SpooledTrace", "SpooledTry", "Trace", "Tracing", "tracing_of"]

_PARENT: Final = re.compile(rb"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_STATE: Final = 512  # bytes: what everybody must pass on (W3C Trace Context, 3.3.1.5)
_LOWER: Final = (1 << 64) - 1
_SAMPLED: Final = 1
_KNOWN_FLAGS: Final = 3  # sampled, and random-trace-id of level 2


class SpooledTry(NamedTuple):
    """One try of a target: when it began (epoch seconds), whom it asked, and why it failed ("" where it did not)."""

    started: float
    name: str
    provider: str
    model: str
    host: str
    port: int
    cause: str


class SpooledTrace(NamedTuple):
    """What the spool keeps of a sampled call from its beginning. Its n-th try (from 1) is the span `span_id + n`.

    `parent` and `state` are the caller's, "" without one; `link` is a mirror's original: its trace id and span id.
    """

    span_id: int
    parent: str
    state: str
    link: tuple[str, int] | None


class SpooledEnd(NamedTuple):
    """What the spool keeps of a sampled call at its end; `ended` is in epoch seconds."""

    ended: float
    tries: Sequence[SpooledTry]


class Trace:
    """One call's place in a trace. Ids of spans are numbers; the trace's is its 32 digits."""

    __slots__ = ("_begun", "_dropped", "_flags", "_span_id", "_tries", "trace_id")

    def __init__(
        self,
        trace_id: str,
        flags: int,
        dropped: frozenset[bytes] | None = None,
        parent: str = "",
        state: str = "",
        link: tuple[str, int] | None = None,
    ) -> None:
        """`dropped` are the caller's headers that are not to go on; None where there are none."""
        self.trace_id = trace_id
        self._flags = flags
        self._dropped = dropped
        self._span_id = span_id = getrandbits(63) + 1  # never 0, and room above it for the tries'
        self._begun = (span_id, parent, state, link)
        self._tries: list[list[Any]] = []

    def tried(self, started: float, target: Target) -> None:
        """A try begins, at `started` of time.perf_counter."""
        self._tries.append([started, target, ""])

    def failed(self, cause: str) -> None:
        """The try that began last has failed; `cause` as gateway.retry has it."""
        self._tries[-1][2] = cause

    def carry(self, headers: list[tuple[bytes, bytes]]) -> None:
        """Have headers name the try that began last as the upstream's parent, instead of who called us."""
        if (dropped := self._dropped) is not None:
            headers[:] = [header for header in headers if header[0] not in dropped]
        span_id = self._span_id + len(self._tries)
        headers.append((b"traceparent", b"00-%b-%016x-%02x" % (self.trace_id.encode(), span_id, self._flags)))

    def copied(self) -> "Trace":
        """A mirror's: a trace of its own that is linked to this one, and sampled when this one is."""
        return Trace(f"{getrandbits(128):032x}", self._flags & _SAMPLED, link=(self.trace_id, self._span_id))

    def begin_log(self, header: dict[str, Any]) -> None:
        """Put what is known at the beginning into a frame's header: `span`, a SpooledTrace, of a sampled call alone."""
        header["trace_id"] = self.trace_id
        if self._flags & _SAMPLED:
            header["span"] = self._begun

    def end_log(self, header: dict[str, Any]) -> None:
        """Put `span_end`, a SpooledEnd that ends now, into a frame's header; of a sampled call alone."""
        if self._flags & _SAMPLED:
            now = time.time()
            behind = now - time.perf_counter()
            tries = [(behind + started, *_about(target), cause) for started, target, cause in self._tries]
            header["span_end"] = (now, tries)


_OURS: Final = frozenset((b"traceparent",))
_BOTH: Final = frozenset((b"traceparent", b"tracestate"))


class Tracing:
    """Takes the context of a call in, or begins a trace."""

    def __init__(self, sampling: Sampling) -> None:
        self._parent_based = sampling.parent_based
        self._bound = sampling.bound

    def begin(self, headers: Headers) -> Trace:
        """The trace that a call with these headers belongs to. A context that is not W3C's is as none."""
        parent = state = b""
        for name, value in headers:
            if name == b"traceparent":
                parent = b"twice" if parent else value
            elif name == b"tracestate":
                state = b"%b,%b" % (state, value) if state else value
        if parent and (found := _PARENT.fullmatch(parent)) is not None and (not found[5] or found[1] != b"00"):
            return self._below(found, state)
        number = getrandbits(128) or 1
        return Trace(
            number.to_bytes(16, "big").hex(), (number & _LOWER) < self._bound, _BOTH if parent or state else None
        )

    def _below(self, found: re.Match[bytes], state: bytes) -> Trace:
        flags = int(found[4], 16) & _KNOWN_FLAGS
        if not self._parent_based:
            flags = flags & ~_SAMPLED | (int(found[2][16:], 16) < self._bound)
        kept = state.decode("latin-1") if len(state) <= _STATE else ""
        return Trace(found[2].decode(), flags, _OURS, found[3].decode(), kept)


def tracing_of(signals: Signals) -> Tracing | None:
    """None where nothing is traced, so that a call's headers pass untouched."""
    return Tracing(signals.sampling) if signals.traces else None


def _about(target: Target) -> tuple[str, str, str, str, int]:
    model = target.model
    return (target.name, model.provider, model.model, *_address(model.base_url))


@lru_cache(maxsize=1024)
def _address(base_url: str) -> tuple[str, int]:
    parts = urlsplit(base_url)
    return parts.hostname or "", port_of(parts)
