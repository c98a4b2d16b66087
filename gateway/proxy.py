"""One call: tag it, choose its target, send it up, relay the reply through the tee. See README.md for the picture."""

import asyncio
import random
import time
from typing import Final

from gateway.auth import identified
from gateway.breaker import Breakers
from gateway.concurrency import Rooms
from gateway.errors import RequestRefused, UpstreamCut, UpstreamError, UpstreamTimeout
from gateway.fields import Fields, Tags, read_fields
from gateway.gate import allow
from gateway.include_usage import with_usage
from gateway.readable import readable
from gateway.records import Arm, Attempt, Outcome
from gateway.redact import Redactor
from gateway.relay import HOP_BY_HOP, end_to_end, give_up, relay
from gateway.retry import FIRST, Try, after, cause_of, deadline_of, is_fault, retry_after, target_of, told, within
from gateway.snapshot import Snapshot
from gateway.spool import Kind
from gateway.tagging import conversation_of, tag, with_model
from gateway.tee import DEFAULT, Downstream, Inbound, Mirroring, Sink, Tee, log_header
from gateway.telemetry import Metrics
from gateway.upstream import Headers, Reply, Upstream, UpstreamRequest
from routing.labels import labels_of
from routing.matching import Asked
from routing.policy import Call, Decision, choose, match, named
from routing.recent import Recent
from routing.request import ToolSet, system_of, tools_of
from routing.targets import Model, Ref, Route, RouteTable, Target, resolve

__all__ = ["LOG_FULL", "Proxy", "log_full", "upstream_path"]

LOG_FULL: Final = "log_full"

# Bound once: Python 3.11 takes 90 ns to look up a member of an enumeration.
_INCUMBENT: Final = Arm.INCUMBENT
_CANDIDATE: Final = Arm.CANDIDATE

_NOT_UP: Final = HOP_BY_HOP | {b"host", b"content-length", b"expect"}
_CREDENTIALS: Final = frozenset(
    b"authorization cookie x-api-key api-key "
    b"helicone-auth x-litellm-api-key x-portkey-api-key x-portkey-virtual-key".split()
)
_TOOLS: Final = 4 * 1024 * 1024  # bytes of tool sets whose names and fingerprints are remembered
_NO_TOOLS: Final = ToolSet()
_LARGE: Final = 1024 * 1024  # bytes of a body that takes a millisecond to read or to rewrite


