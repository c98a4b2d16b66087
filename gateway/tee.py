"""The tee: sees a reply's bytes as they pass, and puts the whole exchange into the spool before the reply's end."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Final, Protocol

from gateway.assemble import usage_of
from gateway.auth import Key
from gateway.concurrency import Place
from gateway.errors import CannotRedact
from gateway.exchanges import body_of, rates
from gateway.fields import Fields, Tags
from gateway.metering import END
from gateway.records import Arm, Attempt, MirrorFate, Outcome
from gateway.redact import Redacted, Redactor
from gateway.spool import PIECE, Kind
from gateway.telemetry import Metrics
from gateway.tracing import Trace
from routing.policy import Decision
from routing.targets import MirrorTarget, Pii, Price, Target

__all__ = ["Downstream", "Inbound", "Mirroring", "Sink", "Tee", "log_header", "record_masked"]

_DONE: Final = b"data: [DONE]"
_DONE_CLOSE: Final = b"data:[DONE]"
_COMPLETED: Final = b'"type":"response.completed"'
_CARRY: Final = 32
_OK: Final = Outcome.OK
_INCUMBENT: Final = Arm.INCUMBENT
_WHOLE: Final = Kind.WHOLE
DEFAULT: Final = "default"


class Account(Protocol):
    """Whom a call is charged to: gateway.gate.Account."""

    key: Key

    def charge(self, end: bytes, price: Price | None, *, sent: int, size: int, stream: bool, encoding: str) -> None: ...


class Inbound:
    """One call as it came in. Times are seconds of time.perf_counter, but for `timestamp` (epoch)."""

    def __init__(
        self,
        *,
        id: str,
        timestamp: float,
        received: float,
        path: str,
        query: str,
        headers: Sequence[tuple[bytes, bytes]],
        body: bytes,
        method: str = "POST",
        passed_on: bool = False,
        trace: Trace | None = None,
    ) -> None:
        self.id = id
        self.timestamp = timestamp
        self.received = received
        self.path = path
        self.query = query
        self.headers = headers
        self.body = body
        self.method = method
        self.passed_on = passed_on  # no call with a workload: its body is nobody's business
        self.trace = trace  # None where nothing is traced
        self.spooled = 0  # bytes of the body that are in the spool already
        self.account: Account | None = None  # of its key; None where the gateway asks for none
        self.waited = 0.0  # spent waiting for upstreams
        self.finished = False
        self.gone = False

    def copied(self, id: str, timestamp: float, trace: Trace | None) -> "Inbound":
        """A mirror's: the same call under another id, in another trace."""
        copy = Inbound(
            id=id,
            timestamp=timestamp,
            received=self.received,
            path=self.path,
            query=self.query,
            headers=self.headers,
            body=self.body,
            method=self.method,
            passed_on=self.passed_on,
            trace=trace,
        )
        copy.account = self.account
        return copy


class Sink(Protocol):
    """Where an exchange goes: gateway.spool.Spool."""

    @property
    def refusing(self) -> bool: ...

    def begin(self, header: dict[str, Any], request: bytes) -> Kind | None: ...

    def append(self, header: dict[str, Any], request: bytes, response: Sequence[bytes] = ()) -> bool: ...

    def pieces(self, call: dict[str, Any], kind: Kind, body: bytes, at: int) -> None: ...

    def record(self, header: dict[str, Any], request: bytes, response: Sequence[bytes] = ()) -> bool: ...

    async def run(self) -> None: ...

    def close(self) -> None: ...


class Downstream(Protocol):
    """The way back to the client: gateway.relayed.Relayed. `start`, then any number of `write`, then `end`, once.

    Nothing here waits; while `slow`, the caller is to await `drain`. `started` turns true with the reply's head.
    """

    keep_alive: bool
    started: bool

    @property
    def slow(self) -> bool: ...

    async def drain(self) -> None: ...

    def start(self, status: int, headers: Sequence[tuple[bytes, bytes]]) -> None: ...

    def write(self, chunk: bytes) -> None: ...

    def end(self, chunk: bytes) -> None: ...


class Mirroring(Protocol):
    """Sends copies: gateway.mirror.Mirrors. `reserve` decides at once, `launch` sends what was reserved."""

    def reserve(self, mirror: MirrorTarget) -> MirrorFate: ...

    def launch(self, mirror: MirrorTarget, call: Inbound, fields: Fields, decision: Decision, tags: Tags) -> None: ...


