"""A few seconds of the fuzzer, and the record of its last long run."""

import json
from pathlib import Path

from tests.fuzz.fuzz_edge import fuzz


async def test_nothing_is_found_within_seconds(tmp_path: Path) -> None:
    done = await fuzz(tmp_path, seconds=4, seed=7)
    assert done["findings"] == []
    assert done["exchanges_seen"] > 20


def test_nothing_was_found_within_minutes() -> None:
    done = json.loads(Path(__file__).with_name("fuzz_edge.json").read_text())
    assert (done["findings"], done["seconds"] >= 180) == ([], True)
