"""Cron lines of routing.yaml -> runs, by APScheduler: the one file that knows it. Times are UTC."""

from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC

from apscheduler.schedulers.asyncio import AsyncIOScheduler
from apscheduler.triggers.cron import CronTrigger

from routing.rules import FlywheelPolicy

__all__ = ["Schedule"]

_LATE = 3600  # seconds that a run may begin late, when the controller was busy at its time


class Schedule:
    """Calls `due(workload)` when a workload's cadence says so. Start it inside a running loop, and close it."""

    def __init__(self, due: Callable[[str], Awaitable[None]]) -> None:
        self._due = due
        self._scheduler = AsyncIOScheduler(timezone=UTC)
        self._cadences: dict[str, str] = {}

    def start(self) -> None:
        self._scheduler.start()

    def close(self) -> None:
        if self._scheduler.running:
            self._scheduler.shutdown(wait=False)

    def follow(self, flywheels: Mapping[str, FlywheelPolicy]) -> None:
        """Take in the cadences as they are now. A line that cron does not know raises ValueError."""
        wanted = {workload: policy.cadence for workload, policy in flywheels.items() if policy.cadence}
        triggers = {name: CronTrigger.from_crontab(line, timezone=UTC) for name, line in wanted.items()}
        for gone in self._cadences.keys() - wanted.keys():
            self._scheduler.remove_job(gone)
        for workload, trigger in triggers.items():
            if self._cadences.get(workload) != wanted[workload]:
                self._scheduler.add_job(
                    self._due,
                    trigger,
                    args=[workload],
                    id=workload,
                    replace_existing=True,
                    coalesce=True,
                    max_instances=1,
                    misfire_grace_time=_LATE,
                )
        self._cadences = wanted
