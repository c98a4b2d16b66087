"""Decisions: stickiness through a ramp, fallbacks, mirrors that add up, breakers, and rules that match."""

from collections import Counter
from dataclasses import replace
from math import sqrt

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.errors import RulesError
from routing.matching import Asked, Match
from routing.policy import Call, Decision, choose, match
from routing.targets import Mirror, Ref, Route, RouteTable
from tests.routing.examples import CANDIDATE, overlay, table


def call(number: int = 0, **keys: str) -> Call:
    return Call(workload="w", exchange_id=f"x{number}", **keys)


def names(decision: Decision) -> tuple[str, ...]:
    return (decision.target.name, *(target.name for target in decision.fallbacks))


def test_a_plain_route_serves_and_falls_back_in_order() -> None:
    decision = choose(table(), call())
    assert (decision.arm, decision.reason, decision.rollout, decision.breaker) == ("incumbent", "route", "", "")
    assert names(decision) == ("prod", "backup")
    assert decision.mirrors == ()


def test_an_unknown_workload_takes_the_default() -> None:
    decision = choose(table(), Call(workload="nobody", exchange_id="x"))
    assert decision.route.workload == "default"


def test_a_ramp_moves_each_conversation_at_most_once_and_splits_fairly() -> None:
    """100,000 conversations over 5, 25, 50, 100 per cent: no one goes back, and each share is within 4 sigma."""
    number = 100_000
    calls = [call(i, conversation=f"c{i}") for i in range(number)]
    before = [False] * number
    for weight in (5, 25, 50, 100):
        ramped = table(overlay(weight))
        after = [choose(ramped, each).arm == "candidate" for each in calls]
        assert all(now for was, now in zip(before, after, strict=True) if was)
        share = weight / 100
        assert abs(sum(after) - number * share) <= 4 * sqrt(number * share * (1 - share))
        before = after
    assert all(before)


def test_another_salt_draws_anew() -> None:
    """The first to rehearse with one candidate are not always the first with the next."""
    first, second = (table(overlay(50, salt=salt)) for salt in ("r1", "r2"))
    both = [choose(first, call(i, user=f"u{i}")).arm == choose(second, call(i, user=f"u{i}")).arm for i in range(2000)]
    assert 0.45 < sum(both) / 2000 < 0.55


@pytest.mark.parametrize("key", ["session", "user", "conversation"])
def test_each_key_is_sticky_whatever_the_exchange(key: str) -> None:
    half = table(overlay(50))
    for value in ("a", "b", "c", "d"):
        assert len({choose(half, call(i, **{key: value})).arm for i in range(20)}) == 1


def test_the_first_key_of_the_route_that_is_there_decides() -> None:
    route = Route(workload="w", serve="prod", sticky=("user", "session"))
    half = table(overlay(50), route)
    for i in range(50):
        alone = choose(half, call(user=f"u{i}")).arm
        assert choose(half, call(user=f"u{i}", session="s", conversation="c")).arm == alone


def test_without_any_key_the_exchange_draws() -> None:
    half = table(overlay(50))
    assert {choose(half, call(i)).arm for i in range(50)} == {"incumbent", "candidate"}


def test_a_candidate_has_the_incumbent_and_then_the_routes_fallbacks_behind_it() -> None:
    decision = choose(table(overlay(100)), call())
    assert (decision.arm, decision.reason, decision.rollout) == ("candidate", "candidate", "r1")
    assert names(decision) == ("small:a1", "prod", "backup")
    assert decision.target.model.model == "a1"  # the adapter is the upstream's model
    assert decision.target.ref == CANDIDATE


def test_a_former_candidate_that_is_the_incumbent_keeps_the_first_model_behind_it() -> None:
    laid = table(overlay(50, candidate=Ref(model="small", adapter="a2"), incumbent=CANDIDATE))
    by_arm = {choose(laid, call(i)).arm: names(choose(laid, call(i))) for i in range(50)}
    assert by_arm == {
        "incumbent": ("small:a1", "prod", "backup"),
        "candidate": ("small:a2", "small:a1", "prod", "backup"),
    }


def test_an_open_breaker_gives_the_call_to_the_incumbent_and_says_so() -> None:
    decision = choose(table(overlay(100)), call(), {"small:a1"})
    assert (decision.arm, decision.reason, decision.breaker) == ("incumbent", "breaker", "small:a1")
    assert names(decision) == ("prod", "backup")


def test_an_open_breaker_is_not_blamed_for_calls_that_were_never_the_candidates() -> None:
    arms = [choose(table(overlay(50)), call(i), {"small:a1"}) for i in range(200)]
    assert {decision.arm for decision in arms} == {"incumbent"}
    assert 60 < sum(decision.breaker != "" for decision in arms) < 140


@pytest.mark.parametrize(
    "lost",
    [
        {"candidate": Ref(model="gone")},
        {"candidate": Ref(model="backup", adapter="a")},
        {"incumbent": Ref(model="gone")},
    ],
)
def test_an_overlay_of_models_that_are_gone_is_not_laid(lost: dict[str, Ref]) -> None:
    """The file changed under a rollout: the route serves as written, and the reason tells."""
    decision = choose(table(overlay(100, **lost)), call())
    assert names(decision) == ("prod", "backup")
    assert decision.reason == f"rollout r1 is not laid: routing.yaml has no {next(iter(lost.values()))}"


