"""`understudy logs` as a person uses it: what it says, its exit codes, its files, its JSON."""

import asyncio
import fcntl
import io
import json
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from flywheel.cli.logs import app
from flywheel.cli.logs_export import write
from flywheel.cli.logs_follow import LOOK_BACK_SECONDS, Follower
from flywheel.cli.logs_import import numbered
from flywheel.cli.output import Progress
from gateway.config import SpoolSettings, environment, load_settings
from gateway.errors import UnderstudyError
from gateway.ids import id_at, new_id
from gateway.logstore import Query
from gateway.logstore.open import open_log_store
from gateway.logstore.sqlite import SqliteLogStore
from gateway.records import Arm, Attempt, Exchange, Outcome, Usage
from gateway.ship import Shipper, StoreReader
from gateway.spool import Spool
from gateway.telemetry import Metrics

AT = 1_763_712_000


def exchange(n: int, **more: Any) -> Exchange:
    made = {
        "id": id_at((AT + n) * 1000, n.to_bytes(10, "big")),
        "timestamp": float(AT + n),
        "workload_id": "desk",
        "client_id": "web",
        "model": "prod",
        "status": 200,
        "request": {"messages": [{"role": "user", "content": f"question {n}"}]},
        "response": {"choices": [{"message": {"role": "assistant", "content": f"answer {n}"}}]},
    }
    return Exchange(**(made | more))


def blueprint(n: int, **more: Any) -> dict[str, Any]:
    whole = exchange(n)
    five = {name: getattr(whole, name) for name in ("workload_id", "client_id", "request", "response")}
    return {"timestamp": AT + n, **five, **more}


class Nowhere(io.BytesIO):
    """Takes everything and keeps nothing."""

    def write(self, data: Any) -> int:
        return len(data)


