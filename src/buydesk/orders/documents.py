"""Orders between services: priced orders, outcomes and stored orders as JSON. db_proxy's `POST /add/` takes and
gives them.

A price record travels with the first item that uses it; later items of the same list name it by its id. Documents leave
here for msgspec, which writes ids and times as text by itself, faster than they could be made text before.
"""

import uuid
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Annotated, Any

import msgspec
from msgspec.structs import replace

from buydesk.errors import DeskError, InvalidRequest, QuoteInvalid, problem, rebuild
from buydesk.money import MARKUP_BP_MAX, Currency, format_btc, format_cents, format_rate, parse_btc
from buydesk.orders.model import (
    Exposure,
    Key,
    Metadata,
    NewOrder,
    Order,
    Outcome,
    Page,
    Placeable,
    Placed,
    PricedOrder,
    Reference,
    Refused,
    Replayed,
    new_order_id,
)
from buydesk.orders.pricing import placeable_order, placed_order, price_order
from buydesk.orders.quotes import OrderQuote
from buydesk.orders.representations import OrderDocument, order_document
from buydesk.prices.documents import record_document, record_from
from buydesk.prices.model import PriceRecord
from buydesk.reading import Cents, Moment, RateE8, SaleRateE8, Satoshi, WrongMember, read
from buydesk.times import utc_now


def priced_order_documents(items: Sequence[PricedOrder]) -> list[dict[str, object]]:
    """The items as a JSON list for `POST /add/`."""
    sent: set[uuid.UUID] = set()
    documents = []
    for item in items:
        document: dict[str, object] = {
            "client": item.order.client,
            "client_order_id": item.order.client_order_id,
            "currency": item.order.currency.value,
            "amount": format_cents(item.order.amount_cents),
            "reference": item.order.reference,
            "metadata": item.order.metadata,
            "received_at": item.order.received_at,
            "representation": item.order.representation,
            "deadline": item.deadline,
        }
        # Who does not know dry runs must not take one for an order: without an id it is none.
        document |= {"dry_run": True} if item.order.dry_run else {"id": item.order.id}
        if item.order.quote is not None:
            document["quote"] = item.order.quote.token
        if isinstance(item.price, DeskError):
            document |= _problem_document(item.price)
        elif isinstance(item.price, PriceRecord):
            record = item.price
            document["market_rate"] = format_rate(item.market_rate_e8)
            document["markup_bp"] = item.markup_bp
            document["exchange_rate"] = format_rate(item.rate_e8)
            document["bitcoin_amount"] = format_btc(item.satoshi)
            document["price"] = record.id if record.id in sent else _price_document(record)
            sent.add(record.id)
        documents.append(document)
    return documents


# The column is a smallint.
Representation = Annotated[int, msgspec.Meta(ge=1, le=32767)]


class _Item(msgspec.Struct):
    """What every item of `priced_order_documents` has. An edge from before there was more than one representation says
    neither which it answers in nor when it received the request."""

    client: Key
    currency: Currency
    amount: Cents
    deadline: Moment
    id: uuid.UUID | msgspec.UnsetType = msgspec.UNSET
    dry_run: bool = False
    client_order_id: Key | None = None
    reference: Reference | None = None
    metadata: Metadata | None = None
    received_at: Moment | None = None
    representation: Representation = 1


class _PricedItem(_Item, kw_only=True):
    """An edge from before markups sends neither the market rate nor the markup: it sells at the market rate."""

    exchange_rate: SaleRateE8
    bitcoin_amount: Satoshi
    market_rate: RateE8 | None = None
    markup_bp: Annotated[int, msgspec.Meta(ge=0, le=MARKUP_BP_MAX)] = 0


class _UnpricedItem(_Item, kw_only=True):
    problem: dict[str, Any]
    retry_after_seconds: int | None = None


