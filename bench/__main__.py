"""The command behind `make bench`. Exit code 1: a target is missed, or something is wrong; 2: it cannot start."""

import argparse
import asyncio
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench import load, machine, report
from bench.processes import BenchFailed, allow_connections
from bench.results import Results
from bench.rounds import FULL, NAMES, QUICK, Bench

MISSED = 1
CANNOT_START = 2
STOPPED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the bench; returns the exit code."""
    asked = _parser().parse_args(arguments)
    if asked.keep and (asked.quick or asked.only):
        print("bench: only a full run can be kept: leave --quick and --only out", file=sys.stderr)
        return CANNOT_START
    try:
        load.wrk_path()
    except BenchFailed as error:
        print(f"bench: {error}", file=sys.stderr)
        return CANNOT_START
    allow_connections()
    started = time.monotonic()
    results = Results(asked.quick)
    try:
        asyncio.run(_run(asked, results))
    except BenchFailed as error:
        print(f"bench: {error}", file=sys.stderr)
        return MISSED
    except asyncio.CancelledError:
        print("bench: stopped", file=sys.stderr)
        return STOPPED
    results.facts["minutes"] = round((time.monotonic() - started) / 60, 1)
    return _tell(results, asked)


async def _run(asked: argparse.Namespace, results: Results) -> None:
    task = asyncio.current_task()
    assert task is not None  # noqa: S101  # asyncio.run makes one
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(each, task.cancel)
    with _directory() as directory:
        results.facts |= {
            "date": machine.today(),
            "commit": await machine.commit(),
            "machine": machine.describe(directory),
        }
        await Bench(QUICK if asked.quick else FULL, directory, results, frozenset(asked.only), _say).run()


def _tell(results: Results, asked: argparse.Namespace) -> int:
    print("", report.text_table(results), sep="\n")
    report.write_json(results, asked.json)
    report.write_chart(results, asked.json.with_suffix(".svg"))
    if asked.keep:
        report.keep(results)
    missed = [] if asked.quick else results.missed()
    if missed:
        print(f"bench: missed: {'; '.join(target.title for target in missed)}", file=sys.stderr)
    return MISSED if missed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make bench ARGS=…", description="Measures the desk beside its baselines.")
    parser.add_argument("--quick", action="store_true", help="everything once and tiny: does the bench work?")
    parser.add_argument("--keep", action="store_true", help="put the results into docs/benchmarks.*")
    parser.add_argument("--only", nargs="+", default=[], choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--json", type=Path, default=report.RESULTS / "last.json", help="where all samples go")
    return parser


@contextlib.contextmanager
def _directory() -> Iterator[Path]:
    """A new directory on a disk, for everything; gone afterwards; if root, PostgreSQL can enter it."""
    directory = Path(tempfile.mkdtemp(prefix="buydesk-bench-", dir=os.environ.get("TMPDIR", "/var/tmp")))  # noqa: S108
    try:
        directory.chmod(0o755)
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
