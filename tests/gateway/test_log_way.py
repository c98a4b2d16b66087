"""The way of an exchange from the request to the log: large bodies, usage, privacy, sinks, and what cannot be kept."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import httpx
import orjson
import pytest

from gateway.config import GatewaySettings, Settings
from gateway.logstore import Query
from gateway.logstore.sqlite import SqliteLogStore
from gateway.records import Exchange, Outcome
from gateway.redact import Redactor
from gateway.ship import Shipper, SinkReader, StoreReader
from gateway.sinks import open_sink
from gateway.spool import PIECE, Spool
from gateway.telemetry import Metrics
from tests.gateway.conftest import running
from tests.gateway.fakes import DONE, chunk, ok, plain, sse, upstream
from tests.gateway.test_ship import header

MakeSettings = Callable[..., Settings]
MAIL, CARD = "ada.lovelace@example.org", "4111 1111 1111 1111"
CHAT = "/v1/chat/completions"


def routing(url: str, **more: str) -> str:
    lines = "".join(f"    {name}: {value}\n" for name, value in more.items())
    workload = f"workloads:\n  w:\n    match: {{header: {{x-workload-id: w}}}}\n    serve: prod\n{lines}"
    return (
        f"version: 1\nmodels:\n  prod: {{upstream: nim, base_url: '{url}', model: big}}\n"
        f"{workload}default: {{serve: prod}}\n"
    )


def large(made: Settings) -> Settings:
    return made.model_copy(update={"gateway": GatewaySettings(max_body=10_000_000)})


def usage_event(**more: object) -> bytes:
    event = {"id": "c1", "choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}} | more
    return b"data: " + orjson.dumps(event) + b"\n\n"


async def ask(client: httpx.AsyncClient, **body: object) -> httpx.Response:
    messages = [{"role": "user", "content": "hi"}]
    return await client.post(CHAT, json={"model": "m", "messages": messages} | body, headers={"x-workload-id": "w"})


async def test_large_bodies_are_logged_in_pieces_and_whole(settings: MakeSettings) -> None:
    """A megabyte each way: no frame is larger than a piece, and the exchange is as it was."""
    text = "x" * (4 * PIECE + 17)
    reply = {"choices": [{"message": {"content": text}}]}
    async with upstream(ok(reply)) as fake, running(large(settings(routing(fake.url)))) as gateway:
        messages = [{"role": "user", "content": text}]
        assert (await ask(gateway.client, messages=messages)).json() == reply
        exchange = await gateway.exchange()
    assert exchange.request == {"model": "m", "messages": messages}
    assert exchange.response == reply


async def test_a_client_that_leaves_within_a_large_request(settings: MakeSettings) -> None:
    """What came of it is logged, as the client's going."""
    async with upstream(ok()) as fake, running(large(settings(routing(fake.url)))) as gateway:
        host, port = gateway.url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: 9000000\r\n\r\n"
        writer.write(head.encode() + b"y" * (2 * PIECE))
        await writer.drain()
        writer.close()
        async with asyncio.timeout(10):
            while not (found := await gateway.exchanges()):
                await asyncio.sleep(0.01)
    assert [(one.outcome, one.request) for one in found] == [(Outcome.CLIENT_GONE, {"raw": "y" * (2 * PIECE)})]
    assert fake.received == []


@pytest.mark.parametrize("given", [{}, {"stream_options": {"include_usage": False}}, {"stream_options": None}])
async def test_usage_is_asked_for_and_kept_from_the_client(settings: MakeSettings, given: dict) -> None:
    """The log has the tokens; the client gets the stream as it would have been."""
    parts = [chunk("a"), b": comment\n\n", chunk("b"), usage_event(), DONE]
    async with upstream(sse(*parts)) as fake, running(settings(routing(fake.url, include_usage="true"))) as gateway:
        reply = await ask(gateway.client, stream=True, **given)
        exchange = await gateway.exchange()
    assert fake.received[0].json["stream_options"] == {"include_usage": True}
    assert "accept-encoding" not in fake.received[0].headers
    assert reply.content == b"".join(part for part in parts if part != usage_event())
    assert exchange.usage is not None
    assert (exchange.usage.input_tokens, exchange.usage.output_tokens) == (5, 2)
    assert exchange.request == {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True} | given


@pytest.mark.parametrize(
    ("setting", "given"),
    [("true", {"stream": True, "stream_options": {"include_usage": True}}), ("false", {"stream": True})],
)
async def test_usage_passes_where_the_client_asked_or_the_gateway_did_not(
    settings: MakeSettings, setting: str, given: dict
) -> None:
    """Byte for byte."""
    parts = [chunk("a"), usage_event(), DONE]
    async with upstream(sse(*parts)) as fake, running(settings(routing(fake.url, include_usage=setting))) as gateway:
        reply = await ask(gateway.client, **given)
    assert reply.content == b"".join(parts)


def files_with(folder: Path, *secrets: str) -> list[str]:
    """The files below a folder that hold one of the texts: databases and their journals, segments, quarantine."""
    return [
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and any(secret.encode() in path.read_bytes() for secret in secrets)
    ]


def personal() -> list[bytes]:
    """A stream that says an address in two parts."""
    return [chunk("write to ada.lovelace@ex"), chunk(f"ample.org, card {CARD}"), DONE]


