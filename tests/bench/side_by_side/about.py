"""What a report says of its run beside the figures: versions, commit, machine."""

import os
import platform
import re
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.bench.side_by_side.install import pinned
from tests.bench.side_by_side.processes import cores

__all__ = ["facts", "machine"]

JSON = dict[str, Any]


def facts(root: Path, folder: Path, names: Sequence[str], rounds: int, seconds: float) -> JSON:
    """Of the whole run. `folder` is where the spool will be."""
    return {
        "versions": _versions(names),
        "commit": _commit(root),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **machine(folder),
        "method": {"rounds": rounds, "seconds": seconds, "cores": asdict(cores())},
    }


def machine(folder: Path) -> JSON:
    """What it ran on, and how busy that was before."""
    model = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    return {
        "machine": {
            "cores": len(os.sched_getaffinity(0)),
            "cpu": model[1] if model else platform.machine(),
            "kernel": platform.release(),
            "load_before": round(os.getloadavg()[0], 2),
            "spool_on": _output("stat", "-f", "-c", "%T", str(folder)),
        }
    }


def _versions(names: Sequence[str]) -> dict[str, str]:
    found = {"understudy": version("understudy"), "python": platform.python_version(), "uvloop": version("uvloop")}
    for name in names:
        if name == "nginx":
            found[name] = _output("nginx", "-v").rpartition("/")[2]
        elif name not in ("direct",) and not name.startswith("understudy"):
            found[name] = pinned(name)
    if "portkey" in names:
        found["node"] = _output("node", "--version")
    return found | {"wrk": (_output("wrk", "-v").split() or [""])[1:2][0]}


def _commit(root: Path) -> str:
    commit = _output("git", "-C", str(root), "rev-parse", "HEAD")
    return f"{commit} with changes" if _output("git", "-C", str(root), "status", "--porcelain") else commit


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "not found"
    return (done.stdout or done.stderr).strip()
