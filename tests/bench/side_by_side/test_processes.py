"""Processes are measured, put to sleep and ended with all that they started; peers that can't be installed say why."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.bench.side_by_side.install import install
from tests.bench.side_by_side.processes import cores, cpu_seconds, move, resident_mb, running, signalled, tree
from tests.bench.side_by_side.programs import CannotMeasure

BUSY = "while True: pass"
PARENT = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {BUSY!r}])"


def test_a_tree_is_measured_stopped_and_ended(tmp_path: Path) -> None:
    """The child works, the parent waits: its CPU time counts, none is used in sleep, and nobody is left."""
    with running([sys.executable, "-c", PARENT], tmp_path / "log", on=[cores().target]) as process:
        wait_for(lambda: cpu_seconds(tree(process.pid)) >= 0.1)
        pids = tree(process.pid)
        assert len(pids) == 2
        assert resident_mb(pids) > resident_mb([pids[0]]) > 1
        move(pids[1], cores().load, idle=True)
        assert os.sched_getscheduler(pids[1]) == os.SCHED_IDLE
        assert os.sched_getaffinity(pids[1]) == {cores().load}
        signalled(pids, signal.SIGSTOP)
        wait_for(lambda: state(pids[1]) == "T")
        before = cpu_seconds(pids)
        time.sleep(0.1)
        assert cpu_seconds(pids) == before
    wait_for(lambda: all(state(pid) in ("", "Z") for pid in pids))


def state(pid: int) -> str:
    """A letter; nothing when the process is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return ""


def wait_for(true: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not true():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_peer_that_can_t_be_installed_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CannotMeasure, match="node and npm are not on PATH: apt-get install nodejs npm"):
        install("portkey", tmp_path, lambda _: None)
