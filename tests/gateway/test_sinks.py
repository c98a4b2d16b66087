"""File sinks: what is written reads back whole, by day, once; and no half file is ever seen."""

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import fsspec
import orjson
import pyarrow.dataset
import pyarrow.parquet
import pytest

from gateway.config import Settings
from gateway.errors import ConfigError, RecordsRefused, StoreError
from gateway.ids import id_at
from gateway.logstore.document import from_document
from gateway.records import Exchange, Usage
from gateway.sinks import open_sink
from tests.gateway.test_logstore import FULL

ROOT = Path(__file__).parent.parent.parent
FORMATS = ("parquet", "jsonl")
DAY = 86_400


def exchange(n: int, **more: object) -> Exchange:
    values: dict[str, Any] = {"id": id_at(n * 1000, n.to_bytes(10, "big")), "timestamp": float(n), "workload_id": "w"}
    return Exchange(**values | more)


def of_row(row: dict[str, Any]) -> Exchange:
    """An exchange of a Parquet file's row, as a reader would put it together."""
    read, written = row.pop("input_tokens"), row.pop("output_tokens")
    bodies = {name: row[name] and orjson.loads(row[name]) for name in ("request", "response", "redacted")}
    usage = None if read is None else {"input_tokens": read, "output_tokens": written}
    return from_document(row | bodies | {"usage": usage})


def read(path: Path) -> list[Exchange]:
    if path.suffix == ".parquet":
        return [of_row(row) for row in pyarrow.parquet.read_table(path, partitioning=None).to_pylist()]
    return [from_document(orjson.loads(line)) for line in path.read_bytes().splitlines()]


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("format", FORMATS)
async def test_every_field_comes_back(tmp_path: Path, format: str) -> None:
    """Set and unset, nested bodies, sub-second times, numbers that floats hold exactly."""
    sent = [
        FULL,
        exchange(2, timestamp=2.1234567),
        exchange(3, request={}, response={"f": [0.1, 1e22], "n": 2**64 - 1, "": None}, cost_usd=0.0, ttft_ms=0.25),
    ]
    await open_sink(f"file://{tmp_path}?format={format}").write("batch", sent)
    (name,) = files(tmp_path)
    assert name == f"day=1970-01-01/batch.{format}"
    assert read(tmp_path / name) == sent


async def test_parquet_has_a_column_of_one_type_for_each_field(tmp_path: Path) -> None:
    """Whatever the batch holds, so that many files are one data set; bodies as JSON text, tokens as two numbers."""
    sink = open_sink(f"file://{tmp_path}")
    await sink.write("empty-fields", [exchange(1)])
    await sink.write("all-fields", [FULL])
    one, other = (pyarrow.parquet.read_schema(tmp_path / name) for name in files(tmp_path))
    assert one.equals(other)
    assert set(one.names) == set(asdict(FULL)) - {"usage"} | {"input_tokens", "output_tokens"}
    table = pyarrow.dataset.dataset(tmp_path, partitioning="hive").to_table()
    assert (table.num_rows, set(table["day"].to_pylist())) == (2, {"1970-01-01"})


@pytest.mark.parametrize("format", FORMATS)
async def test_a_batch_is_split_by_the_ids_days(tmp_path: Path, format: str) -> None:
    """Not by the timestamps, which a caller may have set."""
    sent = [exchange(n, timestamp=0.0) for n in (DAY - 1, DAY, 3 * DAY)]
    await open_sink(f"file://{tmp_path}?format={format}").write("b", sent)
    assert files(tmp_path) == [f"day=1970-01-0{day}/b.{format}" for day in (1, 2, 4)]
    assert [read(tmp_path / name)[0].id for name in files(tmp_path)] == [each.id for each in sent]
    await open_sink(f"file://{tmp_path}?format={format}").write("nothing", [])
    assert len(files(tmp_path)) == 3


@pytest.mark.parametrize("format", FORMATS)
async def test_the_same_name_again_replaces_the_file(tmp_path: Path, format: str) -> None:
    sink = open_sink(f"file://{tmp_path}?format={format}")
    for count in (100, 100, 3):
        await sink.write("b", [exchange(n) for n in range(count)])
        (name,) = files(tmp_path)
        assert len(read(tmp_path / name)) == count


@pytest.mark.parametrize("format", FORMATS)
async def test_memory(format: str) -> None:
    """As object stores: one put, no renaming."""
    await open_sink(f"memory://bucket/log-{format}?format={format}").write("b", [FULL])
    system = fsspec.filesystem("memory")
    assert system.find(f"/bucket/log-{format}") == [f"/bucket/log-{format}/day=1970-01-01/b.{format}"]


