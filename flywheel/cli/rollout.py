"""`understudy rollout`: start a rollout, watch it, approve, pause, abort or undo it."""

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console

from flywheel import intent
from flywheel.approver import authenticated
from flywheel.cli.options import AsJson, Config, Workload
from flywheel.cli.output import dump, user
from flywheel.cli.rollout_follow import follow, looking
from flywheel.cli.rollout_gates import expectations
from flywheel.cli.rollout_view import history_lines, line, listing, panel
from flywheel.cli.stores import with_engine, with_log_store, with_rollouts
from flywheel.intent import Asked
from flywheel.shares import shares
from flywheel.status import as_json, expected_json
from flywheel.status import history as history_of
from gateway.config import Settings, environment, load_settings
from gateway.errors import StoreError
from gateway.logstore.open import open_log_store
from routing.errors import RulesError
from routing.rollout import Rollout
from routing.rules import Rules, load
from routing.store import Entry, Rollouts
from routing.targets import Ref

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    help="""Start a rollout, watch it, approve, pause, abort or undo it. NAME is a rollout's id, or a workload.

Exit codes of `status`, and of every verb with --wait: 0 promoted, or on its way; 1 aborted or superseded; 3 a person
has to act (paused, waiting for approval, degraded); 4 the timeout passed. Of all verbs: 2 refused, or the command
itself went wrong, with one line on stderr; else 0.""",
)

Name = Annotated[str, typer.Argument(help="A rollout's id, or the workload whose rollout is meant.")]
Who = Annotated[str, typer.Option(help="Who asks; the user of this machine where not given.")]
Why = Annotated[str, typer.Option(help="Why; it goes into the history.")]
Wait = Annotated[bool, typer.Option(help="Stay until it is promoted, ended, or waits for a person; exits as status.")]
IfVersion = Annotated[
    int | None, typer.Option(min=0, help="Only if nobody changed it since this version (of `get --json`).")
]
Timeout = Annotated[float, typer.Option(min=0, help="With --wait: seconds to wait; 0 waits for ever.")]


@app.command()
def start(
    workload: str,
    candidate: Annotated[str, typer.Option(help="MODEL of routing.yaml, or MODEL:ADAPTER.")],
    supersede: Annotated[bool, typer.Option(help="End a rollout that is under way on the workload.")] = False,
    despite_cooldown: Annotated[
        bool, typer.Option(help="Although it was taken back a short while ago; wants a --why.")
    ] = False,
    wait: Wait = False,
    timeout: Timeout = 0,
    who: Who = "",
    why: Why = "",
    config: Config = None,
    json: AsJson = False,
) -> None:
    """Start a rollout by the steps and gates that routing.yaml gives the workload.

    What its gates compare with is measured on the log now, and stays. Each gate is told with the pairs that it will
    need about.

    Example:

        understudy rollout start support-router --candidate small-1b:support-router-7 --why "first adapter"
    """
    from gateway.ids import new_id

    settings = load_settings(config)
    rules = load(settings.routing_file, environment())
    asked = Asked(who=who or user(), why=why, now=time.time(), config_snapshot=rules.table.snapshot)

    async def act(store: Rollouts) -> Rollout:
        logs = open_log_store(settings.log_store)
        try:
            return await intent.start(
                store,
                logs,
                rules,
                asked,
                rollout_id=new_id(),
                workload=workload,
                candidate=Ref.parse(candidate),
                supersede=supersede,
                despite_cooldown=despite_cooldown,
            )
        finally:
            await logs.close()

    started = with_rollouts(settings, act)
    if not json and (warning := _few_keys(settings, rules, workload)):
        typer.echo(f"note: {warning}", err=True)
    if json and not wait:
        typer.echo(dump(as_json(started) | {"expected": expected_json(started.policy)}))
        return
    if not json:
        typer.echo(f"rollout {started.id}: {line(started)}\n{expectations(started.policy)}")
    if wait:
        raise typer.Exit(_follow(settings, started.id, True, timeout, json))


@app.command("list")
def list_(
    workload: Workload = None,
    live: Annotated[bool, typer.Option(help="Only those that hold their workload.")] = False,
    config: Config = None,
    json: AsJson = False,
) -> None:
    """Rollouts, newest first.

    Example:

        understudy rollout list --live
    """
    found = with_rollouts(load_settings(config), lambda store: store.list(workload, live=live))
    if json:
        typer.echo(dump([as_json(rollout) for rollout in found]))
        return
    typer.echo(listing(found))


@app.command()
def get(name: Name, config: Config = None, json: AsJson = False) -> None:
    """One rollout: step, weight and actual share, each gate with its estimate, bounds and counts.

    Example:

        understudy rollout get support-router --json
    """
    settings = load_settings(config)

    async def read(store: Rollouts) -> None:
        async with looking(settings, store) as look:
            view = await look.at(name)
        if json:
            typer.echo(dump(as_json(view.rollout, view)))
        else:
            Console().print(panel(view, time.time()))

    with_rollouts(settings, read)


