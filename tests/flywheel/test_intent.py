"""What people ask of a rollout, by whichever way: compare-and-set, who, when and why, on SQLite and on PostgreSQL."""

import asyncio
from dataclasses import asdict
from pathlib import Path

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from flywheel import intent
from flywheel.intent import Asked
from flywheel.status import history
from gateway.logstore.sqlite import SqliteLogStore
from routing.errors import Conflict, NotFound, Refused
from routing.rollout import Rollout, State
from routing.rules import Rules, parse
from routing.store import Rollouts
from routing.targets import Ref
from tests.routing.examples import ENV, ROUTING_YAML


def rules() -> Rules:
    return parse(ROUTING_YAML, "routing.yaml", ENV)


def asked(why: str = "", *, who: str = "ann", if_version: int | None = None) -> Asked:
    return Asked(who=who, why=why, now=10.0, config_snapshot="abc", if_version=if_version)


@pytest.fixture
def store(engine: AsyncEngine) -> Rollouts:
    return Rollouts(engine)


async def start(store: Rollouts, folder: Path, name: str = "r1", adapter: str = "a1") -> Rollout:
    logs = SqliteLogStore(folder / "log.db")
    try:
        return await intent.start(
            store,
            logs,
            rules(),
            asked("first"),
            rollout_id=name,
            workload="support-router",
            candidate=Ref(model="small-1b", adapter=adapter),
        )
    finally:
        await logs.close()


async def test_each_verb_says_who_when_and_why(store: Rollouts, tmp_path: Path) -> None:
    await start(store, tmp_path)
    await intent.pause(store, "support-router", asked("freeze"))
    await intent.resume(store, "r1", asked("thaw"))
    await intent.promote(store, "r1", asked("fine"), approver="ann")
    await intent.promote(store, "r1", asked("go"), full=True)
    await intent.undo(store, "support-router", asked("complaint"))
    told = [asdict(entry) for entry in await history(store, "support-router")]
    assert [(entry["event"], entry["why"]) for entry in told] == [
        ("started", "first"),
        ("paused", "freeze"),
        ("resumed", "thaw"),
        ("approved", "fine"),
        ("promoted", "go"),
        ("aborted", "complaint"),
    ]
    assert {(entry["who"], entry["at"], entry["config_snapshot"]) for entry in told} == {("ann", 10.0, "abc")}


async def test_of_two_that_saw_the_same_version_one_is_refused(store: Rollouts, tmp_path: Path) -> None:
    """Even where the second verb would have been possible in the new state."""
    seen = (await start(store, tmp_path)).version
    both = await asyncio.gather(
        intent.pause(store, "r1", asked(who="ann", if_version=seen)),
        intent.abort(store, "r1", asked(who="bob", if_version=seen)),
        return_exceptions=True,
    )
    (lost,) = [each for each in both if not isinstance(each, Rollout)]
    assert isinstance(lost, Conflict)
    assert "somebody else changed it" in str(lost)
    assert len(await history(store, "r1")) == 2


async def test_without_a_version_the_verb_is_judged_on_the_state_that_there_is(store: Rollouts, tmp_path: Path) -> None:
    await start(store, tmp_path)
    both = await asyncio.gather(
        intent.pause(store, "r1", asked()), intent.pause(store, "r1", asked()), return_exceptions=True
    )
    assert sorted(type(each) for each in both if isinstance(each, Exception)) == [Refused]
    await intent.abort(store, "r1", asked())
    with pytest.raises(Refused, match="is aborted: resume is not possible"):
        await intent.resume(store, "r1", asked())


async def test_undo_by_a_rollout_s_id_takes_no_other_back(store: Rollouts, tmp_path: Path) -> None:
    """Two people who undo the same rollout do not take the one before it back as well."""
    for name in ("r1", "r2"):
        await start(store, tmp_path, name, name)
        await intent.promote(store, name, asked(), full=True)
    seen = (await store.get("r2")).version
    await intent.undo(store, "r2", asked("by id", if_version=seen))
    with pytest.raises(Refused, match="r2 is aborted: undo is not possible"):
        await intent.undo(store, "r2", asked())
    with pytest.raises(Conflict):
        await intent.undo(store, "support-router", asked(if_version=999))
    assert (await store.get("r1")).state is State.PROMOTED
    assert (await intent.undo(store, "support-router", asked())).id == "r1"
    assert await store.current_overlays() == (6, {})


async def test_what_nobody_can_ask(store: Rollouts) -> None:
    with pytest.raises(Refused, match="1 to 255 characters"):
        asked(who="")
    with pytest.raises(Refused, match="1 to 255 characters"):
        asked(who="x" * 256)
    with pytest.raises(NotFound):
        await intent.pause(store, "nothing", asked())
    with pytest.raises(Refused, match="nothing to undo"):
        await intent.undo(store, "nothing", asked())
