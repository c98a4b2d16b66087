"""Rollouts, their history and the overlays in the control database: compare-and-set, one transaction a change."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final, assert_never

from sqlalchemy import func, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from routing.audit import Fact
from routing.audit_store import append, lock
from routing.codec import (
    observed_from_dict,
    observed_to_dict,
    overlay_from_dict,
    overlay_to_dict,
    rollout_from_dict,
    rollout_to_dict,
)
from routing.errors import Conflict, NotFound, Refused
from routing.rollout import (
    Effect,
    Event,
    Lay,
    Note,
    Observed,
    Restored,
    Rollout,
    RolloutPolicy,
    State,
    Superseded,
    Undo,
    advance,
    begin,
    overlay_of,
)
from routing.tables import connect, overlays, reading, rollout_history, rollouts, writing
from routing.targets import Overlay, Ref

__all__ = ["OVERLAY_VERSION", "Entry", "Rollouts", "connect"]

JSON = dict[str, Any]

# Rows are only ever added; counting sees each commit, in whatever order the commits came.
OVERLAY_VERSION: Final = select(func.count()).select_from(overlays).scalar_subquery()


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One line of a rollout's history. `at` is epoch seconds; `why` is what the person who asked gave as reason."""

    id: int
    rollout_id: str
    workload: str
    at: float
    who: str
    event: str
    from_state: str | None
    to_state: str
    reason: str
    why: str
    evidence: JSON | None
    config_snapshot: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Change:
    """Who asked for a change, when, and on what grounds."""

    who: str
    why: str
    now: float
    evidence: JSON | None
    config_snapshot: str


