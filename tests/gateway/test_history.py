"""Folding a request and unfolding it: nothing is lost, nothing is confused, repeats cost nothing."""

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.logstore.history import Known, Node, address_of, fold, unfold

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip
LISTS = st.lists(VALUES, max_size=6)
REQUESTS = st.dictionaries(
    st.sampled_from(["model", "messages", "tools", "stream", "history"]) | st.text(max_size=8),
    LISTS | VALUES,
    max_size=5,
)
FOLD_FROM = st.integers(1, 40)


def turn(number: int) -> dict[str, Any]:
    return {"role": "user", "content": f"turn {number} " + "x" * 20}


@given(REQUESTS, FOLD_FROM)
def test_a_folded_request_comes_back(request: dict[str, Any], fold_from: int) -> None:
    """Byte for byte, order of keys and odd shapes included; through JSON, as a store keeps it."""
    folded = fold(request, fold_from)
    rest = orjson.loads(orjson.dumps(folded.rest))
    back = unfold(rest, folded.history, folded.tools, dict(folded.nodes))
    assert orjson.dumps(back) == orjson.dumps(request)


@given(LISTS, LISTS, FOLD_FROM)
def test_different_conversations_have_different_addresses(one: list[Any], other: list[Any], fold_from: int) -> None:
    """Wherever the borders between messages are: the same last address means the same history."""
    first, second = fold({"messages": one}, fold_from), fold({"messages": other}, fold_from)
    if first.history is not None and first.history == second.history:
        kept = len(one) - len(first.rest["messages"])
        assert len(other) - len(second.rest["messages"]) == kept
        assert orjson.dumps(one[:kept]) == orjson.dumps(other[:kept])


@given(st.binary(max_size=40), st.binary(max_size=40), st.binary(min_size=16, max_size=16))
def test_a_parent_is_never_taken_for_content(one: bytes, other: bytes, parent: bytes) -> None:
    assert (address_of(parent, one) == address_of(parent, other)) == (one == other)
    assert address_of(parent, one) != address_of(None, parent + one)


def test_each_turn_adds_only_what_is_new() -> None:
    """A conversation of ten turns has nine nodes, each once, and every request keeps its last message."""
    said = [turn(n) for n in range(10)]
    nodes: dict[bytes, Node] = {}
    for turns in range(1, 11):
        folded = fold({"messages": said[:turns]}, 20)
        assert folded.rest == {"messages": [said[turns - 1]]}
        assert len(folded.nodes) == turns - 1
        nodes |= dict(folded.nodes)
    assert len(nodes) == 9


def test_short_messages_share_a_node_and_a_short_request_is_left_alone() -> None:
    """The border depends only on what stands before it, so the next turn finds the same node."""
    said = [turn(n) for n in range(5)]
    assert fold({"messages": said[:2], "tools": [1]}).nodes == ()
    three, four = fold({"messages": said[:4]}, 150), fold({"messages": said}, 150)
    assert three.nodes == four.nodes
    assert (len(three.nodes), three.rest["messages"], four.rest["messages"]) == (1, said[3:4], said[3:])


def test_the_same_tools_are_one_node() -> None:
    tools = [{"type": "function", "function": {"name": "a"}}]
    folded = [fold({"tools": tools, "messages": [turn(n)], "n": n}, 20) for n in range(2)]
    assert folded[0].tools == folded[1].tools is not None
    assert list(folded[0].rest) == ["tools", "messages", "n"]


def test_what_is_missing_or_runs_in_a_circle_is_said() -> None:
    folded = fold({"messages": [turn(1), turn(2), turn(3)]}, 20)
    assert folded.history is not None
    nodes = dict(folded.nodes)
    first = folded.nodes[0][0]
    with pytest.raises(ValueError, match="missing"):
        unfold(folded.rest, folded.history, None, {folded.history: nodes[folded.history]})
    with pytest.raises(ValueError, match="circle"):
        unfold(folded.rest, folded.history, None, nodes | {first: Node(folded.history, "1")})


def test_known_addresses_are_bounded_and_renewed_by_a_later_day() -> None:
    known = Known(2)
    known.note([(b"a", 1), (b"b", 1)])
    assert not known.lacks(b"a", 1)
    assert known.lacks(b"a", 2)
    known.note([(b"c", 1)])
    assert (known.lacks(b"a", 1), known.lacks(b"b", 1), known.lacks(b"c", 1)) == (False, True, False)
    known.forget()
    assert known.lacks(b"a", 1)
