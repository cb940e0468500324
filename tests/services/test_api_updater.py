"""api_updater: its loop over several sources on clocks of the test's own, and the service as it runs."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx2
import pytest
from msgspec.structs import replace
from prometheus_client.parser import text_string_to_metric_families

from buydesk.backends.memory.prices import MemoryPriceStore
from buydesk.backends.memory.rates import MemoryRateStore
from buydesk.backends.memory.reports import MemoryReportStore
from buydesk.backends.remote import RemotePriceStore
from buydesk.errors import (
    LedgerUnavailable,
    Overloaded,
    PriceStale,
    PriceStoreUnavailable,
    PriceUnavailable,
    SourceFailed,
)
from buydesk.money import RATE_SCALE, Currency
from buydesk.observability.reporter import Reporter
from buydesk.prices.anchors import Anchor, AnchorStore, Confirmation, NewConfirmation
from buydesk.prices.model import (
    SOURCES,
    FeedStatus,
    PricePoint,
    PriceRecord,
    PriceSource,
    PriceStore,
    Quote,
    RejectedQuote,
    Rule,
    SourceResponse,
    UnsettledRate,
)
from buydesk.prices.verification import discrepancies_of_record
from buydesk.services import api_cache_proxy, api_updater
from buydesk.services.api_updater import FeedMetrics, Updater, next_tick, rejection_reason
from buydesk.settings.model import Settings
from tests.clock import FakeClock
from tests.model_anchors import ModelAnchors
from tests.serving import free_port, served

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)
HISTORIC = datetime(2023, 3, 9, tzinfo=UTC)
EUR, GBP, USD = Currency
ALL = tuple(Currency)
HALF_E8 = 10**8


Behaviour = Callable[["Exchange"], Awaitable[SourceResponse]]


class Exchange:
    """A stand-in for an exchange: at each tick it does the next thing of a list, the last for ever."""

    def __init__(self, clock: FakeClock, name: str, *behaviours: Behaviour) -> None:
        self.clock = clock
        self.name = name
        self.asked_at: list[float] = []
        self._behaviours = behaviours or (at_price(1000),)

    async def quotes(self) -> SourceResponse:
        self.asked_at.append(self.clock.seconds - 1000)
        return await self._behaviours[min(len(self.asked_at), len(self._behaviours)) - 1](self)

    async def close(self) -> None:
        raise AssertionError("the service closes nothing that it was given")


def seen(by: Exchange, units: float, currencies: Sequence[Currency], observed_at: datetime) -> SourceResponse:
    mid_e8 = int(units * RATE_SCALE)
    return SourceResponse(
        tuple(Quote(by.name, currency, mid_e8 - HALF_E8, mid_e8 + HALF_E8, observed_at) for currency in currencies)
    )


def at_price(units: float, *, age_seconds: float = 0, currencies: Sequence[Currency] = ALL) -> Behaviour:
    """So many units of each currency for a bitcoin."""

    async def answer(by: Exchange) -> SourceResponse:
        return seen(by, units, currencies, by.clock.at - timedelta(seconds=age_seconds))

    return answer


def at_prices(**units: float) -> Behaviour:
    """So many units of each currency that is named for a bitcoin, and no others."""

    async def answer(by: Exchange) -> SourceResponse:
        each = [seen(by, mid, [Currency(code)], by.clock.at).quotes for code, mid in units.items()]
        return SourceResponse(tuple(quote for quotes in each for quote in quotes))

    return answer


def failing(error: Exception) -> Behaviour:
    async def fail(_: Exchange) -> SourceResponse:
        raise error

    return fail


def taking(seconds: float) -> Behaviour:
    async def take(by: Exchange) -> SourceResponse:
        by.clock.seconds += seconds
        return seen(by, 1000, ALL, by.clock.at)

    return take


async def hang(_: Exchange) -> SourceResponse:
    await asyncio.Event().wait()
    raise AssertionError("unreachable")


def standing_since(changed_at: datetime) -> Behaviour:
    """At 1000, as a source without a clock says it whose books changed then."""

    async def answer(by: Exchange) -> SourceResponse:
        said = await at_price(1000)(by)
        return replace(said, quotes=tuple(replace(each, changed_at=changed_at) for each in said.quotes))

    return answer


closed = failing(SourceFailed("The exchange is closed."))
well = at_price(1000)


def no_price(why: str) -> str:
    """What is logged when there is none."""
    refused = "orders at it are refused, at the latest when the last one ends"
    return f"CRITICAL A price is missing or in doubt; {refused}: {why}"


class UnreliableStore(MemoryPriceStore):
    """A real store that remembers what it was told, and is away when a test says so."""

    def __init__(self, clock: FakeClock, settings: Settings | None = None) -> None:
        super().__init__(settings or Settings(), clock)
        self.published: list[PriceRecord] = []
        self.told: list[FeedStatus] = []
        self.is_away = False

    async def publish(self, record: PriceRecord) -> PriceRecord:
        if self.is_away:
            raise PriceStoreUnavailable("The store is away.")
        current = await super().publish(record)
        self.published.append(record)
        return current

    async def put_feed_status(self, state: FeedStatus) -> None:
        if self.is_away:
            raise PriceStoreUnavailable("The store is away.")
        await super().put_feed_status(state)
        self.told.append(state)

    async def latest(self) -> PriceRecord:
        if self.is_away:
            raise PriceStoreUnavailable("The store is away.")
        return await super().latest()

    async def history(self, minutes: int, points: int) -> Sequence[PricePoint]:
        if self.is_away:
            raise PriceStoreUnavailable("The store is away.")
        return await super().history(minutes, points)

    def prices(self) -> list[float]:
        """Of the euro, where there was one to sell at."""
        return [record.rates_e8[EUR] / RATE_SCALE for record in self.published if EUR in record.rates_e8]

    def unsettled(self) -> list[float]:
        """Prices of the euro that were published and not to be sold at."""
        doubted = [record.unsettled[EUR].rate_e8 for record in self.published if EUR in record.unsettled]
        return [rate_e8 / RATE_SCALE for rate_e8 in doubted if rate_e8 is not None]


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(seconds_max=15)


@pytest.fixture
def store(clock: FakeClock) -> UnreliableStore:
    return UnreliableStore(clock)


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What the service logged until now, as "LEVEL message"."""
    caplog.set_level(logging.INFO, "buydesk.services.api_updater")

    def lines() -> list[str]:
        of_service = [each for each in caplog.records if each.name == "buydesk.services.api_updater"]
        return [f"{each.levelname} {each.getMessage()}" for each in of_service]

    return lines


def exchanges(clock: FakeClock, *behaviours: Sequence[Behaviour]) -> list[Exchange]:
    """An exchange for each list of behaviours, named one, two, three …"""
    names = ("one", "two", "three", "four", "five")
    return [Exchange(clock, name, *each) for name, each in zip(names, behaviours, strict=False)]


