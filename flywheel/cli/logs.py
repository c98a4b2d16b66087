"""`understudy logs`: read the log of exchanges, take it elsewhere, bring it in, and see that nothing is missing."""

import fcntl
import os
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from flywheel.cli.logs_filters import Client, Ended, Kind, Model, Rollout, Said, Since, Until, moment, within
from flywheel.cli.logs_view import detail, line
from flywheel.cli.options import AsJson, Config, Workload
from flywheel.cli.output import Progress, dump, until_reader_leaves
from flywheel.cli.stores import with_log_store
from flywheel.exchange_lines import Fill, Format
from gateway.config import Settings, environment, load_settings
from gateway.errors import ConfigError, StoreError
from gateway.logstore import FeedbackCounts, LogStore, Query
from gateway.records import JSON, Exchange, Feedback, Outcome
from routing.errors import RoutingError

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Read the log of exchanges, export it, import others, and see that nothing is missing.",
)

Output = Annotated[Path | None, typer.Option("--output", "-o", help="File instead of stdout; whole or not at all.")]
AtMost = Annotated[int | None, typer.Option("-n", "--number", "--limit", min=1, help="At most so many, oldest first.")]


@app.command()
def tail(
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Stay, and show new ones as they arrive.")] = False,
    number: Annotated[int, typer.Option("-n", "--number", min=1, help="How many of the newest.")] = 20,
    workload: Workload = None,
    client: Client = None,
    model: Model = None,
    outcome: Ended = None,
    rollout: Rollout = None,
    kind: Kind = "live",
    feedback: Said = None,
    since: Since = None,
    until: Until = None,
    config: Config = None,
    json: AsJson = False,
) -> None:
    """The newest exchanges, newest first; with --follow oldest first, and on until Ctrl-C.

    Example:

        understudy logs tail --workload support-router --since 2h -n 5

        understudy logs tail --follow --outcome timeout
    """
    from flywheel.cli.logs_follow import follow as follow_log

    if follow and until is not None:
        raise ConfigError("--follow has no end: drop --until")
    if follow and feedback is not None:
        raise ConfigError("--follow shows exchanges as they arrive, and feedback comes later: drop --feedback")
    settings = load_settings(config)
    asked = Query(
        workload=workload, client=client, model=model, outcome=outcome, rollout=rollout, kind=kind, feedback=feedback
    )
    query = within(asked, since, until, time.time())

    def show(exchange: Exchange) -> None:
        typer.echo(dump(exchange, pretty=False) if json else line(exchange))

    async def read(store: LogStore) -> None:
        if follow:
            await follow_log(store, query, number, show, _warn)
        async for exchange in store.scan(replace(query, newest_first=True, limit=number)):
            show(exchange)

    with until_reader_leaves():
        with_log_store(settings, read)


@app.command("show")
def show_(
    exchange_id: Annotated[str, typer.Argument(metavar="ID", help="The reply's x-understudy-exchange-id.")],
    config: Config = None,
    json: AsJson = False,
) -> None:
    """One exchange: head, attempts, conversation, reply, feedback. Exit code 1 where the log store has none of that id.

    Example:

        understudy logs show 019a7b2c-5d1e-7f00-8a11-2b3c4d5e6f70
    """

    async def read(store: LogStore) -> tuple[Exchange | None, list[Feedback]]:
        return await store.get(exchange_id), (await store.feedback_of([exchange_id])).get(exchange_id, [])

    exchange, said = with_log_store(load_settings(config), read)
    if exchange is None:
        _warn(f"no exchange {exchange_id} in the log store (just made ones take a moment)")
        raise typer.Exit(1)
    with until_reader_leaves():
        typer.echo(dump(asdict(exchange) | {"feedback": said}) if json else detail(exchange, said))


