"""A source without a clock of its own proves that it is alive by change: what is told of that, and what it costs."""

from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
from aiohttp import web
from msgspec.structs import replace

from buydesk.backends.sources import EXCHANGES, EXTRA_EXCHANGES
from buydesk.backends.sources.exchange import ExchangeSource
from buydesk.money import Currency
from buydesk.prices.model import PriceSource, Quote, RejectedQuote, SourceResponse
from buydesk.prices.polling import ANSWERS_REMEMBERED, SourcePoller
from buydesk.settings.model import Settings
from buydesk.settings.types import EXTRA_SOURCES
from buydesk.times import EPOCH
from tests.clock import NOON, FakeClock
from tests.exchanges import StandIns, answering, exchanges, gemini_answer

CLOCKLESS = ["bitfinex", "bitvavo", "gemini", "kraken"]
BY_NAME = {exchange.name: exchange for exchange in EXCHANGES + EXTRA_EXCHANGES}


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
async def stand_ins() -> AsyncIterator[StandIns]:
    async with exchanges(*EXTRA_SOURCES) as all_of_them:
        yield all_of_them


class Market:
    """A source without a clock, whose answers have the fingerprints that a test puts into it."""

    def __init__(self, clock: FakeClock, name: str = "kraken") -> None:
        self.name = name
        self.fingerprint: bytes | None = b"first"
        self.bid_e8 = 10**11
        self.fails = False
        self.age = timedelta(0)
        self._clock = clock

    async def quotes(self) -> SourceResponse:
        if self.fails:
            raise OSError
        quote = Quote(self.name, Currency.EUR, self.bid_e8, 10**11, self._clock.at - self.age)
        return SourceResponse((quote,), fingerprint=self.fingerprint)

    async def close(self) -> None:
        """It has nothing open."""


def polled(source: PriceSource, clock: FakeClock, **settings: Any) -> SourcePoller:
    return SourcePoller(source, Settings(**settings), clock=clock)


async def test_first_answer_proves_no_change(clock: FakeClock) -> None:
    """Or a source that stands still would prove its time by a restart of ours."""
    seen = await polled(Market(clock), clock).poll()
    assert [quote.changed_at for quote in seen.quotes] == [EPOCH]


async def test_answer_that_does_not_change_says_since_when_until_its_time_is_up(clock: FakeClock) -> None:
    market = Market(clock)
    source = polled(market, clock)
    for _ in range(9):
        seen = await source.poll()
        assert [(quote.observed_at, quote.changed_at) for quote in seen.quotes] == [(clock.at, EPOCH)]
        clock.seconds += 15
    frozen = RejectedQuote("kraken", "has given the same answer for 135 s")
    assert await source.poll() == SourceResponse((), (frozen,))
    clock.seconds += 15
    market.fingerprint, market.bid_e8 = b"second", 10**11 - 1
    assert [quote.changed_at for quote in (await source.poll()).quotes] == [clock.at]


async def test_that_other_pairs_move_does_not_prove_a_book_that_stands_still(clock: FakeClock) -> None:
    market = Market(clock)
    source = polled(market, clock)
    for number in range(9):
        market.fingerprint = b"%d" % number
        market.bid_e8 = 10**11 - (number > 0)
        seen = await source.poll()
        changed_at = NOON + timedelta(seconds=15) if number else EPOCH
        assert [(quote.observed_at, quote.changed_at) for quote in seen.quotes] == [(clock.at, changed_at)]
        clock.seconds += 15


async def test_frozen_source_is_told_but_has_not_failed_and_is_asked_on(clock: FakeClock) -> None:
    market = Market(clock)
    source = polled(market, clock)
    await source.poll()
    clock.seconds += 121
    for _ in range(5):
        assert (await source.poll()).quotes == ()
    state = source.state()
    assert state.detail == state.last_error == "has given the same answer for 121 s"
    assert (state.failed_at, state.failures, state.resting_until, source.failures_total) == (clock.at, 0, None, 0)
    assert state.quoted_at == NOON, "the last quotes that were used"
    market.fingerprint = b"second"
    await source.poll()
    assert (source.state().detail, source.state().last_error) == ("", "has given the same answer for 121 s")


async def test_source_with_a_clock_of_its_own_need_not_change(clock: FakeClock) -> None:
    market = Market(clock)
    market.fingerprint = None
    source = polled(market, clock)
    for _ in range(2):
        assert [quote.changed_at for quote in (await source.poll()).quotes] == [None]
        clock.seconds += 86_400


async def test_failure_between_is_no_change(clock: FakeClock) -> None:
    market = Market(clock)
    source = polled(market, clock)
    await source.poll()
    clock.seconds += 60
    market.fails = True
    await source.poll()
    clock.seconds += 61
    market.fails = False
    assert (await source.poll()).rejected == (RejectedQuote("kraken", "has given the same answer for 121 s"),)


async def test_old_answers_that_take_turns_are_no_change(clock: FakeClock) -> None:
    market = Market(clock)
    source = polled(market, clock)
    for turn in range(ANSWERS_REMEMBERED * 30):
        market.fingerprint = b"%d" % (turn % ANSWERS_REMEMBERED)
        seen = await source.poll()
        clock.seconds += 1
        assert bool(seen.quotes) == (turn <= ANSWERS_REMEMBERED - 1 + 120)


