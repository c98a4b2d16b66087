"""understudy doctor: on a bare folder, on a sound one, and with each thing broken."""

import asyncio
import json
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flywheel.cli.doctor import app
from gateway.compiled import built
from gateway.keys import Keys
from migrations.upgrade import upgrade
from routing.tables import connect

ROOT = Path(__file__).parent.parent.parent

RULES = """\
models:
  prod: {{base_url: "http://127.0.0.1:{port}/v1", model: m}}
default: {{serve: prod}}
"""


@pytest.fixture
def upstream() -> Iterator[int]:
    """A port that accepts connections."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def folder(tmp_path: Path, upstream: int) -> Path:
    """A folder with settings and rules that a first start would find in order."""
    (tmp_path / "routing.yaml").write_text(RULES.format(port=upstream))
    settings = f"""
data_dir = "{tmp_path / "data"}"
routing_file = "{tmp_path / "routing.yaml"}"
[gateway]
port = 0
[models]
python = "{tmp_path / "no-models" / "python"}"
"""
    (tmp_path / "understudy.toml").write_text(settings)
    return tmp_path


def ask(folder: Path) -> tuple[int, dict[str, dict[str, str]]]:
    """Exit code, and the findings by what was checked."""
    result = CliRunner().invoke(app, ["--json", "--config", str(folder / "understudy.toml")])
    answer = json.loads(result.stdout)
    assert answer["ok"] == (result.exit_code == 0)
    return result.exit_code, {finding["check"]: finding for finding in answer["findings"]}


def change(folder: Path, setting: str) -> None:
    path = folder / "understudy.toml"
    path.write_text(setting + "\n" + path.read_text())


def test_a_sound_folder_lacks_nothing_that_is_required(folder: Path) -> None:
    code, found = ask(folder)
    assert code == 0
    assert found["routing rules"]["level"] == "ok"
    assert "1 models, 0 workloads" in found["routing rules"]["found"]
    assert found["upstream prod"]["level"] == "ok"
    assert found["data folder"]["level"] == "ok"
    assert found["database"]["level"] == "optional"
    assert "understudy db upgrade" in found["database"]["mend"]
    assert found["models' environment"]["level"] == "warning"
    assert "make models" in found["models' environment"]["mend"]
    assert not (folder / "data").exists()


def test_the_hot_path_is_compiled_or_could_be(folder: Path) -> None:
    _, found = ask(folder)
    finding = found["hot path"]
    if built() is None:
        assert (finding["level"], finding["found"]) == ("optional", "interpreted")
        assert "understudy compile" in finding["mend"]
    else:
        assert (finding["level"], finding["found"]) == ("ok", f"compiled: {built()}")


def test_every_finding_that_is_not_fine_says_how_to_mend_it(folder: Path) -> None:
    (folder / "routing.yaml").unlink()
    change(folder, 'database_url = "postgresql+asyncpg://nobody@127.0.0.1:1/none"')
    _, found = ask(folder)
    assert [
        name for name, finding in found.items() if finding["level"] in ("warning", "missing") and not finding["mend"]
    ] == []


def test_missing_rules_are_required(folder: Path) -> None:
    (folder / "routing.yaml").unlink()
    code, found = ask(folder)
    assert code == 1
    assert found["routing rules"]["level"] == "missing"
    assert "routing.example.yaml" in found["routing rules"]["mend"]


def test_wrong_rules_name_line_and_key(folder: Path) -> None:
    path = folder / "routing.yaml"
    path.write_text(path.read_text() + "defautl: {serve: prod}\n")
    code, found = ask(folder)
    assert code == 1
    assert "routing.yaml:4" in found["routing rules"]["found"]
    assert "defautl" in found["routing rules"]["found"]


def test_a_dead_upstream_is_a_warning(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    (folder / "routing.yaml").write_text(RULES.format(port=port))
    code, found = ask(folder)
    assert code == 0
    assert found["upstream prod"]["level"] == "warning"
    assert f"127.0.0.1:{port} does not answer" in found["upstream prod"]["found"]


def test_a_database_without_tables_wants_an_upgrade(folder: Path) -> None:
    (folder / "data").mkdir()
    sqlite3.connect(folder / "data" / "control.db").execute("CREATE TABLE other (x)").connection.close()
    code, found = ask(folder)
    assert code == 1
    assert found["database"]["level"] == "missing"
    assert found["database"]["mend"] == "understudy db upgrade"


def test_an_upgraded_database_is_fine(folder: Path) -> None:
    asyncio.run(upgrade(f"sqlite+aiosqlite:///{folder / 'data' / 'control.db'}"))
    code, found = ask(folder)
    assert code == 0
    assert found["database"]["level"] == "ok"


def test_clients_keys(folder: Path) -> None:
    """Off on loopback; where they are asked for, there should be one; a gateway that is open to all is told."""
    _, found = ask(folder)
    assert (found["client keys"]["level"], found["client keys"]["found"][:11]) == ("ok", "auth is off")
    config = folder / "understudy.toml"
    config.write_text(config.read_text().replace("[gateway]", '[gateway]\nauth = "on"'))
    code, found = ask(folder)
    assert (code, found["client keys"]["level"]) == (0, "warning")
    assert "understudy keys create" in found["client keys"]["mend"]
    url = f"sqlite+aiosqlite:///{folder / 'data' / 'control.db'}"
    asyncio.run(upgrade(url))
    assert "0 of 0" in ask(folder)[1]["client keys"]["found"]
    asyncio.run(make_key(url))
    _, found = ask(folder)
    assert (found["client keys"]["level"], found["client keys"]["found"]) == (
        "ok",
        "auth is on, 1 of 1 keys can be used",
    )
    config.write_text(config.read_text().replace('auth = "on"', 'auth = "off"\nhost = "0.0.0.0"'))
    _, found = ask(folder)
    assert found["client keys"]["level"] == "warning"
    assert "anybody who reaches it" in found["client keys"]["found"]


async def make_key(url: str) -> None:
    engine = connect(url)
    await Keys(engine).create(who="ann", now=0.0)
    await engine.dispose()


@pytest.mark.postgres
def test_postgres_is_asked_too(folder: Path, postgres_server: Any) -> None:
    postgres_server.psql("CREATE DATABASE doctor")
    url = postgres_server.url("doctor")
    change(folder, f'database_url = "{url}"')
    assert ask(folder)[1]["database"]["level"] == "missing"
    asyncio.run(upgrade(url))
    assert ask(folder)[1]["database"]["level"] == "ok"


def test_a_database_that_does_not_answer_is_missing_and_its_password_is_not_shown(folder: Path) -> None:
    change(folder, 'database_url = "postgresql+asyncpg://me:secret@127.0.0.1:1/none"')
    code, found = ask(folder)
    assert code == 1
    assert found["database"]["level"] == "missing"
    assert "secret" not in json.dumps(found)


def test_a_wrong_setting_is_named_and_ends_the_checks(folder: Path) -> None:
    change(folder, "colour = 3")
    code, found = ask(folder)
    assert code == 1
    assert "colour" in found["settings"]["found"]
    assert list(found) == ["Python", "settings"]


def test_a_log_store_of_an_unknown_kind_is_missing(folder: Path) -> None:
    change(folder, 'log_store_url = "carrier-pigeon:///loft"')
    code, found = ask(folder)
    assert code == 1
    assert "carrier-pigeon" in found["log store"]["found"]


@pytest.mark.parametrize(
    ("setting", "check", "package", "extra"),
    [
        (
            'log_store_url = "elasticsearch+http://me:secret@127.0.0.1:1/"',
            "log store",
            "elasticsearch",
            "elasticsearch",
        ),
        ('log_sinks = ["memory://me:secret@place"]', "log sink 1", "pyarrow", "sinks"),
    ],
)
def test_a_part_that_is_not_installed_is_named_with_how_to_get_it(
    folder: Path, setting: str, check: str, package: str, extra: str
) -> None:
    change(folder, setting)
    code = f"import sys; sys.modules['{package}'] = None; from flywheel.cli import main; main()"
    command = [sys.executable, "-c", code, "doctor", "--json", "--config", str(folder / "understudy.toml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    (finding,) = [each for each in json.loads(done.stdout)["findings"] if each["check"] == check]
    assert done.returncode == 1
    assert finding["level"] == "missing"
    assert f"pip install 'understudy[{extra}]'" in finding["mend"]
    assert "secret" not in done.stdout + done.stderr


def test_an_elasticsearch_that_is_not_there_is_missing(folder: Path) -> None:
    change(folder, 'log_store_url = "elasticsearch+http://me:secret@127.0.0.1:1/"\nlog_sinks = ["memory://place"]')
    _, found = ask(folder)
    assert found["log store"]["level"] == "missing"
    assert "start it" in found["log store"]["mend"]
    assert found["log sink 1"]["level"] == "ok"
    assert "secret" not in json.dumps(found)


@pytest.mark.elasticsearch
def test_elasticsearch_is_asked_too(folder: Path, elasticsearch_url: str) -> None:
    change(folder, f'log_store_url = "{elasticsearch_url}"')
    assert ask(folder)[1]["log store"] == {
        "check": "log store",
        "level": "ok",
        "found": "0 exchanges, 0 mirrors",
        "mend": "",
    }


def test_a_data_folder_that_is_a_file_is_missing(folder: Path) -> None:
    (folder / "data").write_text("")
    code, found = ask(folder)
    assert code == 1
    assert found["data folder"]["level"] == "missing"


def test_a_port_in_use_is_a_warning(folder: Path, upstream: int) -> None:
    path = folder / "understudy.toml"
    path.write_text(path.read_text().replace("port = 0", f"port = {upstream}"))
    code, found = ask(folder)
    assert code == 0
    assert found["gateway's port"]["level"] == "warning"


def test_an_environment_without_model_libraries_says_which(folder: Path) -> None:
    path = folder / "understudy.toml"
    path.write_text(path.read_text().replace(str(folder / "no-models" / "python"), sys.executable))
    _, found = ask(folder)
    assert "no peft, no torch" in found["models' environment"]["found"]


@pytest.mark.models
@pytest.mark.skipif(not (ROOT / ".models" / "bin" / "python").exists(), reason="no .models here: make models")
def test_the_models_environment_has_one_of_each(folder: Path) -> None:
    path = folder / "understudy.toml"
    path.write_text(path.read_text().replace(str(folder / "no-models" / "python"), str(ROOT / ".models/bin/python")))
    _, found = ask(folder)
    assert found["models' environment"]["level"] == "ok"
    assert "torch" in found["models' environment"]["found"]


def test_people_get_lines_and_help_gives_an_example(folder: Path) -> None:
    text = CliRunner().invoke(app, ["--config", str(folder / "understudy.toml")]).stdout
    assert "routing rules" in text
    assert "make models" in text
    assert "Example: understudy doctor" in CliRunner().invoke(app, ["--help"]).stdout


def test_the_command_line_knows_it(folder: Path) -> None:
    command = [sys.executable, "-m", "flywheel.cli", "doctor", "--json"]
    done = subprocess.run(
        [*command, "--config", str(folder / "understudy.toml")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ok"]
