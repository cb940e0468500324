"""Evidence that looks honest and is wrong: each case of decision 0022 on a real desk over stand-ins for the exchanges.

The desks' times are short, so that a price grows old while a test looks on.
"""

import asyncio
import re
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from email.utils import format_datetime
from pathlib import Path

import httpx2
import pytest

from buydesk.money import Currency
from buydesk.times import parse_time
from tests.desks import Running, buydesk, desk_up
from tests.exchanges import HALF_SPREAD, MIDS, StandIns, exchanges, kraken_answer
from tests.price_clients import ONE, QUICK, Client, until


@pytest.fixture
def data_dir(open_directory: Path, request: pytest.FixtureRequest) -> Path:
    return open_directory / f"p{abs(hash(request.node.name)) % 10**6}"


@pytest.fixture
async def http() -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(timeout=20) as http:
        yield http


# Old prices are sold for up to QUOTE_AGE + TTL after their quotes stop proving anything.
ALIVE = QUICK | {
    "BUYDESK_QUOTE_AGE_SECONDS_MAX": "2",
    "BUYDESK_PRICE_TTL_SECONDS": "3",
    "BUYDESK_SOURCE_UNCHANGED_SECONDS_MAX": "7",
    "BUYDESK_CLOCK_SKEW_SECONDS_MAX": "2",
}
CLOCKLESS = ("kraken", "bitfinex", "gemini")
EUR, GBP, USD = (MIDS[each] for each in (Currency.EUR, Currency.GBP, Currency.USD))
MAINTENANCE = b'{"result":"error","reason":"Maintenance","message":"The exchange is undergoing maintenance"}'


async def one_book_at_the_edge_stops_nothing(stand_ins: StandIns, client: Client) -> None:
    """One book at the edge of what agrees keeps the other four from nothing."""
    factors = {"bitfinex": "0.9994", "bitstamp": "1", "coinbase": "1", "gemini": "1.0006", "kraken": "1.0096"}
    for name, factor in factors.items():
        stand_ins[name].factor = Decimal(factor)
    await until(client.uses, set(stand_ins) - {"kraken"})
    assert await client.sells()
    assert await client.says("kraken", "is more than 1 % from those that agree")


async def faults_cost_what_they_spoil_and_are_told(stand_ins: StandIns, client: Client, desk: Running) -> None:
    """What is wrong with one answer, or one pair, costs just that, and is told in the exchange's own words."""
    stand_ins.heal()
    await until(client.uses, set(stand_ins))
    books = {each: (f"{mid - HALF_SPREAD}", f"{mid + HALF_SPREAD}") for each, mid in MIDS.items()}
    warned = kraken_answer(books).replace(b'"error": []', b'"error": ["WGeneral:Delayed data"]')
    stand_ins["kraken"].garbage = warned
    stand_ins["coinbase"].headers = {
        "Date": format_datetime(datetime.now(UTC) - timedelta(minutes=20), usegmt=True),
        "X-Cache": "HIT",
    }
    stand_ins["bitfinex"].status, stand_ins["bitfinex"].garbage = 500, b'["error",10020,"symbol: invalid"]'
    stand_ins["gemini"].status, stand_ins["gemini"].garbage = 503, MAINTENANCE
    await until(client.uses, {"kraken", "bitstamp"})
    assert await client.sells()
    told = {
        "kraken": "a warning: WGeneral:Delayed data",
        "coinbase": "is older than 2 s",
        "bitfinex": "symbol: invalid",
        "gemini": "The exchange is undergoing maintenance",
    }
    for name, words in told.items():
        await until(client.says, name, words)
        assert words in await client.reports("warning")
        assert words in desk.printed
    stand_ins.heal()
    stand_ins["kraken"].delisted = frozenset({Currency.GBP})
    await until(client.says, "kraken", "GBP")
    await until(client.uses, set(stand_ins))
    used = {(each["source"], each["currency"]) for each in (await client.record())["sources"]["used"]}
    assert len(used) == 14
    assert ("kraken", "GBP") not in used


