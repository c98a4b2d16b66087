"""Where a rollout stands, as commands, API and page show it: as JSON, as an exit code, with its traffic's shares."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flywheel.shares import Shares, shares
from gateway.errors import StoreError
from gateway.logstore import LogStore
from routing.codec import observed_to_dict, rollout_to_dict
from routing.errors import NotFound, RulesError
from routing.gates import expected
from routing.rollout import WAITING_FOR_APPROVAL, Observed, Rollout, RolloutPolicy, State, overlay_of
from routing.rules import Rules
from routing.store import Entry, Rollouts

__all__ = [
    "EXIT_FAILED",
    "EXIT_TIMEOUT",
    "EXIT_WAITING",
    "Look",
    "Seen",
    "View",
    "as_json",
    "exit_code",
    "expected_json",
    "find",
    "history",
    "settled",
    "weight",
]

EXIT_FAILED, EXIT_WAITING, EXIT_TIMEOUT = 1, 3, 4

JSON = dict[str, Any]
Seen = tuple[float, Observed] | None  # when the controller last looked, and what it saw


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """All that is shown of one rollout; `shares` is None where the log could not be read."""

    rollout: Rollout
    seen: Seen = None
    shares: Shares | None = None


async def find(store: Rollouts, name: str) -> Rollout:
    """The rollout of that id, else the workload's live one, else its newest. Raises NotFound."""
    try:
        return await store.get(name)
    except NotFound:
        found = await store.active(name) or next(iter(await store.list(name, limit=1)), None)
        if found is None:
            raise NotFound(f"no rollout {name}, and none on a workload of that name") from None
        return found


async def history(store: Rollouts, name: str | None) -> Sequence[Entry]:
    """Oldest first; of the workload or the rollout of that name, of all where none is given. Raises NotFound."""
    if name is None:
        return await store.history()
    return await store.history(workload=name) or await store.history(rollout_id=(await store.get(name)).id)


class Look:
    """Reads what is to be shown, with the traffic's shares where log and routing.yaml can be read."""

    def __init__(
        self, store: Rollouts, logs: LogStore, rules: Callable[[], Awaitable[Rules]], *, log_seconds: float = 5.0
    ) -> None:
        """`rules` may raise RulesError. The log is read once in `log_seconds` for each rollout, one at a time."""
        self._store = store
        self._logs = logs
        self._rules = rules
        self._log_seconds = log_seconds
        self._reading = asyncio.Lock()
        self._shares: dict[str, tuple[int, float, Shares | None]] = {}

    async def at(self, name: str) -> View:
        """Raises NotFound."""
        rollout = await find(self._store, name)
        return View(rollout=rollout, seen=await self._store.observed(rollout.id), shares=await self._share(rollout))

    async def _share(self, rollout: Rollout) -> Shares | None:
        if not rollout.live:
            self._shares.pop(rollout.id, None)
            return None
        async with self._reading:
            version, at, found = self._shares.get(rollout.id, (-1, 0.0, None))
            now = time.monotonic()
            if version != rollout.version or now - at > self._log_seconds:
                found = await self._read(rollout)
                self._shares[rollout.id] = rollout.version, now, found
            return found

    async def _read(self, rollout: Rollout) -> Shares | None:
        try:
            route = (await self._rules()).table.route_of(rollout.workload)
            return await shares(self._logs, route, rollout)
        except (StoreError, RulesError):
            return None


def exit_code(rollout: Rollout) -> int:
    """0 on its way or promoted, 1 aborted or superseded, 3 paused, waiting for approval, or degraded."""
    if rollout.state in (State.ABORTED, State.SUPERSEDED):
        return EXIT_FAILED
    waits = rollout.state is State.PAUSED or rollout.reason == WAITING_FOR_APPROVAL or rollout.degraded is not None
    return EXIT_WAITING if waits else 0


def settled(rollout: Rollout) -> bool:
    """Whether nothing more happens before a person acts."""
    return rollout.state is State.PROMOTED or exit_code(rollout) != 0


def weight(rollout: Rollout) -> int:
    """The share of live traffic, in per cent, that this rollout's candidate has."""
    overlay = overlay_of(rollout) if rollout.live else None
    return overlay.weight if overlay else 0


def as_json(rollout: Rollout, view: View | None = None) -> JSON:
    """What `--json` and the API answer with; a view adds the traffic and what the controller saw."""
    at, observed = (view.seen if view else None) or (None, None)
    traffic = view.shares if view else None
    return rollout_to_dict(rollout) | {
        "weight": weight(rollout),
        "traffic": asdict(traffic) | {"actual": traffic.actual, "warning": traffic.warning} if traffic else None,
        "observed_at": at,
        "observed": observed_to_dict(observed) if observed else None,
        "exit_code": exit_code(rollout),
    }


def expected_json(policy: RolloutPolicy) -> list[JSON]:
    """For each gate, how many samples about half of such rollouts would need; None is endlessly many."""
    return [
        {
            "metric": found.gate.metric,
            "kind": found.gate.kind,
            "to_pass": found.to_pass,
            "if_good": found.if_good,
            "to_fail": found.to_fail,
            "if_bad": found.if_bad,
        }
        for found in map(expected, policy.gates)
    ]
