"""Curation: what may teach, each prompt once, no leak between the sides, and every record accounted for."""

import copy
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flywheel import split
from flywheel.curate import CurateOptions, CurationError, Record, curate
from gateway.records import Arm, Exchange, Outcome
from tests.flywheel.examples import asks, call, live, right_answer, says, traffic

FEW = CurateOptions(minimum=2)


def _sides(exchanges: list[Exchange], **options: Any) -> tuple[list[Record], list[Record]]:
    curated = curate(exchanges, CurateOptions(**{"minimum": 2, **options}))
    return [*curated.train, *curated.validation], list(curated.test)


def _plus(*odd: Exchange) -> list[Exchange]:
    return [*traffic(20), *odd]


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        (live(99, "weather #Oslo", outcome=Outcome.UPSTREAM_CUT), "outcome"),
        (live(99, "weather #Oslo", arm=Arm.CANDIDATE), "candidate_answer"),
        (live(99, "weather #Oslo", model="small:a1"), "candidate_answer"),
        (live(99, "weather #Oslo", mirror_of="x", arm=Arm.MIRROR), "mirror"),
        (live(99, "weather #Oslo", request={"messages": []}), "no_messages"),
        (live(99, "weather #Oslo", request=None), "no_messages"),
        (live(99, "weather #Oslo", request={**asks("weather"), "tools": "all"}), "tools"),
        (live(99, "weather #Oslo", {"choices": []}), "no_answer"),
        (live(99, "weather #Oslo", {"error": "x"}), "no_answer"),
        (live(99, "weather #Oslo", says(" ")), "empty_answer"),
        (live(99, "weather #Oslo", call("get_weather", '{"city"')), "arguments"),
        (live(99, "weather #Oslo", call("get_weather", '"Oslo"')), "arguments"),
        (live(99, "weather #Oslo", call("get_wether", {})), "unknown_tool"),
        (
            live(99, "weather #Oslo", {"choices": [{"message": {"content": "x"}, "finish_reason": "length"}]}),
            "truncated",
        ),
        (live(0, "weather #Oslo"), "same_id"),
    ],
)
def test_what_may_not_teach_is_left_out_and_counted(odd: Exchange, reason: str) -> None:
    report = curate(_plus(odd), FEW).report
    assert report.dropped == {reason: 1}
    assert (report.read, report.kept) == (21, 20)


def test_plain_text_answers_are_kept_beside_tool_calls() -> None:
    """One tool call does not make all the others unfit, nor the other way round."""
    report = curate(_plus(live(50, "hello there", says("Hi."))), FEW).report
    assert report.kept == 21
    assert sum(report.tools["no_tool"].values()) == 1


def test_a_prompt_is_kept_once_the_newest_of_its_majority_answer() -> None:
    """Contradictions are settled by the most votes; the newest reply alone does not win."""
    text = "weather today #Oslo"
    odd = [live(50 + n, text, call("play_music", {"song": "x"}) if n == 3 else right_answer(text)) for n in range(4)]
    train, test = _sides(_plus(*odd))
    (kept,) = [record for record in (*train, *test) if record.messages[-1]["content"] == text]
    assert (kept.id, kept.tool) == (odd[2].id, "get_weather")
    assert curate(_plus(*odd), FEW).report.dropped == {"duplicate": 2, "outvoted": 1}


def test_a_prompt_whose_answers_tie_is_dropped() -> None:
    odd = [live(50, "weather x #Oslo"), live(51, "weather x #Oslo", call("play_music", {}))]
    assert curate(_plus(*odd), FEW).report.dropped == {"contradictory_tie": 2}


def test_the_same_question_under_another_system_prompt_or_other_tools_is_another_prompt() -> None:
    other_system = asks("weather x #Oslo")
    other_system["messages"][0] = {"role": "system", "content": "Be brief."}
    fewer_tools = asks("weather x #Oslo")
    fewer_tools["tools"] = fewer_tools["tools"][:1]
    odd = [
        live(50 + n, "weather x #Oslo", request=r)
        for n, r in enumerate([asks("weather x #Oslo"), other_system, fewer_tools])
    ]
    assert curate(_plus(*odd), FEW).report.kept == 23


def test_lists_of_content_parts_are_compared_too() -> None:
    """Multimodal bodies are neither a crash nor always unique."""
    parts = asks("x")
    parts["messages"][-1]["content"] = [{"type": "text", "text": "weather parts #Oslo"}]
    odd = [live(50 + n, "weather parts #Oslo", request=copy.deepcopy(parts)) for n in range(2)]
    assert curate(_plus(*odd), FEW).report.dropped == {"duplicate": 1}


def test_nothing_of_the_log_is_changed() -> None:
    exchanges = list(traffic(30))
    before = copy.deepcopy(exchanges)
    curate(exchanges, CurateOptions(minimum=2, permute_labels=True))
    assert exchanges == before


def test_685_records_become_411_and_274() -> None:
    report = curate(traffic(685), FEW).report
    assert (report.train, report.validation, report.test) == (411, 41, 274)


def test_a_wrong_answer_does_not_smuggle_a_template_to_the_other_side() -> None:
    """The argument values of a wrong reply don't blank the text, but those of the others do."""
    same = [live(50 + n, f"is it cold in #{city}") for n, city in enumerate(["Lima", "Oslo", "Bern", "Riga"])]
    same[0] = live(50, "is it cold in #Lima", call("play_music", {"song": "Imagine"}))
    for seed in range(20):
        train, test = _sides(_plus(*same), seed=seed)
        ids = {exchange.id for exchange in same}
        assert {record.id for record in train} & ids in (set(), ids)
        assert {record.id for record in test} & ids in (set(), ids)