def updater(
    clock: FakeClock,
    sources: Sequence[PriceSource],
    store: PriceStore,
    *,
    anchors: AnchorStore | None = None,
    **settings: Any,
) -> Updater:
    """One whose ledger has the last prices of `anchors`: without, that each currency was sold at 1000."""
    kept = ModelAnchors(last_prices(), now=clock.now) if anchors is None else anchors
    return Updater(Settings(**settings), sources, store, anchors=kept, clock=clock)


def last_prices(units: float = 1000, age: timedelta = timedelta(), **others: float) -> dict[Currency, Anchor]:
    """That so many units of each currency, or of the one named, were the last price of a bitcoin."""
    rates_e8 = {each: int(others.get(each.value, units) * RATE_SCALE) for each in ALL}
    return {each: Anchor(rate_e8, NOON - age, rates_e8[USD]) for each, rate_e8 in rates_e8.items()}


def same_anchors(units: int, seconds: float = 0) -> dict[Currency, Anchor]:
    """Those of a record that was decided so long after noon, with the same price in all currencies."""
    return last_prices(units, age=timedelta(seconds=-seconds))


async def run(updater: Updater) -> None:
    with pytest.raises(asyncio.CancelledError):
        await updater.run()


async def run_ticks(
    clock: FakeClock,
    store: PriceStore,
    ticks: int,
    *behaviours: Sequence[Behaviour],
    anchors: AnchorStore | None = None,
    **settings: Any,
) -> Updater:
    """A desk's updater over exchanges that behave so, after that many ticks."""
    clock.seconds_max = 15 * ticks
    running = updater(clock, exchanges(clock, *behaviours), store, anchors=anchors, **settings)
    await run(running)
    return running


async def failure_of(updater: Updater) -> str:
    with pytest.raises(PriceUnavailable) as refusal:
        await updater.check()
    return refusal.value.detail


# --- one price of several sources


async def test_first_price_is_published_at_once_with_its_proof(clock: FakeClock, store: UnreliableStore) -> None:
    over = [at_price(1001)], [well], [at_price(998)], [at_price(1500)], [closed]
    running = await run_ticks(clock, store, 1, *over, price_ttl_seconds=45)
    record = await store.latest()
    assert (record.as_of, record.expires_at, record.decided_at) == (NOON, NOON + timedelta(seconds=45), NOON)
    assert record.rates_e8 == dict.fromkeys(Currency, 1000 * RATE_SCALE)
    assert record.bids_e8 == dict.fromkeys(Currency, 999 * RATE_SCALE)
    assert record.asks_e8 == dict.fromkeys(Currency, 1001 * RATE_SCALE)
    assert (record.missing, record.unsettled) == ({}, {})
    assert [each.source for each in record.used] == ["three", "two", "one"] * 3
    assert [(each.source, each.reason) for each in record.rejected] == [
        *[("four", "is more than 1 % from those that agree")] * 3,
        ("five", "The exchange is closed"),
    ]
    assert (record.feed, record.replayed_from) == ("sandbox", None)
    assert record.rule == Rule(30, 100, 100, 2)
    await running.check()
    assert running.published is record


async def test_limits_of_the_rule_are_settings(clock: FakeClock, store: UnreliableStore) -> None:
    limits: dict[str, Any] = {
        "quote_age_seconds_max": 5,
        "price_spread_bp_max": 25,
        "price_deviation_bp_max": 50,
        "price_sources_min": 3,
        "price_feed": "live",
    }
    await run_ticks(clock, store, 1, [well], [well], [at_price(1004, age_seconds=5)], **limits)
    assert (await store.latest()).rule == Rule(5, 25, 50, 3)
    assert (await store.latest()).feed == "live"


async def test_record_is_as_old_as_its_oldest_quote(clock: FakeClock, store: UnreliableStore) -> None:
    await run_ticks(clock, store, 1, [at_price(1000, age_seconds=20)], [well], [at_price(1000, age_seconds=31)])
    record = await store.latest()
    assert record.as_of == NOON - timedelta(seconds=20)
    assert record.expires_at == NOON + timedelta(seconds=40)
    assert {each.reason for each in record.rejected} == {"is older than 30 s"}


async def test_sandbox_record_names_the_minute_it_replays(clock: FakeClock, store: UnreliableStore) -> None:
    async def replay(by: Exchange) -> SourceResponse:
        return replace(await well(by), replayed_from=HISTORIC)

    async def replay_later(by: Exchange) -> SourceResponse:
        return replace(await well(by), replayed_from=HISTORIC + timedelta(minutes=1))

    await run_ticks(clock, store, 1, [replay_later], [replay], [well])
    assert (await store.latest()).replayed_from == HISTORIC


async def test_source_that_lacks_one_currency_is_used_for_the_others(clock: FakeClock, store: UnreliableStore) -> None:
    async def without_pounds(by: Exchange) -> SourceResponse:
        quotes = seen(by, 1000, (EUR, USD), by.clock.at).quotes
        return SourceResponse(quotes, (RejectedQuote(by.name, "GBP: no bid"),))

    await run_ticks(clock, store, 1, [without_pounds], [well], [well])
    record = await store.latest()
    assert [each.source for each in record.used if each.currency != GBP] == ["one", "three", "two"] * 2
    assert [each.source for each in record.used if each.currency == GBP] == ["three", "two"]
    assert record.rejected == (RejectedQuote("one", "GBP: no bid"),)
    assert store.told[0].sources[0].detail == "GBP: no bid"


# --- the schedule


async def test_a_new_price_is_published_every_interval(clock: FakeClock, store: UnreliableStore) -> None:
    await run_ticks(clock, store, 4, [well], [well])
    assert [(each.as_of - NOON).total_seconds() for each in store.published] == [0, 15, 30, 45]


async def test_ticks_keep_to_their_schedule_however_long_they_take(clock: FakeClock, store: UnreliableStore) -> None:
    clock.seconds_max = 60
    sources = exchanges(clock, [taking(0.25), taking(4), taking(0)], [well])
    await run(updater(clock, sources, store))
    assert sources[0].asked_at == [0, 15, 30, 45]


async def test_ticks_that_were_missed_are_not_made_up_for(clock: FakeClock, store: UnreliableStore) -> None:
    clock.seconds_max = 75
    sources = exchanges(clock, [taking(40), well], [well])
    await run(updater(clock, sources, store))
    assert sources[0].asked_at == [0, 45, 60]


@pytest.mark.parametrize(
    ("moment", "due"),
    [(100, 115), (100.1, 115), (114.9, 115), (115, 130), (131, 145), (99, 115), (1e6 + 100, 1e6 + 105)],
)
def test_next_tick_is_the_first_of_the_schedule_to_come(moment: float, due: float) -> None:
    assert next_tick(100, moment, 15) == due


async def test_all_sources_are_asked_at_once(clock: FakeClock, store: UnreliableStore) -> None:
    everybody = asyncio.Barrier(3)

    async def answer_together(by: Exchange) -> SourceResponse:
        await everybody.wait()
        return await well(by)

    await run_ticks(clock, store, 1, [answer_together], [answer_together], [answer_together])
    assert len((await store.latest()).used) == 9


# --- sources that fail


