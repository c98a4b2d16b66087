"""/api/keys: clients' keys, made, listed and revoked."""

import time
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request

from flywheel.api.bodies import KeptKeyBody, MadeKeyBody, NewKeyBody, WhoBody
from flywheel.client_keys import kept_json, key_json, make
from gateway.errors import RequestRefused
from gateway.keys import Keys

__all__ = ["KeyRoutes"]

JSON = dict[str, Any]


class KeyRoutes:
    """The handlers, on one control database."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys

    def router(self) -> APIRouter:
        routes = APIRouter(prefix="/api/keys", tags=["keys"])
        routes.add_api_route("", self.listing, response_model=list[KeptKeyBody])
        routes.add_api_route("", self.create, methods=["POST"], status_code=201, response_model=MadeKeyBody)
        routes.add_api_route("/{key_id}/revoke", self.revoke, methods=["POST"], response_model=KeptKeyBody)
        return routes

    async def listing(self) -> list[JSON]:
        """All keys there ever were, oldest first, with their limits and state. No secret is among it."""
        now = time.time()
        return [kept_json(kept, now) for kept in await self._keys.list()]

    async def create(self, request: Request, body: NewKeyBody) -> JSON:
        """Make a key. Its secret is in this reply and nowhere else; running gateways know it in a second."""
        who = request.scope["caller"].named(body.who)
        try:
            key, secret = await make(self._keys, body, who=who, now=time.time())
        except ValueError as error:
            raise RequestRefused(400, f"expires: {error}", code="bad_request", param="expires") from None
        return key_json(key) | {"secret": secret}

    async def revoke(
        self,
        request: Request,
        key_id: Annotated[str, Path(description="The key's id, such as key-7.")],
        body: WhoBody,
    ) -> JSON:
        """Revoke a key: within a second no running gateway takes it. Revoking it again changes nothing."""
        now = time.time()
        kept = await self._keys.revoke(key_id, who=request.scope["caller"].named(body.who), now=now)
        return kept_json(kept, now)
