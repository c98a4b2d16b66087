"""`POST /v1/feedback`, from a client to the log store: what is taken, what is refused, and that nothing is lost."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import httpx
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.config import Settings, SpoolSettings, load_settings
from gateway.errors import RequestRefused, StoreError
from gateway.feedback import MAX_BODY, frame_of, read_feedback, readable
from gateway.ids import id_at, new_id, time_of
from gateway.logstore.open import open_log_store
from gateway.logstore.sqlite import SqliteLogStore
from gateway.records import Feedback
from gateway.redact import Redactor
from gateway.ship import Shipper, StoreReader
from gateway.spool import Frame, Spool
from gateway.tail import Record
from gateway.telemetry import Metrics
from gateway.tombstones import Tombstones
from routing.targets import Privacy
from tests.gateway.conftest import Running, running
from tests.gateway.fakes import as_asked, ok, upstream
from tests.gateway.served import Load, Served
from tests.gateway.test_log_way import MAIL, files_with, routing
from tests.gateway.test_ship import header

MakeSettings = Callable[..., Settings]
PATH = "/v1/feedback"
ABOUT = id_at(1_763_712_000_000, bytes(10))
NOWHERE = "http://127.0.0.1:9/v1"


async def give(gateway: Running, headers: dict[str, str] | None = None, **said: object) -> httpx.Response:
    return await gateway.client.post(PATH, json={"exchange_id": ABOUT} | said, headers=headers)


async def shipped(gateway: Running, about: str = ABOUT) -> list[Feedback]:
    await Shipper(gateway.settings, [StoreReader(gateway.store, 500)]).ship_all()
    return (await gateway.store.feedback_of([about])).get(about, [])


@pytest.fixture
async def gateway(settings: MakeSettings) -> AsyncIterator[Running]:
    async with running(settings(routing(NOWHERE))) as started:
        yield started


async def test_what_is_said_reaches_the_store(settings: MakeSettings) -> None:
    """About an exchange of before; with who said it; and the exchange itself stays as it is."""
    async with upstream(ok()) as fake, running(settings(routing(fake.url))) as gateway:
        reply = await gateway.client.post("/v1/chat/completions", json={"model": "m", "messages": []})
        about = reply.headers["x-understudy-exchange-id"]
        calls = [{"id": "1", "type": "function", "function": {"name": "play", "arguments": "{}"}}]
        said = {"rating": "down", "correction": {"tool_calls": calls}, "comment": "wrong song", "signal": "retried"}
        taken = await give(gateway, {"x-client-id": "web"}, exchange_id=about.upper(), client_id="body", **said)
        exchange = await gateway.exchange()
        (found,) = await shipped(gateway, about)
    assert taken.status_code == 202
    assert taken.json() == {"id": found.id, "object": "feedback", "exchange_id": about}
    assert exchange.id == about
    assert (found.client_id, found.rating, found.redacted) == ("web", -1.0, None)
    assert {name: getattr(found, name) for name in said} == said | {"rating": -1.0}
    assert abs(time_of(found.id) - found.timestamp) < 1


@pytest.mark.parametrize(
    "said",
    [
        {"rating": "up"}, {"rating": 0}, {"rating": -0.5}, {"correction": "text"}, {"correction": False},
        {"comment": "ünïcode \0"}, {"signal": "copied"}, {"rating": 1, "client_id": "c", "workload_id": "w"},
    ],
)  # fmt: skip
async def test_one_thing_is_enough_and_no_exchange_needs_to_be_there(gateway: Running, said: dict) -> None:
    """It may be on its way, in another worker's spool."""
    assert (await give(gateway, **said)).status_code == 202
    assert await gateway.exchanges() == []
    (found,) = await shipped(gateway)
    assert {name: getattr(found, name) for name in said} == said | (
        {"rating": 1.0} if said.get("rating") == "up" else {}
    )


