"""The price guard: each sentence by example, both sides of each limit; and what it asks of the ledger."""

import asyncio
import logging
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

import pytest
from msgspec.structs import replace

from buydesk.errors import InvalidRequest, LedgerUnavailable, PriceUnavailable
from buydesk.money import Currency
from buydesk.prices.anchors import Anchor, Confirmation, NewConfirmation, anchors_of, require_confirmable
from buydesk.prices.guard import PriceGuard, Sightings, change_limits, unsettled_reasons
from buydesk.prices.model import Quote
from buydesk.prices.rule import Verdict, decide, rule_of
from tests.builders import record, settings, without
from tests.model_anchors import ModelAnchors

NOW = datetime(2026, 1, 31, 9, 5, tzinfo=UTC)
TICK = timedelta(microseconds=1)
EUR, GBP, USD = Currency
LAST = {EUR: 100_000, GBP: 90_000, USD: 110_000}
LIMITS = change_limits(settings())
SOON = NOW + timedelta(minutes=5)


def anchors(age: timedelta = timedelta(seconds=15)) -> dict[Currency, Anchor]:
    return of_one_time(LAST, NOW - age)


def of_one_time(rates_e8: Mapping[Currency, int], moment: datetime) -> dict[Currency, Anchor]:
    """The anchors of a record that has all prices."""
    return {currency: Anchor(rate_e8, moment, rates_e8[USD]) for currency, rate_e8 in rates_e8.items()}


def by(factor: float) -> dict[Currency, int]:
    """All currencies moved together."""
    return {currency: round(rate_e8 * factor) for currency, rate_e8 in LAST.items()}


def unsettled(
    rates_e8: dict[Currency, int],
    before_e8: dict[Currency, int] | None = None,
    *confirmed: Confirmation,
    age: timedelta = timedelta(seconds=15),
) -> dict[Currency, str]:
    return unsettled_reasons(rates_e8, anchors(age), before_e8 or {}, confirmed, now=NOW, limits=LIMITS)


ONCE = "is more than 5 % from the last price, {}, and was not seen twice yet"
FAR = "is more than 20 % from the last price, {} of 2026-01-31T09:04:45.000000Z, until an operator confirms it"
WRITTEN = {EUR: "0.001", GBP: "0.0009", USD: "0.0011"}


@pytest.mark.parametrize("factor", [1.05, 0.95, 1.0])
def test_price_near_the_last_one_is_sold_at(factor: float) -> None:
    assert unsettled(by(factor)) == {}


@pytest.mark.parametrize(
    ("factor", "before", "is_settled"),
    [
        (1.0501, None, False),
        (0.9499, None, False),
        (1.1, 1.1, True),
        (1.1, 1.048, True),  # within 5 % of what was seen before
        (1.1, 1.047, False),
        (1.1, 1.0, False),
    ],
)
def test_jump_is_sold_at_once_the_tick_before_saw_the_same(
    factor: float, before: float | None, is_settled: bool
) -> None:
    reasons = unsettled(by(factor), None if before is None else by(before))
    assert reasons == ({} if is_settled else {each: ONCE.format(WRITTEN[each]) for each in Currency})


def test_each_currency_is_judged_by_itself() -> None:
    assert unsettled(LAST | {GBP: 96_000}) == {GBP: ONCE.format("0.0009")}


@pytest.mark.parametrize(
    ("factor", "age", "is_settled"),
    [
        (1.2, timedelta(days=1), True),
        (1.2001, timedelta(seconds=15), False),
        (0.7999, timedelta(seconds=15), False),
        (0.00001, timedelta(seconds=15), False),
        (1.4, timedelta(days=1) + TICK, True),
        (1.4001, timedelta(days=900), False),
        (1.3, timedelta(days=1), False),
    ],
)
def test_price_beyond_the_anchor_is_never_believed_however_often_it_is_seen(
    factor: float, age: timedelta, is_settled: bool
) -> None:
    reasons = unsettled(by(factor), by(factor), age=age)
    assert bool(reasons) is not is_settled
    assert all(reason.endswith("until an operator confirms it") for reason in reasons.values())
    if age == timedelta(seconds=15):
        assert reasons == {each: FAR.format(WRITTEN[each]) for each in Currency}


