"""Publishing: a price stays in the store for as long as it may be used, though the store comes and goes."""

import logging
import uuid
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta

import pytest
from msgspec.structs import replace

from buydesk.backends.memory.prices import MemoryPriceStore
from buydesk.errors import InvalidRequest, PriceStale, PriceStoreUnavailable, PriceSuperseded, PriceUnavailable
from buydesk.money import Currency
from buydesk.prices.model import FeedStatus, PricePoint, PriceRecord, UsablePrice
from buydesk.prices.publishing import PricePublisher
from buydesk.settings.model import Settings
from tests.clock import FakeClock

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)
RATES = dict.fromkeys(Currency, 10**11)
RECORD = PriceRecord(uuid.UUID(int=1), NOON, NOON + timedelta(seconds=60), "sandbox", RATES)
STATE = FeedStatus(NOON, "sandbox", "", ())
OLD_RATES = dict.fromkeys(Currency, 2 * 10**11)
LOG = "tests.current"


class UnreliableStore(MemoryPriceStore):
    """A real store that is away, fails or loses what it holds when a test says so."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__(Settings(), clock)
        self.failure: Exception | None = None
        self.published: list[PriceRecord] = []
        self.told: list[FeedStatus] = []

    async def publish(self, record: PriceRecord) -> PriceRecord:
        self._fail()
        publisher = await super().publish(record)
        self.published.append(record)
        return publisher

    async def latest(self) -> PriceRecord:
        self._fail()
        return await super().latest()

    async def history(self, minutes: int, points: int) -> Sequence[PricePoint]:
        self._fail()
        return await super().history(minutes, points)

    async def put_feed_status(self, state: FeedStatus) -> None:
        self._fail()
        await super().put_feed_status(state)
        self.told.append(state)

    def lose(self) -> None:
        self._current = None

    def forget(self) -> None:
        self.lose()
        self._points.clear()

    def _fail(self) -> None:
        if self.failure is not None:
            raise self.failure


AWAY = PriceStoreUnavailable("The store is away.")


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def store(clock: FakeClock) -> UnreliableStore:
    return UnreliableStore(clock)


@pytest.fixture
def publisher(clock: FakeClock, store: UnreliableStore) -> PricePublisher:
    return PricePublisher(store, 10, logging.getLogger(LOG), clock=clock)


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What was logged until now, as "LEVEL message"."""
    caplog.set_level(logging.INFO, LOG)
    return lambda: [f"{each.levelname} {each.getMessage()}" for each in caplog.records]


def decided(usable_seconds: float = 60, record: PriceRecord = RECORD) -> UsablePrice:
    return UsablePrice(record, 1000 + usable_seconds)


def at(clock: FakeClock, seconds: float, act: Callable[[], object]) -> None:
    """Does something at a second of the test."""

    async def act_when_due() -> None:
        if clock.seconds == 1000 + seconds:
            act()

    clock.meanwhile = act_when_due


async def test_price_is_published_to_a_store_that_is_up(publisher: PricePublisher, store: UnreliableStore) -> None:
    assert publisher.last is None
    await publisher.publish(decided(), 1015)
    assert await store.latest() is publisher.last is RECORD


async def test_store_that_is_away_is_offered_the_price_every_second_and_one_warning(
    clock: FakeClock, publisher: PricePublisher, store: UnreliableStore, logged: Callable[[], list[str]]
) -> None:
    store.failure = AWAY
    at(clock, 3, lambda: setattr(store, "failure", None))
    await publisher.publish(decided(), 1015)
    assert clock.slept == [1, 1, 1]
    assert store.published == [RECORD]
    assert logged() == ["WARNING The price store is down: The store is away.", "INFO The price store is up again."]
    assert publisher.down == ""


