"""Comparing two replies: what counts as the same call, and the word for each way to differ."""

import string
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flywheel.score import canonical, score
from tests.flywheel.examples import call, says

TWO = {"choices": [{"message": {"tool_calls": [{"function": {"name": n, "arguments": "{}"}} for n in ("a", "b")]}}]}
SWAPPED = {"choices": [{"message": {"tool_calls": [{"function": {"name": n, "arguments": "{}"}} for n in ("b", "a")]}}]}
ONE_OF_TWO = {"choices": [{"message": {"tool_calls": [{"function": {"name": "a", "arguments": "{}"}}]}}]}
SAME_TWICE = {"choices": [{"message": {"tool_calls": [{"function": {"name": "a", "arguments": "{}"}}] * 2}}]}

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(string.printable),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(string.printable), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize(
    ("reference", "candidate", "expected"),
    [
        (call("f", {"x": 1}), call("f", {"x": 1.0}), (1, 1, "same")),
        (call("f", {"x": "New  York "}), call("f", {"x": "new york"}), (1, 1, "same")),
        (call("f", {"x": "ﬁne"}), call("f", {"x": "FINE"}), (1, 1, "same")),
        (call("f", {"x": 1, "y": [1, 2]}), call("f", {"y": [1, 2], "x": 1}), (1, 1, "same")),
        (call("f", {}), call("f", ""), (1, 1, "same")),
        (call("f", {"x": True}), call("f", {"x": 1}), (1, 0, "arguments_differ")),
        (call("f", {"x": "1"}), call("f", {"x": 1}), (1, 0, "arguments_differ")),
        (call("f", {"x": [1, 2]}), call("f", {"x": [2, 1]}), (1, 0, "arguments_differ")),
        (call("f", {"x": 1}), call("f", {"x": 1, "y": None}), (1, 0, "arguments_differ")),
        (call("f", {"x": 1}), call("f", '{"x": 1'), (1, 0, "arguments_invalid")),
        (call("f", {"x": 1}), call("f", "[1]"), (1, 0, "arguments_invalid")),
        (call("f", {}), call("F", {}), (0, 0, "names_differ")),
        (TWO, SWAPPED, (1, 1, "same")),
        (TWO, ONE_OF_TWO, (0, 0, "names_differ")),
        (ONE_OF_TWO, SAME_TWICE, (0, 0, "names_differ")),
        (call("f", {}), says("no"), (0, 0, "missed_call")),
        (says("no"), call("f", {}), (0, 0, "false_call")),
        (says("Good  Day"), says("good day "), (1, 1, "same")),
        (says("yes"), says("no"), (0, 0, "text_differs")),
        (call("f", {}), None, (0, 0, "no_reply")),
        (call("f", {}), {"choices": []}, (0, 0, "no_reply")),
        (call("f", {}), {"choices": [{"message": {"tool_calls": [None]}}]}, (0, 0, "names_differ")),
        (None, call("f", {}), (0, 0, "no_reference")),
    ],
)
def test_replies_compare(reference: Any, candidate: Any, expected: tuple[float, float, str]) -> None:
    found = score(reference, candidate)
    assert (found.tool_name, found.tool_call, found.reason) == expected


@given(arguments=st.dictionaries(st.text(string.printable), JSON_VALUES, max_size=4))
def test_a_reply_agrees_with_itself(arguments: dict[str, Any]) -> None:
    assert score(call("f", arguments), call("f", arguments)).reason == "same"


@given(reply=JSON_VALUES)
def test_no_candidate_s_reply_breaks_the_scorer(reply: Any) -> None:
    """A candidate may send anything."""
    body = {"choices": [{"message": reply if isinstance(reply, dict) else {"tool_calls": reply}}]}
    found = score(call("f", {"x": 1}), body)
    assert found.tool_call <= found.tool_name


@given(value=JSON_VALUES)
def test_canonical_does_not_depend_on_the_order_of_keys(value: Any) -> None:
    shuffled = dict(reversed(value.items())) if isinstance(value, dict) else value
    assert canonical(shuffled) == canonical(value)
