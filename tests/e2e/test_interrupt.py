"""However the demo ends, nothing that it started stays behind; wrong input is told in one line."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.test_demo import processes

pytestmark = pytest.mark.models


def demo(folder: Path, python: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "flywheel.cli", "demo", "--folder", str(folder), "--reports", str(folder)]
    return subprocess.Popen(
        [*command, "--python", str(python), *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -9)])
def test_all_processes_end_with_the_demo(tmp_path: Path, models_python: Path, number: int, code: int) -> None:
    """On Ctrl-C, on a polite end and on kill -9, while everything is starting or serving."""
    with demo(tmp_path, models_python) as process:
        until = time.monotonic() + 60
        while len(processes(tmp_path)) < 6:  # the demo, gateway, worker, shipper, controller, vLLM's leash, ...
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < until, processes(tmp_path)
            time.sleep(0.1)
        os.kill(process.pid, number)
        assert process.wait(60) == code
        until = time.monotonic() + 30
        while left := processes(tmp_path):
            assert time.monotonic() < until, left
            time.sleep(0.1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ('{"text": "a", "intent": "x"}\n{"text": 5, "intent": "x"}\n', "data.jsonl:2: 'text'"),
        ("not json\n", "data.jsonl:1: not JSON"),
        ("", "different intent found"),
    ],
)
def test_wrong_data_is_told_with_its_line(tmp_path: Path, models_python: Path, data: str, message: str) -> None:
    """Before anything is started."""
    (tmp_path / "data.jsonl").write_text(data)
    process = demo(tmp_path / "demo", models_python, "--data", str(tmp_path / "data.jsonl"))
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    assert message in stderr
    assert "Traceback" not in stderr


def test_missing_models_environment_is_told(tmp_path: Path) -> None:
    """With the command that builds it."""
    process = demo(tmp_path, tmp_path / "nowhere" / "python")
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "make models" in stderr
