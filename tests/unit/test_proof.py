"""Proof: what does not follow from the stored record is named; what does follow is proven."""

import uuid
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from buydesk.money import Currency
from buydesk.orders import ANONYMOUS, NewOrder, Order, placed_order
from buydesk.price_documents import record_document, record_from
from buydesk.prices import PriceRecord, Quote, Rejection, Rule
from buydesk.pricing import decide, record_of
from buydesk.proof import doubts

NOW = datetime(2026, 1, 31, 9, 5, tzinfo=UTC)
TICK = timedelta(microseconds=1)
RULE = Rule(quote_age_seconds_max=30, spread_bp_max=1000, deviation_bp_max=100, sources_min=2)
EUR, GBP, USD = Currency
MIDS = {"one": 2_000_000_000_000, "two": 2_000_000_000_007, "three": 2_000_000_000_013, "liar": 10**12}
QUOTES = [
    Quote(name, currency, mid_e8 - 5, mid_e8 + 5, NOW - timedelta(seconds=number))
    for currency in Currency
    for number, (name, mid_e8) in enumerate(MIDS.items())
]


def decided(quotes: list[Quote]) -> PriceRecord:
    unanswered = [Rejection("slow", "gave no answer")]
    return record_of(
        decide(quotes, NOW, RULE), unanswered, "live", rule=RULE, decided_at=NOW, ttl=timedelta(seconds=60)
    )


RECORD = decided(QUOTES)
NEW = NewOrder(uuid.UUID(int=1), ANONYMOUS, None, EUR, 6900)
ORDER = placed_order(NEW, RECORD, 12, NOW + timedelta(seconds=1), livemode=True)
# Of the time before there was a rule: the three currencies of one source.
OLD = replace(
    RECORD, used=tuple(QUOTES[::4]), rejected=(), rates_e8={each.currency: each.mid_e8 for each in QUOTES[::4]}
)
OLD = replace(OLD, rule=None, decided_at=None, as_of=NOW)


def changed(**changes: Any) -> Order:
    return msgspec.structs.replace(ORDER, **changes)


def test_order_follows_from_the_record_it_was_priced_with() -> None:
    assert doubts(ORDER, RECORD) == []


def test_order_follows_from_the_record_as_it_is_stored() -> None:
    stored = record_from(msgspec.json.decode(msgspec.json.encode(record_document(RECORD))))
    assert doubts(ORDER, stored) == []


@pytest.mark.parametrize(
    ("changes", "doubt"),
    [
        ({"price_id": uuid.UUID(int=9)}, "was priced with record 00000000-0000-0000-0000-000000000009"),
        ({"livemode": False}, "an order with livemode False was priced with a live record"),
        ({"rate_e8": ORDER.rate_e8 + 1}, "the rate is 20000.00000008, and the record's is 20000.00000007"),
        ({"satoshi": ORDER.satoshi - 1}, "the bitcoin amount is 0.00344999, and the record makes it 0.00345"),
        ({"satoshi": ORDER.satoshi + 1}, "the bitcoin amount is 0.00345001, and the record makes it 0.00345"),
        ({"amount_cents": 6901}, "the bitcoin amount is 0.00345000, and the record makes it 0.00345050"),
        ({"price_as_of": RECORD.as_of + TICK}, "the price is dated 2026-01-31T09:04:58.000001Z"),
        ({"created_at": RECORD.expires_at}, "and the price ended at 2026-01-31T09:05:58.000000Z"),
        ({"created_at": NOW - TICK}, "and the price came at 2026-01-31T09:05:00.000000Z"),
    ],
)
def test_what_of_the_order_does_not_follow_is_named(changes: dict[str, Any], doubt: str) -> None:
    [named] = doubts(changed(**changes), RECORD)
    assert doubt in named


def test_amount_is_rounded_up_to_a_satoshi() -> None:
    order = placed_order(NEW, replace(RECORD, rates_e8={EUR: 3 * 10**8}), 1, NOW, livemode=True)
    assert order.satoshi == 2_300_000_000
    order = placed_order(
        msgspec.structs.replace(NEW, amount_cents=100), replace(OLD, rates_e8={EUR: 3 * 10**8}), 1, NOW, livemode=True
    )
    assert order.satoshi == 33_333_334


