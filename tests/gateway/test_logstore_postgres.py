"""The log store on a PostgreSQL that dies, freezes, fills up, and is written to by several shippers at once."""

import asyncio
import itertools
import signal
from collections.abc import AsyncIterator, Iterator

import asyncpg
import pytest

from gateway.errors import ConfigError, StoreError
from gateway.ids import id_at
from gateway.logstore import Query
from gateway.logstore.open import open_log_store
from gateway.logstore.postgres import PostgresLogStore
from gateway.records import Arm, Exchange
from tests.postgres import CannotRun, PostgresServer, running_postgres

pytestmark = pytest.mark.postgres

DAY = 86_400_000
WRITERS_LOCK = 7310304810711
NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    """A server of this module's own, to be killed. Its default is to acknowledge before anything is written."""
    try:
        with running_postgres("fsync=off", "synchronous_commit=off") as running:
            yield running
    except CannotRun as why:
        pytest.skip(str(why))


@pytest.fixture
def url(server: PostgresServer) -> str:
    name = f"faults_{next(NUMBERS)}"
    server.psql(f"CREATE DATABASE {name}")
    return server.url(name).replace("+asyncpg", "").replace("understudy@", "understudy:hidden@")


@pytest.fixture
async def store(url: str) -> AsyncIterator[PostgresLogStore]:
    opened = PostgresLogStore(url, timeout=10)
    yield opened
    await opened.close()


def exchange(n: int, **more: object) -> Exchange:
    """Every other one of the next day; each repeats the history of its batch."""
    said = [{"role": "user", "content": f"{n // 20} " + "y" * 600}, {"role": "user", "content": str(n)}]
    values = {"id": id_at(n % 2 * DAY + n, n.to_bytes(10, "big")), "timestamp": 1.0 + n, "workload_id": "w"}
    return Exchange(**values | {"request": {"messages": said}} | more)


def batches(count: int, size: int = 20) -> list[list[Exchange]]:
    return [[exchange(n) for n in range(first, first + size)] for first in range(0, count * size, size)]


async def stored(store: PostgresLogStore) -> list[Exchange]:
    return [found async for found in store.scan(Query(kind="any"))]


def in_order(given: list[list[Exchange]]) -> list[Exchange]:
    return sorted(itertools.chain(*given), key=lambda each: each.id)


async def until_stored(store: PostgresLogStore, batch: list[Exchange]) -> int:
    """As the shipper does it: again until it works. How often it did not."""
    failures = 0
    while True:
        try:
            await store.append(batch)
        except StoreError:
            failures += 1
            await asyncio.sleep(0.05)
        else:
            return failures


def backends(server: PostgresServer) -> list[int]:
    pids = "SELECT pid FROM pg_stat_activity WHERE application_name = 'understudy'"
    return [int(line) for line in server.psql(pids).split()]


async def waiting_for_the_lock(server: PostgresServer) -> None:
    while not server.psql("SELECT 1 FROM pg_stat_activity WHERE wait_event = 'advisory'").strip():
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("victim", ["server", "backend"])
async def test_kill_9_while_batches_arrive(server: PostgresServer, store: PostgresLogStore, victim: str) -> None:
    """What was acknowledged is there, what was not is sent again, and nothing is there twice."""
    given = batches(40)
    reached = asyncio.Event()

    async def ship() -> None:
        for n, batch in enumerate(given):
            await until_stored(store, batch)
            if n == 8:
                reached.set()

    shipping = asyncio.ensure_future(ship())
    await reached.wait()
    if victim == "server":
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.start)
    else:
        for pid in backends(server):
            server.signal(signal.SIGKILL, pid)
    await shipping
    assert await stored(store) == in_order(given)


async def test_killed_in_the_middle_of_a_batch(server: PostgresServer, store: PostgresLogStore, url: str) -> None:
    """The batch is refused, whole; refused again while nothing listens; and taken as soon as the server is back."""
    first, second = batches(2)
    await store.append(first)
    blocker = await asyncpg.connect(url)
    await blocker.execute(f"SELECT pg_advisory_lock({WRITERS_LOCK})")
    appending = asyncio.ensure_future(store.append(second))
    await waiting_for_the_lock(server)
    server.kill()
    with pytest.raises(StoreError, match="start PostgreSQL") as caught:
        await appending
    with pytest.raises(StoreError, match="start PostgreSQL"):
        await store.append(second)
    blocker.terminate()
    server.start()
    await store.append(second)
    assert await stored(store) == in_order([first, second])
    assert "hidden" not in str(caught.value)


