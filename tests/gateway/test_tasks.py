"""Background tasks end when their owner does, whatever they do with the first word of it."""

import asyncio

from gateway.tasks import BEAT, Tasks, beat


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


async def test_who_looks_by_the_beat_looks_with_the_others() -> None:
    """However they began: all of them in one turn of the loop, and each once a beat."""
    loop = asyncio.get_running_loop()
    woken: list[float] = []

    async def look(late: float) -> None:
        await asyncio.sleep(late)
        for _ in range(2):
            await beat()
            woken.append(loop.time())

    async with asyncio.TaskGroup() as group:
        for late in (0.0, 0.013, 0.029):
            group.create_task(look(late))
    beats = sorted({round(when / BEAT) for when in woken})
    assert len(woken) == 6
    assert len(beats) <= 4  # two, unless the machine stood still within one
    assert all(abs(when - round(when / BEAT) * BEAT) < BEAT / 2 for when in woken)
