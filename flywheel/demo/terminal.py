"""The demo's narrator on a terminal: lines that stay, and one bar for the stage under way."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from flywheel.demo.story import Narrator

__all__ = ["Terminal"]


class Terminal(Narrator):
    """A context manager. Without a terminal it prints lines alone."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._started = time.monotonic()
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=None)

    def __enter__(self) -> "Terminal":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        at = time.monotonic() - self._started
        self._console.print(Text(f"{at:6.1f} s  {text}"))
        self._bar.reset(self._task, description=text.splitlines()[0][:60], total=None)

    def progress(self, text: str, done: float, total: float | None) -> None:
        self._bar.update(self._task, description=text, completed=done, total=total)