def test_a_crash_before_the_rename_leaves_no_half_file(tmp_path: Path) -> None:
    """The next try of the same batch takes the left-over up; readers of the folder never saw it."""
    code = f"""
import asyncio, os, fsspec
from fsspec.implementations.local import LocalFileSystem
from gateway.sinks import open_sink
from tests.gateway.test_sinks import exchange

class Dying(LocalFileSystem):
    protocol = ("dying", "file")
    def mv(self, *paths, **more):
        os._exit(9)

fsspec.register_implementation("dying", Dying)
asyncio.run(open_sink("dying://{tmp_path}").write("b", [exchange(1)]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 9, done.stderr
    assert files(tmp_path) == ["day=1970-01-01/.b.parquet.part"]
    assert pyarrow.dataset.dataset(tmp_path, partitioning="hive").files == []


async def test_what_a_crash_left_is_taken_up(tmp_path: Path) -> None:
    left = tmp_path / "day=1970-01-01" / ".b.jsonl.part"
    left.parent.mkdir()
    left.write_bytes(b"half of a fi")
    await open_sink(f"file://{tmp_path}?format=jsonl").write("b", [exchange(1)])
    assert files(tmp_path) == ["day=1970-01-01/b.jsonl"]


@pytest.mark.parametrize(
    ("format", "bad"),
    [
        ("parquet", exchange(2, usage=Usage(input_tokens=2**63))),
        ("parquet", exchange(2, error="\ud800")),
        ("jsonl", exchange(2, error="\ud800")),
        ("parquet", exchange(2, id="nobody")),
        ("jsonl", exchange(2, id="ffffffff-ffff-7000-8000-000000000000")),
    ],
)
async def test_what_a_file_cannot_hold_is_named_and_the_rest_is_written(
    tmp_path: Path, format: str, bad: Exchange
) -> None:
    sink = open_sink(f"file://{tmp_path}?format={format}")
    with pytest.raises(RecordsRefused) as caught:
        await sink.write("b", [exchange(1), bad, exchange(3)])
    assert list(caught.value.reasons) == [bad.id]
    (name,) = files(tmp_path)
    assert read(tmp_path / name) == [exchange(1), exchange(3)]
    with pytest.raises(RecordsRefused):
        await sink.write("alone", [bad])
    assert files(tmp_path) == [name]


async def test_a_place_that_cannot_be_written_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"file:///.*file") as caught:
        await open_sink(f"file://{tmp_path}/file").write("b", [exchange(1)])
    assert not isinstance(caught.value, RecordsRefused)
    with pytest.raises(StoreError) as caught:
        await open_sink("ftp://me:secret@127.0.0.1:1/place").write("b", [exchange(1)])
    assert "secret" not in str(caught.value)
    with pytest.raises(ValueError, match="slash"):
        await open_sink(f"file://{tmp_path}").write("../b", [exchange(1)])


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("carrier-pigeon://me:secret@loft", "carrier-pigeon"),
        ("/plain/path", "SCHEME://PLACE"),
        ("file:///x?format=xml&key=secret", "format=parquet"),
        ("file:///x?key=secret", "no other option"),
    ],
)
def test_urls_that_cannot_be_used(url: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        open_sink(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("missing", ["pyarrow", "fsspec"])
def test_without_the_extra_the_error_says_how_to_install_it(missing: str) -> None:
    code = f"""
import sys
sys.modules["{missing}"] = None
import gateway.app, gateway.sinks
from gateway.errors import MissingExtra
try:
    gateway.sinks.open_sink("memory://x")
except MissingExtra as error:
    sys.exit(str(error))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "pip install 'understudy[sinks]'" in done.stderr


def test_sinks_are_a_setting(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, log_sinks=("memory://a", "file:///b?format=jsonl"))
    assert [type(open_sink(url)).__name__ for url in settings.log_sinks] == ["FileSink", "FileSink"]


@pytest.mark.parametrize("format", FORMATS)
async def test_a_client_is_forgotten_in_every_file(tmp_path: Path, format: str) -> None:
    """Files of others stay as they are, bit for bit; one that held nothing else goes."""
    sink = open_sink(f"file://{tmp_path}?format={format}")
    ada, bob = (exchange(n, client_id=name, request={"said": f"{name} said"}) for n, name in ((1, "ada"), (2, "bob")))
    later = exchange(DAY + 1, client_id="ada")
    for name, batch in (("both", [ada, bob]), ("alone", [ada]), ("other", [bob]), ("later", [later])):
        await sink.write(name, batch)
    untouched = (tmp_path / f"day=1970-01-01/other.{format}").read_bytes()
    assert await sink.forget("ada") == 3
    assert files(tmp_path) == [f"day=1970-01-01/both.{format}", f"day=1970-01-01/other.{format}"]
    assert read(tmp_path / f"day=1970-01-01/both.{format}") == [bob]
    assert (tmp_path / f"day=1970-01-01/other.{format}").read_bytes() == untouched
    assert await sink.forget("ada") == 0
    await sink.write("alone", [ada])
    assert await sink.forget("ada") == 1


async def test_whole_days_are_dropped() -> None:
    """Also in an object store; the day that is not over stays."""
    sink = open_sink("memory://retention")
    await sink.write("batch", [exchange(n * DAY + 5) for n in range(3)])
    assert await sink.expire(2.5 * DAY) == 2
    assert await sink.expire(2.5 * DAY) == 0
    assert await sink.forget("nobody") == 0
    assert [path.split("/")[-2] for path in fsspec.filesystem("memory").find("/retention")] == ["day=1970-01-03"]
