"""Mirrors: copies of sampled requests, sent to a candidate off the client's path, under a cap and a budget."""

import time
from typing import Any, Final

from gateway.assemble import usage_of
from gateway.errors import UpstreamError, UpstreamTimeout
from gateway.exchanges import body_of, cost_of, rates
from gateway.fields import Fields, Tags
from gateway.ids import new_id
from gateway.records import Arm, MirrorFate, Outcome
from gateway.redact import Redactor
from gateway.tagging import with_model
from gateway.tasks import Tasks
from gateway.tee import Inbound, Sink, log_header, record_masked
from gateway.telemetry import Metrics
from gateway.upstream import Upstream, UpstreamRequest
from routing.policy import Decision
from routing.targets import MirrorTarget, Price

__all__ = ["Mirrors"]

_DAY: Final = 86_400
_MAX_REPLY: Final = 16 * 1024 * 1024


class Mirrors:
    """Sends mirrors with a pool of its own. The client's credentials never go with them."""

    def __init__(self, *, upstream: Upstream, sink: Sink, metrics: Metrics, redactor: Redactor) -> None:
        self._upstream = upstream
        self._sink = sink
        self._metrics = metrics
        self._redactor = redactor
        self._tasks = Tasks()
        self._in_flight: dict[str, int] = {}
        self._spent: dict[tuple[str, int], float] = {}

    def reserve(self, mirror: MirrorTarget) -> MirrorFate:
        """Decide at once, and hold a place for a mirror that is to be sent."""
        fate = self._fate(mirror)
        if fate is MirrorFate.SENT:
            name = mirror.target.name
            self._in_flight[name] = self._in_flight.get(name, 0) + 1
        self._metrics.mirror(fate)
        return fate

    def launch(self, mirror: MirrorTarget, call: Inbound, fields: Fields, decision: Decision, tags: Tags) -> None:
        """Send what was reserved, in the background."""
        trace = None if call.trace is None else call.trace.copied()
        copy = call.copied(new_id(), time.time(), trace)
        header = log_header(copy, tags, decision) | {"mirror_of": call.id, "rollout": mirror.rollout}
        self._tasks.spawn("mirror", self._send(mirror, copy, fields, header, decision))

    async def close(self, seconds: float) -> None:
        """Let mirrors in flight finish for a while."""
        await self._tasks.drain(seconds)
        await self._tasks.close()
        await self._upstream.close()

    def _fate(self, mirror: MirrorTarget) -> MirrorFate:
        name = mirror.target.name
        if not mirror.sampled:
            return MirrorFate.NOT_SAMPLED
        budget = mirror.daily_budget_usd
        if budget is not None and self._spent.get((name, int(time.time() // _DAY)), 0.0) >= budget:
            return MirrorFate.OVER_BUDGET
        if self._in_flight.get(name, 0) >= mirror.max_concurrency:
            return MirrorFate.SHED
        return MirrorFate.SENT

    async def _send(
        self, mirror: MirrorTarget, call: Inbound, fields: Fields, header: dict[str, Any], decision: Decision
    ) -> None:
        """One mirror, from request to log. However it ends, it is in the log and its place is free again."""
        name, model = mirror.target.name, mirror.target.model
        body = with_model(call.body, fields, model.model)
        started = time.perf_counter()
        received: list[bytes] = []
        told: dict[str, Any] = {
            "outcome": Outcome.GATEWAY_KILLED,
            "status": 0,
            "stream": False,
            "error": "",
            "ttft_ms": None,
        }
        try:
            await self._exchange(mirror, call, body, received, told)
        except UpstreamError as error:
            late = isinstance(error, UpstreamTimeout)
            told |= {"outcome": Outcome.TIMEOUT if late else Outcome.UPSTREAM_CUT, "error": str(error)}
        finally:
            self._in_flight[name] -= 1
            price = model.price
            header |= told | {
                "model": name,
                "arm": Arm.MIRROR,
                "latency_ms": round((time.perf_counter() - started) * 1000, 3),
                "provider": model.provider,
                "price": rates(price),
            }
            if call.trace is not None:
                call.trace.end_log(header)
            privacy = decision.route.privacy
            if privacy.before_spool:
                record_masked(self._sink, header, body, b"".join(received), privacy.pii, self._redactor)
            else:
                self._sink.record(header, body, received)
            self._spend(mirror, received, told["stream"], price)

    async def _exchange(
        self, mirror: MirrorTarget, call: Inbound, body: bytes, received: list[bytes], told: dict[str, Any]
    ) -> None:
        model, started = mirror.target.model, time.perf_counter()
        headers = [(b"content-type", b"application/json"), (b"accept-encoding", b"identity")]
        if model.api_key is not None:
            headers.append((b"authorization", b"Bearer " + model.api_key.encode()))
        if call.trace is not None:
            call.trace.tried(started, mirror.target)
            call.trace.carry(headers)
        request = UpstreamRequest(path=call.path.removeprefix("/v1"), headers=headers, body=body)
        reply = await self._upstream.send(model, request)
        try:
            told["status"] = reply.status
            told["stream"] = any(n == b"content-type" and v.startswith(b"text/event-stream") for n, v in reply.headers)
            size = 0
            while chunk := await reply.read():
                if not received:
                    told["ttft_ms"] = round((time.perf_counter() - started) * 1000, 3)
                received.append(chunk)
                size += len(chunk)
                if size > _MAX_REPLY:
                    raise UpstreamError(f"the mirror's reply is larger than {_MAX_REPLY} bytes")
            told["outcome"] = Outcome.OK if reply.status < 400 else Outcome.UPSTREAM_ERROR
        finally:
            reply.close()

    def _spend(self, mirror: MirrorTarget, received: list[bytes], stream: bool, price: Price | None) -> None:
        if mirror.daily_budget_usd is None or not received:
            return
        cost = cost_of(usage_of(body_of(b"".join(received), {"stream": stream})), rates(price))
        if cost is not None:
            key = (mirror.target.name, int(time.time() // _DAY))
            self._spent = {k: v for k, v in self._spent.items() if k[1] == key[1]}
            self._spent[key] = self._spent.get(key, 0.0) + cost
