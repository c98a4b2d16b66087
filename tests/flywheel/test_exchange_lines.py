"""Exchange lines: nothing but LineError comes out of them, and what we write we read back as it was."""

import json
from contextlib import suppress
from dataclasses import replace
from typing import Any

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flywheel.exchange_lines import FORMATS, Fill, Line, LineError, parse, seconds
from gateway.ids import id_at, time_of
from gateway.records import Arm, Attempt, Exchange, MirrorFate, Outcome, Usage

FULL_FILL = Fill(workload="w", client="c", at=1000.0)
CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
BLUEPRINT = {
    "timestamp": 1763712000,
    "workload_id": "w",
    "client_id": "c",
    "request": {"messages": CHAT["messages"][:1]},
    "response": {"choices": [{"message": CHAT["messages"][1]}]},
}

words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
numbers = st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | numbers | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=8,
)
bodies = st.dictionaries(words, values, max_size=4)
times = st.floats(0, 9e10)
attempts = st.builds(Attempt, model=words, arm=words, error=words, latency_ms=times)
exchanges = st.builds(
    Exchange,
    id=st.builds(id_at, st.integers(0, 2**48 - 1), st.binary(min_size=10, max_size=10)),
    timestamp=times,
    workload_id=words.filter(bool),
    client_id=words,
    session_id=words,
    model=words,
    arm=st.sampled_from(Arm),
    outcome=st.sampled_from(Outcome),
    status=st.integers(0, 999),
    path=words,
    stream=st.booleans(),
    latency_ms=times,
    ttft_ms=st.none() | times,
    usage=st.none() | st.builds(Usage, input_tokens=st.integers(0, 10**9), output_tokens=st.integers(0, 10**9)),
    cost_usd=st.none() | times,
    config_snapshot=words,
    rollout=words,
    trace_id=words,
    error=words,
    mirror=st.sampled_from(MirrorFate),
    mirror_of=words,
    breaker=words,
    attempts=st.lists(attempts, max_size=2).map(tuple),
    request=st.none() | bodies,
    response=st.none() | bodies,
)
fields = st.sampled_from([*BLUEPRINT, "messages", "tools", "id", "usage", "status", "attempts", "outcome", "else"])


def line(value: object) -> bytes:
    return json.dumps(value).encode()


def read(value: object, fill: Fill = FULL_FILL) -> Exchange:
    return parse(line(value), fill).exchange


@given(st.binary() | values.map(line) | st.dictionaries(fields, values).map(line))
@example(b"[" * 100_000)
@example(line(BLUEPRINT)[:-1] + b', "id": ' + b"[" * 900 + b"]" * 900 + b"}")
@example(line(BLUEPRINT | {"request": {}})[:-3] + b', "x": ' + b"[" * 300 + b"]" * 300 + b"}}")
@example(b'{"request": {}, "response": {}, "status": 99999999999999999999, "outcome": "ok"}')
def test_any_line_is_an_exchange_or_a_line_error(raw: bytes) -> None:
    """And what it is can be written again: no store meets a value that it cannot hold."""
    with suppress(LineError):
        assert orjson.dumps(parse(raw, FULL_FILL).exchange)


@given(st.dictionaries(fields, values, max_size=4))
def test_a_blueprint_line_with_a_few_wrong_fields_is_refused_or_read(changed: dict[str, Any]) -> None:
    with suppress(LineError):
        assert parse(line(BLUEPRINT | changed), FULL_FILL).exchange.workload_id


@given(exchanges)
def test_our_own_form_comes_back_as_it_was(exchange: Exchange) -> None:
    """Export, import, export."""
    written = FORMATS["exchanges"](exchange)
    assert written is not None
    back = parse(written, Fill(workload="other", client="other", at=5.0))
    assert back == Line(exchange=exchange, ignored=frozenset())
    assert FORMATS["exchanges"](back.exchange) == written


@given(times.map(int), words.filter(bool), words, bodies, bodies)
def test_the_blueprint_s_five_fields_come_back(
    timestamp: int, workload: str, client: str, request: dict[str, Any], response: dict[str, Any]
) -> None:
    five = {"timestamp": timestamp, "workload_id": workload, "client_id": client}
    five |= {"request": request, "response": {"choices": []} | response}
    written = FORMATS["blueprint"](read(five))
    assert written is not None
    assert json.loads(written) == json.loads(line(five))


