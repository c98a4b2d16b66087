"""Each call by its model's own way: directly, by an HTTP proxy, or through litellm."""

from collections.abc import Coroutine
from typing import Any

from gateway.outbox import Outbox
from gateway.upstream import Reply, UpstreamRequest
from gateway.upstream.direct import DirectUpstream
from gateway.upstream.via_litellm import LitellmUpstream
from gateway.upstream.via_proxy import ProxiedUpstream
from routing.targets import Model

__all__ = ["ChosenUpstream"]


class ChosenUpstream:
    """An Upstream with a pool of its own; `providers` is shared by all of a worker, and closed by its owner."""

    def __init__(self, providers: LitellmUpstream, outbox: Outbox | None = None) -> None:
        self._direct = DirectUpstream(outbox)
        self._proxied = ProxiedUpstream()
        self._providers = providers

    def send(self, model: Model, request: UpstreamRequest) -> Coroutine[Any, Any, Reply]:
        """See gateway.upstream.Upstream. No coroutine of its own: the direct way pays two looks."""
        if model.upstream == "litellm":
            return self._providers.send(model, request)
        if model.proxy is not None:
            return self._proxied.send(model, request)
        return self._direct.send(model, request)

    async def close(self) -> None:
        """Drop the idle connections."""
        await self._direct.close()
        await self._proxied.close()