async def one_currency_stops_no_other(stand_ins: StandIns, client: Client) -> None:
    """Pounds are left to one exchange. Orders in pounds are refused, with the reason; the others go on."""
    stand_ins.heal()
    for name in set(stand_ins) - {"kraken"}:
        stand_ins[name].delisted = frozenset({Currency.GBP})
    await until(client.is_refused, "gbp")
    why = "only 1 of at least 2 sources agree"
    await client.assert_order_refused("price_unavailable", f"There is no price in GBP: {why}", "gbp", 2)
    for _ in range(4):  # for longer than any price lasts
        assert await client.sells_at(EUR)
        assert await client.sells_at(USD, "usd")
        await asyncio.sleep(1)
    for path in ("", "/GBP"):
        answer = await client.get("api_cache_proxy", f"/v1/bpi/currentprice{path}.json")
        assert (answer.status_code, answer.json()["code"]) == (503, "price_unavailable")
        assert why in answer.json()["detail"]
    assert (await client.get("api_cache_proxy", "/v1/bpi/currentprice/EUR.json")).status_code == 200
    record = await client.record()
    assert (record["missing"], record["rates"].keys()) == ({"GBP": why}, {"EUR", "USD"})
    assert "bpi" not in record
    assert "A price is missing or in doubt" in await client.reports("critical")
    stand_ins.heal()
    await until(client.sells_at, GBP, "gbp")


async def wide_books_are_no_evidence(stand_ins: StandIns, client: Client) -> None:
    """Two books whose bids are 8.9 % too low are no evidence, whatever a third says."""
    await stand_ins["bitfinex"].stop()
    await stand_ins["gemini"].stop()
    for name in ("kraken", "bitstamp"):
        stand_ins[name].bid_factor = Decimal("0.911")
        stand_ins[name].half_spread = EUR / 1000
    await until(client.is_refused)
    await client.assert_order_refused("price_stale", "", seconds_max=2)
    assert await client.says("kraken", "has an ask more than 1 % above its bid")
    assert "only 1 of at least 2 sources agree" in (await client.part("sources"))["problem"]
    await stand_ins["gemini"].start()
    await until(client.sells_at, EUR)  # that of the two tight ones
    assert await client.uses({"coinbase", "gemini"})
    await stand_ins["bitfinex"].start()
    stand_ins.heal()
    await until(client.uses, set(stand_ins))


async def frozen_majority_is_not_sold_at(stand_ins: StandIns, client: Client) -> None:
    """The three without clocks repeat an answer; the two with clocks have moved, and not together."""
    for name in CLOCKLESS:
        stand_ins[name].repeats = True
    stand_ins["coinbase"].factor, stand_ins["bitstamp"].factor = Decimal("1.127"), Decimal("1.236")
    await until(client.is_refused)
    # At once, not when the last price ends that nobody contradicted.
    contradicted = "is contradicted by bitstamp, coinbase, which prove their time"
    await client.assert_order_refused("price_unsettled", contradicted, seconds_max=2)
    assert contradicted in (await client.part("sources"))["problem"]
    for name in CLOCKLESS:
        while not await client.says(name, "has given the same answer for"):
            await client.assert_refused_for(0.1)
    await client.assert_refused_for(2)
    stand_ins["bitstamp"].factor = stand_ins["coinbase"].factor  # the two that are alive agree: that is the price
    await until(client.sells_at, EUR * Decimal("1.127"))
    assert await client.uses({"bitstamp", "coinbase"})
    stand_ins.heal()
    await until(client.sells_at, EUR)
    await until(client.uses, set(stand_ins))


async def two_frozen_are_not_sold_on_against_two_alive(stand_ins: StandIns, client: Client) -> None:
    """Two that repeat an answer, and two with clocks that have moved: no majority, and the last price ends at once."""
    await stand_ins["gemini"].stop()
    await until(client.uses, set(stand_ins) - {"gemini"})
    for name in ("kraken", "bitfinex"):
        stand_ins[name].repeats = True
    await asyncio.sleep(2.5)  # until they do not prove their time any more
    for name in ("coinbase", "bitstamp"):
        stand_ins[name].factor = Decimal("1.127")
    await until(client.is_refused)
    why = "only 2 of 4 sources agree, which is no majority, and bitstamp, coinbase contradict the last price"
    await client.assert_order_refused("price_unsettled", why, seconds_max=2)
    await stand_ins["gemini"].start()
    stand_ins.heal()
    await until(client.sells_at, EUR)
    await until(client.uses, set(stand_ins))