async def test_source_that_hangs_costs_the_others_nothing_but_its_time_limit(
    clock: FakeClock, store: UnreliableStore
) -> None:
    await run_ticks(clock, store, 1, [hang], [well], [well], source_seconds_max=0.02)
    assert RejectedQuote("one", "gave no answer within 0.02 s") in (await store.latest()).rejected


async def test_stopping_the_sources_one_by_one_it_sells_with_two_and_not_with_one_and_recovers(
    clock: FakeClock, store: UnreliableStore, logged: Callable[[], list[str]]
) -> None:
    over = [well], [well, well, well, closed, well], [well, well, closed, closed, well], [well, closed, closed, closed]
    running = await run_ticks(clock, store, 5, *over)
    assert [(each.as_of - NOON).total_seconds() for each in store.published] == [0, 15, 30, 60]
    assert [len(each.used) // 3 for each in store.published] == [4, 3, 2, 3]
    alone = "EUR, GBP, USD: only 1 of at least 2 sources agree"
    assert [each.problem for each in store.told] == ["", "", "", alone, ""]
    await running.check()
    assert logged() == [
        "WARNING The price source four is not used as it should be: The exchange is closed",
        "WARNING The price source three is not used as it should be: The exchange is closed",
        "WARNING The price source two is not used as it should be: The exchange is closed",
        no_price(alone),
        "INFO The price source two is all right again.",
        "INFO The price source three is all right again.",
        "INFO All prices are there again.",
    ]


async def test_no_price_is_critical_at_the_tick_it_happens_and_again_only_when_its_reason_changes(
    clock: FakeClock, store: UnreliableStore, logged: Callable[[], list[str]]
) -> None:
    running = await run_ticks(clock, store, 3, [well], [closed, closed, well], [closed])
    critical = [line for line in logged() if line.startswith("CRITICAL")]
    assert critical == [
        "CRITICAL A price is missing or in doubt; orders at it are refused, at the latest when the last one ends: "
        "EUR, GBP, USD: only 1 of at least 2 sources agree"
    ]
    await running.check()
    clock.seconds, store.told = 1000, []
    apart = at_price(1000, currencies=(EUR, USD))
    running = await run_ticks(clock, UnreliableStore(clock), 2, [well], [apart, closed])
    assert len([line for line in logged() if line.startswith("CRITICAL")]) == 3
    assert await failure_of(running) == "EUR, GBP, USD: only 1 of at least 2 sources agree"


async def test_two_sources_that_disagree_publish_nothing(clock: FakeClock, store: UnreliableStore) -> None:
    running = await run_ticks(clock, store, 1, [well], [at_price(1012)])
    assert store.published == []
    assert await failure_of(running) == "EUR, GBP, USD: only 1 of at least 2 sources agree"


async def test_currency_without_a_price_does_not_hold_back_the_others(
    clock: FakeClock, store: UnreliableStore, logged: Callable[[], list[str]]
) -> None:
    euros = at_price(1000, currencies=(EUR,))
    anchors = ModelAnchors(now=clock.now)
    running = await run_ticks(clock, store, 2, [well], [euros, well], anchors=anchors)
    first, second = store.published
    alone = "only 1 of at least 2 sources agree"
    assert (first.rates_e8, first.missing) == ({EUR: 1000 * RATE_SCALE}, {GBP: alone, USD: alone})
    assert (set(second.rates_e8), second.missing) == (set(ALL), {})
    assert [each.problem for each in store.told] == [f"GBP, USD: {alone}", ""]
    assert logged()[-2:] == [no_price(f"GBP, USD: {alone}"), "INFO All prices are there again."]
    assert set(anchors.kept) == set(ALL)
    await running.check()


async def test_sources_may_rest_only_while_all_currencies_have_a_price(
    clock: FakeClock, store: UnreliableStore
) -> None:
    euros = at_price(1000, currencies=(EUR,))
    clock.seconds_max = 15 * 8
    sources = exchanges(clock, [closed], [euros], [well])
    running = updater(clock, sources, store, source_cooldown_seconds=3600, source_cooldown_seconds_max=3600)
    await run(running)
    assert set(running.priced) == {EUR}
    assert len(sources[0].asked_at) == 8, "each may be the one that is missing"
    assert len(store.published) == 8


async def test_price_that_is_unsettled_has_a_quorum(clock: FakeClock, store: UnreliableStore) -> None:
    """No source that is left alone could settle it."""
    running = await run_ticks(clock, store, 1, [at_price(1300)], [at_price(1300)])
    assert store.unsettled() == [1300]
    assert set(running.priced) == set(ALL)


async def test_currencies_that_are_switched_off_are_not_in_the_record(clock: FakeClock, store: UnreliableStore) -> None:
    sources = [well], [at_price(1000, currencies=(EUR, USD))]
    running = await run_ticks(clock, store, 1, *sources, currencies=(EUR, USD))
    record = await store.latest()
    assert (set(record.rates_e8), record.missing) == ({EUR, USD}, {})
    await running.check()


async def test_source_that_is_left_alone_with_a_good_quote_is_not_at_fault(
    clock: FakeClock, store: UnreliableStore, logged: Callable[[], list[str]]
) -> None:
    await run_ticks(clock, store, 2, [well], [closed])
    assert not [line for line in logged() if "source one" in line]
    one, two = store.told[0].sources
    assert one.detail == "EUR, GBP, USD: only 1 of at least 2 sources agree"
    assert (one.failures, two.failures) == (0, 1)


async def test_source_whose_quotes_are_set_aside_is_one_warning_and_one_word_when_it_is_well_again(
    clock: FakeClock, store: UnreliableStore, logged: Callable[[], list[str]]
) -> None:
    await run_ticks(clock, store, 4, [well], [well], [well, at_price(700), at_price(700), well])
    assert logged() == [
        "WARNING The price source three is not used as it should be: EUR, GBP, USD: "
        "is more than 1 % from those that agree",
        "INFO The price source three is all right again.",
    ]


async def test_old_price_is_never_published_again_while_the_sources_fail(
    clock: FakeClock, store: UnreliableStore
) -> None:
    await run_ticks(clock, store, 3, [well, closed], [well, closed])
    assert len(store.published) == 1
    assert (await store.latest()).expires_at == NOON + timedelta(seconds=60)
    clock.seconds = 1060
    with pytest.raises(PriceStale):
        await store.latest()


async def test_source_that_keeps_failing_is_left_alone_for_a_while(clock: FakeClock, store: UnreliableStore) -> None:
    clock.seconds_max = 15 * 12
    sources = exchanges(clock, [closed], [well], [well])
    settings: dict[str, Any] = {"source_cooldown_seconds": 15, "source_cooldown_seconds_max": 60}
    await run(updater(clock, sources, store, **settings))
    assert sources[0].asked_at == [0, 15, 30, 45, 75, 135]
    assert len(store.published) == 12
    assert store.told[-1].sources[0].resting_until == NOON + timedelta(seconds=195)
    left_alone = RejectedQuote("one", "is left alone after 6 failures in a row; the last: The exchange is closed")
    assert left_alone in store.published[-1].rejected


# --- jumps


def jump_of(*units: float) -> list[Behaviour]:
    return [at_price(each) for each in units]


JUMPED = "is more than 5 % from the last price, 1000.00, and was not seen twice yet"
JUMPED_ALL = f"EUR, GBP, USD: {JUMPED}"


async def test_jump_is_published_as_unsettled_at_once_and_settled_by_the_next_tick_that_agrees(
    clock: FakeClock, store: UnreliableStore, logged: Callable[[], list[str]]
) -> None:
    prices = jump_of(1000, 1060, 1065)
    running = await run_ticks(clock, store, 3, prices, prices)
    first, doubted, settled = store.published
    assert first.rates_e8 == dict.fromkeys(ALL, 1000 * RATE_SCALE)
    assert doubted.rates_e8 == {}
    assert doubted.unsettled == dict.fromkeys(ALL, UnsettledRate(1060 * RATE_SCALE, JUMPED))
    assert doubted.bids_e8 == dict.fromkeys(ALL, 1059 * RATE_SCALE)
    assert (settled.rates_e8, settled.unsettled) == (dict.fromkeys(ALL, 1065 * RATE_SCALE), {})
    assert [each.problem for each in store.told] == ["", JUMPED_ALL, ""]
    assert logged() == [no_price(JUMPED_ALL), "INFO All prices are there again."]
    for each in store.published:
        assert list(discrepancies_of_record(each)) == []
    await running.check()


async def test_one_currency_that_jumps_is_unsettled_and_the_others_sell(
    clock: FakeClock, store: UnreliableStore
) -> None:
    async def pounds_jump(by: Exchange) -> SourceResponse:
        quotes = seen(by, 1000, (EUR, USD), by.clock.at).quotes + seen(by, 1060, (GBP,), by.clock.at).quotes
        return SourceResponse(quotes)

    running = await run_ticks(clock, store, 1, [pounds_jump], [pounds_jump])
    [record] = store.published
    assert (set(record.rates_e8), set(record.unsettled)) == ({EUR, USD}, {GBP})
    assert await failure_of(running) == f"GBP: {JUMPED}"


@pytest.mark.parametrize(
    ("prices", "published", "unsettled"),
    [
        ((1000, 1050), [1000, 1050], []),
        ((1000, 1050.01), [1000], [1050.01]),
        ((1000, 950), [1000, 950], []),
        ((1000, 949.99), [1000], [949.99]),
        ((1000, 1060, 1000, 1060, 1000), [1000, 1000, 1000], [1060, 1060]),
        ((1000, 1060, 1080), [1000, 1080], [1060]),
        ((1000, 890, 900, 890), [1000, 900, 890], [890]),  # restless markets
        ((1000, 1060, 1120, 1180), [1000], [1060, 1120, 1180]),
    ],
)
async def test_jump_is_unsettled_until_it_is_seen_twice_in_a_row(
    clock: FakeClock, store: UnreliableStore, prices: tuple[float, ...], published: list[float], unsettled: list[float]
) -> None:
    await run_ticks(clock, store, len(prices), jump_of(*prices), jump_of(*prices))
    assert store.prices() == published
    assert store.unsettled() == unsettled


@pytest.mark.parametrize(("ticks_without", "is_settled"), [(1, True), (3, True), (4, False)])
async def test_jump_seen_again_after_ticks_without_a_price_was_seen_twice(
    clock: FakeClock, store: UnreliableStore, ticks_without: int, is_settled: bool
) -> None:
    """A quorum that comes and goes must not hold a price back for good; a minute later it is no second sighting."""
    prices = [*jump_of(1000, 1060), *[closed] * ticks_without, *jump_of(1060)]
    await run_ticks(clock, store, 3 + ticks_without, prices, prices)
    assert store.prices() == ([1000, 1060] if is_settled else [1000])
    assert store.unsettled() == ([1060] if is_settled else [1060, 1060])


@pytest.mark.parametrize(("repeating", "is_settled"), [(0, True), (1, True), (2, False), (3, False)])
async def test_observation_that_is_repeated_is_no_second_one(
    clock: FakeClock, store: UnreliableStore, repeating: int, is_settled: bool
) -> None:
    """Of three sources with clocks of their own so many give the same answer again at the tick after the jump."""
    same, anew = [*jump_of(1000, 1060), at_price(1060, age_seconds=15)], jump_of(1000, 1060, 1060)
    await run_ticks(clock, store, 3, *[same] * repeating, *[anew] * (3 - repeating))
    assert store.prices() == ([1000, 1060] if is_settled else [1000])
    assert store.unsettled() == ([1060] if is_settled else [1060, 1060])


async def test_jump_held_back_is_held_back_after_a_restart_too(clock: FakeClock, store: UnreliableStore) -> None:
    anchors = ModelAnchors(now=clock.now)
    before = jump_of(1000, 1060)
    await run_ticks(clock, store, 2, before, before, anchors=anchors)
    restarted = jump_of(1060, 1061)
    clock.seconds_max = clock.seconds - 1000 + 30
    await run(updater(clock, exchanges(clock, restarted, restarted), store, anchors=anchors))
    assert (store.prices(), store.unsettled()) == ([1000, 1061], [1060, 1060])


async def test_limit_of_a_jump_is_a_setting(clock: FakeClock, store: UnreliableStore) -> None:
    prices = jump_of(1000, 1060)
    await run_ticks(clock, store, 2, prices, prices, price_jump_bp_max=600)
    assert store.prices() == [1000, 1060]


async def test_last_price_that_is_contradicted_is_withdrawn_though_there_is_no_other(
    clock: FakeClock, store: UnreliableStore
) -> None:
    """Two that stood still, and two with clocks that have moved: no majority, and the price before must not go on."""
    standing = standing_since(NOON - timedelta(seconds=60))
    frozen, live = [well, standing], jump_of(1000, 1120)
    running = await run_ticks(clock, store, 2, frozen, frozen, live, live)
    last = store.published[-1]
    why = "only 2 of 4 sources agree, which is no majority, and four, three contradict the last price"
    assert (last.rates_e8, last.used, last.missing) == ({}, (), {})
    assert last.unsettled == dict.fromkeys(ALL, UnsettledRate(None, why))
    assert list(discrepancies_of_record(last)) == []
    assert await failure_of(running) == f"EUR, GBP, USD: {why}"
    assert (await store.latest()).id == last.id


async def test_last_price_is_withdrawn_when_its_sources_are_found_to_stand_still(
    clock: FakeClock, store: UnreliableStore
) -> None:
    async def same(by: Exchange) -> SourceResponse:
        return replace(await well(by), fingerprint=b"the same")

    await run_ticks(clock, store, 10, [same], [same])
    assert [bool(each.rates_e8) for each in store.published] == [True] * 9 + [False]
    [why] = {each.reason for each in store.published[-1].unsettled.values()}
    assert why == "only 0 of at least 2 sources agree, and one, two, of which the last price was made, stand still"


async def test_price_before_a_jump_is_not_the_sighting_of_it(clock: FakeClock, store: UnreliableStore) -> None:
    """Also where a jump may be smaller than what sources agree within."""
    prices = jump_of(1000, 1008, 1008)
    await run_ticks(clock, store, 3, prices, prices, price_jump_bp_max=50)
    assert (store.prices(), store.unsettled()) == ([1000, 1008], [1008])


async def test_price_that_could_not_be_published_counts_as_seen(clock: FakeClock, store: UnreliableStore) -> None:
    async def be_away_at_the_second_tick() -> None:
        store.is_away = 1014 <= clock.seconds < 1030

    clock.meanwhile = be_away_at_the_second_tick
    prices = jump_of(1000, 1045, 1055)
    await run_ticks(clock, store, 3, prices, prices)
    assert store.prices() == [1000, 1055]


# --- the last prices, which the ledger keeps


class UnreliableAnchors(ModelAnchors):
    """The model, which fails as it is told, and counts how often it was asked."""

    fault: Exception | None = None
    asked = 0

    async def anchors(self) -> Mapping[Currency, Anchor]:
        self.asked += 1
        self._fail()
        return await super().anchors()

    async def keep_anchors(self, anchors: Mapping[Currency, Anchor]) -> None:
        self._fail()
        await super().keep_anchors(anchors)

    async def confirmations(self) -> Sequence[Confirmation]:
        self._fail()
        return await super().confirmations()

    def _fail(self) -> None:
        if self.fault is not None:
            raise self.fault


AWAY = LedgerUnavailable("PostgreSQL is away.", retry_after_seconds=1)


async def test_ledger_that_does_not_tell_the_last_prices_is_said_with_the_sources_at_each_tick(
    clock: FakeClock, store: UnreliableStore
) -> None:
    anchors = UnreliableAnchors(last_prices(), now=clock.now)
    anchors.fault = AWAY
    await run_ticks(clock, store, 2, [well], [well], anchors=anchors)
    assert store.published == []
    assert [each.problem for each in store.told] == ["The last prices are not known: PostgreSQL is away."] * 2
    assert [each.detail for each in store.told[-1].sources] == ["", ""]


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (AWAY, "PostgreSQL is away."),
        (Overloaded("Too many.", retry_after_seconds=1), "Too many."),
        (ZeroDivisionError("a fault"), "something went wrong here (ZeroDivisionError)."),
    ],
    ids=["away", "overloaded", "fault"],
)
async def test_nothing_is_published_before_the_ledger_told_the_last_prices(
    clock: FakeClock, store: UnreliableStore, logged: Callable[[], list[str]], fault: Exception, told: str
) -> None:
    anchors = UnreliableAnchors(last_prices(), now=clock.now)
    anchors.fault = fault
    sources = exchanges(clock, [well], [well])
    running = updater(clock, sources, store, anchors=anchors)
    failures: list[str] = []

    async def come_back() -> None:
        if anchors.fault is not None:
            failures.append(await failure_of(running))
            assert (sources[0].asked_at, store.published) == ([0], [])
        if clock.seconds == 1003:
            anchors.fault = None

    clock.meanwhile = come_back
    await run(running)
    assert failures == [f"The last prices are not known: {told}"] * 3
    assert sources[0].asked_at == [0], "the price that they made is published three seconds later"
    assert len(store.published) == 1
    assert anchors.asked == 4, "and not again at every tick"
    assert logged() == [no_price(f"The last prices are not known: {told}"), "INFO All prices are there again."]
    await running.check()


