"""The rollout machine: each rule by example, and every event in every state by a hypothesis state machine."""

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from routing.errors import Refused
from routing.evidence import Gate, Verdict
from routing.rollout import (
    Abort,
    BreakerOpened,
    CandidateLost,
    Event,
    Lay,
    Note,
    Observed,
    Pause,
    Promote,
    Restored,
    Resume,
    Rollout,
    RolloutPolicy,
    State,
    Step,
    Superseded,
    Undo,
    advance,
    begin,
    overlay_of,
)
from routing.targets import Overlay
from tests.routing.examples import CANDIDATE, GATE, POLICY, overlay, reading

ENOUGH = Observed(readings=(reading(Verdict.SUCCESSFUL),), pairs=1000, exchanges=1000)
BEFORE = overlay(100, rollout="r0")


def fresh(policy: RolloutPolicy = POLICY, **changes: object) -> Rollout:
    values = {"id": "r1", "workload": "w", "candidate": CANDIDATE, "policy": policy, "salt": "r1"} | changes
    rollout, _ = begin(Rollout(created_at=0.0, step_started_at=0.0, **values))  # type: ignore[arg-type]
    return rollout


def at(state: State) -> Rollout:
    """A rollout in that state."""
    canary, _ = advance(fresh(), ENOUGH, 10.0)
    match state:
        case State.SHADOW:
            return fresh()
        case State.CANARY:
            return canary
        case State.PROMOTED:
            return advance(canary, Promote(full=True), 20.0)[0]
        case State.PAUSED:
            return advance(canary, Pause(), 20.0)[0]
        case State.ABORTED:
            return advance(canary, Abort(), 20.0)[0]
        case State.SUPERSEDED:
            return advance(canary, Superseded(by="r2"), 20.0)[0]


def seen(verdict: Verdict, pairs: int = 1000, exchanges: int = 1000) -> Observed:
    return Observed(readings=(reading(verdict),), pairs=pairs, exchanges=exchanges)


def test_the_first_step_lays_a_mirror_and_no_weight() -> None:
    rollout, effects = begin(fresh())
    assert rollout.state is State.SHADOW
    assert effects[0] == Lay(overlay=overlay(0, mirror=0.2))


def test_a_rollout_may_begin_with_a_weight() -> None:
    assert fresh(replace(POLICY, steps=POLICY.steps[1:])).state is State.CANARY


def test_the_whole_way_by_evidence() -> None:
    """Shadow, three weights with mirrors both ways, promoted with a small reverse mirror; each change is noted."""
    rollout, now, laid = fresh(), 0.0, []
    while rollout.state is not State.PROMOTED:
        now += 100
        rollout, effects = advance(rollout, ENOUGH, now)
        laid += [effect.overlay for effect in effects if isinstance(effect, Lay)]
        assert [effect.kind for effect in effects if isinstance(effect, Note)] in (["step"], ["promoted"])
    assert laid == [
        overlay(5, mirror=0.2, reverse_mirror=0.2),
        overlay(50, mirror=0.2, reverse_mirror=0.2),
        overlay(100, mirror=0.2, reverse_mirror=0.2),
        overlay(100, reverse_mirror=0.02),
    ]


@pytest.mark.parametrize(
    ("event", "now", "reason"),
    [
        (seen(Verdict.RUNNING), 100, "waiting for evidence: tool_name"),
        (seen(Verdict.PENDING), 100, "waiting for evidence: tool_name"),
        (Observed(readings=(), pairs=99, exchanges=99), 100, "waiting for evidence: tool_name"),
        (seen(Verdict.ERROR), 100, "tool_name could not be measured"),
        (seen(Verdict.SUCCESSFUL, exchanges=19), 100, "waiting for 20 exchanges of the candidate"),
        (seen(Verdict.SUCCESSFUL), 69, "holding for 60 s"),
    ],
)
def test_without_fresh_evidence_a_weight_stays(event: Observed, now: float, reason: str) -> None:
    canary = at(State.CANARY)  # since 10.0, holding for 60 s
    same, effects = advance(canary, event, now)
    assert (same.state, same.step, same.reason, effects) == (State.CANARY, 1, reason, ())
    assert advance(same, event, now) == (same, ())


def test_shadow_waits_for_pairs() -> None:
    assert advance(fresh(), seen(Verdict.SUCCESSFUL, pairs=49), 9.0)[0].reason == "waiting for 50 pairs"


