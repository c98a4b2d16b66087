"""A thread that hands things on: bounded, in order, never waited for; what is lost is counted."""

import threading

from structlog.testing import capture_logs

from gateway.sender import Sender


def sender(send: object, dropped: list[tuple[str, int]], **options: object) -> Sender[int]:
    return Sender("things", send, dropped=lambda why, count: dropped.append((why, count)), **options)


def test_everything_arrives_in_order_and_in_batches() -> None:
    """The last batch when it closes."""
    found: list[list[int]] = []
    dropped: list[tuple[str, int]] = []
    made = sender(lambda batch: not found.append(batch), dropped, batch=3, delay=60)
    made.offer(range(8))
    made.close(10)
    assert [one for batch in found for one in batch] == list(range(8))
    assert max(map(len, found)) == 3
    assert dropped == []


def test_a_batch_waits_no_longer_than_it_should() -> None:
    """It need not be full."""
    arrived = threading.Event()
    made = sender(lambda _batch: not arrived.set(), [], batch=100, delay=0.01)
    made.offer([1])
    assert arrived.wait(10)
    made.close(10)


def test_what_does_not_fit_is_counted() -> None:
    """While the other side takes its time, nobody waits, and who can wait is told so."""
    taken, go = threading.Event(), threading.Event()
    dropped: list[tuple[str, int]] = []

    def slowly(_batch: list[int]) -> bool:
        taken.set()
        return go.wait(10)

    made = sender(slowly, dropped, limit=4, batch=1)
    made.offer([0])
    assert taken.wait(10)
    assert not made.busy
    made.offer(range(6))
    assert dropped == [("queue_full", 2)]
    assert made.busy
    go.set()
    made.close(10)
    assert len(dropped) == 1


def test_what_is_not_delivered_is_counted_and_told_once() -> None:
    """Be it refused, or the ground of an error; and once more when it works again."""
    answers = [False, ValueError("no"), True]
    dropped: list[tuple[str, int]] = []
    busy: list[bool] = []

    def send(_batch: list[int]) -> bool:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    with capture_logs() as said:
        made = sender(send, dropped, limit=3, batch=1, delay=60)
        made.offer([1, 2, 3])
        busy.append(made.busy)
        made.close(10)
    assert dropped == [("not_delivered", 1), ("not_delivered", 1)]
    assert [line["event"] for line in said] == ["not delivered, and dropped", "a batch failed", "delivered again"]
    assert said[0]["what"] == "things"


def test_closing_waits_no_longer_than_it_should() -> None:
    """What is left then is counted."""
    go, taken = threading.Event(), threading.Event()
    dropped: list[tuple[str, int]] = []

    def never(_batch: list[int]) -> bool:
        taken.set()
        return go.wait(30)

    made = sender(never, dropped, batch=1)
    made.offer([1, 2, 3])
    assert taken.wait(10)
    made.close(0.01)
    assert dropped == [("not_delivered", 2)]
    go.set()
