"""The control plane beside the controller: who serves it, and where; and that the data plane has none of it."""

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from structlog.testing import capture_logs

from flywheel.api.serve import ControlPlane
from gateway.config import Settings
from gateway.errors import ConfigError
from gateway.tasks import Tasks
from tests.flywheel.control import Plane, answers
from tests.gateway.conftest import running
from tests.ports import free_port
from tests.routing.examples import ENV, ROUTING_YAML

ROOT = Path(__file__).parents[2]


async def test_understudy_work_serves_it_and_stops_in_order(tmp_path: Path) -> None:
    """Also while it is not the active one, and before the tables are there."""
    plane = Plane(tmp_path, free_port())
    words = [sys.executable, "-m", "flywheel.cli", "work", "--config", str(plane.config)]
    with (tmp_path / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(*words, cwd=ROOT, stderr=log, env={**os.environ, **ENV})
    try:
        await answers(plane.client)
        async with asyncio.timeout(60):
            while (await plane.client.get("/api/rollouts")).status_code != 200:
                await asyncio.sleep(0.05)
        assert "<title>Understudy: rollouts</title>" in (await plane.client.get("/")).text
        assert (await plane.client.get("/api/rollouts/" + await plane.start())).json()["state"] == "shadow"
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(60):
            assert await process.wait() == 0
        assert b"Traceback" not in (tmp_path / "log").read_bytes()
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        await plane.client.aclose()
        await plane.engine.dispose()


async def test_of_two_with_one_port_the_second_takes_over(tmp_path: Path) -> None:
    """What holds the port stops nothing else; it is told once."""
    port = free_port()
    first, second, tasks = asyncio.Event(), asyncio.Event(), Tasks()
    settings = Settings(data_dir=tmp_path, routing_file=tmp_path / "routing.yaml", api={"port": port})
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        one = tasks.spawn("one", ControlPlane(settings, env={}).run(first))
        await answers(client)
        with capture_logs() as logs:
            tasks.spawn("two", ControlPlane(settings, env={}).run(second))
            async with asyncio.timeout(30):
                while not any("cannot listen" in line["event"] for line in logs):
                    await asyncio.sleep(0.01)
            first.set()
            await one
            await answers(client)
        assert [line["event"] for line in logs if "cannot listen" in line["event"]] == [
            "the control plane cannot listen, and tries again; set api.port, or 0 for none"
        ]
        second.set()
        assert await tasks.drain(10) == 0


async def test_a_port_of_0_serves_nothing(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, routing_file=tmp_path / "routing.yaml", api={"port": 0})
    await asyncio.wait_for(ControlPlane(settings, env={}).run(asyncio.Event()), 5)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "understudy.example"])
def test_an_address_for_everybody_wants_keys(tmp_path: Path, host: str) -> None:
    """Unlike the gateway's there is no word that opens it."""
    files = {"data_dir": tmp_path, "routing_file": tmp_path / "routing.yaml"}
    open_gateway = {"host": "0.0.0.0", "auth": "off", "open_to_network": True}
    with pytest.raises(ConfigError, match="anybody could hand your traffic over"):
        ControlPlane(Settings(**files, api={"host": host, "auth": "off"}, gateway=open_gateway), env={})
    ControlPlane(Settings(**files, api={"host": host, "auth": "off", "port": 0}), env={})
    assert Settings(**files, api={"host": host}, gateway=open_gateway).api_authenticates


@pytest.mark.parametrize(
    ("gateway", "api", "wanted"),
    [("auto", "auto", False), ("on", "auto", True), ("on", "off", False), ("off", "on", True), ("off", "auto", False)],
)
def test_on_loopback_keys_are_wanted_where_the_gateway_wants_them(gateway: str, api: str, wanted: bool) -> None:
    assert Settings(gateway={"auth": gateway}, api={"auth": api}).api_authenticates is wanted


async def test_the_data_plane_has_none_of_it(settings_of: Callable[[], Settings]) -> None:
    async with running(settings_of()) as gateway:
        for path in ("/", "/api/rollouts", "/api/keys", "/api/openapi.json", "//api/rollouts", "/v1/../api/rollouts"):
            reply = await gateway.client.get(path)
            assert (reply.status_code, reply.json()["error"]["code"]) == (404, "unknown_path"), path
        reply = await gateway.client.post("/api/rollouts/r1/promote", json={"full": True})
        assert reply.status_code == 404


@pytest.fixture
def settings_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Settings]:
    monkeypatch.setenv("NIM_API_KEY", ENV["NIM_API_KEY"])
    (tmp_path / "routing.yaml").write_text(ROUTING_YAML)
    return lambda: Settings(data_dir=tmp_path / "data", routing_file=tmp_path / "routing.yaml")