async def test_a_frozen_server_is_an_error_and_not_a_wait(server: PostgresServer, url: str) -> None:
    """Within the timeout, for writers and readers; after it thaws the same batch is stored once."""
    store = PostgresLogStore(url, timeout=1)
    first, second = batches(2)
    await store.append(first)
    frozen = [*backends(server), None]
    for pid in frozen:
        server.signal(signal.SIGSTOP, pid)
    try:
        for _ in range(2):
            with pytest.raises(StoreError, match="no answer within 1 s"):
                await store.append(second)
        with pytest.raises(StoreError, match="no answer within 1 s"):
            await store.counts()
    finally:
        for pid in frozen:
            server.signal(signal.SIGCONT, pid)
    await until_stored(store, second)
    assert await stored(store) == in_order([first, second])
    await store.close()


async def test_shippers_side_by_side(url: str, server: PostgresServer) -> None:
    """On an empty database, with the same batches: tables and partitions are made once, exchanges stored once."""
    given = batches(10)
    stores = [PostgresLogStore(url) for _ in range(3)]

    async def ship(store: PostgresLogStore) -> None:
        for batch in given:
            await store.append(batch)

    await asyncio.gather(*map(ship, stores))
    assert await stored(stores[0]) == in_order(given)
    messages = server.psql("SELECT count(*) FROM understudy_log.messages", url.rpartition("/")[2])
    assert int(messages) == 10
    for store in stores:
        await store.close()


async def test_a_reader_that_goes_on_passes_nothing_over(url: str) -> None:
    """While several write, following the order of arrival finds every mirror, once."""
    stores = [PostgresLogStore(url) for _ in range(3)]
    originals = [exchange(n) for n in range(120)]
    await stores[0].append(originals)
    mirrors = [
        exchange(1000 + n, arm=Arm.MIRROR, rollout="r", mirror_of=original.id) for n, original in enumerate(originals)
    ]

    async def write(store: PostgresLogStore, mine: list[Exchange]) -> None:
        for one in mine:
            await store.append([one])

    writing = asyncio.gather(*(write(store, mirrors[n::2]) for n, store in enumerate(stores[:2])))
    seen: list[str] = []
    while len(seen) < len(mirrors):
        ended = writing.done()
        pairs = await stores[2].pairs("r", seen[-1] if seen else None, 7)
        seen += [pair.mirrored.id for pair in pairs if pair.mirrored]
        assert pairs or not ended, "a mirror was passed over"
    await writing
    assert sorted(seen) == sorted(mirror.id for mirror in mirrors)
    for store in stores:
        await store.close()


async def test_a_full_disk_is_said_and_overcome(server: PostgresServer, store: PostgresLogStore, url: str) -> None:
    """PostgreSQL says so with code 53100, whichever file did not fit."""
    first, second = batches(2)
    await store.append(first)
    database = url.rpartition("/")[2]
    server.psql(
        "CREATE FUNCTION no_room() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE 'could not extend file' USING ERRCODE = '53100'; END $$;"
        "CREATE TRIGGER no_room BEFORE INSERT ON understudy_log.messages EXECUTE FUNCTION no_room()",
        database,
    )
    with pytest.raises(StoreError, match=r"full.*make room"):
        await store.append(second)
    server.psql("DROP TRIGGER no_room ON understudy_log.messages", database)
    await store.append(second)
    assert await stored(store) == in_order([first, second])


async def test_days_are_partitions(server: PostgresServer, store: PostgresLogStore, url: str) -> None:
    """To expire drops them, with the messages that only they used."""
    await store.append(list(itertools.chain(*batches(2))))
    database = url.rpartition("/")[2]
    names = (
        "SELECT inhrelid::regclass FROM pg_inherits WHERE inhparent = 'understudy_log.exchanges'::regclass ORDER BY 1"
    )
    assert server.psql(names, database).split() == [
        "understudy_log.exchanges_19700101",
        "understudy_log.exchanges_19700102",
    ]
    assert await store.expire(DAY / 1000) == 1
    assert server.psql(names, database).split() == ["understudy_log.exchanges_19700102"]
    assert [found.request for found in await stored(store)] == [exchange(n).request for n in range(1, 40, 2)]
    assert await store.expire(2 * DAY / 1000) == 1
    assert server.psql("SELECT count(*) FROM understudy_log.messages", database).strip() == "0"


async def test_what_cannot_be_stored_or_opened_is_named(server: PostgresServer, store: PostgresLogStore) -> None:
    """An id without a time, a database that is not there, a URL without a database."""
    with pytest.raises(StoreError, match=r"'e1'.*UUIDv7"):
        await store.append([exchange(1, id="e1")])
    missing = PostgresLogStore(server.url("nowhere").replace("+asyncpg", ""))
    with pytest.raises(StoreError, match=r"127.0.0.1:\d+/nowhere: .*create it"):
        await missing.counts()
    await missing.close()
    for wrong in ("postgresql://user:secret@host", "postgresql://user:se/cret@host:x/db"):
        with pytest.raises(ConfigError, match="DATABASE") as caught:
            open_log_store(wrong)
        assert "secret" not in str(caught.value)
