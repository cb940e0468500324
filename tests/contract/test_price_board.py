"""One contract for every PriceBoard: in memory, in Redis, and remote across real TCP."""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from redis.asyncio import Redis

from buydesk.backends.memory_health import MemoryHealthDesk
from buydesk.backends.memory_prices import MemoryPriceBoard
from buydesk.backends.redis_prices import RedisPriceBoard
from buydesk.backends.remote import RemotePriceBoard
from buydesk.errors import PriceBoardUnavailable, PriceStale, PriceSuperseded, PriceUnavailable
from buydesk.money import Currency
from buydesk.prices import HISTORY_MINUTES_MAX, PriceBoard, PriceRecord, Quote, Rejection
from buydesk.reporting import Reporter
from buydesk.services.api_cache_proxy import create_app
from buydesk.settings import Settings
from tests.serving import free_port, served

NOON = datetime(2026, 1, 31, 12, 0, 0, 123456, tzinfo=UTC)
TTL = timedelta(seconds=60)
RECORDS_MAX = 150
# The smallest difference a board has to tell.
MOMENT = timedelta(microseconds=1)


class Clock:
    """Stands still until a test moves it."""

    def __init__(self) -> None:
        self.moment = NOON

    def __call__(self) -> datetime:
        return self.moment


@contextlib.asynccontextmanager
async def remote_board(settings: Settings, clock: Clock) -> AsyncIterator[RemotePriceBoard]:
    """The board as another process sees it."""
    reporter = Reporter("api_cache_proxy", MemoryHealthDesk(settings), settings)
    async with served(create_app(settings, MemoryPriceBoard(settings, clock), reporter, clock)) as url:
        board = RemotePriceBoard(url, settings)
        yield board
        await board.close()


@contextlib.asynccontextmanager
async def redis_board(settings: Settings, clock: Clock, redis_url: str) -> AsyncIterator[RedisPriceBoard]:
    client: Redis = Redis.from_url(redis_url)
    await client.flushdb()
    board = RedisPriceBoard(client, settings, clock)
    yield board
    await board.close()


@pytest.fixture
def settings() -> Settings:
    return Settings(price_history_records_max=RECORDS_MAX)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["memory", "redis", "remote"])
async def board(
    request: pytest.FixtureRequest, settings: Settings, clock: Clock, redis_url: str
) -> AsyncIterator[PriceBoard]:
    if request.param == "memory":
        yield MemoryPriceBoard(settings, clock)
    elif request.param == "remote":
        async with remote_board(settings, clock) as remote:
            yield remote
    else:
        async with redis_board(settings, clock, redis_url) as redis:
            yield redis


def record(as_of: datetime = NOON, rate_e8: int = 20_572_78 * 10**6) -> PriceRecord:
    return PriceRecord(
        id=uuid.uuid4(),
        as_of=as_of,
        expires_at=as_of + TTL,
        feed="sandbox",
        rates_e8={Currency.EUR: rate_e8, Currency.GBP: 18_271_51 * 10**6, Currency.USD: 21_712_51 * 10**6 + 1},
        used=(Quote("one", Currency.EUR, rate_e8 - 3, rate_e8 + 3, as_of - MOMENT),),
        rejected=(Rejection("ötħer", 'gave "no" answer\n'),),
        replayed_from=datetime(2023, 3, 9, tzinfo=UTC),
    )


async def test_board_on_which_nothing_ever_hung_has_no_price(board: PriceBoard) -> None:
    with pytest.raises(PriceUnavailable) as refusal:
        await board.latest()
    assert refusal.value.retry_after_seconds == 5
    assert list(await board.history(60)) == []


async def test_record_comes_back_as_it_was_published(board: PriceBoard) -> None:
    published = record()
    await board.publish(published)
    assert await board.latest() == published
    assert list(await board.history(60)) == [published]


async def test_newest_record_is_the_latest(board: PriceBoard) -> None:
    first, second = record(), record(NOON + MOMENT)
    await board.publish(first)
    await board.publish(second)
    assert await board.latest() == second
    assert list(await board.history(60)) == [first, second]