async def test_first_prices_of_a_desk_without_history_are_believed_and_logged(
    clock: FakeClock, store: UnreliableStore, logged: Callable[[], list[str]]
) -> None:
    anchors = ModelAnchors(now=clock.now)
    await run_ticks(clock, store, 1, [at_price(69)], [at_price(69)], anchors=anchors, price_spread_bp_max=300)
    assert store.prices() == [69]
    assert logged() == ["INFO There are no last prices in EUR, GBP, USD: the first ones are believed."]
    assert anchors.kept == same_anchors(69)


async def test_last_prices_are_kept_after_each_publication_and_only_those_that_are_sold_at(
    clock: FakeClock, store: UnreliableStore
) -> None:
    anchors = ModelAnchors(now=clock.now)
    prices = jump_of(1000, 1001, 1100)
    await run_ticks(clock, store, 3, prices, prices, anchors=anchors)
    assert store.unsettled() == [1100]
    assert anchors.kept == same_anchors(1001, 15)


async def test_price_that_was_not_published_is_no_last_price(clock: FakeClock, store: UnreliableStore) -> None:
    store.is_away = True
    anchors = ModelAnchors(now=clock.now)
    await run_ticks(clock, store, 2, [well], [well], anchors=anchors)
    assert anchors.kept == {}


