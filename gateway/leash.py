"""Runs a foreign program as a child that cannot outlive its supervisor, whatever happens to the latter.

    python -m gateway.leash COMMAND [ARG ...] --watch-fd N

Programs of our own watch their parent's pipe themselves; a model server does not, so this stands between.
"""

import asyncio
import os
import signal
import sys
from collections.abc import Sequence

from gateway.supervise import stop_on_signals

__all__ = ["main"]

_GRACE = 10.0


async def _run(command: Sequence[str], watch_fd: int) -> int:
    stop = stop_on_signals(watch_fd)
    process = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.DEVNULL)
    ended = asyncio.ensure_future(process.wait())
    stopping = asyncio.ensure_future(stop.wait())
    await asyncio.wait({ended, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if not ended.done():
        process.terminate()
        await asyncio.wait({ended}, timeout=_GRACE)
    stopping.cancel()
    if os.getpgrp() == os.getpid():  # what the program started itself, and left behind
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.killpg(0, signal.SIGTERM)
        if not ended.done():
            os.killpg(0, signal.SIGKILL)
    return ended.result() if ended.done() else 1


def main(argv: list[str] | None = None) -> int:
    """The program's exit code."""
    *command, flag, watch_fd = sys.argv[1:] if argv is None else argv
    if flag != "--watch-fd" or not command:
        sys.stderr.write("usage: python -m gateway.leash COMMAND [ARG ...] --watch-fd N\n")
        return 2
    return asyncio.run(_run(command, int(watch_fd)))


if __name__ == "__main__":
    raise SystemExit(main())
