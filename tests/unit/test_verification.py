"""Proof: what does not follow from the stored record is named; what does follow is proven."""

import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from buydesk.money import Currency
from buydesk.orders.model import ANONYMOUS, NewOrder, Order
from buydesk.orders.pricing import placed_order, price_order
from buydesk.prices.documents import record_document, record_from
from buydesk.prices.model import PriceRecord, Quote, RejectedQuote, Rule, UnsettledRate
from buydesk.prices.rule import decide, record_of
from buydesk.prices.verification import require_proven
from buydesk.reading import WrongMember
from tests.builders import settings, signed
from tests.proof import discrepancies

NOW = datetime(2026, 1, 31, 9, 5, tzinfo=UTC)
TICK = timedelta(microseconds=1)
RULE = Rule(quote_age_seconds_max=30, spread_bp_max=100, deviation_bp_max=100, sources_min=2)
EUR, GBP, USD = Currency
MIDS = {"kraken": 2_000_000_000_000, "gemini": 2_000_000_000_007, "bitstamp": 2_000_000_000_013, "coinbase": 10**12}
QUOTES = [
    Quote(name, currency, mid_e8 - 5, mid_e8 + 5, NOW - timedelta(seconds=number))
    for currency in Currency
    for number, (name, mid_e8) in enumerate(MIDS.items())
]


def decided(quotes: list[Quote]) -> PriceRecord:
    unanswered = [RejectedQuote("bitfinex", "gave no answer")]
    ttl = timedelta(seconds=60)
    verdict = decide(quotes, NOW, RULE)
    return record_of(verdict, unanswered, "live", unsettled={}, rule=RULE, decided_at=NOW, ttl=ttl)


RECORD = decided(QUOTES)
NEW = NewOrder(uuid.UUID(int=1), ANONYMOUS, None, EUR, 6900)
ORDER = placed_order(price_order(NEW, RECORD, NOW), 12, 12, NOW + timedelta(seconds=1), livemode=True)


def changed(**changes: Any) -> Order:
    return msgspec.structs.replace(ORDER, **changes)


def test_order_follows_from_the_record_it_was_priced_with() -> None:
    assert discrepancies(ORDER, RECORD) == []


def test_order_follows_from_the_record_as_it_is_stored() -> None:
    stored = record_from(msgspec.json.decode(msgspec.json.encode(record_document(RECORD))))
    assert discrepancies(ORDER, stored) == []


@pytest.mark.parametrize(
    ("changes", "doubt"),
    [
        ({"price_id": uuid.UUID(int=9)}, "was priced with record 00000000-0000-0000-0000-000000000009"),
        ({"livemode": False}, "an order with livemode False was priced with a live record"),
        (
            {"rate_e8": ORDER.rate_e8 + 1},
            "the rate is 20000.00000008, and the record's and 0 basis points are 20000.00000007",
        ),
        (
            {"market_rate_e8": ORDER.rate_e8 - 1},
            "the market's rate is 20000.00000006, and the record's is 20000.00000007",
        ),
        ({"satoshi": ORDER.satoshi - 1}, "the bitcoin amount is 0.00344999, and the record makes it 0.00345"),
        ({"satoshi": ORDER.satoshi + 1}, "the bitcoin amount is 0.00345001, and the record makes it 0.00345"),
        ({"amount_cents": 6901}, "the bitcoin amount is 0.00345000, and the record makes it 0.00345050"),
        ({"price_as_of": RECORD.as_of + TICK}, "the price is dated 2026-01-31T09:04:58.000001Z"),
        ({"created_at": RECORD.expires_at}, "and the price ended at 2026-01-31T09:05:58.000000Z"),
        ({"created_at": NOW - TICK}, "and the price came at 2026-01-31T09:05:00.000000Z"),
    ],
)
def test_what_of_the_order_does_not_follow_is_named(changes: dict[str, Any], doubt: str) -> None:
    [named] = discrepancies(changed(**changes), RECORD)
    assert doubt in named


def test_order_above_the_market_follows_from_the_record_and_its_markup() -> None:
    order = placed_order(price_order(NEW, RECORD, NOW, 75), 1, 1, NOW + timedelta(seconds=1), livemode=True)
    assert (order.market_rate_e8, order.markup_bp, order.rate_e8) == (2 * 10**12 + 7, 75, 2015 * 10**9 + 8)
    assert discrepancies(order, RECORD) == []
    [rate, amount] = discrepancies(replace(order, markup_bp=74), RECORD)
    assert "the record's and 74 basis points are 20148.00000008" in rate
    assert "and the record makes it" in amount


def test_order_below_the_market_is_never_proven() -> None:
    order = placed_order(price_order(NEW, RECORD, NOW, -1), 1, 1, NOW + timedelta(seconds=1), livemode=True)
    [named] = discrepancies(order, RECORD)
    assert "the record's and -1 basis points are" in named


