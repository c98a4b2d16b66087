"""One gateway as it is run, in front of one strict upstream, for all clients of the session."""

import asyncio
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from gateway.records import Exchange
from tests.conformance.answers import MODEL
from tests.conformance.upstream import StrictUpstream, strict_upstream
from tests.gateway.served import Served

ROUTING = """
version: 1
models: {{{model}: {{upstream: openai, base_url: '{url}', model: {model}}}}}
default: {{serve: {model}}}
"""


@dataclass
class Ways:
    """To the same upstream: `direct`, and `through` the gateway. Both are base URLs that end in `/v1`."""

    upstream: StrictUpstream
    direct: str
    through: str
    served: Served
    runner: asyncio.Runner

    def logged(self, *ids: str) -> list[Exchange]:
        """The exchanges of these ids, once they have all been shipped."""

        async def wait() -> list[Exchange]:
            async with asyncio.timeout(60):
                while True:
                    found = {one.id: one for one in await self.served.logged()}
                    if found.keys() >= set(ids):
                        return [found[each] for each in ids]
                    await asyncio.sleep(0.1)

        return self.runner.run(wait())


@pytest.fixture(scope="session")
def ways() -> Iterator[Ways]:
    """Started once: every client may use them at any time."""
    with strict_upstream() as upstream, tempfile.TemporaryDirectory() as folder, asyncio.Runner() as runner:
        served = Served.make(Path(folder))
        (served.folder / "routing.yaml").write_text(ROUTING.format(model=MODEL, url=upstream.url))
        runner.run(served.start())
        try:
            yield Ways(upstream, upstream.url, f"http://127.0.0.1:{served.port}/v1", served, runner)
        finally:
            runner.run(served.stop())