@app.command()
def export(
    output: Output = None,
    form: Annotated[Format, typer.Option("--format", help="All fields; the blueprint's five; messages only.")] = (
        "exchanges"
    ),
    with_feedback: Annotated[bool, typer.Option("--with-feedback", help="What was said about each, too.")] = False,
    number: AtMost = None,
    workload: Workload = None,
    client: Client = None,
    model: Model = None,
    outcome: Ended = None,
    rollout: Rollout = None,
    kind: Kind = "live",
    feedback: Said = None,
    since: Since = None,
    until: Until = None,
    config: Config = None,
) -> None:
    """Exchanges as JSON lines, oldest first: what `understudy logs import` reads.

    `exchanges` has all fields, `blueprint` timestamp, workload_id, client_id, request and response, `messages` the
    conversation with its answer as last message, of exchanges that ended ok. With --with-feedback each exchange also
    has what was said about it, as `feedback`.

    Example:

        understudy logs export --workload support-router --since 7d -o log.jsonl

        understudy logs export --format messages | head

        understudy logs export --feedback corrected --with-feedback
    """
    from flywheel.cli.logs_export import target, write

    if form == "messages" and outcome not in (None, Outcome.OK):
        raise ConfigError(f"--format messages holds only exchanges that ended ok: drop --outcome {outcome}")
    if form != "exchanges" and with_feedback:
        raise ConfigError(f"--format {form} has no place for feedback: drop --with-feedback, or use --format exchanges")
    settings = load_settings(config)
    ended = Outcome.OK if form == "messages" else outcome
    asked = Query(
        workload=workload, client=client, model=model, outcome=ended, rollout=rollout, kind=kind, feedback=feedback,
        limit=number,
    )  # fmt: skip
    query = within(asked, since, until, time.time())
    progress = Progress()
    with until_reader_leaves(), target(output) as out:
        written, left_out = with_log_store(
            settings, lambda store: write(store, query, form, out, progress, feedback=with_feedback)
        )
    if output is not None:
        progress.say(f"{output}: {written:,} exchanges")
    if left_out:
        progress.say(f"left out, for they lack a request or an answer: {left_out:,}")


@app.command("import")
def import_(
    files: Annotated[list[str], typer.Argument(metavar="FILE", help="Files of JSON lines; `-` is stdin.")],
    workload: Annotated[str | None, typer.Option(help="For lines that name no workload.")] = None,
    client: Annotated[str, typer.Option(help="For lines that name no client.")] = "",
    timestamp: Annotated[str | None, typer.Option(help="For lines without a time; else the file's own.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first wrong line.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only check the lines.")] = False,
    config: Config = None,
    json: AsJson = False,
) -> None:
    """Bring exchanges into the log store: our own export, the blueprint's log, or lines with messages and tools.

    Importing again doubles nothing: a line keeps its id, or gets one made of its time and content. A line without a
    time gets --timestamp, else the file's time of change, plus a millisecond for each line. Wrong lines are told as
    file:line, and the right ones imported; exit code 1 then. --strict leaves out the batch that a wrong line is in.

    Example:

        understudy logs import log.jsonl

        understudy logs import chats.jsonl --workload support-router --client web --timestamp 2026-11-01 --dry-run
    """
    from flywheel.cli.logs_import import Tally, batches, opened, store_all

    settings = load_settings(config)
    at = None if timestamp is None else moment("--timestamp", timestamp, time.time())
    tally, progress = Tally(), Progress()
    with opened(files, at) as sources:
        fill = Fill(workload=workload, client=client)
        found = batches(sources, fill, strict=strict, tally=tally, progress=progress)
        if dry_run:
            for _ in found:
                pass
        else:
            with_log_store(settings, lambda store: store_all(store, found, tally))
    progress.clear()
    if tally.ignored:
        names = ", ".join(f"{name} ({count:,})" for name, count in sorted(tally.ignored.items()))
        progress.say(f"fields that an exchange has no place for: {names}")
    typer.echo(dump(tally.as_json()) if json else tally.told(stored=not dry_run))
    raise typer.Exit(1 if tally.wrong else 0)


