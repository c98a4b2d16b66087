"""Spans as an OTLP receiver gets them: of a gateway on real sockets, through spool, shipper and the SDK's exporters."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from importlib.metadata import version

import orjson
import pytest
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.semconv.attributes import error_attributes, http_attributes, server_attributes, url_attributes
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    TraceState,
    set_span_in_context,
)

from gateway.config import Settings, environment
from gateway.logstore import LogStore, Query
from gateway.logstore.open import open_log_store
from gateway.otlp import SpanSender, resource_of
from gateway.records import Exchange
from gateway.redact import Redactor
from gateway.ship import Shipper, StoreReader
from gateway.signals import Protocol, signals_of
from gateway.spans import Span, provider_name, spans_of
from gateway.telemetry import TellMetrics
from gateway.tell import Teller, channels_of
from tests.gateway.collector import Collector, attributes_of, grpc_collector, http_collector
from tests.gateway.conftest import Running, running
from tests.gateway.fakes import DONE, REPLY, chunk, ok, plain, sse, upstream
from tests.gateway.test_candidate import ask, mirrors, prepare

MakeSettings = Callable[..., Settings]
ROUTING = """
version: 1
models:
  prod: {{upstream: nim, base_url: '{url}', model: big, price: {{input: 1, output: 2}}, retries: {{attempts: 1}}}}
workloads:
  private: {{match: {{header: {{x-workload-id: private}}}}, serve: prod, privacy: {{pii: mask}}}}
  hidden: {{match: {{header: {{x-workload-id: hidden}}}}, serve: prod, privacy: {{pii: drop}}}}
default: {{serve: prod}}
"""
CHAT = "/v1/chat/completions"
BODY = {"model": "asked", "temperature": 0.5, "messages": [{"role": "user", "content": "secret word"}]}
CALLER = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "tracestate": "a=1"}
CAPTURE = "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """A collector to which traces go, and nothing else."""
    with http_collector() as receiving:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", f"{receiving.url}/v1/traces")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20collector-key")
        yield receiving


@contextlib.asynccontextmanager
async def traced(settings: MakeSettings, *scripts: object, routing: str = ROUTING) -> AsyncIterator[tuple]:
    """A gateway and its upstream."""
    async with upstream(*scripts) as fake, running(settings(routing.format(url=fake.url))) as gateway:
        yield gateway, fake


async def ship(gateway: Running) -> None:
    """All that is in the spool, to the log store and the collector."""
    metrics = TellMetrics()
    channels = channels_of(gateway.settings, signals_of(environment()), metrics)
    teller = Teller(gateway.settings.spool_dir, channels, redactor=Redactor(), metrics=metrics)
    teller.tell_once()
    await asyncio.to_thread(teller.close)
    await Shipper(gateway.settings, [StoreReader(gateway.store, 500)]).ship_once()


async def test_a_call_is_a_server_span_and_a_client_span(settings: MakeSettings, collector: Collector) -> None:
    """In the caller's trace, with the conventions' attributes and our own; the log has the trace's id."""
    async with traced(settings, ok()) as (gateway, fake):
        reply = await gateway.client.post(CHAT, json=BODY, headers=CALLER | {"x-client-id": "web"})
        await ship(gateway)
        (logged,) = [exchange async for exchange in gateway.store.scan(_everything())]
    server, client = collector.spans
    port = int(fake.url.split(":")[2].removesuffix("/v1"))
    assert logged.trace_id == server.trace_id.hex() == client.trace_id.hex() == "0af7651916cd43dd8448eb211c80319c"
    assert (server.name, server.kind, server.parent_span_id.hex()) == (f"POST {CHAT}", 2, "b7ad6b7169203331")
    assert (client.name, client.kind, client.parent_span_id) == ("chat big", 3, server.span_id)
    assert server.trace_state == client.trace_state == "a=1"
    sent = f"00-{client.trace_id.hex()}-{client.span_id.hex()}-01"
    assert (fake.received[0].headers["traceparent"], fake.received[0].headers["tracestate"]) == (sent, "a=1")
    told = attributes_of(server)
    assert told.pop("understudy.config_snapshot")
    assert told == {
        "http.request.method": "POST",
        "http.route": CHAT,
        "url.path": CHAT,
        "http.response.status_code": 200,
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "nim",
        "gen_ai.request.model": "asked",
        "gen_ai.request.temperature": 0.5,
        "gen_ai.response.model": "big",
        "gen_ai.response.id": "chatcmpl-1",
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.usage.input_tokens": 5,
        "gen_ai.usage.output_tokens": 1,
        "understudy.exchange_id": reply.headers["x-understudy-exchange-id"],
        "understudy.workload_id": "default",
        "understudy.client_id": "web",
        "understudy.model": "prod",
        "understudy.arm": "incumbent",
        "understudy.outcome": "ok",
        "understudy.cost_usd": 7e-6,
    }
    assert attributes_of(client) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "nim",
        "gen_ai.request.model": "big",
        "gen_ai.response.model": "big",
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "server.address": "127.0.0.1",
        "server.port": port,
        "understudy.model": "prod",
        "understudy.arm": "incumbent",
    }
    assert server.start_time_unix_nano <= client.start_time_unix_nano <= client.end_time_unix_nano
    assert client.end_time_unix_nano <= server.end_time_unix_nano
    assert collector.headers[0]["authorization"] == "Bearer collector-key"


