"""How quickly exchanges are imported and exported, and with how much memory: python -m tests.bench.bench_export.

Makes `--exchanges` lines in the blueprint's form, imports them into a fresh SQLite log store, and exports them again,
each as a user would: with the command, as a process of its own.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

COMMAND = [sys.executable, "-m", "flywheel.cli", "logs"]
TOOLS = [{"type": "function", "function": {"name": f"tool_{n}", "parameters": {"type": "object"}}} for n in range(4)]


def line(number: int) -> str:
    asked = [
        {"role": "system", "content": "You route requests to tools. " * 8},
        {"role": "user", "content": f"Request {number}: please play the next song of the album, and book a table."},
    ]
    call = {"name": f"tool_{number % 4}", "arguments": json.dumps({"number": number})}
    answer = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": call}]}
    return json.dumps(
        {
            "timestamp": 1_763_712_000 + number // 20,
            "workload_id": f"workload-{number % 3}",
            "client_id": "bench",
            "request": {"model": "m", "messages": asked, "tools": TOOLS},
            "response": {
                "id": f"chatcmpl-{number}",
                "choices": [{"index": 0, "message": answer, "finish_reason": "tool_calls"}],
                "usage": {"prompt_tokens": 90, "completion_tokens": 12},
            },
        }
    )


def measured(name: str, arguments: list[str], exchanges: int, feed: Callable[[IO[bytes]], None] | None) -> None:
    """Run the command, and print its rate and its largest resident set."""
    started = time.perf_counter()
    process = subprocess.Popen([*COMMAND, *arguments], stdin=subprocess.PIPE if feed else None)
    if feed is not None and process.stdin is not None:
        feed(process.stdin)
        process.stdin.close()
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    assert status == 0, f"{name} failed"
    print(
        f"{name:<8} {exchanges:,} exchanges in {seconds:.1f} s: {exchanges / seconds:,.0f} a second, "
        f"{used.ru_utime + used.ru_stime:.1f} s of CPU, peak {used.ru_maxrss / 1024:.0f} MiB",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--exchanges", type=int, default=1_000_000)
    exchanges = parser.parse_args().exchanges
    with tempfile.TemporaryDirectory(prefix="understudy-bench-") as folder:
        config = Path(folder, "understudy.toml")
        config.write_text(f'data_dir = "{folder}/data"\n')
        options = ["--config", str(config)]

        def feed(pipe: IO[bytes]) -> None:
            for number in range(exchanges):
                pipe.write(line(number).encode() + b"\n")

        measured("import", ["import", "-", *options], exchanges, feed)
        for form in ("exchanges", "blueprint", "messages"):
            out = Path(folder, f"{form}.jsonl")
            measured("export", ["export", "--format", form, "-o", str(out), *options], exchanges, None)
            with out.open("rb") as file:
                assert sum(1 for _ in file) == exchanges
            out.unlink()


if __name__ == "__main__":
    main()
