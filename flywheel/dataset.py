"""A run's dataset on disk: three JSONL files and a manifest, written last, that proves they are whole."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flywheel.curate import Curated, Record
from gateway.errors import UnderstudyError
from gateway.records import JSON

__all__ = ["Case", "Dataset", "DatasetError", "exists", "read", "rows", "write"]

FORMAT = 1
MANIFEST = "manifest.json"
FILES = ("train.jsonl", "validation.jsonl", "test.jsonl")


class DatasetError(UnderstudyError):
    """A dataset folder that is incomplete, or whose files are not those that were written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One held-out prompt: the request as logged, and the incumbent's message as the reference."""

    id: str
    tool: str
    request: JSON
    reference: JSON
    latency_ms: float
    cost_usd: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """A verified dataset. `content_hash` depends on the rows alone: equal rows, equal hash."""

    folder: Path
    content_hash: str
    manifest: JSON

    @property
    def train(self) -> Path:
        return self.folder / "train.jsonl"

    @property
    def validation(self) -> Path:
        return self.folder / "validation.jsonl"

    @property
    def report(self) -> JSON:
        return dict(self.manifest["report"])

    def cases(self) -> list[Case]:
        """The held-out rows, in order of their ids."""
        return [_case(row) for row in rows(self.folder / "test.jsonl")]


def exists(folder: Path) -> bool:
    """Whether a dataset was written here to its end."""
    return (folder / MANIFEST).is_file()


def write(folder: Path, curated: Curated, *, workload: str, created_at: float, lineage: Mapping[str, Any]) -> Dataset:
    """Write the folder; the manifest appears last, in one step. Files of an unfinished attempt are replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    files = {
        "train.jsonl": _write(folder / "train.jsonl", map(_train_row, curated.train)),
        "validation.jsonl": _write(folder / "validation.jsonl", map(_train_row, curated.validation)),
        "test.jsonl": _write(folder / "test.jsonl", map(_test_row, curated.test)),
    }
    content_hash = _content_hash(files)
    manifest: JSON = {
        "format": FORMAT,
        "workload": workload,
        "created_at": created_at,
        "content_hash": content_hash,
        "files": files,
        "report": curated.report.as_json(),
        "lineage": {
            **lineage,
            "train": _ids((*curated.train, *curated.validation)),
            "test": _ids(curated.test),
        },
    }
    _replace(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
    return Dataset(folder=folder, content_hash=content_hash, manifest=manifest)


def read(folder: Path) -> Dataset:
    """Read a dataset back. Raises DatasetError where a file is missing or differs from what the manifest says."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        stated = {name: manifest["files"][name]["sha256"] for name in FILES}
        content_hash = manifest["content_hash"]
    except FileNotFoundError as error:
        raise DatasetError(f"{folder}: no {MANIFEST}, so the dataset was never finished; build it again") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DatasetError(f"{folder / MANIFEST}: not a dataset's manifest ({error!r})") from error
    for name, expected in stated.items():
        path = folder / name
        if not path.is_file() or _sha256(path) != expected:
            raise DatasetError(f"{path}: missing or changed since it was written; build the dataset again")
    if content_hash != _content_hash(manifest["files"]):
        raise DatasetError(f"{folder / MANIFEST}: its content hash does not fit its files; build the dataset again")
    return Dataset(folder=folder, content_hash=content_hash, manifest=manifest)


def rows(path: Path) -> Iterator[JSON]:
    """The objects of a JSONL file, one a line."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def _train_row(record: Record) -> JSON:
    return {
        "id": record.id,
        "messages": [*record.messages, record.answer],
        "tools": record.tools,
        "tool": record.tool,
    }


def _test_row(record: Record) -> JSON:
    params = {key: value for key, value in record.request.items() if key not in ("messages", "tools")}
    return {
        "id": record.id,
        "messages": record.messages,
        "tools": record.tools,
        "tool": record.tool,
        "reference": record.answer,
        "params": params,
        "latency_ms": record.latency_ms,
        "cost_usd": record.cost_usd,
    }


def _case(row: JSON) -> Case:
    request = {**row["params"], "messages": row["messages"]}
    if row["tools"]:
        request["tools"] = row["tools"]
    return Case(
        id=row["id"],
        tool=row["tool"],
        request=request,
        reference=row["reference"],
        latency_ms=row["latency_ms"],
        cost_usd=row["cost_usd"],
    )


def _write(path: Path, lines: Iterable[JSON]) -> JSON:
    count = 0
    with path.open("wb") as out:
        for line in lines:
            out.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            count += 1
        out.flush()
        os.fsync(out.fileno())
    return {"rows": count, "sha256": _sha256(path)}


def _replace(path: Path, content: bytes) -> None:
    fresh = path.with_suffix(".tmp")
    with fresh.open("wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())
    fresh.replace(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _content_hash(files: Mapping[str, Mapping[str, Any]]) -> str:
    return hashlib.sha256("\n".join(files[name]["sha256"] for name in FILES).encode()).hexdigest()


def _ids(records: Sequence[Record]) -> list[str]:
    return sorted(record.id for record in records)
