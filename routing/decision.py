"""What routing is asked about a call, and what it answers: structs of msgspec, of which one is made in 0.1 us."""

from typing import Literal, NamedTuple

from msgspec import Struct

from routing.targets import MirrorTarget, Route, Target

__all__ = ["Call", "Decision", "Matched"]

ServingArm = Literal["incumbent", "candidate"]


class Matched(NamedTuple):
    """A request's route, and what led to it: a name in header or metadata, a rule, the API key, or nothing."""

    route: Route
    by: Literal["header", "metadata", "rule", "key", "nothing"]


class Call(Struct, frozen=True, gc=False, kw_only=True):
    """What a decision needs to know of a request. Sticky keys are "" where the request has none.

    `stateful` is one that goes on from what an upstream has kept: no canary, fallback or mirror could answer it.
    """

    workload: str
    exchange_id: str
    session: str = ""
    user: str = ""
    conversation: str = ""
    stateful: bool = False


class Decision(Struct, frozen=True, gc=False, kw_only=True):
    """Where a call goes, and why.

    `fallbacks` are to be tried in order, before the first byte of a reply only. `mirrors` holds every mirror that the
    exchange is eligible for; those with `sampled` are to be sent a copy. `rollout` is the overlay's rollout or "".
    `breaker` names the target that this call was turned away from by its open breaker, or is "".
    """

    route: Route
    target: Target
    arm: ServingArm
    fallbacks: tuple[Target, ...]
    mirrors: tuple[MirrorTarget, ...]
    reason: str
    rollout: str = ""
    breaker: str = ""
