"""Looking at a rollout, once or until it settles: a live view on a terminal, a line for each change for scripts."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import typer
from rich.console import Console
from rich.live import Live

from flywheel.cli.output import dump
from flywheel.cli.rollout_view import line, panel, scarce
from flywheel.status import EXIT_TIMEOUT, Look, View, as_json, exit_code, settled
from gateway.config import Settings, environment
from gateway.logstore.open import open_log_store
from routing.rules import Rules, load
from routing.store import Rollouts

__all__ = ["follow", "looking"]

_POLL_SECONDS = 0.5


@asynccontextmanager
async def looking(settings: Settings, store: Rollouts) -> AsyncIterator[Look]:
    """A Look, with the log store open for as long as it takes."""

    async def rules() -> Rules:
        return load(settings.routing_file, environment())

    logs = open_log_store(settings.log_store)
    try:
        yield Look(store, logs, rules)
    finally:
        await logs.close()


async def follow(
    settings: Settings, store: Rollouts, name: str, watch: bool, deadline: float | None, json: bool
) -> int:
    """Show the rollout, with `watch` until it settles or `deadline` (monotonic) passes. Returns the exit code."""
    console = Console()
    async with looking(settings, store) as look:
        view = await look.at(name)
        if not watch or json or not console.is_terminal:
            return await _report(look, view, watch, deadline, json)
        with Live(panel(view, time.time()), console=console, auto_refresh=False) as live:
            while not settled(view.rollout):
                if deadline is not None and time.monotonic() >= deadline:
                    return EXIT_TIMEOUT
                await asyncio.sleep(_POLL_SECONDS)
                view = await look.at(view.rollout.id)
                live.update(panel(view, time.time()), refresh=True)
        return exit_code(view.rollout)


async def _report(look: Look, view: View, watch: bool, deadline: float | None, json: bool) -> int:
    told = ""
    while True:
        text = line(view.rollout)
        if text != told:
            lines = (text, *scarce(view.seen))
            typer.echo(dump(as_json(view.rollout, view), pretty=False) if json else "\n".join(lines))
            told = text
        if not watch or settled(view.rollout):
            return exit_code(view.rollout)
        if deadline is not None and time.monotonic() >= deadline:
            return EXIT_TIMEOUT
        await asyncio.sleep(_POLL_SECONDS)
        view = await look.at(view.rollout.id)
