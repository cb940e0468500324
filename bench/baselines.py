"""What the desk is compared with: pgbench on the same server, the echo service, the plain service."""

import contextlib
import re
import statistics
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg

from bench.desk import Desk, until_placed
from bench.load import BEYOND_SECONDS_MAX, HERE
from bench.processes import PYTHON, BenchFailed, free_base, output_of, running
from buydesk.embedded.programs import installed_programs

PGBENCH_DATABASE = "bench_pgbench"
PLAIN_DATABASE = "bench_plain"
POSTGRES = 18
BARE_CLIENTS = 16
FIRST_PORT = 8001  # and more, until one is free


class Pgbench:
    """Orders by pgbench, in a database of its own on a desk's server; every run is checked against its tables."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        # The one of the server's own installation: always there, and of the same version.
        self._program = installed_programs(POSTGRES) / "bin" / "pgbench"
        self._env = {
            "PGHOST": str(desk.socket_dir),
            "PGPORT": "5432",
            "PGUSER": "buydesk",
            "PGDATABASE": PGBENCH_DATABASE,
        }

    async def prepare(self) -> None:
        """Makes its database."""
        await make_database(self._desk, PGBENCH_DATABASE)
        async with self._desk.database(PGBENCH_DATABASE) as database:
            await database.execute((HERE / "pgbench_tables.sql").read_text())

    async def per_second(self, clients: int, seconds: float, script: str = "pgbench_order.sql") -> float:
        """Orders per second by so many clients; raises BenchFailed when its tables do not hold each of them."""
        before = await self._count()
        options = ("--no-vacuum", "--protocol=prepared", f"--client={clients}", f"--jobs={min(clients, 2)}")
        command = (str(self._program), *options, f"--time={max(1, round(seconds))}", f"--file={HERE / script}")
        printed = await output_of(command, seconds + BEYOND_SECONDS_MAX, self._env)
        transactions = int(_number(r"transactions actually processed: (\d+)", printed))
        failed = int(_number(r"number of failed transactions: (\d+)", printed))
        placed = await self._count() - before
        if failed or placed != transactions:
            raise BenchFailed(f"pgbench made {transactions} orders, {failed} failed, and {placed} are there")
        return _number(r"tps = ([\d.]+)", printed)

    async def bare_latency(self, rate: int, seconds: float) -> tuple[float, float]:
        """p50 and p99, in ms, of the least that can be durable: a number inserted into a table without an index, one a
        transaction, at a fixed rate, counted from when each was due. No HTTP, no cap, nothing to look up."""
        with tempfile.TemporaryDirectory() as directory:
            prefix = Path(directory) / "log"
            options = ("--no-vacuum", "--protocol=prepared", f"--client={BARE_CLIENTS}", f"--rate={rate}", "--log")
            command = (str(self._program), *options, f"--log-prefix={prefix}", f"--time={max(1, round(seconds))}")
            script = f"--file={HERE / 'pgbench_bare.sql'}"
            await output_of((*command, script), seconds + BEYOND_SECONDS_MAX, self._env)
            hundredths = statistics.quantiles(_logged_ms(Path(directory)), n=100)
        return hundredths[49], hundredths[98]

    async def _count(self) -> int:
        async with self._desk.database(PGBENCH_DATABASE) as database:
            row = await database.fetchrow(
                "SELECT used_satoshi, last_number, (SELECT count(*) FROM orders), (SELECT max(number) FROM orders), "
                "(SELECT coalesce(sum(satoshi), 0) FROM orders) FROM exposure"
            )
        assert row is not None  # noqa: S101  # pgbench_tables.sql makes it
        used, last_number, count, highest, satoshi = row
        if used != satoshi or not last_number == count == (highest or 0):
            raise BenchFailed("pgbench's tables do not add up")
        return int(count)


@contextlib.asynccontextmanager
async def echo(directory: Path) -> AsyncIterator[str]:
    """Where the echo service takes orders, while it runs."""
    async with _served("bench.echo", directory, {}) as url:
        yield url


@contextlib.asynccontextmanager
async def plain(desk: Desk, directory: Path) -> AsyncIterator[str]:
    """Where the plain service takes orders, while it runs; its database is on the desk's server."""
    await make_database(desk, PLAIN_DATABASE)
    async with _served("bench.plain", directory, {"DATABASE_URL": desk.dsn(PLAIN_DATABASE)}) as url:
        yield url


async def make_database(desk: Desk, name: str) -> None:
    """A new database on the desk's server."""
    async with desk.database() as database:
        with contextlib.suppress(asyncpg.DuplicateDatabaseError):
            await database.execute(f"CREATE DATABASE {name}")


@contextlib.asynccontextmanager
async def _served(module: str, directory: Path, env: dict[str, str]) -> AsyncIterator[str]:
    port = free_base((FIRST_PORT,)) + FIRST_PORT
    log = directory / f"{module}.log"
    url = f"http://127.0.0.1:{port}/place_order/"
    async with running((*PYTHON, module, str(port)), log, env) as process:
        await until_placed(url, process, log)
        yield url


def _logged_ms(directory: Path) -> list[float]:
    """The latencies in pgbench's logs: the third column, in microseconds."""
    return [int(line.split()[2]) / 1000 for file in directory.iterdir() for line in file.read_text().splitlines()]


def _number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    if found is None:
        raise BenchFailed(f"pgbench says something unexpected: {text[-500:]}")
    return float(found[1])
