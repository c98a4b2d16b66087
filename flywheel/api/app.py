"""Composition of the control plane: its routes, its errors in OpenAI's shape, and the page."""

import base64
import re
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response
from fastapi.security import HTTPBearer
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.exceptions import HTTPException

from flywheel.api.audit import AuditRoutes
from flywheel.api.bodies import ErrorBody, HealthBody
from flywheel.api.guard import ASGIApp, guarded
from flywheel.api.keys import KeyRoutes
from flywheel.api.rollouts import RolloutRoutes
from flywheel.api.rules_file import RulesFile
from gateway.config import Settings
from gateway.errors import RequestRefused, StoreError, UnderstudyError
from gateway.keys import Keys
from gateway.logstore import LogStore
from routing.errors import Conflict, NotFound, Refused, RoutingError, RulesError, Unavailable
from routing.store import Rollouts

__all__ = ["build", "control_plane"]

_PAGE = Path(__file__).parent.parent / "web" / "rollouts.html"
_ANSWERS: dict[type[Exception], tuple[int, str]] = {
    NotFound: (404, "not_found"),
    Refused: (409, "refused"),
    Conflict: (409, "conflict"),
    RulesError: (503, "routing_file"),
    Unavailable: (503, "unavailable"),
    StoreError: (503, "unavailable"),
}
_REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "What was sent cannot be used; `param` names the field."},
    401: {"model": ErrorBody, "description": "No key, or none that is valid."},
    403: {"model": ErrorBody, "description": "The key lacks the scope admin, or another site's page asks."},
    404: {"model": ErrorBody, "description": "There is no such rollout, workload or key."},
    409: {
        "model": ErrorBody,
        "description": "Not possible in this state (refused), or somebody was faster (conflict).",
    },
    503: {"model": ErrorBody, "description": "The control database, the log store or routing.yaml cannot be used."},
}


def build(settings: Settings, env: Mapping[str, str], engine: AsyncEngine, logs: LogStore) -> ASGIApp:
    """The control plane of one installation, guarded as its settings say."""
    rules = RulesFile(settings.routing_file, env)
    routes = (RolloutRoutes(Rollouts(engine), logs, rules), KeyRoutes(Keys(engine)), AuditRoutes(engine))
    app = control_plane([each.router() for each in routes])
    hosts = {name.lower() for name in ("localhost", settings.api.host, *settings.api.hosts)}
    return guarded(app, hosts=hosts, keys=Keys(engine) if settings.api_authenticates else None)


def control_plane(routers: Iterable[APIRouter]) -> FastAPI:
    """The application without its guard."""
    app = FastAPI(
        title="Understudy control plane",
        description="What the command `understudy` can ask, by HTTP. The controller acts on it.",
        openapi_url="/api/openapi.json",
        docs_url=None,
        redoc_url=None,
    )
    key = Depends(HTTPBearer(auto_error=False, description="A key with the scope admin, where authentication is on."))
    for router in routers:
        app.include_router(router, dependencies=[key], responses=_REFUSALS)
    page = _PAGE.read_bytes()
    policy = _policy(page.decode())

    @app.get("/", include_in_schema=False)
    async def rollouts_page() -> HTMLResponse:
        """The page."""
        return HTMLResponse(page, headers={"content-security-policy": policy})

    @app.get("/healthz", response_model=HealthBody)
    async def healthz() -> dict[str, str]:
        """The controller's process runs; whether it is the active one is not said."""
        return {"status": "ok"}

    app.add_exception_handler(RequestRefused, _refused)
    app.add_exception_handler(RoutingError, _answered)
    app.add_exception_handler(UnderstudyError, _answered)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _unknown)
    app.add_exception_handler(Exception, _failed)
    return app


def _policy(page: str) -> str:
    """What the page may do: run its own script, use its own style, ask its own origin."""

    def hashes(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(sha256(text.encode()).digest()).decode()}'" for text in found)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _reply(error: RequestRefused) -> Response:
    headers = {name.decode(): value.decode() for name, value in error.headers}
    return Response(error.body, error.status, headers, media_type="application/json")


async def _refused(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestRefused)
    return _reply(error)


async def _answered(_request: Request, error: Exception) -> Response:
    """The message is the one that a command would have printed."""
    status, code = next((answer for kind, answer in _ANSWERS.items() if isinstance(error, kind)), (400, "bad_request"))
    kind = "server_error" if status == 503 else "invalid_request_error"
    return _reply(RequestRefused(status, str(error), code=code, kind=kind))


async def _invalid(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    param = ".".join(place) if first["type"] != "json_invalid" else ""
    text = str(first["msg"]).removeprefix("Value error, ")
    message = f"{param}: {text}" if param else f"the body: {text}"
    return _reply(RequestRefused(400, message, code="bad_request", param=param or None))


async def _unknown(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    code = "unknown_path" if error.status_code in (404, 405) else "bad_request"
    return _reply(RequestRefused(error.status_code, message, code=code))


async def _failed(_request: Request, _error: Exception) -> Response:
    """The server logs it."""
    return _reply(RequestRefused(500, "the control plane failed", code="internal", kind="server_error"))
