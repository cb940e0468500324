"""Prices: how long a record may be used, what is plausible, and what is shown of the current one."""

import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from buydesk.errors import PriceStale, PriceSuperseded, PriceUnavailable
from buydesk.money import RATE_E8_MAX, RATE_E8_MIN, Currency
from buydesk.prices.model import (
    KEPT_FOR,
    FeedStatus,
    PricePoint,
    PriceRecord,
    Quote,
    Rule,
    UsablePrice,
    history_span,
    recent_feed_status,
    require_plausible,
    require_plausible_status,
    seconds_to_next_tick,
    superseded,
    valid_record,
)
from buydesk.reading import WrongMember
from buydesk.times import format_time

NOW = datetime(2026, 1, 31, 9, 5, tzinfo=UTC)
TICK = timedelta(microseconds=1)
RECORD = PriceRecord(
    uuid.UUID(int=7),
    NOW - timedelta(seconds=2),
    NOW + timedelta(seconds=58),
    "sandbox",
    dict.fromkeys(Currency, 2_000_000_000_000),
    tuple(
        Quote(source, currency, 2_000_000_000_000, 2_000_000_000_000, NOW - timedelta(seconds=2))
        for source in ("one", "two")
        for currency in Currency
    ),
    replayed_from=NOW - timedelta(days=1000),
    rule=Rule(quote_age_seconds_max=30, spread_bp_max=1000, deviation_bp_max=100, sources_min=2),
    decided_at=NOW - timedelta(seconds=1),
)
STATE = FeedStatus(NOW, "sandbox", "", ())

rates = st.integers(RATE_E8_MIN, RATE_E8_MAX)


@given(rates, rates)
def test_the_middle_lies_between_bid_and_ask_and_half_is_rounded_up(bid_e8: int, ask_e8: int) -> None:
    mid_e8 = Quote("any", Currency.EUR, bid_e8, ask_e8, NOW).mid_e8
    assert min(bid_e8, ask_e8) <= mid_e8 <= max(bid_e8, ask_e8)
    assert mid_e8 * 2 - (bid_e8 + ask_e8) in (0, 1)


def test_a_record_may_be_used_until_it_expires_and_not_a_moment_longer() -> None:
    assert valid_record(RECORD, RECORD.expires_at - TICK, 0) is RECORD
    with pytest.raises(PriceStale) as refused:
        valid_record(RECORD, RECORD.expires_at, 0)
    assert refused.value.retry_after_seconds is not None
    assert refused.value.facts == {"as_of": format_time(RECORD.as_of), "expires_at": format_time(RECORD.expires_at)}


@pytest.mark.parametrize(("ttl_seconds", "valid_seconds"), [(30, 30), (57, 57), (58, 58), (59, 58), (86_400, 58)])
def test_a_record_can_be_shortened_but_never_extended(ttl_seconds: int, valid_seconds: int) -> None:
    shortened = RECORD.shortened(timedelta(seconds=ttl_seconds), NOW)
    assert shortened == replace(RECORD, expires_at=NOW + timedelta(seconds=valid_seconds))


def test_the_current_record_is_shown_while_it_is_valid() -> None:
    assert valid_record(RECORD, NOW, 10) is RECORD
    with pytest.raises(PriceStale):
        valid_record(RECORD, RECORD.as_of + KEPT_FOR - TICK, 10)


def test_from_the_first_look_on_a_clock_that_steps_back_makes_nothing_valid_for_longer() -> None:
    price = UsablePrice.seen(RECORD, NOW, 100, None)  # for 58 s
    assert price.usable(100) is RECORD
    price = UsablePrice.seen(RECORD, NOW - timedelta(seconds=60), 157, price)
    assert price.usable(157.9) is RECORD
    with pytest.raises(PriceStale):
        price.usable(158)
    other = replace(RECORD, id=uuid.UUID(int=8))
    assert UsablePrice.seen(other, NOW, 158, price).usable(158) is other


