"""Clocks set forward and back (libfaketime), each service's in turn, while clients place orders."""

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import asyncpg

from bench.processes import PYTHON, free_base, running
from buydesk.backends.postgres.migrate import migrate
from buydesk.embedded.accounts import server_account
from buydesk.embedded.postgres import EmbeddedPostgres
from buydesk.embedded.programs import find_redis
from buydesk.embedded.redis import EmbeddedRedis
from buydesk.money import SATOSHI_PER_BTC
from buydesk.settings.model import variable
from buydesk.settings.secrets import KEY_PAIRS, SECRET_KEYS, TOKENS, new_token
from buydesk.signing_keys import new_signing_key, public_key
from buydesk.topology import PORTS
from chaos.buyers import Buyers, Load
from chaos.journal import Journal

if TYPE_CHECKING:
    Connection = asyncpg.Connection[asyncpg.Record]

# The desk heals faster than it would by itself, so that a round does not take a minute.
FAST = {"BUYDESK_FEED_INTERVAL_SECONDS": "2", "BUYDESK_REPORT_INTERVAL_SECONDS": "2"}
LIBRARY = "libfaketime.so.1"
START_SECONDS_MAX = 60.0
# So long a clock is off, and so many orders are sent meanwhile.
OFF_SECONDS = 3.0
ORDERS_PER_SECOND = 20
_POLL_SECONDS = 0.1


def libfaketime() -> Path | None:
    """The library that sets a process's clock, None where it is not installed."""
    return next((path for root in ("/usr/lib", "/usr/local/lib") for path in Path(root).rglob(LIBRARY)), None)


@dataclass(frozen=True)
class SteppedDesk:
    """A desk of seven processes, each with a clock of its own. `offset` is added to every port."""

    directory: Path
    offset: int
    dsn: str

    def set_clock(self, service: str, seconds: int) -> None:
        """Sets the service's clock so many seconds ahead of the true time, or behind it."""
        unfinished = self.directory / "unfinished"
        unfinished.write_text(f"{seconds:+d}s\n")
        unfinished.rename(clock_file(self.directory, service))

    @property
    def orders_url(self) -> str:
        return self._url("create_buy_order") + "/place_order/"

    def _url(self, service: str) -> str:
        return f"http://127.0.0.1:{PORTS[service] + self.offset}"

    async def missing(self, service: str) -> Mapping[str, str]:
        """What /readyz of the service says is missing, and why; empty when it is ready."""
        async with aiohttp.ClientSession() as session, session.get(self._url(service) + "/readyz") as response:
            document: dict[str, Any] = await response.json()
        return {each["what"]: each["why"] for each in document.get("missing", ())}

    async def until(self, service: str, *, is_off: bool, seconds_max: float) -> str | None:
        """What /readyz says of the clock once it says it is off, or "" once it says nothing; None when it does not."""
        give_up_at = time.monotonic() + seconds_max
        while time.monotonic() < give_up_at:
            said = (await self.missing(service)).get("clock", "")
            if bool(said) is is_off:
                return said
            await asyncio.sleep(_POLL_SECONDS)
        return None


def clock_file(directory: Path, service: str) -> Path:
    """Where libfaketime reads, at every look at the clock, what time it is for the service."""
    return directory / f"{service}.clock"


@contextlib.asynccontextmanager
async def stepped_desk(directory: Path) -> AsyncIterator[SteppedDesk]:
    """While entered, the desk runs. Exits where libfaketime or a Redis is not installed."""
    library, redis_program = libfaketime(), find_redis(server_account())
    if library is None or redis_program is None:
        sys.exit("clocks need libfaketime (Debian: faketime) and a redis-server")
    offset = free_base(PORTS.values())
    postgres, redis = EmbeddedPostgres(directory), EmbeddedRedis(directory, redis_program)
    await postgres.prepare()
    async with contextlib.AsyncExitStack() as stack:
        await postgres.start()
        stack.push_async_callback(postgres.stop)
        await redis.start()
        stack.push_async_callback(redis.stop)
        made = {name: new_signing_key() for name in SECRET_KEYS}
        keys = {public_keys: public_key(made[name]) for name, public_keys in KEY_PAIRS.items()}
        cap_satoshi, price_keys = 100 * SATOSHI_PER_BTC, [keys["price_keys"]]
        await migrate(postgres.dsn, livemode=False, cap_satoshi=cap_satoshi, price_keys=price_keys)
        made |= keys | {name: new_token() for name in TOKENS}
        shared = {variable(name): text for name, text in made.items()} | {
            variable("port_offset"): str(offset),
            "DATABASE_URL": postgres.dsn,
            "REDIS_URL": redis.url,
        }
        desk = SteppedDesk(directory, offset, postgres.dsn)
        for service in (
            "health_check",
            "api_cache_proxy",
            "api_updater",
            "db_proxy",
            "fetch_buy_orders",
            "process_buy_orders",
            "operate_desk",
            "create_buy_order",
        ):
            desk.set_clock(service, 0)
            own = {
                "LD_PRELOAD": str(library),
                "FAKETIME_TIMESTAMP_FILE": str(clock_file(directory, service)),
                "FAKETIME_NO_CACHE": "1",
                "DONT_FAKE_MONOTONIC": "1",
            }
            command = (*PYTHON, "buydesk", "serve", service)
            await stack.enter_async_context(running(command, directory / f"{service}.log", shared | FAST | own))
        async with asyncio.timeout(START_SECONDS_MAX):
            for service in PORTS:
                await _until_ready(desk, service)
        yield desk


async def _until_ready(desk: SteppedDesk, service: str) -> None:
    while True:
        with contextlib.suppress(aiohttp.ClientError):
            if not await desk.missing(service):
                return
        await asyncio.sleep(_POLL_SECONDS)


async def step(
    desk: SteppedDesk, service: str, seconds: int, buyers: Buyers, journal: Journal, *, seconds_max: float
) -> list[str]:
    """Sets a service's clock under load, waits until it says so, and sets it right; what was wrong, a line each."""
    wrong: list[str] = []
    buying = asyncio.create_task(buyers.buy(Load(ORDERS_PER_SECOND, OFF_SECONDS + 1)))
    journal.fault(f"the clock of {service} {seconds:+d} s")
    desk.set_clock(service, seconds)
    off_until = time.monotonic() + OFF_SECONDS
    said = await desk.until(service, is_off=True, seconds_max=seconds_max)
    if said is None:
        wrong.append(f"{service} {seconds:+d} s: /readyz did not say so within {seconds_max:g} s")
    elif not said.startswith(f"The clock of {service} is ") or ("ahead" if seconds > 0 else "behind") not in said:
        wrong.append(f"{service} {seconds:+d} s: /readyz said {said!r}")
    await asyncio.sleep(off_until - time.monotonic())
    journal.fault(f"the clock of {service} is right again")
    desk.set_clock(service, 0)
    if await desk.until(service, is_off=False, seconds_max=seconds_max) is None:
        wrong.append(f"{service} {seconds:+d} s: /readyz said so still after it was set right")
    await buying
    if not await _sells(buyers, seconds_max):
        wrong.append(f"{service} {seconds:+d} s: no order was placed after it was set right")
    return wrong


async def _sells(buyers: Buyers, seconds_max: float) -> bool:
    give_up_at = time.monotonic() + seconds_max
    while time.monotonic() < give_up_at:
        if (await buyers.buy_one()).status == 201:
            return True
        await asyncio.sleep(_POLL_SECONDS)
    return False