def test_a_step_that_asks_for_nothing_still_needs_something_fresh() -> None:
    lax = replace(POLICY, steps=(Step(mirror=0.1), Step(weight=100)))
    rollout = fresh(lax)
    assert advance(rollout, seen(Verdict.SUCCESSFUL, pairs=0), 9.0)[0].reason == "waiting for 1 pairs"
    canary = advance(rollout, ENOUGH, 9.0)[0]
    assert advance(canary, seen(Verdict.SUCCESSFUL, exchanges=0), 9.0)[0].state is State.CANARY


def test_two_gates_on_one_metric_are_told_apart() -> None:
    high = replace(GATE, threshold=0.99)
    rollout = fresh(replace(POLICY, gates=(GATE, high)))
    assert advance(rollout, ENOUGH, 9.0)[0].state is State.SHADOW
    both = replace(
        ENOUGH,
        readings=(
            reading(Verdict.SUCCESSFUL),
            reading(Verdict.SUCCESSFUL, Gate(metric="tool_name", kind="prove", threshold=0.5)),
        ),
    )
    assert advance(rollout, both, 9.0)[0].state is State.SHADOW


@pytest.mark.parametrize("state", [State.SHADOW, State.CANARY, State.PAUSED, State.PROMOTED])
def test_a_failed_gate_ends_it_and_lays_what_was_before(state: State) -> None:
    ended, effects = advance(replace(at(state), before=BEFORE), seen(Verdict.FAILED), 99.0)
    assert ended.state is State.ABORTED
    assert effects[0] == Lay(overlay=BEFORE)
    assert "0 of 100 pairs agree" in ended.reason


def test_inconclusive_pauses_for_a_person_and_leaves_the_overlay() -> None:
    paused, effects = advance(at(State.CANARY), seen(Verdict.INCONCLUSIVE), 99.0)
    assert (paused.state, paused.paused_from) == (State.PAUSED, State.CANARY)
    assert not any(isinstance(effect, Lay) for effect in effects)
    assert overlay_of(paused) == overlay_of(at(State.CANARY))


def test_manual_approval_waits_at_each_boundary_and_says_so_once() -> None:
    rollout = fresh(replace(POLICY, approval="manual"))
    waiting, effects = advance(rollout, ENOUGH, 100.0)
    assert (waiting.state, waiting.reason) == (State.SHADOW, "waiting for approval")
    assert [effect.kind for effect in effects if isinstance(effect, Note)] == ["waiting"]
    assert advance(waiting, ENOUGH, 101.0) == (waiting, ())
    approved, _ = advance(waiting, Promote(), 102.0)
    canary, _ = advance(approved, ENOUGH, 103.0)
    assert (canary.state, canary.step) == (State.CANARY, 1)
    assert advance(canary, ENOUGH, 900.0)[0].reason == "waiting for approval"


def test_an_approval_is_no_evidence() -> None:
    """Approved before the numbers are there, the step still waits for them."""
    approved, _ = advance(fresh(replace(POLICY, approval="manual")), Promote(), 1.0)
    assert advance(approved, seen(Verdict.RUNNING), 100.0)[0].state is State.SHADOW


def test_the_last_step_passes_without_approval_for_no_weight_rises() -> None:
    last = replace(fresh(replace(POLICY, approval="manual")), state=State.CANARY, step=3)
    assert advance(last, ENOUGH, 100.0)[0].state is State.PROMOTED


@pytest.mark.parametrize("policy", [POLICY, replace(POLICY, approval="manual")])
@pytest.mark.parametrize("step", [0, 3])
def test_a_promote_that_would_change_nothing_is_refused(policy: RolloutPolicy, step: int) -> None:
    rollout = replace(fresh(policy), step=step, state=State.CANARY if step else State.SHADOW)
    if policy.approval == "manual" and step == 0:
        rollout, _ = advance(rollout, Promote(), 1.0)
    with pytest.raises(Refused):
        advance(rollout, Promote(), 2.0)


def test_resume_begins_the_step_again() -> None:
    resumed, _ = advance(at(State.PAUSED), Resume(), 500.0)
    assert (resumed.state, resumed.step, resumed.step_started_at) == (State.CANARY, 1, 500.0)
    assert advance(resumed, ENOUGH, 501.0)[0].reason == "holding for 60 s"


def test_a_breaker_rolls_back() -> None:
    ended, effects = advance(at(State.PROMOTED), BreakerOpened(failures=3), 99.0)
    assert (ended.state, ended.reason) == (State.ABORTED, "breaker opened after 3 failures in a row")
    assert effects[0] == Lay(overlay=None)