def test_a_route_of_a_model_that_is_not_there_is_an_error() -> None:
    with pytest.raises(RulesError, match='workload w: no model "gone"'):
        table(route=Route(workload="w", serve="gone"))


def test_mirrors_are_drawn_by_exchange_and_eligible_ones_are_always_listed() -> None:
    """Sampled and not sampled add up to eligible; the share is right, and a retry draws the same."""
    shadow = table(overlay(0, mirror=0.25, max_concurrency=3, daily_budget_usd=1.5))
    drawn = [choose(shadow, call(i)).mirrors for i in range(4000)]
    assert {len(mirrors) for mirrors in drawn} == {1}
    assert 850 < sum(mirrors[0].sampled for mirrors in drawn) < 1150
    assert drawn == [choose(shadow, call(i)).mirrors for i in range(4000)]
    one = drawn[0][0]
    assert (one.target.name, one.share, one.rollout, one.max_concurrency, one.daily_budget_usd) == (
        "small:a1",
        0.25,
        "r1",
        3,
        1.5,
    )


def test_mirrors_run_both_ways_in_a_canary() -> None:
    canary = table(overlay(50, mirror=0.5, reverse_mirror=1.0))
    for i in range(50):
        decision = choose(canary, call(i))
        other = "prod" if decision.arm == "candidate" else "small:a1"
        assert [mirror.target.name for mirror in decision.mirrors] == [other]
        assert decision.arm == "incumbent" or decision.mirrors[0].sampled


def test_standing_mirrors_stay_beside_the_rollouts_own() -> None:
    route = Route(workload="w", serve="prod", mirrors=(Mirror(model="backup", sample=1.0, max_concurrency=2),))
    decision = choose(table(overlay(0, mirror=1.0), route), call())
    assert [(mirror.target.name, mirror.rollout) for mirror in decision.mirrors] == [("small:a1", "r1"), ("backup", "")]


def matching(*routes: Route) -> RouteTable:
    return replace(table(), routes={route.workload: route for route in routes})


RULES = matching(
    Route(workload="named", serve="prod"),
    Route(
        workload="all",
        serve="prod",
        match=Match(headers=(("x-team", "a"),), metadata=(("app", "b"),), models=("m", "n"), tools=("t",)),
    ),
    Route(workload="header", serve="prod", match=Match(headers=(("x-team", "a"),))),
    Route(workload="tools", serve="prod", match=Match(tools=("t", "u"))),
)


@pytest.mark.parametrize(
    ("headers", "metadata", "model", "tools", "wanted"),
    [
        ({}, {}, "m", (), "default"),
        ({"x-workload-id": "named", "x-team": "a"}, {}, "m", (), "named"),
        ({}, {"workload_id": "named"}, "", (), "named"),
        ({"x-workload-id": "header"}, {"workload_id": "named"}, "", (), "header"),
        ({"x-workload-id": "unheard-of"}, {"workload_id": "named"}, "", (), "named"),
        ({"x-workload-id": "unheard-of", "x-team": "a"}, {}, "", (), "header"),
        ({"x-workload-id": "default", "x-team": "a"}, {}, "", (), "default"),
        ({"x-team": "a"}, {"app": "b"}, "n", ("s", "t"), "all"),
        ({"x-team": "a"}, {"app": "b"}, "other", ("t",), "header"),
        ({"x-team": "z"}, {}, "", ("t", "u", "v"), "tools"),
        ({"x-team": "z"}, {}, "", ("t",), "default"),
    ],
)
def test_matching(
    headers: dict[str, str], metadata: dict[str, str], model: str, tools: tuple[str, ...], wanted: str
) -> None:
    """A name wins, then the first rule of which every condition holds, then the default; an empty match is no rule."""
    asked = Asked(headers=headers, metadata=metadata, model=model, tools=tools)
    assert match(RULES, asked).route.workload == wanted


SPLIT = Route(workload="w", serve="prod", split=(("prod", 80.0), ("small:a1", 20.0)), fallbacks=("backup", "prod"))


def test_several_models_share_a_workload_and_each_conversation_keeps_its_own() -> None:
    """Over 20,000 sessions the share is within 4 sigma, whatever exchange of the session it is."""
    split, number = table(route=SPLIT), 20_000
    decisions = [choose(split, call(i, session=f"s{i}")) for i in range(number)]
    small = sum(decision.target.name == "small:a1" for decision in decisions)
    assert abs(small - number * 0.2) <= 4 * sqrt(number * 0.2 * 0.8)
    again = [choose(split, call(number + i, session=f"s{i}")) for i in range(1000)]
    assert [one.target for one in again] == [one.target for one in decisions[:1000]]
    assert {names(decision) for decision in decisions} == {("prod", "backup"), ("small:a1", "backup", "prod")}
    assert {decision.reason for decision in decisions} == {"80 % of serve", "20 % of serve"}
    assert {decision.arm for decision in decisions} == {"incumbent"}


