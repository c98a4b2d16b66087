"""The models' environment: real vLLM and real peft, built by `make models`."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def models_python() -> Path:
    """Its Python. Without it these tests have nothing to play with."""
    python = ROOT / ".models" / "bin" / "python"
    if not python.exists():
        pytest.skip("no models' environment: run `make models`")
    return python
