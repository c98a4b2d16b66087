"""`understudy logs`: read the log of exchanges."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from flywheel.cli.output import dump
from gateway.logstore import LogStore, Query
from gateway.records import Exchange, Outcome

app = typer.Typer(add_completion=False, rich_markup_mode=None, no_args_is_help=True, help="Read the log of exchanges.")

T = TypeVar("T")
Config = Annotated[Path | None, typer.Option(help="Settings file; understudy.toml here if it is there.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON instead of a table.")]
Workload = Annotated[str | None, typer.Option(help="Only this workload.")]


@app.command()
def tail(
    config: Config = None,
    workload: Workload = None,
    outcome: Annotated[Outcome | None, typer.Option(help="Only exchanges that ended so.")] = None,
    number: Annotated[int, typer.Option("-n", "--number", min=1, help="How many of the newest.")] = 20,
    json: AsJson = False,
) -> None:
    """The newest exchanges, newest first.

    Example:

        understudy logs tail --workload support-router -n 5
    """
    query = Query(workload=workload, outcome=outcome, newest_first=True, limit=number)

    async def read(store: LogStore) -> list[Exchange]:
        return [exchange async for exchange in store.scan(query)]

    _show(_with_store(config, read), json)


@app.command()
def show(exchange_id: str, config: Config = None, json: AsJson = False) -> None:
    """One exchange, with request and reply.

    Example:

        understudy logs show 019a7b2c-5d1e-7f00-8a11-2b3c4d5e6f70
    """
    exchange = _with_store(config, lambda store: store.get(exchange_id))
    if exchange is None:
        typer.echo(f"understudy: no exchange {exchange_id} in the log store (just made ones take a moment)", err=True)
        raise typer.Exit(1)
    typer.echo(dump(asdict(exchange), pretty=not json))


@app.command()
def export(
    config: Config = None,
    workload: Workload = None,
    client: Annotated[str | None, typer.Option(help="Only this client.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many, oldest first.")] = None,
) -> None:
    """Exchanges as JSON lines on stdout: timestamp, workload_id, client_id, request, response, and our fields beside.

    Example:

        understudy logs export --workload support-router > log.jsonl
    """
    query = Query(workload=workload, client=client, limit=limit)

    async def write(store: LogStore) -> None:
        async for exchange in store.scan(query):
            typer.echo(dump(asdict(exchange), pretty=False))

    _with_store(config, write)


@app.command()
def stats(config: Config = None, workload: Workload = None, json: AsJson = False) -> None:
    """How many exchanges the log holds, by outcome, and what still waits in the spool.

    Example:

        understudy logs stats --json
    """
    from gateway.config import load_settings

    counts = _with_store(config, lambda store: store.counts(workload))
    waiting = sum(path.stat().st_size for path in load_settings(config).spool_dir.glob("*/*.seg"))
    if json:
        typer.echo(dump(asdict(counts) | {"spool_bytes": waiting}))
        return
    outcomes = ", ".join(f"{name} {n}" for name, n in sorted(counts.by_outcome.items())) or "none"
    typer.echo(f"{counts.live} exchanges ({outcomes}), {counts.mirrors} mirrors; {waiting} bytes in the spool")


def _with_store(config: Path | None, use: Callable[[LogStore], Awaitable[T]]) -> T:
    from gateway.config import load_settings
    from gateway.logstore.open import open_log_store

    async def run() -> T:
        store = open_log_store(load_settings(config).log_store)
        try:
            return await use(store)
        finally:
            await store.close()

    return asyncio.run(run())


def _show(exchanges: list[Exchange], json: bool) -> None:
    if json:
        for exchange in exchanges:
            typer.echo(dump(asdict(exchange), pretty=False))
        return
    for exchange in exchanges:
        at = datetime.fromtimestamp(exchange.timestamp, UTC).strftime("%Y-%m-%d %H:%M:%S")
        typer.echo(
            f"{at}  {exchange.id}  {exchange.workload_id:<20} {exchange.model:<28} {exchange.arm:<9} "
            f"{exchange.outcome:<14} {exchange.status:>3} {exchange.latency_ms:>9.1f} ms"
        )