@app.command()
def forget(
    client: Annotated[str, typer.Option("--client", help="The client's id, as logged or as it was sent.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    config: Config = None,
    json: AsJson = False,
) -> None:
    """Erase a client's exchanges for good: log store, file sinks, spool and quarantine. The audit log tells of it.

    Exit code 0 when all is done, 1 when the answer was no, 2 when something could not be erased: ask again then. Run
    it on each machine that has a spool of its own. Datasets and adapters made before are not touched, nor backups.
    Where the control database is away all is erased, and the audit log's entry waits for it in the data folder.

    Example:

        understudy logs forget --client acme-web

        understudy logs forget --client ada@example.org --yes --json
    """
    from flywheel.audit import WAITING
    from flywheel.cli.logs_forget import forget as erase
    from flywheel.cli.logs_forget import names_of

    settings = load_settings(config)
    names = names_of(settings, client)
    if not yes:
        if not sys.stdin.isatty():
            raise ConfigError("logs forget erases for good, and nobody can be asked here: add --yes")
        if not typer.confirm(f"Erase all exchanges of {client} for good?", err=True):
            raise typer.Exit(1)
    progress = Progress()
    erased = erase(settings, config, names, ship=not _another_ships(settings), progress=progress)
    if json:
        typer.echo(dump(erased))
        return
    typer.echo(
        f"{erased.exchanges:,} exchanges erased, {erased.sinks:,} in sinks, {erased.quarantined:,} quarantined lines"
    )
    if erased.waiting:
        progress.say(f"spool: {erased.waiting:,} bytes wait; the client is left out when they are shipped")
    if not erased.audited:
        progress.say(f"audit log: the entry waits in {settings.data_dir / WAITING} for the control database")


@app.command()
def stats(config: Config = None, workload: Workload = None, json: AsJson = False) -> None:
    """What the log holds, by workload and outcome; what waits in the spool; whether anything is missing.

    Gateway and shipper count since they were started, and only where they run with the same data_dir. Without the log
    store the rest is told all the same; exit code 2 then.

    Example:

        understudy logs stats --json
    """
    from flywheel.cli.logs_stats import counted, parity, shown, spooled

    settings = load_settings(config)

    async def read(store: LogStore) -> tuple[JSON | None, FeedbackCounts | None]:
        return await counted(store, _workloads(settings), workload), await store.feedback_counts()

    try:
        counts, feedback = with_log_store(settings, read)
    except StoreError as error:
        _warn(f"the log store is away: {error}")
        counts = feedback = None
    found: JSON = {"counts": counts, "feedback": feedback and asdict(feedback), **spooled(settings)}
    found["parity"] = parity(found["gateway"], found["shipper"])
    typer.echo(dump(found) if json else shown(found, time.time()))
    raise typer.Exit(2 if counts is None else 0)


@app.command()
def ship(
    once: Annotated[bool, typer.Option("--once", help="One pass over the spool, then end.")] = False,
    config: Config = None,
) -> None:
    """Run the shipper alone: from the spool to the log store. `understudy serve` has one of its own.

    For a spool whose gateway is gone. One shipper works on a spool at a time; a second waits for it.

    Example:

        understudy logs ship --once
    """
    from gateway.supervise import gateway_process

    settings = load_settings(config)
    if once:
        with_log_store(settings, lambda store: store.get("0"))  # a store that is away is told here
    if _another_ships(settings):
        _warn("another shipper works on this spool: waiting until it ends")
    options = [*(["--config", str(config.absolute())] if config else []), *(["--once"] if once else [])]
    sys.stderr.flush()
    os.execv(sys.executable, gateway_process("gateway.ship", *options))


def _another_ships(settings: Settings) -> bool:
    try:
        with (settings.spool_dir / "ship.lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no spool yet, or not ours to read: the shipper tells
        return False
    return False


def _workloads(settings: Settings) -> list[str]:
    """Those of routing.yaml; none where it can't be read, for the log is there without it."""
    from routing.rules import load

    try:
        return list(load(settings.routing_file, environment()).table.plans)
    except RoutingError:
        return []


def _warn(text: str) -> None:
    typer.echo(f"understudy: {text}", err=True)
