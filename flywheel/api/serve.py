"""Serves the control plane beside the controller, in its process and on its event loop."""

import asyncio
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

import structlog
import uvicorn

from flywheel.api.app import build
from flywheel.api.guard import ASGIApp
from gateway.config import Settings
from gateway.errors import ConfigError
from gateway.logstore.open import open_log_store
from gateway.tasks import Tasks
from routing.store import connect

__all__ = ["ControlPlane"]

log = structlog.get_logger(__name__)

_AGAIN = 2.0  # seconds between two tries to get the port
_GRACE = 2  # seconds that calls under way get at the end


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the controller's."""
        yield


class ControlPlane:
    """Whichever controller has the port serves, active or not: intent goes into the database."""

    def __init__(self, settings: Settings, *, env: Mapping[str, str]) -> None:
        """Raises ConfigError for an address at which nobody could be told from anybody."""
        api = settings.api
        if api.port and not (api.loopback or settings.api_authenticates):
            raise ConfigError(
                f"api.host {api.host} is open to the network and api.auth is off, so anybody could hand your traffic "
                'over: set api.auth = "auto", or api.host = "127.0.0.1" and put something that authenticates in front'
            )
        self._settings = settings
        self._env = env

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop`. A port that is taken is tried again; it holds the controller up in nothing."""
        listener = await self._listen(stop)
        if listener is None:
            return
        settings = self._settings
        host, port = listener.getsockname()[:2]
        auth = "on" if settings.api_authenticates else "off"
        log.info("control plane", url=f"http://{f'[{host}]' if ':' in host else host}:{port}", auth=auth)
        engine, logs, tasks = connect(settings.database), open_log_store(settings.log_store), Tasks()
        try:
            server = _Server(_config(build(settings, self._env, engine, logs)))
            serving = tasks.spawn("uvicorn", server.serve(sockets=[listener]))
            await stop.wait()
            server.should_exit = True
            await asyncio.wait([serving], timeout=_GRACE + 1)
        finally:
            listener.close()
            await tasks.close()
            await logs.close()
            await engine.dispose()

    async def _listen(self, stop: asyncio.Event) -> socket.socket | None:
        host, port = self._settings.api.host, self._settings.api.port
        told = False
        while port and not stop.is_set():
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listener = socket.socket(family, proto=socket.IPPROTO_TCP)  # by which asyncio knows to set TCP_NODELAY
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((host, port))
                listener.listen(128)
            except OSError as error:
                listener.close()
                if not told:
                    log.warning(
                        "the control plane cannot listen, and tries again; set api.port, or 0 for none",
                        address=f"{host}:{port}",
                        error=error.strerror or str(error),
                    )
                told = True
                with suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), _AGAIN)
            else:
                return listener
        return None


def _config(app: ASGIApp) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        proxy_headers=False,
        lifespan="off",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_GRACE,
    )
