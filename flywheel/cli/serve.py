"""`understudy serve`: the gateway."""

import asyncio
from typing import Annotated

import typer

from flywheel.cli.options import Config

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def serve(
    config: Config = None,
    watch_fd: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Run the gateway: workers that pass traffic through, and the shipper that takes its log to the log store.

    Your app changes its base URL, nothing else. Routing comes from routing.yaml; SIGTERM lets running replies finish.

    Example:

        understudy serve --config understudy.toml
    """
    from gateway.config import load_settings
    from gateway.serve import serve as serve_gateway
    from gateway.telemetry import configure_logging

    configure_logging("serve")
    asyncio.run(serve_gateway(load_settings(config), config=config and config.absolute(), watch_fd=watch_fd))