def priced_order_from(
    document: object, records: dict[uuid.UUID, PriceRecord], quote_of: Callable[[str], OrderQuote]
) -> PricedOrder:
    """The priced order of one document; `records` collects the price records of the list's earlier items. `quote_of`
    reads a quote's token: what its figures are, the token alone says.

    Raises InvalidRequest for anything that is not one, a bitcoin amount that is not what its rate gives included.
    """
    if not isinstance(document, dict):
        raise InvalidRequest.of("item", "must be an object")
    try:
        quote = _quote(document["quote"], quote_of) if "quote" in document else None
        if "problem" in document:
            unpriced = read(_UnpricedItem, document)
            return _priced(unpriced, rebuild(unpriced.problem, unpriced.retry_after_seconds), quote=quote)
        if quote is not None:
            return _priced(read(_Item, document), quote, quote=quote)
        # First, because later items may name its record, whatever else is wrong with this one.
        if "price" not in document:
            raise WrongMember("price", "is missing")
        price = _record(document["price"], records)
        item = read(_PricedItem, document)
        priced = _priced(item, price, item.markup_bp)
        if isinstance(priced.price, PriceRecord):
            if item.market_rate not in (None, priced.market_rate_e8):
                raise WrongMember("market_rate", "is not the rate of the price record")
            if item.exchange_rate != priced.rate_e8:
                rate = format_rate(priced.rate_e8)
                raise WrongMember("exchange_rate", f"must be {rate}, the record's rate and the markup, rounded up")
            if item.bitcoin_amount != priced.satoshi:
                amount = format_btc(priced.satoshi)
                raise WrongMember("bitcoin_amount", f"must be {amount}, the amount at this rate, rounded up")
    except WrongMember as error:
        raise InvalidRequest.of(error.member, error.reason) from error
    return priced


def _quote(token: object, quote_of: Callable[[str], OrderQuote]) -> OrderQuote:
    try:
        return quote_of(read(str, token))
    except (WrongMember, QuoteInvalid) as error:
        raise WrongMember("quote", error.reason if isinstance(error, WrongMember) else error.detail) from error


def _priced(
    item: _Item, price: PriceRecord | OrderQuote | DeskError, markup_bp: int = 0, quote: OrderQuote | None = None
) -> PricedOrder:
    if isinstance(item.id, msgspec.UnsetType) and not item.dry_run:
        raise WrongMember("id", "is missing")
    if quote is not None:
        said = (quote.client, quote.currency, quote.amount_cents, quote.reference or item.reference)
        if said != (item.client, item.currency, item.amount, item.reference):
            raise WrongMember("quote", "says something else than the item")
    order = NewOrder(
        new_order_id() if isinstance(item.id, msgspec.UnsetType) else item.id,
        item.client,
        item.client_order_id,
        item.currency,
        item.amount,
        item.reference,
        item.metadata,
        utc_now() if item.received_at is None else item.received_at,
        item.representation,
        item.dry_run,
        quote,
    )
    return price_order(order, price, item.deadline, markup_bp)


def outcome_document(outcome: Outcome) -> dict[str, object]:
    """One result of `POST /add/`."""
    if isinstance(outcome, Refused):
        return {"outcome": "refused", "by_ledger": outcome.by_ledger, **_problem_document(outcome.problem)}
    if isinstance(outcome, Placeable):
        order = outcome.order
        return {"outcome": "placeable", "created_at": order.created_at, "livemode": order.livemode}
    kind = "placed" if isinstance(outcome, Placed) else "replayed"
    return {"outcome": kind, "order": stored_document(outcome.order)}


class _AddedByLedger(msgspec.Struct):
    """What a placed order has that the sender of its item does not know."""

    id: uuid.UUID
    desk_number: int
    number: int
    created_at: Moment
    livemode: bool


class _AddedToDryRun(msgspec.Struct):
    """The same of an order that would be placed."""

    created_at: Moment
    livemode: bool


class _Refusal(msgspec.Struct):
    problem: dict[str, Any]
    retry_after_seconds: int | None = None
    by_ledger: bool = False


