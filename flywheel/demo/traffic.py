"""The application's side of the demo: the official openai client, and a ledger of every call it made."""

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import openai
from openai import AsyncOpenAI

from flywheel.demo.setting import WORKLOAD
from flywheel.demo.workload import Item, Workload

__all__ = ["Ledger", "Traffic"]


@dataclass(slots=True)
class Ledger:
    """What the clients saw: whole replies by exchange id, who served them, and every call that failed."""

    texts: dict[str, str] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    served: Counter[str] = field(default_factory=Counter)
    streamed: int = 0

    @property
    def sent(self) -> int:
        return len(self.texts) + len(self.errors)


class Traffic:
    """Sends items of a workload as an app would, every other one streamed. The app knows nothing of Understudy."""

    def __init__(self, base_url: str, workload: Workload, *, retries: int = 0) -> None:
        self.ledger = Ledger()
        self._workload = workload
        self._client = AsyncOpenAI(base_url=f"{base_url}/v1", api_key="demo", max_retries=retries, timeout=60)
        self._numbers = itertools.count()

    async def send(self, items: Iterable[Item], *, concurrency: int, on_done: Callable[[], object] = int) -> None:
        """Send all of `items`, `concurrency` at a time."""
        shared = iter(items)
        await asyncio.gather(*(self._worker(shared, on_done) for _ in range(concurrency)))

    async def close(self) -> None:
        await self._client.close()

    async def _worker(self, items: Iterator[Item], on_done: Callable[[], object]) -> None:
        for item in items:
            await self.one(item)
            on_done()

    async def one(self, item: Item) -> None:
        """One call. Its reply or its error goes into the ledger."""
        stream = next(self._numbers) % 2 == 1
        options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        try:
            reply = await self._client.chat.completions.with_raw_response.create(
                model="production",
                messages=[
                    {"role": "system", "content": self._workload.system_prompt},
                    {"role": "user", "content": item.text},
                ],
                tools=list(self._workload.tools),  # type: ignore[arg-type]  # plain JSON is what the client takes
                max_tokens=128,
                temperature=0,
                extra_headers={"x-workload-id": WORKLOAD},
                **options,
            )
            parsed: Any = reply.parse()
            if stream:
                async for _ in parsed:
                    pass
        except openai.OpenAIError as error:
            self.ledger.errors.append(f"{type(error).__name__}: {error}")
            return
        self.ledger.streamed += stream
        self.ledger.texts[reply.headers["x-understudy-exchange-id"]] = item.text
        self.ledger.served[reply.headers["x-understudy-model"]] += 1