@pytest.mark.parametrize(("give_up_at", "slept"), [(1002.5, [1, 1]), (1002, [1]), (1000, [])])
async def test_store_that_stays_away_is_given_up_before_the_next_tick(
    clock: FakeClock, publisher: PricePublisher, store: UnreliableStore, give_up_at: float, slept: list[float]
) -> None:
    store.failure = AWAY
    with pytest.raises(PriceStoreUnavailable):
        await publisher.publish(decided(), give_up_at)
    assert clock.slept == slept
    assert publisher.last is None
    assert publisher.down == "The store is away."


async def test_price_that_ends_while_the_store_is_away_is_not_offered_any_more(
    clock: FakeClock, publisher: PricePublisher, store: UnreliableStore
) -> None:
    store.failure = AWAY
    at(clock, 5, lambda: setattr(store, "failure", None))
    with pytest.raises(PriceStale):
        await publisher.publish(decided(usable_seconds=5), 1015)
    assert store.published == []


async def test_wall_clock_that_steps_back_makes_no_price_usable_for_longer(
    clock: FakeClock, publisher: PricePublisher, store: UnreliableStore
) -> None:
    store.failure = AWAY

    def step_back() -> None:
        clock.at += -timedelta(seconds=9)
        store.failure = None

    at(clock, 60, step_back)
    assert NOON + timedelta(seconds=60 - 9) < RECORD.expires_at
    with pytest.raises(PriceStale):
        await publisher.publish(decided(), 1100)


async def test_wall_clock_that_steps_forward_ends_a_price_too(clock: FakeClock, publisher: PricePublisher) -> None:
    clock.at += timedelta(seconds=60)
    with pytest.raises(PriceStale):
        await publisher.publish(decided(), 1015)


async def test_price_from_further_in_the_future_than_clocks_differ_is_refused(
    clock: FakeClock, publisher: PricePublisher, store: UnreliableStore
) -> None:
    clock.at += -timedelta(seconds=10)
    await publisher.publish(decided(), 1015)
    clock.at -= timedelta(microseconds=1)
    with pytest.raises(PriceUnavailable):
        await publisher.publish(decided(), 1015)
    assert len(store.published) == 1


async def test_newer_price_on_the_store_stays(publisher: PricePublisher, store: UnreliableStore) -> None:
    newer = replace(RECORD, id=uuid.UUID(int=2), as_of=NOON + timedelta(seconds=1))
    await store.publish(newer)
    with pytest.raises(PriceSuperseded):
        await publisher.publish(decided(), 1015)
    assert await store.latest() is newer
    assert publisher.down == ""


async def test_price_that_the_store_has_lost_hangs_again_within_a_second_as_it_was_and_word_of_the_sources_too(
    clock: FakeClock, publisher: PricePublisher, store: UnreliableStore, logged: Callable[[], list[str]]
) -> None:
    await publisher.publish(decided(), 1015)
    await publisher.put_feed_status(STATE)
    at(clock, 5, store.lose)
    await publisher.keep_published(1015)
    assert store.published == [RECORD] * 2
    assert store.told == [STATE] * 2
    assert clock.seconds == 1015
    assert logged() == ["INFO The price store had lost the price, which is published again."]


async def test_price_in_whose_place_an_older_one_is_back_is_published_again(
    clock: FakeClock, publisher: PricePublisher, store: UnreliableStore
) -> None:
    """A store that took no writes for a while has one of before, which may be what ours doubts."""
    older = replace(RECORD, id=uuid.UUID(int=2), decided_at=RECORD.made_at - timedelta(microseconds=1))
    await store.publish(older)
    await publisher.publish(decided(), 1015)
    at(clock, 5, lambda: store.adopt(older))
    await publisher.keep_published(1015)
    assert store.published == [older, RECORD, RECORD]


async def test_price_that_was_lost_before_anything_was_told_hangs_again(
    clock: FakeClock, publisher: PricePublisher, store: UnreliableStore
) -> None:
    await publisher.publish(decided(), 1015)
    at(clock, 5, store.lose)
    await publisher.keep_published(1015)
    assert (len(store.published), store.told) == (2, [])