def confirmation(currency: Currency, low_e8: int, high_e8: int) -> Confirmation:
    return Confirmation(currency, low_e8, high_e8, "the news", SOON)


@pytest.mark.parametrize(("low_e8", "high_e8"), [(200_000, 200_000), (1, 10**18)])
def test_confirmed_price_is_sold_at_at_once(low_e8: int, high_e8: int) -> None:
    rates_e8 = LAST | {EUR: 200_000}
    assert EUR not in unsettled(rates_e8, None, confirmation(EUR, low_e8, high_e8))


def test_range_that_is_confirmed_is_no_wider_than_half_its_lower_end() -> None:
    """It cannot be taken back, and within it nothing else is asked."""
    require_confirmable(NewConfirmation(EUR, 10**12, 15 * 10**11, "the news", 15))
    with pytest.raises(InvalidRequest, match="to: must be at most half as much again as from"):
        require_confirmable(NewConfirmation(EUR, 10**12, 15 * 10**11 + 1, "the news", 15))


@pytest.mark.parametrize(
    "other", [confirmation(EUR, 200_001, 10**18), confirmation(EUR, 1, 199_999), confirmation(GBP, 1, 10**18)]
)
def test_confirmation_is_of_one_currency_within_its_range(other: Confirmation) -> None:
    assert EUR in unsettled(LAST | {EUR: 200_000}, None, other)


CROSSED = "has moved more than 10 % against USD, until an operator confirms it"


def test_currency_that_moves_against_all_others_is_unsettled() -> None:
    rates_e8 = by(1.04) | {GBP: round(90_000 * 0.93)}
    assert unsettled(rates_e8, rates_e8) == {GBP: CROSSED}
    assert unsettled(rates_e8, rates_e8, confirmation(GBP, 1, 10**18)) == {}


def test_currencies_that_all_show_the_dollars_number_are_not_sold_for() -> None:
    before = of_one_time({EUR: 86_000, GBP: 84_000, USD: 100_000}, NOW)
    rates_e8 = dict.fromkeys(Currency, 100_000)
    reasons = unsettled_reasons(rates_e8, before, rates_e8, (), now=NOW, limits=LIMITS)
    assert reasons == {
        EUR: CROSSED,
        GBP: CROSSED,
        USD: "has moved more than 10 % against EUR and GBP, until an operator confirms it",
    }


def test_euro_that_moves_by_itself_stops_neither_pound_nor_dollar() -> None:
    rates_e8 = LAST | {EUR: 88_000}
    assert unsettled(rates_e8, rates_e8) == {EUR: CROSSED}


def test_confirmation_of_one_currency_says_nothing_of_another() -> None:
    rates_e8 = LAST | {EUR: 85_000}
    assert unsettled(rates_e8, rates_e8, confirmation(GBP, 1, 10**18)) == {EUR: CROSSED}


@pytest.mark.parametrize("away", Currency)
@pytest.mark.parametrize("factor", [1.15, 0.85])
def test_currencies_that_were_published_at_other_times_are_not_compared(away: Currency, factor: float) -> None:
    """One that was away, or not confirmed, while the bitcoin moved must stop neither itself nor the others when it is
    back: it is the exchange rates that are compared, and they are as they were."""
    before = anchors(timedelta(minutes=30))[away]
    old = of_one_time(by(factor), NOW - timedelta(seconds=15)) | {away: before}
    assert unsettled_reasons(by(factor), old, by(factor), (), now=NOW, limits=LIMITS) == {}


@pytest.mark.parametrize(
    ("rate_e8", "is_settled"), [(99_000, True), (99_001, False), (81_000, True), (80_999, False), (105_000, False)]
)
def test_currency_that_comes_back_at_another_exchange_rate_is_unsettled_however_long_it_was_away(
    rate_e8: int, is_settled: bool
) -> None:
    for away in (timedelta(seconds=15), timedelta(minutes=2), timedelta(days=2)):
        old = anchors() | {GBP: anchors(away)[GBP]}
        rates_e8 = LAST | {GBP: rate_e8}
        reasons = unsettled_reasons(rates_e8, old, rates_e8, (), now=NOW, limits=LIMITS)
        assert reasons == ({} if is_settled else {GBP: CROSSED})
        assert unsettled_reasons(rates_e8, old, rates_e8, [confirmation(GBP, 1, 10**18)], now=NOW, limits=LIMITS) == {}


