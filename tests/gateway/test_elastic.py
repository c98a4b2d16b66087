"""The Elasticsearch log store where things go wrong: a server killed, frozen, away or too small, and bad documents."""

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gateway.errors import ConfigError, RecordsRefused, StoreError
from gateway.ids import id_at
from gateway.logstore import LogStore, Query
from gateway.logstore.elastic import ElasticLogStore
from gateway.logstore.elastic_url import ElasticTarget, parse_elastic_url
from gateway.logstore.open import open_log_store
from gateway.records import Arm, Attempt, Exchange
from tests.elasticsearch_server import LARGEST_REQUEST, ElasticsearchServer

ROOT = Path(__file__).parent.parent.parent


def exchange(n: int, **more: object) -> Exchange:
    values: dict[str, Any] = {"id": uid(n), "timestamp": 1000.0 + n, "workload_id": "w", "request": {"n": n}}
    return Exchange(**values | more)


def uid(n: int) -> str:
    return id_at((1000 + n) * 1000, n.to_bytes(10, "big"))


def name_of(url: str) -> str:
    return parse_elastic_url(url).name


@asynccontextmanager
async def opened(url: str, **more: Any) -> AsyncIterator[ElasticLogStore]:
    """A store on `url`, where `more` changes what the URL says."""
    clock: Callable[[], int] = more.pop("clock", time.time_ns)
    store = ElasticLogStore(replace(parse_elastic_url(url), **more), clock=clock)
    try:
        yield store
    finally:
        await store.close()


async def ids(store: LogStore, **query: Any) -> list[str]:
    return [found.id async for found in store.scan(Query(**query))]


async def persist(store: LogStore, batches: list[list[Exchange]], seconds: float = 300) -> int:
    """Ship as the shipper does: a batch again and again until it is taken. How many times it was not."""
    failures = 0
    async with asyncio.timeout(seconds):
        for batch in batches:
            while True:
                try:
                    await store.append(batch)
                    break
                except StoreError:
                    failures += 1
                    await asyncio.sleep(0.1)
    return failures


@pytest.fixture
def own_server(elasticsearch_server: ElasticsearchServer) -> ElasticsearchServer:
    """The server, if it is the suite's to kill."""
    if not elasticsearch_server.own:
        pytest.skip("the server that ELASTICSEARCH_URL names is not killed")
    return elasticsearch_server


def test_urls() -> None:
    assert parse_elastic_url("elasticsearch+http://host") == ElasticTarget(url="http://host:9200")
    full = "elasticsearch+https://me:p%40ss@[::1]:9443/logs?refresh=wait_for&settle=1&timeout=2&ca=/ca.pem"
    assert parse_elastic_url(full) == ElasticTarget(
        url="https://[::1]:9443", name="logs", user="me", password="p@ss", ca="/ca.pem", refresh="wait_for",
        timeout=2.0, settle=1.0,
    )  # fmt: skip
    assert "p@ss" not in repr(parse_elastic_url(full))


@pytest.mark.parametrize(
    "rest",
    [
        "http://",
        "http://u:secret@h:port/",
        "ftp://u:secret@h",
        "http://u:secret@h/UP",
        "http://u:secret@h?refresh=maybe",
        "http://u:secret@h?timeout=soon",
        "http://u:secret@h?colour=red",
        "https://u:secret@h?ca=/no/such/file",
    ],
)
def test_bad_urls_are_refused_without_their_secrets(rest: str) -> None:
    with pytest.raises(ConfigError, match="log_store_url") as caught:
        open_log_store(f"elasticsearch+{rest}")
    assert "secret" not in str(caught.value)


def test_without_the_extra_the_error_says_how_to_install_it() -> None:
    """And nothing else of the gateway needs the client."""
    code = """
import sys
sys.modules["elasticsearch"] = None
import gateway.app
from gateway.errors import MissingExtra
from gateway.logstore.open import open_log_store
try:
    open_log_store("elasticsearch+http://u:secret@host/")
except MissingExtra as error:
    sys.exit(str(error))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "pip install 'understudy[elasticsearch]'" in done.stderr
    assert "secret" not in done.stderr


def test_the_client_is_loaded_only_when_it_is_used() -> None:
    code = "import sys, gateway.app, gateway.logstore.open; sys.exit('elasticsearch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


async def test_nobody_there() -> None:
    """A refused connection is a StoreError of every method, without the URL's password."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    async with opened(f"elasticsearch+http://me:secret@127.0.0.1:{port}/") as store:
        for call in (store.append([exchange(1)]), ids(store), store.get(uid(1)), store.pairs("r", None, 1)):
            with pytest.raises(StoreError, match=str(port)) as caught:
                await call
            assert "secret" not in str(caught.value)
        for other in (store.counts(), store.expire(1.0)):
            with pytest.raises(StoreError):
                await other


