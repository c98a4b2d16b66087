"""Gateways side by side in one run: requests a second, CPU, added latency, streams.

Each peer is installed once, pinned, in an environment of its own under .bench. The target has the first core, load
and upstream the last. Writes bench-report.json and bench-report.svg.
"""

import argparse
import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from tests.bench.side_by_side import about
from tests.bench.side_by_side.cpu_ratio import RECORDED, measure_ratio, recorded
from tests.bench.side_by_side.install import PINS, install, install_programs
from tests.bench.side_by_side.ours import OURS
from tests.bench.side_by_side.programs import CannotMeasure, build, missing
from tests.bench.side_by_side.report import as_report, plot, table
from tests.bench.side_by_side.rounds import measure, whole_plan
from tests.bench.side_by_side.targets import PEERS, Start

ROOT = Path(__file__).parents[3]
TARGETS: Mapping[str, Start] = {**PEERS, **OURS}
INSTALLED = tuple(name for name in PEERS if (PINS / name).is_dir() or (PINS / f"{name}.txt").exists())


def say(line: str) -> None:
    """A line of progress, beside the result."""
    print(time.strftime("%H:%M:%S"), line, file=sys.stderr, flush=True)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"""targets: {", ".join(TARGETS)}
examples:
  make bench                                                            everything, about 12 minutes
  make bench BENCH_ARGS="--only nginx,understudy --rounds 1 --seconds 2"
  make bench BENCH_ARGS="--short"             CPU per request against nginx's, and against what is recorded
  make bench BENCH_ARGS="--short --record"    the same, and record it
exit codes: 0 done; 1 a figure of ours could not be measured, or --short found too much; 2 nothing could be measured""",
    )
    parser.add_argument("--only", metavar="A,B", help="these targets, and direct, which they are compared with")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, each in another order (%(default)s)")
    parser.add_argument("--seconds", type=float, default=2.5, help="length of each measurement (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the order (%(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "bench-report.json", help="where the report goes")
    parser.add_argument("--json", action="store_true", help="print the report instead of the table")
    parser.add_argument("--short", action="store_true", help="only our CPU per request as a ratio to nginx's")
    parser.add_argument("--record", action="store_true", help=f"with --short: write it to {RECORDED.name}")
    found = parser.parse_args(argv)
    names = found.only.split(",") if found.only else list(TARGETS)
    if unknown := [name for name in names if name not in TARGETS]:
        parser.error(f"--only: {', '.join(unknown)}: not a target; there are {', '.join(TARGETS)}")
    if found.rounds < 1 or found.seconds < 1:
        parser.error("--rounds and --seconds: at least 1")
    if found.record and not found.short:
        parser.error("--record: only with --short")
    found.names = [name for name in TARGETS if name in names or name == "direct"]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """See `--help`."""
    asked = arguments(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what sleeps is ended as well
    if missing():
        install_programs(["nginx-light", "wrk", "util-linux", "gcc", "libc6-dev"], say)
    if lacking := missing():
        print(
            f"{', '.join(lacking)} not found: apt-get install nginx-light wrk util-linux gcc libc6-dev", file=sys.stderr
        )
        return 2
    environments = ROOT / ".bench"
    environments.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="run-", dir=environments))
    try:
        return _short(asked, folder, environments) if asked.short else _side_by_side(asked, folder, environments)
    except CannotMeasure as why:
        print(why, file=sys.stderr)
        return 2
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _side_by_side(asked: argparse.Namespace, folder: Path, environments: Path) -> int:
    build(folder)
    facts = about.facts(ROOT, folder, asked.names, asked.rounds, asked.seconds)
    not_measured = _installed(asked.names, environments)
    starts = {name: TARGETS[name] for name in asked.names if name not in not_measured}
    plan = whole_plan(asked.rounds, asked.seconds, asked.seed)
    measured = measure(starts, plan, folder, environments, say)
    report = as_report(measured, asked.names, not_measured, facts)
    asked.out.write_text(json.dumps(report, indent=2) + "\n")
    asked.out.with_suffix(".svg").write_text(plot(report))
    print(json.dumps(report, indent=2) if asked.json else table(report))
    say(f"written: {asked.out}, {asked.out.with_suffix('.svg')}")
    return 1 if any(name in OURS for name in measured.problems) else 0


def _installed(names: Sequence[str], environments: Path) -> dict[str, str]:
    """The peers that can't be installed here, and why."""
    failed = {}
    for name in names:
        if name in INSTALLED:
            try:
                install(name, environments, say)
            except CannotMeasure as why:
                failed[name] = str(why)
                say(f"{name} can't be installed: {why}")
    return failed


def _short(asked: argparse.Namespace, folder: Path, environments: Path) -> int:
    found, before = measure_ratio(folder, environments, say), recorded()
    result = {**asdict(found), "recorded": before, **about.machine(folder)}
    said = f"CPU per request, ours over nginx's: {found.ratio}; recorded: {before}"
    print(json.dumps(result, indent=2) if asked.json else said)
    if not found.quiet:
        say(f"ours had {found.core_share:.0%} of its core: the machine is too busy for this ratio to say much")
    if asked.record:
        del result["recorded"]
        RECORDED.write_text(json.dumps(result, indent=2) + "\n")
        say(f"written: {RECORDED}")
        return 0
    return 1 if before is not None and found.too_high(before) else 0


if __name__ == "__main__":
    raise SystemExit(main())