async def test_lost_price_is_hung_again_until_it_ends_and_not_longer(
    clock: FakeClock, publisher: PricePublisher, store: UnreliableStore
) -> None:
    async def lose() -> None:
        store.lose()

    await publisher.publish(decided(usable_seconds=20), 1015)
    clock.meanwhile = lose
    await publisher.keep_published(1045)
    assert len(store.published) == 1 + 19  # every second but the 20th


async def test_store_that_was_set_back_in_time_gets_no_price_from_the_future(
    clock: FakeClock, publisher: PricePublisher, store: UnreliableStore
) -> None:
    await publisher.publish(decided(), 1015)
    clock.at += -timedelta(hours=1)
    await publisher.keep_published(1015)
    assert len(store.published) == 1


async def test_store_that_is_away_between_ticks_is_one_warning_each_time(
    clock: FakeClock, publisher: PricePublisher, store: UnreliableStore, logged: Callable[[], list[str]]
) -> None:
    async def come_and_go() -> None:
        store.failure = AWAY if clock.seconds in (1002, 1003, 1004, 1008) else None

    await publisher.publish(decided(), 1015)
    clock.meanwhile = come_and_go
    await publisher.keep_published(1015)
    away, back = "WARNING The price store is down: The store is away.", "INFO The price store is up again."
    assert logged() == [away, back] * 2


async def test_store_that_fails_in_a_way_not_foreseen_ends_nothing(
    clock: FakeClock, publisher: PricePublisher, store: UnreliableStore, logged: Callable[[], list[str]]
) -> None:
    await publisher.publish(decided(), 1015)
    store.failure = RuntimeError()
    await publisher.keep_published(1015)
    assert publisher.down == "RuntimeError"
    assert len(logged()) == 1
    await publisher.put_feed_status(STATE)
    assert store.told == []


async def test_record_that_another_updater_hung_is_left_alone(
    clock: FakeClock, publisher: PricePublisher, store: UnreliableStore, logged: Callable[[], list[str]]
) -> None:
    await publisher.publish(decided(), 1015)
    store.lose()
    await store.publish(replace(RECORD, id=uuid.UUID(int=2), expires_at=NOON + timedelta(seconds=1)))
    await publisher.keep_published(1015)
    assert len(store.published) == 2
    assert logged() == []


async def test_store_is_not_looked_at_when_the_next_tick_is_due(clock: FakeClock, publisher: PricePublisher) -> None:
    await publisher.publish(decided(), 1015)
    await publisher.keep_published(1002)
    assert clock.slept == [1, 1]


async def test_nothing_is_looked_at_before_there_is_a_price(
    clock: FakeClock, publisher: PricePublisher, store: UnreliableStore
) -> None:
    store.failure = RuntimeError("nobody may call")
    await publisher.keep_published(1015)
    await publisher.keep_published(1010)
    assert clock.slept == [15, 0]


@pytest.mark.parametrize("failure", [InvalidRequest("It is not plausible."), RuntimeError("a fault")])
async def test_store_that_does_not_take_the_state_is_one_warning_until_it_does(
    publisher: PricePublisher, store: UnreliableStore, logged: Callable[[], list[str]], failure: Exception
) -> None:
    for each in (failure, failure, None, failure):
        store.failure = each
        await publisher.put_feed_status(STATE)
    assert store.told == [STATE]
    assert logged() == [f"WARNING The status of the sources could not be stored: {failure}"] * 2


async def test_state_that_cannot_be_told_because_the_store_is_away_is_no_further_warning(
    publisher: PricePublisher, store: UnreliableStore, logged: Callable[[], list[str]]
) -> None:
    store.failure = AWAY
    await publisher.put_feed_status(STATE)
    await publisher.put_feed_status(STATE)
    assert logged() == ["WARNING The price store is down: The store is away."]