async def two_frozen_and_one_alive_make_no_price(stand_ins: StandIns, client: Client) -> None:
    """And two of them, with one that is alive."""
    await stand_ins["gemini"].stop()
    await stand_ins["bitstamp"].stop()
    for name in ("kraken", "bitfinex"):
        stand_ins[name].repeats = True
    stand_ins["coinbase"].factor = Decimal("1.127")
    await until(client.is_refused)
    assert "contradicted by coinbase" in (await client.part("sources"))["problem"]
    while not await client.says("kraken", "has given the same answer for"):
        await client.assert_refused_for(0.1)
    await client.assert_refused_for(1)
    stand_ins.heal()
    await until(client.sells_at, EUR)
    for name in ("gemini", "bitstamp"):
        await stand_ins[name].start()
    await until(client.uses, set(stand_ins))


async def minority_makes_no_price(stand_ins: StandIns, client: Client) -> None:
    """90, 95, 100, 100.5 and 110: two of five are no majority."""
    for name, factor in zip(stand_ins, ("0.9", "0.95", "1", "1.005", "1.1"), strict=True):
        stand_ins[name].factor = Decimal(factor)
    await until(client.is_refused)
    # At once: most of them contradict the last price.
    no_majority = "only 2 of 5 sources agree, which is no majority, and bitfinex, bitstamp, kraken contradict"
    await client.assert_order_refused("price_unsettled", no_majority, seconds_max=2)
    assert no_majority in (await client.part("sources"))["problem"]
    await client.assert_refused_for(1)
    stand_ins.heal()
    await until(client.sells_at, EUR)


async def own_clock_that_is_off_is_named(stand_ins: StandIns, client: Client) -> None:
    """All clocks but ours agree: it is ours that is named."""
    for each in stand_ins.values():
        each.ahead = timedelta(minutes=20)
    await until(client.says, "coinbase", "ahead of ours, which is off: The clock of ")


@pytest.mark.timeout(400)
async def test_frozen_edgy_wide_and_lonely_sources_make_no_wrong_price_and_stop_no_more_than_they_must(
    data_dir: Path, http: httpx2.AsyncClient
) -> None:
    async with (
        exchanges(moving=True) as stand_ins,
        desk_up(data_dir, "--feed", "live", env=stand_ins.env | ALIVE) as desk,
    ):
        client = Client(desk, http)
        await until(client.uses, set(stand_ins))
        await one_book_at_the_edge_stops_nothing(stand_ins, client)
        await faults_cost_what_they_spoil_and_are_told(stand_ins, client, desk)
        await one_currency_stops_no_other(stand_ins, client)
        await wide_books_are_no_evidence(stand_ins, client)
        await frozen_majority_is_not_sold_at(stand_ins, client)
        await two_frozen_are_not_sold_on_against_two_alive(stand_ins, client)
        await two_frozen_and_one_alive_make_no_price(stand_ins, client)
        await minority_makes_no_price(stand_ins, client)
        await own_clock_that_is_off_is_named(stand_ins, client)
        assert await client.prove_all() > 20
    assert "Traceback" not in desk.printed


async def test_restart_makes_no_frozen_majority_alive(data_dir: Path, http: httpx2.AsyncClient) -> None:
    """The first answer after a start is no change: it proves no time."""
    async with exchanges(moving=True) as stand_ins:
        env = stand_ins.env | ALIVE
        async with desk_up(data_dir, "--feed", "live", env=env) as desk:
            client = Client(desk, http)
            await until(client.uses, set(stand_ins))
            for name in CLOCKLESS:
                stand_ins[name].repeats = True
            stand_ins["coinbase"].factor, stand_ins["bitstamp"].factor = Decimal("1.127"), Decimal("1.236")
            await until(client.is_refused)
            assert await desk.stop() == 0
        async with desk_up(data_dir, "--feed", "live", env=env) as desk:
            client = Client(desk, http)
            await client.assert_order_refused("price_unsettled", "is contradicted by bitstamp, coinbase", seconds_max=3)
            await client.assert_refused_for(4)
            stand_ins.heal()
            await until(client.sells_at, EUR)


# As slow as a client needs to look at what is between two ticks.
SLOW = QUICK | {
    "BUYDESK_FEED_INTERVAL_SECONDS": "2",
    "BUYDESK_QUOTE_AGE_SECONDS_MAX": "5",
    "BUYDESK_PRICE_TTL_SECONDS": "10",
}
NOT_TWICE = "was not seen twice yet"
NOT_CONFIRMED = "until an operator confirms it"