@pytest.mark.parametrize(("order", "record"), [(ORDER, RECORD), (placed_order(NEW, OLD, 1, NOW, livemode=True), OLD)])
def test_order_may_be_of_any_moment_from_the_price_to_its_end(order: Order, record: PriceRecord) -> None:
    for moment in (record.decided_at or record.as_of, record.expires_at - TICK):
        assert doubts(msgspec.structs.replace(order, created_at=moment), record) == []


@pytest.mark.parametrize(
    ("behind", "is_proven"), [(timedelta(seconds=10), True), (timedelta(seconds=10) + TICK, False)]
)
def test_clock_of_the_ledger_may_be_behind_by_the_allowed_skew(behind: timedelta, is_proven: bool) -> None:
    order = changed(created_at=NOW - behind)
    assert (doubts(order, RECORD, timedelta(seconds=10)) == []) is is_proven


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
        (with_quote(1, bid_e8=MIDS["two"] - 7), "by the rule EUR 20000.00000006, GBP"),
        (with_quote(0, observed_at=NOW + TICK), "the rates are EUR 20000.00000007"),
        (
            with_changes(rates_e8=RATES | {USD: RATES[USD] + 1}),
            "and by the rule EUR 20000.00000007, GBP 20000.00000007, ",
        ),
        (
            with_changes(used=RECORD.used[:4]),
            "by the rule there is no price: GBP: only 0 of at least 2 sources agree; USD: only 1",
        ),
        (with_changes(used=()), "the record has no quotes"),
        (with_changes(used=RECORD.used * 2), "by the rule there is no price"),
        (with_changes(used=RECORD.used + RECORD.used[:1]), "by the rule other quotes are used"),
        (with_changes(rejected=()), ""),
        (
            with_changes(rejected=(*RECORD.rejected, Rejection("new", "y", replace(QUOTES[0], source="new")))),
            "other quotes",
        ),
        (with_changes(decided_at=NOW + timedelta(seconds=28) + TICK), "the rates are EUR 20000.00000007"),
        (with_changes(decided_at=NOW + timedelta(seconds=28)), "and the price came at"),
        (with_changes(as_of=NOW - timedelta(seconds=1)), "which is not when its oldest quote was observed"),
        (with_changes(expires_at=RECORD.as_of), "the record is valid for 0 s"),
        (with_changes(expires_at=RECORD.as_of + timedelta(seconds=3600)), ""),
        (with_changes(expires_at=RECORD.as_of + timedelta(seconds=3600) + TICK), "the record is valid for 3600 s"),
        (with_rule(version=2), "version 2 of the pricing rule is not known"),
        (with_rule(sources_min=4), "only 3 of at least 4 sources agree"),
        (with_rule(quote_age_seconds_max=1), "by the rule other quotes are used"),
        (with_rule(deviation_bp_max=0), "by the rule there is no price"),
        (with_changes(rule=None), "and the middles of the quotes EUR 20000.00000013"),
        (with_changes(decided_at=None), "and the middles of the quotes EUR 20000.00000013"),
        (with_changes(rates_e8={}), "the record has no rate for EUR"),
        (with_changes(rates_e8=RATES | {EUR: 0}), "the record has no rate for EUR"),
    ],
)
def test_what_of_the_record_does_not_follow_from_its_quotes_is_named(
    change: Callable[[PriceRecord], PriceRecord], doubt: str
) -> None:
    found = doubts(ORDER, change(RECORD))
    assert bool(found) is bool(doubt)
    assert doubt in "; ".join(found)


def test_record_of_the_time_before_the_rule_is_proven_by_its_one_source() -> None:
    order = placed_order(NEW, OLD, 1, NOW, livemode=True)
    assert doubts(order, OLD) == []


@pytest.mark.parametrize(
    "change",
    [
        with_quote(2, ask_e8=MIDS["one"] + 7),
        with_changes(rates_e8={currency: rate_e8 + 1 for currency, rate_e8 in OLD.rates_e8.items()}),
        with_changes(used=OLD.used + OLD.used[:1]),
        with_changes(used=OLD.used[:2]),
    ],
)
def test_record_of_the_time_before_the_rule_shows_its_sources_middle(
    change: Callable[[PriceRecord], PriceRecord],
) -> None:
    record = change(OLD)
    [doubt] = doubts(placed_order(NEW, record, 1, NOW, livemode=True), record)
    assert doubt.startswith("the rates are EUR 20000.00")


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
    if not verdict.missing:
        record = decided([*QUOTES, *further])
        new = msgspec.structs.replace(NEW, amount_cents=cents, currency=currency)
        assert doubts(placed_order(new, record, 1, NOW, livemode=True), record) == []
