"""The hot path, compiled: what is built, when it is used, what runs where it cannot be."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from gateway.compile import Build, build, remove
from gateway.compiled import GROUP, HOT, PROCESSES, ROOT, SUFFIX, built, digest, folder_of, sources
from gateway.errors import CannotCompile, ConfigError
from gateway.keyring import _Cache
from gateway.publish import Published
from routing.packed import _Packed
from routing.targets import Route
from tests.gateway.fakes import ok, upstream
from tests.gateway.served import CHAT, Served

NAMES = ("gateway.tiny",)
TINY = "def twice(number: int) -> int:\n    return number * 2\n"
ASK = f"""
import json, sys
from pathlib import Path
from gateway.compiled import activate, is_compiled
before = list(sys.meta_path)
active = activate(Path(sys.argv[1]), {NAMES})
if active:
    import gateway.errors, gateway.tiny
    print(json.dumps([is_compiled("gateway.tiny"), is_compiled("gateway.errors"), gateway.tiny.twice(21)]))
else:
    print(json.dumps(sys.meta_path == before))
"""

needs_cc = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here: apt-get install gcc libc6-dev")


def make_tree(root: Path, source: str = TINY) -> Path:
    """A tree like ours with one module to compile."""
    for package in ("gateway", "routing"):
        (root / package).mkdir(parents=True)
        (root / package / "__init__.py").touch()
    (root / "gateway" / "tiny.py").write_text(source)
    return root


def run(code: str, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Python in another process, with more in its environment."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={**os.environ, **more},
        capture_output=True,
        text=True,
        check=False,
    )


def understudy(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return run("from flywheel.cli import main; main()", *arguments, **more)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Build]]:
    """A tree that two compiled at once, beside the build of other sources and what a killed one left."""
    root = make_tree(tmp_path_factory.mktemp("tree"))
    for name in ("0123456789abcdef", "new", "old"):
        (folder_of(root) / name).mkdir(parents=True)
    with ThreadPoolExecutor(2) as pool:
        return root, list(pool.map(lambda _: build(root=root, names=NAMES), range(2)))


@pytest.fixture
def tree(made: tuple[Path, list[Build]], tmp_path: Path) -> Path:
    """A copy of the compiled tree, to be changed."""
    return shutil.copytree(made[0], tmp_path / "tree")


def test_the_digest_is_of_every_name_and_every_byte(tmp_path: Path) -> None:
    found = {"gateway/a.py": b"one", "gateway/b.py": b"two"}
    others = [
        {"gateway/a.py": b"one", "gateway/b.py": b"too"},
        {"gateway/a.py": b"onetwo", "gateway/b.py": b""},
        {"gateway/a.py": b"one", "gateway/c.py": b"two"},
        {"gateway/a.py": b"one"},
    ]
    assert len({digest(each) for each in (found, *others)}) == 5
    assert digest(found) == digest(dict(reversed(found.items())))
    root = make_tree(tmp_path)
    before = digest(sources(root))
    (root / "routing" / "more.py").touch()
    assert digest(sources(root)) != before


@needs_cc
def test_two_builds_at_once_make_one(made: tuple[Path, list[Build]]) -> None:
    root, builds = made
    assert sorted(each.seconds > 0 for each in builds) == [False, True]
    assert {each.folder for each in builds} == {built(root)}
    assert {path.name for path in folder_of(root).iterdir()} == {"lock", builds[0].folder.name}
    assert [path for path in folder_of(root).rglob("*") if path.stat().st_mode & 0o022] == []
    assert build(root=root, names=NAMES).seconds == 0


@needs_cc
def test_only_what_was_built_is_served(tree: Path) -> None:
    assert json.loads(run(ASK, str(tree)).stdout) == [True, False, 42]


@needs_cc
def test_a_traceback_shows_the_source(tree: Path) -> None:
    """Wherever it is run; one that is logged, as the interpreter itself looks for the file from where it runs."""
    code = f"""
import os, sys, traceback
from pathlib import Path
from gateway.compiled import activate
assert activate(Path(sys.argv[1]), {NAMES})
import gateway.tiny
os.chdir("/")
try:
    gateway.tiny.twice("no number")
except TypeError:
    traceback.print_exc()
"""
    said = run(code, str(tree)).stderr.splitlines()
    assert said[-3:-1] == ['  File "gateway/tiny.py", line 1, in twice', "    def twice(number: int) -> int:"]


@needs_cc
def test_an_edited_source_is_the_one_that_runs(tree: Path) -> None:
    (tree / "routing" / "other.py").write_text("LATER = True\n")
    assert json.loads(run(ASK, str(tree)).stdout) is True
    assert built(tree) is None


@needs_cc
def test_interpreted_where_that_is_asked_for(tree: Path) -> None:
    assert json.loads(run(ASK, str(tree), UNDERSTUDY_INTERPRETED="1").stdout) is True


@needs_cc
def test_a_damaged_build_is_told_of_and_not_used(tree: Path) -> None:
    folder = built(tree)
    assert folder is not None
    (folder / f"{GROUP}{SUFFIX}").write_bytes(b"no library")
    said = run(ASK, str(tree))
    assert json.loads(said.stdout) is True
    assert "cannot be loaded" in said.stderr


def test_too_late_is_an_error() -> None:
    said = run("import gateway.ids; from gateway.compiled import activate; activate()")
    assert "RuntimeError: gateway.ids: imported before" in said.stderr


@needs_cc
def test_a_killed_build_leaves_nothing(tmp_path: Path) -> None:
    root = make_tree(tmp_path)
    code = f"""
