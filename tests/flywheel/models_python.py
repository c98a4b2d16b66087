"""A stand-in for the models' Python: it trains nothing, and leaves behind what the trainer would."""

import sys
from pathlib import Path

_SCRIPT = """#!{python}
import fcntl, json, pathlib, sys, time
folder = pathlib.Path(sys.argv[-1])
with (folder / "starts").open("a") as starts:
    starts.write("x")
with (folder / ".lock").open("w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    request = json.loads((folder / "request.json").read_text())
    if {fails}:
        sys.exit("train: line 7 cannot be used")
    if not (folder / "manifest.json").exists():
        (folder / "progress.json").write_text(json.dumps({{"epoch": 1, "epochs": 2, "val_loss": 0.5}}))
        time.sleep({seconds})
        (folder / "adapter").mkdir(exist_ok=True)
        (folder / "adapter" / "adapter_model.safetensors").write_text("weights")
        manifest = {{
            "adapter_name": request["adapter_name"],
            "base_model": request["base_model"],
            "hyperparameters": {{"rank": 8}},
            "seed": request["seed"],
            "sha256": {{"adapter_model.safetensors": "abc"}},
            "seconds": {seconds},
        }}
        (folder / "manifest.tmp").write_text(json.dumps(manifest))
        (folder / "manifest.tmp").rename(folder / "manifest.json")
"""


def models_python(path: Path, *, seconds: float = 0.0, fails: bool = False) -> Path:
    """An executable at `path` that takes the trainer's command line."""
    path.write_text(_SCRIPT.format(python=sys.executable, seconds=seconds, fails=fails))
    path.chmod(0o755)
    return path