def test_shares_that_change_move_only_the_keys_between() -> None:
    """From 80:20 to 70:30 a tenth of the sessions moves, and none of them away from the model that gains."""
    before, after = table(route=SPLIT), table(route=replace(SPLIT, split=(("prod", 70.0), ("small:a1", 30.0))))
    moves = Counter(
        (choose(before, call(i, session=f"s{i}")).target.name, choose(after, call(i, session=f"s{i}")).target.name)
        for i in range(5000)
    )
    assert moves["small:a1", "prod"] == 0
    assert 400 < moves["prod", "small:a1"] < 600


@given(shares=st.lists(st.floats(0.01, 100), min_size=1, max_size=3), key=st.text(), exchange=st.text())
def test_every_key_has_a_model_whatever_the_shares(shares: list[float], key: str, exchange: str) -> None:
    """Shares that do not quite make 100 leave nobody out; the same key always has the same one."""
    split = tuple(zip(("prod", "backup", "small"), shares, strict=False))
    plan = table(route=Route(workload="w", serve="prod", split=split))
    decision = choose(plan, Call(workload="w", exchange_id=exchange, session=key))
    assert decision.target.name in {name for name, _ in split}
    assert decision.target == choose(plan, Call(workload="w", exchange_id=exchange, session=key)).target


def test_no_rollout_lies_over_several_models() -> None:
    """The file changed under it: all of `serve` serves as written, and the reason tells."""
    laid = table(overlay(100), SPLIT)
    decisions = [choose(laid, call(i)) for i in range(50)]
    assert {decision.target.name for decision in decisions} == {"prod", "small:a1"}
    assert {decision.reason for decision in decisions} == {"rollout r1 is not laid: serve names several models"}
    assert {decision.rollout for decision in decisions} == {""}


def test_a_serving_model_whose_breaker_is_open_stands_behind_its_fallback() -> None:
    """It is turned from while another is left, without mirrors, and says so; the last one serves whatever it is."""
    decision = choose(table(), call(), {"prod"})
    assert names(decision) == ("backup", "prod")
    assert (decision.reason, decision.breaker, decision.mirrors) == ("breaker", "prod", ())
    both = choose(table(), call(), {"prod", "backup"})
    assert (names(both), both.reason, both.breaker) == (("prod", "backup"), "route", "")
    behind = choose(table(), call(), {"backup"})
    assert (names(behind), behind.breaker) == (("prod", "backup"), "")
    candidate = choose(table(overlay(100)), call(), {"prod"})
    assert names(candidate) == ("small:a1", "backup", "prod")
    neither = choose(table(overlay(100)), call(), {"small:a1", "prod"})
    assert (names(neither), neither.breaker) == (("backup", "prod"), "small:a1")


@pytest.mark.parametrize(
    ("asked", "default_workload", "wanted"),
    [
        (Asked(headers={"x-workload-id": "named"}), "header", ("named", "header")),
        (Asked(metadata={"workload_id": "named"}), "header", ("named", "metadata")),
        (Asked(headers={"x-team": "a"}), "", ("header", "rule")),
        (Asked(headers={"x-team": "a"}), "named", ("named", "key")),
        (Asked(), "named", ("named", "key")),
        (Asked(headers={"x-workload-id": "unheard-of"}), "named", ("named", "key")),
        (Asked(), "unheard-of", ("default", "nothing")),
        (Asked(headers={"x-workload-id": "default"}), "named", ("default", "header")),
    ],
)
def test_a_key_stands_for_a_workload_where_the_call_names_none(
    asked: Asked, default_workload: str, wanted: tuple[str, str]
) -> None:
    """And what led to the route is told."""
    matched = match(RULES, asked, default_workload)
    assert (matched.route.workload, matched.by) == wanted


def test_laying_overlays_shares_what_they_do_not_touch() -> None:
    """The same as a table that was built with them, and taken back as if they had never been."""
    bare = replace(RULES, routes=RULES.routes | {"w": Route(workload="w", serve="prod")})
    laid = bare.laid("other", {"w": overlay(50), "default": overlay(5, workload="default")})
    built = replace(bare, snapshot="other", overlays=laid.overlays)
    assert laid == built
    assert (laid.plans, laid.default_plan) == (built.plans, built.default_plan)
    assert laid.matching is bare.matching
    again = laid.laid(bare.snapshot, {})
    assert (again.plans, again.default_plan) == (bare.plans, bare.default_plan)


@pytest.mark.parametrize(("weight", "wanted"), [(0, "prod"), (50, "prod"), (99, "prod"), (100, "small:a1")])
def test_what_goes_on_from_kept_state_goes_to_one_place_only(weight: int, wanted: str) -> None:
    """No canary, no fallback, no mirror, whatever breakers say: nobody else could answer it."""
    laid = table(overlay(weight, mirror=1.0, reverse_mirror=1.0))
    for number in range(50):
        decision = choose(laid, msgspec.structs.replace(call(session=f"s{number}"), stateful=True), {"prod"})
        assert (decision.target.name, decision.fallbacks, decision.mirrors) == (wanted, (), ())
