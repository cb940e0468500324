"""Orders between services: priced orders, outcomes and stored orders as JSON. db_proxy's `POST /add/` takes and
gives them.

A price record travels with the first item that uses it; later items of the same list name it by its id. Documents leave
here for msgspec, which writes ids and times as text by itself, faster than they could be made text before.
"""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import msgspec

from buydesk.errors import DeskError, InvalidRequest, problem, rebuild
from buydesk.money import format_btc, format_cents, format_rate, parse_amount, parse_btc, parse_rate
from buydesk.orders.model import (
    NewOrder,
    Order,
    OrderDocument,
    Outcome,
    Placed,
    PricedOrder,
    Refused,
    Replayed,
    order_document,
    parse_key,
)
from buydesk.orders.pricing import placed_order, price_order
from buydesk.prices.documents import record_document, record_from
from buydesk.prices.model import PriceRecord
from buydesk.reading import read_boolean, read_currency, read_id, read_integer, read_object, read_text, read_time


def priced_order_documents(items: Sequence[PricedOrder]) -> list[dict[str, object]]:
    """The items as a JSON list for `POST /add/`."""
    sent: set[uuid.UUID] = set()
    documents = []
    for item in items:
        document: dict[str, object] = {
            "id": item.order.id,
            "client": item.order.client,
            "client_order_id": item.order.client_order_id,
            "currency": item.order.currency.value,
            "amount": format_cents(item.order.amount_cents),
            "deadline": item.deadline,
        }
        if isinstance(item.price, DeskError):
            document |= _problem_document(item.price)
        else:
            record = item.price
            document["exchange_rate"] = format_rate(item.rate_e8)
            document["bitcoin_amount"] = format_btc(item.satoshi)
            document["price"] = record.id if record.id in sent else _price_document(record)
            sent.add(record.id)
        documents.append(document)
    return documents


def priced_order_from(document: object, records: dict[uuid.UUID, PriceRecord]) -> PricedOrder:
    """The priced order of one document; `records` collects the price records of the list's earlier items.

    Raises InvalidRequest for anything that is not one, a bitcoin amount that is not what its rate gives included.
    """
    if not isinstance(document, dict):
        raise InvalidRequest.of("item", "must be an object")
    member = "problem" if "problem" in document else "price"
    try:
        # First, because later items may name its record, whatever else is wrong with this one.
        price = _problem(document) if member == "problem" else _record(document[member], records)
        member = "id"
        order_id = read_id(document[member])
        member = "client"
        client = _name(document[member])
        member = "client_order_id"
        client_order_id = None if document.get(member) is None else _name(document[member])
        member = "currency"
        currency = read_currency(document[member])
        member = "amount"
        order = NewOrder(order_id, client, client_order_id, currency, parse_amount(read_text(document[member])))
        member = "deadline"
        item = price_order(order, price, read_time(document[member]))
        if isinstance(item.price, PriceRecord):
            member = "exchange_rate"
            if parse_rate(read_text(document[member])) != item.rate_e8:
                raise ValueError("is not the rate of the price record")
            member = "bitcoin_amount"
            given = read_text(document[member])
            if given != format_btc(item.satoshi) and parse_btc(given) != item.satoshi:
                raise ValueError(f"must be {format_btc(item.satoshi)}, the amount at this rate, rounded up")
    except KeyError as error:
        raise InvalidRequest.of(member, "is missing") from error
    except ValueError as error:
        raise InvalidRequest.of(member, str(error)) from error
    return item


def outcome_document(outcome: Outcome) -> dict[str, object]:
    """One result of `POST /add/`."""
    if isinstance(outcome, Refused):
        return {"outcome": "refused", "by_ledger": outcome.by_ledger, **_problem_document(outcome.problem)}
    kind = "placed" if isinstance(outcome, Placed) else "replayed"
    return {"outcome": kind, "order": stored_document(outcome.order)}


def outcome_from(document: object, item: PricedOrder) -> Outcome:
    """The outcome of the item that `outcome_document` wrote; raises ValueError or LookupError for anything else."""
    outcome = read_object(document)
    match outcome["outcome"]:
        case "refused":
            return Refused(_problem(outcome), by_ledger=outcome.get("by_ledger") is True)
        case "placed":
            return Placed(_placed(read_object(outcome["order"]), item))
        case "replayed":
            return Replayed(order_from(outcome["order"]))
    raise ValueError("must be placed, replayed or refused")


class StoredDocument(OrderDocument, frozen=True, gc=False):
    """A stored order for the other services: what clients see, and what they do not."""

    client: str
    representation: int


def stored_document(order: Order) -> StoredDocument:
    """A stored order for the other services."""
    shown = msgspec.structs.asdict(order_document(order))
    return StoredDocument(**shown, client=order.client, representation=order.representation)


def _placed(order: dict[str, object], item: PricedOrder) -> Order:
    """The item as it was stored. db_proxy refuses an item whose money differs from its price, so that only what the
    ledger added to it has to be read."""
    if read_id(order["id"]) != item.order.id or not isinstance(item.price, PriceRecord):
        raise ValueError("is not the order that was sent")
    number, created_at = read_integer(order["number"]), read_time(order["created_at"])
    return placed_order(item, number, created_at, read_boolean(order["livemode"]))


def order_from(document: object) -> Order:
    """The order that `stored_document` wrote; raises ValueError or LookupError for anything else."""
    order = read_object(document)
    key = order["client_order_id"]
    return Order(
        number=read_integer(order["number"]),
        id=read_id(order["id"]),
        created_at=read_time(order["created_at"]),
        client=read_text(order["client"]),
        client_order_id=None if key is None else read_text(key),
        currency=read_currency(order["currency"]),
        amount_cents=parse_amount(read_text(order["amount"])),
        rate_e8=parse_rate(read_text(order["exchange_rate"])),
        satoshi=parse_btc(read_text(order["bitcoin_amount"])),
        price_id=read_id(order["price_id"]),
        price_as_of=read_time(order["price_as_of"]),
        livemode=read_boolean(order["livemode"]),
        representation=read_integer(order["representation"]),
    )


def _problem_document(error: DeskError) -> dict[str, object]:
    return {"problem": problem(error, "/add/"), "retry_after_seconds": error.retry_after_seconds}


def _problem(document: Mapping[str, object]) -> DeskError:
    """The error that `_problem_document` wrote into the document."""
    retry_after = document.get("retry_after_seconds")
    return rebuild(read_object(document["problem"]), None if retry_after is None else read_integer(retry_after))


# For 15 seconds every list of orders brings the same record. To write it takes as long as to write ten orders, and to
# read it as long as to read six.
@lru_cache(maxsize=8)
def _price_document(record: PriceRecord) -> dict[str, object]:
    return record_document(record)


@lru_cache(maxsize=8)
def _record_from(document: bytes) -> PriceRecord:
    return record_from(msgspec.json.decode(document))


def _record(price: object, records: dict[uuid.UUID, PriceRecord]) -> PriceRecord:
    if isinstance(price, str):
        record = records.get(read_id(price))
        if record is None:
            raise ValueError("names a record that no earlier item brought")
        return record
    record = _record_from(msgspec.json.encode(price))
    known = records.setdefault(record.id, record)
    # A copy may have been shortened since; in all else a record never changes.
    if replace(known, expires_at=record.expires_at) != record:
        raise ValueError("differs from the record of the same id that an earlier item brought")
    return record


def _name(value: object) -> str:
    return parse_key(read_text(value))