@pytest.mark.parametrize(
    ("body", "param", "told"),
    [
        (b"{", None, "not JSON"),
        (b"[]", None, "expected `object`, got `array`"),
        (b'{"rating": 1}', None, "missing required field `exchange_id`"),
        ({}, None, "says nothing"),
        ({"comment": ""}, None, "says nothing"),
        ({"ratting": 1}, None, "unknown field `ratting`"),
        ({"rating": "good"}, "rating", "'good'"),
        ({"rating": 2}, "rating", "<= 1"),
        ({"rating": True}, "rating", "got `bool`"),
        ({"comment": 5}, "comment", "expected `str"),
        ({"comment": "x" * 10_001}, "comment", "<= 10000"),
        ({"signal": "Two words"}, "signal", "a word"),
        ({"signal": "x" * 65}, "signal", "a word"),
        ({"exchange_id": "7", "rating": 1}, "exchange_id", "x-understudy-exchange-id"),
        ({"exchange_id": id_at(2**47, bytes(10)), "rating": 1}, "exchange_id", "x-understudy-exchange-id"),
        (b'{"exchange_id": "%s", "correction": %s1%s}' % (ABOUT.encode(), b"[" * 300, b"]" * 300), "correction", "250"),
        (b'{"exchange_id": "%s", "correction": 1%s}' % (ABOUT.encode(), b"0" * 30), "correction", "64 bits"),
        (b'{"exchange_id": "%s", "comment": "\xff"}' % ABOUT.encode(), None, "not JSON"),
    ],
)
async def test_what_is_wrong_is_told(gateway: Running, body: bytes | dict, param: str | None, told: str) -> None:
    """In OpenAI's shape, with the field; nothing is kept of it."""
    content = body if isinstance(body, bytes) else orjson.dumps({"exchange_id": ABOUT} | body)
    reply = await gateway.client.post(PATH, content=content)
    error = reply.json()["error"]
    assert (reply.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert told in error["message"]
    assert await shipped(gateway) == []


async def test_too_large_and_other_methods(gateway: Running) -> None:
    """The largest that is allowed passes."""
    large = b'{"exchange_id": "%s", "correction": "%s"}' % (ABOUT.encode(), b"x" * MAX_BODY)
    reply = await gateway.client.post(PATH, content=large)
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "request_too_large")
    fitting = b'{"exchange_id": "%s", "correction": "%s"}' % (ABOUT.encode(), b"x" * (MAX_BODY - 75))
    assert (await gateway.client.post(PATH, content=fitting)).status_code == 202
    (found,) = await shipped(gateway)
    assert len(found.correction) == MAX_BODY - 75
    assert (await gateway.client.get(PATH)).status_code == 405


async def test_a_client_that_leaves_in_the_middle(gateway: Running) -> None:
    """Nothing is kept, and others are served."""
    host, port = gateway.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-length: 500\r\n\r\n".encode() + b'{"rating"')
    writer.write_eof()
    assert b" 202 " not in await reader.read()
    writer.close()
    assert (await give(gateway, rating="up")).status_code == 202
    assert len(await shipped(gateway)) == 1


@given(st.binary(max_size=200) | st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists).map(repr))
def test_any_body_is_read_or_refused(body: bytes | str) -> None:
    with contextlib.suppress(RequestRefused):
        read_feedback(body if isinstance(body, bytes) else body.encode("utf-8", "surrogatepass"), {}, ABOUT, 0.0)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner),
    max_leaves=8,
)  # fmt: skip


@given(
    correction=json_values,
    rating=st.none() | st.floats(-1, 1),
    comment=st.text(st.characters(exclude_categories=["Cs"])),
)
def test_a_frame_brings_back_what_was_read(correction: object, rating: float | None, comment: str) -> None:
    feedback = Feedback(
        id=ABOUT, timestamp=1.5, exchange_id=ABOUT, correction=correction, rating=rating, comment=comment, client_id="c"
    )
    header, body = frame_of(feedback, Privacy())
    record = Record()
    record.add(Frame(header=orjson.loads(orjson.dumps(header)), request=body, response=b"", end=0), 1)
    assert record.whole
    assert record.is_feedback
    assert readable([record], Redactor(), lambda _client, _time: False) == ([feedback], {})