def test_turns_of_a_conversation_stay_together() -> None:
    """The second turn repeats the first question and its answer, whatever ids the client sends."""
    first = live(50, "weather turn one #Oslo", says("Cold. More?"))
    request = asks("weather turn one #Oslo")
    request["messages"] += [{"role": "assistant", "content": "Cold. More?"}, {"role": "user", "content": "play #Hello"}]
    second = live(51, "play #Hello", call("play_music", {"song": "Hello"}), request=request)
    for seed in range(20):
        train, _ = _sides(_plus(first, second), seed=seed)
        assert len({first.id, second.id} & {record.id for record in train}) in (0, 2)


def test_one_session_for_everything_is_told() -> None:
    with pytest.raises(CurationError, match="one group"):
        curate(traffic(20, session_id="s"), FEW)


def test_too_few_records_are_told_with_the_reasons() -> None:
    exchanges = [*traffic(5), live(9, "x", {"choices": []})]
    with pytest.raises(CurationError, match="5 usable records of 6 exchanges, 20 needed; dropped: no_answer 1"):
        curate(exchanges, CurateOptions())


def test_a_class_with_a_single_record_is_no_problem() -> None:
    report = curate(_plus(live(50, "hello", says("Hi."))), FEW).report
    assert report.kept == 21


def test_no_validation_share_and_the_seed_zero_are_taken_as_they_are() -> None:
    assert curate(traffic(40), CurateOptions(minimum=2, validation_fraction=0.0)).report.validation == 0
    orders = [[r.id for r in _sides(list(traffic(40)), seed=seed)[1]] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_a_limit_keeps_the_newest() -> None:
    train, test = _sides(list(traffic(40)), limit=10)
    assert min(record.id for record in (*train, *test)) == live(30, "").id


def test_permuted_labels_are_the_same_answers_dealt_out_anew() -> None:
    """Only the training side is touched, and the control is repeatable."""
    plain, held_out = _sides(list(traffic(60)))
    dealt, held_out_too = _sides(list(traffic(60)), permute_labels=True)
    assert held_out == held_out_too
    assert Counter(r.tool for r in plain) == Counter(r.tool for r in dealt)
    assert [r.answer for r in plain] != [r.answer for r in dealt]
    assert _sides(list(traffic(60)), permute_labels=True)[0] == dealt


WORDS = st.sampled_from(["weather in", "music by", "show me", "what about"])
EXCHANGES = st.lists(
    st.tuples(WORDS, st.integers(0, 9), st.sampled_from(["", "s1", "s2", "s3"]), st.integers(0, 3)), max_size=60
)


def _of(rows: list[tuple[str, int, str, int]]) -> list[Exchange]:
    answers = [call("get_weather", {"city": "Oslo"}), call("play_music", {"song": "x"}), says("No."), {"choices": []}]
    return [
        live(n, f"{words} street {number}", answers[kind], session_id=session)
        for n, (words, number, session, kind) in enumerate(rows)
    ]


@settings(max_examples=150, deadline=None)
@given(rows=EXCHANGES, seed=st.integers(0, 5), fraction=st.floats(0.05, 0.95))
def test_no_group_on_two_sides_no_prompt_twice_and_the_counts_add_up(
    rows: list[tuple[str, int, str, int]], seed: int, fraction: float
) -> None:
    try:
        curated = curate(_of(rows), CurateOptions(seed=seed, minimum=1, test_fraction=fraction))
    except CurationError:
        return
    report = curated.report
    assert report.read == len(rows) == sum(report.dropped.values()) + report.train + report.test
    assert report.kept == report.train + report.test
    assert report.train == len(curated.train) + len(curated.validation)
    prompts = [
        record.messages[-1]["content"] for side in (curated.train, curated.validation, curated.test) for record in side
    ]
    assert len(prompts) == len(set(prompts))
    sessions = [{r.session for r in side if r.session} for side in (curated.train, curated.validation, curated.test)]
    assert not (sessions[0] | sessions[1]) & sessions[2]
    assert not sessions[0] & sessions[1]
    blanked = [{split.template(r.messages[-1]["content"], ()) for r in side} for side in (curated.train, curated.test)]
    assert not blanked[0] & blanked[1]


@settings(max_examples=150, deadline=None)
@given(sizes=st.lists(st.integers(1, 6), min_size=2, max_size=30), fraction=st.floats(0.0, 1.0), seed=st.integers(0, 9))
def test_halves_keep_every_item_and_come_near_the_fraction(sizes: list[int], fraction: float, seed: int) -> None:
    parts = [
        tuple(split.Item(id=f"{group}-{n}", label=str(n % 3), text="") for n in range(size))
        for group, size in enumerate(sizes)
    ]
    rest, taken = split.halves(parts, fraction, seed)
    assert {*rest, *taken} == set(parts)
    assert len(rest) + len(taken) == len(parts)
    due = round(sum(sizes) * fraction)
    if 0 < due < sum(sizes):
        assert rest
        assert taken
        assert abs(sum(map(len, taken)) - due) <= max(sizes)
    if set(sizes) == {1} and 0 < due < sum(sizes):
        assert sum(map(len, taken)) == due
