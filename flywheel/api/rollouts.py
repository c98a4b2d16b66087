"""/api/rollouts: list, look, ask. Each verb is a function of `flywheel.intent`, as it is for the commands."""

import time
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request

from flywheel import intent, status
from flywheel.api.bodies import AskedBody, PromoteBody, RolloutBody, StartBody, StartedBody
from flywheel.api.guard import Caller
from flywheel.api.rules_file import RulesFile
from flywheel.client_keys import Text
from flywheel.intent import Asked
from gateway.ids import new_id
from gateway.logstore import LogStore
from routing.rollout import Rollout
from routing.store import Entry, Rollouts
from routing.targets import Ref

__all__ = ["RolloutRoutes"]

_LOG_SECONDS = 15.0  # a page that is left open must not keep the log store busy

JSON = dict[str, Any]
Name = Annotated[Text, Path(description="A rollout's id, or the workload whose rollout is meant.")]
Verb = Callable[[Rollouts, str, Asked], Awaitable[Rollout]]


class RolloutRoutes:
    """The handlers, on one control database and one log store."""

    def __init__(self, rollouts: Rollouts, logs: LogStore, rules: RulesFile) -> None:
        self._rollouts = rollouts
        self._logs = logs
        self._rules = rules
        self._look = status.Look(rollouts, logs, rules.rules, log_seconds=_LOG_SECONDS)

    def router(self) -> APIRouter:
        routes, one = APIRouter(prefix="/api/rollouts", tags=["rollouts"]), "/{name:path}"
        routes.add_api_route("", self.listing, response_model=list[RolloutBody])
        routes.add_api_route("", self.start, methods=["POST"], status_code=201, response_model=StartedBody)
        for verb in (self.promote, self.pause, self.resume, self.abort, self.undo):
            routes.add_api_route(f"{one}/{verb.__name__}", verb, methods=["POST"], response_model=RolloutBody)
        routes.add_api_route(f"{one}/history", self.history, response_model=list[Entry])
        routes.add_api_route(f"{one}/status", self.status, response_model=RolloutBody)
        routes.add_api_route(one, self.get, response_model=RolloutBody)
        return routes

    async def listing(
        self,
        workload: Annotated[Text | None, Query(description="Only this workload.")] = None,
        live: Annotated[bool, Query(description="Only those that hold their workload.")] = False,
        limit: Annotated[int, Query(ge=1, le=1000, description="At most so many.")] = 100,
    ) -> list[JSON]:
        """Rollouts, newest first, without what the controller saw of them and without their traffic."""
        found = await self._rollouts.list(workload, live=live, limit=limit)
        return [status.as_json(rollout) for rollout in found]

    async def get(self, name: Name) -> JSON:
        """One rollout with each gate's estimate, bounds and samples as the controller saw them, without its traffic."""
        rollout = await status.find(self._rollouts, name)
        seen = await self._rollouts.observed(rollout.id)
        return status.as_json(rollout, status.View(rollout=rollout, seen=seen))

    async def status(self, name: Name) -> JSON:
        """All of one rollout, as `rollout status --json`: with the actual share beside the wanted one, from the log."""
        view = await self._look.at(name)
        return status.as_json(view.rollout, view)

    async def history(self, name: Name) -> list[Entry]:
        """Who or what did what, when and why, with the evidence of that moment; oldest first."""
        return list(await status.history(self._rollouts, name))

    async def start(self, request: Request, body: StartBody) -> JSON:
        """Start a rollout by the steps and gates that routing.yaml gives the workload."""
        asked = await self._asked(request, AskedBody(who=body.who, why=body.why))
        started = await intent.start(
            self._rollouts,
            self._logs,
            await self._rules.rules(),
            asked,
            rollout_id=new_id(),
            workload=body.workload,
            candidate=Ref.parse(body.candidate),
            supersede=body.supersede,
            despite_cooldown=body.despite_cooldown,
        )
        return status.as_json(started) | {"expected": status.expected_json(started.policy)}

    async def promote(self, request: Request, name: Name, body: PromoteBody) -> JSON:
        """Approve the end of the present step; the controller goes on when the evidence is there.

        Where the workload wants two approvers, two different owners of admin keys must.
        """
        asked, caller = await self._asked(request, body), _caller(request)
        after = await intent.promote(self._rollouts, name, asked, full=body.full, approver=caller.approver)
        return status.as_json(after)

    async def pause(self, request: Request, name: Name, body: AskedBody) -> JSON:
        """Stop the rise; the weight stays where it is."""
        return await self._ask(request, intent.pause, name, body)

    async def resume(self, request: Request, name: Name, body: AskedBody) -> JSON:
        """Let a paused rollout go on, its step begins again; or close the case of a degraded one."""
        return await self._ask(request, intent.resume, name, body)

    async def abort(self, request: Request, name: Name, body: AskedBody) -> JSON:
        """End a rollout; what served before it serves again."""
        return await self._ask(request, intent.abort, name, body)

    async def undo(self, request: Request, name: Name, body: AskedBody) -> JSON:
        """Take a workload's newest rollout back; by a rollout's id that one, if it still is the newest."""
        return await self._ask(request, intent.undo, name, body)

    async def _ask(self, request: Request, verb: Verb, name: str, body: AskedBody) -> JSON:
        return status.as_json(await verb(self._rollouts, name, await self._asked(request, body)))

    async def _asked(self, request: Request, body: AskedBody) -> Asked:
        return Asked(
            who=_caller(request).named(body.who),
            why=body.why,
            now=time.time(),
            config_snapshot=await self._rules.snapshot(),
            if_version=body.if_version,
        )


def _caller(request: Request) -> Caller:
    caller: Caller = request.scope["caller"]
    return caller
