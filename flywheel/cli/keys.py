"""`understudy keys`: make, list and revoke clients' keys."""

import time
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from flywheel.cli.options import AsJson, Config
from flywheel.cli.output import columns, dump, user
from flywheel.cli.stores import with_keys
from flywheel.client_keys import MOST, MOST_USD, NewKey, kept_json, key_json, make
from gateway.auth import Key
from gateway.config import load_settings
from gateway.errors import ConfigError

app = typer.Typer(
    add_completion=False, rich_markup_mode=None, no_args_is_help=True, help="Make, list and revoke clients' keys."
)


@app.command()
def create(
    client: Annotated[str, typer.Option(help="Who its calls come from, whatever they say themselves.")] = "",
    workload: Annotated[str, typer.Option(help="What its calls belong to where they name no workload.")] = "",
    scopes: Annotated[str, typer.Option(help="Of data, feedback, admin; separated by commas.")] = "data",
    models: Annotated[str, typer.Option(help="Models of routing.yaml that it may be routed to; all if none.")] = "",
    rpm: Annotated[int | None, typer.Option(min=1, max=MOST, help="Requests a minute.")] = None,
    tpm: Annotated[int | None, typer.Option(min=1, max=MOST, help="Tokens a minute, read and written.")] = None,
    daily_usd: Annotated[float | None, typer.Option(min=0, max=MOST_USD, help="USD a day (UTC).")] = None,
    expires: Annotated[str | None, typer.Option(help="In 90d, 12h or 30m, or at an ISO time.")] = None,
    config: Config = None,
    json: AsJson = False,
) -> None:
    """Make a key. Its secret goes to stdout, this once: it is stored nowhere. Running gateways know it in a second.

    Exit code 2: an option cannot be used, or the control database does not answer.

    Example:

        understudy keys create --client shop --scopes data,feedback --rpm 600 --daily-usd 20 --expires 90d
    """
    now = time.time()
    settings = load_settings(config)
    new = _new(
        now,
        client=client,
        workload=workload,
        scopes=_several(scopes),
        models=_several(models),
        rpm=rpm,
        tpm=tpm,
        daily_usd=daily_usd,
        expires=expires,
    )
    key, secret = with_keys(settings, lambda keys: make(keys, new, who=user(), now=now))
    if json:
        typer.echo(dump(key_json(key) | {"secret": secret}))
        return
    whose = f" of client {key.client}" if key.client else ""
    typer.echo(f"{key.id}{whose}, {_may(key)}; its secret is shown this once:", err=True)
    typer.echo(secret)
    if not settings.gateway.authenticates:
        typer.echo(f"note: gateway.auth is {settings.gateway.auth}, so this gateway asks nobody for a key", err=True)


@app.command("list")
def list_keys(config: Config = None, json: AsJson = False) -> None:
    """All keys there ever were, oldest first, with their limits and state. No secret is among it.

    Example:

        understudy keys list --json
    """
    now = time.time()
    found = with_keys(load_settings(config), lambda keys: keys.list())
    if json:
        typer.echo(dump([kept_json(kept, now) for kept in found]))
        return
    rows = (
        (
            kept.key.id,
            kept.key.client or "-",
            kept.key.workload or "-",
            _may(kept.key),
            _limits(kept.key),
            _time(kept.key.expires_at),
            kept.state(now),
        )
        for kept in found
    )
    typer.echo(columns(("KEY", "CLIENT", "WORKLOAD", "MAY", "LIMITS", "EXPIRES", "STATE"), rows))


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="The key's id, such as key-7.")],
    config: Config = None,
    json: AsJson = False,
) -> None:
    """Revoke a key: within a second no running gateway takes it. Calls that are under way end as they would have.

    Revoking it again changes nothing. Exit code 2: there is no such key, or the control database does not answer.

    Example:

        understudy keys revoke key-7
    """
    now = time.time()
    kept = with_keys(load_settings(config), lambda keys: keys.revoke(key_id, who=user(), now=now))
    if json:
        typer.echo(dump(kept_json(kept, now)))
        return
    whose = f" of client {kept.key.client}" if kept.key.client else ""
    typer.echo(f"{kept.key.id}{whose}: revoked {_time(kept.revoked_at)} by {kept.revoked_by}")


def _new(now: float, **options: Any) -> NewKey:
    try:
        new = NewKey(**options)
        new.expires_at(now)
    except ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][0]).replace("_", "-")
        raise ConfigError(f"--{option}: {first['msg'].removeprefix('Value error, ')}") from None
    except ValueError as error:
        raise ConfigError(f"--expires: {error}") from None
    return new


def _several(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _may(key: Key) -> str:
    return "+".join(sorted(key.scopes)) + (f" on {','.join(sorted(key.models))}" if key.models else "")


def _limits(key: Key) -> str:
    daily = None if key.daily_usd is None else f"{key.daily_usd:g}"
    limits = ((key.rpm, "rpm"), (key.tpm, "tpm"), (daily, "USD/day"))
    return ", ".join(f"{limit} {unit}" for limit, unit in limits if limit is not None) or "-"


def _time(at: float | None) -> str:
    return "-" if at is None else datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M")
