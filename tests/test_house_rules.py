"""House rules that a formatter and a type checker don't hold: sizes, names, fences, layout, what an import loads."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("gateway", "routing", "flywheel", "migrations")
FOLDERS = {*PACKAGES, "deploy", "tests"}
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "common", "manager", "base", "misc"}
HEAVY = {"torch", "vllm", "peft", "transformers", "litellm", "apscheduler", "grpc", "requests"}
REGISTRIES = [  # in two halves, so that this file passes its own test
    ".".join(halves)
    for halves in (
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("download.pytorch", "org"),
        ("npmjs", "org"),
        ("npmjs", "com"),
        ("crates", "io"),
        ("proxy.golang", "org"),
        ("repo.maven.apache", "org"),
        ("rubygems", "org"),
        ("anaconda", "org"),
        ("docker", "io"),
        ("ghcr", "io"),
        ("quay", "io"),
    )
]

FUNCTION_LINES, LONG_FUNCTION_LINES, LONG_FUNCTIONS = 50, 80, 0.10
FILE_LINES, LONG_FILE_LINES, LONG_FILES = 400, 600, 0.10
FENCES_PER_1000_LINES = 5
NOQA = re.compile(r"noqa(: *[A-Z]+\d+)?[ :,-]*")

Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def files() -> list[Path]:
    """What git tracks or would track, as paths from the root."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    return sorted(Path(name) for name in set(listed.split("\0")) if name and (ROOT / name).is_file())


@cache
def sources(*folders: str) -> dict[Path, ast.Module]:
    found = [path for path in files() if path.suffix == ".py" and path.parts[0] in folders]
    return {path: ast.parse((ROOT / path).read_text(encoding="utf-8")) for path in found}


def lines(path: Path) -> list[str]:
    return (ROOT / path).read_text(encoding="utf-8").splitlines()


def functions() -> Iterator[tuple[str, int]]:
    """Each function with its length, from `def` to its last line."""
    for path, module in sources(*PACKAGES).items():
        for node in ast.walk(module):
            if isinstance(node, Function) and node.end_lineno is not None:
                yield f"{path}:{node.lineno} {node.name}", node.end_lineno - node.lineno + 1


def fences() -> Iterator[tuple[Path, ast.ExceptHandler]]:
    for path, module in sources(*PACKAGES).items():
        for node in ast.walk(module):
            if isinstance(node, ast.ExceptHandler) and is_broad(node.type):
                yield path, node


def is_broad(caught: ast.expr | None) -> bool:
    if isinstance(caught, ast.Tuple):
        return any(is_broad(each) for each in caught.elts)
    return caught is None or (isinstance(caught, ast.Name) and caught.id in ("Exception", "BaseException"))


def is_mock(node: ast.AST) -> bool:
    """A call of `patch(`, `Mock(` and its kin, or `monkeypatch.setattr(`."""
    if not isinstance(node, ast.Call):
        return False
    called = ast.unparse(node.func)
    return called.split(".")[-1] in ("Mock", "MagicMock", "AsyncMock", "create_autospec") or called in (
        "monkeypatch.setattr",
        "patch",
        "patch.object",
        "patch.dict",
        "mock.patch",
        "mock.patch.object",
        "mocker.patch",
        "mocker.patch.object",
    )


def test_functions_are_short() -> None:
    sizes = dict(functions())
    assert {name: size for name, size in sizes.items() if size > LONG_FUNCTION_LINES} == {}
    long = {name: size for name, size in sizes.items() if size > FUNCTION_LINES}
    assert len(long) <= LONG_FUNCTIONS * len(sizes), long


def test_files_are_short() -> None:
    sizes = {str(path): len(lines(path)) for path in sources(*PACKAGES, "tests")}
    assert {name: size for name, size in sizes.items() if size > LONG_FILE_LINES} == {}
    long = {name: size for name, size in sizes.items() if size > FILE_LINES}
    assert len(long) <= LONG_FILES * len(sizes), long


def test_no_function_changes_a_module_s_globals() -> None:
    found = [
        f"{path}:{node.lineno}"
        for path, module in sources(*PACKAGES, "tests").items()
        for node in ast.walk(module)
        if isinstance(node, ast.Global)
    ]
    assert found == []


@pytest.mark.parametrize("path", sources(*PACKAGES), ids=str)
def test_every_file_says_its_purpose_in_one_line(path: Path) -> None:
    said = ast.get_docstring(sources(*PACKAGES)[path])
    assert said, "the file has no docstring"
    assert len(said.splitlines()[0]) <= 120


def test_broad_excepts_are_few() -> None:
    found = [f"{path}:{node.lineno}" for path, node in fences()]
    size = sum(len(lines(path)) for path in sources(*PACKAGES))
    assert len(found) <= max(3, FENCES_PER_1000_LINES * size / 1000), found


def test_each_broad_except_says_why_or_logs() -> None:
    silent = []
    for path, node in fences():
        text = lines(path)[node.lineno - 1 : node.end_lineno]
        why = [NOQA.sub("", line.partition("#")[2]).strip() for line in text]
        logs = any("log." in line or "logger." in line for line in text)
        reraises = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
        if not (any(why) or logs or reraises):
            silent.append(f"{path}:{node.lineno}")
    assert silent == []


def test_names_say_what_is_inside() -> None:
    assert [str(path) for path in sources(*FOLDERS) if {path.stem, path.parent.name} & VAGUE_NAMES] == []


def test_no_other_top_level_folder() -> None:
    found = {path.parts[0] for path in files() if len(path.parts) > 1}
    assert {name for name in found if not name.startswith(".")} <= FOLDERS


def test_no_file_names_the_host_of_a_package_registry() -> None:
    found = []
    for path in files():
        text = (ROOT / path).read_bytes().decode("utf-8", errors="ignore").lower()
        found += [f"{path}: {host}" for host in REGISTRIES if host in text]
    assert found == []


def test_tests_use_real_parts_not_mocks() -> None:
    found = [
        f"{path}:{node.lineno}"
        for path, module in sources("tests").items()
        for node in ast.walk(module)
        if is_mock(node)
    ]
    assert found == []


def test_there_is_no_import_cycle() -> None:
    graph = grimp.build_graph(*PACKAGES, exclude_type_checking_imports=True, cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        cycle = error.args[1]
        pytest.fail("import cycle: " + ", ".join(f"{imported} < {importer}" for imported, importer in pairwise(cycle)))


def test_importing_the_gateway_loads_nothing_heavy() -> None:
    code = "import gateway.app, json, sys; sys.stdout.write(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout)
    assert {name.split(".")[0] for name in loaded} & HEAVY == set()
    assert "opentelemetry.sdk" not in loaded  # of its API, FastAPI loads some
