"""`understudy routes`: check, show, explain, compare, import and suggest what stands in routing.yaml."""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from flywheel.cli.logs_filters import Since, Until, within
from flywheel.cli.options import AsJson, Config
from flywheel.cli.output import Progress, columns, dump
from flywheel.cli.routes_exchange import as_named, asked_by, compared, logged
from flywheel.cli.routes_request import asked_of, body_of, headers_of, user_of
from flywheel.cli.stores import with_log_store
from gateway.config import Settings, environment, load_settings
from gateway.logstore import Query
from gateway.prices import listed_price
from gateway.upstream.via_litellm import installed, missing
from routing.conversation import conversation_key
from routing.errors import Unavailable
from routing.labels import labels_of
from routing.matching import Asked, conditions
from routing.policy import Call, Decision, Matched, choose, match
from routing.references import References
from routing.request import system_fingerprint
from routing.rules import Rules, load, with_overlays
from routing.targets import Overlay, Part, Plan, Route, RouteTable

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Check, show, explain and compare routing.yaml.",
)

JSON = dict[str, Any]
Origin = Literal["litellm", "tensorzero"]


@app.command()
def check(
    file: Annotated[Path | None, typer.Argument(help="The file; the settings' routing_file where not given.")] = None,
    config: Config = None,
    json: AsJson = False,
) -> None:
    """Check routing.yaml. Exit code 0 where it can be used; 2, and one line with file, line and key, where not.

    Example:

        understudy routes check routing.yaml
    """
    path = file or load_settings(config).routing_file
    rules = load(path, environment(), listed_price)
    lacking = [name for name, model in rules.table.models.items() if model.upstream == "litellm" and not installed()]
    unknown = [name for name, model in rules.table.models.items() if model.upstream == "litellm" and not model.price]
    found: JSON = {
        "file": str(path),
        "snapshot": rules.table.snapshot,
        "models": len(rules.table.models),
        "workloads": len(rules.table.routes),
        "rollouts": sorted(rules.rollouts),
        "flywheels": sorted(rules.flywheels),
        "not_callable": lacking,
        "price_unknown": unknown,
    }
    if lacking:
        typer.echo(f"note: {', '.join(lacking)}: {missing()}", err=True)
    elif unknown:
        typer.echo(f"note: {', '.join(unknown)}: litellm lists no price; their exchanges have no cost", err=True)
    if json:
        typer.echo(dump(found))
        return
    typer.echo(f"{path}: ok, {found['models']} models, {found['workloads']} workloads, snapshot {found['snapshot']}")


@app.command()
def show(config: Config = None, json: AsJson = False) -> None:
    """The routes in force: routing.yaml with the rollouts laid over it. Secrets are never shown.

    Example:

        understudy routes show --json
    """
    table, overlays = _table(load_settings(config))
    if json:
        typer.echo(dump(_table_json(table)))
        return
    typer.echo(f"snapshot {table.snapshot}")
    rows = (
        (name, _serves(plan), *_candidate_cells(plan), ", ".join(plan.route.fallbacks) or "-", _rule(plan))
        for name, plan in table.plans.items()
    )
    typer.echo(columns(("WORKLOAD", "SERVES", "CANDIDATE", "WEIGHT", "MIRROR", "ROLLOUT", "FALLBACKS", "MATCH"), rows))
    for plan in table.plans.values():
        if plan.lost:
            typer.echo(f"note: {plan.route.workload}: {plan.lost}", err=True)
    for name in sorted(set(overlays) - set(table.overlays)):
        typer.echo(f"note: the overlay of {name} is not laid (no such workload, or rollouts: off)", err=True)


