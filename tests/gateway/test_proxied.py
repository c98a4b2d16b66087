"""Upstreams behind an HTTP proxy: by routing.yaml or by the environment, with TLS through it, byte for byte."""

import base64
import ssl
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from gateway.config import Settings
from gateway.errors import ConnectError, ConnectTimeout, UpstreamTimeout
from gateway.records import Outcome
from gateway.upstream import UpstreamRequest
from gateway.upstream.via_proxy import ProxiedUpstream
from routing.targets import Model, Timeouts
from tests.gateway.conftest import Running, running
from tests.gateway.fakes import DONE, chunk, hang, ok, plain, sse, upstream
from tests.gateway.proxies import proxy
from tests.gateway.test_direct import authority

MakeSettings = Callable[..., Settings]
ROUTING = "version: 1\nmodels: {{m: {{base_url: '{url}', model: m, {more}}}}}\ndefault: {{serve: m}}"
BODY = {"model": "m", "messages": []}
CHAT = "/v1/chat/completions"
HOST = "model.test"  # the proxy alone knows it


@pytest.fixture
def tls(tmp_path: Path) -> ssl.SSLContext:
    return authority(tmp_path / "ca.pem", HOST)


async def ask(gateway: Running, **body: object) -> httpx.Response:
    return await gateway.client.post(f"{CHAT}?a=%2F..%2fb&c", json=BODY | body)


async def test_a_tunnel_is_used_again_and_tls_is_the_model_s(
    settings: MakeSettings, tmp_path: Path, tls: ssl.SSLContext
) -> None:
    """Bytes, headers, path and query as they are; the login is for the proxy alone."""
    odd = plain(b'{ "odd" : 1.0}', extra="x-odd: 1\r\nX-Ratelimit-Limit: 5\r\n", status="418 Teapot")
    async with upstream(ok(), odd, tls=tls) as fake, proxy({HOST: ("127.0.0.1", fake.port)}) as way:
        more = f"ca_file: {tmp_path}/ca.pem, proxy: 'env:MY_PROXY', api_key: 'env:MY_KEY'"
        with pytest.MonkeyPatch.context() as env:
            env.setenv("MY_PROXY", way.url.replace("//", "//me:secret@"))
            env.setenv("MY_KEY", "sk-1")
            made = settings(ROUTING.format(url=f"https://{HOST}:7/v1", more=more))
            async with running(made) as gateway:
                replies = [await ask(gateway), await ask(gateway)]
                exchanges = await gateway.exchanges()
    assert [reply.status_code for reply in replies] == [200, 418]
    assert replies[1].content == b'{ "odd" : 1.0}'
    assert (replies[1].headers["x-odd"], replies[1].headers["x-ratelimit-limit"]) == ("1", "5")
    assert way.lines == [f"CONNECT {HOST}:7"]
    assert way.logins == [f"basic {base64.b64encode(b'me:secret').decode().lower()}"]
    received = fake.received[0]
    assert received.line == "POST /v1/chat/completions?a=%2F..%2fb&c HTTP/1.1"
    assert (received.headers["host"], received.headers["authorization"]) == (f"{HOST}:7", "Bearer sk-1")
    assert "proxy-authorization" not in received.headers
    assert received.json == BODY
    assert [exchange.status for exchange in exchanges] == [200, 418]