@app.command()
def status(
    name: Name,
    watch: Annotated[bool, typer.Option(help="Stay until it is promoted, ended, or waits for a person.")] = False,
    timeout: Annotated[float, typer.Option(min=0, help="With --watch: seconds to wait; 0 waits for ever.")] = 0,
    config: Config = None,
    json: AsJson = False,
) -> None:
    """Where a rollout stands. With --watch a live view; off a terminal, or with --json, a line for each change.

    Exit codes: 0 promoted, or on its way; 1 aborted or superseded; 3 a person has to act (paused, waiting for
    approval, degraded); 4 the timeout passed; 2 the command itself went wrong.

    Example:

        understudy rollout status support-router --watch --timeout 600
    """
    raise typer.Exit(_follow(load_settings(config), name, watch, timeout, json))


@app.command()
def promote(
    name: Name,
    full: Annotated[bool, typer.Option(help="Go to promoted at once, without waiting for evidence.")] = False,
    wait: Wait = False,
    timeout: Timeout = 0,
    who: Who = "",
    why: Why = "",
    if_version: IfVersion = None,
    config: Config = None,
    json: AsJson = False,
) -> None:
    """Approve the end of the present step; the controller goes on when the evidence is there.

    Where the workload says `approvers: 2`, two different people must, each with an admin key of their own in
    UNDERSTUDY_KEY.

    Example:

        understudy rollout promote support-router --why "numbers look right"
    """
    settings = load_settings(config)
    approver = with_engine(settings, lambda engine: authenticated(settings, engine))
    asked = _asked(settings, who, why, if_version)
    _ask(settings, lambda store: intent.promote(store, name, asked, full=full, approver=approver), json, wait, timeout)


@app.command()
def pause(
    name: Name, who: Who = "", why: Why = "", if_version: IfVersion = None, config: Config = None, json: AsJson = False
) -> None:
    """Stop the rise; the weight stays where it is.

    Example:

        understudy rollout pause support-router --why "release freeze"
    """
    settings = load_settings(config)
    asked = _asked(settings, who, why, if_version)
    _ask(settings, lambda store: intent.pause(store, name, asked), json)


@app.command()
def resume(
    name: Name,
    wait: Wait = False,
    timeout: Timeout = 0,
    who: Who = "",
    why: Why = "",
    if_version: IfVersion = None,
    config: Config = None,
    json: AsJson = False,
) -> None:
    """Let a paused rollout go on, its step begins again; or close the case of a degraded one.

    Example:

        understudy rollout resume support-router
    """
    settings = load_settings(config)
    asked = _asked(settings, who, why, if_version)
    _ask(settings, lambda store: intent.resume(store, name, asked), json, wait, timeout)


@app.command()
def abort(
    name: Name, who: Who = "", why: Why = "", if_version: IfVersion = None, config: Config = None, json: AsJson = False
) -> None:
    """End a rollout; what served before it serves again.

    Example:

        understudy rollout abort support-router --why "wrong adapter"
    """
    settings = load_settings(config)
    asked = _asked(settings, who, why, if_version)
    _ask(settings, lambda store: intent.abort(store, name, asked), json)


@app.command()
def undo(
    name: Name, who: Who = "", why: Why = "", if_version: IfVersion = None, config: Config = None, json: AsJson = False
) -> None:
    """Take a workload's newest rollout back, at once, whether or not a controller runs.

    Example:

        understudy rollout undo support-router --why "customer complaint"
    """
    settings = load_settings(config)
    asked = _asked(settings, who, why, if_version)
    _ask(settings, lambda store: intent.undo(store, name, asked), json)


@app.command()
def history(
    name: Annotated[str | None, typer.Argument(help="A rollout's id or a workload; all where not given.")] = None,
    config: Config = None,
    json: AsJson = False,
) -> None:
    """Who or what did what, when and why; oldest first. With --json: with the evidence of that moment.

    Example:

        understudy rollout history support-router
    """

    async def read(store: Rollouts) -> Sequence[Entry]:
        return await history_of(store, name)

    entries = with_rollouts(load_settings(config), read)
    if json:
        typer.echo(dump([asdict(entry) for entry in entries]))
        return
    typer.echo(history_lines(entries))


def _asked(settings: Settings, who: str, why: str, if_version: int | None) -> Asked:
    return Asked(
        who=who or user(), why=why, now=time.time(), config_snapshot=_snapshot(settings), if_version=if_version
    )


def _ask(
    settings: Settings,
    act: Callable[[Rollouts], Awaitable[Rollout]],
    json: bool,
    wait: bool = False,
    timeout: float = 0,
) -> None:
    rollout = with_rollouts(settings, act)
    if not (wait and json):
        typer.echo(dump(as_json(rollout)) if json else f"rollout {rollout.id}: {line(rollout)}")
    if wait:
        raise typer.Exit(_follow(settings, rollout.id, True, timeout, json))


def _follow(settings: Settings, name: str, watch: bool, timeout: float, json: bool) -> int:
    deadline = time.monotonic() + timeout if watch and timeout else None
    return with_rollouts(settings, lambda store: follow(settings, store, name, watch, deadline, json))


def _few_keys(settings: Settings, rules: Rules, workload: str) -> str:
    """What is to be said of the workload's sticky keys; nothing where the log cannot be read."""
    try:
        return with_log_store(settings, lambda logs: shares(logs, rules.table.route_of(workload))).warning
    except StoreError:
        return ""


def _snapshot(settings: Settings) -> str:
    """The name of the rules in force, for the history; a broken file does not stop an abort."""
    try:
        return load(settings.routing_file, environment()).table.snapshot
    except RulesError:
        return ""