class Rollouts:
    """The rollouts of one control database. Owns nothing: the engine is the caller's.

    Every method raises Unavailable where the database does not answer or lacks its tables.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def start(
        self,
        *,
        rollout_id: str,
        workload: str,
        candidate: Ref,
        policy: RolloutPolicy,
        salt: str,
        who: str,
        why: str,
        now: float,
        config_snapshot: str = "",
        supersede: bool = False,
        despite_cooldown: bool = False,
    ) -> Rollout:
        """Start a rollout in its first step. A promoted one on the workload becomes the incumbent.

        Raises Refused where a rollout is still under way on the workload, unless `supersede`, and where the candidate
        was taken back a short while ago, unless `despite_cooldown` and a reason; Conflict where another was started
        at the same moment.
        """
        change = _Change(who=who, why=why, now=now, evidence=None, config_snapshot=config_snapshot)
        async with writing(self._engine) as connection:
            old = await _holder(connection, workload)
            if old and old.state is not State.PROMOTED and not supersede:
                raise Refused(f"workload {workload}: rollout {old.id} is {old.state}; abort it first, or supersede it")
            rests = await _cooldown(connection, workload, candidate, policy, now)
            if rests and not (despite_cooldown and why):
                raise Refused(f"workload {workload}: {rests}")
            before = _behind(old)
            if old:
                await _save(connection, old, *advance(old, Superseded(by=rollout_id), now), change)
            fresh = Rollout(
                id=rollout_id,
                workload=workload,
                candidate=candidate,
                incumbent=before.candidate if before else None,
                before=before,
                policy=policy,
                salt=salt,
                created_at=now,
                step_started_at=now,
            )
            rollout, effects = begin(fresh)
            if rests:
                effects = (*effects, Note(kind="despite_cooldown", text=rests))
            try:
                await connection.execute(insert(rollouts).values(id=rollout.id, **_columns(rollout), created_at=now))
            except IntegrityError as error:
                raise Conflict(f"workload {workload}: another rollout was started at the same moment") from error
            await _perform(connection, None, rollout, effects, change)
        return rollout

    async def get(self, rollout_id: str) -> Rollout:
        """Raises NotFound."""
        async with reading(self._engine) as connection:
            return await _load(connection, rollout_id)

    async def active(self, workload: str) -> Rollout | None:
        """The live rollout (shadow, canary, paused or promoted) of a workload."""
        async with reading(self._engine) as connection:
            return await _holder(connection, workload)

    async def list(self, workload: str | None = None, *, live: bool = False, limit: int = 1000) -> list[Rollout]:
        """Newest first."""
        query = select(rollouts.c.body).order_by(rollouts.c.created_at.desc(), rollouts.c.id.desc()).limit(limit)
        if workload is not None:
            query = query.where(rollouts.c.workload == workload)
        if live:
            query = query.where(rollouts.c.holds.is_not(None))
        async with reading(self._engine) as connection:
            return [rollout_from_dict(body) for body in (await connection.execute(query)).scalars()]

    async def observed(self, rollout_id: str) -> tuple[float, Observed] | None:
        """When the controller last looked (epoch seconds), and what it saw."""
        query = select(rollouts.c.observed_at, rollouts.c.observed).where(rollouts.c.id == rollout_id)
        async with reading(self._engine) as connection:
            row = (await connection.execute(query)).one_or_none()
        return (row.observed_at, observed_from_dict(row.observed)) if row and row.observed else None

    async def history(self, *, rollout_id: str | None = None, workload: str | None = None) -> Sequence[Entry]:
        """Oldest first; of one rollout, of one workload, or of all."""
        query = select(rollout_history).order_by(rollout_history.c.id)
        if rollout_id is not None:
            query = query.where(rollout_history.c.rollout_id == rollout_id)
        if workload is not None:
            query = query.where(rollout_history.c.workload == workload)
        async with reading(self._engine) as connection:
            return [Entry(**row._mapping) for row in await connection.execute(query)]

    async def overlay_version(self) -> int:
        """Grows with every change of an overlay: one small query, to poll."""
        async with reading(self._engine) as connection:
            return await _version(connection)

    async def current_overlays(self) -> tuple[int, Mapping[str, Overlay]]:
        """The version, and each workload's overlay. It may be newer than the version says, never older."""
        async with reading(self._engine) as connection:
            version = await _version(connection)
            newest = select(func.max(overlays.c.id)).group_by(overlays.c.workload).scalar_subquery()
            rows = await connection.execute(select(overlays.c.body).where(overlays.c.id.in_(newest)))
            laid = [overlay_from_dict(body) for body in rows.scalars() if body is not None]
        return version, {overlay.workload: overlay for overlay in laid}

    async def apply(
        self,
        rollout_id: str,
        event: Event,
        *,
        who: str,
        why: str,
        now: float,
        evidence: JSON | None = None,
        config_snapshot: str = "",
        if_version: int | None = None,
    ) -> Rollout:
        """Load, advance, save: the rollout, its history and its overlay in one transaction.

        What an Observed saw is kept beside the rollout (see `observed`), and is the history's evidence unless another
        is given. Raises NotFound; Refused where the event is not possible; Conflict where somebody else was faster, or
        where the rollout is not at `if_version` any more.
        """
        seen = observed_to_dict(event) if isinstance(event, Observed) else None
        grounds = evidence if evidence is not None else seen
        change = _Change(who=who, why=why, now=now, evidence=grounds, config_snapshot=config_snapshot)
        async with writing(self._engine) as connection:
            rollout = _expected(await _load(connection, rollout_id), if_version)
            advanced, effects = advance(rollout, event, now)
            if advanced is not rollout:
                advanced = await _save(connection, rollout, advanced, effects, change)
            if seen is not None:
                keep = update(rollouts).where(rollouts.c.id == rollout_id).values(observed=seen, observed_at=now)
                await connection.execute(keep)
        return advanced

    async def undo(
        self,
        workload: str,
        *,
        who: str,
        why: str,
        now: float,
        config_snapshot: str = "",
        if_version: int | None = None,
    ) -> Rollout:
        """Take the workload's newest rollout back: exactly the overlay from before it, and its state, are as they were.

        Needs no controller. Raises Refused where no rollout is laid over the workload, and Conflict as `apply` does.
        """
        change = _Change(who=who, why=why, now=now, evidence=None, config_snapshot=config_snapshot)
        async with writing(self._engine) as connection:
            rollout = await _holder(connection, workload)
            if rollout is None:
                raise Refused(f"workload {workload}: nothing to undo, routing.yaml alone decides")
            return await _save(connection, _expected(rollout, if_version), *advance(rollout, Undo(), now), change)


def _expected(rollout: Rollout, if_version: int | None) -> Rollout:
    if if_version is not None and rollout.version != if_version:
        raise Conflict(
            f"rollout {rollout.id} is at version {rollout.version} and {rollout.state}, no more at {if_version}: "
            "somebody else changed it, look at it again"
        )
    return rollout


def _behind(old: Rollout | None) -> Overlay | None:
    """What comes back when a rollout that follows `old` is taken back: never a canary that nobody controls."""
    if old is None:
        return None
    return overlay_of(old) if old.state is State.PROMOTED else old.before