import sys
from pathlib import Path
from gateway.compile import build
build(root=Path(sys.argv[1]), names={NAMES}, progress=lambda text: print(text, flush=True))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(root)], cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"compiling 1 modules\n"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert built(root) is None
    assert remove(root) is False  # and nobody holds the lock


@needs_cc
def test_removed(tree: Path) -> None:
    assert remove(tree) is True
    assert built(tree) is None
    assert remove(tree) is False


@needs_cc
def test_a_build_that_fails_says_where_and_leaves_nothing(tmp_path: Path) -> None:
    root = make_tree(tmp_path, "def twice(number: int) -> int:\n    return number +\n")
    with pytest.raises(CannotCompile, match=r"gateway/tiny.py:2: error") as caught:
        build(root=root, names=NAMES)
    log = Path(str(caught.value).partition("see ")[2].partition(";")[0])
    assert "gateway/tiny.py:2" in log.read_text()
    log.unlink()
    assert built(root) is None


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    root = make_tree(tmp_path)
    folder_of(root).touch()
    with pytest.raises((ConfigError, CannotCompile), match="_compiled" if shutil.which("cc") else "C compiler"):
        build(root=root, names=NAMES)


def test_without_a_c_compiler_the_command_says_what_to_install() -> None:
    before = built()
    said = understudy("compile", "--force", CC="/no/such/cc")
    assert said.returncode == 2
    assert "apt-get install gcc" in said.stderr
    assert len(said.stderr.splitlines()) == 1
    assert built() == before


def test_contradictions_are_refused() -> None:
    said = understudy("compile", "--force", "--remove")
    assert (said.returncode, said.stderr) == (2, "understudy: --remove and --force: one or the other\n")


def test_the_runner_runs_the_gateway_s_processes_alone() -> None:
    said = run("from gateway.compiled import main; raise SystemExit(main(['json.tool']))")
    assert said.returncode == 2
    assert "usage" in said.stderr
    assert all(find_spec(name) for name in PROCESSES)


def test_every_hot_module_is_there_and_none_is_imported_too_early() -> None:
    found = sources()
    assert [name for name in HOT if name.replace(".", "/") + ".py" not in found] == []
    code = "import sys, gateway.compiled as c; print([name for name in c.HOT if name in sys.modules])"
    assert run(code).stdout == "[]\n"


def test_nothing_that_msgspec_decodes_is_compiled() -> None:
    """Of a native dataclass it cannot read the types."""
    seen = {
        kind.cls for root in (_Cache, Published, _Packed, Route) for kind in types_in(msgspec.inspect.type_info(root))
    }
    assert len(seen) > 5
    assert [cls for cls in seen if cls.__module__ in HOT] == []


def types_in(info: Any) -> Iterator[Any]:
    """The dataclasses and structs that a type is made of."""
    if hasattr(info, "cls") and hasattr(info, "fields"):
        yield info
    inner = [getattr(info, name, ()) for name in ("types", "item_types")]
    inner.append([getattr(info, name) for name in ("item_type", "key_type", "value_type") if hasattr(info, name)])
    inner.append([field.type for field in getattr(info, "fields", ())])
    for each in (each for group in inner for each in group):
        yield from types_in(each)


@pytest.fixture
def compiled() -> None:
    """The sources as they are have been compiled."""
    if built() is None:
        if os.environ.get("CI") and shutil.which("cc"):
            pytest.fail("there is a C compiler, and the hot path is not compiled: see what `understudy compile` says")
        pytest.skip("the hot path is not compiled: make compiled")


@pytest.mark.usefixtures("compiled")
def test_every_hot_module_can_be_imported_compiled() -> None:
    code = """
from importlib import import_module
from gateway.compiled import HOT, activate, is_compiled
assert activate()
for name in HOT:
    import_module(name)
print([name for name in HOT if not is_compiled(name)])
"""
    assert run(code).stdout == "[]\n"


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("interpreted", ["0", "1"])
async def test_a_gateway_runs_compiled_and_answers(
    served: Served, monkeypatch: pytest.MonkeyPatch, interpreted: str
) -> None:
    monkeypatch.setenv("UNDERSTUDY_INTERPRETED", interpreted)
    served.log = served.folder / "stderr"
    async with upstream(ok()) as fake, httpx.AsyncClient(timeout=10) as client:
        served.route_to(fake.url)
        await served.start()
        reply = await client.post(f"http://127.0.0.1:{served.port}{CHAT}", json={"model": "m", "messages": []})
        assert reply.status_code == 200
        assert await served.stop() == 0
    await served.ship_leftovers()
    (found,) = await served.logged()
    assert found.id == reply.headers["x-understudy-exchange-id"]
    started = [line for line in served.log.read_text().splitlines() if '"worker"' in line or "worker " in line]
    assert started, served.log.read_text()  # of one worker; the other may have had no time
    assert all(("true" in line.lower()) == (interpreted == "0") for line in started), started