@app.command()
def explain(
    header: Annotated[list[str] | None, typer.Option("--header", "-H", help="k=v, as often as wanted.")] = None,
    body: Annotated[str | None, typer.Option(help="File with the request's JSON body; - for stdin.")] = None,
    path: Annotated[str, typer.Option(help="Path that is called.")] = "/v1/chat/completions",
    default_workload: Annotated[str, typer.Option(help="Workload that the client's key stands for.")] = "",
    conversation: Annotated[
        str, typer.Option(help="Sticky key of the conversation; else its first messages' own.")
    ] = "",
    exchange: Annotated[str, typer.Option(metavar="ID", help="An exchange of the log instead of a request.")] = "",
    config: Config = None,
    json: AsJson = False,
) -> None:
    """Which workload a request belongs to, where it goes, and why.

    Shows the fingerprints of its tools and its system prompt, as routing.yaml takes them. With --exchange: where that
    exchange would go today, and what was decided then.

    Example:

        understudy routes explain --header x-workload-id=support-router --body request.json

        understudy routes explain --exchange 019a7b2c-5d1e-7f00-8a11-2b3c4d5e6f70
    """
    settings = load_settings(config)
    found = logged(settings, exchange, alone=not header and body is None) if exchange else None
    headers, asked = asked_by(found) if found else (headers_of(header or []), body_of(body))
    table, _ = _table(settings)
    episode = asked.get("tensorzero::episode_id")
    metadata = labels_of(headers, asked.get("metadata"), asked.get("tensorzero::tags"), episode)
    request = asked_of(found.path if found else path, headers, metadata, asked)
    by_body = match(table, request, default_workload)
    route = as_named(table, found, by_body.route) if found else by_body.route
    call = Call(
        workload=route.workload,
        exchange_id=exchange,
        session=headers.get("x-session-id") or metadata.get("session_id", ""),
        user=user_of(asked, metadata),
        conversation=conversation or conversation_key(asked.get("messages")),
    )
    told = _explained(table, route, call, choose(table, call), _why(table, request, Matched(route, by_body.by)))
    told |= {"tools": request.tools_fingerprint, "system": system_fingerprint(request.system)}
    told |= compared(found, told, by_body.route) if found else {}
    if json:
        typer.echo(dump(told))
        return
    for key, value in told.items():
        typer.echo(f"{key:<10} {_line(value)}")


@app.command()
def schema() -> None:
    """The JSON Schema of routing.yaml, for editors: completion, descriptions, wrong keys underlined.

    Example:

        understudy routes schema > routing.schema.json

    and as the first line of routing.yaml, for the YAML extension of most editors:

        # yaml-language-server: $schema=routing.schema.json
    """
    from routing.json_schema import json_schema

    typer.echo(dump(json_schema()))


@app.command("diff")
def diff_(
    before: Annotated[Path, typer.Argument(metavar="A", help="A routing.yaml.")],
    after: Annotated[Path | None, typer.Argument(metavar="[B]", help="Another; the settings' where not given.")] = None,
    config: Config = None,
    json: AsJson = False,
) -> None:
    """What changes, and for whom, from A to B. Exit code 0 where nothing does, 1 where something, 2 for a wrong file.

    Secrets are neither shown nor needed: of an env: reference only the name is compared.

    Example:

        git show HEAD~1:routing.yaml > /tmp/before.yaml; understudy routes diff /tmp/before.yaml routing.yaml
    """
    from flywheel.cli.routes_diff import as_json, compared, lines

    other = after or load_settings(config).routing_file
    old, new, changes = compared(before, other)
    told = dump(as_json(before, other, changes)) if json else "\n".join(lines(old, new, changes))
    typer.echo(told or f"{before} and {other} route the same")
    raise typer.Exit(1 if changes else 0)


@app.command("import")
def import_(
    source: Annotated[str, typer.Argument(metavar="FILE", help="Their file; - for stdin.")],
    origin: Annotated[Origin, typer.Option("--from", help="Whose file it is.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A file that is not there yet; else stdout.")] = None,
    json: AsJson = False,
) -> None:
    """Make a routing.yaml of LiteLLM's config.yaml or TensorZero's tensorzero.toml.

    What has no equivalent, or another one, is listed on stderr with its place in their file. Keys are not copied: they
    become env: references. Exit code 0 where a file was made, 2 where none could be.

    Example:

        understudy routes import --from litellm config.yaml --out routing.yaml
    """
    from flywheel.cli.routes_import import as_json, convert, said, write

    imported = convert(origin, source)
    if out is not None:
        write(out, imported)
    if json:
        typer.echo(dump(as_json(imported, source)))
        return
    if out is None:
        typer.echo(imported.text, nl=False)
    for line in said(imported, source):
        typer.echo(line, err=True)


