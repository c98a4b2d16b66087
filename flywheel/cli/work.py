"""`understudy work`: the controller."""

import asyncio
from typing import Annotated

import typer

from flywheel.cli.options import Config

GRACE = 4.0  # seconds in which the control plane ends its calls

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def work(
    config: Config = None,
    watch_fd: Annotated[int | None, typer.Option(help="Stop when this inherited pipe ends.", hidden=True)] = None,
) -> None:
    """Run the controller: flywheel runs, rollouts, adapters, scoring. Several may run; a lease makes one active.

    It serves the control plane and its page as well: http://127.0.0.1:8090, or where the settings' [api] says.
    Ctrl-C and SIGTERM stop it in order; so does a kill, for all it does is stored: the next one goes on.

    Example:

        understudy work --config understudy.toml
    """
    from flywheel.api.serve import ControlPlane
    from flywheel.work import Controller
    from gateway.config import environment, load_settings
    from gateway.supervise import stop_on_signals
    from gateway.tasks import Tasks
    from gateway.telemetry import configure_logging
    from routing.rules import load

    settings = load_settings(config)
    load(settings.routing_file, environment())  # wrong at start is told at start; later the last good one stays
    control_plane = ControlPlane(settings, env=environment())
    configure_logging("work")

    async def run() -> None:
        stop, tasks = stop_on_signals(watch_fd), Tasks()
        tasks.spawn("control plane", control_plane.run(stop))
        try:
            await Controller(settings, env=environment()).run(stop)
        finally:
            stop.set()
            await tasks.drain(GRACE)
            await tasks.close()

    asyncio.run(run())
