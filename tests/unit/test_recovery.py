"""When a source that failed is asked again: not while the others do without it, nor before it wants to be."""

import asyncio
from datetime import timedelta
from typing import Any

import pytest

from buydesk.backends.sources import EXCHANGES
from buydesk.backends.sources.exchange import ExchangeSource
from buydesk.errors import SourceFailed
from buydesk.money import Currency
from buydesk.prices.model import Quote, RejectedQuote, SourceResponse
from buydesk.prices.polling import SourcePoller
from buydesk.settings.model import Settings
from tests.clock import NOON, FakeClock
from tests.exchanges import exchanges

QUOTES = (Quote("exchange", Currency.EUR, 10**11, 10**11, NOON),)
RESTING: dict[str, Any] = {"source_cooldown_seconds": 10, "source_cooldown_seconds_max": 35}


class Exchange:
    """Gives `answer`, or fails with it."""

    name = "exchange"

    def __init__(self) -> None:
        self.asked = 0
        self.answer: SourceResponse | SourceFailed = SourceFailed("exchange is closed.")

    async def quotes(self) -> SourceResponse:
        self.asked += 1
        if isinstance(self.answer, SourceFailed):
            raise self.answer
        return self.answer

    async def close(self) -> None:
        """It has nothing open."""


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def exchange() -> Exchange:
    return Exchange()


@pytest.fixture
def source(exchange: Exchange, clock: FakeClock) -> SourcePoller:
    return SourcePoller(exchange, Settings(**RESTING), clock=clock)


async def reason_of(source: SourcePoller, **asked: bool) -> str:
    """Why it gives no quotes."""
    seen = await source.poll(**asked)
    assert seen.quotes == ()
    [rejected] = seen.rejected
    return rejected.reason


async def failed(source: SourcePoller, times: int = 3) -> None:
    for _ in range(times):
        assert await reason_of(source) == "is closed"


async def test_source_that_rests_is_asked_all_the_same_when_there_is_no_price_without_it(
    source: SourcePoller, exchange: Exchange
) -> None:
    await failed(source)
    assert await reason_of(source) == "is left alone after 3 failures in a row; the last: is closed"
    assert exchange.asked == 3
    assert await reason_of(source, may_rest=False) == "is closed"
    assert (source.state().failures, source.failures_total) == (4, 4)
    exchange.answer = SourceResponse(QUOTES)
    assert (await source.poll(may_rest=False)).quotes == QUOTES


async def test_source_that_is_back_is_asked_on_however_long_it_should_have_rested(
    source: SourcePoller, exchange: Exchange
) -> None:
    await failed(source)
    exchange.answer = SourceResponse(QUOTES)
    await source.poll(may_rest=False)
    assert source.state().resting_until is None
    assert (await source.poll()).quotes == QUOTES


async def test_being_asked_all_the_same_makes_no_rest_longer(source: SourcePoller, clock: FakeClock) -> None:
    await failed(source)
    for _ in range(50):
        assert await reason_of(source, may_rest=False) == "is closed"
    clock.seconds += 9
    assert (await reason_of(source)).startswith("is left alone after 53 failures")
    assert source.state().resting_until == NOON + timedelta(seconds=10)
    clock.seconds += 1
    await failed(source, 1)
    assert source.state().resting_until == clock.now() + timedelta(seconds=20)


async def test_source_that_is_asked_at_every_tick_does_not_claim_to_rest(source: SourcePoller) -> None:
    await failed(source)
    assert source.state().resting_until == NOON + timedelta(seconds=10)
    await source.poll(may_rest=False)
    assert source.state().resting_until is None


@pytest.mark.parametrize("may_rest", [True, False])
async def test_source_that_says_when_to_ask_again_is_not_asked_before(
    may_rest: bool, source: SourcePoller, exchange: Exchange, clock: FakeClock
) -> None:
    exchange.answer = SourceFailed("exchange has enough.", retry_after_seconds=30)
    assert await reason_of(source, may_rest=may_rest) == "has enough"
    clock.seconds += 15
    assert await reason_of(source, may_rest=may_rest) == "wants to be asked again in 15 s; the last: has enough"
    state = source.state()
    assert (state.resting_until, state.failures, state.detail) == (NOON + timedelta(seconds=30), 1, "has enough")
    clock.seconds += 15
    exchange.answer = SourceResponse(QUOTES)
    assert (await source.poll(may_rest=may_rest)).quotes == QUOTES
    assert (exchange.asked, source.state().resting_until) == (2, None)


async def test_nobody_is_left_alone_for_longer_than_the_longest_rest(
    source: SourcePoller, exchange: Exchange, clock: FakeClock
) -> None:
    exchange.answer = SourceFailed("exchange has enough.", retry_after_seconds=10**9)
    await source.poll()
    assert source.state().resting_until == NOON + timedelta(seconds=35)
    clock.seconds += 35
    assert await reason_of(source) == "has enough"


async def test_longer_of_both_rests_is_shown(source: SourcePoller, exchange: Exchange, clock: FakeClock) -> None:
    exchange.answer = SourceFailed("exchange has enough.", retry_after_seconds=4)
    for _ in range(3):
        await source.poll()
        clock.seconds += 4
    assert source.state().resting_until == clock.now() + timedelta(seconds=6), "three failures: the breaker's 10 s"
    clock.seconds += 6
    exchange.answer = SourceFailed("exchange has enough.", retry_after_seconds=33)
    await source.poll()
    assert source.state().resting_until == clock.now() + timedelta(seconds=33), "not the breaker's 20 s"


async def test_quotes_of_a_source_that_had_enough_of_some_requests_are_used_before_it_is_left_alone(
    source: SourcePoller, exchange: Exchange, clock: FakeClock
) -> None:
    said = SourceResponse(QUOTES, (RejectedQuote("exchange", "GBP: status 429"),), retry_after_seconds=20)
    exchange.answer = said
    assert await source.poll() == said
    clock.seconds += 15
    assert await reason_of(source, may_rest=False) == "wants to be asked again in 5 s"
    assert (source.state("unused").detail, source.failures_total) == ("unused", 0)


async def test_two_exchanges_that_are_back_after_minutes_without_any_quote_at_the_next_tick() -> None:
    clock, settings = FakeClock(), Settings()
    by_name = {exchange.name: exchange for exchange in EXCHANGES}
    async with exchanges() as stand_ins:
        for each in stand_ins.values():
            await each.stop()
        sources = [ExchangeSource(by_name[name], each.url, settings, clock) for name, each in stand_ins.items()]
        pollers = [SourcePoller(source, settings, clock=clock) for source in sources]

        async def tick() -> set[str]:
            """Who quotes at a tick, after one without a price."""
            clock.seconds += 15
            answers = await asyncio.gather(*(poller.poll(may_rest=False) for poller in pollers))
            return {quote.source for answer in answers for quote in answer.quotes}

        for _ in range(28):
            assert await tick() == set()
        assert {poller.state().resting_until for poller in pollers} == {None}
        for name in ("bitfinex", "kraken"):
            await stand_ins[name].start()
        assert await tick() == {"bitfinex", "kraken"}
        for source in sources:
            await source.close()