async def test_a_full_log_takes_none(settings: MakeSettings) -> None:
    """Never a 202 for what is not in the spool; what was turned away is counted."""
    for on_full, reason in (("serve", "spool_full_feedback"), ("refuse", "refused_feedback")):
        made = settings(routing(NOWHERE), max_total=8192, segment=4096, on_full=on_full, segment_age=1000)
        async with running(made) as gateway:
            replies = [await give(gateway, comment="x" * 1000) for _ in range(12)]
            refused = [reply for reply in replies if reply.status_code == 503]
            metrics = (await gateway.client.get("/metrics")).text
            assert len(await shipped(gateway)) == 12 - len(refused)
        assert refused
        assert refused[0].json()["error"]["code"] == "log_full"
        assert refused[0].headers["retry-after"] == "1"
        assert f'understudy_dropped_total{{reason="{reason}"}} {len(refused):.1f}' in metrics
        assert f"understudy_feedback_total {12 - len(refused):.1f}" in metrics
        (made.data_dir / "log.db").unlink()


@pytest.mark.parametrize("redact", ["before_store", "before_spool"])
@pytest.mark.parametrize("pii", ["mask", "drop"])
async def test_personal_data_is_masked_on_its_way(settings: MakeSettings, pii: str, redact: str) -> None:
    """Comment, correction and client; without a workload by the strictest policy; no file has it afterwards."""
    made = settings(routing(NOWHERE, privacy=f"{{pii: {pii}, redact: {redact}}}"))
    async with running(made) as gateway:
        for headers in ({"x-workload-id": "w"}, {"x-workload-id": "unknown"}, {}):
            said = {"comment": f"I am {MAIL}", "correction": {"to": MAIL, "cc": "nobody"}, "rating": "up"}
            assert (await give(gateway, headers, client_id=MAIL, **said)).status_code == 202
        if redact == "before_spool":
            assert files_with(made.data_dir, MAIL) == []
        found = await shipped(gateway)
    store = open_log_store(made.log_store)
    await Shipper(made, [StoreReader(store, 500)]).ship_all()  # the segment goes with its writer
    await store.close()
    assert files_with(made.data_dir, MAIL) == []
    assert len(found) == 3
    for one in found:
        assert (one.rating, one.client_id) == (1.0, Redactor().tag(MAIL))
        assert one.comment == ("I am <EMAIL_1>" if pii == "mask" else "")
        assert one.correction == ({"to": "<EMAIL_1>", "cc": "nobody"} if pii == "mask" else None)
        assert one.redacted == ({"email": 3} if pii == "mask" else {"body": 2, "email": 1})


async def test_a_workload_that_is_not_masked_is_believed(settings: MakeSettings) -> None:
    """Who names it gets its policy."""
    async with running(settings(routing(NOWHERE, privacy="{pii: mask}"))) as gateway:
        await give(gateway, {"x-workload-id": "default"}, comment=MAIL)
        (found,) = await shipped(gateway)
    assert (found.comment, found.workload_id, found.redacted) == (MAIL, "default", None)


def spooled(settings: Settings, *feedback: Feedback) -> None:
    """As a gateway that is gone left it."""
    writer = Spool(settings.spool_dir, settings.spool, Metrics())
    for one in feedback:
        writer.append(*frame_of(one, Privacy()))
    writer.close()


async def test_a_repeated_batch_a_forgotten_client_and_a_poisoned_record(tmp_path: Path) -> None:
    """Once; not at all; kept aside without what it says, and in nobody's way."""
    made = Settings(data_dir=tmp_path)
    made.run_dir.mkdir()
    mine, other = (
        Feedback(id=new_id(), timestamp=1.0, exchange_id=ABOUT, client_id=client, comment="said")
        for client in ("ada", "bob")
    )
    Tombstones(made.spool_dir).add(["ada"], 2.0)
    poisoned = Feedback(id="none", timestamp=1.0, exchange_id="none", comment="distinctive")
    spooled(made, mine, poisoned, other)
    spooled(made, other)
    store = open_log_store(made.log_store)
    shipper = Shipper(made, [StoreReader(store, 500)])
    await shipper.ship_all()
    assert await store.feedback_of([ABOUT]) == {ABOUT: [other]}
    assert (shipper.done.feedback, shipper.done.feedback_quarantined, shipper.done.quarantined) == (2, 1, 0)
    await store.close()
    assert files_with(tmp_path, "distinctive") == []
    assert files_with(tmp_path, '"feedback":"none"') == ["spool/quarantine.jsonl"]


