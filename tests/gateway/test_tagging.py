"""Tags, and the one rewrite on the way up: another model, every other byte as it was."""

import contextlib
import json
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.auth import Key, identified
from gateway.config import Settings
from gateway.errors import RequestRefused
from gateway.fields import read_fields
from gateway.tagging import conversation_of, tag, with_model
from routing.labels import labels_of
from tests.gateway.conftest import running
from tests.gateway.fakes import ok, upstream

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=8) | st.just('"model": "gpt"'),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["model", "a", "metadata"]), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(
    st.dictionaries(st.sampled_from(["model", "messages", "x", "metadata"]), JSON, max_size=4),
    st.sampled_from(["gpt", 'a"b', ""]),
)
def test_only_the_top_level_model_changes(rest: dict, model: str) -> None:
    """Nested keys, and strings that look like keys, are left alone."""
    body = {**rest, "model": model}
    raw = json.dumps(body, separators=(" , ", " : ")).encode()
    assert json.loads(with_model(raw, read_fields(raw), "tiny")) == body | {"model": "tiny"}


@given(st.dictionaries(st.sampled_from(["a", "b"]), JSON, max_size=2))
def test_a_missing_model_is_put_in(rest: dict) -> None:
    """A body without a model gets the target's."""
    raw = json.dumps(rest).encode()
    assert json.loads(with_model(raw, read_fields(raw), "tiny")) == rest | {"model": "tiny"}


def test_other_bytes_stay() -> None:
    """Spacing, number forms, escapes and other doubled keys."""
    raw = b'{ "model" :"a", "n": 1.50e0,"s":"\\u00e9", "n": 2 }'
    assert with_model(raw, read_fields(raw), "b") == raw.replace(b'"a"', b'"b"')
    late = b'{"messages": [{"content": "\\n{"}] , "model" : "a\\"b" ,"n": 1 }'
    assert with_model(late, read_fields(late), "c") == late.replace(b'"a\\"b"', b'"c"')
    same = b'{"model": "a"}'
    assert with_model(same, read_fields(same), "a") is same
    odd = b'{"model": 5}'
    assert with_model(odd, read_fields(odd), "a") is odd


@pytest.mark.parametrize(
    "raw",
    [
        b'{"model": "a", "x": {"model": "a"}, "n": 1.50e0, "model": "b"}',
        b'{"model": "a", "x": {"model": "a"}, "n": 1.50e0, "mod\\u0065l": "b"}',
        b'{"mod\\u0065l": "a", "x": {"model": "a"}, "n": 1.50e0, "\\u006dodel": "b"}',
        b'{"mod\\u0065l": "a", "x": {"model": "a"}, "n": 1.50e0}',
        b'{"model": "a", "x": {"model": "a"}, "n": 1.50e0, "model": null}',
    ],
)
def test_no_second_model_goes_up(raw: bytes) -> None:
    """However `model` is written twice, a reader that takes the first reads the same as one that takes the last."""
    for name in ("b", "c"):
        body = with_model(raw, read_fields(raw), name)
        keys = json.loads(body, object_pairs_hook=lambda pairs: pairs)
        assert sorted(keys) == [("model", name), ("n", 1.5), ("x", [("model", "a")])]
        assert b"1.50e0" in body


def test_a_model_that_is_no_text_is_the_upstreams_to_refuse() -> None:
    raw = b'{"model": "a", "model": 5}'
    assert with_model(raw, read_fields(raw), "b") == b'{"model":5}'


def test_a_large_body_is_rewritten_in_one_pass() -> None:
    """Where its model stands, and what its text is made of, makes no difference."""
    picture = b"data:image/png;base64," + b"iVBORw0KGgo" * 500_000
    for content in (picture, b"\\n" * 2_000_000, "日本語".encode() * 500_000):
        raw = b'{"messages":[{"content":"' + content + b'"}],"model":"a"}'
        started = time.process_time()
        assert with_model(raw, read_fields(raw), "b") == raw[:-4] + b'"b"}'
        assert time.process_time() - started < 0.25


@pytest.mark.parametrize(
    "raw",
    [
        b'{"messages": ["\xff"]}',
        b'{"messages": ["\xed\xa0\x80"]}',
        b'{"messages": ["\\ud800"]}',
        b'\xef\xbb\xbf{"model": "a"}',
        '{"model": "a"}'.encode("utf-16"),
        b'{"messages": [NaN]}',
        b'{"messages": []}{"messages": []}',
        b'{"messages": "\x00"}',
        b"",
        b"[]",
        b'"a"',
        b'{"model": 1e999}',
    ],
)
def test_what_is_no_json_object_in_utf_8_is_refused(raw: bytes) -> None:
    with pytest.raises(RequestRefused) as refused:
        read_fields(raw)
    assert (refused.value.status, refused.value.code) == (400, "invalid_json")


def test_headers_win_over_metadata() -> None:
    """And values that are no text are no tags."""
    fields = read_fields(b'{"metadata": {"workload_id": "w", "client_id": "c", "session_id": 5}, "user": "u"}')
    tags = tag({"x-workload-id": "h"}, fields)
    assert (tags.workload, tags.client, tags.session, tags.user) == ("h", "c", "", "u")