async def jump_is_sold_at_once_it_was_seen_twice(stand_ins: StandIns, client: Client) -> None:
    """Euros jump: nothing is sold in euros until that is seen twice, and then at the new price.

    What an exchange says of an older trade of its own does not let the old price go on.
    """
    stand_ins["coinbase"].frozen_at = datetime.now(UTC) - timedelta(seconds=3)
    stand_ins.mids[Currency.EUR] = EUR * Decimal("1.08")
    await until(client.is_refused)
    wait_seconds = await client.assert_order_refused("price_unsettled", NOT_TWICE, seconds_max=3)
    answer = await client.buy()
    assert answer.json()["currencies"].keys() == {"EUR"}
    assert await client.sells_at(GBP, "gbp")
    assert await client.sells_at(USD, "usd")
    record = await client.record()
    assert (record["unsettled"].keys(), record["rates"].keys()) == ({"EUR"}, {"GBP", "USD"})
    await asyncio.sleep(wait_seconds)  # as it was told
    assert await client.sells_at(EUR * Decimal("1.08"))
    # One that is gone at the next tick was none.
    stand_ins["coinbase"].frozen_at = None
    stand_ins.mids[Currency.EUR] = EUR
    await until(client.is_refused)
    stand_ins.mids[Currency.EUR] = EUR * Decimal("1.08")
    await until(client.sells)
    assert await client.sells_at(EUR * Decimal("1.08"))
    stand_ins.mids[Currency.EUR] = EUR
    await until(client.sells_at, EUR)


async def crash_of_all_is_not_sold_at(stand_ins: StandIns, client: Client) -> None:
    """Everything falls to a dollar, at all exchanges at once."""
    for each in stand_ins.values():
        each.mids, each.half_spread = ONE, Decimal("0.005")
    await until(client.is_refused)
    await client.assert_refused_for(5)  # however often it is seen
    await client.assert_refused("price_unsettled")
    for currency in ("eur", "gbp", "usd"):
        await client.assert_order_refused("price_unsettled", NOT_CONFIRMED, currency, 3)
    assert NOT_CONFIRMED in await client.reports("critical")
    for each in stand_ins.values():  # it comes back
        each.mids, each.half_spread = stand_ins.mids, HALF_SPREAD
    await until(client.sells_at, EUR)


@pytest.mark.timeout(400)
async def test_a_doubted_price_is_not_sold_at_until_it_is_seen_twice_or_confirmed_and_no_restart_forgets_that(
    data_dir: Path, http: httpx2.AsyncClient
) -> None:
    up_live = (data_dir, "--feed", "live")
    async with exchanges(moving=True) as stand_ins:
        env = stand_ins.env | SLOW
        async with desk_up(*up_live, env=env) as desk:
            client = Client(desk, http)
            assert "There are no last prices" in desk.printed
            assert await client.sells_at(EUR)

            await jump_is_sold_at_once_it_was_seen_twice(stand_ins, client)
            await crash_of_all_is_not_sold_at(stand_ins, client)

            # 3: a jump that is held back when the desk is stopped…
            for each in stand_ins.values():
                each.factor = Decimal("1.1")
            await until(client.is_refused)
            assert await desk.stop() == 0
        async with desk_up(*up_live, env=env) as desk:
            client = Client(desk, http)
            # …is held back when it is started again.
            assert re.search(rf"No orders are taken: there is no price \(.*{NOT_TWICE}\)", desk.printed)
            await until(client.sells_at, EUR * Decimal("1.1"))
            stand_ins.heal()
            await until(client.sells_at, EUR)

            # 9: two exchanges give the dollar's number in all currencies, and the others are away.
            for name in ("kraken", "bitstamp"):
                stand_ins[name].mids = dict.fromkeys(MIDS, USD)
            await until(client.says, "kraken", "EUR, GBP: is more than 1 % from those that agree")
            for name in ("bitfinex", "coinbase", "gemini"):
                await stand_ins[name].stop()
            await until(client.is_refused)
            for currency in ("eur", "gbp"):
                await client.assert_order_refused("price_unsettled", NOT_CONFIRMED, currency, 3)
                await client.assert_refused_for(2.5, currency)
            assert await desk.stop() == 0
        async with desk_up(*up_live, env=env) as desk:
            client = Client(desk, http)
            for currency in ("eur", "gbp"):  # the first orders after a start
                await client.assert_order_refused("price_unsettled", NOT_CONFIRMED, currency, 3)
            for name in ("bitfinex", "coinbase", "gemini"):
                await stand_ins[name].start()
            for each in stand_ins.values():
                each.mids = stand_ins.mids
            await until(client.sells_at, GBP, "gbp")
            for each in stand_ins.values():
                each.mids, each.half_spread = ONE, Decimal("0.005")
            await until(client.is_refused)
            assert await desk.stop() == 0
        async with desk_up(*up_live, env=env) as desk:
            client = Client(desk, http)
            # 2: nor is anything sold for a dollar with the first order after a start, until an operator confirms it.
            await client.assert_order_refused("price_unsettled", NOT_CONFIRMED, "eur", 3)
            confirm = ("price", "confirm", "EUR", "--from", "1", "--to", "1.02", "--why", "It is in the papers.")
            of_desk = ("--feed", "live", "--data-dir", str(data_dir), "--port-offset", str(desk.offset))
            async with buydesk(*confirm, *of_desk) as confirming:
                assert await confirming.process.wait() == 0, confirming.printed
            await until(client.sells)
            await client.assert_order_refused("price_unsettled", NOT_CONFIRMED, "gbp", 3)
            assert await client.prove_all() > 10
    assert "Traceback" not in desk.printed