@pytest.mark.parametrize(
    ("given_time", "wanted"),
    [
        (1763712000, 1763712000.0),
        (1763712000.25, 1763712000.25),
        ("1763712000", 1763712000.0),
        (1763712000250, 1763712000.25),
        ("2025-11-21T08:00:00Z", 1763712000.0),
        ("2025-11-21T09:00:00+01:00", 1763712000.0),
        ("2025-11-21 08:00:00", 1763712000.0),
    ],
)
def test_times_in_all_their_forms(given_time: object, wanted: float) -> None:
    assert read(BLUEPRINT | {"timestamp": given_time}).timestamp == wanted


@pytest.mark.parametrize("wrong", [True, -1, "nan", "inf", "yesterday", [], 10**400, "0001-01-01T00:00:00+23:00"])
def test_what_is_no_time(wrong: object) -> None:
    with pytest.raises(ValueError, match="no time"):
        seconds(wrong)


def test_an_id_is_made_of_time_and_content() -> None:
    """The order of keys and spaces are no content; the id sorts by the line's time."""
    one = read(BLUEPRINT)
    turned = json.dumps(dict(reversed(BLUEPRINT.items())), indent=1).encode()
    assert parse(turned, FULL_FILL).exchange.id == one.id
    assert time_of(one.id) == BLUEPRINT["timestamp"]
    assert read(BLUEPRINT | {"client_id": "d"}).id != one.id


def test_bare_messages_end_with_the_last_answer() -> None:
    exchange = read({**CHAT, "tools": [{"type": "function"}], "label": 3})
    assert exchange.request == {"messages": CHAT["messages"][:1], "tools": [{"type": "function"}]}
    assert exchange.response is not None
    assert exchange.response["choices"][0]["message"] == CHAT["messages"][1]
    assert (exchange.workload_id, exchange.client_id, exchange.timestamp) == ("w", "c", 1000.0)
    unanswered = [*CHAT["messages"], {"role": "user", "content": "and?"}]
    assert read({"messages": unanswered}).response == exchange.response
    assert parse(line({**CHAT, "label": 3}), FULL_FILL).ignored == {"label"}
    written = FORMATS["messages"](exchange)
    assert written is not None
    assert json.loads(written) == {**CHAT, "tools": [{"type": "function"}]}


def test_only_complete_answers_become_messages() -> None:
    exchange = read(BLUEPRINT)
    assert FORMATS["messages"](replace(exchange, outcome=Outcome.TIMEOUT)) is None
    assert FORMATS["messages"](replace(exchange, response={"choices": []})) is None
    assert FORMATS["blueprint"](replace(exchange, response=None)) is None


def test_a_logged_error_is_no_reply() -> None:
    assert read(BLUEPRINT | {"response": {"error": {"message": "no"}}}).outcome is Outcome.UPSTREAM_ERROR
    counted = BLUEPRINT["response"] | {"usage": {"prompt_tokens": 3, "completion_tokens": 4}}
    assert read(BLUEPRINT | {"response": counted}).usage == Usage(input_tokens=3, output_tokens=4)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("{", "no JSON"),
        ([], "a JSON object is wanted, not list"),
        ({"a": 1}, "neither `request` nor `messages`"),
        (BLUEPRINT | {"workload_id": ""}, "--workload gives one"),
        ({k: v for k, v in BLUEPRINT.items() if k != "timestamp"}, "--timestamp gives one"),
        (BLUEPRINT | {"timestamp": "soon"}, "timestamp: no time: 'soon'"),
        (BLUEPRINT | {"request": "hi"}, "request: a JSON object is wanted"),
        (BLUEPRINT | {"client_id": 3}, "client_id: expected `str`, got `int`"),
        (BLUEPRINT | {"outcome": "fine"}, "outcome: invalid enum value 'fine'"),
        (BLUEPRINT | {"id": "7"}, "'7' is no UUIDv7"),
        (BLUEPRINT | {"workload_id": "a\0b"}, "workload_id: holds a NUL character"),
        (BLUEPRINT | {"status": 2000}, "2000 is no HTTP status"),
        ({"messages": "hi"}, "a list of objects is wanted"),
        ({"messages": CHAT["messages"][:1]}, "no assistant message that answers another"),
        ({"messages": CHAT["messages"][1:]}, "no assistant message that answers another"),
    ],
)
def test_what_is_wrong_is_named(wrong: object, told: str) -> None:
    raw = wrong.encode() if isinstance(wrong, str) else line(wrong)
    with pytest.raises(LineError) as caught:
        parse(raw, Fill())
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
