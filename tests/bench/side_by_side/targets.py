"""What is measured beside ours: the upstream itself, nginx, and four peers as their makers deliver them."""

import contextlib
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tests.bench.side_by_side.processes import Cores, running, tree
from tests.bench.side_by_side.programs import CannotMeasure
from tests.ports import free_port

__all__ = ["CONTENT", "PEERS", "REPLY", "Place", "Start", "Target", "chat", "collector", "upstream", "when_ready"]

CONTENT = "x" * 850
REPLY = json.dumps(
    {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1700000000,
        "model": "m",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": CONTENT}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 250, "completion_tokens": 200, "total_tokens": 450},
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where targets are started, and in front of what: plain calls are answered by nginx, streams by our program."""

    folder: Path  # on disk
    environments: Path  # of the peers
    cores: Cores
    upstream: int  # its port
    streams: bool
    program: Path  # the folder of our programs in C

    def under(self, name: str) -> Path:
        made = self.folder / name
        made.mkdir()
        return made


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A server that runs. `pids` are its processes, all of which sleep while it is not measured."""

    name: str
    port: int
    pids: tuple[int, ...]
    serving: tuple[int, ...]  # whose CPU time counts
    workers: tuple[int, ...]  # whose memory counts
    headers: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    exact: bool = True  # it hands replies over byte for byte
    behind: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))  # by what they are: shipper, teller
    shipped: Path | None = None  # what the shipper says of itself


Start = Callable[[Place], AbstractContextManager[Target]]


def chat(prompt: str, **more: object) -> dict[str, Any]:
    """A chat body."""
    return {"model": "m", "messages": [{"role": "user", "content": prompt}], **more}


def when_ready(name: str, port: int, log: Path, headers: Mapping[str, str], *, patience: float = 90.0) -> None:
    """Return when a call is answered with 200. Raises CannotMeasure with the end of the log when none is."""
    body = json.dumps(chat("Are you there?", max_tokens=1)).encode()
    fields = {"content-type": "application/json", **headers}
    asked = urllib.request.Request(f"http://127.0.0.1:{port}/v1/chat/completions", data=body, headers=fields)
    until, problem = time.monotonic() + patience, "no answer"
    while time.monotonic() < until:
        try:
            with urllib.request.urlopen(asked, timeout=5) as reply:
                json.load(reply)
                return
        except urllib.error.HTTPError as error:
            problem = f"status {error.code}: {error.read()[:200]!r}"
        except (OSError, ValueError) as error:
            problem = str(error)
        time.sleep(0.1)
    raise CannotMeasure(f"{name} does not answer: {problem}; its log ends: {log.read_text()[-300:]!r}")


_NGINX = """
worker_processes 1; daemon off; pid {folder}/pid; error_log {folder}/errors;
events {{ worker_connections 8192; }}
http {{
  access_log off; client_body_temp_path {folder}/b; proxy_temp_path {folder}/p; fastcgi_temp_path {folder}/f;
  uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s; keepalive_requests 100000000;
  client_body_buffer_size 64k; client_max_body_size 64m;
  upstream up {{ server 127.0.0.1:{upstream}; keepalive 128; keepalive_requests 100000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{ {location} }}
  }}
}}
"""
_PROXY = 'proxy_pass http://up; proxy_http_version 1.1; proxy_set_header Connection "";'


@contextlib.contextmanager
def _nginx(name: str, folder: Path, location: str, *, port: int, upstream: int, core: int) -> Iterator[Target]:
    config = folder / "nginx.conf"
    config.write_text(_NGINX.format(folder=folder, port=port, upstream=upstream, location=location))
    with running(["nginx", "-c", config], folder / "log", on=[core]) as process:
        when_ready(name, port, folder / "log", {})
        yield _whole(name, port, process.pid)


@contextlib.contextmanager
def upstream(place: Place, *, core: int, port: int, name: str) -> Iterator[Target]:
    """What answers at once, with 1 KB, or with events."""
    folder = place.under(name)
    if not place.streams:
        answer = f"default_type application/json; return 200 '{REPLY}';"
        with _nginx(name, folder, answer, port=port, upstream=port, core=core) as made:
            yield made
        return
    with running([place.program / "streams", "serve", "--port", port], folder / "log", on=[core]) as process:
        when_ready(name, port, folder / "log", {})
        yield _whole(name, port, process.pid)


