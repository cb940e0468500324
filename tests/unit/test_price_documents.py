"""Price records, points and states of the sources survive their JSON; what is none is refused by its member."""

import uuid
from collections.abc import Callable
from copy import deepcopy
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from buydesk.money import RATE_E8_MAX, RATE_E8_MIN, Currency
from buydesk.prices.documents import document_of, feed_status_from, point_from, record_document, record_from
from buydesk.prices.model import (
    FeedStatus,
    PricePoint,
    PriceRecord,
    Quote,
    RejectedQuote,
    Rule,
    SourceStatus,
    UnsettledRate,
)
from buydesk.reading import WrongMember
from buydesk.times import format_time

NOW = datetime(2026, 1, 31, 9, 5, tzinfo=UTC)
RATES = dict.fromkeys(Currency, 2_000_000_000_000)
QUOTES = tuple(
    Quote("replay", currency, 2_000_000_000_000 + number, 2_000_000_000_003 + number, NOW - timedelta(seconds=number))
    for number, currency in enumerate(Currency)
)
RECORD = PriceRecord(
    uuid.UUID(int=7),
    NOW,
    NOW + timedelta(seconds=60),
    "sandbox",
    RATES,
    QUOTES,
    (RejectedQuote("other", "timed out"), RejectedQuote("far", "is too far", QUOTES[0])),
    NOW - timedelta(days=1000),
    Rule(30, 1000, 100, 2),
    NOW,
)
POINT = RECORD.point()
STATE = FeedStatus(
    NOW,
    "live",
    "only 1 of at least 2 sources agree",
    (
        SourceStatus("one", ""),
        SourceStatus(
            "two", "is closed", 3, {Currency.EUR: 4_119_191_000_000}, NOW, NOW + timedelta(seconds=15), "is closed", NOW
        ),
    ),
)

