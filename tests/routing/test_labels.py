"""Tags as other gateways take them: their pairs, and what of them means a workload, a client, a session, a user."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.labels import labels_of

TEXT = st.text(max_size=20)


@pytest.mark.parametrize(
    ("headers", "labels"),
    [
        ({}, {}),
        ({"x-workload-id": "w"}, {}),  # the gateway's own header is no label
        ({"x-litellm-tags": "job:7, production ,workload_id:refund,,"},
         {"job": "7", "production": "true", "workload_id": "refund"}),
        ({"helicone-property-app": "shop", "helicone-property-session": "s1", "helicone-property-user-tier": "gold"},
         {"app": "shop", "client_id": "shop", "session": "s1", "session_id": "s1", "user-tier": "gold"}),
        ({"helicone-property-workload-id": "refund"}, {"workload-id": "refund", "workload_id": "refund"}),
        ({"helicone-user-id": "u", "helicone-session-id": "s", "helicone-prompt-id": "refund", "helicone-auth": "x"},
         {"user_id": "u", "session_id": "s", "workload_id": "refund"}),
        ({"x-portkey-metadata": '{"_user": "u", "_organisation": "acme", "_prompt": "refund", "n": 5}'},
         {"_user": "u", "_organisation": "acme", "_prompt": "refund",
          "user_id": "u", "client_id": "acme", "workload_id": "refund"}),
        ({"x-portkey-metadata": '{"_organisation": "acme", "client_id": "web"}'},
         {"_organisation": "acme", "client_id": "web"}),  # the plain name counts for more
        ({"x-portkey-metadata": '{"team": "Zürich"}'.encode().decode("latin-1")}, {"team": "Zürich"}),
        ({"x-portkey-metadata": "not JSON"}, {}),
        ({"x-portkey-metadata": '["a"]'}, {}),
    ],
)  # fmt: skip
def test_headers(headers: dict[str, str], labels: dict[str, str]) -> None:
    assert labels_of(headers, None) == labels


def test_bodies() -> None:
    """OpenAI's metadata, LiteLLM's list in it, TensorZero's tags and episode."""
    assert labels_of({}, {"team": "desk", "n": 5}) == {"team": "desk"}
    assert labels_of({}, {"tags": ["a", "team:desk", 5]}) == {"a": "true", "team": "desk"}
    assert labels_of({}, {"tags": "a"}) == {"tags": "a"}
    assert labels_of({}, None, {"user_id": "u", "n": 5}, "0193") == {"user_id": "u", "session_id": "0193"}
    assert labels_of({}, None, ["a"], 5) == {}


def test_the_first_that_says_a_name_counts() -> None:
    headers = {
        "x-litellm-tags": "a:litellm,b:litellm",
        "helicone-property-b": "helicone",
        "helicone-property-c": "helicone",
        "x-portkey-metadata": '{"c": "portkey", "d": "portkey"}',
    }
    found = labels_of(headers, {"a": "metadata"}, {"d": "tensorzero", "e": "tensorzero"})
    assert found == {"a": "metadata", "b": "litellm", "c": "helicone", "d": "portkey", "e": "tensorzero"}


def test_a_flood_of_tags_is_cut() -> None:
    assert len(labels_of({"x-litellm-tags": ",".join(map(str, range(10_000)))}, None)) == 64


@given(
    st.dictionaries(st.sampled_from(["x-litellm-tags", "helicone-property-a", "x-portkey-metadata"]), TEXT),
    st.recursive(st.none() | TEXT, lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner), max_leaves=6),
)
def test_anything_is_read_as_texts(headers: dict[str, str], odd: object) -> None:
    """Whatever a client sends: no exception, and nothing but text."""
    found = labels_of(headers, odd, odd, odd)
    assert all(isinstance(part, str) for pair in found.items() for part in pair)
    assert labels_of({"x-portkey-metadata": json.dumps(odd)}, {"tags": odd}) is not None