async def test_a_stream_s_span_has_its_tokens(settings: MakeSettings, collector: Collector) -> None:
    """They come with its last event, as does its end."""
    last = chunk("b", usage={"prompt_tokens": 7, "completion_tokens": 2})
    async with traced(settings, sse(chunk("a"), last, DONE)) as (gateway, _):
        await gateway.client.post(CHAT, json=BODY | {"stream": True})
        await ship(gateway)
    told = attributes_of(collector.spans[0])
    assert (told["gen_ai.usage.input_tokens"], told["gen_ai.usage.output_tokens"]) == (7, 2)
    assert told["gen_ai.request.stream"] is True
    assert told["gen_ai.response.time_to_first_chunk"] > 0


async def test_each_try_is_a_span(settings: MakeSettings, collector: Collector) -> None:
    """One that failed says why, and ends before the next begins."""
    failing = plain(b"{}", status="503 Service Unavailable")
    async with traced(settings, failing, ok()) as (gateway, fake):
        await gateway.client.post(CHAT, json=BODY)
        await ship(gateway)
    server, first, second = collector.spans
    assert [attributes_of(one).get("error.type") for one in (server, first, second)] == [None, "503", None]
    assert (first.status.code, first.status.message, second.status.code) == (2, "status 503", 0)
    assert attributes_of(second)["http.request.resend_count"] == 1
    assert first.end_time_unix_nano <= second.start_time_unix_nano
    assert [one.headers["traceparent"].split("-")[2] for one in fake.received] == [
        first.span_id.hex(),
        second.span_id.hex(),
    ]


@pytest.mark.parametrize(
    ("script", "status", "error", "told"),
    [
        (sse(chunk("half"), end="cut"), 200, "upstream_cut", "upstream_cut"),
        (plain(b"{}", status="500 Oops"), 500, "500", "upstream_error"),
        (plain(b"{}", status="400 Bad Request"), 400, "", "upstream_error"),
    ],
)
async def test_a_call_that_went_wrong_is_an_error(
    settings: MakeSettings, collector: Collector, script: object, status: int, error: str, told: str
) -> None:
    """By its outcome or its status; what the client did wrong is no error of the server's, but one of its try's."""
    async with traced(settings, script) as (gateway, _):
        with contextlib.suppress(Exception):
            await gateway.client.post(CHAT, json=BODY)
        await ship(gateway)
    server, client = collector.spans[0], collector.spans[-1]
    found = attributes_of(server)
    assert (found["http.response.status_code"], found.get("error.type", "")) == (status, error)
    assert found["understudy.outcome"] == told
    assert server.status.code == (2 if error else 0)
    assert client.status.code == 2


async def test_a_refused_call_has_a_span(settings: MakeSettings, collector: Collector) -> None:
    """And no try."""
    async with traced(settings, ok()) as (gateway, _):
        await gateway.client.post(CHAT, content=b"not json", headers=CALLER)
        await ship(gateway)
    (server,) = collector.spans
    assert attributes_of(server)["understudy.outcome"] == "refused"
    assert server.parent_span_id.hex() == "b7ad6b7169203331"


async def test_a_call_of_another_path_is_told_without_a_model(settings: MakeSettings, collector: Collector) -> None:
    """Its path names files and batches: the span's name has none of it."""
    async with traced(settings, ok({"id": "file-1"})) as (gateway, _):
        await gateway.client.get("/v1/files/file-1")
        await ship(gateway)
    server, client = collector.spans
    told = attributes_of(server)
    assert (server.name, client.name) == ("GET", "GET")
    assert (told["http.request.method"], told["url.path"]) == ("GET", "/v1/files/file-1")
    assert not {"http.route", "gen_ai.operation.name", "gen_ai.usage.input_tokens"} & set(told)


