"""`GET /v1/models` and `/v1/models/{id}`: the names that routing.yaml knows, in OpenAI's shape; what each is for."""

from collections.abc import Iterator
from typing import Any, Protocol

import orjson
from starlette.requests import Request
from starlette.responses import Response

from gateway.auth import Key, may_use
from gateway.breaker import Breakers
from gateway.errors import error_body
from routing.targets import Model, Plan, Ref, RouteTable, Target

__all__ = ["ModelsEndpoint", "models_of"]


class _Table(Protocol):
    """gateway.snapshot.Snapshot."""

    @property
    def table(self) -> RouteTable: ...


class ModelsEndpoint:
    """One worker's view."""

    def __init__(self, snapshot: _Table, breakers: Breakers) -> None:
        self._snapshot = snapshot
        self._breakers = breakers

    async def list(self, request: Request) -> Response:
        """The models that routing.yaml names, then the names that its rules ask for; those that the key may use."""
        data = models_of(self._snapshot.table, request.scope.get("key"), self._breakers.tripped)
        return Response(orjson.dumps({"object": "list", "data": data}), media_type="application/json")

    async def one(self, request: Request) -> Response:
        """One of them, or 404 with `model_not_found`."""
        name = request.path_params["name"]
        for model in models_of(self._snapshot.table, request.scope.get("key"), self._breakers.tripped):
            if model["id"] == name:
                return Response(orjson.dumps(model), media_type="application/json")
        told = f"no model {name} is here that this call may use; GET /v1/models lists those that are"
        body = error_body(told, kind="invalid_request_error", code="model_not_found", param="model")
        return Response(body, status_code=404, media_type="application/json")


def models_of(table: RouteTable, key: Key | None, tripped: list[str]) -> list[dict[str, Any]]:
    """OpenAI's model objects; `x-understudy` in each is for all but keys that are limited to some models.

    `tripped` are the targets whose breakers are open.
    """
    bare = key is not None and bool(key.models)
    asked = _asked_for(table)
    found = [
        _object(name, model.provider, {} if bare else _detail(table, model, asked.get(name, []), tripped))
        for name, model in table.models.items()
        if key is None or may_use(key, name) is None
    ]
    for name in sorted(asked.keys() - table.models.keys()):
        served = {Ref.parse(table.routes[workload].serve).model for workload in asked[name]}
        if key is None or any(may_use(key, model) is None for model in served):
            found.append(_object(name, "understudy", {} if bare else {"workloads": asked[name]}))
    return found


def _object(name: str, owner: str, detail: dict[str, Any]) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": owner} | (
        {"x-understudy": detail} if detail else {}
    )


def _asked_for(table: RouteTable) -> dict[str, list[str]]:
    """By the name that clients may ask for: the workloads whose rules look for it."""
    found: dict[str, list[str]] = {}
    for route in table.matchers:
        for name in route.match.models:
            found.setdefault(name, []).append(route.workload)
    return found


def _detail(table: RouteTable, model: Model, workloads: list[str], tripped: list[str]) -> dict[str, Any]:
    return {
        "model": model.model,
        "adapters": model.adapters,
        "price": {"input": model.price.input, "output": model.price.output} if model.price else None,
        "open_breakers": [name for name in tripped if Ref.parse(name).model == model.name],
        "workloads": workloads,
        "parts": [part for plan in table.plans.values() for part in _parts(plan, model.name)],
    }


def _parts(plan: Plan, model: str) -> Iterator[dict[str, Any]]:
    """What a model does for one workload: shares in per cent."""
    weight = plan.overlay.weight if plan.overlay is not None and plan.candidate is not None else 0
    serving = [(part.target, part.share) for part in plan.split] or [(plan.incumbent, 100 - weight)]
    mirrors = {mirror.target.name: mirror.share * 100 for mirror in plan.incumbent_mirrors}
    told: list[tuple[dict[str, Any], Target]] = [
        ({"as": "incumbent", "share": share}, target) for target, share in serving
    ]
    if plan.candidate is not None:
        share = {"share": weight, "mirror": mirrors.pop(plan.candidate.name, 0)}
        told.append(({"as": "candidate"} | share, plan.candidate))
    told += [({"as": "fallback"}, target) for target in plan.incumbent_fallbacks]
    told += [
        ({"as": "mirror", "mirror": mirrors[mirror.target.name]}, mirror.target)
        for mirror in plan.incumbent_mirrors
        if mirror.target.name in mirrors
    ]
    for what, target in told:
        if target.ref.model == model:
            adapter = {"adapter": target.ref.adapter} if target.ref.adapter else {}
            yield {"workload": plan.route.workload} | what | adapter
