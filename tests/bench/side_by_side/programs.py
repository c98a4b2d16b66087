"""The programs that make load: two of our own in C, built when they are needed, and wrk. What they print, checked."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "CannotMeasure",
    "Held",
    "Latencies",
    "Programs",
    "build",
    "closed_loop_of",
    "held_of",
    "latencies_of",
    "missing",
]

SOURCES = Path(__file__).parent
JSON = dict[str, Any]


class CannotMeasure(Exception):
    """A figure that cannot be had, and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Latencies:
    """Of one open loop; milliseconds from the time at which a request was due."""

    p50: float
    p99: float
    unanswered: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """Of streams held at once. `delay` is an event's way from upstream to client, `gap` what its gap grew by on it."""

    events: int
    lost: int
    late: int  # not there when the patience ended
    merged: int
    ttft_p99: float
    delay_p50: float
    delay_p99: float
    gap_p99: float


def missing() -> list[str]:
    """What the benchmark needs of the system and does not find."""
    return [name for name in ("nginx", "wrk", "taskset", "cc") if shutil.which(name) is None]


def build(folder: Path) -> None:
    """Compile load and streams into a folder. Raises CannotMeasure when there is no compiler, or it finds an error."""
    if shutil.which("cc") is None:
        raise CannotMeasure("no C compiler (cc) on PATH: apt-get install gcc libc6-dev")
    for name in ("load", "streams"):
        command = ["cc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", folder / name, SOURCES / f"{name}.c"]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
        if done.returncode:
            raise CannotMeasure(f"cc could not build {name}.c (apt-get install gcc libc6-dev?): {done.stderr.strip()}")


def request(body: JSON, headers: Mapping[str, str]) -> bytes:
    """A whole chat request as it goes over the wire."""
    content = json.dumps(body).encode()
    fields = {"host": "127.0.0.1", "content-type": "application/json", **headers, "content-length": str(len(content))}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"POST /v1/chat/completions HTTP/1.1\r\n{head}\r\n".encode() + content


def latencies_of(output: str, *, most_unanswered: float = 1.0) -> Latencies:
    """What load printed. Raises CannotMeasure when a reply was wrong; unanswered requests are counted, not refused."""
    try:
        found = json.loads(output)
        times = found["latency_ms"]
        wrong = {name: found[name] for name in ("bad_status", "bad_length", "bad_body", "broken") if found[name]}
        unanswered = found["unanswered"]
        if wrong:
            raise CannotMeasure(f"of {found['requests']} requests, wrong: {wrong}")
        if times is None or unanswered > most_unanswered * found["requests"]:
            raise CannotMeasure(f"of {found['requests']} requests {unanswered} were not answered")
        return Latencies(p50=times["p50"], p99=times["p99"], unanswered=unanswered)
    except (ValueError, KeyError, TypeError) as error:
        raise CannotMeasure(f"load printed what nobody can read: {output[:200]!r}") from error


