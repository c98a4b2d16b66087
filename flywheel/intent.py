"""What people ask of a rollout: one function for each verb, by which commands, API and page ask; the controller acts.

All of them are judged on the stored state in the transaction that changes it. Where the controller is faster, the verb
is judged once more, on the new state; with `Asked.if_version` it is refused instead, for its asker has not seen that.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from flywheel.incumbent import startable_policy
from flywheel.status import find
from gateway.logstore import LogStore
from routing.errors import Conflict, NotFound, Refused
from routing.rollout import Abort, Event, Pause, Promote, Resume, Rollout, Undo
from routing.rules import Rules
from routing.store import Rollouts
from routing.targets import Ref

__all__ = ["Asked", "abort", "pause", "promote", "resume", "start", "undo"]

T = TypeVar("T")

_LONGEST = 255


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Who asks, why, and when (epoch seconds); `config_snapshot` names the rules then, "" where they can't be read.

    `if_version` is the version that the asker saw of the rollout: a change since then refuses what is asked.
    """

    who: str
    why: str
    now: float
    config_snapshot: str = ""
    if_version: int | None = None

    def __post_init__(self) -> None:
        """Raises Refused for a name that the history cannot hold."""
        if not self.who or len(self.who) > _LONGEST:
            raise Refused(f"who asks wants a name of 1 to {_LONGEST} characters")


async def start(
    rollouts: Rollouts,
    log_store: LogStore,
    rules: Rules,
    asked: Asked,
    *,
    rollout_id: str,
    workload: str,
    candidate: Ref,
    supersede: bool = False,
    despite_cooldown: bool = False,
) -> Rollout:
    """Start a rollout by the steps and gates of routing.yaml; what its gates compare with is measured on the log now.

    Raises NotFound or Refused where the rules have no such workload or candidate, Refused where another rollout is
    under way (unless `supersede`) or the candidate rests (unless `despite_cooldown`, which wants a why), and Conflict.
    """
    if despite_cooldown and not asked.why:
        raise Refused("--despite-cooldown wants a reason: give --why")
    policy = await startable_policy(rules, workload, candidate, rollouts, log_store)
    return await rollouts.start(
        rollout_id=rollout_id,
        workload=workload,
        candidate=candidate,
        policy=policy,
        salt=rollout_id,
        who=asked.who,
        why=asked.why,
        now=asked.now,
        config_snapshot=asked.config_snapshot,
        supersede=supersede,
        despite_cooldown=despite_cooldown,
    )


async def promote(rollouts: Rollouts, name: str, asked: Asked, *, full: bool = False, approver: str = "") -> Rollout:
    """Approve the end of the step under way, or with `full` go to promoted at once.

    `approver` is whose key was shown, "" where nobody was authenticated. This and the verbs below take a rollout's id,
    or the workload whose rollout is meant, and raise NotFound, Refused and Conflict.
    """
    return await _change(rollouts, name, Promote(full=full, approver=approver), asked)


async def pause(rollouts: Rollouts, name: str, asked: Asked) -> Rollout:
    """Stop the rise; the weight stays where it is."""
    return await _change(rollouts, name, Pause(), asked)


async def resume(rollouts: Rollouts, name: str, asked: Asked) -> Rollout:
    """Let a paused rollout go on, its step begins again; or close the case of a degraded one."""
    return await _change(rollouts, name, Resume(), asked)


async def abort(rollouts: Rollouts, name: str, asked: Asked) -> Rollout:
    """End a rollout; what served before it serves again."""
    return await _change(rollouts, name, Abort(reason=f"aborted by hand{asked.why and f': {asked.why}'}"), asked)


async def undo(rollouts: Rollouts, name: str, asked: Asked) -> Rollout:
    """Take a workload's newest rollout back, whichever it is; by a rollout's id that one, if it still is the newest."""
    try:
        await rollouts.get(name)
    except NotFound:
        return await _twice(
            lambda: rollouts.undo(
                name,
                who=asked.who,
                why=asked.why,
                now=asked.now,
                config_snapshot=asked.config_snapshot,
                if_version=asked.if_version,
            )
        )
    return await _change(rollouts, name, Undo(), asked)


async def _change(rollouts: Rollouts, name: str, event: Event, asked: Asked) -> Rollout:
    async def act() -> Rollout:
        return await rollouts.apply(
            (await find(rollouts, name)).id,
            event,
            who=asked.who,
            why=asked.why,
            now=asked.now,
            config_snapshot=asked.config_snapshot,
            if_version=asked.if_version,
        )

    return await _twice(act)


async def _twice(act: Callable[[], Awaitable[T]]) -> T:
    try:
        return await act()
    except Conflict:
        return await act()