def test_anchor_without_the_dollars_of_its_time_is_compared_with_none() -> None:
    rates_e8 = LAST | {EUR: 85_000}
    for unknown in Currency:
        old = anchors() | {unknown: Anchor(LAST[unknown], NOW)}
        reasons = unsettled_reasons(rates_e8, old, rates_e8, (), now=NOW, limits=LIMITS)
        # The two that are left are compared, and of two nobody can say which one has moved.
        assert set(reasons) == (set() if unknown == EUR else set(Currency) - {unknown})


def test_anchors_of_a_record_have_the_price_in_dollars_of_their_time() -> None:
    published = record(20_000 * 10**8, USD=22_000 * 10**8)
    assert anchors_of(published, anchors()) == of_one_time(published.rates_e8, published.made_at)


def test_anchors_of_a_record_without_a_price_in_dollars_carry_the_exchange_rate_of_before() -> None:
    """Also where that price is only in doubt; and where nobody knew an exchange rate, nobody does now."""
    published = record(20_000 * 10**8, GBP=18_000 * 10**8)
    for partial in (without(published, missing=[USD]), without(published, unsettled=[USD])):
        assert anchors_of(partial, anchors()) == {
            EUR: Anchor(20_000 * 10**8, published.made_at, 22_000 * 10**8),
            GBP: Anchor(18_000 * 10**8, published.made_at, 22_000 * 10**8),
        }
        unknown = {EUR: Anchor(LAST[EUR], NOW)}
        assert {each.dollar_e8 for each in anchors_of(partial, unknown).values()} == {None}


def test_anchor_is_as_new_as_its_record_not_as_its_oldest_quote() -> None:
    published = replace(record(age=20), decided_at=NOW)
    assert {each.as_of for each in anchors_of(published, {}).values()} == {NOW}


def test_of_two_currencies_that_move_against_each_other_neither_is_sold_for() -> None:
    rates_e8 = {EUR: 100_000, USD: 97_000}
    assert set(unsettled(rates_e8, rates_e8)) == {EUR, USD}
    assert unsettled(rates_e8, rates_e8, confirmation(USD, 1, 10**18)) == {}


def test_currency_by_itself_is_compared_with_no_other() -> None:
    assert unsettled({USD: 97_000}, {USD: 97_000}) == {}


def test_where_nothing_was_published_nothing_can_be_compared() -> None:
    assert unsettled_reasons(by(7), {}, {}, (), now=NOW, limits=LIMITS) == {}


def test_limits_are_those_of_the_settings() -> None:
    wide = change_limits(settings(price_jump_bp_max=1000, price_anchor_bp_max=3000))
    assert unsettled_reasons(by(1.1), anchors(), {}, (), now=NOW, limits=wide) == {}
    assert unsettled_reasons(by(1.3), anchors(), by(1.3), (), now=NOW, limits=wide) == {}


def seen(rates_e8: Mapping[Currency, int], at: datetime = NOW) -> Verdict:
    """The verdict on two sources that both say so."""
    verdict = Verdict()
    for currency, rate_e8 in rates_e8.items():
        verdict.price(currency, [Quote(source, currency, rate_e8, rate_e8, at) for source in ("one", "two")])
    return verdict


def pounds(*books: tuple[str, int, float]) -> Verdict:
    """The verdict on books of clockless sources: what they cost, and when they moved last, in seconds after NOW."""
    quotes = [Quote(source, GBP, mid, mid, NOW, NOW + timedelta(seconds=changed)) for source, mid, changed in books]
    verdict = Verdict()
    verdict.price(GBP, quotes)
    return verdict


def sightings() -> Sightings:
    return Sightings(500, 2, timedelta(seconds=60))


