"""Processes that are measured: started on a core, put to sleep while others are measured, their CPU time and memory."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Cores", "cores", "cpu_seconds", "move", "resident_mb", "running", "signalled", "tree", "wait_until_calm"]

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cores:
    """Which core is whose. On two cores the load has the second, with the upstream and what is behind a gateway."""

    target: int
    second: int  # of a target with two workers
    upstream: int
    load: int


def cores() -> Cores:
    """The cores that this process may use, given out."""
    mine = sorted(os.sched_getaffinity(0))
    load = mine[-1]
    return Cores(
        target=mine[0],
        second=mine[1] if len(mine) > 2 else load,
        upstream=mine[-2] if len(mine) > 3 else load,
        load=load,
    )


@contextlib.contextmanager
def running(
    command: Sequence[object],
    log: Path,
    *,
    on: Sequence[int],
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    pass_fds: Sequence[int] = (),
) -> Iterator[subprocess.Popen[bytes]]:
    """A process on some cores, its output in `log`. It ends with the block, and what it started with it."""
    pinned = ["taskset", "-c", ",".join(str(core) for core in on), *(str(part) for part in command)]
    with log.open("w") as out:
        process = subprocess.Popen(
            pinned, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=dict(env) if env is not None else None,
            cwd=cwd, pass_fds=tuple(pass_fds), process_group=0,
        )  # fmt: skip
    try:
        yield process
    finally:
        started = tree(process.pid)
        signalled(started, signal.SIGCONT)
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        signalled(started, signal.SIGKILL)  # those that their parent left behind


def tree(pid: int) -> list[int]:
    """A process and all that descend from it."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found += [int(child) for child in task.read_text().split()]
    return found


def signalled(pids: Sequence[int], number: int) -> None:
    """Send a signal to those that are still there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def cpu_seconds(pids: Sequence[int]) -> float:
    """CPU time that processes have used, with that of children that have ended."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += sum(int(ticks) for ticks in fields[11:15])
    return total / _TICKS


def resident_mb(pids: Sequence[int]) -> float:
    """Resident memory of processes together, in MB (2^20 bytes); pages that they share count for each."""
    pages = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * _PAGE / 2**20


def move(pid: int, core: int, *, idle: bool) -> None:
    """Put all threads of a process on a core, at idle priority if asked: it then runs while nobody else wants to."""
    for thread in os.listdir(f"/proc/{pid}/task"):
        os.sched_setaffinity(int(thread), {core})
        if idle:
            os.sched_setscheduler(int(thread), os.SCHED_IDLE, os.sched_param(0))


def wait_until_calm(pids: Sequence[int], *, patience: float = 5.0) -> bool:
    """Whether, before `patience` ends, processes use less than a tenth of a core for a fifth of a second."""
    until = time.monotonic() + patience
    while time.monotonic() < until:
        before = cpu_seconds(pids)
        time.sleep(0.2)
        if cpu_seconds(pids) - before <= 0.02:
            return True
    return False