def outcome_from(document: object, item: PricedOrder) -> Outcome:
    """The outcome of the item that `outcome_document` wrote; raises ValueError for anything else."""
    match document:
        case {"outcome": "placed", "order": order}:
            # db_proxy refuses an item whose money differs from its price: only what the ledger added has to be read.
            added = read(_AddedByLedger, order)
            if added.id == item.order.id and not isinstance(item.price, DeskError):
                return Placed(placed_order(item, added.desk_number, added.number, added.created_at, added.livemode))
            raise ValueError("is not the order that was sent")
        case {"outcome": "replayed", "order": order}:
            return Replayed(order_from(order))
        case {"outcome": "placeable"} if item.order.dry_run and isinstance(item.price, PriceRecord):
            then = read(_AddedToDryRun, document)
            return Placeable(placeable_order(item, then.created_at, then.livemode))
        case {"outcome": "refused"}:
            refusal = read(_Refusal, document)
            return Refused(rebuild(refusal.problem, refusal.retry_after_seconds), by_ledger=refusal.by_ledger)
    raise ValueError("must be an order placed, replayed or placeable, or a refusal")


class StoredDocument(OrderDocument, frozen=True, gc=False, kw_only=True):
    """A stored order for the other services: what clients see, and what they do not. `metadata_text` is the metadata as
    it was answered, which no reader and writer of JSON may change."""

    desk_number: int
    client: str
    representation: int
    metadata_text: str | None


def stored_document(order: Order) -> StoredDocument:
    """A stored order for the other services."""
    shown = msgspec.structs.asdict(order_document(order))
    return StoredDocument(
        **shown,
        desk_number=order.number,
        client=order.client,
        representation=order.representation,
        metadata_text=order.metadata,
    )


def order_from(document: object) -> Order:
    """The order that `stored_document` wrote; raises WrongMember for anything else."""
    return read(Order, document, "order")


def page_document(page: Page, documents: Sequence[StoredDocument]) -> dict[str, object]:
    """A page, whose orders were made documents, for the other services."""
    return {"data": documents, "total": page.total}


def page_from(document: Any) -> Page:
    """The page that `page_document` wrote."""
    return Page([order_from(each) for each in document["data"]], document["total"])


def exposure_document(exposure: Exposure) -> dict[str, object]:
    """An exposure, for clients too."""
    return exposure.facts() | {"orders": exposure.orders}


def exposure_from(document: Any) -> Exposure:
    """The exposure that `exposure_document` wrote."""
    cap = document["cap"]
    return Exposure(None if cap is None else parse_btc(cap), parse_btc(document["used"]), document["orders"])


def _problem_document(error: DeskError) -> dict[str, object]:
    return {"problem": problem(error, "/add/"), "retry_after_seconds": error.retry_after_seconds}


# For 15 seconds every list of orders brings the same record. To write it takes as long as to write ten orders, and to
# read it as long as to read six.
@lru_cache(maxsize=8)
def _price_document(record: PriceRecord) -> dict[str, object]:
    return record_document(record)


@lru_cache(maxsize=8)
def _record_from(document: bytes) -> PriceRecord:
    return record_from(msgspec.json.decode(document))


def _record(price: object, records: dict[uuid.UUID, PriceRecord]) -> PriceRecord:
    try:
        if isinstance(price, str):
            return records[read(uuid.UUID, price)]
        record = _record_from(msgspec.json.encode(price))
    except KeyError as error:
        raise WrongMember("price", "names a record that no earlier item brought") from error
    except WrongMember as error:
        raise WrongMember("price", error.reason if isinstance(price, str) else str(error)) from error
    known = records.setdefault(record.id, record)
    # A copy may have been shortened since; in all else a record never changes.
    if replace(known, expires_at=record.expires_at) != record:
        raise WrongMember("price", "differs from the record of the same id that an earlier item brought")
    return record
