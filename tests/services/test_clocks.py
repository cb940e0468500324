"""Where a service hears what time it is elsewhere, each over real TCP, and what its /readyz says of it."""

import contextlib
import socket
from collections.abc import AsyncIterator
from datetime import datetime, timedelta

import httpx2
import pytest
from aiohttp import web
from redis.asyncio import Redis

from buydesk.backends.memory.reports import MemoryReportStore
from buydesk.backends.postgres.ledger import PostgresLedger
from buydesk.backends.redis.faults import RedisCheck
from buydesk.backends.redis.prices import RedisPriceStore
from buydesk.backends.remote import RemotePriceStore
from buydesk.backends.sources import EXCHANGES
from buydesk.backends.sources.exchange import ExchangeSource
from buydesk.errors import ClockSkewed, DeskError
from buydesk.observability.clock_skew import ClockMonitor
from buydesk.observability.reporter import Reporter
from buydesk.prices.model import FeedStatus
from buydesk.runtime.wiring import wire
from buydesk.services import fetch_buy_orders
from buydesk.times import Clock, utc_now
from buydesk.topology import PORTS
from tests.builders import settings
from tests.databases import Databases
from tests.desks import free_offset
from tests.model_ledger import ModelLedger
from tests.model_registry import ModelRefusals
from tests.serving import served

HOUR = timedelta(hours=1)
BEHIND = r"The clocks of here and {} \(3[56]\d\d s ahead of here\) differ, and it is not known which is off\."


class Behind(Clock):
    """An hour behind."""

    def now(self) -> datetime:
        return super().now() - HOUR


def an_hour_behind() -> ClockMonitor:
    return ClockMonitor("here", 10, Behind())


async def test_postgresql_is_asked_what_time_it_is(databases: Databases) -> None:
    ledger = PostgresLedger(await databases.new(), settings(), livemode=False, clocks=an_hour_behind())
    with pytest.raises(ClockSkewed, match=BEHIND.format("PostgreSQL")):
        await ledger.check()
    await ledger.close()


async def test_redis_is_asked_what_time_it_is(redis_url: str) -> None:
    clocks = an_hour_behind()
    store = RedisPriceStore(Redis.from_url(redis_url), settings(), clocks=clocks)
    await store.put_feed_status(FeedStatus(utc_now(), "sandbox", "", ()))
    await store.close()
    with pytest.raises(ClockSkewed, match=BEHIND.format("Redis")):
        clocks.require_agreement_with("Redis")
    clocks = an_hour_behind()
    check = RedisCheck(Redis.from_url(redis_url), {}, 5, clocks)
    await check()
    await check.close()
    with pytest.raises(ClockSkewed, match=BEHIND.format("Redis")):
        clocks.require_agreement_with("Redis")


async def test_services_that_say_nothing_do_not_keep_health_checks_answer_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("buydesk.runtime.wiring._CLOCKS_ASKED_SECONDS", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as frozen:
        address = f"http://127.0.0.1:{frozen.getsockname()[1]}"
        given = settings(db_proxy_url=address, api_cache_proxy_url=address, remote_seconds_max=60)
        wired = wire(given, ["health_check"])
        async with served(wired.apps["health_check"]) as url, httpx2.AsyncClient() as client:
            answer = await client.get(f"{url}/readyz")
        await wired.close()
    assert (answer.status_code, answer.json()) == (200, {"status": "ready"})


async def test_services_date_their_answers_and_refusals() -> None:
    given, clocks = settings(), an_hour_behind()
    app = fetch_buy_orders.create_app(
        given, ModelLedger(), Reporter("fetch_buy_orders", MemoryReportStore(given), given), ModelRefusals()
    )
    async with served(app) as url:
        remote = RemotePriceStore(url, given, clocks)
        with pytest.raises(DeskError):
            await remote.latest()
        await remote.close()
    with pytest.raises(ClockSkewed, match=BEHIND.format("api_cache_proxy")):
        clocks.require_agreement_with("api_cache_proxy")


@contextlib.asynccontextmanager
async def exchange(clocks: ClockMonitor, **headers: str) -> AsyncIterator[ExchangeSource]:
    async def answer(_: web.Request) -> web.Response:
        return web.json_response({}, headers=headers)

    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    source = ExchangeSource(EXCHANGES[0], f"http://127.0.0.1:{runner.addresses[0][1]}", settings(), clocks=clocks)
    yield source
    await source.close()
    await runner.cleanup()


@pytest.mark.parametrize("headers", [{}, {"Age": "3500"}], ids=["fresh", "from a cache"])
async def test_exchanges_date_their_answers_unless_a_cache_has_kept_them(headers: dict[str, str]) -> None:
    clocks = an_hour_behind()
    async with exchange(clocks, **headers) as source:
        with pytest.raises(DeskError):
            await source.quotes()
    if headers:
        clocks.require_agreement_with(source.name)
    else:
        with pytest.raises(ClockSkewed, match=BEHIND.format(source.name)):
            clocks.require_agreement_with(source.name)


@pytest.mark.parametrize("services", [*([name] for name in PORTS), list(PORTS)], ids=[*PORTS, "one process"])
async def test_every_service_says_at_readyz_that_its_clock_is_off(
    services: list[str], databases: Databases, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = settings(database_url=await databases.new(), port_offset=free_offset())
    own = services[0] if len(services) == 1 else "the desk"
    told = f"The clock of {own} is 61 s ahead of two others."

    async def is_off(_: ClockMonitor) -> None:
        raise ClockSkewed(told)

    monkeypatch.setattr(ClockMonitor, "check", is_off)
    wired = wire(given, services)
    for app in wired.apps.values():
        async with served(app) as url, httpx2.AsyncClient() as client:
            missing = (await client.get(f"{url}/readyz")).json()["missing"]
            assert {"what": "clock", "why": told} in missing
    await wired.close()