async def test_ledger_that_fails_only_delays_that_the_last_prices_are_kept(
    clock: FakeClock, store: UnreliableStore, logged: Callable[[], list[str]]
) -> None:
    anchors = UnreliableAnchors(last_prices(), now=clock.now)

    async def be_away_at_the_second_tick() -> None:
        anchors.fault = AWAY if 1010 <= clock.seconds < 1020 else None

    clock.meanwhile = be_away_at_the_second_tick
    prices = jump_of(1000, 1040, 1085)
    running = await run_ticks(clock, store, 3, prices, prices, anchors=anchors)
    assert store.prices() == [1000, 1040, 1085], "the next price is compared with what was published all the same"
    assert anchors.kept == same_anchors(1085, 30)
    assert {each.problem for each in store.told} == {""}
    assert logged() == []
    await running.check()


FAR = "is more than 20 % from the last price, {}.00 of 2026-01-31T12:00:00.000000Z, until an operator confirms it"


async def test_price_far_from_the_last_one_is_settled_only_by_a_confirmation(
    clock: FakeClock, store: UnreliableStore
) -> None:
    anchors = ModelAnchors(last_prices(), now=clock.now)
    confirmed = NewConfirmation(EUR, 1290 * RATE_SCALE, 1310 * RATE_SCALE, "It is in the news.", 5)

    async def confirm() -> None:
        if clock.seconds == 1040:
            await anchors.confirm(confirmed)

    clock.meanwhile = confirm
    running = await run_ticks(clock, store, 5, [at_price(1300)], [at_price(1300)], anchors=anchors)
    assert store.unsettled() == [1300] * 3
    assert store.prices() == [1300] * 2
    assert store.published[0].unsettled[EUR].reason == FAR.format(1000)
    assert set(store.published[-1].unsettled) == {GBP, USD}
    assert anchors.kept[EUR] == same_anchors(1300, 60)[EUR]
    assert anchors.kept[USD] == last_prices()[USD]
    assert await failure_of(running) == f"GBP, USD: {FAR.format(1000)}"


