"""One contract for every RateStore: the model, in memory, in Redis, in both, in both without Redis, and over TCP."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import pytest
from limits.aio.storage import memory as limits_memory
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from buydesk.backends.fallback import FallbackRateStore
from buydesk.backends.memory import rates as in_memory
from buydesk.backends.memory.prices import MemoryPriceStore
from buydesk.backends.memory.rates import MemoryRateStore
from buydesk.backends.memory.reports import MemoryReportStore
from buydesk.backends.redis.rates import RedisRateStore
from buydesk.backends.remote.rates import RemoteRateStore
from buydesk.clients.rates import LOTS_MAX, Lot, RateStore
from buydesk.errors import InvalidRequest, RatesUnavailable
from buydesk.observability.reporter import Reporter
from buydesk.services import api_cache_proxy
from tests.builders import settings
from tests.clock import FakeClock
from tests.model_rates import ModelRates
from tests.serving import free_port, served

SHOP, OTHER = "orders:client:shop", "orders:client:{other}/-1"


class Time:
    """The clock of the library's memory."""

    def __init__(self) -> None:
        self.seconds = 1_000_000_020.0  # the beginning of a minute

    def time(self) -> float:
        return self.seconds


@dataclass
class Bench:
    store: RateStore
    let_pass: Callable[[float], Awaitable[None]]  # seconds


@contextlib.asynccontextmanager
async def remote_store(behind: RateStore) -> AsyncIterator[RemoteRateStore]:
    given = settings()
    reporter = Reporter("api_cache_proxy", MemoryReportStore(given), given)
    async with served(api_cache_proxy.create_app(given, MemoryPriceStore(given), behind, reporter)) as url:
        store = RemoteRateStore(url, given)
        yield store
        await store.close()


async def age(client: Redis, seconds: float) -> None:
    """Lets time pass for all that is in Redis, and nothing else."""
    for key in await client.keys("*"):
        await client.pexpire(key, max(1, await client.pttl(key) - int(seconds * 1000)))
    await asyncio.sleep(0.01)


@pytest.fixture(params=["model", "memory", "redis", "fallback", "fallen_back", "remote"])
async def bench(
    request: pytest.FixtureRequest, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Bench]:
    time, clock = Time(), FakeClock()
    monkeypatch.setattr(limits_memory, "time", time)

    async def in_memory_pass(seconds: float) -> None:
        time.seconds += seconds
        clock.seconds += seconds

    async with contextlib.AsyncExitStack() as stack:
        if request.param == "model":
            yield Bench(ModelRates(clock), in_memory_pass)
        elif request.param == "memory":
            yield Bench(MemoryRateStore(), in_memory_pass)
        elif request.param == "remote":
            yield Bench(await stack.enter_async_context(remote_store(MemoryRateStore())), in_memory_pass)
        elif request.param == "fallen_back":
            nowhere: Redis = Redis(port=free_port(), retry=Retry(NoBackoff(), 0))
            yield Bench(FallbackRateStore(RedisRateStore(nowhere, settings()), MemoryRateStore()), in_memory_pass)
            await nowhere.aclose()
        else:
            client: Redis = Redis.from_url(redis_url)
            await client.flushdb()
            store: RateStore = RedisRateStore(client, settings())
            if request.param == "fallback":
                store = FallbackRateStore(store, MemoryRateStore())
            yield Bench(store, lambda seconds: age(client, seconds))
            await store.close()


async def taken(bench: Bench, *lots: Lot) -> list[int]:
    return [count.taken for count in await bench.store.take(lots)]


async def test_a_lot_is_taken_as_far_as_there_is_room(bench: Bench) -> None:
    assert await taken(bench, Lot(SHOP, 60, 1)) == [1]
    assert await taken(bench, Lot(SHOP, 60, 49), Lot(OTHER, 60, 60), Lot(SHOP, 60, 20)) == [49, 60, 10]
    [count] = await bench.store.take([Lot(SHOP, 60, 3)])
    assert (count.taken, count.current, count.previous) == (0, 60, 0)
    assert 50 < count.seconds <= 60
    assert await taken(bench) == []


async def test_a_lot_of_more_than_the_limit_fills_it(bench: Bench) -> None:
    assert await taken(bench, Lot(SHOP, 10, 25), Lot(SHOP, 10, 1)) == [10, 0]


