"""Starts the trainer as a child of the models' Python, watches its progress, and ends it with its parent's task."""

import asyncio
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gateway.errors import UnderstudyError
from gateway.records import JSON

__all__ = ["TrainingError", "adapter_name", "finished", "train_in_child"]

_POLL = 0.5
_GRACE = 10.0
# The trainer is found behind the models' own packages: the gateway's environment must not take their place.
_BOOT = (
    "import runpy, sys; sys.path.append(sys.argv.pop(1)); runpy.run_module('flywheel.train', run_name='__main__', "
    "alter_sys=True)"
)
_ROOT = Path(__file__).resolve().parent.parent


class TrainingError(UnderstudyError):
    """The trainer ended without an adapter; the message holds its last words."""


def adapter_name(workload: str, *, created_at: float, ingredients: JSON) -> str:
    """`<workload>-<yyyymmdd>-<hash8>`: the same ingredients on the same day give the same name."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", workload).strip("-") or "workload"
    digest = hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()[:8]
    return f"{plain}-{datetime.fromtimestamp(created_at, UTC):%Y%m%d}-{digest}"


def finished(folder: Path) -> JSON | None:
    """The manifest of a training that was done to its end, which it writes last; None before."""
    try:
        manifest: JSON = json.loads((folder / "manifest.json").read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise TrainingError(f"{folder / 'manifest.json'}: not readable ({error})") from error
    return manifest


async def train_in_child(
    python: Path, folder: Path, request: JSON, *, env: Mapping[str, str], on_progress: Callable[[JSON], None]
) -> JSON:
    """Train in `folder` and return the manifest.

    A trainer that is still at work there (its parent was killed) is waited for: the folder is locked, and the second
    one finds the work done. Cancelling the task ends the child. Raises TrainingError.
    """
    await asyncio.to_thread(_write, folder / "request.json", request)
    await _run(python, folder, env, on_progress)
    manifest = finished(folder)
    if manifest is None:
        raise TrainingError(f"{folder}: training ended without a manifest; {_last_words(folder / 'train.log')}")
    return manifest


async def _run(python: Path, folder: Path, env: Mapping[str, str], on_progress: Callable[[JSON], None]) -> None:
    with (folder / "train.log").open("ab") as output:
        try:
            child = await asyncio.create_subprocess_exec(
                str(python),
                "-c",
                _BOOT,
                str(_ROOT),
                str(folder),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**env, "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"},
            )
        except OSError as error:
            raise TrainingError(
                f"{python}: cannot be started ({error}); `make models` builds its environment"
            ) from error
    try:
        while True:
            try:
                code = await asyncio.wait_for(child.wait(), _POLL)
                break
            except TimeoutError:
                on_progress(_progress(folder))
    finally:
        await _end(child)
    on_progress(_progress(folder))
    if code != 0:
        raise TrainingError(f"training ended with code {code}: {_last_words(folder / 'train.log')}")


async def _end(child: asyncio.subprocess.Process) -> None:
    """Make sure that the child is gone, also where this task is being cancelled."""
    if child.returncode is not None:
        return
    child.terminate()
    try:
        await asyncio.wait_for(child.wait(), _GRACE)
    except TimeoutError:
        child.kill()
        await child.wait()


def _progress(folder: Path) -> JSON:
    try:
        value: Any = json.loads((folder / "progress.json").read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _last_words(path: Path) -> str:
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return " | ".join(lines[-3:])[:600] or "it said nothing"


def _write(path: Path, value: JSON) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".tmp")
    fresh.write_text(json.dumps(value, indent=1))
    fresh.replace(path)
