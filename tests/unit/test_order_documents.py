"""Orders between services: what is written is read back the same, and whatever else arrives is refused by name."""

import uuid
from datetime import timedelta
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from buydesk.errors import DeskError, ExposureCapExceeded, InvalidRequest, PriceStale, PriceUnavailable
from buydesk.http.examples import EXAMPLE_ORDER, EXAMPLE_PRICED_ORDER
from buydesk.money import AMOUNT_CENTS_MAX, MARKUP_BP_MAX, RATE_E8_MAX, RATE_E8_MIN, Currency
from buydesk.orders.documents import (
    order_from,
    outcome_document,
    outcome_from,
    priced_order_documents,
    priced_order_from,
    stored_document,
)
from buydesk.orders.model import (
    NewOrder,
    Order,
    Outcome,
    Placeable,
    Placed,
    PricedOrder,
    Refused,
    Replayed,
    new_order_id,
)
from buydesk.orders.pricing import placeable_order, placed_order, price_order
from buydesk.orders.quotes import quote_reader
from buydesk.prices.documents import record_document
from buydesk.prices.model import PriceRecord
from buydesk.times import utc_now
from tests.builders import at, new_order, order_quote, priced_order, quoted_order, record, settings

Document = dict[str, Any]
RECORD = record(EUR=4119191 * 10**6, ttl=3600)
visible_ascii = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=255)


def sent(document: Any) -> Any:
    """The document as it arrives on the other side."""
    return msgspec.json.decode(msgspec.json.encode(document))


def item_from(document: object, records: dict[uuid.UUID, PriceRecord]) -> PricedOrder:
    return priced_order_from(document, records, quote_reader(settings()))


def received(documents: list[Document]) -> list[PricedOrder]:
    records: dict[uuid.UUID, PriceRecord] = {}
    return [item_from(document, records) for document in sent(documents)]


def arrived(outcome: Outcome) -> Outcome:
    """The outcome of the example, as it arrives at the other side."""
    return outcome_from(sent(outcome_document(outcome)), EXAMPLE_PRICED_ORDER)


def of_one(**changes: Any) -> Document:
    """The document of a good item, with changes; `...` leaves a member out."""
    [document] = sent(priced_order_documents([priced_order(6900, "k", price=RECORD)]))
    return {name: value for name, value in (document | changes).items() if value is not ...}


@given(
    cents=st.integers(1, AMOUNT_CENTS_MAX),
    rate_e8=st.integers(RATE_E8_MIN, RATE_E8_MAX),
    currency=st.sampled_from(Currency),
    keys=st.tuples(st.none() | visible_ascii, visible_ascii),
    markup_bp=st.integers(0, MARKUP_BP_MAX),
)
def test_any_priced_order_arrives_as_it_was_sent(
    cents: int, rate_e8: int, currency: Currency, keys: tuple[str | None, str], markup_bp: int
) -> None:
    key, client = keys
    order = NewOrder(new_order_id(), client, key, currency, cents, key and "r", key and '{"b":"1","a":"2"}')
    item = price_order(order, record(rate_e8), at(2026, 1, 31, 9, 5, 0, 123456), markup_bp)
    assert received(priced_order_documents([item])) == [item]
    stored = placed_order(item, 1, 1, utc_now(), livemode=False)
    assert order_from(sent(stored_document(stored))) == stored


def test_a_price_record_travels_once_and_is_one_object_again() -> None:
    other = record(rate_e8=30_000 * 10**8)
    items = [
        priced_order(cents, price=price) for cents, price in ((100, RECORD), (200, other), (300, RECORD), (400, other))
    ]
    documents = sent(priced_order_documents(items))
    assert [isinstance(document["price"], str) for document in documents] == [False, False, True, True]
    read = received(documents)
    assert read == items
    assert read[0].price is read[2].price


