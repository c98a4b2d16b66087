"""The dataset folder: whole or not there, verified when it is read, and what its rows hold."""

import json
from pathlib import Path

import pytest

from flywheel import dataset
from flywheel.curate import Curated, CurateOptions, curate
from flywheel.dataset import DatasetError
from tests.flywheel.examples import live, says, traffic


def _curated(seed: int = 0) -> Curated:
    return curate([*traffic(40), live(50, "hello there", says("Hi."))], CurateOptions(minimum=2, seed=seed))


def _write(folder: Path, seed: int = 0) -> dataset.Dataset:
    return dataset.write(folder, _curated(seed), workload="desk", created_at=1.0, lineage={"run": "r"})


def test_rows_train_and_test_as_they_should(tmp_path: Path) -> None:
    """Training rows end with the answer, arguments as text; held-out ones keep the answer apart, and the request."""
    built = _write(tmp_path)
    row = next(row for row in dataset.rows(built.train) if row["tool"] == "get_weather")
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
    assert isinstance(row["messages"][-1]["tool_calls"][0]["function"]["arguments"], str)
    assert row["messages"][-1]["content"] == ""
    case = built.cases()[0]
    assert [message["role"] for message in case.request["messages"]] == ["system", "user"]
    assert case.request["model"] == "prod"
    assert case.reference["role"] == "assistant"


def test_a_dataset_reads_back_as_it_was_written(tmp_path: Path) -> None:
    written = _write(tmp_path)
    assert dataset.read(tmp_path) == written
    counts = {name: entry["rows"] for name, entry in written.manifest["files"].items()}
    assert counts["train.jsonl"] + counts["validation.jsonl"] == written.report["train"]
    lineage = written.manifest["lineage"]
    assert (len(lineage["train"]), len(lineage["test"])) == (written.report["train"], written.report["test"])


def test_the_content_hash_names_the_rows_alone(tmp_path: Path) -> None:
    one = dataset.write(tmp_path / "1", _curated(), workload="desk", created_at=1.0, lineage={})
    other = dataset.write(tmp_path / "2", _curated(), workload="shop", created_at=2.0, lineage={"run": "x"})
    third = _write(tmp_path / "3", seed=1)
    assert one.content_hash == other.content_hash != third.content_hash


@pytest.mark.parametrize("name", dataset.FILES)
def test_a_changed_file_is_refused(tmp_path: Path, name: str) -> None:
    _write(tmp_path)
    with (tmp_path / name).open("a") as rows:
        rows.write("{}\n")
    with pytest.raises(DatasetError, match=rf"{name}: missing or changed"):
        dataset.read(tmp_path)


def test_a_changed_manifest_is_refused(tmp_path: Path) -> None:
    _write(tmp_path)
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "content_hash": "0"}))
    with pytest.raises(DatasetError, match="does not fit its files"):
        dataset.read(tmp_path)
    path.write_text("[]")
    with pytest.raises(DatasetError, match="not a dataset's manifest"):
        dataset.read(tmp_path)


def test_a_folder_without_a_manifest_was_never_finished(tmp_path: Path) -> None:
    """What a kill left behind is written anew."""
    (tmp_path / "train.jsonl").write_text("half a li")
    assert not dataset.exists(tmp_path)
    with pytest.raises(DatasetError, match="never finished"):
        dataset.read(tmp_path)
    _write(tmp_path)
    assert dataset.read(tmp_path).report["kept"] == 41
