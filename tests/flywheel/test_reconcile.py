"""Adapters come back after a model server was restarted, and a server's trouble is told once."""

import time
from collections.abc import AsyncIterator, Iterator

import httpx
import pytest
from structlog.testing import capture_logs

from flywheel.adapters import Adapters
from flywheel.reconcile import Reconciler
from flywheel.runs import Runs
from migrations.upgrade import upgrade
from routing.store import connect
from routing.targets import Model, Ref
from tests.flywheel.examples import says
from tests.flywheel.fake_vllm import FakeVllm, fake_vllm
from tests.flywheel.test_runs import ADAPTER

WANTED = [Ref(model="small", adapter=ADAPTER.name), Ref(model="prod")]


@pytest.fixture
def vllm() -> Iterator[FakeVllm]:
    with fake_vllm(lambda _model, _body: says("hello")) as fake:
        yield fake


@pytest.fixture
async def reconciler(sqlite_url: str) -> AsyncIterator[Reconciler]:
    await upgrade(sqlite_url)
    engine = connect(sqlite_url)
    client = httpx.AsyncClient()
    try:
        await Runs(engine).create(run_id="run-1", workload="desk", options={}, who="test", now=1.0)
        await Adapters(engine).keep(ADAPTER)
        yield Reconciler(Adapters(engine), client)
    finally:
        await client.aclose()
        await engine.dispose()


def _models(url: str) -> dict[str, Model]:
    return {"small": Model(name="small", upstream="vllm", base_url=url, model="tiny", adapters=True)}


async def test_a_missing_adapter_is_loaded_once(vllm: FakeVllm, reconciler: Reconciler) -> None:
    for _ in range(3):
        assert await reconciler.reconcile(WANTED, _models(vllm.url)) == {}
    assert vllm.adapters == {ADAPTER.name: ADAPTER.path}
    assert vllm.asked["load"] == 1


async def test_a_restarted_server_gets_its_adapters_back(vllm: FakeVllm, reconciler: Reconciler) -> None:
    await reconciler.reconcile(WANTED, _models(vllm.url))
    vllm.adapters.clear()
    await reconciler.reconcile(WANTED, _models(vllm.url))
    assert ADAPTER.name in vllm.adapters


async def test_a_dead_server_is_told_once_and_holds_nobody_up(vllm: FakeVllm, reconciler: Reconciler) -> None:
    began = time.monotonic()
    with capture_logs() as logs:
        for _ in range(5):
            trouble = await reconciler.reconcile(WANTED, _models("http://127.0.0.1:9/v1"))
            assert "ConnectError" in trouble["small"]
        await reconciler.reconcile(WANTED, _models(vllm.url))
    assert time.monotonic() - began < 5
    assert [entry["event"] for entry in logs].count("an adapter that is wanted is not served") == 1
    assert logs[-1]["event"] == "served again"


async def test_a_refused_adapter_is_told_with_the_server_s_words(vllm: FakeVllm, reconciler: Reconciler) -> None:
    vllm.refuse_loading = "LoRA rank 64 is greater than max_lora_rank 32."
    trouble = await reconciler.reconcile(WANTED, _models(vllm.url))
    assert "HTTP 400" in trouble[f"small:{ADAPTER.name}"]
    assert "max_lora_rank 32" in trouble[f"small:{ADAPTER.name}"]


async def test_an_adapter_that_no_run_made_or_a_model_that_is_gone_is_told(
    vllm: FakeVllm, reconciler: Reconciler
) -> None:
    wanted = [Ref(model="small", adapter="unknown"), Ref(model="gone", adapter="a")]
    trouble = await reconciler.reconcile(wanted, _models(vllm.url))
    assert trouble == {
        "small:unknown": "no run has registered this adapter",
        "gone": "routing.yaml has no such model any more",
    }
    assert vllm.adapters == {}
