"""One contract for every PriceStore: in memory, in Redis, in both, in both without Redis, and over TCP."""

import asyncio
import contextlib
import math
import random
import uuid
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from redis.asyncio import Redis

from buydesk.backends.fallback import FallbackPriceStore
from buydesk.backends.memory import prices as memory_prices
from buydesk.backends.memory.prices import MemoryPriceStore
from buydesk.backends.memory.rates import MemoryRateStore
from buydesk.backends.memory.reports import MemoryReportStore
from buydesk.backends.redis.prices import RedisPriceStore
from buydesk.backends.remote import RemotePriceStore
from buydesk.errors import PriceStale, PriceStoreUnavailable, PriceSuperseded, PriceUnavailable
from buydesk.money import Currency
from buydesk.observability.reporter import Reporter
from buydesk.prices.documents import record_document
from buydesk.prices.model import (
    HISTORY_MINUTES_MAX,
    HISTORY_POINTS_MAX,
    SOURCES,
    FeedStatus,
    PricePoint,
    PriceRecord,
    PriceStore,
    Quote,
    RejectedQuote,
    Rule,
    SourceStatus,
)
from buydesk.services.api_cache_proxy import create_app
from buydesk.settings.model import Settings
from buydesk.times import EPOCH
from tests import builders
from tests.builders import signed
from tests.clock import FakeClock
from tests.serving import free_port, served

NOON = datetime(2026, 1, 31, 12, 0, 0, 123456, tzinfo=UTC)
TTL = timedelta(seconds=60)
RECORDS_MAX = 150
# The smallest difference a store has to tell.
MOMENT = timedelta(microseconds=1)


@contextlib.asynccontextmanager
async def remote_board(settings: Settings, clock: FakeClock) -> AsyncIterator[RemotePriceStore]:
    """The store as another process sees it."""
    reporter = Reporter("api_cache_proxy", MemoryReportStore(settings), settings)
    async with served(
        create_app(settings, MemoryPriceStore(settings, clock), MemoryRateStore(), reporter, clock)
    ) as url:
        store = RemotePriceStore(url, settings)
        yield store
        await store.close()


@contextlib.asynccontextmanager
async def redis_board(settings: Settings, clock: FakeClock, redis_url: str) -> AsyncIterator[RedisPriceStore]:
    client: Redis = Redis.from_url(redis_url)
    await client.flushdb()
    store = RedisPriceStore(client, settings, clock)
    yield store
    await store.close()


@pytest.fixture
def settings() -> Settings:
    return builders.settings(price_history_records_max=RECORDS_MAX)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(NOON)


@pytest.fixture(params=["memory", "redis", "remote", "fallback", "fallen_back"])
async def store(
    request: pytest.FixtureRequest, settings: Settings, clock: FakeClock, redis_url: str
) -> AsyncIterator[PriceStore]:
    if request.param == "memory":
        yield MemoryPriceStore(settings, clock)
    elif request.param == "remote":
        async with remote_board(settings, clock) as remote:
            yield remote
    elif request.param == "fallen_back":
        nowhere: Redis = Redis.from_url(f"redis://127.0.0.1:{free_port()}", retry=None)
        fallback = FallbackPriceStore(RedisPriceStore(nowhere, settings, clock), MemoryPriceStore(settings, clock))
        yield fallback
        await fallback.close()
    elif request.param == "fallback":
        async with redis_board(settings, clock, redis_url) as redis:
            yield FallbackPriceStore(redis, MemoryPriceStore(settings, clock))
    else:
        async with redis_board(settings, clock, redis_url) as redis:
            yield redis