class Tee:
    """One exchange in the making. `close` is synchronous and takes effect once, however the reply ends."""

    def __init__(
        self,
        *,
        call: Inbound,
        fields: Fields,
        tags: Tags,
        decision: Decision,
        snapshot: str,
        sink: Sink,
        mirrors: Mirroring,
        metrics: Metrics,
        redactor: Redactor,
    ) -> None:
        """`redactor` is used where a workload's data must not even reach the spool unmasked."""
        self.call = call
        self.fields = fields
        self.tags = tags
        self.decision = decision
        self.target: Target | None = None
        self.arm = _INCUMBENT
        self.status = 0
        self.encoding = ""
        self.stream = False
        self.asked_usage = False  # the gateway asked for the stream's tokens, the client did not
        self.attempts: list[Attempt] = []
        self.place: Place | None = None  # held at a model whose calls are limited
        self._snapshot = snapshot
        self._sink = sink
        self._mirrors = mirrors
        self._metrics = metrics
        self._redactor = redactor
        self._logged: dict[str, Any] = {}  # what the log has of the call from its beginning
        self._end_with = _WHOLE
        self._chunks: list[bytes] = []
        self._held = 0  # bytes in `_chunks`
        self._spooled = 0  # bytes of the reply that are in the spool already
        self._tail = b""
        self._end = b""  # the last bytes of the piece that was spooled last
        self._first = 0.0
        self._closed = False

    def open(self) -> bool:
        """Log what is known so far: a gateway that is killed now leaves the request behind. False: there is no room."""
        self._logged = header = log_header(self.call, self.tags, self.decision)
        header["config_snapshot"], header["arm"] = self._snapshot, self.decision.arm
        hidden = self.decision.route.privacy.before_spool
        if hidden:
            header = header | _masked_fields(header, self._redactor)
        kind = self._sink.begin(header, b"" if hidden else self._request())
        self._end_with = kind or _WHOLE
        return kind is not None

    def head(self, target: Target, arm: Arm, status: int, headers: Sequence[tuple[bytes, bytes]]) -> None:
        """The reply's head is here, from `target`."""
        self.target, self.arm, self.status = target, arm, status
        for name, value in headers:
            if name == b"content-encoding":
                self.encoding = value.decode("latin-1").strip().lower()
            elif name == b"content-type":
                self.stream = value.startswith(b"text/event-stream")

    def feed(self, chunk: bytes) -> bool:
        """Keep a chunk. True when it holds the end of the stream, so that the exchange must be logged before it."""
        if not self._first:
            self._first = time.perf_counter()
        if self._closed:
            return False
        self._keep(chunk)
        if not self.stream or self.encoding:
            return False
        window = self._tail + chunk
        self._tail = window[-_CARRY:]
        return _DONE in window or _DONE_CLOSE in window or _COMPLETED in window

    def close(self, outcome: Outcome, error: str = "") -> None:
        """Log the exchange, then send its mirrors. Later calls do nothing."""
        if self._closed:
            return
        self._closed = True
        if self.place is not None:
            self.leave()
        now = time.perf_counter()
        own = self.target is None or self.target is self.decision.target
        wanted = self.decision.mirrors if outcome is _OK and own else ()
        fates = [(mirror, self._mirrors.reserve(mirror)) for mirror in wanted]
        header = self._header(outcome, error, now)
        if self.call.trace is not None:
            self.call.trace.end_log(header)
        if fates:
            header["mirror"] = fates[0][1]
        kind = self._end_with
        privacy = self.decision.route.privacy
        if privacy.before_spool:
            record_masked(self._sink, header, self.call.body, b"".join(self._chunks), privacy.pii, self._redactor)
        elif kind is _WHOLE:
            self._sink.append(header, self._request(), self._chunks)
        else:
            self._sink.append(header | {"frame": kind}, b"", self._chunks)
        if (account := self.call.account) is not None and account.key.metered:
            self._charge(account)
        self._chunks = []
        for mirror, fate in fates:
            if fate is MirrorFate.SENT:
                self._mirrors.launch(mirror, self.call, self.fields, self.decision, self.tags)
        latency = now - self.call.received
        self._metrics.exchange(header["workload_id"], self.arm, outcome, latency, latency - self.call.waited)

    def leave(self) -> None:
        """Give the place back, where there is one: the model has done its part."""
        if self.place is not None:
            self.place.leave()
            self.place = None

    def _keep(self, chunk: bytes) -> None:
        """Hold a little of the reply, and spool the rest as it passes."""
        self._chunks.append(chunk)
        self._held += len(chunk)
        if self._held >= PIECE and not self.decision.route.privacy.before_spool:
            piece = b"".join(self._chunks)
            self._sink.pieces({"id": self.call.id}, Kind.RESPONSE, piece, self._spooled)
            self._end = piece[-END:]
            self._spooled += self._held
            self._chunks, self._held = [], 0

    def _charge(self, account: Account) -> None:
        if self.target is None or not 0 < self.status < 400:
            return
        account.charge(
            self._end + b"".join(self._chunks),
            self.target.model.price,
            sent=len(self.call.body),
            size=self._spooled + self._held,
            stream=self.stream,
            encoding=self.encoding,
        )

    def _request(self) -> bytes:
        """The part of the request that is not in the spool yet."""
        return self.call.body[self.call.spooled :] if self.call.spooled else self.call.body

    def _header(self, outcome: Outcome, error: str, now: float) -> dict[str, Any]:
        """What the log has of the call from its beginning, and what its end adds."""
        call, decision, target, header = self.call, self.decision, self.target, self._logged
        header["arm"] = self.arm
        header["outcome"] = outcome
        header["status"] = self.status
        header["latency_ms"] = _milliseconds(now - call.received)
        if self._first:
            header["ttft_ms"] = _milliseconds(self._first - call.received)
        if target is not None:
            header["model"] = target.name
            header["provider"] = target.model.provider
            if target.model.price is not None:
                header["price"] = rates(target.model.price)
        if self.stream:
            header["stream"] = True
        if self.encoding:
            header["encoding"] = self.encoding
        if self.attempts:
            header["attempts"] = [asdict(attempt) for attempt in self.attempts]
        if decision.rollout:
            header["rollout"] = decision.rollout
        if decision.breaker:
            header["breaker"] = decision.breaker
        if error:
            header["error"] = error
        return header