@pytest.mark.elasticsearch
async def test_an_empty_server_has_no_exchanges(elasticsearch_url: str) -> None:
    """Reading comes before the first batch, and makes nothing."""
    async with opened(elasticsearch_url) as store:
        assert await ids(store) == []
        assert await store.pairs("r", uid(1), 5) == []
        assert (await store.counts()).live == 0
        assert await store.expire(2e9) == 0


@pytest.mark.elasticsearch
async def test_a_day_has_an_index_that_the_template_made(
    elasticsearch_url: str, elasticsearch_server: ElasticsearchServer
) -> None:
    """The blueprint's fields under their names, bodies as they were, `timestamp` as epoch seconds."""
    name, ask = name_of(elasticsearch_url), elasticsearch_server.ask
    body = {"": 1, ".": 2, "a..b": {"c.": [0.1, 1e22, 2**64 - 1]}, "text": "ünïcode \u0000"}
    sent = exchange(1, timestamp=1001.1234567, request=body, response=body, client_id="c" * 40_000, status=10**18)
    async with opened(elasticsearch_url) as store:
        await store.append([sent, exchange(86_400)])
        assert await store.get(sent.id) == sent
        assert [found async for found in store.scan(Query(since=1001.1234567, until=1001.1234568))] == [sent]
        assert await ids(store, since=1001.1234568, until=1002.0) == []
    assert sorted(ask("GET", f"/_alias/{name}")) == [f"{name}-1970.01.01", f"{name}-1970.01.02"]
    (hit,) = ask("GET", f"/{name}/_search?q=workload_id:w%20AND%20timestamp:1001")["hits"]["hits"]
    assert {"timestamp", "workload_id", "client_id", "request", "response"} <= set(hit["_source"])
    (mapping,) = ask("GET", f"/{name}-1970.01.01/_mapping").values()
    assert mapping["mappings"]["properties"]["request"] == {"type": "object", "enabled": False}


@pytest.mark.elasticsearch
async def test_a_newer_template_is_left_alone_and_an_older_one_is_not(
    elasticsearch_url: str, elasticsearch_server: ElasticsearchServer
) -> None:
    name, ask = name_of(elasticsearch_url), elasticsearch_server.ask
    there = f"/_index_template/{name}"
    for version, kept in ((999, True), (0, False)):
        ask("PUT", there, {"index_patterns": [f"{name}-*"], "version": version, "priority": 900})
        async with opened(elasticsearch_url) as store:
            await store.append([exchange(86_400 * (version + 1))])
        (found,) = ask("GET", there)["index_templates"]
        assert (found["index_template"]["version"] == version) == kept
    assert ask("DELETE", f"/{name}-1972.09.27")["acknowledged"]  # it is not behind the alias


@pytest.mark.elasticsearch
async def test_two_stores_whose_names_begin_alike(
    elasticsearch_url: str, elasticsearch_server: ElasticsearchServer
) -> None:
    """`logs` and `logs-eu` on one server keep their exchanges apart."""
    name = name_of(elasticsearch_url)
    async with opened(elasticsearch_url) as one, opened(elasticsearch_url, name=f"{name}-eu") as other:
        await other.append([exchange(2)])
        await one.append([exchange(1)])
        assert (await ids(one), await ids(other)) == ([uid(1)], [uid(2)])
    elasticsearch_server.forget(f"{name}-eu")


@pytest.mark.elasticsearch
async def test_what_can_never_be_stored_is_named_and_the_rest_is_stored(elasticsearch_url: str) -> None:
    """A body nested too deep, one that is too large, text that is no text, ids that are none: each with its reason."""
    deep: dict[str, Any] = {}
    for _ in range(1200):
        deep = {"a": deep}
    bad = {
        "nested": exchange(2, request=deep),
        "large": exchange(4, request={"x": "y" * LARGEST_REQUEST}),
        "surrogate": exchange(6, error="\ud800"),
        "no id": exchange(8, id="nobody"),
        "late": exchange(10, id="ffffffff-ffff-7000-8000-000000000000"),
        "long id": exchange(12, id=uid(12) + "x" * 600),
    }
    good = [exchange(n) for n in (1, 3, 5, 7, 9, 11, 13)]
    mixed = [each for pair in zip(good, bad.values(), strict=False) for each in pair] + good[-1:]
    async with opened(elasticsearch_url) as store:
        for _ in range(2):
            with pytest.raises(RecordsRefused) as caught:
                await store.append(mixed)
            assert set(caught.value.reasons) == {each.id for each in bad.values()}
            assert all(caught.value.reasons.values())
        assert await ids(store) == [each.id for each in good]


