"""`understudy db`: upgrade the control database, or show its state."""

import asyncio

import typer

from flywheel.cli.options import AsJson, Config

app = typer.Typer(
    add_completion=False, rich_markup_mode=None, no_args_is_help=True, help="Upgrade the control database."
)


@app.command()
def upgrade(config: Config = None) -> None:
    """Create the control database's tables, or bring them to this version's form. Safe to repeat.

    Example:

        understudy db upgrade
    """
    from gateway.config import load_settings
    from migrations.upgrade import status as state_of
    from migrations.upgrade import upgrade as run

    url = load_settings(config).database

    async def act() -> tuple[str | None, str | None]:
        before, _ = await state_of(url)
        await run(url)
        after, _ = await state_of(url)
        return before, after

    before, after = asyncio.run(act())
    typer.echo(f"{_shown(url)}: {after}" if before == after else f"{_shown(url)}: {before or 'empty'} -> {after}")


@app.command()
def status(config: Config = None, json: AsJson = False) -> None:
    """Which revision the control database has, and which is the newest. Exit code 1 where they differ.

    Example:

        understudy db status --json
    """
    import orjson

    from gateway.config import load_settings
    from migrations.upgrade import status as state_of

    url = load_settings(config).database
    current, head = asyncio.run(state_of(url))
    if json:
        typer.echo(orjson.dumps({"database": _shown(url), "current": current, "head": head}).decode())
    else:
        hint = "" if current == head else f", newest {head}: run `understudy db upgrade`"
        typer.echo(f"{_shown(url)}: {current or 'empty'}{hint}")
    raise typer.Exit(0 if current == head else 1)


def _shown(url: str) -> str:
    """The URL without its password."""
    from sqlalchemy.engine import make_url

    return make_url(url).render_as_string(hide_password=True)