class Logs:
    """The group, run against one installation."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "understudy.toml"
        self.config.write_text(f'data_dir = "{folder}/data"\nrouting_file = "{folder}/routing.yaml"\n')
        self.settings = load_settings(self.config)
        self.database = folder / "data" / "log.db"

    def __call__(self, *arguments: str, given: str | None = None) -> Result:
        return CliRunner().invoke(app, [*arguments, "--config", str(self.config)], input=given)

    def process(self, *arguments: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "flywheel.cli", "logs", *arguments, "--config", str(self.config)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def append(self, *exchanges: Exchange) -> None:
        async def run() -> None:
            store = open_log_store(self.settings.log_store)
            await store.append(exchanges)
            await store.close()

        asyncio.run(run())

    def file(self, lines: Sequence[object], name: str = "in.jsonl") -> Path:
        path = self.folder / name
        path.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in lines))
        return path

    def stored(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self("export", "--kind", "any").stdout.splitlines()]


@pytest.fixture
def logs(tmp_path: Path) -> Logs:
    return Logs(tmp_path)


def test_three_forms_come_in_and_twice_is_once(logs: Logs) -> None:
    bare = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    own = json.loads(json.dumps(blueprint(7))) | {"id": exchange(7).id, "outcome": "timeout", "latency_ms": 5}
    path = logs.file([blueprint(1), "", own, bare, bare])
    options = ("import", str(path), "--workload", "chat", "--timestamp", "2025-11-21T09:00:00Z")
    assert logs(*options).stdout == "4 imported, 0 already there, 0 wrong\n"
    assert json.loads(logs(*options, "--json").stdout)["already_there"] == 4
    found = logs.stored()
    assert [each["workload_id"] for each in found] == ["desk", "desk", "chat", "chat"]
    assert found[1]["id"] == exchange(7).id
    assert [each["timestamp"] for each in found[2:]] == [AT + 3600.004, AT + 3600.005]


def test_lines_from_stdin_and_from_files_that_say_no_time(logs: Logs) -> None:
    bare = json.dumps({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]})
    wrong = logs("import", "-", "--workload", "w", given=bare + "\n")
    assert (wrong.exit_code, wrong.stderr.count("stdin:1: timestamp: missing")) == (1, 1)
    path = logs.file([bare])
    assert logs("import", str(path), "--workload", "w").exit_code == 0
    assert int(logs.stored()[0]["timestamp"]) == int(path.stat().st_mtime)


def test_a_wrong_line_is_told_and_costs_no_other(logs: Logs) -> None:
    path = logs.file([blueprint(1, latency=3), "{", blueprint(2), blueprint(3, client_id=5)])
    result = logs("import", str(path), "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout) == {
        "lines": 4, "right": 2, "wrong": 2, "imported": 2, "already_there": 0, "feedback": 0,
        "ignored": {"latency": 1},
    }  # fmt: skip
    told = result.stderr.splitlines()
    assert told[0].startswith(f"{path}:2: no JSON")
    assert told[1] == f"{path}:4: client_id: expected `str`, got `int`"
    assert len(logs.stored()) == 2


def test_strict_stores_no_batch_with_a_wrong_line_and_a_dry_run_none(logs: Logs) -> None:
    path = logs.file([*(blueprint(n) for n in range(501)), "{", blueprint(900)])
    dry = logs("import", str(path), "--dry-run")
    assert (dry.stdout, dry.exit_code) == ("502 right, 1 wrong\n", 1)
    assert not logs.database.exists()
    strict = logs("import", str(path), "--strict", "--json")
    assert (json.loads(strict.stdout)["imported"], strict.exit_code) == (500, 1)
    assert len(logs.stored()) == 500


def test_a_line_that_is_too_long_is_passed_over() -> None:
    file = io.BytesIO(b"\xef\xbb\xbfone\n" + b"x" * 35 + b"\n\n" + b"y" * 10 + b"\nlast")
    assert list(numbered(file, 10)) == [(1, b"one\n"), (2, b"x" * 11), (4, b"y" * 10 + b"\n"), (5, b"last")]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["import", "nowhere.jsonl"], "nowhere.jsonl: No such file"),
        (["import", "."], ".: Is a directory"),
        (["import", "-", "--timestamp", "soon"], "--timestamp: no time: 'soon'"),
        (["tail", "--since", "yesterday"], "--since: no time: 'yesterday'"),
        (["tail", "--follow", "--until", "2h"], "--follow has no end"),
        (["export", "--since", "1h", "--until", "2h"], "--since 1h is not before --until 2h"),
        (["export", "-o", "/nowhere/out.jsonl"], "/nowhere/out.jsonl: cannot be written: No such file"),
        (["export", "--format", "messages", "--outcome", "timeout"], "only exchanges that ended ok"),
        (["export", "--format", "blueprint", "--with-feedback"], "no place for feedback"),
        (["tail", "--follow", "--feedback", "up"], "feedback comes later"),
    ],
)
def test_bad_input_is_told(logs: Logs, arguments: list[str], told: str) -> None:
    result = logs(*arguments)
    assert isinstance(result.exception, UnderstudyError)  # the root command makes one line and exit code 2 of it
    assert told in str(result.exception)


def test_the_root_command_says_it_in_one_line(logs: Logs) -> None:
    process = logs.process("tail", "--since", "yesterday")
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("understudy: --since: no time")


@pytest.mark.parametrize("command", ["tail", "show", "export", "import", "stats", "ship"])
def test_every_command_shows_an_example(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"])
    assert f"understudy logs {command}" in result.stdout.split("Example:")[1]


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ([], [1, 2, 3, 4]),
        (["-n", "2"], [1, 2]),
        (["--workload", "desk"], [1, 3, 4]),
        (["--client", "app"], [3]),
        (["--model", "prod"], [1, 2, 3]),
        (["--outcome", "timeout"], [2]),
        (["--rollout", "r1"], [4]),
        (["--rollout", "r1", "--kind", "any"], [4, 5]),
        (["--kind", "mirror"], [5]),
        (["--since", str(AT + 3)], [3, 4]),
        (["--since", "2025-11-21T08:00:02Z", "--until", str(AT + 4)], [2, 3]),
    ],
)
def test_filters(logs: Logs, options: list[str], wanted: list[int]) -> None:
    logs.append(
        exchange(1),
        exchange(2, workload_id="other", outcome=Outcome.TIMEOUT),
        exchange(3, client_id="app"),
        exchange(4, model="small:a", rollout="r1"),
        exchange(5, rollout="r1", arm=Arm.MIRROR),
    )
    exported = [json.loads(line) for line in logs("export", *options).stdout.splitlines()]
    assert [each["timestamp"] - AT for each in exported] == wanted
    newest = [json.loads(line) for line in logs("tail", "--json", *options).stdout.splitlines()]
    assert newest == exported[::-1] if "-n" not in options else len(newest) == 2


def test_since_counts_back_from_now(logs: Logs) -> None:
    now = time.time()
    logs.append(*(exchange(n, timestamp=now - hours * 3600) for n, hours in enumerate((50, 5, 1))))
    assert len(logs("tail", "--since", "2h").stdout.splitlines()) == 1
    assert len(logs("tail", "--since", "2d", "--until", "30m").stdout.splitlines()) == 2


def test_show_is_for_reading(logs: Logs) -> None:
    call = {"type": "function", "function": {"name": "play", "arguments": '{"song": 1}'}}
    shown = exchange(
        1,
        request={
            "messages": [{"role": "user", "content": "turn \x1b[31mred"}],
            "tools": [{"type": "function", "function": {"name": "play"}}],
        },
        response={"choices": [{"message": {"role": "assistant", "content": None, "tool_calls": [call]}}]},
        usage=Usage(input_tokens=3, output_tokens=4),
        attempts=(Attempt(model="small", arm="candidate", error="no connection"),),
    )
    logs.append(shown)
    text = logs("show", shown.id).stdout
    for part in ("prod (incumbent)", "turn \\x1b[31mred", 'calls play({"song": 1})', "3 in, 4 out", "no connection"):
        assert part in text
    assert json.loads(logs("show", shown.id, "--json").stdout)["id"] == shown.id
    missing = logs("show", "nobody")
    assert (missing.exit_code, missing.stdout, missing.stderr.count("\n")) == (1, "", 1)


def test_export_and_import_between_two_installations(logs: Logs, tmp_path: Path) -> None:
    logs.append(*(exchange(n) for n in range(20)), exchange(30, response=None, outcome=Outcome.CLIENT_GONE))
    (tmp_path / "second").mkdir()
    second = Logs(tmp_path / "second")
    out = tmp_path / "out.jsonl"
    assert logs("export", "-o", str(out)).stderr == f"{out}: 21 exchanges\n"
    assert second("import", str(out)).stdout == "21 imported, 0 already there, 0 wrong\n"
    assert second.stored() == logs.stored()
    five = logs("export", "--format", "blueprint")
    assert [json.loads(line) for line in five.stdout.splitlines()] == [blueprint(n) for n in range(20)]
    assert "left out, for they lack a request or an answer: 1" in five.stderr
    messages = logs("export", "--format", "messages", "-n", "1").stdout
    roles = [message["role"] for message in json.loads(messages)["messages"]]
    assert roles == ["user", "assistant"]


def test_a_file_is_replaced_when_the_export_is_whole(logs: Logs, tmp_path: Path) -> None:
    """A store that fails leaves what stood there, and nothing beside it."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "log.jsonl").write_text("old")
    logs.database.parent.mkdir()
    logs.database.write_text("no database, and long enough to be seen as none" * 100)
    assert "not a database" in str(logs("export", "-o", str(folder / "log.jsonl")).exception)
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [("log.jsonl", "old")]
    assert logs("export", "-o", "/dev/null").exception is not None
    assert not Path("/dev/null").is_file()


