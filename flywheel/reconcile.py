"""Puts adapters back that a model server lacks: what is wanted is compared with what it serves, again and again."""

from collections.abc import Collection, Mapping

import httpx
import structlog

from flywheel.adapters import Adapters
from flywheel.serve import ServeError, Server
from routing.targets import Model, Ref

__all__ = ["Reconciler"]

log = structlog.get_logger(__name__)


class Reconciler:
    """Loads missing adapters. Safe to call as often as one likes; a server's trouble is logged when it changes."""

    def __init__(self, adapters: Adapters, client: httpx.AsyncClient) -> None:
        self._adapters = adapters
        self._client = client
        self._trouble: dict[str, str] = {}

    async def reconcile(self, wanted: Collection[Ref], models: Mapping[str, Model]) -> Mapping[str, str]:
        """Load what is wanted and missing. Returns each troubled model's or adapter's problem; {} is all well."""
        trouble: dict[str, str] = {}
        for name in sorted({ref.model for ref in wanted if ref.adapter}):
            adapters = sorted({ref.adapter for ref in wanted if ref.model == name and ref.adapter})
            model = models.get(name)
            if model is None:
                trouble[name] = "routing.yaml has no such model any more"
            else:
                trouble |= await self._restore(model, adapters)
        self._tell(trouble)
        return trouble

    async def _restore(self, model: Model, names: Collection[str]) -> dict[str, str]:
        server = Server(model.base_url, self._client, api_key=model.api_key)
        try:
            missing = sorted(set(names) - set(await server.models()))
        except ServeError as error:
            return {model.name: str(error)}
        known = {adapter.name: adapter for adapter in await self._adapters.list(missing)} if missing else {}
        trouble: dict[str, str] = {}
        for name in missing:
            if name not in known:
                trouble[f"{model.name}:{name}"] = "no run has registered this adapter"
                continue
            try:
                await server.load_adapter(name, known[name].path)
                log.info("adapter loaded", model=model.name, adapter=name)
            except ServeError as error:
                trouble[f"{model.name}:{name}"] = str(error)
        return trouble

    def _tell(self, trouble: dict[str, str]) -> None:
        for name, problem in trouble.items():
            if self._trouble.get(name) != problem:
                log.warning("an adapter that is wanted is not served", target=name, problem=problem)
        for name in self._trouble.keys() - trouble.keys():
            log.info("served again", target=name)
        self._trouble = trouble