LIVE = {State.SHADOW, State.CANARY, State.PAUSED, State.PROMOTED}
POSSIBLE: dict[Event, set[State]] = {
    ENOUGH: LIVE,
    Promote(full=True): LIVE - {State.PROMOTED},
    Pause(): {State.SHADOW, State.CANARY},
    Resume(): {State.PAUSED},
    Abort(): LIVE,
    Undo(): LIVE,
    BreakerOpened(): {State.CANARY, State.PAUSED, State.PROMOTED},
    CandidateLost(reason="gone"): LIVE,
    Superseded(by="r2"): LIVE,
    Restored(after="r2"): {State.SUPERSEDED},
}


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize("event", list(POSSIBLE), ids=lambda event: type(event).__name__)
def test_every_event_in_every_state_is_handled_or_refused_by_name(event: Event, state: State) -> None:
    rollout = at(state)
    if state in POSSIBLE[event]:
        advance(rollout, event, 999.0)
        return
    with pytest.raises(Refused, match=f"rollout r1 is {state}: "):
        advance(rollout, event, 999.0)


class RolloutMachine(RuleBasedStateMachine):
    """One workload on which rollouts come and go, with the overlay that their effects lay."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.count = 1
        self.before: Overlay | None = None
        self.laid: Overlay | None = None
        self.rollout = self.begin(None)
        self.former: Rollout | None = None

    def begin(self, before: Overlay | None) -> Rollout:
        self.before = before
        start = Rollout(
            id=f"r{self.count}",
            workload="w",
            candidate=CANDIDATE,
            policy=POLICY if self.count % 2 else replace(POLICY, approval="manual"),
            created_at=self.now,
            step_started_at=self.now,
            salt="s",
            before=before,
        )
        rollout, effects = begin(start)
        self.lay(effects)
        return rollout

    def lay(self, effects: tuple[object, ...]) -> None:
        for effect in effects:
            if isinstance(effect, Lay):
                self.laid = effect.overlay

    def send(self, event: Event) -> None:
        was, weight = self.rollout, self.weight()
        try:
            self.rollout, effects = advance(was, event, self.now)
        except Refused:
            return
        self.lay(effects)
        if self.weight() > weight and self.rollout.state is not State.ABORTED:
            self.check_rise(event, was)

    def check_rise(self, event: Event, was: Rollout) -> None:
        if isinstance(event, Promote):
            assert event.full
            return
        assert isinstance(event, Observed)
        assert was.state in (State.SHADOW, State.CANARY)
        assert [reading.verdict for reading in event.readings] == [Verdict.SUCCESSFUL]
        step = was.current_step
        assert event.pairs >= step.min_pairs
        assert event.exchanges >= step.min_exchanges
        assert self.now - was.step_started_at >= step.hold_seconds
        assert was.policy.approval == "auto" or was.approved == was.step

    def weight(self) -> int:
        return self.laid.weight if self.laid else 0

    @rule(
        verdict=st.sampled_from(list(Verdict)),
        pairs=st.sampled_from([0, 49, 50, 500]),
        exchanges=st.sampled_from([0, 19, 20, 500]),
        wait=st.sampled_from([0.0, 30.0, 90.0]),
    )
    def observe(self, verdict: Verdict, pairs: int, exchanges: int, wait: float) -> None:
        self.now += wait
        self.send(Observed(readings=(reading(verdict),), pairs=pairs, exchanges=exchanges))

    @rule()
    def good_news(self) -> None:
        self.now += 90
        self.send(ENOUGH)

    @rule(
        event=st.sampled_from([event for event in POSSIBLE if not isinstance(event, Observed | Superseded | Restored)])
    )
    def other(self, event: Event) -> None:
        self.send(event)

    @rule()
    def approve(self) -> None:
        self.send(Promote())

    @rule()
    def undo_restores_exactly(self) -> None:
        live = self.rollout.live
        self.send(Undo())
        if live:
            assert self.laid == self.before

    @precondition(lambda self: not self.rollout.live or self.rollout.state is State.PROMOTED)
    @rule()
    def start_another(self) -> None:
        before = overlay_of(self.rollout) if self.rollout.live else self.laid
        if self.rollout.live:
            self.send(Superseded(by="next"))
        self.count += 1
        self.rollout = self.begin(before)

    @invariant()
    def the_overlay_is_the_one_the_state_wants(self) -> None:
        assert self.laid == overlay_of(self.rollout)

    @invariant()
    def an_ended_candidate_serves_nothing(self) -> None:
        if self.rollout.state is State.ABORTED and self.laid:
            assert self.laid.rollout != self.rollout.id

    @invariant()
    def weights_are_per_cent_and_shadow_has_none(self) -> None:
        assert 0 <= self.weight() <= 100
        if self.rollout.state is State.SHADOW:
            assert self.weight() == 0


TestRolloutMachine = RolloutMachine.TestCase
TestRolloutMachine.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, derandomize=True, database=None
)