@pytest.mark.parametrize("problem", [PriceUnavailable("none"), PriceStale("old", retry_after_seconds=5, as_of="then")])
def test_an_item_without_a_price_travels_with_its_problem(problem: DeskError) -> None:
    item = priced_order(100, price=problem)
    [document] = sent(priced_order_documents([item]))
    assert not {"price", "exchange_rate", "bitcoin_amount", "market_rate", "markup_bp"} & set(document)
    [placed] = received([document])
    assert replace(placed, price=problem) == item
    found = placed.price
    assert isinstance(found, type(problem))
    assert (found.detail, found.facts) == (problem.detail, problem.facts)
    assert found.retry_after_seconds == problem.retry_after_seconds


@pytest.mark.parametrize("reference", [None, "r"])
def test_an_order_by_quote_travels_with_its_token(reference: str | None) -> None:
    item = quoted_order(
        order_quote(RECORD, reference=reference), "k", reference=reference or "own", metadata='{"a":"1"}'
    )
    assert received(priced_order_documents([item])) == [item]
    unpriced = price_order(item.order, PriceUnavailable("none"), item.deadline)
    [found] = received(priced_order_documents([unpriced]))
    assert (found.order, found.satoshi) == (item.order, 0)
    placed = placed_order(item, 1, 1, utc_now(), livemode=False)
    assert outcome_from(sent(outcome_document(Placed(placed))), item) == Placed(placed)


def test_a_dry_run_travels_without_an_id_so_that_nobody_takes_it_for_an_order() -> None:
    item = priced_order(order=replace(new_order(100, "k"), dry_run=True), price=RECORD)
    [document] = sent(priced_order_documents([item]))
    assert "id" not in document
    [read] = received([document])
    assert read.order.id != item.order.id
    assert replace(read, order=replace(read.order, id=item.order.id)) == item
    unpriced = priced_order(order=item.order, price=PriceUnavailable("none"))
    [read] = received(priced_order_documents([unpriced]))
    assert read.order.dry_run


def test_what_a_dry_run_would_be_placed_as_arrives_as_it_was_sent() -> None:
    item = priced_order(order=replace(new_order(100, "k"), dry_run=True), price=RECORD, markup_bp=75)
    outcome = Placeable(placeable_order(item, at(2026, 1, 31, 9, 5, 0, 123456), livemode=True))
    document = sent(outcome_document(outcome))
    assert outcome_from(document, item) == outcome
    for other in (priced_order(100, price=RECORD), replace(item, price=PriceUnavailable("none"))):
        with pytest.raises(ValueError, match="must be an order placed, replayed or placeable"):
            outcome_from(document, other)


ORDER = replace(
    EXAMPLE_ORDER,
    client="c",
    client_order_id="k",
    number=2**40,
    client_number=2**39,
    livemode=True,
    representation=7,
    currency=Currency.GBP,
    reference="r",
    metadata='{"b":"\\u00e9","a":"1"}',  # as somebody else's writer of JSON would have it
    market_rate_e8=10**12,
    markup_bp=7,
    quote_id=new_order_id(),
)
CLOSED_AT = at(2026, 1, 31, 9, 5, 0, 123456)
SETTLED = replace(ORDER, status="settled", settlement_reference="bank-7", closed_at=CLOSED_AT)
CANCELLED = replace(ORDER, status="cancelled", reason="why not", closed_at=CLOSED_AT)


@pytest.mark.parametrize(
    "order", [EXAMPLE_ORDER, ORDER, SETTLED, CANCELLED], ids=["placed", "full", "settled", "cancelled"]
)
def test_a_stored_order_arrives_as_it_was_sent(order: Order) -> None:
    assert order_from(sent(stored_document(order))) == order
    assert arrived(Replayed(order)) == Replayed(order)


def test_a_placed_order_is_the_item_with_what_the_ledger_added() -> None:
    order = replace(EXAMPLE_ORDER, number=2**40, client_number=2**39, livemode=True)
    assert arrived(Placed(order)) == Placed(order)


def test_a_refusal_arrives_with_its_facts_and_its_retry_after() -> None:
    problem = ExposureCapExceeded("full", retry_after_seconds=3, cap="1", used="1", available="0")
    outcome = arrived(Refused(problem))
    assert isinstance(outcome, Refused)
    found = outcome.problem
    assert isinstance(found, ExposureCapExceeded)
    assert (found.detail, found.retry_after_seconds, found.facts) == ("full", 3, problem.facts)


