"""Processes that the bench starts: each ends with what it started, however the bench ends."""

import asyncio
import contextlib
import itertools
import os
import resource
import socket
import sys
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from pathlib import Path

import psutil

OPEN_FILES = 65_536
STOP_SECONDS_MAX = 30.0
LOG_LINES_SHOWN = 15
OUTGOING_PORTS_FROM = 32_768  # Linux
PYTHON = (sys.executable, "-m")

_bases = itertools.count(2_000 + os.getpid() % 200 * 100, 60)


class BenchFailed(Exception):
    """The bench cannot go on, or what it has found must not be: one line for its user."""


def allow_connections() -> None:
    """Raises the limit of open files, for this process and all it starts, as far as the system lets it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def clean_environment() -> dict[str, str]:
    """This process's environment without settings of a desk: what is measured is the desk as it comes, but for the
    limit by address, which no load is below."""
    foreign = ("DATABASE_URL", "REDIS_URL", "PRICE_FEED", "SENTRY_DSN")
    kept = {
        name: value for name, value in os.environ.items() if name not in foreign and not name.startswith("BUYDESK_")
    }
    return kept | {"BUYDESK_ANONYMOUS_RATE": "off"}


def free_base(ports: Collection[int]) -> int:
    """A number to add to all these ports so that nobody listens on any of them; raises BenchFailed.

    None of them is one that the system gives to outgoing connections: the load itself would take it.
    """
    for base in _bases:
        if base + max(ports) >= OUTGOING_PORTS_FROM:
            break
        with contextlib.suppress(OSError):
            for port in ports:
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", base + port))
            return base
    raise BenchFailed("no free ports were found")


@contextlib.asynccontextmanager
async def running(
    command: Sequence[str], log: Path, further_environment: Mapping[str, str] | None = None
) -> AsyncIterator[psutil.Process]:
    """While entered, the command runs and what it prints goes to the log; leaving ends it with all its children."""
    with log.open("ab") as output:
        # A session of its own: Ctrl-C reaches the bench only, which ends everything in order.
        process = await asyncio.create_subprocess_exec(
            *command,
            env=clean_environment() | dict(further_environment or {}),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield psutil.Process(process.pid)
    finally:
        await _end(process)


async def output_of(
    command: Sequence[str], seconds_max: float, further_environment: Mapping[str, str] | None = None
) -> str:
    """What a command prints that ends by itself; raises BenchFailed when it fails or takes too long."""
    process = await asyncio.create_subprocess_exec(
        *command,
        env=clean_environment() | dict(further_environment or {}),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    name = Path(command[0]).name
    try:
        async with asyncio.timeout(seconds_max):
            printed, complaint = await process.communicate()
    except TimeoutError:
        raise BenchFailed(f"{name} did not end within {seconds_max:g} s") from None
    finally:
        await _end(process)
    if process.returncode != 0:
        raise BenchFailed(f"{name} failed ({process.returncode}): {(complaint or printed).decode()[-1000:]}")
    return printed.decode()


def last_lines(log: Path) -> str:
    """The end of a log, for a message."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:])


def cpu_seconds(process: psutil.Process) -> float:
    """User and system time of the process and of its children that have ended."""
    times = process.cpu_times()
    return float(times.user + times.system + times.children_user + times.children_system)


def children_cpu_seconds() -> float:
    """User and system time of all ended processes that the bench itself had started."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def rss_peak_bytes(process: psutil.Process) -> int:
    """The most memory the process has had at any time, where the system tells; else what it has now."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return int(process.memory_info().rss)


async def _end(process: asyncio.subprocess.Process) -> None:
    """Asks the process to end, then kills it; kills what it leaves behind."""
    if process.returncode is not None:
        return
    left: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        left = psutil.Process(process.pid).children(recursive=True)
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        async with asyncio.timeout(STOP_SECONDS_MAX):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
    finally:
        for each in left:
            # psutil compares the time of creation too: a pid that another program has now is not killed.
            with contextlib.suppress(psutil.Error):
                each.kill()