async def test_older_record_is_refused_and_changes_nothing(board: PriceBoard) -> None:
    hanging = record()
    await board.publish(hanging)
    with pytest.raises(PriceSuperseded) as refusal:
        await board.publish(record(NOON - MOMENT))
    assert refusal.value.facts == {"as_of": "2026-01-31T12:00:00.123456Z"}
    assert await board.latest() == hanging
    assert list(await board.history(60)) == [hanging]


async def test_older_record_is_refused_even_when_the_hanging_one_has_expired(board: PriceBoard, clock: Clock) -> None:
    await board.publish(record())
    clock.moment = NOON + 2 * TTL
    with pytest.raises(PriceSuperseded):
        await board.publish(record(NOON - MOMENT))


async def test_record_from_the_future_is_no_price_once_the_clock_stepped_back_and_gives_way(
    board: PriceBoard, settings: Settings, clock: Clock
) -> None:
    before, ahead = record(), record(NOON + timedelta(minutes=1))
    await board.publish(before)
    clock.moment = ahead.as_of
    await board.publish(ahead)
    skew = timedelta(seconds=settings.clock_skew_seconds_max)
    clock.moment = ahead.as_of - skew
    assert await board.latest() == ahead
    with pytest.raises(PriceSuperseded):
        await board.publish(record(clock.moment))
    clock.moment -= MOMENT
    with pytest.raises(PriceUnavailable):
        await board.latest()
    present = record(clock.moment)
    await board.publish(present)
    assert await board.latest() == present
    assert list(await board.history(60)) == [before, present]
    following = record(clock.moment + MOMENT)
    await board.publish(following)
    assert list(await board.history(60)) == [before, present, following]


async def test_another_record_of_the_same_moment_is_not_older(board: PriceBoard) -> None:
    first, second = record(), record()
    await board.publish(first)
    await board.publish(second)
    assert await board.latest() == second
    assert {each.id for each in await board.history(60)} == {first.id, second.id}


async def test_same_record_may_be_published_again_and_is_kept_once(board: PriceBoard) -> None:
    published = record()
    await board.publish(published)
    await board.publish(published)
    assert await board.latest() == published
    assert list(await board.history(60)) == [published]


async def test_publishing_again_may_shorten_a_record_and_never_extends_it(board: PriceBoard) -> None:
    published = record()
    shorter = replace(published, expires_at=NOON + TTL / 2)
    await board.publish(published)
    await board.publish(shorter)
    assert await board.latest() == shorter
    await board.publish(published)
    assert await board.latest() == shorter
    assert list(await board.history(60)) == [shorter]


async def test_record_is_valid_until_it_expires_and_stale_from_then_on(board: PriceBoard, clock: Clock) -> None:
    published = record()
    await board.publish(published)
    clock.moment = published.expires_at - MOMENT
    assert await board.latest() == published
    clock.moment = published.expires_at
    with pytest.raises(PriceStale) as refusal:
        await board.latest()
    assert refusal.value.retry_after_seconds == 5
    assert refusal.value.facts == {
        "as_of": "2026-01-31T12:00:00.123456Z",
        "expires_at": "2026-01-31T12:01:00.123456Z",
    }


async def test_stale_is_told_from_none_for_a_day(board: PriceBoard, clock: Clock) -> None:
    await board.publish(record())
    clock.moment = NOON + timedelta(days=1) - MOMENT
    with pytest.raises(PriceStale):
        await board.latest()
    clock.moment = NOON + timedelta(days=1)
    with pytest.raises(PriceUnavailable):
        await board.latest()


async def test_newer_record_ends_staleness(board: PriceBoard, clock: Clock) -> None:
    await board.publish(record())
    clock.moment = NOON + timedelta(days=2)
    newer = record(clock.moment)
    await board.publish(newer)
    assert await board.latest() == newer
    assert list(await board.history(HISTORY_MINUTES_MAX)) == [newer]


async def test_history_has_what_was_observed_within_the_minutes_oldest_first(board: PriceBoard, clock: Clock) -> None:
    records = [record(NOON + timedelta(minutes=minute)) for minute in range(4)]
    for each in records:
        clock.moment = each.as_of
        await board.publish(each)
    assert list(await board.history(3)) == records[1:]
    assert list(await board.history(1)) == records[3:]
    assert list(await board.history(HISTORY_MINUTES_MAX)) == records