def _milliseconds(seconds: float) -> float:
    """To the microsecond: as round() has it, at a third of its cost."""
    return int(seconds * 1e6 + 0.5) / 1000


def log_header(call: Inbound, tags: Tags, decision: Decision | None, pii: Pii = "off") -> dict[str, Any]:
    """What the log keeps of a call, whatever becomes of it; what is not there is as an Exchange has it by default.

    A call that names a workload which routing.yaml does not have yet takes the default route under its own name.
    """
    routed = decision.route.workload if decision else DEFAULT
    pii = decision.route.privacy.pii if decision else pii
    header = {
        "id": call.id,
        "timestamp": call.timestamp,
        "workload_id": routed if routed != DEFAULT else tags.workload or DEFAULT,
        "path": call.path,
    }
    if tags.client:
        header["client_id"] = tags.client
    if tags.session:
        header["session_id"] = tags.session
    if pii != "off":
        header["pii"] = pii
    if call.trace is not None:
        call.trace.begin_log(header)
    if call.passed_on:
        header["method"] = call.method
    return header


def record_masked(
    sink: Sink, header: dict[str, Any], request: bytes, response: bytes, pii: Pii, redactor: Redactor
) -> None:
    """Log an exchange of which no byte may reach the disk as it passed. What cannot be searched is left out."""
    header |= _masked_fields(header, redactor)
    usage = usage_of(body_of(response, header))
    header |= {"usage": asdict(usage) if usage else None}
    kept = Redacted(request=b"", response=b"", counts={"body": 2})
    if pii == "mask":
        try:
            kept = redactor.redact_bytes(request, response, encoding=header.get("encoding", ""))
        except CannotRedact as error:
            header["error"] = header.get("error") or f"not kept: {error}"
    header |= {"redacted": kept.counts, "encoding": "", "assembled": True}
    sink.record(header, kept.request, (kept.response,))


def _masked_fields(header: dict[str, Any], redactor: Redactor) -> dict[str, Any]:
    ids = {name: redactor.tag(header.get(name, "")) for name in ("client_id", "session_id")}
    told = {"error": header.get("error", ""), "attempts": header.get("attempts", [])}
    masked: dict[str, Any] = redactor.mask(told)[0]
    return ids | masked