@pytest.mark.elasticsearch
async def test_a_document_that_the_server_itself_refuses_stops_no_other(
    elasticsearch_url: str, elasticsearch_server: ElasticsearchServer
) -> None:
    """As where someone added a field of their own to the mapping, and an exchange does not fit it."""
    index = f"{name_of(elasticsearch_url)}-1970.01.01"
    field = {"attempts": {"properties": {"model": {"type": "ip", "ignore_malformed": False}}}}
    async with opened(elasticsearch_url) as store:
        await store.append([exchange(1)])
        elasticsearch_server.ask("PUT", f"/{index}/_mapping", {"properties": field})
        attempt = Attempt(model="no-address", arm="candidate", error="e")
        with pytest.raises(RecordsRefused, match="no-address") as caught:
            await store.append([exchange(2), exchange(3, attempts=(attempt,)), exchange(4)])
        assert set(caught.value.reasons) == {uid(3)}
        assert await ids(store) == [uid(1), uid(2), uid(4)]


@pytest.mark.elasticsearch
async def test_a_batch_larger_than_a_request_is_split(elasticsearch_url: str) -> None:
    """Twelve exchanges of 3 MB, of which a request takes few."""
    async with opened(elasticsearch_url) as store:
        await store.append([exchange(n, request={"x": "y" * 3_000_000}) for n in range(12)])
        assert (await store.counts()).live == 12


@pytest.mark.elasticsearch
async def test_a_server_that_takes_nothing_more_is_no_refusal_for_good(
    elasticsearch_url: str, elasticsearch_server: ElasticsearchServer
) -> None:
    """A blocked index (403), an index that cannot be made (400): the batch waits, nothing is set aside."""
    name, ask = name_of(elasticsearch_url), elasticsearch_server.ask
    async with opened(elasticsearch_url) as store:
        await store.append([exchange(1)])
        ask("PUT", f"/{name}-1970.01.01/_settings", {"index.blocks.write": True})
        with pytest.raises(StoreError, match="2 of 2 not stored") as caught:
            await store.append([exchange(2), exchange(3)])
        assert not isinstance(caught.value, RecordsRefused)
        ask("PUT", f"/{name}-1970.01.01/_settings", {"index.blocks.write": False})
        few = {"persistent": {"cluster.max_shards_per_node": 1}}
        ask("PUT", "/_cluster/settings", few)
        try:
            with pytest.raises(StoreError, match="shards") as caught:
                await store.append([exchange(86_400)])
            assert not isinstance(caught.value, RecordsRefused)
        finally:
            ask("PUT", "/_cluster/settings", {"persistent": {"cluster.max_shards_per_node": None}})
        await store.append([exchange(2), exchange(3), exchange(86_400)])
        assert await ids(store) == [uid(1), uid(2), uid(3), uid(86_400)]


@pytest.mark.elasticsearch
async def test_two_writers_of_the_same_batches_double_nothing(elasticsearch_url: str) -> None:
    batches = [[exchange(n) for n in range(start, start + 50)] for start in range(0, 500, 50)]
    async with opened(elasticsearch_url) as one, opened(elasticsearch_url) as other:
        await asyncio.gather(persist(one, batches), persist(other, batches), persist(one, batches[::-1]))
        assert await ids(one) == [uid(n) for n in range(500)]
        assert (await other.counts()).live == 500


@pytest.mark.elasticsearch
async def test_a_scan_that_is_left_early_closes_its_point_in_time(
    elasticsearch_url: str, elasticsearch_server: ElasticsearchServer
) -> None:
    async with opened(elasticsearch_url) as store:
        await store.append([exchange(n) for n in range(300)])
        before = contexts(elasticsearch_server)
        scan = store.scan(Query())
        await anext(scan)
        assert contexts(elasticsearch_server) == before + 1
        await scan.aclose()  # type: ignore[attr-defined]
        assert contexts(elasticsearch_server) == before