@pytest.mark.timeout(400)
async def test_a_price_is_back_two_ticks_after_two_exchanges_are_and_their_retry_after_is_kept_to(
    data_dir: Path, http: httpx2.AsyncClient
) -> None:
    # With the breakers as they are in real life: 20 s, 40 s, …
    seconds = 1
    times = {"BUYDESK_FEED_INTERVAL_SECONDS": f"{seconds}"}
    env = {name: value for name, value in QUICK.items() if "COOLDOWN" not in name} | times
    async with (
        exchanges(moving=True) as stand_ins,
        desk_up(data_dir, "--feed", "live", env=stand_ins.env | env) as desk,
    ):
        client = Client(desk, http)

        # 8: an exchange that wants to be left alone is, for as long as it said.
        kraken = stand_ins["kraken"]
        kraken.status, kraken.headers = 429, {"Retry-After": "5"}
        await until(client.says, "kraken", "status 429")
        asked = kraken.asked
        await asyncio.sleep(3)
        assert kraken.asked == asked
        assert await client.sells()
        stand_ins.heal()
        await until(client.uses, set(stand_ins))
        await until(client.is_well, "kraken")  # which is stored after the price
        # But not for ever.
        kraken.status, kraken.headers = 429, {"Retry-After": "1000000"}
        await until(client.says, "kraken", "status 429")
        resting_until = parse_time((await client.source("kraken"))["resting_until"])
        assert resting_until <= datetime.now(UTC) + timedelta(seconds=240)

        # All are away for a while.
        for each in stand_ins.values():
            await each.stop()
        await until(client.is_refused)
        while (await client.source("gemini"))["failures"] <= 3:
            await asyncio.sleep(0.1)
        await client.assert_order_refused("price_stale", "", seconds_max=seconds + 1)
        # Two are back.
        stand_ins.heal()
        await stand_ins["gemini"].start()
        await stand_ins["bitstamp"].start()
        back_at = time.monotonic()
        await until(client.sells)
        assert time.monotonic() - back_at <= 2 * seconds + 0.5
        assert await client.uses({"bitstamp", "gemini"})
    assert "Traceback" not in desk.printed


async def test_limits_that_prove_nothing_are_refused_at_the_start_unless_they_are_meant(
    data_dir: Path, http: httpx2.AsyncClient
) -> None:
    limits = [f"BUYDESK_PRICE_{name}_BP_MAX" for name in ("DEVIATION", "JUMP", "SPREAD")]
    wide = dict.fromkeys(limits, "10000")
    async with buydesk("up", "--data-dir", str(data_dir), env=wide) as refused:
        assert await refused.process.wait() == 2
    for name in limits:
        assert f"{name} (10000) must be at most" in refused.printed
    assert "BUYDESK_PRICE_LIMITS_WIDE" in refused.printed
    async with desk_up(data_dir, env=QUICK | wide | {"BUYDESK_PRICE_LIMITS_WIDE": "true"}) as desk:
        assert await Client(desk, http).sells()
