"""Compiles the gateway's hot path with mypyc, into a folder beside the code, whole or not at all."""

import fcntl
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from gateway.compiled import GROUP, HOT, ROOT, SUFFIX, digest, folder_of, sources
from gateway.config import environment
from gateway.errors import CannotCompile, ConfigError, MissingExtra

__all__ = ["Build", "build", "remove"]

PYTHON_HEADERS = "the headers of Python (apt-get install python3-dev)"
C_COMPILER = "a C compiler (apt-get install gcc libc6-dev)"
LAST_LINES = 12  # of what a failed build said, for the error; the whole is in a file

# Runs in a folder with copies of the sources and nothing else: no pyproject.toml that setuptools would read.
SETUP = """
import sys
from mypyc.build import mypycify
from setuptools import setup
group, *paths = sys.argv[1:]
modules = mypycify(["--ignore-missing-imports", *paths], opt_level="3", debug_level="0", group_name=group)
where = ["--build-lib", "out", "--build-temp", "objects"]
setup(name=group, packages=[], ext_modules=modules, script_args=["build_ext", *where])
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """A build that can be used. `seconds` it took, 0 where it was there; `mypy`: the version that made it."""

    folder: Path
    modules: int
    mypy: str
    seconds: float


def build(
    *,
    root: Path = ROOT,
    names: Sequence[str] = HOT,
    force: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Build:
    """Compile `names` unless that is done, and drop the builds of other sources.

    Raises CannotCompile, MissingExtra or ConfigError, and leaves nothing then; what was there is still in use.
    """
    now = sources(root)
    folder = folder_of(root) / digest(now)
    if folder.is_dir() and not force:
        return _as_built(folder, names, 0.0)
    _require_tools()
    with _alone(folder_of(root), progress):
        if folder.is_dir() and not force:  # who was before us made it
            return _as_built(folder, names, 0.0)
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="understudy-compile-") as work:
            progress(f"compiling {len(names)} modules")
            _compile(Path(work), now, names)
            _put_in_place(Path(work) / "out", folder)
        return _as_built(folder, names, round(time.monotonic() - started, 1))


def remove(root: Path = ROOT) -> bool:
    """Remove every build, and whether there was any. Raises ConfigError."""
    place = folder_of(root)
    if not place.exists():
        return False
    with _alone(place, lambda _: None):
        return _drop(place) > 0


def _as_built(folder: Path, names: Sequence[str], seconds: float) -> Build:
    return Build(folder=folder, modules=len(names), mypy=(folder / "mypy").read_text(encoding="utf-8"), seconds=seconds)


def _require_tools() -> None:
    try:
        version("mypy"), version("setuptools")
    except PackageNotFoundError:
        raise MissingExtra("compiling the hot path", "compile") from None
    if shutil.which(_compiler()) is None:
        raise CannotCompile(f"compiling the hot path needs {C_COMPILER}: there is no {_compiler()} here")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        raise CannotCompile(f"compiling the hot path needs {PYTHON_HEADERS}")


def _compiler() -> str:
    """The program that setuptools would start."""
    named = environment().get("CC") or sysconfig.get_config_var("CC") or "cc"
    return next(iter(shlex.split(named)), "cc")


def _compile(work: Path, found: Mapping[str, bytes], names: Sequence[str]) -> None:
    for path, content in found.items():
        (work / path).parent.mkdir(parents=True, exist_ok=True)
        (work / path).write_bytes(content)
    paths = [name.replace(".", "/") + ".py" for name in names]
    group = GROUP.removesuffix("__mypyc")
    done = subprocess.run(
        [sys.executable, "-c", SETUP, group, *paths],
        cwd=work,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
        text=True,
        errors="replace",
        umask=0o022,  # whoever may run it can read it, and only its owner change it
    )
    if done.returncode or not (work / "out" / f"{GROUP}{SUFFIX}").is_file():
        with tempfile.NamedTemporaryFile("w", prefix="understudy-compile-", suffix=".log", delete=False) as log:
            log.write(done.stdout)
        said = "\n".join(done.stdout.splitlines()[-LAST_LINES:])
        raise CannotCompile(f"compiling the hot path failed, see {log.name}; it runs as before. The end:\n{said}")
    (work / "out" / "mypy").write_text(version("mypy"), encoding="utf-8")


@contextmanager
def _alone(place: Path, progress: Callable[[str], None]) -> Iterator[None]:
    """One builder at a time, also where one is killed: the lock ends with its process."""
    try:
        place.mkdir(mode=0o755, exist_ok=True)
        lock = os.open(place / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ConfigError(f"{place}: {error.strerror}; compile as the user that installed understudy") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("another build is under way: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _put_in_place(out: Path, folder: Path) -> None:
    """First a copy beside the place, which nobody looks into; its new name makes it a build, at once and whole."""
    new = folder.with_name("new")
    try:
        _drop(folder.parent)
        shutil.copytree(out, new)
        new.rename(folder)
    except OSError as error:
        shutil.rmtree(new, ignore_errors=True)
        raise ConfigError(f"{folder}: {error.strerror}; compile as the user that installed understudy") from error


def _drop(place: Path) -> int:
    """How many builds were dropped. Each loses its name first, so that none is found in part."""
    old = place / "old"
    for name in ("new", "old"):  # what a killed one may have left
        shutil.rmtree(place / name, ignore_errors=True)
    builds = [path for path in place.iterdir() if path.is_dir()]
    for path in builds:
        path.rename(old)
        shutil.rmtree(old, ignore_errors=True)
    return len(builds)