def test_amount_is_rounded_up_to_a_satoshi() -> None:
    order = placed_order(price_order(NEW, replace(RECORD, rates_e8={EUR: 3 * 10**8}), NOW), 1, 1, NOW, livemode=True)
    assert order.satoshi == 2_300_000_000
    order = placed_order(
        price_order(msgspec.structs.replace(NEW, amount_cents=100), replace(RECORD, rates_e8={EUR: 3 * 10**8}), NOW),
        1,
        1,
        NOW,
        livemode=True,
    )
    assert order.satoshi == 33_333_334


@pytest.mark.parametrize("moment", [NOW, RECORD.expires_at - TICK])
def test_order_may_be_of_any_moment_from_the_price_to_its_end(moment: datetime) -> None:
    assert discrepancies(changed(created_at=moment), RECORD) == []


@pytest.mark.parametrize(
    ("behind", "is_proven"), [(timedelta(seconds=10), True), (timedelta(seconds=10) + TICK, False)]
)
def test_clock_of_the_ledger_may_be_behind_by_the_allowed_skew(behind: timedelta, is_proven: bool) -> None:
    order = changed(created_at=NOW - behind)
    assert (discrepancies(order, RECORD, timedelta(seconds=10)) == []) is is_proven


def with_quote(number: int, **changes: Any) -> Callable[[PriceRecord], PriceRecord]:
    def change(record: PriceRecord) -> PriceRecord:
        used = list(record.used)
        used[number] = replace(used[number], **changes)
        return replace(record, used=tuple(used))

    return change


def with_changes(**changes: Any) -> Callable[[PriceRecord], PriceRecord]:
    return lambda record: replace(record, **changes)


def with_rule(**changes: Any) -> Callable[[PriceRecord], PriceRecord]:
    return with_changes(rule=replace(RULE, **changes))


RATES = dict(RECORD.rates_e8)


@pytest.mark.parametrize(
    ("change", "doubt"),
    [
        (with_quote(1, bid_e8=MIDS["gemini"] - 7), "by the rule EUR 20000.00000006, GBP"),
        (with_quote(0, observed_at=NOW + TICK), "the rates are EUR 20000.00000007"),
        (
            with_changes(rates_e8=RATES | {USD: RATES[USD] + 1}),
            "and by the rule EUR 20000.00000007, GBP 20000.00000007, ",
        ),
        (
            with_changes(used=RECORD.used[:4]),
            "by the rule there is no price: GBP, USD: only 1 of at least 2 sources agree",
        ),
        (with_changes(used=()), "the record has no quotes"),
        (with_changes(used=RECORD.used * 2), "by the rule there is no price"),
        (with_changes(used=RECORD.used + RECORD.used[:1]), "by the rule other quotes are used"),
        (with_changes(rejected=()), ""),
        (
            with_changes(rejected=(*RECORD.rejected, RejectedQuote("new", "y", replace(QUOTES[0], source="new")))),
            "other quotes",
        ),
        (with_changes(decided_at=NOW + timedelta(seconds=28) + TICK), "the rates are EUR 20000.00000007"),
        (with_changes(decided_at=NOW + timedelta(seconds=28)), "and the price came at"),
        (with_changes(as_of=NOW - timedelta(seconds=1)), "which is not when its oldest quote was observed"),
        (with_changes(expires_at=RECORD.as_of), "the record is valid for 0 s"),
        (with_changes(expires_at=RECORD.as_of + timedelta(seconds=3600)), ""),
        (with_changes(expires_at=RECORD.as_of + timedelta(seconds=3600) + TICK), "the record is valid for 3600 s"),
        (with_rule(version=3), "version 3 of the pricing rule is not known"),
        (with_rule(sources_min=4), "only 3 of at least 4 sources agree"),
        (with_rule(quote_age_seconds_max=1), "by the rule other quotes are used"),
        (with_rule(deviation_bp_max=0), "by the rule there is no price"),
        (with_changes(rule=None), "the record tells no rule, and not when it was applied"),
        (with_changes(decided_at=None), "the record tells no rule, and not when it was applied"),
        (with_rule(sources_min=1), "1 source is enough, which proves nothing"),
        (with_changes(rates_e8={}), "the record has no rate for EUR"),
        (with_changes(rates_e8=RATES | {EUR: 0}), "the record has no rate for EUR"),
    ],
)
def test_what_of_the_record_does_not_follow_from_its_quotes_is_named(
    change: Callable[[PriceRecord], PriceRecord], doubt: str
) -> None:
    found = discrepancies(ORDER, change(RECORD))
    assert bool(found) is bool(doubt)
    assert doubt in "; ".join(found)


SETTINGS = settings(price_feed="live", price_ttl_seconds=60)