def test_a_reader_that_leaves_ends_it_quietly(logs: Logs) -> None:
    logs.append(*(exchange(n) for n in range(3000)))
    process = logs.process("export")
    assert process.stdout is not None
    assert process.stderr is not None
    assert json.loads(process.stdout.readline())["timestamp"] == AT
    process.stdout.close()
    assert process.wait(30) == 0
    assert process.stderr.read() == ""
    process.stderr.close()


async def test_export_takes_constant_memory(tmp_path: Path) -> None:
    """Ten times the exchanges, the same peak."""
    store = SqliteLogStore(tmp_path / "log.db")
    for start in range(0, 20_000, 1000):
        await store.append([exchange(n) for n in range(start, start + 1000)])
    peaks = []
    for limit in (2_000, 20_000):
        tracemalloc.start()
        assert await write(store, Query(limit=limit), "exchanges", Nowhere(), Progress()) == (limit, 0)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    await store.close()
    assert peaks[1] < peaks[0] * 1.2 + 100_000


async def test_what_arrives_late_is_followed_too(tmp_path: Path) -> None:
    """The clock turns far enough for a look back; nothing comes twice."""
    now = time.monotonic()
    turned = [now]
    store = SqliteLogStore(tmp_path / "log.db")
    await store.append([exchange(n) for n in range(10)])
    follower = Follower(store, Query(), clock=lambda: turned[0])
    assert [each.timestamp - AT for each in await follower.begin(3, AT + 10.0)] == [7, 8, 9]

    async def fresh() -> list[float]:
        return [each.timestamp - AT async for each in follower.fresh()]

    await store.append([exchange(20)])
    assert await fresh() == [20]
    await store.append([exchange(15), exchange(21)])
    assert await fresh() == [21]
    turned[0] += LOOK_BACK_SECONDS
    assert await fresh() == [15]
    turned[0] += LOOK_BACK_SECONDS * 10
    assert await fresh() == []
    await store.close()


