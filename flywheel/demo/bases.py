"""Which base model the demo uses: the one beside this module, or one pretrained on the spot for other data."""

import hashlib
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from flywheel.demo.setting import BASE
from flywheel.demo.story import Narrator
from gateway.config import environment
from gateway.errors import UnderstudyError

__all__ = ["base_for"]

OTHER_TEXT = ("hwu64.jsonl", "sgd_turns.jsonl")  # never the workload that is measured
RECIPE = ("pretrain.py", "labelled.py", "corpus.py", "grammar.py", "everyday.txt")  # a new one wants a new base
SEED = 7


def base_for(data: str, python: Path, narrator: Narrator, *, keep: Path) -> Path:
    """The folder of a base model for `data`. What is pretrained is kept in `keep` and used again.

    Other text beside the data file is learnt from, if it is there; without it the demo's own base is used. Raises
    UnderstudyError when the pretraining fails.
    """
    if data == "generated":
        return BASE
    here = Path(data).resolve()
    texts = [here.parent / name for name in OTHER_TEXT if (here.parent / name).is_file() and name != here.name]
    if not texts:
        narrator.say(f"no other text beside {data}: the demo's own base model is used")
        return BASE
    folder = keep / f"base-{_digest(texts)}"
    if (folder / "manifest.json").is_file():
        narrator.say(f"base model: {folder}, pretrained earlier on {', '.join(text.name for text in texts)}")
        return folder
    narrator.say(f"pretraining a base model on {', '.join(text.name for text in texts)}: some minutes, once")
    _pretrain(python, folder, texts)
    return folder


def _pretrain(python: Path, folder: Path, texts: Sequence[Path]) -> None:
    root = Path(__file__).parents[2]
    env = {**environment(), "PYTHONPATH": os.pathsep.join([str(root), environment().get("PYTHONPATH", "")])}
    command = [str(python.absolute()), "-m", "flywheel.demo.pretrain", str(folder.absolute()), "--seed", str(SEED)]
    done = subprocess.run([*command, "--size", "base", "--text", *map(str, texts)], env=env, check=False)
    if done.returncode:
        raise UnderstudyError(f"pretraining ended with exit code {done.returncode}; what it said stands above")


def _digest(texts: Sequence[Path]) -> str:
    digest = hashlib.sha256(str(SEED).encode())
    for text in (*(Path(__file__).with_name(name) for name in RECIPE), *texts):
        digest.update(text.read_bytes())
    return digest.hexdigest()[:12]