async def test_a_lot_without_requests_only_asks(bench: Bench) -> None:
    [count] = await bench.store.take([Lot(SHOP, 60, 0)])
    assert (count.taken, count.current, count.previous) == (0, 0, 0)
    await bench.store.take([Lot(SHOP, 60, 7)])
    [count] = await bench.store.take([Lot(SHOP, 60, 0)])
    assert (count.taken, count.current, count.previous) == (0, 7, 0)


async def test_a_minute_that_is_over_counts_the_less_the_longer_it_is(bench: Bench) -> None:
    await bench.store.take([Lot(SHOP, 60, 40)])
    await bench.let_pass(60)
    [count] = await bench.store.take([Lot(SHOP, 60, 5)])
    assert (count.taken, count.current, count.previous) == (5, 5, 40)
    await bench.let_pass(29.5)
    [count] = await bench.store.take([Lot(SHOP, 60, 60)])
    assert count.taken in (34, 35)  # of 60, without 5 and half of 40
    assert 25 < count.seconds <= 30.5
    await bench.let_pass(200)
    [count] = await bench.store.take([Lot(SHOP, 60, 0)])
    assert (count.current, count.previous) == (0, 0)


async def test_another_limit_is_another_count(bench: Bench) -> None:
    assert await taken(bench, Lot(SHOP, 60, 60)) == [60]
    assert await taken(bench, Lot(SHOP, 90, 1), Lot(SHOP, 60, 1)) == [1, 0]


async def test_many_count_at_once_and_no_more_than_the_limit(bench: Bench) -> None:
    counts = await asyncio.gather(*(taken(bench, Lot(SHOP, 60, 7)) for _ in range(20)))
    assert sum(each for [each] in counts) == 60


async def test_memory_that_is_full_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_memory, "WINDOWS_MAX", 3)
    store = MemoryRateStore()
    for number in range(10):
        await store.take([Lot(f"orders:address:192.0.2.{number}", 60, 1)])
        assert len(store._storage.expirations) <= 3
    await store.close()


async def test_without_redis_memory_counts_and_with_it_again_redis(
    redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    client: Redis = Redis.from_url(redis_url)
    await client.flushdb()
    store = FallbackRateStore(RedisRateStore(client, settings()), MemoryRateStore())
    assert [count.taken for count in await store.take([Lot(SHOP, 60, 50)])] == [50]
    for key in await client.keys("buydesk:rates:sandbox:*"):  # somebody else's
        await client.delete(key)
        await client.rpush(key, "x")
    [count] = await store.take([Lot(SHOP, 60, 60)])
    assert count.taken == 60
    await client.flushdb()
    [count] = await store.take([Lot(SHOP, 60, 60)])
    assert count.taken == 60
    said = [record.message for record in caplog.records if record.name == "buydesk.services.api_cache_proxy"]
    assert len(said) == 1
    assert "Redis counts no requests, and memory stands in" in said[0]
    await store.close()


async def test_only_who_has_the_token_counts_and_only_what_can_be_counted() -> None:
    async with remote_store(MemoryRateStore()) as store:
        stranger = RemoteRateStore(store._url, settings(counting_tokens="guessed"))
        with pytest.raises(RatesUnavailable, match="unauthorized"):
            await stranger.take([Lot(SHOP, 60, 1)])
        await stranger.close()
        for lot in (Lot("", 60, 1), Lot(SHOP, 0, 1), Lot(SHOP, 60, -1), Lot("x" * 301, 60, 1)):
            with pytest.raises(InvalidRequest, match="lots"):
                await store.take([lot])
        with pytest.raises(InvalidRequest, match="lots"):
            await store.take([Lot(SHOP, 60, 1)] * (LOTS_MAX + 1))
        assert len(await store.take([Lot("x" * 300, 60, 1)] * LOTS_MAX)) == LOTS_MAX


async def test_a_store_that_nobody_answers_for_says_so() -> None:
    store = RemoteRateStore(f"http://127.0.0.1:{free_port()}", settings())
    with pytest.raises(RatesUnavailable):
        await store.take([Lot(SHOP, 60, 1)])
    await store.close()