@pytest.mark.parametrize(
    ("body", "user"),
    [
        (b'{"user": "a", "safety_identifier": "b", "metadata": {"user_id": "c"}}', "a"),
        (b'{"safety_identifier": "b", "metadata": {"user_id": "c"}}', "b"),
        (b'{"metadata": {"user_id": "c"}}', "c"),
        (b'{"user": 5}', ""),
    ],
)
def test_the_user_of_a_body(body: bytes, user: str) -> None:
    assert tag({}, read_fields(body)).user == user


def test_labels_of_other_gateways_are_no_way_around_a_key() -> None:
    """The key's client stays the call's client, in the log and for rules on metadata."""
    labels = labels_of({"x-portkey-metadata": '{"_organisation": "other"}', "x-litellm-tags": "client_id:other"}, None)
    headers, metadata = identified({}, labels, Key(number=1, digest="d", client="shop"))
    fields = read_fields(b"{}")
    fields.metadata = metadata
    assert (tag(headers, fields).client, metadata["client_id"]) == ("shop", "shop")


async def test_tags_of_other_gateways_route_and_reach_the_log(settings: Callable[..., Settings]) -> None:
    """Headers of Portkey, Helicone and LiteLLM, TensorZero's fields; and all of it goes up as it came."""
    routing = """
version: 1
models: {{m: {{upstream: nim, base_url: "{url}", model: m}}}}
workloads:
  gold: {{match: {{metadata: {{user-tier: gold}}}}, serve: m}}
  refund: {{serve: m}}
default: {{serve: m}}
"""
    portkey = {"x-portkey-metadata": '{"_prompt": "refund", "_organisation": "acme", "session_id": "s1"}'}
    tensorzero = b'{"model": "m", "tensorzero::tags": {"client_id": "web"}, "tensorzero::episode_id": "0193"}'
    calls = [
        (portkey, b"{}"),
        ({"Helicone-Property-User-Tier": "gold", "Helicone-Property-Session": "s2"}, b"{}"),
        ({"x-litellm-tags": "workload_id:mail,production"}, b"{}"),
        ({}, tensorzero),
    ]
    async with upstream(ok()) as fake, running(settings(routing.format(url=fake.url))) as gateway:
        for headers, body in calls:
            await gateway.client.post("/v1/chat/completions", content=body, headers=headers)
        exchanges = await gateway.exchanges()
    assert [(one.workload_id, one.client_id, one.session_id) for one in exchanges] == [
        ("refund", "acme", "s1"),
        ("gold", "", "s2"),
        ("mail", "", ""),
        ("default", "web", "0193"),
    ]
    assert fake.received[0].headers["x-portkey-metadata"] == portkey["x-portkey-metadata"]
    assert fake.received[3].body == tensorzero


async def test_keys_of_other_gateways_are_credentials(
    settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They go to a model without a key of its own, as the client's Authorization does, and to no other."""
    monkeypatch.setenv("TEST_UPSTREAM_KEY", "own")
    routing = """
version: 1
models:
  open: {{upstream: nim, base_url: "{url}", model: m}}
  keyed: {{upstream: nim, base_url: "{url}", model: m, api_key: "env:TEST_UPSTREAM_KEY"}}
workloads: {{keyed: {{serve: keyed}}}}
default: {{serve: open}}
"""
    secrets = {
        "helicone-auth": "Bearer h",
        "x-portkey-api-key": "p",
        "x-portkey-virtual-key": "v",
        "x-litellm-api-key": "l",
    }
    async with upstream(ok()) as fake, running(settings(routing.format(url=fake.url))) as gateway:
        for workload in ("open", "keyed"):
            headers = secrets | {"x-workload-id": workload}
            await gateway.client.post("/v1/chat/completions", content=b"{}", headers=headers)
    to_open, to_keyed = (one.headers for one in fake.received)
    assert {name: to_open[name] for name in secrets} == secrets
    assert not secrets.keys() & to_keyed.keys()
    assert to_keyed["authorization"] == "Bearer own"


def test_a_conversation_is_its_first_messages() -> None:
    """Later turns change nothing; another first question does."""
    first = b'{"messages":[{"role":"system","content":"s"},{"role":"user","content":"q"}'
    one = conversation_of(read_fields(first + b"]}"))
    assert one == conversation_of(read_fields(first + b',{"role":"assistant","content":"a"}]}'))
    assert one != conversation_of(read_fields(b'{"messages":[{"role":"user","content":"other"}]}'))
    assert conversation_of(read_fields(b'{"messages": 5}')) == ""


@given(st.binary(max_size=80))
def test_any_bytes_are_read_or_refused(raw: bytes) -> None:
    """Never another exception."""
    with contextlib.suppress(RequestRefused):
        read_fields(raw)


def test_deep_nesting_is_refused() -> None:
    """A body that would exhaust a parser's stack."""
    with pytest.raises(RequestRefused):
        read_fields(b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}")
