"""Understudy as a target: with everything on, without the log, with two workers."""

import contextlib
import json
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from gateway.config import environment
from tests.bench.side_by_side.processes import move, running, tree
from tests.bench.side_by_side.programs import CannotMeasure
from tests.bench.side_by_side.targets import Place, Start, Target, collector, when_ready
from tests.ports import free_port

__all__ = ["OURS"]

# Everything that a gateway in production has on, in one place: what is added to it belongs here.
SETTINGS = """
data_dir = "{folder}/data"
routing_file = "{folder}/routing.yaml"
[gateway]
port = {port}
workers = {workers}
auth = "on"
"""
ENVIRONMENT = {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:{collector}/v1/traces"}
ROUTING = """
version: 1
models:
  prod: {{upstream: nim, base_url: 'http://127.0.0.1:{upstream}/v1', model: big, price: {{input: 0.60, output: 0.60}}}}
  spare: {{upstream: nim, base_url: 'http://127.0.0.1:{upstream}/v1', model: spare}}
workloads:
  tools: {{match: {{tools: [lookup]}}, serve: prod}}
  search: {{match: {{header: {{x-workload-id: search}}}}, serve: prod}}
  support: {{match: {{header: {{x-workload-id: support}}}}, serve: prod, fallbacks: [spare], sticky: [session, user]}}
default: {{serve: prod}}
"""
BEHIND = {"shipper": "gateway.ship", "teller": "gateway.tell"}
HEADERS = {"x-workload-id": "support", "x-session-id": "session-1"}


def _written(place: Place, name: str, workers: int) -> tuple[Path, int]:
    """The settings file, and the port in it."""
    folder, port = place.under(name), free_port()
    (folder / "routing.yaml").write_text(ROUTING.format(upstream=place.upstream))
    config = folder / "understudy.toml"
    config.write_text(SETTINGS.format(folder=folder, port=port, workers=workers))
    return config, port


def _environment(collector: int = 0) -> dict[str, str]:
    """This process's, without what would change the settings; with a collector's port, what is on beside these."""
    mine = {name: value for name, value in environment().items() if not name.startswith(("UNDERSTUDY_", "OTEL_"))}
    return mine | (
        {name: value.format(collector=collector) for name, value in ENVIRONMENT.items()} if collector else {}
    )


def _headers(config: Path) -> dict[str, str]:
    """With the secret of a key that is made for the run."""
    _understudy("db", "upgrade", "--config", str(config))
    made = _understudy("keys", "create", "--client", "bench", "--config", str(config), "--json")
    return {**HEADERS, "authorization": f"Bearer {json.loads(made)['secret']}"}


def _understudy(*arguments: str) -> str:
    command = [sys.executable, "-m", "flywheel.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=_environment())
    if done.returncode:
        raise CannotMeasure(f"understudy {' '.join(arguments[:2])}: {done.stderr.strip()}")
    return done.stdout


@contextlib.contextmanager
def _served(place: Place, *, name: str, workers: int) -> Iterator[Target]:
    """`understudy serve`. Its shipper and its teller work on the load's core, at idle priority."""
    config, port = _written(place, name, workers)
    folder, headers = config.parent, _headers(config)
    on = [place.cores.target] if workers == 1 else [place.cores.target, place.cores.second]
    command = [sys.executable, "-m", "flywheel.cli", "serve", "--config", config]
    with (
        collector(place, folder) as spans,
        running(command, folder / "log", on=on, env=_environment(spans)) as process,
    ):
        when_ready(name, port, folder / "log", headers)
        pids = tree(process.pid)
        behind = {what: _running(pids, module)[0] for what, module in BEHIND.items()}
        for pid in behind.values():
            move(pid, place.cores.load, idle=True)
        yield Target(
            name=name,
            port=port,
            pids=tuple(pids),
            serving=tuple(pid for pid in pids if pid not in behind.values()),
            workers=tuple(_running(pids, "gateway.worker")),
            headers=headers,
            behind=behind,
            shipped=folder / "data" / "run" / "ship.json",
        )


@contextlib.contextmanager
def _unlogged(place: Place) -> Iterator[Target]:
    """One worker by itself, whose exchanges go nowhere; the rest is the same, calls get their place in a trace too."""
    name = "understudy-nolog"
    config, port = _written(place, name, 1)
    folder, headers = config.parent, _headers(config)
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(4096)
        fd = listener.fileno()
        command = [sys.executable, "-m", "tests.bench.side_by_side.unlogged_worker", "--fd", fd, "--config", config]
        env = _environment(place.upstream)  # nobody tells of spans: they are made from the log
        with running(command, folder / "log", on=[place.cores.target], env=env, pass_fds=[fd]) as process:
            when_ready(name, port, folder / "log", headers)
            pids = tuple(tree(process.pid))
            yield Target(name=name, port=port, pids=pids, serving=pids, workers=pids, headers=headers)


def _running(pids: list[int], module: str) -> list[int]:
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):
            if module.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


OURS: Mapping[str, Start] = {
    "understudy": partial(_served, name="understudy", workers=1),
    "understudy-nolog": _unlogged,
    "understudy-2w": partial(_served, name="understudy-2w", workers=2),
}
