"""`understudy demo`: the whole story on sample traffic, from the first request to promotion and back."""

import asyncio
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def demo(
    data: Annotated[str, typer.Option(help="JSONL file with text, intent, slots; or `generated`.")] = "generated",
    label: Annotated[str, typer.Option(help="The file's key that names the tool.")] = "intent",
    only: Annotated[str, typer.Option(help="Labels to keep, separated by commas.")] = "",
    labels: Annotated[Literal["logged", "shuffled"], typer.Option(help="shuffled: train on nonsense.")] = "logged",
    upstream: Annotated[
        str, typer.Option(help="Base URL of a real model, instead of the stand-in; its key in UPSTREAM_API_KEY.")
    ] = "",
    upstream_model: Annotated[str, typer.Option(help="The name it knows its model by.")] = "stand-in-70b",
    base: Annotated[Path | None, typer.Option(help="Base model: a folder that vLLM and transformers load.")] = None,
    records: Annotated[int, typer.Option(min=100, help="Exchanges to learn from.")] = 685,
    seed: Annotated[int, typer.Option(help="Of data, split and training.")] = 7,
    python: Annotated[Path, typer.Option(help="Python of the models' environment.")] = Path(".models/bin/python"),
    folder: Annotated[Path, typer.Option(help="Working folder; what lies there from before is removed.")] = Path(
        "demo-data"
    ),
    reports: Annotated[Path, typer.Option(help="Where demo-report.json and demo-report.html go.")] = Path(),
) -> None:
    """Play the whole story: traffic, log, training, rehearsal, promotion, a breakdown, and the way back.

    Everything is real but the production model, whose stand-in answers from the data (or use --upstream). All
    processes run on free loopback ports and are ended with the demo. Exit code 0: promoted, or rightly rejected;
    1: something was lost or did not work; 2: the input cannot be used.

    Example:

        understudy demo
        understudy demo --data snips.jsonl
        understudy demo --data clinc150.jsonl --label domain --only banking,travel,work,small_talk
        understudy demo --labels shuffled
    """
    from rich.console import Console

    from flywheel.demo.bases import base_for
    from flywheel.demo.setting import Options
    from flywheel.demo.story import play, workload_of
    from flywheel.demo.terminal import Terminal
    from flywheel.report import print_report, write
    from flywheel.serve import distribution
    from gateway.config import environment
    from gateway.supervise import interrupted
    from gateway.telemetry import configure_logging

    distribution(python)  # told now, not after the traffic
    console = Console()
    _clear(folder)
    options = Options(
        data=data,
        label=label,
        only=tuple(name for name in only.split(",") if name),
        shuffled=labels == "shuffled",
        upstream=upstream,
        upstream_model=upstream_model,
        records=records,
        seed=seed,
        folder=folder,
        reports=reports,
        python=python,
    )
    workload_of(options)  # wrong data is told before anything is trained on or started
    with (folder / "demo.log").open("w") as log, Terminal(console) as terminal:
        configure_logging("demo", stream=log)
        options = replace(options, base=base or base_for(data, python, terminal, keep=folder))
        report = asyncio.run(interrupted(play(options, environment(), terminal)))
    print_report(report, console)
    for path in write(report, reports):
        console.print(f"written: {path}")
    raise typer.Exit(1 if report.outcome == "failed" else 0)


def _clear(folder: Path) -> None:
    """Remove what an earlier demo left, and nothing else: bases that were pretrained stay."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("data", "logs", "routing.yaml", "understudy.toml"):
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
