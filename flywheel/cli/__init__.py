"""The command `understudy`: thin verbs, one file for each group; heavy imports wait until a verb runs."""

import importlib
import sys
from typing import Any

import typer
from typer.core import TyperGroup

GROUPS = {
    "serve": ("flywheel.cli.serve", "Run the gateway."),
    "work": ("flywheel.cli.work", "Run the controller: flywheel runs, rollouts, adapters, scoring."),
    "up": ("flywheel.cli.up", "Run gateway and controller on this machine, supervised."),
    "demo": ("flywheel.cli.demo", "Play the whole story on sample traffic."),
    "doctor": ("flywheel.cli.doctor", "Say what is missing on this machine and how to get it."),
    "compile": ("flywheel.cli.compile", "Make the gateway's hot path native code."),
    "db": ("flywheel.cli.db", "Upgrade the control database, or show its state."),
    "keys": ("flywheel.cli.keys", "Make, list and revoke clients' keys."),
    "routes": ("flywheel.cli.routes", "Check, show, explain and compare routing.yaml."),
    "runs": ("flywheel.cli.runs", "Start, list, show and cancel flywheel runs."),
    "rollout": ("flywheel.cli.rollout", "Start a rollout, watch it, approve, pause, abort or undo it."),
    "audit": ("flywheel.cli.audit", "Show the audit log, prove that nobody changed it, export it."),
    "logs": ("flywheel.cli.logs", "Read, export and import the log of exchanges; see that nothing is missing."),
}


class _LazyGroup(TyperGroup):
    """Imports a command's module only when that command is asked for, so that `understudy --help` is quick."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(GROUPS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in GROUPS:
            return None
        module, summary = GROUPS[cmd_name]
        app: typer.Typer = importlib.import_module(module).app
        command = typer.main.get_command(app)
        command.name = cmd_name
        command.short_help = summary
        return command


app = typer.Typer(
    cls=_LazyGroup,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Pass traffic through, learn from it, rehearse a small model, hand over when it is safe.",
)


@app.callback()
def _root() -> None:
    """Pass traffic through, learn from it, rehearse a small model, hand over when it is safe."""


def main() -> None:
    """Run the command; an expected error is one line on stderr and exit code 2, never a traceback."""
    from gateway.errors import UnderstudyError
    from routing.errors import RoutingError

    try:
        app()
    except (UnderstudyError, RoutingError) as error:
        sys.stderr.write(f"understudy: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
