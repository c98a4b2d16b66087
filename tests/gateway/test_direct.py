"""The direct upstream's connections: TLS and whom it trusts, names that move, and how long a connection is kept."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import trustme
import uvloop

from gateway.config import Settings
from gateway.errors import ConnectError, UpstreamCut
from gateway.upstream import UpstreamRequest
from gateway.upstream.direct import DirectUpstream
from routing.targets import Model, Timeouts
from tests.gateway.conftest import running
from tests.gateway.fakes import DONE, chunk, ok, sse, upstream
from tests.gateway.test_tell import until

Run = Callable[[Coroutine[Any, Any, None]], None]
PLENTY = Timeouts()
REQUEST = UpstreamRequest(path="/chat/completions", headers=[(b"content-type", b"application/json")], body=b"{}")


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def on(request: pytest.FixtureRequest) -> Run:
    """Either event loop: tests run on the one, workers on the other."""
    run: Run = request.param
    return run


def authority(path: Path, *names: str) -> ssl.SSLContext:
    """A new CA, whose certificate is written to `path`; what a server with those names presents."""
    ca = trustme.CA()
    ca.cert_pem.write_to_path(str(path))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert(*names).configure_cert(context)
    return context


def model(url: str, ca_file: Path | str = "", timeouts: Timeouts = PLENTY) -> Model:
    return Model(name="m", upstream="openai", base_url=url, model="big", ca_file=str(ca_file), timeouts=timeouts)


async def ask(pool: DirectUpstream, to: Model) -> bytes:
    """One call; what its whole reply was."""
    reply = await pool.send(to, REQUEST)
    try:
        parts = []
        while part := await reply.read():
            parts.append(part)
        return b"".join(parts)
    finally:
        reply.close()


def test_a_private_authority_is_trusted_by_its_file(on: Run, tmp_path: Path) -> None:
    """Plain and streamed, over one connection."""
    tls, ca = authority(tmp_path / "ca.pem", "localhost"), tmp_path / "ca.pem"

    async def scenario() -> None:
        events = [chunk("x" * 50_000), DONE]
        async with upstream(ok(), sse(*events), ok(), tls=tls) as fake:
            pool = DirectUpstream()
            assert b"hello" in await ask(pool, model(fake.url, ca))
            assert await ask(pool, model(fake.url, ca)) == b"".join(events)
            assert b"hello" in await ask(pool, model(fake.url, ca))
            assert fake.connections == 1
            with pytest.raises(ConnectError):  # another model's trust opens no door
                await ask(pool, model(fake.url))
            await pool.close()

    on(scenario())


def test_whom_nobody_vouches_for_is_refused(on: Run, tmp_path: Path) -> None:
    tls = authority(tmp_path / "ca.pem", "localhost")
    other = authority(tmp_path / "other.pem", "elsewhere.example")

    async def scenario() -> None:
        pool = DirectUpstream()
        async with upstream(ok(), tls=tls) as fake:
            with pytest.raises(ConnectError, match=r"its certificate is not accepted: .*issuer.*; ca_file names"):
                await ask(pool, model(fake.url))
            with pytest.raises(ConnectError, match="https://localhost:"):
                await ask(pool, model(fake.url, tmp_path / "other.pem"))
            assert fake.received == []
        async with upstream(ok(), tls=other) as fake:
            with pytest.raises(ConnectError, match=r"not accepted: Hostname mismatch.* not valid for 'localhost'"):
                await ask(pool, model(fake.url, tmp_path / "other.pem"))
            assert fake.received == []
        async with upstream(ok()) as fake:
            with pytest.raises(ConnectError, match="https://localhost:"):  # no TLS there
                await ask(pool, model(f"https://localhost:{fake.port}/v1", timeouts=Timeouts(connect=0.3)))

    on(scenario())


def test_a_new_authority_s_file_is_taken_without_a_restart(on: Run, tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    before = authority(ca, "localhost")

    async def scenario() -> None:
        pool = DirectUpstream(age=0)
        async with upstream(ok(), tls=before) as fake:
            assert b"hello" in await ask(pool, model(fake.url, ca))
        after = authority(tmp_path / "new.pem", "localhost")
        async with upstream(ok(), tls=after) as fake:
            with pytest.raises(ConnectError):
                await ask(pool, model(fake.url, ca))
            (tmp_path / "new.pem").rename(ca)
            assert b"hello" in await ask(pool, model(fake.url, ca))
            ca.write_text("no certificate")
            with pytest.raises(ConnectError, match="https://localhost:"):
                await ask(pool, model(fake.url, ca))
            ca.unlink()
            with pytest.raises(ConnectError, match="No such file"):
                await ask(pool, model(fake.url, ca))

    on(scenario())


def test_the_environment_s_authorities_are_trusted(on: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tls = authority(tmp_path / "ca.pem", "localhost")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))

    async def scenario() -> None:
        async with upstream(ok(), tls=tls) as fake:
            assert b"hello" in await ask(DirectUpstream(), model(fake.url))

    on(scenario())


def test_a_connection_that_breaks_within_tls_is_a_cut(on: Run, tmp_path: Path) -> None:
    tls = authority(tmp_path / "ca.pem", "localhost")

    async def scenario() -> None:
        async with upstream(sse(chunk("a"), end="cut"), tls=tls) as fake:
            with pytest.raises(UpstreamCut):
                await ask(DirectUpstream(), model(fake.url, tmp_path / "ca.pem"))

    on(scenario())


async def test_a_certificate_that_is_not_accepted_is_a_clear_502(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    tls = authority(tmp_path / "ca.pem", "localhost")
    async with upstream(ok(), tls=tls) as fake:
        text = "version: 1\nmodels: {{m: {{base_url: '{}', model: m{}}}}}\ndefault: {{serve: m}}"
        body = {"model": "m", "messages": []}
        async with running(settings(text.format(fake.url, ""))) as gateway:
            refused = await gateway.client.post("/v1/chat/completions", json=body)
        async with running(settings(text.format(fake.url, f", ca_file: {tmp_path}/ca.pem"))) as gateway:
            reply = await gateway.client.post("/v1/chat/completions", json=body)
    assert refused.status_code == 502
    assert "its certificate is not accepted" in refused.json()["error"]["message"]
    assert reply.status_code == 200


def test_a_name_that_moves_is_followed(on: Run) -> None:
    """A connection is kept, so that calls stay where they are; it is not kept for ever."""

    async def scenario() -> None:
        moving = {"model.test": ["127.0.0.1"]}
        asked: list[str] = []

        async def resolve(host: str, _port: int) -> list[str]:
            asked.append(host)
            return moving[host]

        async with upstream(ok()) as old, upstream(ok(), host="127.0.0.2", port=old.port) as new:
            url = f"http://model.test:{old.port}/v1"
            kept, short = DirectUpstream(resolve=resolve), DirectUpstream(resolve=resolve, age=0)
            for pool in (kept, short):
                await ask(pool, model(url))
            moving["model.test"] = ["127.0.0.2"]
            for pool in (kept, short):
                await ask(pool, model(url))
            assert (len(old.received), len(new.received)) == (3, 1)
            assert new.received[0].headers["host"] == f"model.test:{old.port}"
            assert len(asked) == 3
            await kept.close()

    on(scenario())


def test_an_address_that_does_not_answer_is_passed_over(on: Run) -> None:
    async def scenario() -> None:
        async def resolve(_host: str, _port: int) -> list[str]:
            return ["127.0.0.3", "127.0.0.1"]

        async with upstream(ok()) as fake:
            assert b"hello" in await ask(DirectUpstream(resolve=resolve), model(f"http://model.test:{fake.port}/v1"))
        with pytest.raises(ConnectError, match=r"http://model\.test:9"):
            await ask(DirectUpstream(resolve=resolve), model("http://model.test:9/v1"))

    on(scenario())


def test_a_name_that_nobody_knows_is_a_failed_connection(on: Run) -> None:
    async def scenario() -> None:
        with pytest.raises(ConnectError, match=r"http://no-such-host\.invalid:80"):
            await ask(DirectUpstream(), model("http://no-such-host.invalid/v1"))

    on(scenario())


def test_an_idle_connection_is_closed_without_a_further_call(on: Run) -> None:
    """Before its server does it, and not only when somebody would have used it."""

    async def scenario() -> None:
        async with upstream(ok()) as fake:
            pool = DirectUpstream(idle=0.05)
            await ask(pool, model(fake.url))
            await asyncio.wait_for(fake.lost.wait(), 5)
            await ask(pool, model(fake.url))
            assert fake.connections == 2
            await pool.close()

    on(scenario())


@contextlib.asynccontextmanager
async def piecewise(*, chunked: bool = True) -> AsyncIterator[tuple[str, asyncio.Queue[bytes]]]:
    """An upstream that begins an endless stream, and sends what it is given as a part of it, b"" as its end."""
    pieces: asyncio.Queue[bytes] = asyncio.Queue()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n%b\r\n" % (b"transfer-encoding: chunked\r\n" if chunked else b""))
        piece = b"begin"
        while piece:
            piece = await pieces.get()
            writer.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", pieces


def test_what_comes_while_it_is_waited_for_is_handed_on_as_it_comes(on: Run) -> None:
    """Until it is not wanted for a while: then the reader is woken, and what comes meanwhile is kept for him."""

    async def scenario() -> None:
        async with piecewise() as (url, pieces):
            pool, taken, enough = DirectUpstream(), [], b"two"

            def take(piece: bytes) -> bool:
                taken.append(piece)
                return piece != enough

            reply = await pool.send(model(url), REQUEST)
            reading = asyncio.ensure_future(reply.read(take))
            for piece in (b"one", enough):
                await asyncio.sleep(0)
                pieces.put_nowait(piece)
                await until(lambda piece=piece: taken[-1:] == [piece])
            assert await reading == b""
            assert not reply.complete
            pieces.put_nowait(b"three")
            assert await reply.read() == b"three"
            reading = asyncio.ensure_future(reply.read(take))
            await asyncio.sleep(0)
            pieces.put_nowait(b"")
            assert await reading == b""
            assert reply.complete
            assert taken == [b"one", enough]
            reply.close()
            await pool.close()

    on(scenario())


@pytest.mark.parametrize("chunked", [True, False])
def test_what_goes_wrong_with_it_is_the_reader_s(on: Run, chunked: bool) -> None:
    """He hears of nothing that comes after it, nor of a clean end; and the connection is not used again."""

    async def scenario() -> None:
        async with piecewise(chunked=chunked) as (url, pieces):
            pool = DirectUpstream()

            def take(_piece: bytes) -> bool:
                for more in (b"two", b""):
                    pieces.put_nowait(more)
                raise LookupError("no place")

            reply = await pool.send(model(url), REQUEST)
            reading = asyncio.ensure_future(reply.read(take))
            await asyncio.sleep(0)
            pieces.put_nowait(b"one")
            with pytest.raises(LookupError, match="no place"):
                await reading
            with pytest.raises(LookupError, match="no place"):
                await reply.read()
            reply.close()
            await pool.close()

    on(scenario())


def test_who_gives_up_waiting_is_handed_nothing_more(on: Run) -> None:
    async def scenario() -> None:
        async with piecewise() as (url, pieces):
            pool, taken = DirectUpstream(), bytearray()

            def take(piece: bytes) -> bool:
                taken.extend(piece)
                return True

            reply = await pool.send(model(url), REQUEST)
            reading = asyncio.ensure_future(reply.read(take))
            await asyncio.sleep(0)
            pieces.put_nowait(b"one")
            await until(lambda: taken == b"one")
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
            pieces.put_nowait(b"two")
            assert await reply.read() == b"two"
            assert taken == b"one"
            reply.close()
            pieces.put_nowait(b"")
            await pool.close()

    on(scenario())
