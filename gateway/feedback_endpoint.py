"""`POST /v1/feedback`: takes feedback into the spool, and answers when the kernel has it."""

import asyncio
import time
from typing import Protocol

import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from gateway.errors import RequestRefused
from gateway.feedback import MAX_BODY, frame_of, privacy_of, read_feedback, redact_feedback
from gateway.ids import new_id
from gateway.proxy import LOG_FULL, log_full
from gateway.redact import Redactor
from gateway.tee import Sink
from gateway.telemetry import Metrics
from routing.targets import Privacy, RouteTable

__all__ = ["FeedbackEndpoint"]


class _Table(Protocol):
    """gateway.snapshot.Snapshot."""

    @property
    def table(self) -> RouteTable: ...


class FeedbackEndpoint:
    """One worker's. Whether the exchange exists is not asked: it may be on its way, in another worker's spool."""

    def __init__(self, *, spool: Sink, snapshot: _Table, redactor: Redactor, metrics: Metrics) -> None:
        self._spool = spool
        self._snapshot = snapshot
        self._redactor = redactor
        self._metrics = metrics

    async def post(self, request: Request) -> Response:
        """Rating, correction, comment or signal about an exchange: 202 with the feedback's id once it is spooled."""
        try:
            if self._spool.refusing:
                self._metrics.dropped("refused_feedback")
                raise log_full()
            return await self._take(await _body(request), dict(request.headers))
        except RequestRefused as error:
            return _refused(error)
        except ClientDisconnect:
            return Response(status_code=400)  # nobody is there to read it

    async def _take(self, body: bytes, headers: dict[str, str]) -> Response:
        feedback = read_feedback(body, headers, new_id(), time.time())
        privacy = privacy_of(self._snapshot.table, feedback.workload_id)
        if privacy.before_spool:
            feedback = await asyncio.to_thread(redact_feedback, feedback, privacy, self._redactor)
            privacy = Privacy()
        header, said = frame_of(feedback, privacy)
        if not self._spool.append(header, said):
            raise RequestRefused(503, "the log is full: send it again later", code=LOG_FULL, kind="server_error")
        self._metrics.feedback()
        told = {"id": feedback.id, "object": "feedback", "exchange_id": feedback.exchange_id}
        return Response(orjson.dumps(told), status_code=202, media_type="application/json")


async def _body(request: Request) -> bytes:
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        parts.append(part)
        size += len(part)
        if size > MAX_BODY:
            raise RequestRefused(413, f"the request body is larger than {MAX_BODY} bytes", code="request_too_large")
    return b"".join(parts)


def _refused(error: RequestRefused) -> Response:
    headers = {413: {"connection": "close"}, 503: {"retry-after": "1"}}.get(error.status)
    return Response(error.body, status_code=error.status, headers=headers, media_type="application/json")
