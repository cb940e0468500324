"""Desks to measure: the real command, on free ports, in data directories of their own."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import aiohttp
import asyncpg
import psutil

from bench.processes import PYTHON, BenchFailed, cpu_seconds, free_base, last_lines, rss_peak_bytes, running
from buydesk.backends.postgres.registry import own_desk
from buydesk.clients.model import NewKey
from buydesk.clients.rates import PER_MINUTE_MAX
from buydesk.clients.registry import CreateClient, LimitClient, Limits, Operator, create_key
from buydesk.embedded.postgres import processes_on
from buydesk.money import Currency
from buydesk.orders.model import ANONYMOUS
from buydesk.topology import PORTS

START_SECONDS_MAX = 60.0
POLL_SECONDS = 0.01
CONNECT_SECONDS_MAX = 10.0
DURABLE = ("fsync", "full_page_writes", "synchronous_commit")

FIRST_ORDER = {"currency": "EUR", "amount": "0.05"}


@dataclass(frozen=True)
class Desk:
    """A desk that has answered its first order. `started_seconds` is from the command's start to that 201."""

    data_dir: Path
    offset: int
    process: psutil.Process
    started_seconds: float
    is_separate: bool

    def url(self, service: str) -> str:
        return f"http://127.0.0.1:{PORTS[service] + self.offset}"

    @property
    def orders_url(self) -> str:
        return self.url("create_buy_order") + "/place_order/"

    @property
    def socket_dir(self) -> Path:
        return self.data_dir / "socket"

    def dsn(self, database: str = "buydesk") -> str:
        return f"postgresql://buydesk@/{database}?host={quote(str(self.socket_dir))}&port=5432"

    @contextlib.asynccontextmanager
    async def database(self, name: str = "buydesk") -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
        """A connection to a database of the desk's server."""
        connection = await asyncpg.connect(self.dsn(name), timeout=CONNECT_SECONDS_MAX)
        try:
            yield connection
        finally:
            await connection.close(timeout=CONNECT_SECONDS_MAX)

    async def client_keys(self, count: int) -> list[str]:
        """A key for each of so many new clients, which have limits that they do not reach."""
        limits = Limits(10**15, 10**15, PER_MINUTE_MAX, {Currency.EUR: 10**13})
        found = []
        async with own_desk(self.dsn(), Operator("bench", "here")) as own:
            for number in range(count):
                client = f"client-{number}"
                await own.change(CreateClient(client, limits), "")
                key = await create_key(own.registry, NewKey(client, ["orders:create"]), "", own.by)
                found.append(key.text)
        return found

    async def anonymous_key(self) -> str:
        """A key of the client whose all orders without a key are, with a rate that it does not reach."""
        async with own_desk(self.dsn(), Operator("bench", "here")) as own:
            await own.change(LimitClient(ANONYMOUS, Limits(rate_per_minute=PER_MINUTE_MAX)), "")
            return (await create_key(own.registry, NewKey(ANONYMOUS, ["orders:read"]), "", own.by)).text

    @contextlib.asynccontextmanager
    async def webhook(self, url: str) -> AsyncIterator[Callable[[], Awaitable[int]]]:
        """While entered, all events of orders without a key are delivered there; says how many have been."""
        hooks = self.url("process_buy_orders") + "/webhooks"
        asked = {"url": url, "events": ["order.placed"], "description": "bench"}
        async with aiohttp.ClientSession(raise_for_status=True) as session, self.database() as database:
            async with session.post(hooks, json=asked) as response:
                hook = (await response.json())["id"]

            async def delivered() -> int:
                return int(await database.fetchval("SELECT delivered FROM webhooks WHERE id = $1::uuid", hook))

            yield delivered
            async with session.delete(f"{hooks}/{hook}"):
                pass

    def processes(self) -> dict[str, list[psutil.Process]]:
        """All its processes by what they do: `desk` (or each service by its name), `postgres`, `redis`."""
        found = {"supervisor" if self.is_separate else "desk": [self.process]}
        for child in self.process.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                words = child.cmdline()
                name = words[-1] if words[-2:-1] == ["serve"] else child.name().split("-")[0]
                found.setdefault(name, []).append(child)
        return found

    def cpu_seconds(self) -> dict[str, float]:
        """CPU time so far, by what the processes do."""
        spent: dict[str, float] = {}
        for name, processes in self.processes().items():
            for process in processes:
                with contextlib.suppress(psutil.Error):
                    spent[name] = spent.get(name, 0.0) + cpu_seconds(process)
        return spent

    def python_peak_bytes(self) -> int:
        """The most memory its Python processes have had (PostgreSQL and Redis are not counted)."""
        found = self.processes()
        python = [each for name, group in found.items() if name not in ("postgres", "redis") for each in group]
        return sum(map(rss_peak_bytes, python))


@contextlib.asynccontextmanager
async def desk_up(data_dir: Path, *arguments: str) -> AsyncIterator[Desk]:
    """A desk by `buydesk up` with these further arguments; raises BenchFailed unless its database is durable."""
    offset = free_base(PORTS.values())
    log = data_dir.with_suffix(".log")
    started = time.monotonic()
    command = (*PYTHON, "buydesk", "up", "--data-dir", str(data_dir), "--port-offset", str(offset), *arguments)
    try:
        async with running(command, log) as process:
            url = f"http://127.0.0.1:{PORTS['create_buy_order'] + offset}/place_order/"
            await until_placed(url, process, log)
            desk = Desk(data_dir, offset, process, time.monotonic() - started, "--separate" in arguments)
            await require_durable(desk)
            yield desk
    finally:
        # None, unless the desk itself was killed.
        for left in processes_on(data_dir / "postgres"):
            with contextlib.suppress(psutil.Error):
                left.kill()


async def require_durable(desk: Desk) -> dict[str, str]:
    """The settings that make a commit last; raises BenchFailed when one of them is not on."""
    async with desk.database() as connection:
        found = {name: str(await connection.fetchval(f"SHOW {name}")) for name in DURABLE}
    off = [f"{name} is {value}" for name, value in found.items() if value != "on"]
    if off:
        raise BenchFailed(f"this database does not keep what it commits: {', '.join(off)}")
    return found


async def until_placed(url: str, process: psutil.Process, log: Path) -> None:
    """Returns when the URL has answered an order with 201; raises BenchFailed when that takes too long."""
    said: object = "no answer"
    async with aiohttp.ClientSession() as session:
        try:
            async with asyncio.timeout(START_SECONDS_MAX):
                while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    with contextlib.suppress(aiohttp.ClientConnectionError):
                        async with session.post(url, json=FIRST_ORDER) as response:
                            said = f"{response.status}: {json.dumps(await response.json(content_type=None))}"
                            if response.status == 201:
                                return
                    await asyncio.sleep(POLL_SECONDS)
        except TimeoutError:
            pass
    raise BenchFailed(f"{url} took no order ({said}); its log ends:\n{last_lines(log)}")