@app.command()
def suggest(
    since: Since = None,
    until: Until = None,
    number: Annotated[int | None, typer.Option("-n", "--number", "--limit", min=1, help="The newest so many.")] = None,
    top: Annotated[int, typer.Option(min=1, help="So many groups.")] = 10,
    config: Config = None,
    json: AsJson = False,
) -> None:
    """Workloads for untagged traffic (workload default), by its tools and its system prompts; sections to paste.

    System prompts are compared without numbers, dates and ids. Exit code 0, also where there is nothing to suggest.

    Example:

        understudy routes suggest --since 7d
    """
    from flywheel.cli.routes_suggest import as_json, gathered, shown

    settings = load_settings(config)
    table = load(settings.routing_file, References()).table
    query = within(Query(newest_first=number is not None, limit=number), since, until, time.time())
    found = with_log_store(settings, lambda store: gathered(store, query, Progress()))
    told = as_json(*found, top, table.plans) if json else None
    typer.echo(dump(told) if told else shown(*found, top, table.plans, table.default.serve))


def _table(settings: Settings) -> tuple[RouteTable, Mapping[str, Overlay]]:
    rules: Rules = load(settings.routing_file, environment())
    try:
        overlays = asyncio.run(_overlays(settings.database))
    except Unavailable as error:
        typer.echo(f"note: without the rollouts: {error}", err=True)
        overlays = {}
    return with_overlays(rules, overlays), overlays


async def _overlays(url: str) -> Mapping[str, Overlay]:
    from migrations.upgrade import status
    from routing.store import Rollouts, connect

    current, _ = await status(url)
    if current is None:
        return {}
    engine = connect(url)
    try:
        _, overlays = await Rollouts(engine).current_overlays()
        return overlays
    finally:
        await engine.dispose()


def _explained(table: RouteTable, route: Route, call: Call, decision: Decision, why: str) -> JSON:
    overlay = table.overlays.get(route.workload)
    key = next((f"{name} {value}" for name in route.sticky if (value := getattr(call, name))), "")
    drawn = overlay is not None and 0 < overlay.weight < 100
    arm = f"{decision.arm} ({decision.reason})"
    if drawn and overlay and not key and not call.exchange_id:
        arm = f"drawn for each conversation: candidate in {overlay.weight} % (give --conversation or a session)"
    split = table.plans[route.workload].split
    if split and not key and not call.exchange_id:
        arm = f"drawn for each conversation: {_shares(split)} (give --conversation or a session)"
    model = decision.target.model
    return {
        "workload": route.workload,
        "because": why,
        "target": decision.target.name,
        "upstream": f"{model.base_url or model.upstream} as {model.model}",
        "arm": arm,
        "sticky": key or "none given",
        "fallbacks": [target.name for target in decision.fallbacks],
        "mirrors": [f"{mirror.target.name} ({mirror.share * 100:g} %)" for mirror in decision.mirrors],
        "rollout": decision.rollout,
        "snapshot": table.snapshot,
    }


def _line(value: object) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key} {_line(inner)}" for key, inner in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _why(table: RouteTable, asked: Asked, matched: Matched) -> str:
    for source, name in (
        ("header x-workload-id", asked.headers.get("x-workload-id")),
        ("metadata.workload_id", asked.metadata.get("workload_id")),
    ):
        if name and name in table.plans:
            return f"{source} names it"
        if name:
            typer.echo(f"note: {source} names {name}, which is no workload of routing.yaml", err=True)
    if matched.by == "rule":
        return f"its match holds, and no earlier one does: {', '.join(conditions(matched.route.match))}"
    return "the client's key stands for it" if matched.by == "key" else "no rule matched"


def _candidate_cells(plan: Plan) -> tuple[str, str, str, str]:
    overlay = plan.overlay
    if overlay is None or plan.candidate is None:
        return "-", "-", "-", "-"
    mirror = f"{overlay.mirror * 100:g} %" + (f", back {overlay.reverse_mirror * 100:g} %" * (overlay.weight > 0))
    return plan.candidate.name, f"{overlay.weight} %", mirror, overlay.rollout


def _serves(plan: Plan) -> str:
    return _shares(plan.split) or plan.incumbent.name


def _shares(split: tuple[Part, ...]) -> str:
    return ", ".join(f"{part.target.name} {part.share:g} %" for part in split)


def _rule(plan: Plan) -> str:
    return ", ".join(conditions(plan.route.match)) or "-"


def _table_json(table: RouteTable) -> JSON:
    models = {
        name: {key: value for key, value in asdict(model).items() if key != "api_key"}
        for name, model in table.models.items()
    }
    return {
        "snapshot": table.snapshot,
        "models": models,
        "routes": {name: asdict(plan.route) for name, plan in table.plans.items()},
        "overlays": {name: asdict(overlay) for name, overlay in table.overlays.items()},
    }
