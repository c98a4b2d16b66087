"""Runs the gateway's processes with their hot path compiled, where `understudy compile` has built it.

python -m gateway.compiled MODULE [ARGUMENT...]

A build belongs to the sources it was made from, so one whose sources have changed is not found and Python's own runs.
Nothing of the hot path is imported here: what was imported before cannot be replaced.
"""

import importlib
import sys
from collections.abc import Mapping, Sequence
from hashlib import sha256
from importlib.abc import Loader
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader, ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

from gateway.config import environment

__all__ = ["GROUP", "HOT", "activate", "built", "digest", "folder_of", "is_compiled", "main", "sources"]

# One group: they call each other without going through Python.
HOT = (
    "gateway.auth",
    "gateway.breaker",
    "gateway.endpoints",
    "gateway.gate",
    "gateway.ids",
    "gateway.inflight",
    "gateway.limits",
    "gateway.metering",
    "gateway.outbox",
    "gateway.proxy",
    "gateway.readable",
    "gateway.relay",
    "gateway.relayed",
    "gateway.retry",
    "gateway.spool",
    "gateway.tagging",
    "gateway.tee",
    "gateway.telemetry",
    "gateway.tracing",
    "gateway.upstream.chosen",
    "gateway.upstream.direct",
    "routing.labels",
    "routing.policy",
)
GROUP = "understudy__mypyc"  # the module in which all of them are; theirs only lead there
PROCESSES = ("gateway.worker", "gateway.ship", "gateway.tell")
ROOT = Path(__file__).parent.parent
PACKAGES = ("gateway", "routing")
SUFFIX = EXTENSION_SUFFIXES[0]  # names the interpreter's version and the platform


class _Loader(Loader):
    """Loads the library, and has the source beside, so that tracebacks show it."""

    def __init__(self, name: str, file: str, source: Path) -> None:
        self._library = ExtensionFileLoader(name, file)
        self._source = source

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._library.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._library.exec_module(module)
        module.__loader__ = self  # who made the module had put the library's there

    def get_source(self, _name: str) -> str | None:
        try:
            return self._source.read_text(encoding="utf-8")
        except OSError:
            return None


class _Finder:
    """Finds the modules of one build, and no others."""

    def __init__(self, root: Path, folder: Path, names: Sequence[str]) -> None:
        self._root = root
        self._folder = folder
        self._names = frozenset((*names, GROUP))

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """A file that is gone is an error: a module from the sources does not know those that are compiled."""
        if name not in self._names:
            return None
        place = Path(*name.split("."))
        file = str((self._folder / place).with_suffix(SUFFIX))
        return spec_from_file_location(name, file, loader=_Loader(name, file, (self._root / place).with_suffix(".py")))


def activate(root: Path = ROOT, names: Sequence[str] = HOT) -> bool:
    """Have `names` imported from their build from now on; False, and nothing changed, where there is none to be had.

    UNDERSTUDY_INTERPRETED=1 says no. Raises RuntimeError where one of them has been imported already.
    """
    if early := [name for name in names if name in sys.modules]:
        raise RuntimeError(f"{', '.join(early)}: imported before the compiled ones could be")
    folder = None if environment().get("UNDERSTUDY_INTERPRETED", "0") not in ("", "0") else built(root)
    if folder is None:
        return False
    finder = _Finder(root, folder, names)
    sys.meta_path.insert(0, finder)
    try:
        importlib.import_module(GROUP)
    except ImportError as error:  # another libc, a damaged file: as good as none
        sys.meta_path.remove(finder)
        sys.stderr.write(f"the compiled hot path cannot be loaded, so Python's own runs: {error}\n")
        return False
    return True


def is_compiled(name: str = "gateway.proxy") -> bool:
    """Whether the module that was imported under this name is a compiled one."""
    spec = sys.modules[name].__spec__ if name in sys.modules else None
    return spec is not None and spec.origin is not None and spec.origin.endswith(SUFFIX)


def built(root: Path = ROOT) -> Path | None:
    """The folder of the build of these very sources, for this interpreter; None where there is none."""
    folder = folder_of(root) / digest(sources(root))
    return folder if (folder / f"{GROUP}{SUFFIX}").is_file() else None


def folder_of(root: Path) -> Path:
    """Where builds are: beside the code, and so as hard to write to."""
    return root / "gateway" / "_compiled"


def sources(root: Path = ROOT) -> dict[str, bytes]:
    """What every Python file of the packages holds, by its path from the root."""
    found = {}
    for package in PACKAGES:
        for path in (root / package).rglob("*.py"):
            found[path.relative_to(root).as_posix()] = path.read_bytes()
    return found


def digest(found: Mapping[str, bytes]) -> str:
    """Of names and contents, and of the interpreter: another one cannot load what was built for this."""
    over = sha256(SUFFIX.encode())
    for name in sorted(found):
        over.update(b"\0%s\0%d\0" % (name.encode(), len(found[name])))
        over.update(found[name])
    return over.hexdigest()[:32]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the gateway's processes, compiled where it can be; its exit code."""
    module, *arguments = (sys.argv[1:] if argv is None else argv) or [""]
    if module not in PROCESSES:
        sys.stderr.write(f"usage: python -m gateway.compiled {{{','.join(PROCESSES)}}} [ARGUMENT...]\n")
        return 2
    activate()
    code: int = importlib.import_module(module).main(arguments)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