rates = st.integers(RATE_E8_MIN, RATE_E8_MAX)
moments = st.datetimes(datetime(1970, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001
feeds = st.sampled_from(["sandbox", "live"])
all_rates = st.fixed_dictionaries(dict.fromkeys(Currency, rates))
quotes = st.builds(Quote, st.text(), st.sampled_from(Currency), rates, rates, moments)
limits = st.integers(0, 1_000_000)
records = st.builds(
    PriceRecord,
    st.uuids(),
    moments,
    moments,
    feeds,
    all_rates,
    st.lists(quotes, max_size=3).map(tuple),
    st.lists(st.builds(RejectedQuote, st.text(), st.text(), st.none() | quotes), max_size=3).map(tuple),
    st.none() | moments,
    st.none() | st.builds(Rule, limits, limits, limits, limits, limits),
    st.none() | moments,
)
points = st.builds(PricePoint, st.uuids(), moments, all_rates, st.none() | moments)
states = st.builds(
    SourceStatus,
    st.text(),
    st.text(),
    st.integers(0, 10**9),
    st.none() | st.dictionaries(st.sampled_from(Currency), rates),
    st.none() | moments,
    st.none() | moments,
)
feed_states = st.builds(FeedStatus, moments, feeds, st.text(), st.lists(states, max_size=5).map(tuple))


def as_sent(document: object) -> Any:
    """The document after its way over the wire."""
    return msgspec.json.decode(msgspec.json.encode(document))


DOCUMENT: Any = as_sent(record_document(RECORD))
# Of later versions: records by the first version of the rule have fewer members.
OF_VERSION_2 = {"bids", "asks", "missing", "unsettled"}
OPTIONAL = {"replayed_from", "rule", "decided_at", "signature", *OF_VERSION_2}


@given(records)
def test_record_survives_its_json(record: PriceRecord) -> None:
    assert record_from(as_sent(record_document(record))) == record


def test_records_by_the_first_version_of_the_rule_are_written_as_they_were_signed() -> None:
    for rule in (None, Rule(30, 1000, 100, 2, version=1)):
        assert not OF_VERSION_2 & as_sent(record_document(replace(RECORD, rule=rule))).keys()
    assert as_sent(record_document(RECORD)).keys() >= OF_VERSION_2


def test_what_is_unsettled_or_missing_is_written_with_its_reason() -> None:
    record = replace(
        RECORD, missing={Currency.GBP: "none agree"}, unsettled={Currency.USD: UnsettledRate(10**12, "has moved")}
    )
    document = as_sent(record_document(record))
    assert document["missing"] == {"GBP": "none agree"}
    assert document["unsettled"] == {"USD": {"rate": "10000.00", "reason": "has moved"}}


@pytest.mark.parametrize("member", ["missing", "unsettled"])
def test_currency_that_is_not_known_is_refused_by_name(member: str) -> None:
    with pytest.raises(WrongMember, match="must be one of EUR, GBP, USD"):
        record_from({**DOCUMENT, member: {"CHF": "none agree"}})


def test_quote_of_a_source_without_a_clock_says_when_its_answer_changed() -> None:
    changed = RECORD.as_of - timedelta(seconds=3)
    for changed_at in (None, changed):
        record = replace(RECORD, used=(replace(QUOTES[0], changed_at=changed_at),))
        [quote] = as_sent(record_document(record))["sources"]["used"]
        assert quote.get("changed_at") == (changed_at and format_time(changed_at))
        assert record_from(as_sent(record_document(record))) == record


@given(points)
def test_point_survives_its_json(point: PricePoint) -> None:
    assert point_from(as_sent(document_of(point))) == point


@given(feed_states)
def test_state_of_the_sources_survives_its_json(state: FeedStatus) -> None:
    assert feed_status_from(as_sent(document_of(state))) == state


def test_record_says_what_an_order_can_be_proven_with() -> None:
    assert DOCUMENT["rule"] == {
        "quote_age_seconds_max": 30,
        "spread_bp_max": 1000,
        "deviation_bp_max": 100,
        "sources_min": 2,
        "version": 2,
    }
    assert DOCUMENT["decided_at"] == "2026-01-31T09:05:00.000000Z"
    assert DOCUMENT["rates"]["EUR"] == "20000.00"
    assert DOCUMENT["sources"]["rejected"] == [
        {"source": "other", "reason": "timed out", "quote": None},
        {
            "source": "far",
            "reason": "is too far",
            "quote": {
                "source": "replay",
                "currency": "EUR",
                "bid": "20000.00",
                "ask": "20000.00000003",
                "observed_at": "2026-01-31T09:05:00.000000Z",
            },
        },
    ]


def test_further_members_are_ignored() -> None:
    assert record_from({**DOCUMENT, "bpi": {}, "time": 1}) == RECORD


def test_record_of_the_time_before_the_rule_can_be_read() -> None:
    """Stored with orders by the first version, which never goes away: no `rule`, `decided_at` and rejected quotes."""
    document = {
        "id": "00000000-0000-0000-0000-000000000007",
        "as_of": "2026-01-31T09:05:00.000000Z",
        "expires_at": "2026-01-31T09:06:00.000000Z",
        "feed": "sandbox",
        "replayed_from": None,
        "rates": {"EUR": "20000.00", "GBP": "20000.00", "USD": "20000.00"},
        "sources": {"used": [], "rejected": [{"source": "other", "reason": "timed out"}]},
    }
    assert record_from(document) == PriceRecord(
        uuid.UUID(int=7), NOW, NOW + timedelta(seconds=60), "sandbox", RATES, (), (RejectedQuote("other", "timed out"),)
    )


def changed(document: object, path: str, value: object) -> object:
    """The document with another value at the path; "" is the document itself."""
    whole: Any = {"it": deepcopy(document)}
    *parents, last = f"it.{path}".rstrip(".").split(".")
    target = whole
    for name in parents:
        target = target[int(name) if name.isdecimal() else name]
    target[int(last) if last.isdecimal() else last] = value
    return whole["it"]


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
        ("feed", [], "text"),
        ("replayed_from", "then", "ISO 8601"),
        ("rates", [], "an object"),
        ("rates.EUR", 20572.78, "text"),
        ("rates.EUR", "0", "between 1 and"),
        ("rates.USD", "NaN", "decimal text"),
        ("sources", None, "an object"),
        ("sources.used", {}, "a list"),
        ("sources.used.1", "EUR", "an object"),
        ("sources.used.2.currency", "BTC", "EUR, GBP, USD"),
        ("sources.used.2.currency", ["EUR"], "text"),
        ("sources.used.0.bid", "1e3", "decimal text"),
        ("sources.rejected.0.reason", 5, "text"),
        ("sources.rejected.1.quote", [], "an object"),
        ("sources.rejected.1.quote.bid", "0.5", "between 1 and"),
        ("rule", [], "an object"),
        ("rule.sources_min", "2", "an integer"),
        ("rule.version", -1, "at least 0"),
        ("rule.quote_age_seconds_max", 1_000_001, "at most 1000000"),
        ("decided_at", "now", "ISO 8601"),
    ],
)
def test_what_is_no_record_is_refused_by_its_member(path: str, value: object, reason: str) -> None:
    with pytest.raises(WrongMember, match=reason) as refused:
        record_from(changed(DOCUMENT, path, value))
    assert refused.value.member == (path or "record")
    assert str(refused.value) == f"{refused.value.member}: {refused.value.reason}"


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("", "point", "an object"),
        ("id", "7", "must be a UUID"),
        ("as_of", "2026-01-31", "ISO 8601"),
        ("rates.GBP", None, "text"),
        ("replayed_from", 5, "text"),
    ],
)
def test_what_is_no_point_is_refused_by_its_member(path: str, value: object, reason: str) -> None:
    with pytest.raises(WrongMember, match=reason) as refused:
        point_from(changed(document_of(POINT), path, value))
    assert refused.value.member == (path or "point")


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("", 5, "an object"),
        ("at", None, "text"),
        ("feed", "toy", "sandbox or live"),
        ("problem", 5, "text"),
        ("sources", {}, "a list"),
        ("sources.0", 5, "an object"),
        ("sources.1.source", None, "text"),
        ("sources.1.detail", 5, "text"),
        ("sources.1.failures", "3", "an integer"),
        ("sources.1.mids", [], "an object"),
        ("sources.1.mids.EUR", "0", "between 1 and"),
        ("sources.1.quoted_at", "then", "ISO 8601"),
        ("sources.1.resting_until", "then", "ISO 8601"),
    ],
)
def test_what_is_no_state_of_the_sources_is_refused_by_its_member(path: str, value: object, reason: str) -> None:
    with pytest.raises(WrongMember, match=reason) as refused:
        feed_status_from(changed(document_of(STATE), path, value))
    assert refused.value.member == (path or "state")


@pytest.mark.parametrize(
    ("read", "document", "optional"),
    [
        (record_from, DOCUMENT, OPTIONAL),
        (point_from, document_of(POINT), {"replayed_from"}),
        (feed_status_from, document_of(STATE), set()),
    ],
)
def test_missing_member_is_named_unless_earlier_versions_have_none(
    read: Callable[[object], object], document: dict[str, object], optional: set[str]
) -> None:
    for member in document:
        rest = {name: value for name, value in document.items() if name != member}
        if member in optional:
            read(rest)
        else:
            with pytest.raises(WrongMember, match=f"^{member}: is missing"):
                read(rest)