def test_the_examples_are_what_they_say() -> None:
    assert received(priced_order_documents([EXAMPLE_PRICED_ORDER])) == [EXAMPLE_PRICED_ORDER]
    assert isinstance(EXAMPLE_PRICED_ORDER.price, PriceRecord)
    rate_e8, satoshi = EXAMPLE_PRICED_ORDER.rate_e8, EXAMPLE_PRICED_ORDER.satoshi
    assert (EXAMPLE_ORDER.rate_e8, EXAMPLE_ORDER.satoshi) == (rate_e8, satoshi)


def changed_price(**changes: Any) -> Document:
    price = of_one()["price"]
    return {name: value for name, value in (price | changes).items() if value is not ...}


BAD_ITEMS: list[tuple[Any, str, str]] = [
    ([], "item", "must be an object"),
    ("x", "item", "must be an object"),
    (None, "item", "must be an object"),
    (of_one(id=...), "id", "is missing"),
    (of_one(id="x"), "id", "must be a UUID"),
    (of_one(id=5), "id", "must be text"),
    (of_one(id=..., dry_run=False), "id", "is missing"),
    (of_one(dry_run="true"), "dry_run", "must be true or false"),
    (of_one(client=...), "client", "is missing"),
    (of_one(client=""), "client", "must be 1 to 255 visible ASCII characters"),
    (of_one(client="a\x00"), "client", "must be 1 to 255 visible ASCII characters"),
    (of_one(client="x" * 256), "client", "must be 1 to 255 visible ASCII characters"),
    (of_one(client=None), "client", "must be text"),
    (of_one(client_order_id=""), "client_order_id", "must be 1 to 255 visible ASCII characters"),
    (of_one(client_order_id="\x00"), "client_order_id", "must be 1 to 255 visible ASCII characters"),
    (of_one(client_order_id="\u00e9"), "client_order_id", "must be 1 to 255 visible ASCII characters"),
    (of_one(client_order_id=7), "client_order_id", "must be text"),
    (of_one(currency=...), "currency", "is missing"),
    (of_one(currency="eur"), "currency", "must be one of EUR, GBP, USD"),
    (of_one(currency=["EUR"]), "currency", "must be text"),
    (of_one(amount=...), "amount", "is missing"),
    (of_one(amount=69), "amount", "must be text"),
    (of_one(amount="0"), "amount", "must be greater than 0"),
    (of_one(amount="0.001"), "amount", "must be a whole number of cents"),
    (of_one(amount="1000000000"), "amount", "must be less than 1000000000"),
    (of_one(amount="9" * 5000), "amount", "must have at most 32 characters"),
    (of_one(reference=""), "reference", "must be 1 to 128 characters without control characters"),
    (of_one(reference=7), "reference", "must be text"),
    (of_one(metadata="[]"), "metadata", "must be an object whose members are text"),
    (of_one(metadata={}), "metadata", "must be text"),
    (of_one(received_at="soon"), "received_at", "must be an ISO 8601 time with a zone"),
    (of_one(representation=0), "representation", "must be at least 1"),
    (of_one(representation=32768), "representation", "must be at most 32767"),
    (of_one(representation="1"), "representation", "must be an integer"),
    (of_one(deadline=...), "deadline", "is missing"),
    (of_one(deadline="soon"), "deadline", "must be an ISO 8601 time with a zone"),
    (of_one(deadline="2026-01-31T09:05:00"), "deadline", "must be an ISO 8601 time with a zone"),
    (of_one(deadline=1700000000), "deadline", "must be text"),
    (of_one(price=...), "price", "is missing"),
    (of_one(price=None), "price", "record: must be an object"),
    (of_one(price="x"), "price", "must be a UUID"),
    (of_one(price=str(uuid.uuid4())), "price", "names a record that no earlier item brought"),
    (of_one(price=changed_price(rates=...)), "price", "rates: is missing"),
    (of_one(price=changed_price(expires_at="never")), "price", "expires_at: must be an ISO 8601 time"),
    (of_one(exchange_rate=...), "exchange_rate", "is missing"),
    (of_one(exchange_rate="41191.92"), "exchange_rate", "must be 41191.91, the record's rate and the markup"),
    (of_one(exchange_rate="41191.90"), "exchange_rate", "must be 41191.91, the record's rate and the markup"),
    (of_one(markup_bp=75), "exchange_rate", "must be 41500.849325, the record's rate and the markup, rounded up"),
    (of_one(market_rate="41191.92"), "market_rate", "is not the rate of the price record"),
    (of_one(market_rate=41191.91), "market_rate", "must be text"),
    (of_one(markup_bp=-1), "markup_bp", "must be at least 0"),
    (of_one(markup_bp=5001), "markup_bp", "must be at most 5000"),
    (of_one(markup_bp="75"), "markup_bp", "must be an integer"),
    (of_one(markup_bp=7.5), "markup_bp", "must be an integer"),
    (of_one(exchange_rate=41191.91), "exchange_rate", "must be text"),
    (of_one(exchange_rate="0"), "exchange_rate", "must be an exchange rate between"),
    (of_one(bitcoin_amount=...), "bitcoin_amount", "is missing"),
    (of_one(bitcoin_amount="0.00167508"), "bitcoin_amount", "must be 0.00167509, the amount at this rate, rounded up"),
    (of_one(bitcoin_amount="0.00167510"), "bitcoin_amount", "must be 0.00167509, the amount at this rate, rounded up"),
    (of_one(bitcoin_amount="1e-3"), "bitcoin_amount", "must be plain decimal text"),
    (of_one(problem=None), "problem", "must be an object"),
    (of_one(problem="price_stale"), "problem", "must be an object"),
    (of_one(problem={"code": "price_stale"}, retry_after_seconds="5"), "retry_after_seconds", "must be an integer"),
    (of_one(problem={"code": "price_stale"}, amount="0"), "amount", "must be greater than 0"),
]