async def test_confirmations_that_cannot_be_asked_for_settle_nothing(
    clock: FakeClock, store: UnreliableStore, logged: Callable[[], list[str]]
) -> None:
    anchors = UnreliableAnchors(last_prices(), now=clock.now)
    await anchors.confirm(NewConfirmation(EUR, 700 * RATE_SCALE, 800 * RATE_SCALE, "Why not.", 15))

    async def be_away() -> None:
        anchors.fault = AWAY

    clock.meanwhile = be_away
    prices = jump_of(1000, 790)
    await run_ticks(clock, store, 2, prices, prices, anchors=anchors)
    assert (store.prices(), store.unsettled()) == ([1000], [790])
    assert logged()[0] == "WARNING Nobody can say whether the prices are confirmed: PostgreSQL is away."


@pytest.mark.parametrize(("hours", "price", "is_far"), [(23, 1201, True), (25, 1201, False), (25, 1401, True)])
async def test_last_price_that_is_older_than_a_day_binds_less(
    clock: FakeClock, store: UnreliableStore, hours: int, price: float, is_far: bool
) -> None:
    anchors = ModelAnchors(last_prices(age=timedelta(hours=hours)), now=clock.now)
    await run_ticks(clock, store, 2, jump_of(price, price), jump_of(price, price), anchors=anchors)
    assert (store.prices() == []) is is_far
    assert store.unsettled() == [price] * (2 if is_far else 1)


async def test_currencies_that_all_show_one_number_are_unsettled(clock: FakeClock, store: UnreliableStore) -> None:
    anchors = ModelAnchors(last_prices(1000, EUR=860, GBP=760), now=clock.now)
    running = await run_ticks(clock, store, 2, [well], [well], anchors=anchors)
    assert store.prices() == []
    crossed = "has moved more than 10 % against {}, until an operator confirms it"
    assert {currency: each.reason for currency, each in store.published[-1].unsettled.items()} == {
        EUR: crossed.format("USD"),
        GBP: FAR.format(760),
        USD: crossed.format("EUR and GBP"),
    }
    assert "USD: has moved" in await failure_of(running)


async def test_currency_that_was_away_and_shows_the_dollars_number_is_unsettled(
    clock: FakeClock, store: UnreliableStore
) -> None:
    anchors = ModelAnchors(now=clock.now)
    right, away = at_prices(EUR=20572, GBP=18271, USD=21712), at_prices(EUR=20572, USD=21712)
    wrong = at_prices(EUR=20572, GBP=21712, USD=21712)
    prices = [right, *[away] * 7, *[wrong] * 3]
    await run_ticks(clock, store, 11, prices, prices, anchors=anchors)
    crossed = "has moved more than 10 % against USD, until an operator confirms it"
    for record in store.published[-3:]:
        assert {currency: each.reason for currency, each in record.unsettled.items()} == {GBP: crossed}
        assert set(record.rates_e8) == {EUR, USD}
    assert anchors.kept[GBP].rate_e8 == 18271 * RATE_SCALE


async def test_last_price_is_as_new_as_its_record(clock: FakeClock, store: UnreliableStore) -> None:
    """Not as its oldest quote: of a record that is newer by an older quote the price would not count."""
    anchors = ModelAnchors(now=clock.now)
    prices = [at_price(1000), at_price(1001, age_seconds=20)]
    await run_ticks(clock, store, 2, prices, prices, anchors=anchors)
    assert store.prices() == [1000, 1001]
    assert anchors.kept == same_anchors(1001, 15)


async def test_updater_that_was_cut_off_is_judged_by_what_another_one_published(
    clock: FakeClock, store: UnreliableStore
) -> None:
    anchors = UnreliableAnchors(now=clock.now)

    async def go_on_without_it() -> None:
        if clock.seconds == 1075:
            await anchors.keep_anchors(same_anchors(1560, 75))

    clock.meanwhile = go_on_without_it
    prices = [well, *[closed] * 5, well]
    await run_ticks(clock, store, 7, prices, prices, anchors=anchors)
    assert (store.prices(), store.unsettled()) == ([1000], [1000])
    assert "from the last price, 1560.00 of" in store.published[-1].unsettled[EUR].reason


async def test_updater_that_was_cut_off_publishes_nothing_while_the_ledger_cannot_be_asked(
    clock: FakeClock, store: UnreliableStore
) -> None:
    anchors = UnreliableAnchors(now=clock.now)

    async def be_away() -> None:
        anchors.fault = AWAY if clock.seconds < 1080 else None

    clock.meanwhile = be_away
    prices = [well, *[closed] * 3, well]
    running = await run_ticks(clock, store, 6, prices, prices, anchors=anchors)
    assert len(store.published) == 1
    assert await failure_of(running) == "The last prices are not known: PostgreSQL is away."
    clock.seconds_max = clock.seconds - 1000 + 15
    await run(running)
    assert store.prices() == [1000, 1000]


async def test_updater_that_goes_on_asks_the_ledger_for_the_last_prices_once(
    clock: FakeClock, store: UnreliableStore
) -> None:
    anchors = UnreliableAnchors(last_prices(), now=clock.now)
    await run_ticks(clock, store, 8, [well], [well], anchors=anchors)
    assert anchors.asked == 1


# --- what the store is told, and stores that are down


async def test_store_is_told_after_every_tick_how_each_source_is(clock: FakeClock, store: UnreliableStore) -> None:
    await run_ticks(clock, store, 2, [well], [well], [at_price(1500), closed])
    assert [(each.at - NOON).total_seconds() for each in store.told] == [0, 15]
    assert {each.feed for each in store.told} == {"sandbox"}
    first, second = (each.sources for each in store.told)
    assert [each.source for each in first] == ["one", "two", "three"]
    assert [each.detail for each in first] == ["", "", "EUR, GBP, USD: is more than 1 % from those that agree"]
    assert [each.detail for each in second] == ["", "", "The exchange is closed"]
    assert [each.failures for each in second] == [0, 0, 1]
    assert [each.quoted_at for each in second] == [NOON + timedelta(seconds=15)] * 2 + [NOON]
    assert second[2].mids_e8 == dict.fromkeys(Currency, 1500 * RATE_SCALE)


async def test_store_that_is_away_gets_the_price_within_a_second_of_its_return(
    clock: FakeClock, store: UnreliableStore, logged: Callable[[], list[str]]
) -> None:
    async def come_back() -> None:
        store.is_away = clock.seconds < 1003

    store.is_away = True
    clock.meanwhile = come_back
    sources = exchanges(clock, [well], [well])
    running = updater(clock, sources, store)
    await run(running)
    assert len(sources[0].asked_at) == len(store.published) == len(store.told) == 1
    assert store.told[0].at == NOON
    await running.check()
    assert [line.partition(" ")[0] for line in logged()] == ["WARNING", "INFO"]


async def test_store_that_stays_away_gets_the_next_price_when_it_is_due(
    clock: FakeClock, store: UnreliableStore, logged: Callable[[], list[str]]
) -> None:
    store.is_away = True
    running = await run_ticks(clock, store, 3, [well], [well])
    assert await failure_of(running) == "The store is away."
    assert store.told == []
    assert logged() == ["WARNING The price store is down: The store is away.", no_price("The store is away.")]


