"""`understudy up`: gateway and controller on one machine."""

import asyncio

import typer

from flywheel.cli.options import Config

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def up(config: Config = None) -> None:
    """Run gateway and controller on this machine, each restarted when it dies, with embedded stores.

    The gateway is at http://127.0.0.1:8080/v1, the page of all rollouts at http://127.0.0.1:8090, or where the settings
    say.

    Ctrl-C stops both in order: running replies finish, the log is shipped, an unfinished run is resumed next time.

    Example:

        understudy up --config understudy.toml
    """
    from flywheel.api.serve import ControlPlane
    from gateway.config import environment, load_settings
    from gateway.supervise import Child, Supervisor, python, stop_on_signals
    from gateway.telemetry import configure_logging
    from routing.rules import load

    settings = load_settings(config)
    load(settings.routing_file, environment())  # a wrong file is told here, not by a child that restarts for ever
    ControlPlane(settings, env=environment())  # and so are wrong settings
    options = ["--config", str(config.absolute())] if config else []
    children = [Child(name=name, argv=python("flywheel.cli", name, *options)) for name in ("serve", "work")]
    configure_logging("up")

    async def run() -> None:
        await Supervisor(children, grace=settings.gateway.drain + 10).run(stop_on_signals())

    asyncio.run(run())