@pytest.mark.parametrize(("document", "member", "reason"), BAD_ITEMS, ids=range(len(BAD_ITEMS)))
def test_what_is_no_priced_order_is_refused_by_name(document: Any, member: str, reason: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        item_from(document, {})
    assert raised.value.detail.startswith(f"{member}: {reason}")
    assert len(raised.value.detail) < 200


def test_equal_values_written_otherwise_are_fine() -> None:
    item = item_from(of_one(amount="6.9e1", exchange_rate="41191.91000000", client_order_id=...), {})
    assert (item.order.amount_cents, item.order.client_order_id) == (6900, None)


def test_an_item_whose_record_has_no_rate_for_its_currency_has_no_price() -> None:
    euros_only = replace(RECORD, rates_e8={Currency.EUR: RECORD.rates_e8[Currency.EUR]})
    item = item_from(of_one(currency="USD", price=sent(record_document(euros_only))), {})
    assert isinstance(item.price, PriceUnavailable)
    assert (item.rate_e8, item.satoshi) == (0, 0)


def test_item_of_an_edge_of_before_is_answered_in_the_first_representation_and_received_now() -> None:
    given = of_one(reference=..., metadata=..., received_at=..., representation=...)
    new = item_from(given, {}).order
    assert (new.reference, new.metadata, new.representation) == (None, None, 1)
    assert abs(utc_now() - new.received_at) < timedelta(seconds=5)


def test_item_of_an_edge_of_before_there_were_markups_is_sold_at_the_market_s_rate() -> None:
    item = item_from(of_one(market_rate=..., markup_bp=...), {})
    assert (item.market_rate_e8, item.markup_bp, item.rate_e8) == (4119191 * 10**6, 0, 4119191 * 10**6)


def test_a_bad_item_brings_its_record_all_the_same() -> None:
    documents = priced_order_documents([priced_order(100, price=RECORD), priced_order(200, price=RECORD)])
    documents[0]["amount"] = "0"
    records: dict[uuid.UUID, PriceRecord] = {}
    first, second = sent(documents)
    with pytest.raises(InvalidRequest, match="amount"):
        item_from(first, records)
    assert item_from(second, records).price == RECORD


def test_a_record_that_comes_again_with_other_rates_changes_nothing() -> None:
    records: dict[uuid.UUID, PriceRecord] = {}
    item_from(of_one(), records)
    with pytest.raises(InvalidRequest, match="price: differs from the record of the same id"):
        item_from(of_one(price=changed_price(rates=dict.fromkeys(Currency, "2.00")), exchange_rate="2.00"), records)


def test_order_in_a_currency_that_the_record_has_no_price_in_is_priced_with_the_reason() -> None:
    rates_e8 = {each: rate for each, rate in RECORD.rates_e8.items() if each != Currency.EUR}
    price = record_document(replace(RECORD, rates_e8=rates_e8, missing={Currency.EUR: "none agree"}))
    item = item_from(of_one(price=price), {})
    assert isinstance(item.price, PriceUnavailable)
    assert item.price.detail == "There is no price in EUR: none agree."
    assert (item.rate_e8, item.satoshi) == (0, 0)


def test_a_copy_of_a_record_that_was_shortened_keeps_its_own_end() -> None:
    records: dict[uuid.UUID, PriceRecord] = {}
    item_from(of_one(), records)
    shortened = replace(RECORD, expires_at=RECORD.expires_at - timedelta(seconds=30))
    copy = item_from(of_one(price=record_document(shortened)), records)
    assert copy.price == shortened


GOOD = sent(outcome_document(Replayed(EXAMPLE_ORDER)))
PLACED = sent(outcome_document(Placed(EXAMPLE_ORDER)))
REFUSED = sent(outcome_document(Refused(PriceStale("old"))))


def order_changes() -> list[Any]:
    """The good answer with each member of its order missing, and of each other type."""
    order: Document = GOOD["order"]
    others: list[Any] = [None, 5.5, [], {}, "x"]
    good = [(name, value) for name in ("client_order_id", "reference", "metadata_text") for value in (None, "x")]
    good += [("client", "x"), ("quote_id", None)]
    # The metadata are read as text, and an order of which nothing is said is accepted.
    needed = [name for name in order if name not in ("metadata", "status")]
    missing = [{name: value for name, value in order.items() if name != gone} for gone in needed]
    changed = [name for name in order if name != "metadata"]
    return [*missing, *(order | {name: value} for name in changed for value in others if (name, value) not in good)]


BAD_OUTCOMES: list[Any] = [
    None, [], "placed", 5, {}, {"outcome": "placed"}, GOOD | {"outcome": "queued"}, GOOD | {"outcome": ["placed"]},
    REFUSED | {"problem": None}, {"outcome": "refused"}, REFUSED | {"retry_after_seconds": "soon"},
    *(GOOD | {"order": order} for order in [None, [], "x", *order_changes()]),
]  # fmt: skip


def test_what_is_no_outcome_is_a_value_error_or_a_lookup_error() -> None:
    for document in BAD_OUTCOMES:
        with pytest.raises((ValueError, LookupError)):
            outcome_from(document, EXAMPLE_PRICED_ORDER)


@pytest.mark.parametrize("member", ["id", "desk_number", "number", "created_at", "livemode"])
def test_what_the_ledger_added_has_to_be_there(member: str) -> None:
    rest = {name: value for name, value in PLACED["order"].items() if name != member}
    for order in (rest, rest | {member: None}, rest | {member: "x"}, rest | {member: 5.5}):
        with pytest.raises((ValueError, LookupError)):
            outcome_from(PLACED | {"order": order}, EXAMPLE_PRICED_ORDER)


@pytest.mark.parametrize("item", [priced_order(6900), replace(EXAMPLE_PRICED_ORDER, price=PriceUnavailable("none"))])
def test_another_order_than_the_one_sent_is_no_outcome(item: PricedOrder) -> None:
    with pytest.raises(ValueError, match="is not the order that was sent"):
        outcome_from(PLACED, item)


def test_deadlines_keep_their_microseconds() -> None:
    item = priced_order(100, price=RECORD)
    item = replace(item, deadline=item.deadline.replace(microsecond=1) + timedelta(days=3000))
    assert received(priced_order_documents([item])) == [item]
    assert new_order().id != item.order.id