def test_proven_record_may_become_a_price() -> None:
    require_proven(signed(RECORD), SETTINGS, NOW)
    stricter = replace(RULE, quote_age_seconds_max=3, spread_bp_max=1, deviation_bp_max=1, sources_min=3)
    strict = record_of(
        decide([quote for quote in QUOTES if quote.source != "coinbase"], NOW, stricter),
        [],
        "live",
        unsettled={},
        rule=stricter,
        decided_at=NOW,
        ttl=timedelta(seconds=60),
    )
    require_proven(signed(strict), SETTINGS, NOW)


def test_record_from_before_a_currency_was_added_proves_its_orders_all_the_same() -> None:
    euros = [quote for quote in QUOTES if quote.currency == EUR]
    older = replace(
        RECORD,
        rates_e8={EUR: RATES[EUR]},
        bids_e8={EUR: RECORD.bids_e8[EUR]},
        asks_e8={EUR: RECORD.asks_e8[EUR]},
        used=tuple(each for each in RECORD.used if each in euros),
    )
    assert discrepancies(ORDER, older) == []


def of_first_version(*middles_e8: int) -> PriceRecord:
    """A record with as many euro quotes; by that version those near the median have to agree with each other."""
    used = tuple(Quote(f"source-{each}", EUR, each, each, NOW) for each in middles_e8)
    rates_e8 = {EUR: sorted(middles_e8)[len(middles_e8) // 2]}
    rule = Rule(quote_age_seconds_max=30, spread_bp_max=1000, deviation_bp_max=100, sources_min=2, version=1)
    return PriceRecord(RECORD.id, NOW, NOW + timedelta(seconds=60), "live", rates_e8, used, rule=rule, decided_at=NOW)


def doubts_of_first_version(*middles_e8: int) -> str:
    record = of_first_version(*middles_e8)
    order = placed_order(price_order(NEW, record, NOW), 12, 12, NOW, livemode=True)
    return "; ".join(discrepancies(order, record))


def test_records_by_the_first_version_of_the_rule_are_proven_by_it() -> None:
    assert doubts_of_first_version(10**12, 10**12 + 1, 10**12 + 2) == ""
    edge = 10**12 + 10**10  # which by that version denied the price, and by this one is set aside
    assert "the sources are more than 1 % apart" in doubts_of_first_version(10**12 - 10**9, 10**12, 10**12, edge)
    assert "only 1 of at least 2 sources agree" in doubts_of_first_version(10**12)
    assert "other quotes are used" in doubts_of_first_version(10**12, 10**12, 2 * 10**12)


def test_record_of_the_first_version_without_quotes_of_its_currency_has_no_price() -> None:
    record = replace(of_first_version(10**12, 10**12), rates_e8={EUR: 10**12, USD: 10**12})
    assert "USD: only 0 of at least 2 sources agree" in "; ".join(discrepancies(ORDER, record))


def test_record_with_some_currencies_unsettled_and_others_missing_is_proven() -> None:
    verdict = decide([each for each in QUOTES if each.currency != GBP or each.source == "kraken"], NOW, RULE)
    ttl = timedelta(seconds=60)
    record = record_of(verdict, [], "live", unsettled={USD: "has moved"}, rule=RULE, decided_at=NOW, ttl=ttl)
    assert record.missing == {GBP: "only 1 of at least 2 sources agree"}
    require_proven(signed(record), SETTINGS, NOW)
    stored = record_from(msgspec.json.decode(msgspec.json.encode(record_document(record))))
    assert stored == record
    settled = replace(record, rates_e8=RATES, unsettled={})
    with pytest.raises(WrongMember, match="the rates are"):
        require_proven(signed(settled), SETTINGS, NOW)


@pytest.mark.parametrize("quotes", [QUOTES[:0], [each for each in QUOTES if each.source == "kraken"]])
def test_record_that_withdraws_the_last_price_without_one_of_its_own_is_proven(quotes: list[Quote]) -> None:
    verdict = decide(quotes, NOW, RULE)
    ttl, withdrawn = timedelta(seconds=60), {EUR: "stands still"}
    record = record_of(verdict, [], "live", unsettled=withdrawn, rule=RULE, decided_at=NOW, ttl=ttl)
    assert (record.as_of, record.used, record.rates_e8) == (NOW, (), {})
    assert record.unsettled == {EUR: UnsettledRate(None, "stands still")}
    assert set(record.missing) == {GBP, USD}
    require_proven(signed(record), SETTINGS, NOW)
    stored = record_from(msgspec.json.decode(msgspec.json.encode(record_document(record))))
    assert stored == record
    made_up = replace(record, unsettled={EUR: UnsettledRate(RATES[EUR], "stands still")})
    with pytest.raises(WrongMember, match="by the rule there is no price"):
        require_proven(signed(made_up), SETTINGS, NOW)


def test_record_that_withdraws_a_price_that_the_rule_makes_is_not_proven() -> None:
    verdict = decide(QUOTES, NOW, RULE)
    record = record_of(verdict, [], "live", unsettled={EUR: "x"}, rule=RULE, decided_at=NOW, ttl=timedelta(seconds=60))
    hidden = replace(record, unsettled={EUR: UnsettledRate(None, "x")})
    with pytest.raises(WrongMember, match="the rates are"):
        require_proven(signed(hidden), SETTINGS, NOW)


def test_record_that_sells_at_a_contradicted_price_is_not_proven() -> None:
    long_ago = NOW - timedelta(seconds=60)
    repeated = [replace(each, changed_at=long_ago) for each in QUOTES if each.source != "coinbase"]
    moved = [Quote("coinbase", each, 2 * RATES[each], 2 * RATES[each], NOW) for each in RATES]
    verdict = decide([*repeated, *moved], NOW, RULE)
    contradicted = "is contradicted by coinbase, which prove their time"
    assert verdict.unsettled == dict.fromkeys(RATES, contradicted)
    ttl = timedelta(seconds=60)
    record = record_of(verdict, [], "live", unsettled={}, rule=RULE, decided_at=NOW, ttl=ttl)
    assert (record.rates_e8, set(record.unsettled)) == ({}, set(RATES))
    require_proven(signed(record), SETTINGS, NOW)
    sold = replace(
        record,
        rates_e8={EUR: record.unsettled[EUR].rate_e8},
        unsettled={each: record.unsettled[each] for each in (GBP, USD)},
    )
    with pytest.raises(WrongMember, match=f"by the rule nothing is sold at a price: EUR: {contradicted}$"):
        require_proven(signed(sold), SETTINGS, NOW)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (with_changes(feed="sandbox"), "feed: must be live, the feed of this desk"),
        (
            with_changes(rates_e8={currency: 2 * rate_e8 for currency, rate_e8 in RATES.items()}),
            "record: the rates are",
        ),
        (with_changes(rates_e8={EUR: RATES[EUR]}), "record: by the rule other quotes are used"),
        (with_changes(missing={GBP: "is made up"}), "by the rule no price is missing that is said to be"),
        (with_changes(bids_e8={}), "by the rule the bids and asks are others"),
        (with_changes(rule=None), "record: the record tells no rule"),
        (with_changes(used=()), "record: the record has no quotes"),
        (with_changes(as_of=NOW), "which is not when its oldest quote was observed"),
        (with_rule(version=3), "version 3 of the pricing rule is not known"),
        (with_rule(quote_age_seconds_max=31), "its rule allows a quote_age_seconds of 31, and this desk 30"),
        (with_rule(spread_bp_max=101), "its rule allows a spread_bp of 101, and this desk 100"),
        (with_rule(version=1), "it was made by version 1 of the rule, and this desk sells by version 2"),
        (with_rule(deviation_bp_max=101), "its rule allows a deviation_bp of 101, and this desk 100"),
        (with_quote(0, source="mine"), "record: the desk has no source mine$"),
        (with_changes(rejected=(*RECORD.rejected, RejectedQuote("mine", "x"))), "record: the desk has no source mine$"),
    ],
)
def test_what_is_not_proven_becomes_no_price(change: Callable[[PriceRecord], PriceRecord], told: str) -> None:
    with pytest.raises(WrongMember, match=told):
        require_proven(signed(change(RECORD)), SETTINGS, NOW)


