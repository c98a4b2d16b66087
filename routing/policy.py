"""Which target serves a call: match(table, asked) -> Matched and choose(table, call) -> Decision. Pure."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from hashlib import sha256

from msgspec.structs import replace as replaced

from routing.decision import Call, Decision, Matched
from routing.matching import Asked
from routing.targets import MirrorTarget, Part, Plan, Route, RouteTable, Target

__all__ = ["Call", "Decision", "Matched", "choose", "match", "named", "share_of"]

_TWO_64 = 2.0**64


def share_of(text: str) -> float:
    """A number in [0, 1) that `text` always gets: the first 8 bytes of its SHA-256 over 2^64."""
    return int.from_bytes(sha256(text.encode()).digest()[:8]) / _TWO_64


def named(table: RouteTable, headers: Mapping[str, str], metadata: Mapping[str, str]) -> Matched | None:
    """The route that a request names itself; `headers` has lower-case names."""
    plans = table.plans
    if (name := headers.get("x-workload-id")) and name in plans:
        return Matched(plans[name].route, "header")
    if (name := metadata.get("workload_id")) and name in plans:
        return Matched(plans[name].route, "metadata")
    return None


def match(table: RouteTable, asked: Asked, default_workload: str = "") -> Matched:
    """The route of a request: what it names, else what its key names, else the first rule that holds, else the default.

    `default_workload` is the one of the API key, or "". A name that no workload has is passed over: an app that is
    tagged before its workload is written down is served all the same.
    """
    if (found := named(table, asked.headers, asked.metadata)) is not None:
        return found
    if default_workload and default_workload in table.plans:
        return Matched(table.plans[default_workload].route, "key")
    position = table.matching.first(asked)
    if position is not None:
        return Matched(table.matchers[position], "rule")
    return Matched(table.default, "nothing")


def choose(table: RouteTable, call: Call, open_breakers: Collection[str] = ()) -> Decision:
    """Decide where `call` goes; the same table, call and breakers always decide the same.

    A sticky key draws one number for a rollout's whole life, and is the candidate's where that number lies below the
    weight: a weight that rises moves each key at most once. Among several models that serve, a key keeps its own for
    as long as the shares stay. `open_breakers` holds names of targets (`Target.name`): they stand behind all others,
    and serve only where no other is left. Never raises: a workload that the table lacks takes the default route.
    """
    plan = table.plans.get(call.workload, table.default_plan)
    overlay = plan.overlay
    if call.stateful:
        return _where_it_began(table, plan, call)
    if overlay is None or plan.candidate is None:
        return _incumbent(plan, call, plan.lost or "route", "", "", open_breakers)
    weight = overlay.weight
    if weight < 100 and (weight <= 0 or share_of(f"{overlay.salt}|{_sticky(plan.route, call)}") * 100 >= weight):
        return _incumbent(plan, call, "incumbent", overlay.rollout, "", open_breakers)
    if plan.candidate.name in open_breakers:
        return _incumbent(plan, call, "breaker", overlay.rollout, plan.candidate.name, open_breakers)
    return Decision(
        route=plan.route,
        target=plan.candidate,
        arm="candidate",
        fallbacks=_closed_first(plan.candidate_fallbacks, open_breakers),
        mirrors=_draw(plan.candidate_mirrors, call.exchange_id),
        reason="candidate",
        rollout=overlay.rollout,
    )


def _where_it_began(table: RouteTable, plan: Plan, call: Call) -> Decision:
    """The state lives on one upstream, which is the incumbent's until a rollout has all the traffic."""
    promoted = plan.overlay is not None and plan.overlay.weight >= 100
    found = choose(table, replaced(call, stateful=False)) if promoted else _incumbent(plan, call, "", "", "", ())
    return replaced(found, fallbacks=(), mirrors=(), reason="state")


def _incumbent(
    plan: Plan, call: Call, reason: str, rollout: str, breaker: str, open_breakers: Collection[str]
) -> Decision:
    target, fallbacks, mirrors = plan.incumbent, plan.incumbent_fallbacks, plan.incumbent_mirrors
    if plan.split:
        part = part_of(plan, _sticky(plan.route, call))
        target, fallbacks, reason = part.target, part.fallbacks, plan.lost or f"{part.share:g} % of serve"
    if open_breakers:
        wanted = target
        target, *rest = _closed_first((wanted, *fallbacks), open_breakers)
        fallbacks = tuple(rest)
        if target is not wanted:
            mirrors, reason, breaker = (), "breaker", breaker or wanted.name
    return Decision(
        route=plan.route,
        target=target,
        arm="incumbent",
        fallbacks=fallbacks,
        mirrors=_draw(mirrors, call.exchange_id),
        reason=reason,
        rollout=rollout,
        breaker=breaker,
    )


def part_of(plan: Plan, key: str) -> Part:
    """The part of a split that `key` draws. The workload's name is the salt, so that changed shares move few keys."""
    drawn = share_of(f"{plan.route.workload}|{key}")
    return next((part for part in plan.split if drawn < part.below), plan.split[-1])


def _closed_first(targets: tuple[Target, ...], open_breakers: Collection[str]) -> tuple[Target, ...]:
    """In their order, but those with an open breaker behind all others."""
    if not open_breakers:
        return targets
    return tuple(sorted(targets, key=lambda target: target.name in open_breakers))


def _sticky(route: Route, call: Call) -> str:
    for key in route.sticky:
        value = call.session if key == "session" else call.user if key == "user" else call.conversation
        if value:
            return value
    return call.exchange_id


def _draw(mirrors: tuple[MirrorTarget, ...], exchange_id: str) -> tuple[MirrorTarget, ...]:
    """Mark the sampled ones. A retry of the same exchange draws the same."""
    if not mirrors:
        return mirrors
    return tuple(
        replace(mirror, sampled=True)
        if mirror.share >= 1 or share_of(f"{exchange_id}|{mirror.target.name}") < mirror.share
        else mirror
        for mirror in mirrors
    )
