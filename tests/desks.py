"""Whole desks to test with: real processes on free ports."""

import asyncio
import contextlib
import itertools
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx2

from buydesk.topology import PORTS

START_SECONDS_MAX = 60
NO_LIMIT = {"BUYDESK_ANONYMOUS_RATE": "off"}
# Tests run in several processes (pytest-xdist), each with its own offsets, so that none takes another's ports.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
# Below the ports that the system gives to outgoing connections (from 32768 on); each process begins elsewhere.
_POSSIBLE = range(1000, 24_000, 60)[_WORKER::_WORKERS]
_FIRST = os.getpid() * 37 % len(_POSSIBLE)
_offsets: Iterator[int] = itertools.cycle((*_POSSIBLE[_FIRST:], *_POSSIBLE[:_FIRST]))


def free_offset() -> int:
    """A port offset at which all services' ports are free."""
    for offset in _offsets:
        try:
            for port in PORTS.values():
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port + offset))
        except OSError:
            continue
        return offset
    raise AssertionError("unreachable")


def environment(**given: str) -> dict[str, str]:
    """This process's environment without settings of a desk, and with those given; no limit for callers without a key,
    because tests call as often as they like."""
    foreign = ("DATABASE_URL", "REDIS_URL", "PRICE_FEED", "SENTRY_DSN")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("BUYDESK_", "COV_"))}
    return {name: value for name, value in kept.items() if name not in foreign} | NO_LIMIT | given


@dataclass
class Running:
    """A `buydesk` process, or one that calls it, what it has printed so far, and how to call its services."""

    process: asyncio.subprocess.Process
    offset: int
    lines: list[str] = field(default_factory=list)

    @property
    def printed(self) -> str:
        return "\n".join(self.lines)

    def url(self, service: str) -> str:
        return f"http://127.0.0.1:{PORTS[service] + self.offset}"

    def client(self, service: str) -> httpx2.AsyncClient:
        return httpx2.AsyncClient(base_url=self.url(service), timeout=20)

    async def until_printed(self, text: str, seconds: float = START_SECONDS_MAX) -> None:
        async with asyncio.timeout(seconds):
            while text not in self.printed:
                assert self.process.returncode is None, self.printed
                await asyncio.sleep(0.02)

    async def stop(self, by: signal.Signals = signal.SIGTERM) -> int:
        """Asks it to stop; its exit code."""
        if self.process.returncode is None:
            self.process.send_signal(by)
        async with asyncio.timeout(30):
            return await self.process.wait()


async def _collect(running: Running) -> None:
    assert running.process.stdout is not None
    async for line in running.process.stdout:
        running.lines.append(line.decode().rstrip("\n"))


@contextlib.asynccontextmanager
async def buydesk(
    *arguments: str, offset: int = 0, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> AsyncIterator[Running]:
    """Runs the command; ends it at the end, killed if need be."""
    async with program(sys.executable, "-m", "buydesk", *arguments, offset=offset, env=env, cwd=cwd) as running:
        yield running


@contextlib.asynccontextmanager
async def program(
    *command: str, offset: int = 0, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> AsyncIterator[Running]:
    """The same for any program."""
    process = await asyncio.create_subprocess_exec(
        *command,
        env=environment(**(env or {})),
        cwd=cwd,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    running = Running(process, offset)
    collecting = asyncio.create_task(_collect(running))
    try:
        yield running
    finally:
        try:
            await running.stop()
        except TimeoutError:
            process.kill()
            await process.wait()
            raise
        finally:
            await collecting


@contextlib.asynccontextmanager
async def desk_up(data_dir: Path, *arguments: str, env: Mapping[str, str] | None = None) -> AsyncIterator[Running]:
    """A desk that is up, by `buydesk up` with these further arguments: open, unless the environment says otherwise."""
    env = {"BUYDESK_ACCESS": "open"} | dict(env or {})
    offset = free_offset()
    every = ("up", "--data-dir", str(data_dir), "--port-offset", str(offset), *arguments)
    async with buydesk(*every, offset=offset, env=env) as running:
        await running.until_printed("Try it")
        yield running


async def command(*arguments: str, data_dir: Path) -> str:
    """What a command for the desk in the data directory printed on stdout."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "buydesk", *arguments, "--data-dir", str(data_dir)),
        env=environment(),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    printed, said = await process.communicate()
    assert process.returncode == 0, said
    return printed.decode().strip()