class Proxy:
    """Passes calls through. Holds what a worker shares: the pool, the snapshot, the breakers, the spool."""

    def __init__(
        self,
        *,
        upstream: Upstream,
        snapshot: Snapshot,
        breakers: Breakers,
        rooms: Rooms,
        sink: Sink,
        mirrors: Mirroring,
        metrics: Metrics,
        redactor: Redactor,
    ) -> None:
        self._upstream = upstream
        self._snapshot = snapshot
        self._breakers = breakers
        self._rooms = rooms
        self._sink = sink
        self._mirrors = mirrors
        self._metrics = metrics
        self._redactor = redactor
        self._tools = Recent(tools_of, _TOOLS)

    async def handle(self, call: Inbound, down: Downstream) -> None:
        """Serve one call to its end. Raises RequestRefused when it is not one; anything else becomes a reply."""
        table = self._snapshot.table
        if call.passed_on:
            fields = Fields()
            tags, decision = self._pass_on(table, call)
        else:
            fields = read_fields(call.body)
            tags, decision = self._decide(table, call, fields)
        tee = Tee(
            call=call,
            fields=fields,
            tags=tags,
            decision=decision,
            snapshot=table.snapshot,
            sink=self._sink,
            mirrors=self._mirrors,
            metrics=self._metrics,
            redactor=self._redactor,
        )
        if not tee.open() and self._sink.refusing:
            raise log_full()
        try:
            reply, first = await self._first_byte(call, tee)
            try:
                await relay(reply, first, tee, down)
            finally:
                reply.close()
            if self._breakers.failures:
                self._answered(tee)
        except UpstreamError as error:
            if tee.status and tee.target is not None:
                self._failed(tee, tee.target)
            give_up(error, tee, down)
        except asyncio.CancelledError:
            tee.close(Outcome.CLIENT_GONE if call.gone else Outcome.GATEWAY_KILLED)
            if not call.gone:
                raise
        finally:
            tee.close(Outcome.GATEWAY_KILLED, "unexpected end")

    def refuse(self, call: Inbound, error: RequestRefused) -> None:
        """Log a call that the gateway itself turned down; one for which the log has no room is counted."""
        if error.code == LOG_FULL:
            self._metrics.dropped("refused")
            return
        self._unserved(call, Outcome.SHED if error.status == 503 else Outcome.REFUSED, error.status, str(error))

    def gone(self, call: Inbound) -> None:
        """Log a call whose client left before all of it was here."""
        self._unserved(call, Outcome.CLIENT_GONE, 0, "the client left within its request")

    def unread(self, error: RequestRefused) -> None:
        """Count what was turned down before it was a call."""
        self._metrics.unread(error.status)

    def spool_part(self, call: Inbound, part: bytes) -> None:
        """Log what has come of a large body since the last time, unless somebody's must not reach the disk unmasked.

        Whose it is will be known when all of it is here; until then its bytes are nobody's to keep.
        """
        policies = [route.privacy for route in self._snapshot.table.every_route]
        if any(policy.before_spool for policy in policies):
            return
        pii = "drop" if any(policy.pii != "off" for policy in policies) else ""
        about = {"id": call.id, "timestamp": call.timestamp, "path": call.path, "workload_id": DEFAULT, "pii": pii}
        self._sink.pieces(about, Kind.REQUEST, part, call.spooled)
        call.spooled += len(part)

    def _unserved(self, call: Inbound, outcome: Outcome, status: int, error: str) -> None:
        _, tags = _identity(call, Fields())
        table = self._snapshot.table
        privacy = table.route_of(tags.workload).privacy
        header = log_header(call, tags, None, privacy.pii) | {
            "arm": Arm.INCUMBENT,
            "outcome": outcome,
            "status": status,
            "latency_ms": round((time.perf_counter() - call.received) * 1000, 3),
            "config_snapshot": table.snapshot,
            "error": error,
        }
        if call.trace is not None:
            call.trace.end_log(header)
        self._sink.record(header, b"" if privacy.before_spool else call.body[call.spooled :])
        self._metrics.exchange(header["workload_id"], Arm.INCUMBENT, outcome, 0.0, 0.0)

    def _decide(self, table: RouteTable, call: Inbound, fields: Fields) -> tuple[Tags, Decision]:
        headers, tags = _identity(call, fields)
        route, by = named(table, headers, tags.metadata) or match(
            table, self._asked(table, call.path, headers, tags, fields)
        )
        _allow(call, route)
        if by == "nothing":
            self._metrics.untagged()
        ramping = (overlay := table.overlays.get(route.workload)) is not None and 0 < overlay.weight < 100
        conversation = conversation_of(fields) if (ramping or route.split) and not (tags.session or tags.user) else ""
        subject = Call(
            workload=route.workload,
            exchange_id=call.id,
            session=tags.session,
            user=tags.user,
            conversation=conversation,
            stateful=bool(fields.previous_response_id or fields.conversation),
        )
        return tags, choose(table, subject, self._breakers.open_at(call.received))

    def _pass_on(self, table: RouteTable, call: Inbound) -> tuple[Tags, Decision]:
        """A call whose state may live on one upstream goes to what serves by routing.yaml, and nowhere else."""
        _, tags = _identity(call, Fields())
        _allow(call, table.default)
        target = resolve(table.models, Ref.parse(table.default.serve)) or table.default_plan.incumbent
        return tags, Decision(
            route=table.default, target=target, arm="incumbent", fallbacks=(), mirrors=(), reason="passed on"
        )

    def _asked(self, table: RouteTable, path: str, headers: dict[str, str], tags: Tags, fields: Fields) -> Asked:
        """What rules look at; of the body only what some rule of the table wants to know."""
        matching, system = table.matching, ""
        tools = self._tools(bytes(fields.tools)) if matching.reads_tools and len(fields.tools) else _NO_TOOLS
        if matching.reads_system:
            messages = fields.messages if len(fields.messages) else fields.input
            system = system_of(memoryview(messages), bytes(fields.instructions))
        model = fields.model if isinstance(fields.model, str) else ""
        return Asked(headers, tags.metadata, model, path, tags.client, tools.names, tools.fingerprint, system)

    async def _first_byte(self, call: Inbound, tee: Tee) -> tuple[Reply, bytes]:
        """A reply and its first bytes: from the decision's target, or from the first later try that has them.

        Nothing has gone to the client yet, so a failure here is not seen. Raises the last try's UpstreamError.
        """
        this, decision = FIRST, tee.decision
        while True:
            target = target_of(decision, this)
            arm = _CANDIDATE if decision.arm == "candidate" and not this.position else _INCUMBENT
            started = time.perf_counter()
            if call.trace is not None:
                call.trace.tried(started, target)
            try:
                reply, first = await self._try(call, tee, this, target, arm)
            except UpstreamError as error:
                tee.target, tee.arm = target, arm
                tee.attempts.append(_attempt(target, arm, told(error), started))
                following = self._after(call, tee, this, cause_of(error))
                if following is None:
                    raise
            else:
                status = reply.status
                following = self._after(call, tee, this, str(status), reply.headers) if status >= 400 else None
                if following is None:
                    self._settle(tee, status)
                    tee.head(target, arm, status, reply.headers)
                    return reply, first
                reply.close()
                tee.attempts.append(_attempt(target, arm, f"status {status}", started))
            tee.leave()
            call.waited += following.wait
            await asyncio.sleep(following.wait)
            this = following

    async def _try(self, call: Inbound, tee: Tee, this: Try, target: Target, arm: Arm) -> tuple[Reply, bytes]:
        fields, model = tee.fields, target.model
        if model.limits is not None:
            tee.place = self._rooms.take(model, model.limits)
        if this is not FIRST or (model.limits is not None and tee.place is None):
            model = await self._admitted(call, tee, model)
        if self._breakers.failures:
            self._breakers.calling(target.name, tee.decision.route.breaker, time.perf_counter())
        large = len(call.body) > _LARGE
        if large:
            await asyncio.sleep(0)  # it was parsed just now: others are to have their turn between
        own = arm is _INCUMBENT and target.ref.adapter is None
        headers = _headers_up(call.headers, model.api_key, keep_credentials=own)
        body = call.body if call.passed_on else with_model(call.body, fields, model.model)
        if tee.decision.route.include_usage and (asking := with_usage(body, fields)) is not None:
            body, tee.asked_usage = asking, True
            headers = [header for header in headers if header[0] != b"accept-encoding"]
        if call.trace is not None:
            call.trace.carry(headers)
        path = upstream_path(call.path, call.query)
        request = UpstreamRequest(
            method=call.method, path=path, headers=headers, body=body, repeatable=_repeatable(call, fields)
        )
        if large:
            await asyncio.sleep(0)
        started = time.perf_counter()
        try:
            reply = await self._upstream.send(model, request)
            try:
                first = await reply.read()
                if arm is _CANDIDATE and reply.status < 400 and not readable(reply, first):
                    raise UpstreamCut(f"{target.name}: its reply is neither JSON nor an event stream")
                return reply, first
            except BaseException:
                reply.close()
                raise
        finally:
            call.waited += time.perf_counter() - started

    async def _admitted(self, call: Inbound, tee: Tee, model: Model) -> Model:
        """Wait for a place where there was none; the model, with no more time than the call has left."""
        due = call.received + deadline_of(tee.decision)
        if model.limits is not None and tee.place is None:
            started = time.perf_counter()
            tee.place = await self._rooms.wait(model, model.limits, due - started)
            self._metrics.queued(model.name, time.perf_counter() - started)
        left = due - time.perf_counter()
        if left <= 0:
            raise UpstreamTimeout(f"{model.name}: the call's total deadline passed before it could be sent")
        return within(model, left)

    def _after(self, call: Inbound, tee: Tee, this: Try, cause: str, headers: Headers = ()) -> Try | None:
        """Count a failed try; what follows it."""
        decision = tee.decision
        target = target_of(decision, this)
        self._metrics.failed_try(target.name, cause)
        if call.trace is not None:
            call.trace.failed(cause)
        if is_fault(decision, this, cause):
            self._failed(tee, target)
        left = call.received + deadline_of(decision) - time.perf_counter()
        asked = retry_after(headers, time.time())
        return after(decision, this, cause, left=left, asked=asked, chance=random.random())

    def _settle(self, tee: Tee, status: int) -> None:
        """A candidate's 4xx is its fault only where another target then served the same request."""
        first = tee.attempts[0] if tee.attempts and status < 400 else None
        if first is not None and first.arm == Arm.CANDIDATE and first.error.startswith("status 4"):
            self._failed(tee, tee.decision.target)

    def _failed(self, tee: Tee, target: Target) -> None:
        if self._breakers.failed(target.name, tee.decision.route.breaker, time.perf_counter()):
            self._metrics.breaker_opened(target.name)

    def _answered(self, tee: Tee) -> None:
        """A reply is over that shows its target well; a candidate's 4xx shows nothing."""
        if tee.target is None or tee.status >= (400 if tee.arm is Arm.CANDIDATE else 500):
            return
        if self._breakers.succeeded(tee.target.name):
            self._metrics.breaker_closed(tee.target.name)