async def test_the_environment_names_a_proxy_for_https(
    settings: MakeSettings, tmp_path: Path, tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with upstream(ok(), tls=tls) as fake, proxy({HOST: ("127.0.0.1", fake.port)}) as way:
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        monkeypatch.setenv("HTTPS_PROXY", way.url)
        monkeypatch.delenv("https_proxy", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.setenv("NO_PROXY", "other.test")
        made = ROUTING.format(url=f"https://{HOST}:7/v1", more="")
        async with running(settings(made)) as gateway:
            assert (await ask(gateway)).status_code == 200
        monkeypatch.setenv("NO_PROXY", ".test")
        async with running(settings(made)) as gateway:
            refused = await ask(gateway)
    assert refused.status_code == 502  # nobody else knows the name
    assert way.lines == [f"CONNECT {HOST}:7"]


async def test_plain_http_is_passed_on(settings: MakeSettings) -> None:
    async with upstream(ok()) as fake, proxy({HOST: ("127.0.0.1", fake.port)}) as way:
        made = settings(ROUTING.format(url=f"http://{HOST}:7/v1", more=f"proxy: '{way.url}'"))
        async with running(made) as gateway:
            assert (await ask(gateway)).status_code == 200
    assert way.lines == [f"POST http://{HOST}:7/v1/chat/completions?a=%2F..%2fb&c"]
    assert fake.received[0].line == "POST /v1/chat/completions?a=%2F..%2fb&c HTTP/1.1"


async def test_streams_and_their_cuts(settings: MakeSettings) -> None:
    whole = [chunk("a"), b": comment\r\n\r\n", chunk("b"), DONE]
    async with upstream(sse(*whole), sse(chunk("a"), end="cut")) as fake:
        async with proxy({HOST: ("127.0.0.1", fake.port)}) as way:
            made = settings(ROUTING.format(url=f"http://{HOST}:7/v1", more=f"proxy: '{way.url}'"))
            async with running(made) as gateway:
                assert (await ask(gateway, stream=True)).content == b"".join(whole)
                with pytest.raises(httpx.RemoteProtocolError):
                    await ask(gateway, stream=True)
                exchanges = await gateway.exchanges()
    assert sorted(exchange.outcome for exchange in exchanges) == [Outcome.OK, Outcome.UPSTREAM_CUT]


def model(way: str, **more: object) -> Model:
    values = {"name": "m", "upstream": "openai", "base_url": f"https://{HOST}:7/v1", "model": "m", "proxy": way}
    return Model(**(values | more))


REQUEST = UpstreamRequest(path="/chat/completions", headers=[], body=b"{}")


async def test_what_fails_is_said_without_the_login(tmp_path: Path, tls: ssl.SSLContext) -> None:
    """A proxy that wants another login, is not there, or stands before a server that nobody vouches for."""
    pool = ProxiedUpstream()
    async with upstream(ok(), tls=tls) as fake:
        async with proxy({HOST: ("127.0.0.1", fake.port)}, login="basic other") as way:
            with pytest.raises(ConnectError, match="407") as refused:
                await pool.send(model(way.url.replace("//", "//me:secret@")), REQUEST)
        with pytest.raises(ConnectError) as gone:
            await pool.send(model(way.url.replace("//", "//me:secret@")), REQUEST)
        async with proxy({HOST: ("127.0.0.1", fake.port)}) as way:
            with pytest.raises(ConnectError, match="certificate verify failed"):
                await pool.send(model(way.url), REQUEST)
            with pytest.raises(ConnectError, match=r"ca_file .*none\.pem: No such file"):
                await pool.send(model(way.url, ca_file=str(tmp_path / "none.pem")), REQUEST)
    await pool.close()
    assert not any("secret" in str(error.value) for error in (refused, gone))


async def test_deadlines_hold_behind_a_proxy() -> None:
    pool = ProxiedUpstream()
    url = f"http://{HOST}:7/v1"
    async with upstream(sse(chunk("a"), end="hang"), hang) as fake:
        async with proxy({HOST: ("127.0.0.1", fake.port)}) as way:
            reply = await pool.send(model(way.url, base_url=url, timeouts=Timeouts(total=0.5)), REQUEST)
            assert await reply.read() == chunk("a")
            with pytest.raises(UpstreamTimeout, match=r"total deadline of 0\.5 s"):
                await reply.read()
            reply.close()
            with pytest.raises(UpstreamTimeout, match=r"first token deadline of 0\.3 s"):
                await pool.send(model(way.url, base_url=url, timeouts=Timeouts(first_token=0.3)), REQUEST)
    async with upstream(hang) as silent:  # takes a connection, and never answers to CONNECT
        far = model(f"http://127.0.0.1:{silent.port}", timeouts=Timeouts(connect=0.3, first_token=0.5))
        with pytest.raises((ConnectTimeout, UpstreamTimeout)):
            await pool.send(far, REQUEST)
    await pool.close()