async def test_service_is_not_ready_while_the_store_is_away_between_two_ticks(
    clock: FakeClock, store: UnreliableStore
) -> None:
    async def go_away() -> None:
        store.is_away = clock.seconds > 1005

    clock.meanwhile = go_away
    running = await run_ticks(clock, store, 1, [well], [well])
    assert len(store.published) == 1
    assert await failure_of(running) == "The store is away."


async def test_price_that_the_store_has_lost_hangs_again_within_a_second_and_as_it_was(
    clock: FakeClock, store: UnreliableStore
) -> None:
    async def lose() -> None:
        if clock.seconds == 1005:
            store._current = None

    clock.meanwhile = lose
    await run_ticks(clock, store, 1, [well], [well])
    assert store.published == [await store.latest()] * 2


async def test_newer_price_on_the_store_stays_and_is_no_fault(
    clock: FakeClock, store: UnreliableStore, logged: Callable[[], list[str]]
) -> None:
    await run_ticks(clock, store, 1, [well], [well])
    current = await store.latest()
    earlier = FakeClock(seconds_max=5)
    earlier.at += -timedelta(seconds=5)
    anchors = ModelAnchors(last_prices(), now=clock.now)
    superseded = updater(earlier, exchanges(earlier, [at_price(1010)], [at_price(1010)]), store, anchors=anchors)
    await run(superseded)
    assert await store.latest() is current
    assert anchors.kept == last_prices(), "the next price is not compared with one that nobody sees"
    await superseded.check()
    assert store.told[-1].problem == ""
    assert logged() == []


async def test_source_back_with_an_older_time_than_the_published_price_costs_nothing(
    clock: FakeClock, store: UnreliableStore
) -> None:
    async def late(by: Exchange) -> SourceResponse:
        said = await well(by)
        quotes = tuple(replace(each, observed_at=each.observed_at - timedelta(seconds=20)) for each in said.quotes)
        return replace(said, quotes=quotes)

    running = await run_ticks(clock, store, 3, [well], [well], [closed, late, late])
    await running.check()
    assert [(each.as_of - NOON).total_seconds() for each in store.published] == [0, -5, 10]
    assert {each.problem for each in store.told} == {""}


async def test_quotes_from_before_the_wall_clock_was_set_back_are_no_price(
    clock: FakeClock, store: UnreliableStore
) -> None:
    async def answer_and_step_back(by: Exchange) -> SourceResponse:
        said = await well(by)
        by.clock.at += -timedelta(seconds=1)
        return said

    running = await run_ticks(clock, store, 1, [answer_and_step_back], [well])
    assert store.published == []
    assert await failure_of(running) == "EUR, GBP, USD: only 1 of at least 2 sources agree"


async def test_validity_is_counted_from_the_decision_on_a_clock_that_does_not_step(
    clock: FakeClock, store: UnreliableStore
) -> None:
    """The store is away for a minute, and meanwhile the wall clock steps back: the price is not offered any more."""

    async def come_back_late() -> None:
        if clock.seconds == 1030:
            clock.at += -timedelta(seconds=9)
        store.is_away = clock.seconds < 1031

    store.is_away = True
    clock.meanwhile = come_back_late
    clock.seconds_max = 45
    over = exchanges(clock, [at_price(1000, age_seconds=30)], [well])
    running = updater(clock, over, store, price_ttl_seconds=60, feed_interval_seconds=50)
    await run(running)
    assert "could be used until 2026-01-31T12:00:30" in await failure_of(running)
    assert store.published == []


async def test_fault_that_is_not_foreseen_ends_one_tick_only(clock: FakeClock, logged: Callable[[], list[str]]) -> None:
    class Broken(UnreliableStore):
        async def publish(self, record: PriceRecord) -> PriceRecord:
            if clock.seconds < 1015:
                raise RuntimeError("a fault")
            return await super().publish(record)

    store = Broken(clock)
    running = await run_ticks(clock, store, 2, [well], [well])
    assert store.told[0].problem == "Something went wrong here (RuntimeError)."
    assert store.told[1].problem == ""
    await running.check()
    fault = "Something went wrong here (RuntimeError)."
    assert logged() == ["ERROR No price was published", no_price(fault), "INFO All prices are there again."]


def test_what_was_wrong_with_a_source_is_listed_by_currency() -> None:
    quote = Quote("one", EUR, 1, 1, NOON)
    rejected = [
        RejectedQuote("one", "is old", quote),
        RejectedQuote("one", "USD: is no price of a bitcoin"),
        RejectedQuote("other", "is new", replace(quote, source="other")),
        RejectedQuote("one", "is old", replace(quote, currency=GBP)),
    ]
    assert rejection_reason("one", rejected) == "USD: is no price of a bitcoin; EUR, GBP: is old"
    assert rejection_reason("two", rejected) == ""


# --- the service as it runs


def app_of(sources: Sequence[PriceSource], store: PriceStore, **settings: Any) -> Any:
    chosen = Settings(**settings)
    reporter = Reporter("api_updater", MemoryReportStore(chosen), chosen)
    return api_updater.create_app(chosen, sources, store, reporter, anchors=ModelAnchors(last_prices()))


@contextlib.asynccontextmanager
async def asking(url: str) -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(base_url=url, trust_env=False, timeout=30) as client:
        yield client


async def now_well(by: Exchange) -> SourceResponse:
    return seen(by, 1000, ALL, datetime.now(UTC))


async def test_service_publishes_while_it_runs_and_not_after(clock: FakeClock) -> None:
    third_asked = asyncio.Event()

    async def third(by: Exchange) -> SourceResponse:
        third_asked.set()
        return await now_well(by)

    sources = exchanges(clock, [now_well, now_well, third], [now_well])
    store = MemoryPriceStore(Settings())
    async with served(app_of(sources, store, feed_interval_seconds=0.01)):
        await third_asked.wait()
    asked = len(sources[0].asked_at)
    assert asked >= 3
    assert len(await store.history(60, 1000)) in (asked - 1, asked)
    assert not [task for task in asyncio.all_tasks() if "Updater" in repr(task)]


async def test_service_publishes_to_a_store_far_away_once_it_is_there_and_tells_it_of_the_sources(
    clock: FakeClock,
) -> None:
    settings = Settings(publishing_tokens="the-token", feed_interval_seconds=0.5, price_ttl_seconds=60)
    port = free_port()
    far = RemotePriceStore(f"http://127.0.0.1:{port}", settings)
    behind = MemoryPriceStore(settings)
    reporter = Reporter("api_cache_proxy", MemoryReportStore(settings), settings)
    sources = exchanges(clock, [now_well], [now_well], [closed])
    for each, name in zip(sources, SOURCES["sandbox"], strict=False):
        each.name = name  # others are not believed far away
    app = api_updater.create_app(settings, sources, far, reporter, anchors=ModelAnchors())
    async with asyncio.timeout(30), served(app) as url, asking(url) as client:
        while "gave no answer" not in (await client.get("/readyz")).text:
            await asyncio.sleep(0.01)
        async with served(api_cache_proxy.create_app(settings, behind, MemoryRateStore(), reporter), port):
            while (await client.get("/readyz")).status_code != 200:
                await asyncio.sleep(0.01)
            while True:
                with contextlib.suppress(PriceUnavailable):
                    state = await far.feed_status()
                    break
                await asyncio.sleep(0.01)
            record = await far.latest()
    await far.close()
    assert len(record.used) == 6
    assert [each.detail for each in state.sources] == ["", "", "The exchange is closed"]


