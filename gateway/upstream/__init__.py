"""The upstream's Protocol: send one request's bytes to a model, read the reply's bytes as they come."""

from collections.abc import Callable, Sequence
from typing import Protocol

from msgspec import Struct

from routing.targets import Model

__all__ = ["Headers", "Reply", "Upstream", "UpstreamRequest"]

Headers = Sequence[tuple[bytes, bytes]]


class UpstreamRequest(Struct, frozen=True, gc=False):
    """What goes up: `path` is below the model's base URL (`/chat/completions`), `headers` are filtered already."""

    path: str
    headers: Headers
    body: bytes
    method: str = "POST"
    repeatable: bool = True


class Reply(Protocol):
    """A reply whose head has come. `complete` turns true with the last byte of the body.

    `read` gives the next bytes, and b"" at the end; it raises UpstreamCut or UpstreamTimeout. What comes while it
    waits, and is not the end, it may hand to `each` at once, until that returns False: then it gives b"" as well.
    `close` gives the connection back, or drops it when the reply is not complete; it may be called at any time, more
    than once.
    """

    status: int
    headers: list[tuple[bytes, bytes]]
    complete: bool

    async def read(self, each: Callable[[bytes], bool] | None = None) -> bytes: ...

    def close(self) -> None: ...


class Upstream(Protocol):
    """Sends a request to a model. Raises ConnectError, UpstreamTimeout or UpstreamCut."""

    async def send(self, model: Model, request: UpstreamRequest) -> Reply: ...

    async def close(self) -> None: ...