@pytest.mark.parametrize("stream", [False, True])
async def test_after_shipping_no_file_has_what_was_masked(settings: MakeSettings, stream: bool) -> None:
    """Requests, tool arguments, plain and streamed replies: neither the store nor its journal nor the spool."""
    call = {"function": {"name": "mail", "arguments": json.dumps({"to": MAIL})}}
    reply = {"choices": [{"message": {"content": f"card {CARD}", "tool_calls": [call]}}]}
    script = sse(*personal()) if stream else ok(reply)
    async with upstream(script) as fake:
        made = settings(routing(fake.url, privacy="{pii: mask}"))
        async with running(made) as gateway:
            await ask(gateway.client, stream=stream, messages=[{"role": "user", "content": f"I am {MAIL}"}])
            exchange = await gateway.exchange()
        (folder,) = (path for path in made.spool_dir.iterdir() if path.is_dir())
        assert files_with(folder, MAIL)
        await Shipper(made, [StoreReader(gateway.store, 500)]).ship_all()
        assert files_with(made.data_dir, MAIL, CARD) == []
    assert exchange.request is not None
    assert exchange.request["messages"][0]["content"] == "I am <EMAIL_1>"
    content = exchange.response["choices"][0]["message"]["content"]
    assert content == ("write to <EMAIL_1>, card <CARD_1>" if stream else "card <CARD_1>")
    assert exchange.redacted is not None
    assert exchange.redacted["email"] >= 2 - (not stream)


@pytest.mark.parametrize("pii", ["mask", "drop"])
@pytest.mark.parametrize("stream", [False, True])
async def test_before_spool_no_byte_reaches_the_disk(settings: MakeSettings, stream: bool, pii: str) -> None:
    """Large requests included; tokens are counted all the same."""
    reply = {"choices": [{"message": {"content": MAIL}}], "usage": {"prompt_tokens": 5, "completion_tokens": 2}}
    script = sse(*personal()[:-1], usage_event(), DONE) if stream else ok(reply)
    async with upstream(script) as fake:
        made = large(settings(routing(fake.url, privacy=f"{{pii: {pii}, redact: before_spool}}")))
        async with running(made) as gateway:
            messages = [{"role": "user", "content": f"{MAIL} {'word ' * PIECE}"}]
            await ask(gateway.client, stream=stream, messages=messages)
            await gateway.client.post(CHAT, content=MAIL.encode(), headers={"x-workload-id": "w"})
            assert files_with(made.data_dir, "lovelace", CARD) == []
            exchange, refused = await gateway.exchanges()
    assert exchange.usage is not None
    assert exchange.usage.output_tokens == 2
    assert (exchange.request is None) == (pii == "drop")
    assert (refused.outcome, refused.request) == (Outcome.REFUSED, None)


async def test_what_cannot_be_stored_is_no_obstacle(tmp_path: Path) -> None:
    """JSON nested deeper than writers go, and what cannot be masked, go to quarantine; the second without payload."""
    made = Settings(data_dir=tmp_path)
    made.run_dir.mkdir()
    writer = Spool(made.spool_dir, made.spool, Metrics())
    deep = b'{"a":' * 600 + b"1" + b"}" * 600
    writer.record(header(), b"{}")
    writer.record(header(), deep)
    writer.record(header(pii="mask", arm="nobody"), f'"{MAIL}"'.encode())
    writer.record(header(), b"{}")
    writer.close()
    store = SqliteLogStore(tmp_path / "log.db")
    shipper = Shipper(made, [StoreReader(store, 500)])
    await shipper.ship_all()
    assert len([one async for one in store.scan(Query(kind="any"))]) == 2
    await store.close()
    assert shipper.done.quarantined == 2
    assert files_with(tmp_path, MAIL) == []


async def test_sinks_hold_every_exchange_once(tmp_path: Path) -> None:
    """However often the shipper dies: after the file was written, before its place was."""
    made = Settings(data_dir=tmp_path / "data")
    made.run_dir.mkdir(parents=True)
    writer = Spool(made.spool_dir, made.spool, Metrics())
    url = f"file://{tmp_path}/sink?format=jsonl"
    store = SqliteLogStore(tmp_path / "log.db")
    for n in range(5):
        for _ in range(7):
            writer.record(header(timestamp=1.0 + n), b"{}")
        reader = SinkReader(open_sink(url), url)
        reader.least = 1
        shipper = Shipper(made, [StoreReader(store, 500), reader], redactor=Redactor())
        if n % 2:
            (folder,) = (path for path in made.spool_dir.iterdir() if path.is_dir())
            place = folder / f"{reader.name}.place"
            before = place.read_bytes()
            await shipper.ship_once()
            place.write_bytes(before)
        else:
            await shipper.ship_once()
    writer.close()
    await shipper.ship_all()
    lines = [
        json.loads(line) for path in (tmp_path / "sink").rglob("*.jsonl") for line in path.read_text().splitlines()
    ]
    stored: list[Exchange] = [one async for one in store.scan(Query(kind="any"))]
    await store.close()
    assert sorted(line["id"] for line in lines) == [one.id for one in stored]
    assert len(stored) == 35


async def test_a_compressed_stream_is_left_alone(settings: MakeSettings) -> None:
    """Usage is asked for without a compression; an upstream that compresses all the same is passed through."""
    body = b"\x1f\x8b not really"
    script = plain(body, content_type="text/event-stream", extra="content-encoding: gzip\r\n")
    async with upstream(script) as fake, running(settings(routing(fake.url, include_usage="true"))) as gateway:
        async with gateway.client.stream(
            "POST", CHAT, json={"model": "m", "messages": [], "stream": True}, headers={"x-workload-id": "w"}
        ) as reply:
            received = b"".join([part async for part in reply.aiter_raw()])
    assert received == body