def _identity(call: Inbound, fields: Fields) -> tuple[dict[str, str], Tags]:
    """The call's headers, and whom it comes from: what its key says counts for more than what it says itself."""
    headers = _lower(call.headers)
    call.headers = end_to_end(call.headers)
    fields.metadata = labels_of(headers, fields.metadata, fields.tensorzero_tags, fields.tensorzero_episode)
    if call.account is not None:
        headers, fields.metadata = identified(headers, fields.metadata, call.account.key)
    return headers, tag(headers, fields)


def _allow(call: Inbound, route: Route) -> None:
    """Raises RequestRefused where the call's key may not use what serves the route."""
    if call.account is not None and call.account.key.models:
        allow(call.account.key, Ref.parse(route.serve).model)


def log_full() -> RequestRefused:
    """The refusal of a gateway that is set to serve nothing that it cannot log."""
    return RequestRefused(503, "the log is full and set to refuse calls", code=LOG_FULL, kind="server_error")


def _repeatable(call: Inbound, fields: Fields) -> bool:
    """Whether a call leaves nothing behind that a second one would double."""
    if call.passed_on:
        return call.method == "GET"
    return not (fields.previous_response_id or fields.conversation)


def upstream_path(path: str, query: str) -> str:
    """The path below a base URL that ends in `/v1`."""
    below = path.removeprefix("/v1")
    return f"{below}?{query}" if query else below


def _attempt(target: Target, arm: Arm, error: str, started: float) -> Attempt:
    return Attempt(model=target.name, arm=arm, error=error, latency_ms=round((time.perf_counter() - started) * 1000, 3))


def _headers_up(headers: Headers, api_key: str | None, *, keep_credentials: bool) -> list[tuple[bytes, bytes]]:
    kept = [
        (name, value)
        for name, value in headers
        if name not in _NOT_UP and ((keep_credentials and api_key is None) or name not in _CREDENTIALS)
    ]
    if api_key is not None:
        kept.append((b"authorization", b"Bearer " + api_key.encode()))
    return kept


def _lower(headers: Headers) -> dict[str, str]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}