async def test_change_is_not_later_than_the_quote_was_observed(clock: FakeClock) -> None:
    market = Market(clock)
    market.age = timedelta(seconds=20)
    source = polled(market, clock)
    await source.poll()
    market.fingerprint, market.bid_e8 = b"second", 10**11 - 1
    [quote] = (await source.poll()).quotes
    assert quote.changed_at == quote.observed_at == NOON - market.age


async def test_wall_clock_that_is_set_neither_thaws_nor_freezes(clock: FakeClock) -> None:
    market = Market(clock)
    source = polled(market, clock)
    await source.poll()
    market.fingerprint, market.bid_e8 = b"second", 10**11 - 1
    await source.poll()
    clock.at -= timedelta(hours=1)
    [quote] = (await source.poll()).quotes
    assert quote.changed_at == quote.observed_at == clock.at
    clock.at += timedelta(hours=2)
    assert (await source.poll()).quotes
    clock.at -= timedelta(hours=1)
    clock.seconds += 121
    assert not (await source.poll()).quotes


@pytest.mark.parametrize(
    ("name", "settings", "seconds"),
    [
        ("kraken", {}, 120),
        ("kraken", {"source_unchanged_seconds_max": 50}, 50),
        ("kraken", {"source_unchanged_seconds_max": 50, "kraken_unchanged_seconds_max": 70}, 70),
        ("kraken", {"bitfinex_unchanged_seconds_max": 70}, 120),
        ("gemini", {"gemini_unchanged_seconds_max": 300}, 300),
        ("somebody else", {}, 120),
    ],
)
async def test_limit_is_one_for_all_or_the_source_s_own(
    name: str, settings: dict[str, Any], seconds: int, clock: FakeClock
) -> None:
    source = polled(Market(clock, name), clock, **settings)
    await source.poll()
    clock.seconds += seconds
    assert (await source.poll()).quotes
    clock.seconds += 0.1
    assert not (await source.poll()).quotes


async def asked(source: ExchangeSource, times: int = 2) -> list[bytes | None]:
    """The fingerprints of its answers, one after the other."""
    return [(await source.quotes()).fingerprint for _ in range(times)]


@pytest.mark.parametrize("name", CLOCKLESS)
async def test_exchange_without_a_clock_shows_whether_its_answer_is_another_one(
    name: str, stand_ins: StandIns, clock: FakeClock
) -> None:
    source = ExchangeSource(BY_NAME[name], stand_ins[name].url, Settings(), clock)
    one, other = await asked(source)
    assert one != other, "the price is the same, the volume is not"
    stand_ins[name].repeats = True
    one, other, third = await asked(source, 3)
    assert one == other == third
    assert one is not None
    stand_ins.mids[Currency.EUR] += 1
    assert await asked(source, 1) != [one]
    await source.close()


@pytest.mark.parametrize("name", ["bitstamp", "coinbase", "okx"])
async def test_exchange_with_a_clock_gives_no_fingerprint(name: str, stand_ins: StandIns) -> None:
    source = ExchangeSource(BY_NAME[name], stand_ins[name].url, Settings())
    assert await asked(source) == [None, None]
    await source.close()


@pytest.mark.parametrize("name", CLOCKLESS)
async def test_frozen_exchange_is_set_aside_until_it_moves(name: str, stand_ins: StandIns, clock: FakeClock) -> None:
    exchange = ExchangeSource(BY_NAME[name], stand_ins[name].url, Settings(), clock)
    source = polled(exchange, clock)
    await source.poll()
    stand_ins[name].repeats = True
    await source.poll()
    clock.seconds += 121
    frozen = await source.poll()
    assert [each.reason for each in frozen.rejected] == ["has given the same answer for 121 s"]
    stand_ins[name].repeats = False
    assert (await source.poll()).quotes
    await exchange.close()


async def test_request_that_fails_now_and_then_is_no_sign_of_life(clock: FakeClock) -> None:
    fails: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        if fails and fails[0] in request.path:
            return web.json_response({"message": f"{request.path} {clock.seconds}"}, status=len(fails))
        currency = request.path[-3:].upper()
        return web.Response(body=gemini_answer("1", "1", "0", currency))

    async with answering(answer) as url:
        source = ExchangeSource(BY_NAME["gemini"], url, Settings(), clock)
        whole = await asked(source, 1)
        for fails in (["gbp"], [], ["usd"] * 200, []):  # noqa: B007  # the handler looks at it
            assert await asked(source, 1) == whole
        await source.close()


async def test_quotes_are_otherwise_as_the_exchange_gave_them(stand_ins: StandIns, clock: FakeClock) -> None:
    source = ExchangeSource(BY_NAME["kraken"], stand_ins["kraken"].url, Settings(), clock)
    stand_ins["kraken"].repeats = True
    given, dated = await source.quotes(), await polled(source, clock).poll()
    assert dated == replace(given, quotes=tuple(replace(each, changed_at=EPOCH) for each in given.quotes))
    await source.close()