def contexts(server: ElasticsearchServer) -> int:
    """How many searches and points in time are open on the server."""
    stats = server.ask("GET", "/_stats/search?filter_path=_all.total.search.open_contexts")
    return int(stats["_all"]["total"]["search"]["open_contexts"])


@pytest.mark.elasticsearch
async def test_pairs_leave_young_mirrors_for_the_next_call(elasticsearch_url: str) -> None:
    """One that is sent earlier and comes into sight later is not passed over."""
    now = [10_000_000_000]
    mirror = {"arm": Arm.MIRROR, "rollout": "r"}
    async with (
        opened(elasticsearch_url, clock=lambda: now[0], settle=5.0) as store,
        opened(elasticsearch_url, clock=lambda: 7_000_000_000) as slow,
    ):
        await store.append([exchange(1), exchange(2), exchange(3, mirror_of=uid(1), **mirror)])
        assert await store.pairs("r", None, 10) == []
        await slow.append([exchange(4, mirror_of=uid(2), **mirror)])  # three seconds behind
        now[0] += 6_000_000_000
        first, second = await store.pairs("r", None, 10)
        assert (first.live.id, second.live.id) == (uid(2), uid(1))
        assert await store.pairs("r", uid(4), 10) == [second]
        assert [pair.live.id for pair in await store.pairs("r", None, 1)] == [uid(2)]


@pytest.mark.elasticsearch
async def test_mirrors_without_an_original_do_not_stop_a_reader(elasticsearch_url: str) -> None:
    """Three pages of them, and ids that are none."""
    async with opened(elasticsearch_url) as store:
        lost = [exchange(n, arm=Arm.MIRROR, rollout="r", mirror_of=uid(n + 5000)) for n in range(100, 700)]
        await store.append([*lost, exchange(800, arm=Arm.MIRROR, rollout="r", mirror_of="none")])
        await store.append([exchange(1), exchange(900, arm=Arm.MIRROR, rollout="r", mirror_of=uid(1))])
        assert [pair.live.id for pair in await store.pairs("r", None, 5)] == [uid(1)]


@pytest.mark.elasticsearch
async def test_a_frozen_server_is_an_error_in_time_and_loses_nothing(
    elasticsearch_url: str, own_server: ElasticsearchServer
) -> None:
    """Its sockets take bytes and nothing comes back. Afterwards the same batch is stored once."""
    async with opened(elasticsearch_url, timeout=2.0) as store:
        await store.append([exchange(0)])
        own_server.pause()
        try:
            began = time.monotonic()
            with pytest.raises(StoreError, match="imeout"):
                await store.append([exchange(1), exchange(2)])
            with pytest.raises(StoreError):
                await ids(store)
            assert time.monotonic() - began < 6
        finally:
            own_server.resume()
        await persist(store, [[exchange(1), exchange(2)], [exchange(3)]])
        await asyncio.sleep(0.5)  # what was on its way when the server froze arrives now
        assert await ids(store) == [uid(n) for n in range(4)]


@pytest.mark.elasticsearch
async def test_a_killed_server_comes_back_with_every_exchange_once(
    elasticsearch_url: str, own_server: ElasticsearchServer
) -> None:
    """kill -9 in the middle of batches, two writers on it; what was acknowledged stays, what was not comes again.

    A scan whose point in time went with the server goes on behind its last exchange.
    """
    batches = [[exchange(n) for n in range(start, start + 100)] for start in range(500, 6000, 100)]
    async with opened(elasticsearch_url, refresh="false") as one, opened(elasticsearch_url) as other:
        await other.append([exchange(n) for n in range(500)])
        scan = other.scan(Query(limit=500))
        found = [(await anext(scan)).id for _ in range(10)]
        shipping = asyncio.gather(persist(one, batches), persist(other, batches[::-1]))
        while await one.get(uid(1500)) is None:  # eleven of 55 batches
            await asyncio.sleep(0.01)
        await asyncio.to_thread(own_server.kill)
        await asyncio.to_thread(own_server.start)
        failures = await shipping
        assert min(failures) > 0
        found += [each.id async for each in scan]
        assert found == [uid(n) for n in range(500)]
        own_server.ask("POST", f"/{name_of(elasticsearch_url)}/_refresh")
        assert await ids(one) == [uid(n) for n in range(6000)]
        assert (await one.counts()).live == 6000