def test_slow_books_that_move_in_turn_are_a_second_sighting_once_two_of_them_have_moved() -> None:
    """Each moves every 45 s, one of the three at each tick."""
    seen_by, price = sightings(), 108_000
    ticks = [(0, -15, -30), (0, 15, -30), (0, 15, 30), (45, 15, 30)]
    found = []
    for number, (one, two, three) in enumerate(ticks):
        verdict = pounds(("one", price, one), ("two", price, two), ("three", price, three))
        found.append(seen_by.take(verdict, NOW + timedelta(seconds=15 * number)))
    assert found == [{}, {}, {GBP: price}, {}], "and from then on it is counted anew"


def test_book_that_moves_without_a_trade_says_something_else() -> None:
    """The time of a source with a clock may be that of its last trade."""
    seen_by = sightings()
    first, second = seen({GBP: 108_000}), seen({GBP: 108_100})
    assert seen_by.take(first, NOW) == {}
    assert seen_by.take(second, NOW + timedelta(seconds=15)) == {GBP: 108_000}


@pytest.mark.parametrize(("seconds", "is_second"), [(60, True), (60.1, False)])
def test_sighting_is_remembered_for_a_minute(seconds: float, is_second: bool) -> None:
    seen_by, later = sightings(), NOW + timedelta(seconds=seconds)
    seen_by.take(seen({GBP: 108_000}), NOW)
    assert seen_by.take(seen({GBP: 108_000}, later), later) == ({GBP: 108_000} if is_second else {})


MISSING = "only 2 of 4 sources agree, which is no majority"
NO_QUOTES = "only 0 of at least 2 sources agree"


def euros_of(**middles: tuple[int, float | None]) -> Verdict:
    """The rule on books of euros: what they cost, and how many seconds ago they moved; None with a clock."""
    return decide(
        [
            Quote(source, EUR, mid, mid, NOW, None if age is None else NOW - timedelta(seconds=age))
            for source, (mid, age) in middles.items()
        ],
        NOW,
        rule_of(settings()),
        [EUR],
    )


class Ledger(ModelAnchors):
    """May be away, or say nothing."""

    is_away = hangs = False
    asked = 0

    def _require_there(self) -> None:
        if self.is_away:
            raise LedgerUnavailable("It is away.")

    async def anchors(self) -> dict[Currency, Anchor]:
        self.asked += 1
        self._require_there()
        return dict(await super().anchors())

    async def keep_anchors(self, anchors) -> None:  # type: ignore[no-untyped-def]
        self._require_there()
        await super().keep_anchors(anchors)

    async def confirmations(self):  # type: ignore[no-untyped-def]
        if self.hangs:
            await asyncio.Event().wait()
        self._require_there()
        return await super().confirmations()


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


@pytest.fixture
def guard(ledger: Ledger) -> PriceGuard:
    return PriceGuard(ledger, settings(), logging.getLogger("guard"))