def record(as_of: datetime = NOON, rate_e8: int = 20_572_78 * 10**6, decided_at: datetime | None = None) -> PriceRecord:
    rates_e8 = {Currency.EUR: rate_e8, Currency.GBP: 18_271_51 * 10**6, Currency.USD: 21_712_51 * 10**6 + 1}
    return signed(
        PriceRecord(
            id=uuid.uuid4(),
            as_of=as_of,
            expires_at=as_of + TTL,
            feed="sandbox",
            rates_e8=rates_e8,
            used=tuple(
                Quote(source, currency, rate_e8 - 3, rate_e8 + 3, as_of)
                for currency, rate_e8 in rates_e8.items()
                for source in SOURCES["sandbox"][:2]
            ),
            rejected=(
                RejectedQuote("sandbox-3", 'gave "nö" answer\n'),
                RejectedQuote("sandbox-4", "is too far off", Quote("sandbox-4", Currency.GBP, 10**8, 10**8, as_of)),
            ),
            replayed_from=datetime(2023, 3, 9, tzinfo=UTC),
            rule=Rule(quote_age_seconds_max=30, spread_bp_max=100, deviation_bp_max=100, sources_min=2),
            decided_at=decided_at or as_of,
            bids_e8={currency: rate_e8 - 3 for currency, rate_e8 in rates_e8.items()},
            asks_e8={currency: rate_e8 + 3 for currency, rate_e8 in rates_e8.items()},
        )
    )


def state(at: datetime = NOON, problem: str = "") -> FeedStatus:
    rates = {Currency.EUR: 20_572_78 * 10**6, Currency.GBP: 18_271_51 * 10**6}
    return FeedStatus(
        at,
        "sandbox",
        problem,
        (
            SourceStatus("one", "", mids_e8=rates, quoted_at=at - MOMENT),
            SourceStatus("ötħer", 'gave "no" answer\n', failures=4, resting_until=at + TTL),
        ),
    )


async def whole_history(store: PriceStore, minutes: int = 60) -> list[PricePoint]:
    return list(await store.history(minutes, HISTORY_POINTS_MAX))


def points_of(records: Sequence[PriceRecord]) -> list[PricePoint]:
    return [each.point() for each in records]


async def test_store_on_which_nothing_ever_hung_has_no_price(store: PriceStore) -> None:
    with pytest.raises(PriceUnavailable) as refusal:
        await store.latest()
    assert refusal.value.retry_after_seconds == 5
    assert await whole_history(store) == []


async def test_record_comes_back_as_it_was_published(store: PriceStore) -> None:
    published = record()
    await store.publish(published)
    assert await store.latest() == published
    assert await whole_history(store) == points_of([published])


async def test_newest_record_is_the_latest(store: PriceStore) -> None:
    first, second = record(), record(NOON + MOMENT)
    await store.publish(first)
    await store.publish(second)
    assert await store.latest() == second
    assert await whole_history(store) == points_of([first, second])


async def test_record_that_was_decided_later_is_newer_though_its_oldest_quote_is_older(store: PriceStore) -> None:
    first = record(decided_at=NOON + 2 * MOMENT)
    later = record(NOON - TTL / 4, decided_at=NOON + 3 * MOMENT)
    await store.publish(first)
    await store.publish(later)
    assert await store.latest() == later
    assert await whole_history(store) == points_of([later])
    with pytest.raises(PriceSuperseded):
        await store.publish(record(NOON + MOMENT))
    assert await store.latest() == later


async def test_older_record_is_refused_and_changes_nothing(store: PriceStore) -> None:
    current = record()
    await store.publish(current)
    with pytest.raises(PriceSuperseded) as refusal:
        await store.publish(record(NOON - MOMENT))
    assert refusal.value.facts == {"decided_at": "2026-01-31T12:00:00.123456Z"}
    assert await store.latest() == current
    assert await whole_history(store) == points_of([current])


async def test_older_record_is_refused_even_when_the_current_one_has_expired(
    store: PriceStore, clock: FakeClock
) -> None:
    await store.publish(record())
    clock.at = NOON + 2 * TTL
    with pytest.raises(PriceSuperseded):
        await store.publish(record(NOON - MOMENT))