def held_of(output: str) -> Held:
    """The last line that `streams hold` printed. Raises CannotMeasure when no stream was read to its end."""
    try:
        found = json.loads(output)
        if found["bad_status"] or not found["ttft_ms"] or not found["gap_ms"]:
            raise CannotMeasure(f"of {found['streams']} streams {found['bad_status']} were refused: {output[:200]}")
        delay = found["delay_ms"]
        return Held(
            events=found["events"],
            lost=found["lost"] + found["unreadable"],
            late=found["late"],
            merged=found["merged"] + found["repeated"],
            ttft_p99=found["ttft_ms"]["p99"],
            delay_p50=delay["p50"],
            delay_p99=delay["p99"],
            gap_p99=found["gap_ms"]["p99"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise CannotMeasure(f"streams printed what nobody can read: {output[:200]!r}") from error


def closed_loop_of(output: str, *, least_bytes: int) -> tuple[int, float]:
    """Requests, and seconds, of wrk's last line. Raises CannotMeasure when replies were wrong or too short.

    That a reply took longer than wrk's two seconds is no error: it is slow, and counts as that.
    """
    try:
        found = json.loads(output.strip().splitlines()[-1])
        requests, size = found["requests"], found["bytes"]
        wrong = {name: found[name] for name in ("status", "read", "write", "connect") if found[name]}
        if wrong:
            raise CannotMeasure(f"of {requests} requests, wrong: {wrong}")
        if size < least_bytes * requests:
            raise CannotMeasure(f"replies have {size / requests:.0f} bytes on average, less than {least_bytes}")
        return requests, found["microseconds"] / 1e6
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise CannotMeasure(f"wrk printed what nobody can read: {output[-200:]!r}") from error


_WRK = """
local bodies, at = {{ {bodies} }}, 0
local requests = {{}}
init = function(args)
  for i, body in ipairs(bodies) do requests[i] = wrk.format("POST", nil, {{ {headers} }}, body) end
end
request = function()
  at = at % #requests + 1
  return requests[at]
end
done = function(summary, latency, all)
  local e = summary.errors
  io.write(string.format(
    '\\n{{"requests": %d, "bytes": %d, "microseconds": %d, ' ..
    '"status": %d, "read": %d, "write": %d, "connect": %d}}\\n',
    summary.requests, summary.bytes, summary.duration, e.status, e.read, e.write, e.connect))
end
"""


def lua(text: str) -> str:
    """A string as Lua writes it."""
    return (
        '"' + re.sub(r'[\\"\n\r]', lambda found: {"\n": "\\n", "\r": "\\r"}.get(found[0], "\\" + found[0]), text) + '"'
    )


@dataclass(frozen=True, slots=True)
class Programs:
    """The programs, built in a folder, run on a core."""

    folder: Path
    core: int

    def closed_loop(
        self, port: int, bodies: list[JSON], headers: Mapping[str, str], *, seconds: float, connections: int, least: int
    ) -> tuple[int, float]:
        """As many requests as are answered, the bodies in turn; how many, and the seconds that it took."""
        script = self.folder / f"wrk-{port}.lua"
        fields = {"content-type": "application/json", **headers}
        script.write_text(
            _WRK.format(
                bodies=", ".join(lua(json.dumps(body)) for body in bodies),
                headers=", ".join(f"[{lua(name)}] = {lua(value)}" for name, value in fields.items()),
            )
        )
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        command = ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "-s", str(script), url]
        return closed_loop_of(self._output(command, seconds + 30), least_bytes=least)

    def open_loop(
        self,
        port: int,
        sent: bytes,
        expect: str,
        *,
        rate: int,
        seconds: float,
        connections: int,
        length: int | None = None,
        first: str | None = None,
    ) -> Latencies:
        """Requests at fixed times. With `first` a latency ends when that text has come."""
        asked, expected = self.folder / f"load-{port}.http", self.folder / f"load-{port}.expect"
        asked.write_bytes(sent)
        expected.write_text(expect)
        command = [
            self.folder / "load", "--port", port, "--request", asked, "--expect", expected, "--rate", rate,
            "--seconds", seconds, "--connections", connections, "--patience", 3,
        ]  # fmt: skip
        command += ["--length", length] if length is not None else []
        command += ["--first", first] if first is not None else []
        return latencies_of(self._output(command, seconds + 30))

    def hold(
        self,
        port: int,
        sent: bytes,
        *,
        streams: int,
        events: int,
        ramp: float,
        patience: float,
        steady: Callable[[str, int], None],
    ) -> Held:
        """Hold streams; `steady` is called with "open" and "closing", and how many events have come by then."""
        asked = self.folder / f"streams-{port}.http"
        asked.write_bytes(sent)
        command = [
            self.folder / "streams", "hold", "--port", port, "--request", asked, "--streams", streams,
            "--events", events, "--ramp-ms", round(ramp * 1000), "--patience", patience,
        ]  # fmt: skip
        last = ""
        with subprocess.Popen(
            self._pinned(command), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            for line in process.stdout:
                what, _, count = line.partition(" ")
                if what in ("open", "closing"):
                    steady(what, int(count))
                else:
                    last = line
            problem = process.stderr.read()
        if process.returncode:
            raise CannotMeasure(f"streams: {problem.strip()}")
        return held_of(last)

    def _pinned(self, command: list[Any]) -> list[str]:
        return ["taskset", "-c", str(self.core), *(str(part) for part in command)]

    def _output(self, command: list[Any], patience: float) -> str:
        try:
            done = subprocess.run(self._pinned(command), capture_output=True, text=True, check=False, timeout=patience)
        except subprocess.TimeoutExpired as error:
            raise CannotMeasure(f"{command[0]} did not end in {patience:.0f} s") from error
        if done.returncode:
            raise CannotMeasure(f"{Path(str(command[0])).name}: {(done.stderr or done.stdout).strip()[:300]}")
        return done.stdout
