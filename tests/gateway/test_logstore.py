"""The contract that every log store keeps."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.errors import ConfigError
from gateway.ids import id_at
from gateway.logstore import LogStore, Query
from gateway.logstore.open import open_log_store
from gateway.records import Arm, Attempt, Exchange, MirrorFate, Outcome, Usage


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty store of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/log.db"
    return str(request.getfixturevalue("postgres_url"))


@pytest.fixture
async def store(url: str) -> AsyncIterator[LogStore]:
    """One of each implementation, empty."""
    opened = open_log_store(url)
    yield opened
    await opened.close()


def uid(n: int) -> str:
    """The id of exchange `n`, made at its time."""
    return id_at((1000 + n) * 1000, n.to_bytes(10, "big"))


def exchange(n: int, **more: object) -> Exchange:
    return Exchange(**({"id": uid(n), "timestamp": 1000.0 + n, "workload_id": "w", "status": 200} | more))


FULL = exchange(
    1, client_id="c", session_id="s", model="prod", arm=Arm.CANDIDATE, outcome=Outcome.TIMEOUT, stream=True,
    latency_ms=12.5, ttft_ms=3.0, usage=Usage(input_tokens=3, output_tokens=4), cost_usd=0.5, config_snapshot="abc",
    rollout="r", trace_id="t", error="e", mirror=MirrorFate.SENT, breaker="b", path="/v1/completions",
    attempts=(Attempt(model="m", arm="candidate", error="x", latency_ms=1.0),),
    request={"messages": [{"role": "user", "content": "ünïcode \u0000"}]}, response={"choices": []},
)  # fmt: skip


async def ids(store: LogStore, **query: object) -> list[str]:
    return [found.id async for found in store.scan(Query(**query))]


async def test_an_exchange_comes_back_as_it_went_in(store: LogStore) -> None:
    """Every field, by scan and by id."""
    await store.append([FULL])
    assert await store.get(FULL.id) == FULL
    assert [found async for found in store.scan(Query())] == [FULL]
    assert await store.get("nobody") is None


async def test_the_same_batch_twice_is_one_batch(store: LogStore) -> None:
    """Ids make a repetition harmless."""
    await store.append([exchange(1), exchange(2)])
    await store.append([exchange(2, workload_id="changed"), exchange(3)])
    assert await ids(store, workload="w") == [uid(1), uid(2), uid(3)]


async def test_filters(store: LogStore) -> None:
    """By workload, client, model, outcome, rollout, kind and time."""
    await store.append(
        [
            exchange(1, client_id="a", model="m"),
            exchange(2, outcome=Outcome.CLIENT_GONE, rollout="r"),
            exchange(3, workload_id="other"),
            exchange(4, arm=Arm.MIRROR, mirror_of=uid(1)),
        ]
    )
    assert await ids(store, client="a", model="m") == [uid(1)]
    assert await ids(store, outcome=Outcome.CLIENT_GONE) == [uid(2)]
    assert await ids(store, rollout="r") == [uid(2)]
    assert await ids(store, workload="other") == [uid(3)]
    assert await ids(store, kind="mirror") == [uid(4)]
    assert await ids(store, kind="any") == [uid(1), uid(2), uid(3), uid(4)]
    assert await ids(store, since=1002.0, until=1003.0) == [uid(2)]


async def test_order_paging_and_limits(store: LogStore) -> None:
    """More than one page, both directions, from an id on."""
    await store.append([exchange(n) for n in range(1, 1201)])
    everything = await ids(store)
    assert everything == sorted(everything)
    assert len(everything) == 1200
    assert await ids(store, newest_first=True, limit=2) == [uid(1200), uid(1199)]
    assert await ids(store, after=uid(1198)) == [uid(1199), uid(1200)]
    assert len(await ids(store, limit=700)) == 700


async def test_pairs_come_in_order_of_arrival(store: LogStore) -> None:
    """A mirror that is shipped late is not passed over, though its id is older."""
    await store.append([exchange(1), exchange(2)])
    await store.append([exchange(20, arm=Arm.MIRROR, mirror_of=uid(2), rollout="r")])
    (first,) = await store.pairs("r", None, 10)
    await store.append([exchange(10, arm=Arm.MIRROR, mirror_of=uid(1), rollout="r")])
    assert first.mirrored is not None
    (late,) = await store.pairs("r", first.mirrored.id, 10)
    assert late.live.id == uid(1)
    assert await store.pairs("other", None, 10) == []


async def test_counts(store: LogStore) -> None:
    """Live exchanges by outcome; mirrors apart."""
    await store.append([exchange(1), exchange(2, outcome=Outcome.TIMEOUT), exchange(3, arm=Arm.MIRROR)])
    counts = await store.counts()
    assert (counts.live, counts.mirrors, counts.by_outcome) == (2, 1, {"ok": 1, "timeout": 1})
    assert (await store.counts("other")).live == 0


def test_unknown_stores_are_refused() -> None:
    """With what can be used instead, and without the URL's secrets."""
    with pytest.raises(ConfigError, match="sqlite") as caught:
        open_log_store("mysql://user:secret@host/db")
    assert "secret" not in str(caught.value)


async def test_whole_days_expire(store: LogStore) -> None:
    """Only days that ended before the time; asking again finds nothing more."""
    days = [exchange(n, id=id_at(n * 86_400_000 + 5_000, bytes(10)), timestamp=n * 86_400 + 5.0) for n in range(1, 5)]
    await store.append([*days, exchange(5, id=id_at(86_400_000 + 6_000, bytes(10)), timestamp=86_406.0)])
    assert await store.expire(3.5 * 86_400) == 2
    assert await ids(store) == [days[2].id, days[3].id]
    assert await store.expire(3.5 * 86_400) == 0