def test_follow_waits_for_a_store_that_is_away_and_ends_with_ctrl_c(logs: Logs) -> None:
    logs.append(exchange(1))
    ready = logs.database.read_bytes()
    logs.database.write_bytes(b"no database at all, for a while." * 64)
    process = logs.process("tail", "--follow", "--json")
    assert process.stdout is not None
    assert process.stderr is not None
    assert "the log store is away" in process.stderr.readline()
    logs.database.write_bytes(ready)
    assert json.loads(process.stdout.readline())["id"] == exchange(1).id
    logs.append(fresh := replace(exchange(2), id=new_id()))
    assert json.loads(process.stdout.readline())["id"] == fresh.id
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    assert err.splitlines() == ["understudy: the log store is back"]


@pytest.fixture
def spooled(logs: Logs) -> Logs:
    """Three exchanges in the spool of a gateway that is gone, which counted them, and one that it had to drop."""
    spool = Spool(logs.settings.spool_dir, SpoolSettings(), Metrics())
    for _ in range(3):
        header = {"id": new_id(), "timestamp": 1.0, "workload_id": "desk", "arm": "incumbent", "outcome": "ok"}
        spool.append(header | {"status": 200}, b"{}", [])
    spool.close()
    folder = logs.settings.run_dir / "metrics"
    folder.mkdir(parents=True)
    code = "from gateway.telemetry import Metrics; m = Metrics(); m.spooled(3); m.dropped('disk_full'); "
    code += "m.untagged(); [m.exchange('default', 'incumbent', 'ok', 0.1, 0.1) for _ in range(4)]; m.flush()"
    env = dict(environment()) | {"PROMETHEUS_MULTIPROC_DIR": str(folder)}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)
    return logs


def test_stats_before_anything_ran(logs: Logs) -> None:
    found = json.loads(logs("stats", "--json").stdout)
    assert found["counts"] == {"live": 0, "mirrors": 0, "by_outcome": {}, "workloads": {}}
    assert (found["gateway"], found["shipper"], found["parity"]) == (None, None, None)
    assert "parity: cannot be told" in logs("stats").stdout


def test_stats_account_for_every_exchange(spooled: Logs) -> None:
    """What was spooled is open until the shipper has stored it."""
    waiting = json.loads(spooled("stats", "--json").stdout)
    told = {"calls": 4, "untagged": 1, "spooled": 3, "feedback": 0, "dropped": {"disk_full": 1}}
    assert waiting["gateway"] == told
    assert waiting["spool"]["segments"] == 1
    assert waiting["parity"] is None

    async def ship() -> None:
        store = open_log_store(spooled.settings.log_store)
        stop = asyncio.Event()
        stop.set()
        await Shipper(spooled.settings, [StoreReader(store, 500)]).run(stop)
        await store.close()

    asyncio.run(ship())
    spooled.append(exchange(1, outcome=Outcome.TIMEOUT), exchange(2, arm=Arm.MIRROR))
    done = json.loads(spooled("stats", "--json").stdout)
    assert done["parity"] == {"spooled": 3, "stored": 3, "quarantined": 0, "open": 0, "holds": True}
    assert done["counts"]["by_outcome"] == {"ok": 3, "timeout": 1}
    text = spooled("stats", "--workload", "desk").stdout
    assert "desk      4          3   1        1" in text
    assert "3 spooled, 3 stored, 0 quarantined: holds" in text


def test_stats_tell_what_waits_while_the_store_is_away(spooled: Logs) -> None:
    spooled.database.write_bytes(b"no database at all, for a while." * 64)
    result = spooled("stats")
    assert result.exit_code == 2
    assert "the log store is away" in result.stderr
    assert "gateway: 3 spooled since its start; dropped: disk_full 1" in result.stdout
    assert "untagged: 1 of 4 calls (25.0%) that no name, rule or key placed" in result.stdout
    process = spooled.process("ship", "--once")
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err.count("\n")) == (2, 1)


def test_ship_alone_waits_for_another_shipper_and_empties_the_spool(spooled: Logs) -> None:
    with (spooled.settings.spool_dir / "ship.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = spooled.process("ship", "--once")
        assert process.stderr is not None
        assert "another shipper" in process.stderr.readline()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert len(spooled.stored()) == 3
    assert list(spooled.settings.spool_dir.glob("*/*.seg")) == []