def test_desk_that_needs_more_sources_takes_no_price_of_fewer() -> None:
    with pytest.raises(WrongMember, match="its rule is content with 2 sources, and this desk needs 3"):
        require_proven(signed(RECORD), settings(price_feed="live", price_sources_min=3), NOW)


quotes = st.lists(
    st.builds(
        Quote,
        st.sampled_from(["one", "two", "three", "four", "five"]),
        st.sampled_from(Currency),
        st.integers(10**12 - 10**10, 10**12) | st.integers(-(10**20), 10**20),
        st.integers(10**12, 10**12 + 10**10) | st.integers(-(10**20), 10**20),
        st.integers(-1, 31).map(lambda seconds: NOW - timedelta(seconds=seconds)),
    ),
    max_size=20,
)


@given(quotes, st.integers(1, 10**11 - 1), st.sampled_from(Currency))
def test_every_order_at_every_price_of_the_rule_is_proven(further: list[Quote], cents: int, currency: Currency) -> None:
    verdict = decide([*QUOTES, *further], NOW, RULE)
    if currency in verdict.rates_e8:
        record = decided([*QUOTES, *further])
        new = msgspec.structs.replace(NEW, amount_cents=cents, currency=currency)
        assert discrepancies(placed_order(price_order(new, record, NOW), 1, 1, NOW, livemode=True), record) == []