def test_a_record_that_was_shortened_ends_earlier() -> None:
    whole = UsablePrice.seen(RECORD, NOW, 100, None)
    shortened = RECORD.shortened(timedelta(seconds=5), NOW)
    price = UsablePrice.seen(shortened, NOW + timedelta(seconds=4), 104, whole)
    assert price.usable(104) is shortened
    for record in (shortened, RECORD):
        with pytest.raises(PriceStale):
            UsablePrice.seen(record, NOW, 105, price).usable(105)


def test_a_record_from_further_in_the_future_than_clocks_differ_is_none() -> None:
    assert valid_record(RECORD, RECORD.made_at - timedelta(seconds=10), 10) is RECORD
    with pytest.raises(PriceUnavailable):
        valid_record(RECORD, RECORD.made_at - timedelta(seconds=10) - TICK, 10)


def test_a_record_within_all_bounds_is_plausible() -> None:
    require_plausible(RECORD, "sandbox", 60, 10, RECORD.made_at - timedelta(seconds=10))


@pytest.mark.parametrize(
    ("changes", "member", "reason"),
    [
        ({"feed": "live"}, "feed", "must be sandbox, the feed of this desk"),
        ({"as_of": NOW + timedelta(seconds=10) + TICK}, "as_of", "must not lie more than 10 s in the future"),
        ({"decided_at": NOW + timedelta(seconds=10) + TICK}, "decided_at", "must not lie more than 10 s in the future"),
        ({"expires_at": RECORD.as_of}, "expires_at", "must be later than as_of"),
        ({"expires_at": RECORD.expires_at + TICK}, "expires_at", "must not be more than 60 s after as_of"),
    ],
)
def test_what_is_not_plausible_is_named_with_its_reason(changes: dict[str, Any], member: str, reason: str) -> None:
    with pytest.raises(WrongMember) as refused:
        require_plausible(replace(RECORD, **changes), "sandbox", 60, 10, NOW)
    assert (refused.value.member, refused.value.reason) == (member, reason)


@pytest.mark.parametrize("current", [None, RECORD])
def test_none_within_a_day_is_told_from_stale(current: PriceRecord | None) -> None:
    with pytest.raises(PriceUnavailable) as refused:
        valid_record(current, RECORD.as_of + KEPT_FOR, 10)
    assert refused.value.retry_after_seconds is not None


def test_a_tick_that_lies_ahead_by_our_clock_has_just_been() -> None:
    assert seconds_to_next_tick(NOW, 15, NOW - timedelta(seconds=3)) == 16


def test_an_older_record_is_told_what_hangs() -> None:
    assert isinstance(superseded(RECORD.made_at), PriceSuperseded)
    assert superseded(RECORD.made_at).facts == {"decided_at": format_time(RECORD.made_at)}


def test_records_can_be_kept_in_a_set() -> None:
    assert {RECORD, replace(RECORD), replace(RECORD, id=uuid.UUID(int=8))} == {
        RECORD,
        replace(RECORD, id=uuid.UUID(int=8)),
    }


def test_history_keeps_of_a_record_what_a_chart_needs() -> None:
    assert RECORD.point() == PricePoint(RECORD.id, RECORD.as_of, RECORD.rates_e8, RECORD.replayed_from)


def test_state_within_all_bounds_is_plausible() -> None:
    require_plausible_status(STATE, "sandbox", 10, NOW - timedelta(seconds=10))


@pytest.mark.parametrize(
    ("changes", "member"), [({"feed": "live"}, "feed"), ({"at": NOW + timedelta(seconds=10) + TICK}, "at")]
)
def test_state_that_is_not_plausible_is_named(changes: dict[str, Any], member: str) -> None:
    with pytest.raises(WrongMember) as refused:
        require_plausible_status(replace(STATE, **changes), "sandbox", 10, NOW)
    assert refused.value.member == member


def test_what_was_told_of_the_sources_is_shown_for_a_day() -> None:
    assert recent_feed_status(STATE, NOW + KEPT_FOR - TICK) is STATE
    for told, now in ((STATE, NOW + KEPT_FOR), (None, NOW)):
        with pytest.raises(PriceUnavailable):
            recent_feed_status(told, now)


def test_spans_of_a_chart_divide_its_minutes() -> None:
    assert history_span(60, 240) == timedelta(seconds=15)
    assert history_span(1440, 7) == timedelta(minutes=1440) / 7