async def test_record_from_the_future_is_no_price_once_the_clock_stepped_back_and_gives_way(
    store: PriceStore, settings: Settings, clock: FakeClock
) -> None:
    before, ahead = record(), record(NOON + timedelta(minutes=1))
    await store.publish(before)
    clock.at = ahead.as_of
    await store.publish(ahead)
    skew = timedelta(seconds=settings.clock_skew_seconds_max)
    clock.at = ahead.as_of - skew
    assert await store.latest() == ahead
    with pytest.raises(PriceSuperseded):
        await store.publish(record(clock.at))
    clock.at -= MOMENT
    with pytest.raises(PriceUnavailable):
        await store.latest()
    present = record(clock.at)
    await store.publish(present)
    assert await store.latest() == present
    assert await whole_history(store) == points_of([before, present])
    following = record(clock.at + MOMENT)
    await store.publish(following)
    assert await whole_history(store) == points_of([before, present, following])


async def test_another_record_of_the_same_moment_is_not_older_and_takes_its_place(store: PriceStore) -> None:
    first, second = sorted((record(), record()), key=lambda each: each.id, reverse=True)
    await store.publish(first)
    await store.publish(second)
    assert await store.latest() == second
    assert await whole_history(store) == points_of([second])


async def test_same_record_may_be_published_again_and_is_kept_once(store: PriceStore) -> None:
    published = record()
    await store.publish(published)
    await store.publish(published)
    assert await store.latest() == published
    assert await whole_history(store) == points_of([published])


@pytest.mark.parametrize(("first", "second"), [(TTL, TTL / 2), (TTL / 2, TTL)], ids=["shorter", "longer"])
async def test_a_published_record_never_changes(store: PriceStore, first: timedelta, second: timedelta) -> None:
    published = record()
    published = replace(published, expires_at=published.as_of + first)
    assert await store.publish(published) == published
    assert await store.publish(replace(published, expires_at=published.as_of + second)) == published
    assert await store.latest() == published
    assert await whole_history(store) == points_of([published])


async def test_record_is_valid_until_it_expires_and_stale_from_then_on(store: PriceStore, clock: FakeClock) -> None:
    published = record()
    await store.publish(published)
    clock.at = published.expires_at - MOMENT
    assert await store.latest() == published
    clock.at = published.expires_at
    with pytest.raises(PriceStale) as refusal:
        await store.latest()
    assert refusal.value.retry_after_seconds == 5
    assert refusal.value.facts == {"as_of": "2026-01-31T12:00:00.123456Z", "expires_at": "2026-01-31T12:01:00.123456Z"}


async def test_stale_is_told_from_none_for_a_day(store: PriceStore, clock: FakeClock) -> None:
    await store.publish(record())
    clock.at = NOON + timedelta(days=1) - MOMENT
    with pytest.raises(PriceStale):
        await store.latest()
    clock.at = NOON + timedelta(days=1)
    with pytest.raises(PriceUnavailable):
        await store.latest()


async def test_newer_record_ends_staleness(store: PriceStore, clock: FakeClock) -> None:
    await store.publish(record())
    clock.at = NOON + timedelta(days=2)
    newer = record(clock.at)
    await store.publish(newer)
    assert await store.latest() == newer
    assert await whole_history(store, HISTORY_MINUTES_MAX) == points_of([newer])


async def test_history_has_what_was_observed_within_the_minutes_oldest_first(
    store: PriceStore, clock: FakeClock
) -> None:
    records = [record(NOON + timedelta(minutes=minute)) for minute in range(4)]
    for each in records:
        clock.at = each.as_of
        await store.publish(each)
    assert await whole_history(store, 3) == points_of(records[1:])
    assert await whole_history(store, 1) == points_of(records[3:])
    assert await whole_history(store, HISTORY_MINUTES_MAX) == points_of(records)


