"""The control plane on a socket of its own, without a controller: what tests ask, and what they look up beside it."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
from click.testing import Result
from typer.testing import CliRunner

from flywheel.api.serve import ControlPlane
from flywheel.cli import app
from gateway.auth import Scope
from gateway.config import load_settings
from gateway.keys import Keys
from gateway.tasks import Tasks
from migrations.upgrade import upgrade
from routing.store import Rollouts, connect
from tests.ports import free_port
from tests.routing.examples import ENV, ROUTING_YAML

START = {"workload": "support-router", "candidate": "small-1b:a1", "why": "first adapter"}


class Plane:
    """One installation with its control plane; `client` asks it, `rollouts` and `keys` look behind it."""

    def __init__(self, folder: Path, port: int, *lines: str) -> None:
        self.folder = folder
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.config = folder / "understudy.toml"
        top = [f'data_dir = "{folder}/data"', f'routing_file = "{folder}/routing.yaml"']
        self.config.write_text("\n".join([*top, "[api]", f"port = {port}", *lines]) + "\n")
        (folder / "routing.yaml").write_text(ROUTING_YAML)
        (folder / "data").mkdir()
        self.settings = load_settings(self.config)
        self.engine = connect(self.settings.database)
        self.rollouts = Rollouts(self.engine)
        self.keys = Keys(self.engine)
        self.client = httpx.AsyncClient(base_url=self.url, timeout=30)

    async def post(self, path: str, **body: Any) -> httpx.Response:
        return await self.client.post(path, json=body)

    async def start(self, **more: Any) -> str:
        """The id of a rollout that was started by HTTP."""
        reply = await self.post("/api/rollouts", **START, **more)
        assert reply.status_code == 201, reply.text
        return str(reply.json()["id"])

    async def secret(self, client: str, scope: Scope = Scope.ADMIN) -> str:
        return (await self.keys.create(who="test", now=1.0, client=client, scopes=[scope]))[1]

    def rules_say(self, old: str, new: str) -> None:
        (self.folder / "routing.yaml").write_text(ROUTING_YAML.replace(old, new))

    async def command(self, *words: str, **env: str) -> Result:
        """`understudy …` on the same installation."""
        runner = CliRunner(env={**ENV, **env})
        return await asyncio.to_thread(runner.invoke, app, [*words, "--config", str(self.config)])


@asynccontextmanager
async def served(folder: Path, *lines: str, upgraded: bool = True) -> AsyncIterator[Plane]:
    """`lines` are more of the settings, beginning in the section [api]."""
    plane, tasks, stop = Plane(folder, free_port(), *lines), Tasks(), asyncio.Event()
    try:
        if upgraded:
            await upgrade(plane.settings.database)
        tasks.spawn("control plane", ControlPlane(plane.settings, env={**os.environ, **ENV}).run(stop))
        await answers(plane.client)
        yield plane
    finally:
        stop.set()
        assert await tasks.drain(30) == 0
        await plane.client.aclose()
        await plane.engine.dispose()


async def answers(client: httpx.AsyncClient, seconds: float = 60) -> None:
    """Wait until somebody answers."""
    async with asyncio.timeout(seconds):
        while True:
            with suppress(httpx.TransportError):
                if (await client.get("/healthz")).status_code == 200:
                    return
            await asyncio.sleep(0.02)
