"""Where `make clients` puts the clients that have environments of their own."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CLIENTS = ROOT / ".clients"
SCRIPTS = Path(__file__).parent / "clients"


def installed(client: str, folder: str) -> Path:
    """The folder of `.clients` that was installed whole, or a skipped test that says which client went untested."""
    if not (CLIENTS / f".{folder}").exists():
        pytest.skip(f"NOT TESTED, {client} against the gateway: .clients/{folder} is not there (make clients)")
    return CLIENTS / folder


def on_path(client: str, program: str) -> str:
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"NOT TESTED, {client} against the gateway: {program} is not installed (make services)")
    return found


def output(*command: str, seconds: float = 300, **environment: str) -> str:
    """What a client's program writes. Fails with all that it said where it ends with an error."""
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=seconds, env=os.environ | environment
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout
