"""/api/audit: the newest entries of the audit log. Its chain is proved by `understudy audit verify`, from its start."""

from typing import Annotated, Any

from fastapi import APIRouter, Query
from sqlalchemy.ext.asyncio import AsyncEngine

from flywheel.api.bodies import AuditBody
from flywheel.client_keys import Text
from routing.audit import as_json
from routing.audit_store import newest
from routing.tables import reading

__all__ = ["AuditRoutes"]

JSON = dict[str, Any]


class AuditRoutes:
    """The handler, on one control database."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    def router(self) -> APIRouter:
        routes = APIRouter(prefix="/api/audit", tags=["audit"])
        routes.add_api_route("", self.listing, response_model=list[AuditBody])
        return routes

    async def listing(
        self,
        kind: Annotated[
            Text | None, Query(description="Only this kind, as rollout.approved, or family, as rollout.")
        ] = None,
        subject: Annotated[Text | None, Query(description="Only this rollout, run, adapter, key or snapshot.")] = None,
        limit: Annotated[int, Query(ge=1, le=1000, description="At most so many.")] = 20,
    ) -> list[JSON]:
        """Entries, newest first: rollouts, runs, datasets, adapters, keys, config snapshots, what was erased."""
        async with reading(self._engine) as connection:
            found = await newest(connection, kind=kind, subject=subject, limit=limit)
        return [as_json(entry) for entry in found]