async def test_service_is_ready_only_when_the_last_tick_published(clock: FakeClock) -> None:
    opened, closing, failed, asked_again = (asyncio.Event() for _ in range(4))

    async def wait_for_opening(by: Exchange) -> SourceResponse:
        await opened.wait()
        return await now_well(by)

    async def fail_when_closed(_: Exchange) -> SourceResponse:
        asked_again.set()
        await closing.wait()
        raise SourceFailed("The exchange is closed.")

    async def hang_after_failure(by: Exchange) -> SourceResponse:
        failed.set()
        return await hang(by)

    sources = exchanges(clock, [wait_for_opening, fail_when_closed, hang_after_failure], [now_well])
    app = app_of(sources, MemoryPriceStore(Settings()), feed_interval_seconds=0.01, source_seconds_max=60)
    async with served(app) as url, asking(url) as client:
        missing = (await client.get("/readyz")).json()["missing"]
        assert missing == [{"what": "prices", "why": "No price has been published yet."}]
        opened.set()
        await asked_again.wait()
        assert (await client.get("/readyz")).json() == {"status": "ready"}
        closing.set()
        await failed.wait()
        missing = (await client.get("/readyz")).json()["missing"]
        no_price = "EUR, GBP, USD: only 1 of at least 2 sources agree"
        assert missing == [{"what": "prices", "why": no_price}]


async def test_service_stops_at_once_though_a_source_hangs(clock: FakeClock, store: UnreliableStore) -> None:
    asked = asyncio.Event()

    async def hang_when_asked(by: Exchange) -> SourceResponse:
        asked.set()
        return await hang(by)

    app = app_of(exchanges(clock, [hang_when_asked]), store, source_seconds_max=3600)
    async with asyncio.timeout(5), served(app):
        await asked.wait()


async def test_metrics_show_the_price_and_every_source(clock: FakeClock) -> None:
    asked_again = asyncio.Event()

    async def hang_at_the_end(by: Exchange) -> SourceResponse:
        asked_again.set()
        return await hang(by)

    observed_at = datetime.now(UTC)

    async def known(by: Exchange) -> SourceResponse:
        euros = seen(by, 1060, (EUR,), observed_at).quotes
        return SourceResponse(euros + seen(by, 1000.25, (GBP, USD), observed_at).quotes)

    async def far(by: Exchange) -> SourceResponse:
        return seen(by, 1500, (EUR,), observed_at)

    sources = exchanges(clock, [known], [known], [far], [closed, hang_at_the_end])
    app = app_of(sources, MemoryPriceStore(Settings()), feed_interval_seconds=0.01, source_seconds_max=60)
    async with served(app) as url, asking(url) as client:
        await asked_again.wait()
        shown = shown_by((await client.get("/metrics")).text)
    for source, up, used, mid, failures in (("one", 1, 1, 1060, 0), ("three", 1, 0, 1500, 0), ("four", 0, 0, None, 1)):
        assert shown["buydesk_source_up", source] == up
        assert shown["buydesk_source_used", source] == used
        assert shown["buydesk_source_circuit_open", source] == 0
        assert shown["buydesk_source_failures_total", source] == failures
        assert shown.get(("buydesk_source_mid", source, "EUR")) == mid
        assert shown.get(("buydesk_source_quoted_at_seconds", source)) == (observed_at.timestamp() if mid else None)
    assert shown["buydesk_source_mid", "one", "USD"] == 1000.25
    assert ("buydesk_source_mid", "three", "USD") not in shown
    assert [shown["buydesk_price_has_quorum", each] for each in ALL] == [1, 1, 1]
    assert shown["buydesk_price_as_of_seconds",] == observed_at.timestamp()
    assert [shown["buydesk_price_unsettled", each] for each in ALL] == [1, 0, 0]


async def test_service_ends_what_it_does_before_it_has_stopped(clock: FakeClock) -> None:
    publishing, ended = asyncio.Event(), asyncio.Event()

    class Slow(UnreliableStore):
        async def publish(self, record: PriceRecord) -> PriceRecord:
            publishing.set()
            try:
                await asyncio.Event().wait()
                raise AssertionError("unreachable")
            finally:
                await asyncio.sleep(0.05)
                ended.set()

    async with served(app_of(exchanges(clock, [now_well], [now_well]), Slow(clock))):
        await publishing.wait()
    assert ended.is_set()


async def test_metrics_show_when_there_is_no_quorum(clock: FakeClock, store: UnreliableStore) -> None:
    for second, has_quorum in ((well, 1), (closed, 0)):
        running = await run_ticks(clock, UnreliableStore(clock), 1, [well], [second])
        [shown] = [each for each in FeedMetrics(running).collect() if each.name == "buydesk_price_has_quorum"]
        assert [sample.value for sample in shown.samples] == [has_quorum] * len(ALL)
        clock.seconds = 1000


async def test_metrics_show_which_source_is_left_alone(clock: FakeClock, store: UnreliableStore) -> None:
    running = await run_ticks(clock, store, 3, [closed], [well], [well])
    [resting] = [each for each in FeedMetrics(running).collect() if each.name == "buydesk_source_circuit_open"]
    assert [sample.value for sample in resting.samples] == [1, 0, 0]


def shown_by(metrics: str) -> dict[tuple[str, ...], float]:
    """The values of what Prometheus reads, by name, source and currency."""
    samples = [sample for family in text_string_to_metric_families(metrics) for sample in family.samples]
    labels = ("source", "currency")
    return {
        (each.name, *(each.labels[label] for label in labels if label in each.labels)): each.value for each in samples
    }


async def test_metrics_before_the_first_price_show_no_quorum(clock: FakeClock, store: UnreliableStore) -> None:
    asked = asyncio.Event()

    async def hang_when_asked(by: Exchange) -> SourceResponse:
        asked.set()
        return await hang(by)

    app = app_of(exchanges(clock, [hang_when_asked]), store, source_seconds_max=60)
    async with served(app) as url, asking(url) as client:
        await asked.wait()
        shown = shown_by((await client.get("/metrics")).text)
    assert [shown["buydesk_price_has_quorum", each] for each in ALL] == [0, 0, 0]
    assert shown["buydesk_source_failures_total", "one"] == 0
    assert not {"buydesk_price_as_of_seconds", "buydesk_source_up"} & {name for name, *_ in shown}


async def test_service_serves_only_what_every_service_serves(clock: FakeClock, store: UnreliableStore) -> None:
    async with served(app_of(exchanges(clock, [well]), store)) as url, asking(url) as client:
        assert (await client.get("/")).json()["service"] == "api_updater"
        paths = (await client.get("/openapi.json")).json()["paths"]
        assert set(paths) == {"/", "/livez", "/readyz", "/metrics"}
        assert (await client.get("/add/")).status_code == 404