async def _cooldown(
    connection: AsyncConnection, workload: str, candidate: Ref, policy: RolloutPolicy, now: float
) -> str:
    """Why this candidate may not start again yet, and until when; "" where it may."""
    mine = (rollouts.c.workload == workload) & (rollouts.c.state == State.ABORTED.value)
    query = select(rollouts.c.body).where(mine).order_by(rollouts.c.created_at.desc()).limit(1000)
    for body in (await connection.execute(query)).scalars():
        old = rollout_from_dict(body)
        until = (old.taken_back_at or float("-inf")) + policy.cooldown_seconds
        if old.candidate == candidate and now < until:
            when = datetime.fromtimestamp(until, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
            return (
                f"{candidate} was taken back ({old.reason}) and rests until {when}; a newer run's adapter may start at "
                "once, this one with --despite-cooldown and --why"
            )
    return ""


async def _version(connection: AsyncConnection) -> int:
    return int((await connection.execute(select(OVERLAY_VERSION))).scalar_one())


async def _load(connection: AsyncConnection, rollout_id: str) -> Rollout:
    body = (await connection.execute(select(rollouts.c.body).where(rollouts.c.id == rollout_id))).scalar()
    if body is None:
        raise NotFound(f"no rollout {rollout_id}")
    return rollout_from_dict(body)


async def _holder(connection: AsyncConnection, workload: str) -> Rollout | None:
    body = (await connection.execute(select(rollouts.c.body).where(rollouts.c.holds == workload))).scalar()
    return rollout_from_dict(body) if body is not None else None


def _columns(rollout: Rollout) -> JSON:
    return {
        "workload": rollout.workload,
        "state": rollout.state.value,
        "version": rollout.version,
        "holds": rollout.workload if rollout.live else None,
        "body": rollout_to_dict(rollout),
    }


async def _save(
    connection: AsyncConnection, old: Rollout, advanced: Rollout, effects: tuple[Effect, ...], change: _Change
) -> Rollout:
    new = replace(advanced, version=old.version + 1)
    await lock(connection)
    mine = (rollouts.c.id == old.id) & (rollouts.c.version == old.version)
    saved = await connection.execute(update(rollouts).where(mine).values(**_columns(new)))
    if saved.rowcount != 1:
        raise Conflict(f"rollout {old.id} was changed by somebody else at the same moment: look at it again")
    await _perform(connection, old.state, new, effects, change)
    return new


async def _perform(
    connection: AsyncConnection, was: State | None, rollout: Rollout, effects: tuple[Effect, ...], change: _Change
) -> None:
    for effect in effects:
        match effect:
            case Note():
                entry = _entry(was, rollout, effect, change)
                await connection.execute(insert(rollout_history).values(**entry))
                await append(connection, _fact(rollout, entry))
            case Lay():
                await _lay(connection, rollout, effect.overlay, change)
            case _:
                assert_never(effect)


def _entry(was: State | None, rollout: Rollout, note: Note, change: _Change) -> JSON:
    return {
        "rollout_id": rollout.id,
        "workload": rollout.workload,
        "at": change.now,
        "who": change.who,
        "event": note.kind,
        "from_state": was.value if was else None,
        "to_state": rollout.state.value,
        "reason": note.text,
        "why": change.why,
        "evidence": change.evidence,
        "config_snapshot": change.config_snapshot,
    }


def _fact(rollout: Rollout, entry: JSON) -> Fact:
    """A line of the history for the audit log, with the whole rollout as it is from now on, its policy included."""
    told = {key: entry[key] for key in ("event", "from_state", "to_state", "reason", "why", "evidence")}
    body = {**told, "config_snapshot": entry["config_snapshot"], "rollout": rollout_to_dict(rollout)}
    kind = f"rollout.{entry['event']}"
    return Fact(at=entry["at"], who=entry["who"], kind=kind, subject=rollout.id, body=body)


async def _lay(connection: AsyncConnection, rollout: Rollout, overlay: Overlay | None, change: _Change) -> None:
    """Lay the overlay; where it is that of a rollout which this one had superseded, that one is promoted again."""
    row = {
        "workload": rollout.workload,
        "body": overlay_to_dict(overlay) if overlay else None,
        "rollout_id": overlay.rollout if overlay else rollout.id,
        "at": change.now,
        "who": change.who,
        "why": change.why,
    }
    await connection.execute(insert(overlays).values(**row))
    if overlay and overlay.rollout != rollout.id:
        former = await _load(connection, overlay.rollout)
        await _save(connection, former, *advance(former, Restored(after=rollout.id), change.now), change)
