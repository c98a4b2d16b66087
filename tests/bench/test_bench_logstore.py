"""The measurement of the log stores runs, and folding saves what it is there to save."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_folding_saves_disk() -> None:
    """More than half for single turns with tools; nothing is paid where nothing repeats."""
    command = [sys.executable, "-m", "tests.bench.bench_logstore", "--store", "sqlite", "--exchanges", "400", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True, timeout=120)
    found = {(one["traffic"], one["folded"]): one["bytes"] for one in map(json.loads, done.stdout.splitlines())}
    assert found["router", True] < found["router", False] / 2
    assert found["conversations", True] < found["conversations", False]
    assert found["unrelated", True] == found["unrelated", False]
