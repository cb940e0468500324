import uuid
from copy import deepcopy
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from buydesk.errors import PriceStale, PriceSuperseded, PriceUnavailable, SourceFailed
from buydesk.money import RATE_E8_MAX, RATE_E8_MIN, Currency
from buydesk.price_documents import record_document, record_from
from buydesk.prices import (
    KEPT_FOR,
    NotARecord,
    PriceRecord,
    Quote,
    Rejection,
    price_record,
    require_plausible,
    superseded,
    valid_record,
)

NOW = datetime(2026, 1, 31, 9, 5, tzinfo=UTC)
TTL = timedelta(seconds=60)
TICK = timedelta(microseconds=1)
QUOTES = [
    Quote("replay", currency, 2_000_000_000_000 + number, 2_000_000_000_003 + number, NOW - timedelta(seconds=number))
    for number, currency in enumerate(Currency)
]
RECORD = price_record(QUOTES, [Rejection("other", "timed out")], "sandbox", TTL, NOW - timedelta(days=1000))
DOCUMENT: Any = record_document(RECORD)

rates = st.integers(RATE_E8_MIN, RATE_E8_MAX)
moments = st.datetimes(datetime(1970, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001
records = st.builds(
    PriceRecord,
    st.uuids(),
    moments,
    moments,
    st.sampled_from(["sandbox", "live"]),
    st.fixed_dictionaries(dict.fromkeys(Currency, rates)),
    st.lists(st.builds(Quote, st.text(), st.sampled_from(Currency), rates, rates, moments), max_size=3).map(tuple),
    st.lists(st.builds(Rejection, st.text(), st.text()), max_size=3).map(tuple),
    st.none() | moments,
)


@given(rates, rates)
def test_the_middle_lies_between_bid_and_ask_and_half_is_rounded_up(bid_e8: int, ask_e8: int) -> None:
    mid_e8 = Quote("any", Currency.EUR, bid_e8, ask_e8, NOW).mid_e8
    assert min(bid_e8, ask_e8) <= mid_e8 <= max(bid_e8, ask_e8)
    assert mid_e8 * 2 - (bid_e8 + ask_e8) in (0, 1)


def test_a_record_is_as_old_as_its_oldest_quote_and_expires_from_there() -> None:
    assert RECORD.as_of == NOW - timedelta(seconds=2)
    assert RECORD.expires_at == RECORD.as_of + TTL
    assert RECORD.rates_e8 == {quote.currency: quote.mid_e8 for quote in QUOTES}
    assert RECORD.used == tuple(QUOTES)
    assert RECORD.rejected == (Rejection("other", "timed out"),)


def test_each_record_has_an_id_of_its_own() -> None:
    assert price_record(QUOTES, [], "live", TTL).id != price_record(QUOTES, [], "live", TTL).id


@pytest.mark.parametrize(
    ("quotes", "reason"),
    [
        ([], "no usable quote for EUR, GBP, USD"),
        (QUOTES[:2], "no usable quote for USD"),
        ([*QUOTES, replace(QUOTES[0], bid_e8=10**8)], "more than one quote"),
    ],
)
def test_a_record_needs_exactly_one_quote_for_every_currency(quotes: list[Quote], reason: str) -> None:
    with pytest.raises(SourceFailed, match=reason):
        price_record(quotes, [], "live", TTL)


def test_a_record_may_be_used_until_it_expires_and_not_a_moment_longer() -> None:
    RECORD.require_fresh(RECORD.expires_at - TICK)
    with pytest.raises(PriceStale) as refused:
        RECORD.require_fresh(RECORD.expires_at)
    assert refused.value.retry_after_seconds is not None
    assert refused.value.facts == {"as_of": DOCUMENT["as_of"], "expires_at": DOCUMENT["expires_at"]}


@pytest.mark.parametrize(("ttl_seconds", "valid_seconds"), [(30, 30), (57, 57), (58, 58), (59, 58), (86_400, 58)])
def test_a_record_can_be_shortened_but_never_extended(ttl_seconds: int, valid_seconds: int) -> None:
    shortened = RECORD.shortened(timedelta(seconds=ttl_seconds), NOW)
    assert shortened == replace(RECORD, expires_at=NOW + timedelta(seconds=valid_seconds))


def test_the_hanging_record_is_shown_while_it_is_valid() -> None:
    assert valid_record(RECORD, NOW, 10) is RECORD
    with pytest.raises(PriceStale):
        valid_record(RECORD, RECORD.as_of + KEPT_FOR - TICK, 10)


def test_a_record_from_further_in_the_future_than_clocks_differ_is_none() -> None:
    assert valid_record(RECORD, RECORD.as_of - timedelta(seconds=10), 10) is RECORD
    with pytest.raises(PriceUnavailable):
        valid_record(RECORD, RECORD.as_of - timedelta(seconds=10) - TICK, 10)


def test_a_record_within_all_bounds_is_plausible() -> None:
    require_plausible(RECORD, "sandbox", 60, 10, RECORD.as_of - timedelta(seconds=10))


@pytest.mark.parametrize(
    ("changes", "member", "reason"),
    [
        ({"feed": "live"}, "feed", "must be sandbox, the feed of this desk"),
        ({"as_of": NOW + timedelta(seconds=10) + TICK}, "as_of", "must not lie more than 10 s in the future"),
        ({"expires_at": RECORD.as_of}, "expires_at", "must be later than as_of"),
        ({"expires_at": RECORD.expires_at + TICK}, "expires_at", "must not be more than 60 s after as_of"),
    ],
)
def test_what_is_not_plausible_is_named_with_its_reason(changes: dict[str, Any], member: str, reason: str) -> None:
    with pytest.raises(NotARecord) as refused:
        require_plausible(replace(RECORD, **changes), "sandbox", 60, 10, NOW)
    assert (refused.value.member, refused.value.reason) == (member, reason)


@pytest.mark.parametrize("hanging", [None, RECORD])
def test_none_within_a_day_is_told_from_stale(hanging: PriceRecord | None) -> None:
    with pytest.raises(PriceUnavailable) as refused:
        valid_record(hanging, RECORD.as_of + KEPT_FOR, 10)
    assert refused.value.retry_after_seconds is not None


def test_an_older_record_is_told_what_hangs() -> None:
    assert isinstance(superseded(RECORD.as_of), PriceSuperseded)
    assert superseded(RECORD.as_of).facts == {"as_of": DOCUMENT["as_of"]}


@given(records)
def test_a_record_survives_its_json(record: PriceRecord) -> None:
    assert record_from(msgspec.json.decode(msgspec.json.encode(record_document(record)))) == record


def test_further_members_are_ignored() -> None:
    assert record_from({**DOCUMENT, "bpi": {}, "time": 1}) == RECORD


def _changed(path: str, value: object) -> object:
    document: Any = {"record": deepcopy(DOCUMENT)}
    *parents, last = f"record.{path}".rstrip(".").split(".")
    target = document
    for name in parents:
        target = target[int(name) if name.isdecimal() else name]
    target[int(last) if last.isdecimal() else last] = value
    return document["record"]


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("", [], "an object"),
        ("", None, "an object"),
        ("id", "7", "must be a UUID"),
        ("id", 7, "text"),
        ("as_of", "2026-01-31T09:05:00", "ISO 8601"),
        ("as_of", "0001-01-01T00:00:00+23:59", "ISO 8601"),
        ("expires_at", None, "text"),
        ("feed", "toy", "sandbox or live"),
        ("feed", [], "sandbox or live"),
        ("replayed_from", "then", "ISO 8601"),
        ("rates", [], "an object"),
        ("rates.EUR", 20572.78, "text"),
        ("rates.EUR", "0", "between 1 and"),
        ("rates.USD", "NaN", "decimal text"),
        ("sources", None, "an object"),
        ("sources.used", {}, "a list"),
        ("sources.used.1", "EUR", "an object"),
        ("sources.used.2.currency", "BTC", "EUR, GBP or USD"),
        ("sources.used.2.currency", ["EUR"], "text"),
        ("sources.used.0.bid", "1e3", "decimal text"),
        ("sources.rejected.0.reason", 5, "text"),
    ],
)
def test_what_is_no_record_is_refused_by_its_member(path: str, value: object, reason: str) -> None:
    with pytest.raises(NotARecord, match=reason) as refused:
        record_from(_changed(path, value))
    assert refused.value.member == (path or "record")
    assert str(refused.value) == f"{refused.value.member}: {refused.value.reason}"


@pytest.mark.parametrize("member", [name for name in DOCUMENT if name != "id"])
def test_a_missing_member_is_named(member: str) -> None:
    with pytest.raises(NotARecord, match=f"{member}: is missing"):
        record_from({name: value for name, value in DOCUMENT.items() if name != member})


def test_a_record_keeps_its_id() -> None:
    assert record_from(DOCUMENT).id == uuid.UUID(DOCUMENT["id"])
