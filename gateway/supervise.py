"""Child processes, supervised: restarted when they die, stopped with their parent, and only they."""

import asyncio
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import structlog

from gateway.tasks import Tasks

__all__ = ["Child", "Supervisor", "gateway_process", "interrupted", "python", "stop_on_signals", "watch_parent"]

T = TypeVar("T")

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Child:
    """How to start one process. It gets `--watch-fd N`: end of file there means that its parent is gone."""

    name: str
    argv: Sequence[str]
    pass_fds: tuple[int, ...] = ()
    env: Mapping[str, str] | None = None
    log: Path | None = None  # where its output goes; None is where ours goes


class Supervisor:
    """Keeps its children running until it is stopped. A child that dies is started again, later each time."""

    def __init__(self, children: Sequence[Child], *, grace: float = 35.0) -> None:
        self._children = children
        self._grace = grace
        self._tasks = Tasks()
        self._stopping = False
        self.running: dict[str, asyncio.subprocess.Process] = {}
        self.restarts: Counter[str] = Counter()

    async def run(self, stop: asyncio.Event) -> None:
        """Start all, wait for `stop`, end all: SIGTERM, and after `grace` seconds SIGKILL."""
        for child in self._children:
            self._tasks.spawn(f"child {child.name}", self._keep(child))
        await stop.wait()
        await self._end()

    async def _end(self) -> None:
        self._stopping = True
        for process in self.running.values():
            _signal(process, signal.SIGTERM)
        if await self._tasks.drain(self._grace):
            for process in self.running.values():
                _signal(process, signal.SIGKILL)
            await self._tasks.drain(5.0)
        await self._tasks.close()

    async def _keep(self, child: Child) -> None:
        delay = 0.1
        while not self._stopping:
            started = asyncio.get_running_loop().time()
            code = await self._run_once(child)
            if self._stopping:
                return
            lived = asyncio.get_running_loop().time() - started
            delay = 0.1 if lived > 10 else min(delay * 2, 5.0)
            log.warning("a process ended; it is started again", name=child.name, code=code, delay_s=delay)
            await asyncio.sleep(delay)
            self.restarts[child.name] += 1

    async def _run_once(self, child: Child) -> int:
        read, write = os.pipe()
        out = None if child.log is None else os.open(child.log, os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        try:
            process = await asyncio.create_subprocess_exec(
                *child.argv,
                "--watch-fd",
                str(read),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                pass_fds=(read, *child.pass_fds),
                env=child.env,
                # Ctrl-C reaches the parent alone, which then stops its children in order. Not in a session of its own:
                # Linux gives each session the same share of a core, whatever its processes' priority (autogroup).
                process_group=0,
            )
        finally:
            os.close(read)
            if out is not None:
                os.close(out)
        self.running[child.name] = process
        try:
            return await process.wait()
        finally:
            del self.running[child.name]
            os.close(write)
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # what a child that was killed left behind


def stop_on_signals(watch_fd: int | None = None) -> asyncio.Event:
    """An event that is set by SIGTERM or SIGINT, or when the parent that holds `watch_fd`'s other end is gone."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if watch_fd is not None:
        watch_parent(loop, watch_fd, stop.set)
    return stop


def watch_parent(loop: asyncio.AbstractEventLoop, watch_fd: int, gone: Callable[[], object]) -> None:
    """Call `gone` once when the pipe's other end is closed."""

    def _readable() -> None:
        loop.remove_reader(watch_fd)
        gone()

    loop.add_reader(watch_fd, _readable)


async def interrupted(work: Coroutine[Any, Any, T]) -> T:
    """Run `work`; SIGINT and SIGTERM cancel it, so that it cleans up after itself. Raises KeyboardInterrupt then."""
    task = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    try:
        return await task
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


def python(module: str, *arguments: str) -> list[str]:
    """The command line that runs one of our modules with this interpreter."""
    return [sys.executable, "-m", module, *arguments]


def gateway_process(module: str, *arguments: str) -> list[str]:
    """The same for one of the gateway's processes, which runs compiled where that has been built."""
    return python("gateway.compiled", module, *arguments)


def _signal(process: asyncio.subprocess.Process, number: int) -> None:
    """SIGKILL goes to all that the child started: it leads a process group of its own."""
    with suppress(ProcessLookupError):
        if number == signal.SIGKILL:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