@contextlib.contextmanager
def collector(place: Place, folder: Path) -> Iterator[int]:
    """What takes spans by OTLP over HTTP, on the load's core; its port."""
    made, port = folder / "collector", free_port()
    made.mkdir()
    location = "if ($uri = /v1/traces) { return 200; } return 200 '{}';"
    with _nginx("collector", made, location, port=port, upstream=port, core=place.cores.load) as target:
        yield target.port


def direct(place: Place) -> AbstractContextManager[Target]:
    """The upstream itself in a target's place: nothing between."""
    return upstream(place, core=place.cores.target, port=free_port(), name="direct")


def nginx(place: Place) -> AbstractContextManager[Target]:
    """One worker, keep-alive to the upstream, no access log; events go on as they come."""
    location = f"{_PROXY} proxy_buffering off;" if place.streams else _PROXY
    folder, core = place.under("nginx"), place.cores.target
    return _nginx("nginx", folder, location, port=free_port(), upstream=place.upstream, core=core)


_LITELLM = """
model_list:
  - model_name: m
    litellm_params: {{model: openai/m, api_base: "http://127.0.0.1:{upstream}/v1", api_key: none}}
litellm_settings: {{request_timeout: 60, num_retries: 0}}
"""


@contextlib.contextmanager
def litellm(place: Place) -> Iterator[Target]:
    """LiteLLM's proxy with one worker; no database, no callbacks, no key check."""
    folder, port = place.under("litellm"), free_port()
    config = folder / "config.yaml"
    config.write_text(_LITELLM.format(upstream=place.upstream))
    env = {
        "PATH": f"{place.environments / 'litellm' / 'bin'}:/usr/bin:/bin",
        "HOME": str(folder),
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_LOG": "ERROR",
        "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
    }
    program = place.environments / "litellm" / "bin" / "litellm"
    options = ["--config", config, "--host", "127.0.0.1", "--port", port, "--num_workers", 1, "--telemetry", "False"]
    with running([program, *options], folder / "log", on=[place.cores.target], env=env, cwd=folder) as process:
        when_ready("litellm", port, folder / "log", {})
        yield _whole("litellm", port, process.pid, exact=False)


@contextlib.contextmanager
def portkey(place: Place) -> Iterator[Target]:
    """Portkey's gateway on Node."""
    folder, port = place.under("portkey"), free_port()
    program = place.environments / "portkey/node_modules/@portkey-ai/gateway/build/start-server.js"
    env = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(folder), "TRUSTED_CUSTOM_HOSTS": "127.0.0.1,localhost"}
    headers = {
        "authorization": "Bearer none",
        "x-portkey-provider": "openai",
        "x-portkey-custom-host": f"http://127.0.0.1:{place.upstream}/v1",
    }
    command = ["node", program, f"--port={port}", "--headless"]
    with running(command, folder / "log", on=[place.cores.target], env=env, cwd=folder) as process:
        when_ready("portkey", port, folder / "log", headers)
        yield _whole("portkey", port, process.pid, headers=headers, exact=False)


def _router(name: str, command: Callable[[Path], list[object]]) -> Start:
    @contextlib.contextmanager
    def start(place: Place) -> Iterator[Target]:
        folder, port = place.under(name), free_port()
        options = ["--worker-urls", f"http://127.0.0.1:{place.upstream}", "--host", "127.0.0.1", "--port", port]
        options += ["--policy", "round_robin", "--prometheus-port", free_port(), "--log-level", "error"]
        launched = [*command(place.environments / name / "bin"), *options]
        with running(launched, folder / "log", on=[place.cores.target], cwd=folder) as process:
            when_ready(name, port, folder / "log", {})
            yield _whole(name, port, process.pid, exact=False)

    return start


def _whole(
    name: str, port: int, pid: int, *, headers: Mapping[str, str] = MappingProxyType({}), exact: bool = True
) -> Target:
    """A target all of whose processes serve."""
    pids = tuple(tree(pid))
    return Target(name=name, port=port, pids=pids, serving=pids, workers=pids, headers=headers, exact=exact)


PEERS: Mapping[str, Start] = {
    "direct": direct,
    "nginx": nginx,
    "litellm": litellm,
    "portkey": portkey,
    "vllm-router": _router("vllm-router", lambda bin: [bin / "vllm-router"]),
    "sglang-router": _router("sglang-router", lambda bin: [bin / "python", "-m", "sglang_router.launch_router"]),
}
