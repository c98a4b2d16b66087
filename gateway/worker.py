"""One gateway worker: serves the application on a socket that its parent opened.

python -m gateway.compiled gateway.worker --fd N [--config FILE] [--watch-fd N] [--metrics DIR]
"""

import argparse
import asyncio
import gc
import os
import resource
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import structlog
import uvicorn
import uvloop

from gateway.app import build
from gateway.compiled import is_compiled
from gateway.config import Settings, load_settings
from gateway.endpoints import Endpoints
from gateway.protocol import server_config
from gateway.supervise import watch_parent
from gateway.telemetry import configure_logging

__all__ = ["main"]

log = structlog.get_logger(__name__)

_SWITCH = 0.001  # seconds that a thread, as the one that takes in new rules, may keep the event loop waiting


async def _serve(arguments: argparse.Namespace, application: Callable[[Settings, Path | None], Endpoints]) -> None:
    settings = load_settings(arguments.config)
    endpoints = application(settings, arguments.metrics)
    gc.freeze()
    server = uvicorn.Server(server_config(endpoints, settings.gateway))
    if arguments.watch_fd is not None:
        loop = asyncio.get_running_loop()

        def orphaned() -> None:
            server.should_exit = True
            loop.call_later(settings.gateway.drain + 5, os._exit, 1)  # whatever it is that still keeps it: it ends

        watch_parent(loop, arguments.watch_fd, orphaned)
    listener = socket.socket(fileno=arguments.fd)
    listener.setblocking(False)
    await server.serve(sockets=[listener])


def _build(settings: Settings, shared_metrics: Path | None) -> Endpoints:
    return build(settings, shared_metrics=shared_metrics)


def main(argv: list[str] | None = None, *, application: Callable[[Settings, Path | None], Endpoints] = _build) -> int:
    """Run until stopped; exit 0. `application` is made from the settings and the folder for shared metrics."""
    parser = argparse.ArgumentParser(prog="python -m gateway.worker", description="Serve one gateway worker.")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--watch-fd", type=int)
    parser.add_argument("--metrics", type=Path)
    arguments = parser.parse_args(argv)
    configure_logging(f"gateway {os.getpid()}")
    log.info("worker", compiled=is_compiled())
    gc.set_threshold(50_000, 20, 50)  # a call makes little garbage in cycles, and looking for it is time on its way
    sys.setswitchinterval(_SWITCH)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    uvloop.run(_serve(arguments, application))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
