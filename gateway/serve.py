"""The gateway's parent process: opens the socket, keeps workers and shipper running, tells them what has changed."""

import asyncio
import os
import shutil
import socket
from pathlib import Path

import structlog

from gateway.config import Settings, environment
from gateway.errors import ConfigError
from gateway.publish import Publisher
from gateway.signals import signals_of
from gateway.supervise import Child, Supervisor, gateway_process, stop_on_signals
from gateway.tasks import Tasks
from gateway.tell import is_told
from gateway.upstream.via_litellm import installed, missing
from gateway.versions import Announcer
from routing.proxies import peer_of
from routing.targets import Model

__all__ = ["serve"]

log = structlog.get_logger(__name__)

_BIND_PATIENCE = 10.0  # a killed gateway's workers need a moment to let the port go


async def serve(settings: Settings, *, config: Path | None = None, watch_fd: int | None = None) -> None:
    """Serve until stopped. Raises ConfigError or RulesError before anything is started."""
    settings.run_dir.mkdir(parents=True, exist_ok=True)
    publisher = Publisher(settings)
    rules = publisher.start()
    announcer = Announcer(settings)
    stop = stop_on_signals(watch_fd)
    listener = await _listen(settings)
    host, port = listener.getsockname()[:2]
    metrics = settings.run_dir / "metrics"
    shutil.rmtree(metrics, ignore_errors=True)
    metrics.mkdir(parents=True)
    (metrics / "started").touch()
    options = ["--config", str(config)] if config else []
    env = dict(environment()) | {"PROMETHEUS_MULTIPROC_DIR": str(metrics)}
    workers = [
        Child(
            name=f"worker {number}",
            argv=gateway_process("gateway.worker", "--fd", str(listener.fileno()), "--metrics", str(metrics), *options),
            pass_fds=(listener.fileno(),),
            env=env,
        )
        for number in range(settings.gateway.workers)
    ]
    shipper = Child(name="shipper", argv=gateway_process("gateway.ship", *options), env=env)
    auth = "on" if settings.gateway.authenticates else "off"
    log.info("gateway", url=f"http://{host}:{port}/v1", workers=len(workers), auth=auth, pid=os.getpid())
    readers = [shipper]
    signals = signals_of(environment())
    if is_told(settings, signals):
        readers.append(Child(name="teller", argv=gateway_process("gateway.tell", *options), env=env))
    for problem in signals.problems:
        log.warning("telemetry", problem=problem)
    tasks = Tasks()
    tasks.spawn("upstreams", _say_what_is_missing(list(rules.table.models.values())))
    tasks.spawn("rules", publisher.run())
    tasks.spawn("versions", announcer.run())
    try:
        await _run(workers, readers, stop, settings.gateway.drain + 5, listener)
    finally:
        await tasks.close()
        listener.close()


async def _run(
    workers: list[Child], readers: list[Child], stop: asyncio.Event, grace: float, listener: socket.socket
) -> None:
    """Who reads the spool ends after the workers, and so has what they spooled last.

    The listener goes at once: the workers close theirs, so that who comes while they finish is refused and can go
    elsewhere, and does not wait for a worker that will never take the call.
    """
    drained = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        group.create_task(Supervisor(readers).run(drained))
        group.create_task(_close(listener, stop))
        await Supervisor(workers, grace=grace).run(stop)
        drained.set()


async def _close(listener: socket.socket, stop: asyncio.Event) -> None:
    await stop.wait()
    listener.close()


async def _listen(settings: Settings) -> socket.socket:
    host, port = settings.gateway.host, settings.gateway.port
    if not (settings.gateway.authenticates or settings.gateway.loopback or settings.gateway.open_to_network):
        raise ConfigError(
            f"gateway.host {host} is open to the network and gateway.auth is off, so anybody could use your upstreams: "
            'set gateway.auth = "auto", or put something that authenticates in front and set '
            "gateway.open_to_network = true"
        )
    deadline = asyncio.get_running_loop().time() + _BIND_PATIENCE
    while True:
        listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen(2048)
        except OSError as error:
            listener.close()
            if asyncio.get_running_loop().time() > deadline:
                raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}; set gateway.port") from error
            await asyncio.sleep(0.2)
        else:
            listener.set_inheritable(True)
            return listener


async def _say_what_is_missing(models: list[Model]) -> None:
    """A dead upstream is told at start, and stops nothing."""
    for model in models:
        if model.upstream == "litellm" and not installed():
            log.warning("upstream cannot be called", model=model.name, error=str(missing()))
        peer = peer_of(model)
        if peer is None:
            continue
        try:
            async with asyncio.timeout(2):
                _, writer = await asyncio.open_connection(*peer)
            writer.close()
        except (OSError, TimeoutError) as error:
            url = model.base_url if model.proxy is None else f"proxy {peer[0]}:{peer[1]}"
            log.warning("upstream cannot be reached", model=model.name, url=url, error=str(error) or "timeout")
