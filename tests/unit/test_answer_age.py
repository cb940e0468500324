"""How old an answer is, by its Date, and whose clock is named when times lie in the future; over real TCP."""

import contextlib
from collections.abc import AsyncIterator, Mapping
from datetime import datetime, timedelta
from email.utils import format_datetime

import pytest
from aiohttp import web

from buydesk.backends.sources import EXCHANGES
from buydesk.backends.sources.exchange import ExchangeSource
from buydesk.errors import ClockSkewed, SourceFailed
from buydesk.money import Currency
from buydesk.observability.clock_skew import ClockMonitor
from buydesk.settings.model import Settings
from tests.clock import NOON, FakeClock
from tests.exchanges import answering, bitstamp_answer, kraken_answer

BY_NAME = {exchange.name: exchange for exchange in EXCHANGES}
SKEW = timedelta(seconds=10)


def written(moment: datetime) -> str:
    return format_datetime(moment, usegmt=True)


@contextlib.asynccontextmanager
async def dated(
    name: str, headers: Mapping[str, str], clocks: ClockMonitor | None = None, time: datetime = NOON
) -> AsyncIterator[ExchangeSource]:
    """An exchange that answers with these headers and, if it tells a time of its own, this one, asked at noon."""
    bodies = {
        "bitstamp": bitstamp_answer("1", "1", str(int(time.timestamp()))),
        "kraken": kraken_answer(dict.fromkeys(Currency, ("1", "1"))),
    }

    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=bodies[name], headers=headers)

    async with answering(answer) as url:
        source = ExchangeSource(BY_NAME[name], url, Settings(), FakeClock(), clocks)
        yield source
        await source.close()


async def observed_at(name: str, headers: Mapping[str, str], time: datetime = NOON) -> datetime:
    async with dated(name, headers, time=time) as source:
        [moment] = {quote.observed_at for quote in (await source.quotes()).quotes}
    return moment


@pytest.mark.parametrize("name", ["bitstamp", "kraken"])
async def test_answer_is_as_old_as_its_date_beyond_what_clocks_may_differ(name: str) -> None:
    headers = {"Date": written(NOON - timedelta(minutes=20)), "X-Cache": "HIT"}
    assert await observed_at(name, headers) == NOON - timedelta(minutes=20) + SKEW


@pytest.mark.parametrize("name", ["bitstamp", "kraken"])
@pytest.mark.parametrize("seconds", [-10, -1, 0, 10, 86_400])
async def test_clock_that_is_off_as_much_as_allowed_or_ahead_makes_no_answer_older_and_none_younger(
    name: str, seconds: int
) -> None:
    assert await observed_at(name, {"Date": written(NOON + timedelta(seconds=seconds))}) == NOON


@pytest.mark.parametrize(
    ("age_seconds", "date_seconds", "seconds"), [(25, 20, 25), (5, 60, 50), (0, 60, 50), (25, -3600, 25)]
)
async def test_of_age_and_date_the_one_that_makes_it_older_counts(
    age_seconds: int, date_seconds: int, seconds: int
) -> None:
    headers = {"Age": str(age_seconds), "Date": written(NOON - timedelta(seconds=date_seconds))}
    assert await observed_at("kraken", headers) == NOON - timedelta(seconds=seconds)


async def test_own_time_that_is_older_than_the_date_counts() -> None:
    old = NOON - timedelta(minutes=30)
    assert await observed_at("bitstamp", {"Date": written(NOON - timedelta(minutes=20))}, old) == old


@pytest.mark.parametrize(
    "date", ["", "soon", "Sat, 31 Jan 2026 11:00:00 -0000", "Sat, 31 Jan 2026 11:00:00 +99999999999999", "9" * 5000]
)
async def test_date_that_is_none_says_nothing(date: str) -> None:
    assert await observed_at("kraken", {"Date": date}) == NOON


async def test_dates_as_far_away_as_there_are_cost_no_quote() -> None:
    assert (await observed_at("kraken", {"Date": "Mon, 01 Jan 1000 00:00:00 GMT"})).year == 1000
    assert await observed_at("kraken", {"Date": "Fri, 31 Dec 9999 23:59:59 -1200"}) == NOON


@pytest.mark.parametrize(
    ("headers", "is_heard"), [({}, True), ({"X-Cache": "MISS"}, True), ({"X-Cache": "Hit"}, False)]
)
async def test_date_of_what_a_cache_has_kept_is_not_taken_for_what_time_it_is(
    headers: dict[str, str], is_heard: bool
) -> None:
    clocks = ClockMonitor("the desk", 10, FakeClock())
    async with dated("kraken", {**headers, "Date": written(NOON - timedelta(hours=1))}, clocks) as source:
        await source.quotes()
    if is_heard:
        with pytest.raises(ClockSkewed):
            clocks.require_agreement_with("kraken")
    else:
        clocks.require_agreement_with("kraken")


async def future_refused(clocks: ClockMonitor) -> str:
    """Why nothing is taken of an exchange whose time lies an hour ahead of ours, after it dated its answer."""
    later = NOON + timedelta(hours=1)
    async with dated("bitstamp", {"Date": written(later)}, clocks, later) as source:
        with pytest.raises(SourceFailed) as refusal:
            await source.quotes()
    return refusal.value.detail


def heard(**ahead_seconds: int) -> ClockMonitor:
    """Who heard what others' clocks show."""
    clocks = ClockMonitor("the desk", 10, FakeClock())
    for whose, seconds in ahead_seconds.items():
        clocks.hear(whose, NOON + timedelta(seconds=seconds), clocks.moment())
    return clocks


async def test_our_clock_is_named_when_most_others_say_that_it_is_behind() -> None:
    assert await future_refused(heard(kraken=3600, gemini=3601)) == (
        "bitstamp gave no quote: a time more than 10 s ahead of ours, which is off: "
        "The clock of the desk is 3600 s behind bitstamp, gemini, kraken."
    )


@pytest.mark.parametrize("others", [{}, {"kraken": 0, "gemini": 0}], ids=["nobody else", "most agree with us"])
async def test_time_of_the_future_is_the_exchange_s_fault_unless_most_say_otherwise(others: dict[str, int]) -> None:
    assert await future_refused(heard(**others)) == "bitstamp gave no quote: a time more than 10 s in the future."


@pytest.mark.parametrize("name", ["bitstamp", "kraken"])
async def test_answer_that_is_old_by_our_clock_alone_is_told_as_our_fault(name: str) -> None:
    earlier = NOON - timedelta(hours=1)
    async with dated(name, {"Date": written(earlier)}, heard(coinbase=-3600, gemini=-3601), earlier) as source:
        seen = await source.quotes()
    assert {quote.observed_at for quote in seen.quotes} <= {earlier, earlier + SKEW}, "it is not believed all the same"
    assert {each.reason.partition(": ")[2] for each in seen.rejected} == {
        f"our clock is off: The clock of the desk is 3600 s ahead of {', '.join(sorted(('coinbase', 'gemini', name)))}"
    }


async def test_clock_of_ours_that_is_off_is_told_of_no_answer_that_is_fresh_by_it() -> None:
    async with dated("kraken", {"Date": written(NOON)}, heard(coinbase=-3600, gemini=-3600, bitstamp=-3600)) as source:
        assert (await source.quotes()).rejected == ()
