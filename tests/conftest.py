"""Fixtures that every package's tests share: a real PostgreSQL and Elasticsearch, started and stopped by the suite."""

import itertools
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest

from tests.elasticsearch_server import ElasticsearchServer, Unavailable

_NUMBERS = itertools.count()

# The same examples at each run, and no clock: a busy machine fails no test.
hypothesis.settings.register_profile("suite", derandomize=True, deadline=None)
hypothesis.settings.load_profile("suite")


@dataclass(frozen=True)
class PostgresServer:
    """A running server: any local user may connect to it."""

    bin: Path
    port: int

    def psql(self, statement: str) -> None:
        command = [self.bin / "psql", "-X", "-q", "-h", "127.0.0.1", "-p", str(self.port), "-U", "understudy"]
        subprocess.run([*command, "-d", "postgres", "-c", statement], check=True, capture_output=True)

    def url(self, database: str) -> str:
        return f"postgresql+asyncpg://understudy@127.0.0.1:{self.port}/{database}"


def _programs() -> Path | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if found:
        return found[-1].parent
    on_path = shutil.which("initdb")
    return Path(on_path).resolve().parent if on_path else None


def _owner() -> list[str]:
    """The start of a command line that runs as an ordinary user: PostgreSQL's programs refuse root."""
    if os.geteuid() != 0:
        return []
    names = {entry.pw_name for entry in pwd.getpwall()}
    user = pwd.getpwnam("postgres" if "postgres" in names else "nobody")
    return ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups", "--"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """One server for the session, without durability, in a folder of its own that is removed afterwards."""
    programs = _programs()
    if programs is None:
        pytest.skip("PostgreSQL's programs are not installed (Debian: postgresql)")
    if os.geteuid() == 0 and not shutil.which("setpriv"):
        pytest.skip("PostgreSQL refuses root, and setpriv (util-linux) is not installed")
    owner = _owner()
    folder = Path(tempfile.mkdtemp(prefix="understudy-postgres-"))
    if owner:
        os.chown(folder, int(owner[1].partition("=")[2]), int(owner[2].partition("=")[2]))
    data = folder / "data"
    try:
        initdb = [programs / "initdb", "-D", data, "-U", "understudy", "-A", "trust", "-E", "UTF8", "--no-sync"]
        made = subprocess.run([*owner, *initdb], cwd=folder, capture_output=True, text=True, check=False)
        if made.returncode:
            pytest.skip(f"initdb: {made.stderr.strip() or made.stdout.strip()}")
        server = PostgresServer(bin=programs, port=_free_port())
        quick = ["-c", "fsync=off", "-c", "full_page_writes=off", "-c", "synchronous_commit=off"]
        where = ["-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={folder}"]
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(
                [*owner, programs / "postgres", "-D", data, "-p", str(server.port), *quick, *where],
                cwd=folder,
                stdout=log,
                stderr=log,
            )
            try:
                _wait(server, process, folder / "log")
                yield server
            finally:
                process.send_signal(signal.SIGINT)  # fast shutdown
                process.wait(timeout=30)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _wait(server: PostgresServer, process: "subprocess.Popen[bytes]", log: Path) -> None:
    ready = [server.bin / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(server.port)]
    for _ in range(300):
        if subprocess.run(ready, check=False).returncode == 0:
            return
        if process.poll() is not None:
            break
        time.sleep(0.1)
    pytest.fail(f"PostgreSQL did not start: {log.read_text()[-2000:]}")


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    """The URL of a fresh, empty database, dropped afterwards."""
    name = f"test_{next(_NUMBERS)}"
    postgres_server.psql(f"CREATE DATABASE {name}")
    yield postgres_server.url(name)
    postgres_server.psql(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """The URL of a SQLite file that is not there yet."""
    return f"sqlite+aiosqlite:///{tmp_path / 'control.db'}"


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def database_url(request: pytest.FixtureRequest) -> str:
    """The URL of an empty database, once of each kind."""
    return str(request.getfixturevalue(f"{request.param}_url"))


@pytest.fixture(scope="session")
def elasticsearch_server() -> Iterator[ElasticsearchServer]:
    """The server that ELASTICSEARCH_URL names, or one for the session, which tests may kill and start again."""
    server = ElasticsearchServer(os.environ.get("ELASTICSEARCH_URL"))
    if server.own:
        try:
            server.start()
        except Unavailable as missing:
            pytest.skip(f"NOT TESTED, the Elasticsearch log store: {missing}")
    try:
        yield server
    finally:
        if server.own:
            server.stop()


@pytest.fixture
def elasticsearch_url(elasticsearch_server: ElasticsearchServer) -> Iterator[str]:
    """The URL of an empty log store; what is appended is seen at once. Its indices are dropped afterwards."""
    name = f"test-{os.getpid()}-{next(_NUMBERS)}"
    yield f"elasticsearch+{elasticsearch_server.url}/{name}?refresh=true&settle=0"
    elasticsearch_server.forget(name)
