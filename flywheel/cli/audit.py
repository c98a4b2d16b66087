"""`understudy audit`: show the audit log, prove that nobody changed it, export it with a head that proves it later."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flywheel.cli.options import AsJson, Config
from flywheel.cli.output import Progress, dump, until_reader_leaves

if TYPE_CHECKING:
    from gateway.config import Settings

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Show the audit log, prove that nobody changed it, export it. Each entry holds the hash of the one before.",
)


@app.command("list")
def list_(
    kind: Annotated[
        str | None, typer.Option(help="Only this kind, as rollout.approved, or family, as rollout.")
    ] = None,
    subject: Annotated[str | None, typer.Option(help="Only this rollout, run, adapter, digest or snapshot.")] = None,
    number: Annotated[int, typer.Option("-n", "--number", "--limit", min=1, help="At most so many.")] = 20,
    config: Config = None,
    json: AsJson = False,
) -> None:
    """Entries, newest first: rollouts, runs, datasets, adapters, keys, config snapshots, what was erased.

    Example:

        understudy audit list --kind rollout.approved -n 5
    """
    from flywheel.cli.audit_file import as_text, listing
    from flywheel.cli.stores import with_engine
    from gateway.config import load_settings
    from routing.audit import AuditEntry, as_json
    from routing.audit_store import newest
    from routing.tables import reading

    async def read(engine: Any) -> list[AuditEntry]:
        async with reading(engine) as connection:
            return await newest(connection, kind=kind, subject=subject, limit=number)

    settings = load_settings(config)
    found = with_engine(settings, read)
    _tell_waiting(settings)
    with until_reader_leaves():
        typer.echo(as_text([as_json(entry) for entry in found], pretty=True) if json else listing(found))


@app.command()
def verify(
    head: Annotated[
        str | None,
        typer.Option(metavar="FILE_OR_HASH", help="An export, its last line, or the hash that it ends with."),
    ] = None,
    config: Config = None,
    json: AsJson = False,
) -> None:
    """Go along the chain, and say the first entry that was changed, removed or moved.

    By itself it finds what somebody changed who could not write all later hashes anew, but not that the newest entries
    are gone. With the head of an export it finds everything up to that head. Exit codes: 0 intact; 1 broken; 2 the log
    or FILE cannot be read.

    Example:

        understudy audit verify --head audit.jsonl
    """
    from flywheel.cli.audit_file import expected
    from flywheel.cli.stores import with_engine
    from gateway.config import load_settings
    from routing import audit_store

    settings = load_settings(config)
    with expected(head) as verifier:
        broken = with_engine(settings, lambda engine: audit_store.verify(engine, verifier))
    _tell_waiting(settings)
    end = verifier.head
    if json:
        typer.echo(dump({"intact": broken is None, "entries": end.seq, "head": end, "broken": broken}))
    elif broken is None:
        typer.echo(f"intact: {end.seq:,} entries, head {end.hash}")
    else:
        typer.echo(f"broken at entry {broken.seq}: {broken.what}")
    raise typer.Exit(0 if broken is None else 1)


@app.command()
def export(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File instead of stdout; whole or not at all.")
    ] = None,
    config: Config = None,
) -> None:
    """Write all entries as JSON lines, oldest first, and the head in the last line: keep it where nobody else writes.

    Exit codes: 0 the chain is intact; 1 it is broken (all entries are written, and no head); 2 it cannot be read.

    Example:

        understudy audit export -o audit.jsonl
    """
    from flywheel.cli.audit_file import write
    from flywheel.cli.logs_export import target
    from flywheel.cli.stores import with_engine
    from gateway.config import load_settings

    progress = Progress()
    settings = load_settings(config)
    with until_reader_leaves(), target(output) as out:
        head, broken = with_engine(settings, lambda engine: write(engine, out, progress))
    _tell_waiting(settings)
    if broken is not None:
        progress.say(f"broken at entry {broken.seq}: {broken.what}; no head was written")
        raise typer.Exit(1)
    if output is not None:
        typer.echo(f"{output}: {head.seq:,} entries, head {head.hash}")


def _tell_waiting(settings: "Settings") -> None:
    from flywheel.audit import WAITING

    if count := len(list((settings.data_dir / WAITING).glob("*.json"))):
        typer.echo(f"{count} more wait in {settings.data_dir / WAITING} until the controller takes them in", err=True)
