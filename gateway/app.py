"""Composition: everything one gateway worker is made of."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from gateway.breaker import Breakers
from gateway.concurrency import Rooms
from gateway.config import Settings, environment
from gateway.endpoints import ASGIApp, Endpoints
from gateway.feedback_endpoint import FeedbackEndpoint
from gateway.gate import Gate, guarded
from gateway.keyring import Keyring
from gateway.keys import Keys
from gateway.limits import Limits
from gateway.mirror import Mirrors
from gateway.models_endpoint import ModelsEndpoint
from gateway.outbox import Outbox
from gateway.presidio import redactor_of
from gateway.proxy import Proxy
from gateway.publish import Publisher
from gateway.signals import signals_of
from gateway.snapshot import Snapshot
from gateway.spool import Spool
from gateway.tasks import Tasks
from gateway.tee import Sink
from gateway.telemetry import Metrics, exposition
from gateway.tracing import tracing_of
from gateway.upstream.chosen import ChosenUpstream
from gateway.upstream.via_litellm import LitellmUpstream
from gateway.versions import Versions, board_of
from routing.store import Rollouts, connect

__all__ = ["build"]


def build(settings: Settings, *, shared_metrics: Path | None = None, spool: Sink | None = None) -> Endpoints:
    """Wire a worker; `spool` instead of one of its own.

    Without `shared_metrics` it has no parent (gateway.serve) that publishes the rules and asks the database, and does
    so itself.
    Raises RulesError for a wrong routing.yaml and OSError when the data folder cannot be used.
    """
    for folder in (settings.spool_dir, settings.run_dir):
        folder.mkdir(parents=True, exist_ok=True)
    metrics = Metrics()
    engine = connect(settings.database)
    publisher, board = (_published(settings), None) if shared_metrics is None else (None, board_of(settings))
    versions = Versions(engine, poll=settings.gateway.overlay_poll, board=board)
    snapshot = Snapshot(settings, Rollouts(engine), versions, metrics)
    gate = _gate(settings, Keys(engine), versions, snapshot)
    outbox = Outbox()
    spool = spool or Spool(settings.spool_dir, settings.spool, metrics, outbox)
    upstream = ChosenUpstream(providers := LitellmUpstream(), outbox)
    redactor = redactor_of(settings.privacy)
    mirrors = Mirrors(upstream=ChosenUpstream(providers, outbox), sink=spool, metrics=metrics, redactor=redactor)
    breakers = Breakers()
    proxy = Proxy(
        upstream=upstream,
        snapshot=snapshot,
        breakers=breakers,
        rooms=Rooms(),
        sink=spool,
        mirrors=mirrors,
        metrics=metrics,
        redactor=redactor,
    )

    async def prepare() -> None:
        providers.prepare(snapshot.table.models)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        tasks = Tasks()
        if gate is not None:
            await gate.start()
        tasks.spawn("snapshot", snapshot.run(prepare, *(() if gate is None else (gate.refresh,))))
        if publisher is not None:
            tasks.spawn("rules", publisher.run())
        tasks.spawn("spool", spool.run())
        tasks.spawn("metrics", metrics.run())
        yield
        await mirrors.close(settings.gateway.drain)
        await tasks.close()
        await upstream.close()
        await providers.close()
        spool.close()
        if gate is not None:
            gate.close()
        await engine.dispose()

    app = _control(snapshot, breakers, metrics, shared_metrics, lifespan)
    feedback = FeedbackEndpoint(spool=spool, snapshot=snapshot, redactor=redactor, metrics=metrics)
    app.add_api_route("/v1/feedback", feedback.post, methods=["POST"], status_code=202)
    control: ASGIApp = app if gate is None else guarded(app, gate)
    return Endpoints(
        proxy=proxy,
        spool=spool,
        outbox=outbox,
        control=control,
        max_body=settings.gateway.max_body,
        gate=gate,
        tracing=tracing_of(signals_of(environment())),
    )


def _published(settings: Settings) -> Publisher:
    publisher = Publisher(settings)
    publisher.start()
    return publisher


def _gate(settings: Settings, keys: Keys, versions: Versions, snapshot: Snapshot) -> Gate | None:
    if not settings.gateway.authenticates:
        return None
    ring = Keyring(keys, settings.run_dir / "keys.json", version=versions.of_keys)
    return Gate(ring, Limits(settings.run_dir / "limits"), snapshot.problems)


def _control(snapshot: Snapshot, breakers: Breakers, metrics: Metrics, shared: Path | None, lifespan: Any) -> FastAPI:
    app = FastAPI(title="Understudy", lifespan=lifespan, docs_url=None, redoc_url=None)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The worker runs."""
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz() -> dict[str, Any]:
        """The worker serves; `problems` names what it does without, `open_breakers` the models that do not answer."""
        return {
            "status": "ok",
            "snapshot": snapshot.table.snapshot,
            "problems": snapshot.problems,
            "open_breakers": breakers.tripped,
        }

    @app.get("/metrics")
    async def prometheus() -> Response:
        """Prometheus text."""
        return Response(exposition(metrics, shared), media_type="text/plain; version=0.0.4")

    models = ModelsEndpoint(snapshot, breakers)
    app.add_api_route("/v1/models", models.list)
    app.add_api_route("/v1/models/{name:path}", models.one)

    @app.exception_handler(HTTPException)
    async def in_openai_shape(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.scope['path']}: {error.detail}"
        body = {"message": message, "type": "invalid_request_error", "code": "unknown_path", "param": None}
        return JSONResponse({"error": body}, status_code=error.status_code)

    return app
