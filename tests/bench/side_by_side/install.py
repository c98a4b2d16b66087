"""Peers, each in an environment of its own, at the versions that the files in peers/ pin."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.bench.side_by_side.programs import CannotMeasure

__all__ = ["PINS", "install", "install_programs", "pinned"]

PINS = Path(__file__).with_name("peers")
NODE = 18
Say = Callable[[str], None]


def install_programs(packages: Sequence[str], say: Say) -> None:
    """Debian packages, where this process may install them; whether it could is for the caller to see."""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return
    say(f"installing {' '.join(packages)}")
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *packages]):
        subprocess.run(["apt-get", *command], env=env, check=False, capture_output=True, stdin=subprocess.DEVNULL)


def pinned(name: str) -> str:
    """The version of a peer that its file pins. Raises KeyError for what is no peer."""
    if name == "portkey":
        found = re.search(r'"@portkey-ai/gateway": "([^"]+)"', (PINS / "portkey/package.json").read_text())
    else:
        found = re.search(rf"^{re.escape(name)}==(\S+)$", (PINS / f"{name}.txt").read_text(), re.MULTILINE)
    if found is None:
        raise KeyError(name)
    return found[1]


def install(name: str, environments: Path, say: Say) -> None:
    """Make a peer's environment, unless it is there as pinned. Raises CannotMeasure with the reason when it can't."""
    folder = environments / name
    files = sorted(PINS.glob(f"{name}.txt")) + sorted((PINS / name).glob("*.json"))
    wanted = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    mark = folder / ".installed"
    if mark.exists() and mark.read_text() == wanted:
        return
    say(f"installing {name} {pinned(name)}, this once")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if name == "portkey":
        _by_npm(folder, say)
    else:
        _by_pip(folder, PINS / f"{name}.txt")
    mark.write_text(wanted)


def _by_pip(folder: Path, requirements: Path) -> None:
    _run([sys.executable, "-m", "venv", folder])
    pip = [folder / "bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    _run([*pip, "--requirement", requirements])


def _by_npm(folder: Path, say: Say) -> None:
    if shutil.which("node") is None or shutil.which("npm") is None:
        install_programs(["nodejs", "npm"], say)
    if shutil.which("node") is None or shutil.which("npm") is None:
        raise CannotMeasure("node and npm are not on PATH: apt-get install nodejs npm")
    version = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    if int(version.lstrip("v").split(".")[0]) < NODE:
        raise CannotMeasure(f"node {version} is older than {NODE}")
    for file in (PINS / "portkey").glob("*.json"):
        shutil.copy(file, folder)
    _run(["npm", "ci", "--silent", "--no-fund", "--no-audit", "--ignore-scripts", "--omit=dev"], cwd=folder)


def _run(command: Sequence[object], cwd: Path | None = None) -> None:
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or ["no reason given"]
        raise CannotMeasure(f"{Path(words[0]).name} failed with {done.returncode}: {said[-1][:300]}")