async def test_a_mirror_is_linked_to_its_original(settings: MakeSettings, collector: Collector) -> None:
    """In a trace of its own, with what the candidate used."""
    async with upstream(ok()) as prod, upstream(ok(REPLY | {"model": "tiny"})) as small:
        made = prepare(settings, prod.url, small.url, mirror=1.0)
        async with running(made) as gateway:
            await ask(gateway)
            await mirrors(gateway, 1)
        async with _store_of(made) as store:
            await ship(Running(client=gateway.client, settings=made, store=store))
    by_name = {span.name: span for span in collector.spans}
    server, mirror = by_name[f"POST {CHAT}"], by_name["chat router-v1"]
    assert len(collector.spans) == 3
    assert mirror.trace_id != server.trace_id
    assert mirror.parent_span_id == b""
    (link,) = mirror.links
    assert (link.trace_id, link.span_id) == (server.trace_id, server.span_id)
    told = attributes_of(mirror)
    assert (told["understudy.arm"], told["gen_ai.usage.input_tokens"]) == ("mirror", 5)
    assert told["understudy.mirror_of"] == attributes_of(server)["understudy.exchange_id"]
    assert small.received[0].headers["traceparent"].split("-")[1:3] == [mirror.trace_id.hex(), mirror.span_id.hex()]


async def test_off_the_client_s_context_passes_untouched(settings: MakeSettings) -> None:
    """As every other header; the log has no trace."""
    async with traced(settings, ok()) as (gateway, fake):
        await gateway.client.post(CHAT, json=BODY, headers=CALLER)
        exchange = await gateway.exchange()
    assert {name: fake.received[0].headers[name] for name in CALLER} == CALLER
    assert exchange.trace_id == ""