async def test_history_is_bounded_and_loses_the_oldest(board: PriceBoard) -> None:
    records = [record(NOON + number * MOMENT) for number in range(RECORDS_MAX + 5)]
    for each in records:
        await board.publish(each)
    assert list(await board.history(60)) == records[5:]


async def test_publishing_at_once_leaves_the_newest_hanging(board: PriceBoard) -> None:
    records = [record(NOON + number * MOMENT) for number in range(20)]
    shuffled = [records[number * 7 % 20] for number in range(20)]
    results = await asyncio.gather(*map(board.publish, shuffled), return_exceptions=True)
    assert await board.latest() == records[-1]
    assert all(result is None or isinstance(result, PriceSuperseded) for result in results)
    kept = [shuffled[number] for number, result in enumerate(results) if result is None]
    assert list(await board.history(60)) == sorted(kept, key=lambda each: each.as_of)


async def test_check_passes_while_the_board_is_there(board: PriceBoard) -> None:
    await board.check()


async def assert_unavailable(board: PriceBoard) -> None:
    for call in (board.publish(record()), board.latest(), board.history(60), board.check()):
        with pytest.raises(PriceBoardUnavailable) as refusal:
            await call
        assert refusal.value.retry_after_seconds == 1
        assert refusal.value.__cause__ is not None
    await board.close()


async def test_remote_board_without_its_service_is_unavailable(settings: Settings) -> None:
    await assert_unavailable(RemotePriceBoard(f"http://127.0.0.1:{free_port()}", settings))


async def test_redis_board_without_redis_is_unavailable(settings: Settings) -> None:
    client: Redis = Redis.from_url(f"redis://127.0.0.1:{free_port()}", retry=None)
    await assert_unavailable(RedisPriceBoard(client, settings))


async def test_redis_that_does_not_answer_in_time_is_unavailable() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()
        gone.release()

    gone = asyncio.Semaphore(0)
    settings = Settings(remote_seconds_max=0.05)
    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    client: Redis = Redis.from_url(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    await assert_unavailable(RedisPriceBoard(client, settings))
    server.close()
    await gone.acquire()


async def test_every_key_in_redis_is_ours_and_expires_within_a_day(
    settings: Settings, clock: Clock, redis_url: str
) -> None:
    async with redis_board(settings, clock, redis_url) as board, Redis.from_url(redis_url) as client:
        await board.publish(record())
        keys: list[bytes] = [key async for key in client.scan_iter()]
        assert len(keys) == 2
        for key in keys:
            assert key.startswith(b"buydesk:")
            assert 0 < await client.ttl(key) <= 24 * 3600


async def test_recorded_prices_left_in_redis_are_no_live_prices(clock: Clock, redis_url: str) -> None:
    live: Redis = Redis.from_url(redis_url)
    async with redis_board(Settings(), clock, redis_url) as sandbox:
        await sandbox.publish(record())
        board = RedisPriceBoard(live, Settings(price_feed="live"), clock)
        with pytest.raises(PriceUnavailable):
            await board.latest()
        assert list(await board.history(60)) == []
        await board.close()


@pytest.mark.parametrize("garbage", [b"", b"no JSON", b"[]", b'{"id":1}'])
async def test_what_is_no_record_in_redis_is_never_a_price(
    settings: Settings, clock: Clock, redis_url: str, garbage: bytes
) -> None:
    async with redis_board(settings, clock, redis_url) as board, Redis.from_url(redis_url) as client:
        await client.hset("buydesk:prices:sandbox:hanging", "document", garbage)
        await client.zadd(
            "buydesk:prices:sandbox:history", {garbage: (NOON - datetime(1970, 1, 1, tzinfo=UTC)) / MOMENT}
        )
        with pytest.raises(PriceBoardUnavailable, match="not a price record"):
            await board.latest()
        with pytest.raises(PriceBoardUnavailable, match="not a price record"):
            await board.history(60)
        published = record()
        await board.publish(published)
        assert await board.latest() == published


async def test_redis_client_that_decodes_answers_serves_as_well(
    settings: Settings, clock: Clock, redis_url: str
) -> None:
    async with redis_board(settings, clock, redis_url):
        client: Redis = Redis.from_url(redis_url, decode_responses=True)
        board = RedisPriceBoard(client, settings, clock)
        published = record()
        await board.publish(published)
        assert await board.latest() == published
        assert list(await board.history(60)) == [published]
        await board.close()
