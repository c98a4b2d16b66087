"""Options that several commands have, written once: which settings file, which workload, text or JSON."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["AsJson", "Config", "Workload"]

Config = Annotated[Path | None, typer.Option(help="Settings file; understudy.toml here if it is there.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON instead of text.")]
Workload = Annotated[str | None, typer.Option(help="Only this workload.")]
