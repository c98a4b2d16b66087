"""Background tasks end when their owner does, whatever they do with the first word of it."""

import asyncio

import pytest

from gateway.tasks import BEAT, Tasks, beat, until_beat


async def test_a_task_that_loses_its_cancellation_ends_all_the_same() -> None:
    """As one does whose `wait_for` had just got what it waited for."""
    tasks, lost = Tasks(), 0

    async def deaf() -> None:
        nonlocal lost
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                lost += 1
                if lost > 2:
                    raise

    task = tasks.spawn("deaf", deaf())
    await asyncio.sleep(0)
    async with asyncio.timeout(20):
        await tasks.close()
    assert (task.done(), lost) == (True, 3)


async def test_closing_nothing_is_nothing() -> None:
    await Tasks().close()


@pytest.mark.parametrize("now", [0.0, 0.013, 0.029, 0.08, 12345.61, 12345.6999, 1e9 + 0.05])
def test_the_next_beat_is_the_same_for_all(now: float) -> None:
    """Whenever they ask within one; who was woken a little before it does not come twice."""
    due = (now + until_beat(now)) / BEAT
    assert due == pytest.approx(round(due), abs=1e-5)
    assert BEAT / 10 < until_beat(now) <= 1.1 * BEAT


async def test_a_beat_is_waited_for() -> None:
    """Two of them are in two different tenths of a second."""
    loop = asyncio.get_running_loop()
    await beat()
    before = loop.time()
    await beat()
    assert loop.time() - before > BEAT / 20