async def test_first_prices_of_all_are_believed_and_said_to_be(
    guard: PriceGuard, ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for _ in range(2):
        await guard.load()
    assert caplog.messages == ["There are no last prices in EUR, GBP, USD: the first ones are believed."]
    assert await guard.unsettled(seen(by(1)), NOW) == {}
    published = record()
    await guard.note_published(published)
    assert {each: anchor.rate_e8 for each, anchor in (await ledger.anchors()).items()} == published.rates_e8


async def test_what_was_published_is_remembered_by_the_next_guard(ledger: Ledger) -> None:
    await ledger.keep_anchors(anchors())
    restarted = PriceGuard(ledger, settings(), logging.getLogger("guard"))
    await restarted.load()
    assert set(await restarted.unsettled(seen(by(1.1)), NOW)) == set(Currency)
    assert await restarted.unsettled(seen(by(1.1), NOW + TICK), NOW) == {}  # seen twice


async def test_ledger_that_is_away_at_the_start_is_asked_again(guard: PriceGuard, ledger: Ledger) -> None:
    await ledger.keep_anchors(anchors())
    ledger.is_away = True
    with pytest.raises(LedgerUnavailable):
        await guard.load()
    ledger.is_away = False
    await guard.load()
    assert set(await guard.unsettled(seen(by(1.1)), NOW)) == set(Currency)


async def test_ledger_that_is_away_later_delays_nothing_and_confirms_nothing(
    guard: PriceGuard, ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    await ledger.keep_anchors(anchors())
    await guard.load()
    ledger.is_away = True
    published = record(by(1)[EUR] * 10**6)
    await guard.note_published(published)
    near = dict.fromkeys(Currency, published.rates_e8[EUR])
    assert await guard.unsettled(seen(near), NOW) == {}
    far = dict.fromkeys(Currency, 2 * published.rates_e8[EUR])
    assert set(await guard.unsettled(seen(far), NOW)) == set(Currency)
    assert "Nobody can say whether the prices are confirmed: It is away." in caplog.text


async def test_ledger_that_hangs_delays_a_doubt_no_longer_than_allowed(
    guard: PriceGuard, ledger: Ledger, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("buydesk.prices.guard.ASK_SECONDS_MAX", 0.05)
    await ledger.keep_anchors(anchors())
    await guard.load()
    ledger.hangs = True
    async with asyncio.timeout(1):
        assert set(await guard.unsettled(seen(by(1.1)), NOW)) == set(Currency)
    assert "Nobody can say whether the prices are confirmed: No answer within 0.05 s." in caplog.text


async def test_first_price_of_a_currency_that_is_new_is_believed_and_said_to_be(
    guard: PriceGuard, ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    await ledger.keep_anchors({each: anchor for each, anchor in anchors().items() if each != GBP})
    await guard.load()
    assert caplog.messages == ["There are no last prices in GBP: the first ones are believed."]
    assert await guard.unsettled(seen(LAST | {GBP: 7}), NOW) == {}


async def test_what_another_updater_published_meanwhile_is_what_counts(guard: PriceGuard, ledger: Ledger) -> None:
    await ledger.keep_anchors(anchors())
    await guard.load()
    await ledger.keep_anchors({each: Anchor(rate_e8, NOW) for each, rate_e8 in by(1.3).items()})
    assert await guard.unsettled(seen(by(1.31)), NOW) == {}
    assert set(await guard.unsettled(seen(by(1.0)), NOW)) == set(Currency)


TICK_AND_A_HALF = timedelta(seconds=22.5)


async def test_guard_that_was_cut_off_judges_by_what_another_updater_published(
    guard: PriceGuard, ledger: Ledger
) -> None:
    await ledger.keep_anchors(anchors(timedelta(minutes=5)))
    await guard.load()
    await ledger.keep_anchors(of_one_time(by(1.56), NOW - timedelta(seconds=15)))
    assert set(await guard.unsettled(seen(by(1.0)), NOW)) == set(Currency), "it is 36 % less than what was published"
    assert await guard.unsettled(seen(by(1.55)), NOW) == {}


@pytest.mark.parametrize(("age", "asked"), [(TICK_AND_A_HALF, 0), (TICK_AND_A_HALF + TICK, 1)])
async def test_ledger_is_asked_only_where_a_tick_was_left_out(
    guard: PriceGuard, ledger: Ledger, age: timedelta, asked: int
) -> None:
    """In one currency of those that have a price is enough; one without is judged when it has one."""
    await ledger.keep_anchors(anchors() | {GBP: anchors(age)[GBP], USD: anchors(timedelta(days=1))[USD]})
    await guard.load()
    assert await guard.unsettled(seen({EUR: LAST[EUR], GBP: LAST[GBP]}), NOW) == {}
    assert ledger.asked - 1 == asked


async def test_tick_is_as_long_as_its_setting_says(ledger: Ledger) -> None:
    slow = PriceGuard(ledger, settings(feed_interval_seconds=30), logging.getLogger("guard"))
    await ledger.keep_anchors(anchors(TICK_AND_A_HALF * 2))
    await slow.load()
    assert await slow.unsettled(seen(by(1)), NOW) == {}
    assert ledger.asked == 1


@pytest.mark.parametrize(("fault", "why"), [("is_away", "It is away."), ("hangs", "No answer within 0.05 s.")])
async def test_guard_that_was_cut_off_judges_nothing_without_the_ledger(
    guard: PriceGuard, ledger: Ledger, monkeypatch: pytest.MonkeyPatch, fault: str, why: str
) -> None:
    monkeypatch.setattr("buydesk.prices.guard.ASK_SECONDS_MAX", 0.05)
    await ledger.keep_anchors(anchors(timedelta(minutes=5)))
    await guard.load()
    setattr(ledger, fault, True)
    for factor in (1.0, 1.1):
        async with asyncio.timeout(1):
            with pytest.raises(PriceUnavailable) as refused:
                await guard.unsettled(seen(by(factor)), NOW)
        assert refused.value.detail == f"The last prices are not known: {why}"


async def test_currency_that_nobody_had_before_is_not_believed_without_the_ledger(
    guard: PriceGuard, ledger: Ledger
) -> None:
    await ledger.keep_anchors({EUR: anchors()[EUR]})
    await guard.load()
    ledger.is_away = True
    assert await guard.unsettled(seen({EUR: LAST[EUR]}), NOW) == {}
    with pytest.raises(PriceUnavailable):
        await guard.unsettled(seen(LAST), NOW)


async def test_price_is_sold_at_as_soon_as_it_is_confirmed(guard: PriceGuard, ledger: Ledger) -> None:
    await guard.load()
    await guard.note_published(record(10**12))
    far = {EUR: 2 * 10**12}
    for _ in range(3):
        assert set(await guard.unsettled(seen(far), NOW)) == {EUR}
    await ledger.confirm(NewConfirmation(EUR, 15 * 10**11, 2 * 10**12 - 1, "another range", 15))
    assert set(await guard.unsettled(seen(far), NOW)) == {EUR}
    await ledger.confirm(NewConfirmation(EUR, 2 * 10**12, 2 * 10**12, "this one", 15))
    assert await guard.unsettled(seen(far), NOW) == {}


LAST_EUROS = 10**12


@pytest.fixture
async def sold(guard: PriceGuard) -> PriceGuard:
    """The guard, when a price of the sandbox's first two sources was published."""
    await guard.note_published(replace(record(LAST_EUROS), as_of=NOW, decided_at=NOW))
    return guard


@pytest.mark.parametrize(
    ("frozen_e8", "clocks_e8", "against"),
    [
        (LAST_EUROS, (112 * 10**10, 112 * 10**10), "bitstamp, coinbase"),
        (LAST_EUROS, (112 * 10**10, 108 * 10**10), "bitstamp, coinbase"),
        (90 * 10**10, (LAST_EUROS, 101 * 10**10), ""),  # it is the others that are wrong
        (90 * 10**10, (LAST_EUROS, 102 * 10**10), ""),  # one of two that prove their time is not most of them
    ],
)
async def test_last_price_that_those_contradict_who_prove_their_time_is_withdrawn(
    sold: PriceGuard, frozen_e8: int, clocks_e8: tuple[int, int], against: str
) -> None:
    coinbase, bitstamp = clocks_e8
    frozen = {"kraken": (frozen_e8, 60.0), "bitfinex": (frozen_e8, 60.0)}
    verdict = euros_of(**frozen, coinbase=(coinbase, None), bitstamp=(bitstamp, None))
    assert verdict.missing == {EUR: MISSING}
    withdrawn = {EUR: f"{MISSING}, and {against} contradict the last price"} if against else {}
    assert sold.withdrawn(verdict, [], NOW) == withdrawn
    later = NOW + timedelta(seconds=60) + TICK
    assert sold.withdrawn(verdict, [], later) == {}, "it has ended"


async def test_last_price_of_sources_that_were_found_to_stand_still_is_withdrawn(sold: PriceGuard) -> None:
    verdict = euros_of()
    assert sold.withdrawn(verdict, [], NOW) == {}, "one that nobody contradicts is sold until its end"
    assert sold.withdrawn(verdict, ["sandbox-3"], NOW) == {}
    assert sold.withdrawn(verdict, ["sandbox-3", "sandbox-2", "sandbox-1"], NOW) == {
        EUR: f"{NO_QUOTES}, and sandbox-1, sandbox-2, of which the last price was made, stand still"
    }


async def test_currency_without_a_last_price_has_none_to_withdraw(guard: PriceGuard) -> None:
    assert guard.withdrawn(euros_of(coinbase=(10**12, None)), ["coinbase"], NOW) == {}