async def test_history_is_bounded_and_loses_the_oldest(store: PriceStore) -> None:
    records = [record(NOON + number * MOMENT) for number in range(RECORDS_MAX + 5)]
    for each in records:
        await store.publish(each)
    assert await whole_history(store) == points_of(records[5:])


async def publish_all(store: PriceStore, clock: FakeClock, moments: Sequence[datetime]) -> list[PricePoint]:
    """The points of records observed at these moments, each published when it was observed."""
    records = [record(moment) for moment in moments]
    for each in records:
        clock.at = each.as_of
        await store.publish(each)
    return points_of(records)


async def test_history_of_more_than_so_many_points_has_the_last_of_each_span(
    store: PriceStore, clock: FakeClock
) -> None:
    every_five_minutes = await publish_all(
        store, clock, [NOON - timedelta(minutes=5 * number) for number in range(11, -1, -1)]
    )
    # Spans of a quarter of an hour, the oldest four points of five: 11:10 is left out.
    expected = [each for each in every_five_minutes if each.as_of.minute in (25, 40, 55, 0)]
    assert list(await store.history(60, 4)) == expected
    assert list(await store.history(60, 1)) == every_five_minutes[-1:]
    assert list(await store.history(30, 3)) == [
        each for each in every_five_minutes if each.as_of.minute in (45, 55, 0)
    ], "spans of ten minutes begin at each ten minutes"
    assert list(await store.history(60, 12)) == every_five_minutes
    assert len(await store.history(60, 11)) == 11


async def test_a_span_begins_with_its_first_microsecond(store: PriceStore, clock: FakeClock) -> None:
    quarter = NOON.replace(minute=15, second=0, microsecond=0)
    points = await publish_all(store, clock, [quarter - MOMENT, quarter, quarter + 15 * 60 * MOMENT * 10**6 - MOMENT])
    assert list(await store.history(30, 2)) == [points[0], points[2]]


async def test_points_stay_where_they_are_while_time_goes_by(store: PriceStore, clock: FakeClock) -> None:
    await publish_all(store, clock, [NOON + timedelta(minutes=number) for number in range(100)])
    earlier = await store.history(60, 7)
    await publish_all(store, clock, [NOON + timedelta(minutes=number) for number in range(100, 105)])
    later = await store.history(60, 7)
    assert list(later)[:-2] == list(earlier)[-len(later) + 1 : -1]


async def test_history_leaves_out_what_is_from_the_future(
    store: PriceStore, clock: FakeClock, settings: Settings
) -> None:
    points = await publish_all(store, clock, [NOON, NOON + timedelta(minutes=1)])
    clock.at = points[1].as_of - timedelta(seconds=settings.clock_skew_seconds_max)
    assert list(await store.history(60, 2)) == points
    clock.at -= MOMENT
    assert list(await store.history(60, 2)) == points[:1]
    assert list(await store.history(60, 1)) == points[:1]