class Failing(SqliteLogStore):
    """A store that takes exchanges, and for a while fails at their feedback."""

    left = 3

    async def add_feedback(self, feedback: Sequence[Feedback]) -> None:
        self.left -= 1
        if self.left >= 0:
            raise StoreError("down")
        await super().add_feedback(feedback)


async def test_a_store_that_fails_in_mid_batch(tmp_path: Path) -> None:
    """All waits in the spool, and is there once afterwards."""
    made = Settings(data_dir=tmp_path, spool=SpoolSettings(ship_interval=0.01))
    made.run_dir.mkdir()
    writer = Spool(made.spool_dir, made.spool, Metrics())
    said = [Feedback(id=new_id(), timestamp=1.0, exchange_id=ABOUT, rating=1.0) for _ in range(3)]
    for one in said:
        writer.append(header(), b"{}")
        writer.append(*frame_of(one, Privacy()))
    writer.close()
    store = Failing(tmp_path / "log.db")
    shipper, stop = Shipper(made, [StoreReader(store, 500)]), asyncio.Event()
    shipping = asyncio.ensure_future(shipper.run(stop))
    async with asyncio.timeout(20):
        while await store.feedback_of([ABOUT]) != {ABOUT: sorted(said, key=lambda one: one.id)}:
            await asyncio.sleep(0.01)
    stop.set()
    await shipping
    assert (await store.counts()).live == 3
    assert (shipper.done.feedback, list(made.spool_dir.glob("*/*.seg"))) == (3, [])
    await store.close()


@pytest.mark.parametrize("victim", ["gateway.worker", "gateway.ship"])
async def test_kill_9_loses_and_doubles_no_feedback(tmp_path: Path, victim: str) -> None:
    """Under load a process is killed, twice: each that was answered with its id is in the store once."""
    served = Served.make(tmp_path)
    async with upstream(as_asked()) as fake:
        served.route_to(fake.url)
        await served.start()
        load, given_ids = Load(), dict[str, str]()
        asking = [asyncio.ensure_future(load.run(served, 4)), asyncio.ensure_future(_tell(served, load, given_ids))]
        async with asyncio.timeout(180):
            for kill in (1, 2):
                while len(given_ids) < 40 * kill or not served.pids(victim):
                    await asyncio.sleep(0.02)
                os.kill(served.pids(victim)[0], signal.SIGKILL)
            while len(given_ids) < 120:
                await asyncio.sleep(0.02)
        load.stop.set()
        await asyncio.gather(*asking)
        assert await served.stop() == 0
    await served.ship_leftovers()
    store = open_log_store(load_settings(served.config).log_store)
    found = await store.feedback_of(list(given_ids.values()))
    counts = await store.feedback_counts()
    await store.close()
    stored = [one.id for said in found.values() for one in said]
    assert set(given_ids) <= set(stored)
    assert counts.total == len(stored) == len(set(stored))


async def _tell(served: Served, load: Load, given_ids: dict[str, str]) -> None:
    """About what was answered, as soon as it is; a call that breaks is not made again."""
    told: set[str] = set()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{served.port}", timeout=20) as client:
        while not load.stop.is_set():
            for about in sorted(load.ids - told):
                told.add(about)
                with contextlib.suppress(httpx.TransportError):
                    reply = await client.post(PATH, json={"exchange_id": about, "rating": "up"})
                    given_ids[reply.json()["id"]] = about
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("stamp", "said"), [(-5, 0.0), (0, 0.0), (1_763_712_000_123, 1_763_712_000.123), (2**60, (2**48 - 1) / 1000)]
)
def test_an_ids_time_is_the_nearest_that_it_can_say(stamp: int, said: float) -> None:
    assert time_of(id_at(stamp, bytes(10))) == said
