"""Breakers: open after failures in a row, try again after a while, close on success."""

from gateway.breaker import Breakers
from routing.targets import Breaker

POLICY = Breaker(failures=2, open_seconds=10)


def test_opens_on_the_last_of_the_failures_in_a_row() -> None:
    """A success between starts the count again."""
    breakers = Breakers()
    assert not breakers.failed("c", POLICY, 0)
    breakers.succeeded("c")
    assert not breakers.failed("c", POLICY, 1)
    assert breakers.failed("c", POLICY, 2)
    assert breakers.open_at(2) == {"c"}


def test_after_its_time_a_failure_opens_it_again_and_a_success_closes_it() -> None:
    """No flood of tries at a dead candidate."""
    breakers = Breakers()
    breakers.failed("c", POLICY, 0)
    breakers.failed("c", POLICY, 0)
    assert breakers.open_at(10.1) == frozenset()
    assert breakers.failed("c", POLICY, 10.2)
    assert breakers.open_at(11) == {"c"}
    breakers.succeeded("c")
    assert breakers.open_at(11) == frozenset()