async def test_what_is_not_sampled_is_not_sent(
    settings: MakeSettings, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller's decision counts; without one, the ratio. The log knows the trace all the same."""
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0")
    not_sampled = {"traceparent": CALLER["traceparent"][:-1] + "0"}
    async with traced(settings, ok()) as (gateway, fake):
        for headers in ({}, not_sampled, CALLER):
            await gateway.client.post(CHAT, json=BODY, headers=headers)
        await ship(gateway)
        logged = [exchange.trace_id async for exchange in gateway.store.scan(_everything())]
    assert {span.trace_id.hex() for span in collector.spans} == {"0af7651916cd43dd8448eb211c80319c"}
    assert [one.headers["traceparent"][-2:] for one in fake.received] == ["00", "00", "01"]
    assert all(logged)


async def test_content_is_told_only_where_asked_for_and_never_of_masked_workloads(
    settings: MakeSettings, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was said is nowhere in what is sent, but with the setting, and there not for workloads with privacy."""
    async with traced(settings, ok()) as (gateway, _):
        await gateway.client.post(CHAT, json=BODY)
        await ship(gateway)
        without = b"".join(request.SerializeToString() for request in collector.requests)
        collector.requests.clear()
        monkeypatch.setenv(CAPTURE, "true")
        for workload in ("private", "hidden", "default"):
            headers = {"x-workload-id": workload, "x-client-id": "a@b.example", "authorization": "Bearer sk-secret-key"}
            await gateway.client.post(CHAT, json=BODY, headers=headers)
        await ship(gateway)
    sent = b"".join(request.SerializeToString() for request in collector.requests)
    told = {attributes_of(span).get("understudy.workload_id"): attributes_of(span) for span in collector.spans}
    assert b"secret word" not in without
    assert b"sk-secret-key" not in sent
    assert {name for name, one in told.items() if "gen_ai.input.messages" in one} == {"default"}
    said = orjson.loads(told["default"]["gen_ai.input.messages"])
    assert said == [{"role": "user", "parts": [{"type": "text", "content": "secret word"}]}]
    replied = [{"role": "assistant", "parts": [{"type": "text", "content": "hello"}], "finish_reason": "stop"}]
    assert orjson.loads(told["default"]["gen_ai.output.messages"]) == replied
    assert told["private"]["understudy.client_id"].startswith("<EMAIL_")
    assert told["private"]["gen_ai.usage.input_tokens"] == told["hidden"]["gen_ai.usage.input_tokens"] == 5
    assert (told["private"]["gen_ai.request.model"], told["hidden"]["gen_ai.request.model"]) == ("asked", "big")


def test_a_provider_behind_litellm_has_the_conventions_name() -> None:
    """At an address that nobody here knows."""
    one = Exchange(id="x", timestamp=1.0, workload_id="w", trace_id="b" * 32, status=200)
    tried = [1.0, "claude", "bedrock", "bedrock/claude", "", 80, ""]
    header = {"span": [1, "", "", None], "span_end": [2.0, [tried]], "provider": "bedrock"}
    server, client = spans_of(one, header)
    assert server.attributes["gen_ai.provider.name"] == client.attributes["gen_ai.provider.name"] == "aws.bedrock"
    known = {one.value for one in gen_ai_attributes.GenAiProviderNameValues}
    assert {
        provider_name(name) for name in ("azure", "azure_ai", "gemini", "mistral", "vertex_ai", "watsonx", "xai")
    } <= known
    assert not {"server.address", "server.port"} & set(client.attributes)


SPANS = (
    Span(
        name="POST /v1/chat/completions",
        kind="server",
        trace_id=0x0AF7651916CD43DD8448EB211C80319C,
        span_id=1,
        parent=0xB7AD6B7169203331,
        remote=True,
        state="a=1,b=2",
        started=1_700_000_000_000_000_000,
        ended=1_700_000_000_500_000_000,
        attributes={"http.response.status_code": 200, "a.text": "é", "a.flag": True, "a.list": ["x", "y"], "a.n": 0.5},
    ),
    Span(
        name="chat big",
        kind="client",
        trace_id=0x0AF7651916CD43DD8448EB211C80319C,
        span_id=2,
        started=1_700_000_000_000_000_001,
        ended=1_700_000_000_400_000_000,
        attributes={"error.type": "503"},
        error="503",
        told="status 503",
        link=(0x1AF7651916CD43DD8448EB211C80319C, 7),
    ),
)


@pytest.mark.parametrize(("protocol", "receiver"), [("http/protobuf", http_collector), ("grpc", grpc_collector)])
def test_what_arrives_is_what_the_sdk_would_have_sent(
    protocol: Protocol, receiver: Callable[..., contextlib.AbstractContextManager], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same spans, made by the SDK's own tracer and batch processor, are the same messages but for their ids."""
    monkeypatch.setenv("OTEL_SERVICE_NAME", "shop")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
    with receiver() as ours, http_collector() as theirs:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", ours.url)
        sender = SpanSender(protocol, environment(), TellMetrics())
        sender.offer(SPANS)
        sender.close(10)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", theirs.url)
        _send_by_sdk()
    expected, found = _without_ids(theirs), _without_ids(ours)
    assert len(expected.scope_spans[0].spans) == 2
    assert found == expected


def _send_by_sdk() -> None:
    """The spans above, by OpenTelemetry's own API."""
    provider = TracerProvider(resource=resource_of(environment()), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    tracer = provider.get_tracer("understudy", version("understudy"))
    for span in SPANS:
        context = None
        if span.parent:
            state = TraceState.from_header([span.state])
            parent = SpanContext(span.trace_id, span.parent, span.remote, TraceFlags(1), state)
            context = set_span_in_context(NonRecordingSpan(parent))
        links = [Link(SpanContext(*span.link, is_remote=False))] if span.link else []
        made = tracer.start_span(
            span.name,
            context,
            kind=SpanKind[span.kind.upper()],
            attributes=span.attributes,
            links=links,
            start_time=span.started,
        )
        if span.error:
            made.set_status(Status(StatusCode.ERROR, span.told))
        made.end(span.ended)
    provider.shutdown()


def _without_ids(collector: Collector) -> object:
    (found,) = collector.resource_spans
    for span in found.scope_spans[0].spans:
        assert (len(span.trace_id), len(span.span_id)) == (16, 8)
        span.span_id = b""
        if not span.parent_span_id:
            span.trace_id = b""
    return found


async def test_names_are_the_conventions(settings: MakeSettings, collector: Collector) -> None:
    """Whatever is not our own is in OpenTelemetry's semantic conventions."""
    known = {
        value
        for module in (gen_ai_attributes, error_attributes, http_attributes, server_attributes, url_attributes)
        for value in vars(module).values()
        if isinstance(value, str)
    }
    async with traced(settings, sse(chunk("a"), end="cut")) as (gateway, _):
        with contextlib.suppress(Exception):
            await gateway.client.post(CHAT, json=BODY | {"stream": True, "max_tokens": 3, "seed": 1})
        await ship(gateway)
    names = {name for span in collector.spans for name in attributes_of(span)}
    assert {name for name in names if not name.startswith("understudy.")} <= known | {"http.request.resend_count"}


def _everything() -> Query:
    return Query(kind="any")


@contextlib.asynccontextmanager
async def _store_of(settings: Settings) -> AsyncIterator[LogStore]:
    store = open_log_store(settings.log_store)
    try:
        yield store
    finally:
        await store.close()