class NaiveHistory:
    """What the history of a store is, as one would say it, at any cost."""

    def __init__(self, settings: Settings, clock: FakeClock) -> None:
        self.settings = settings
        self.clock = clock
        self.current: PriceRecord | None = None
        self.points: list[PricePoint] = []

    def latest_time(self) -> datetime:
        return self.clock.at + timedelta(seconds=self.settings.clock_skew_seconds_max)

    def publish(self, new: PriceRecord) -> bool:
        """Whether the record is taken."""
        if self.current is not None and new.made_at < self.current.made_at <= self.latest_time():
            return False
        self.current = new
        kept = [each for each in self.points if new.as_of - timedelta(days=1) < each.as_of < new.as_of]
        self.points = [*kept, new.point()][-self.settings.price_history_records_max :]
        return True

    def history(self, minutes: int, points: int) -> list[PricePoint]:
        since = self.clock.at - timedelta(minutes=minutes)
        recent = [each for each in self.points if since < each.as_of <= self.latest_time()]
        if len(recent) <= points:
            return recent
        span = timedelta(minutes=minutes) / points
        last_of_span = {(each.as_of - EPOCH) // span: each for each in recent}
        return list(last_of_span.values())[-points:]


async def play(store: PriceStore, naive: NaiveHistory, draw: st.DataObject | random.Random, steps: int) -> None:
    """Publishes, moves the clock both ways and asks for history at random; both must always say the same."""

    def pick(low: int, high: int) -> int:
        return draw.randint(low, high) if isinstance(draw, random.Random) else draw.draw(st.integers(low, high))

    for _ in range(steps):
        for _ in range(pick(0, 12)):
            # Mostly as an updater does, sometimes of the same moment, older or ahead by a stepped clock.
            naive.clock.at += timedelta(seconds=(1, 15, 15, 900, 7200, -30)[pick(0, 5)], microseconds=pick(-1, 1))
            as_of = naive.clock.at - timedelta(seconds=(0, 0, 0, 1, 20, 100)[pick(0, 5)])
            decided_at = as_of + timedelta(seconds=(0, 0, 0, 1, 20, 30)[pick(0, 5)])
            new = record(as_of, decided_at=min(decided_at, naive.latest_time()))
            if naive.publish(new):
                await store.publish(new)
            else:
                with pytest.raises(PriceSuperseded):
                    await store.publish(new)
        minutes, points = (1, 7, 60, 1439, 1440)[pick(0, 4)], (1, 2, 3, 7, 240, 1000)[pick(0, 5)]
        assert list(await store.history(minutes, points)) == naive.history(minutes, points)


@pytest.mark.parametrize("seed", range(4))
async def test_any_history_is_what_the_naive_one_is(
    store: PriceStore, settings: Settings, clock: FakeClock, seed: int
) -> None:
    draw = random.Random(seed)  # noqa: S311
    await play(store, NaiveHistory(settings, clock), draw, steps=15)


@given(st.data(), st.integers(1, 40))
def test_any_history_in_memory_is_what_the_naive_one_is(data: st.DataObject, records_max: int) -> None:
    settings, clock = builders.settings(price_history_records_max=records_max), FakeClock(NOON)
    asyncio.run(play(MemoryPriceStore(settings, clock), NaiveHistory(settings, clock), data, steps=4))


@pytest.mark.parametrize("points", [1, 10, 100])
async def test_history_in_memory_costs_as_much_as_its_points(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch, points: int
) -> None:
    looked_at: list[PricePoint] = []

    def counted(point: PricePoint) -> datetime:
        looked_at.append(point)
        return point.as_of

    store = MemoryPriceStore(Settings(), clock)
    await publish_all(store, clock, [NOON + timedelta(seconds=15 * number) for number in range(6000)])
    monkeypatch.setattr(memory_prices, "_as_of", counted)
    assert len(await store.history(HISTORY_MINUTES_MAX, points)) == points
    assert len(looked_at) <= (points + 2) * math.ceil(math.log2(6000))


@pytest.mark.parametrize("points", [1, 10, 100])
async def test_history_in_redis_costs_as_much_as_its_points(clock: FakeClock, redis_url: str, points: int) -> None:
    async with (
        redis_board(Settings(), clock, redis_url) as store,
        Redis.from_url(redis_url, decode_responses=True) as client,
    ):
        await publish_all(store, clock, [NOON + timedelta(seconds=60 * number) for number in range(1000)])
        await client.config_resetstat()
        assert len(await store.history(HISTORY_MINUTES_MAX // 2, points)) == points
        calls = {name: stats["calls"] for name, stats in (await client.info("commandstats")).items()}
    assert calls["cmdstat_zrange"] == points
    assert sum(calls[name] for name in calls if name.startswith("cmdstat_z")) == points + 1


async def test_publishing_at_once_leaves_the_newest_current(store: PriceStore) -> None:
    records = [record(NOON + number * MOMENT) for number in range(20)]
    shuffled = [records[number * 7 % 20] for number in range(20)]
    results = await asyncio.gather(*map(store.publish, shuffled), return_exceptions=True)
    assert await store.latest() == records[-1]
    assert all(isinstance(result, PriceRecord | PriceSuperseded) for result in results)
    kept = [shuffled[number] for number, result in enumerate(results) if result == shuffled[number]]
    assert await whole_history(store) == points_of(sorted(kept, key=lambda each: each.as_of))


async def test_what_was_told_of_the_sources_comes_back_until_it_is_told_anew(store: PriceStore) -> None:
    with pytest.raises(PriceUnavailable) as refusal:
        await store.feed_status()
    assert refusal.value.retry_after_seconds == 5
    for told in (state(problem="only 1 of at least 2 sources agree"), state(NOON + MOMENT), state(NOON - TTL)):
        await store.put_feed_status(told)
        assert await store.feed_status() == told
    assert await whole_history(store) == []


async def test_what_was_told_is_forgotten_after_a_day(store: PriceStore, clock: FakeClock) -> None:
    await store.put_feed_status(state())
    clock.at = NOON + timedelta(days=1) - MOMENT
    assert await store.feed_status() == state()
    clock.at += MOMENT
    with pytest.raises(PriceUnavailable):
        await store.feed_status()


async def test_check_passes_while_the_store_is_there(store: PriceStore) -> None:
    await store.check()


async def assert_unavailable(store: PriceStore) -> None:
    calls = (
        store.publish(record()),
        store.latest(),
        store.history(60, 5),
        store.put_feed_status(state()),
        store.feed_status(),
        store.check(),
    )
    for call in calls:
        with pytest.raises(PriceStoreUnavailable) as refusal:
            await call
        assert refusal.value.retry_after_seconds == 1
        assert refusal.value.__cause__ is not None
    await store.close()


async def test_remote_store_without_its_service_is_unavailable(settings: Settings) -> None:
    await assert_unavailable(RemotePriceStore(f"http://127.0.0.1:{free_port()}", settings))


async def test_redis_store_without_redis_is_unavailable(settings: Settings) -> None:
    client: Redis = Redis.from_url(f"redis://127.0.0.1:{free_port()}", retry=None)
    await assert_unavailable(RedisPriceStore(client, settings))


async def test_redis_that_does_not_answer_in_time_is_unavailable() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()
        gone.release()

    gone = asyncio.Semaphore(0)
    settings = builders.settings(remote_seconds_max=0.05)
    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    client: Redis = Redis.from_url(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    await assert_unavailable(RedisPriceStore(client, settings))
    server.close()
    await gone.acquire()


async def test_every_key_in_redis_is_ours_and_expires_within_a_day(
    settings: Settings, clock: FakeClock, redis_url: str
) -> None:
    async with redis_board(settings, clock, redis_url) as store, Redis.from_url(redis_url) as client:
        await store.publish(record())
        await store.put_feed_status(state())
        keys: list[bytes] = [key async for key in client.scan_iter()]
        assert len(keys) == 3
        for key in keys:
            assert key.startswith(b"buydesk:")
            assert 0 < await client.ttl(key) <= 24 * 3600


async def test_recorded_prices_left_in_redis_are_no_live_prices(clock: FakeClock, redis_url: str) -> None:
    live: Redis = Redis.from_url(redis_url)
    async with redis_board(Settings(), clock, redis_url) as sandbox:
        await sandbox.publish(record())
        await sandbox.put_feed_status(state())
        store = RedisPriceStore(live, builders.settings(price_feed="live"), clock)
        with pytest.raises(PriceUnavailable):
            await store.latest()
        with pytest.raises(PriceUnavailable):
            await store.feed_status()
        assert await whole_history(store) == []
        await store.close()


@pytest.mark.parametrize("garbage", [b"", b"no JSON", b"[]", b'{"id":1}'])
async def test_what_is_no_record_in_redis_is_never_a_price_and_keeps_none_away(
    settings: Settings, clock: FakeClock, redis_url: str, garbage: bytes
) -> None:
    async with redis_board(settings, clock, redis_url) as store, Redis.from_url(redis_url) as client:
        await client.hset("buydesk:prices:sandbox:current", "document", garbage)
        await client.zadd("buydesk:prices:sandbox:points", {garbage: (NOON - EPOCH) / MOMENT})
        await client.set("buydesk:prices:sandbox:sources", garbage)
        for call in (store.latest(), store.feed_status()):
            with pytest.raises(PriceStoreUnavailable, match="not a price record"):
                await call
        assert await store.history(60, 5) == []
        published = record()
        await store.publish(published)
        assert await store.latest() == published


async def test_record_of_a_desk_with_laxer_settings_in_redis_is_no_price(
    settings: Settings, clock: FakeClock, redis_url: str
) -> None:
    async with redis_board(settings, clock, redis_url) as lax, Redis.from_url(redis_url) as client:
        await lax.publish(replace(record(), expires_at=NOON + 2 * TTL))
        store = RedisPriceStore(client, settings, clock)
        with pytest.raises(PriceUnavailable, match="must not be more than 60 s after as_of"):
            await store.latest()
        newer = record(NOON + MOMENT)
        await store.publish(newer)
        assert await store.latest() == newer


@pytest.mark.parametrize("kind", ["memory", "redis"])
async def test_clock_that_steps_back_does_not_make_a_price_valid_for_longer(
    settings: Settings, clock: FakeClock, redis_url: str, kind: str
) -> None:
    async with Redis.from_url(redis_url) as client, redis_board(settings, clock, redis_url):
        store: PriceStore = (
            MemoryPriceStore(settings, clock) if kind == "memory" else RedisPriceStore(client, settings, clock)
        )
        published = record()
        await store.publish(published)
        assert await store.latest() == published
        clock.at -= timedelta(seconds=5)
        clock.seconds += 59
        assert await store.latest() == published
        clock.seconds += 1
        with pytest.raises(PriceStale):
            await store.latest()


async def test_redis_client_that_decodes_answers_serves_as_well(
    settings: Settings, clock: FakeClock, redis_url: str
) -> None:
    async with redis_board(settings, clock, redis_url):
        client: Redis = Redis.from_url(redis_url, decode_responses=True)
        store = RedisPriceStore(client, settings, clock)
        published = record()
        await store.publish(published)
        await store.put_feed_status(state())
        assert await store.latest() == published
        assert await whole_history(store) == points_of([published])
        assert await store.feed_status() == state()
        await store.close()


async def test_what_an_earlier_version_left_in_redis_is_no_price_and_no_history(
    settings: Settings, clock: FakeClock, redis_url: str
) -> None:
    left = replace(record(), rejected=(), rule=None, decided_at=None)
    document = record_document(left)
    del document["rule"], document["decided_at"], document["signature"]
    text, score = msgspec.json.encode(document), (left.as_of - EPOCH) // MOMENT
    expires_at = (left.expires_at - EPOCH) // MOMENT
    async with redis_board(settings, clock, redis_url) as store, Redis.from_url(redis_url) as client:
        await client.zadd("buydesk:prices:sandbox:history", {text: score})
        members: list[str | int | bytes] = [
            "id",
            str(left.id),
            "as_of",
            score,
            "expires_at",
            expires_at,
            "document",
            text,
        ]
        await client.hset("buydesk:prices:sandbox:current", items=members)
        with pytest.raises(
            PriceUnavailable, match="no price of this desk: record: the record is not signed"
        ) as refused:
            await store.latest()
        assert refused.value.retry_after_seconds is not None
        assert await whole_history(store) == []
        first = record(NOON - MOMENT)  # whatever is older than what nobody can sell at
        await store.publish(first)
        assert await store.latest() == first
        assert await whole_history(store) == points_of([first])
