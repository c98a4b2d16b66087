"""The demo's setting: its folder, routing.yaml and settings file, and the real processes that play in it."""

import asyncio
import os
import signal
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import yaml

from flywheel.serve import distribution, serve_command, serve_environment
from gateway.config import Settings, load_settings
from gateway.errors import ConfigError, UnderstudyError
from gateway.supervise import Child, Supervisor, python
from gateway.tasks import Tasks

__all__ = ["FLOOR", "WORKLOAD", "Options", "Setting"]

WORKLOAD = "support-router"
FLOOR = 0.80
UPSTREAM_KEY = "UPSTREAM_API_KEY"
BASE = Path(__file__).with_name("base")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the demo was asked to play. `data` is `generated` or a JSONL file; `upstream` a real server's base URL."""

    data: str = "generated"
    label: str = "intent"
    only: tuple[str, ...] = ()
    shuffled: bool = False
    upstream: str = ""
    upstream_model: str = "stand-in-70b"
    records: int = 685
    seed: int = 7
    latency_ms: float = 300.0
    wrong: float = 0.04
    base: Path = BASE
    folder: Path = Path("demo-data")
    reports: Path = Path()
    python: Path = Path(".models/bin/python")
    min_pairs: int = 60
    retries: int = 0


@dataclass(slots=True, kw_only=True)
class Setting:
    """The processes of one demo, each on a free loopback port. `close` ends every one of them, and only them."""

    options: Options
    env: Mapping[str, str]
    ports: dict[str, int] = field(default_factory=dict)
    settings: Settings = field(init=False)
    _stops: dict[str, asyncio.Event] = field(default_factory=dict)
    _supervisors: dict[str, Supervisor] = field(default_factory=dict)
    _tasks: Tasks = field(default_factory=Tasks)

    def __post_init__(self) -> None:
        """Writes routing.yaml and understudy.toml: the gate's floor stands there before anything is trained."""
        for name in ("gateway", "stand-in", "vllm"):
            self.ports[name] = _free_port()
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "routing.yaml").write_text(yaml.safe_dump(self._routing(), sort_keys=False))
        self.config.write_text(
            f'data_dir = "{self.folder}/data"\nrouting_file = "{self.folder}/routing.yaml"\n\n'
            f"[gateway]\nport = {self.ports['gateway']}\ndrain = 10.0\n\n[api]\nport = 0\n\n"
            f'[work]\ntick = 0.3\nlease = 5.0\n\n[models]\npython = "{self.options.python.absolute()}"\n'
        )
        self.settings = load_settings(self.config)

    @property
    def folder(self) -> Path:
        return self.options.folder.absolute()

    @property
    def config(self) -> Path:
        return self.folder / "understudy.toml"

    @property
    def gateway_url(self) -> str:
        return f"http://127.0.0.1:{self.ports['gateway']}"

    @property
    def upstream_url(self) -> str:
        return self.options.upstream or f"http://127.0.0.1:{self.ports['stand-in']}/v1"

    @property
    def vllm_url(self) -> str:
        return f"http://127.0.0.1:{self.ports['vllm']}/v1"

    def start(self, *names: str) -> None:
        """Start processes; one that dies is started again."""
        for name in names:
            stop = self._stops[name] = asyncio.Event()
            supervisor = self._supervisors[name] = Supervisor([self._child(name)], grace=25.0)
            self._tasks.spawn(f"supervise {name}", supervisor.run(stop))

    def pid(self, name: str) -> int:
        """The process's id, which is its process group's too. Raises UnderstudyError while it is not running."""
        process = self._supervisors[name].running.get(name)
        if process is None:
            raise UnderstudyError(f"{name} is not running; its log is {self.log(name)}")
        return process.pid

    def log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"

    def freeze(self, name: str) -> None:
        """The process and all it started stop answering, without ending."""
        os.killpg(self.pid(name), signal.SIGSTOP)

    def thaw(self, name: str) -> None:
        with suppress(ProcessLookupError, UnderstudyError, KeyError):
            os.killpg(self.pid(name), signal.SIGCONT)

    async def ready(self, name: str, url: str, seconds: float) -> None:
        """Wait until `url` answers. Raises UnderstudyError, with the end of the process's log."""
        clock = asyncio.get_running_loop().time
        until = clock() + seconds
        restarts = self._supervisors[name].restarts
        async with httpx.AsyncClient(timeout=5) as client:
            while clock() < until and restarts[name] < 3:
                with suppress(httpx.HTTPError):
                    if (await client.get(url)).status_code == 200:
                        return
                await asyncio.sleep(0.2)
        raise UnderstudyError(f"{name} does not answer; {_tail(self.log(name))}")

    async def close(self) -> None:
        """End all processes: first those that write, so that the log is shipped whole."""
        self.thaw("vllm")
        for stop in self._stops.values():
            stop.set()
        await self._tasks.drain(40.0)
        await self._tasks.close()

    def _child(self, name: str) -> Child:
        log = self.log(name)
        log.parent.mkdir(parents=True, exist_ok=True)
        match name:
            case "gateway":
                return Child(name=name, argv=python("flywheel.cli", "serve", "--config", str(self.config)), log=log)
            case "controller":
                return Child(name=name, argv=python("flywheel.cli", "work", "--config", str(self.config)), log=log)
            case "stand-in":
                return Child(name=name, argv=python("gateway.leash", *self._stand_in()), log=log)
            case "vllm":
                installed = distribution(self.options.python)
                command = serve_command(
                    self.options.python.absolute(),
                    str(self.options.base.absolute()),
                    "base",
                    self.ports["vllm"],
                    installed=installed,
                )
                env = serve_environment(self.env, installed=installed)
                return Child(name=name, argv=python("gateway.leash", *command), env=env, log=log)
            case _:
                raise ConfigError(f"the demo has no process {name}")

    def _stand_in(self) -> list[str]:
        options = self.options
        return python(
            "flywheel.demo.standin",
            *("--data", options.data, "--label", options.label, "--only", ",".join(options.only)),
            *("--port", str(self.ports["stand-in"]), "--seed", str(options.seed)),
            *("--latency-ms", str(options.latency_ms), "--wrong", str(options.wrong)),
        )

    def _routing(self) -> dict[str, object]:
        production: dict[str, object] = {
            "upstream": "nim" if not self.options.upstream else "openai",
            "base_url": self.upstream_url,
            "model": self.options.upstream_model,
            "price": {"input": 0.60, "output": 0.60},
        }
        if self.options.upstream and self.env.get(UPSTREAM_KEY):
            production["api_key"] = f"env:{UPSTREAM_KEY}"
        small = {
            "upstream": "vllm",
            "base_url": self.vllm_url,
            "model": "base",
            "adapters": True,
            "price": {"input": 0.01, "output": 0.01},
            "timeouts": {"connect": "2s", "first_token": "5s", "total": "30s"},
        }
        rollout = {
            "steps": [
                {"mirror": 1.0, "min_pairs": self.options.min_pairs},
                {"weight": 10, "hold": "2s", "min_exchanges": 10},
                {"weight": 50, "hold": "2s", "min_exchanges": 30},
                {"weight": 100, "hold": "2s", "min_exchanges": 30},
            ],
            "gates": [
                {"metric": "tool_name", "prove": {"at_least": FLOOR, "alpha": 0.05}},
                {"metric": "error_rate", "guard": {"at_most": 0.05}},
                {"metric": "latency_p95_ms", "guard": {"at_most": 3000}},
            ],
            "approval": "auto",
            "max_concurrency": 4,
        }
        workload = {
            "match": {"header": {"x-workload-id": WORKLOAD}},
            "serve": "production",
            "breaker": {"failures": 3, "open": "10m"},
            "rollout": rollout,
            "flywheel": {"base_models": ["small"], "min_records": 50, "seed": self.options.seed} | self._training(),
        }
        return {
            "version": 1,
            "models": {"production": production, "small": small},
            "workloads": {WORKLOAD: workload},
            "default": {"serve": "production"},
        }

    def _training(self) -> dict[str, object]:
        """Texts that people wrote are harder than generated ones: all are learnt, longer, and less by heart."""
        if self.options.data == "generated":
            return {}
        return {"validation_fraction": 0, "training": {"epochs": 32, "dropout": 0.3}}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()[-8:] if log.exists() else []
    return f"the end of {log}:\n" + "\n".join(lines)
