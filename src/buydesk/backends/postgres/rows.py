"""Orders between this program and PostgreSQL: the arguments and the rows of the named queries."""

import uuid
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import asyncpg
import msgspec
from msgspec.structs import replace

from buydesk.errors import ClockSkewed, DeskError, ExposureCapExceeded, IdempotencyKeyReused
from buydesk.money import CURRENCIES, format_btc
from buydesk.orders.model import (
    REPRESENTATION,
    Exposure,
    Order,
    Outcome,
    Placed,
    PricedOrder,
    Refused,
    Replayed,
    is_repeat,
)
from buydesk.orders.pricing import placed_order
from buydesk.prices.documents import record_document
from buydesk.prices.model import PriceRecord, stale
from buydesk.times import format_time

_FIELDS = len(Order.__struct_fields__)
_CURRENCY = Order.__struct_fields__.index("currency")


def place_arguments(items: Sequence[PricedOrder], window: tuple[float, float]) -> tuple[Any, ...]:
    """The arguments of place_batch, one list a column, as text where text is safe. A slot is the place, from 1, of the
    first of equal things.

    `window` are the Unix times, by our clock, between which the ledger's clock has to be.
    """
    id_slots: dict[uuid.UUID, int] = {}
    key_slots: dict[tuple[str, str], int] = {}
    # By the end of its validity too: a copy of a record that was shortened later must not live as long as the first.
    records: dict[tuple[uuid.UUID, datetime], tuple[int, PriceRecord]] = {}
    rows = []
    for place, item in enumerate(items, 1):
        new = item.order
        price_slot = 0
        if isinstance(item.price, PriceRecord):
            copy = item.price.id, item.price.expires_at
            price_slot, _ = records.setdefault(copy, (len(records) + 1, item.price))
        key = new.client_order_id
        key_slot = 0 if key is None else key_slots.setdefault((new.client, key), place)
        rows.append(
            (
                new.id,
                new.client,
                key,
                new.currency,
                new.amount_cents,
                item.rate_e8,
                item.satoshi,
                item.deadline.timestamp(),
                price_slot,
                id_slots.setdefault(new.id, place),
                key_slot,
            )
        )
    prices = [(record.id, record.as_of, record.expires_at, _signed_text(record)) for _, record in records.values()]
    price_columns = zip(*prices, strict=True) if prices else ((),) * 4
    ids, clients, keys, *rest = map(list, zip(*rows, strict=True))
    columns = _array_text(ids), clients, keys, *map(_array_text, rest), *map(list, price_columns)
    return *columns, REPRESENTATION, *window


# Batch after batch is priced with the same record.
@lru_cache(maxsize=8)
def _signed_text(record: PriceRecord) -> str:
    """The record as it was signed: a copy that was shortened since has the same text."""
    if record.signature is not None:
        record = replace(record, expires_at=record.signature.expires_at)
    return msgspec.json.encode(record_document(record)).decode()


def _array_text(values: Sequence[object]) -> str:
    """PostgreSQL's text of an array of ids, numbers or currencies. As JSON it differs in the brackets only, and msgspec
    writes it many times faster than asyncpg encodes a list. What clients write differs: JSON has escapes."""
    return f"{{{msgspec.json.encode(values)[1:-1].decode()}}}"


def order_of(row: asyncpg.Record) -> Order:
    """The order of a row that one of the named queries returned: it begins with the order's fields."""
    fields = list(row)[:_FIELDS]
    fields[_CURRENCY] = CURRENCIES[fields[_CURRENCY]]
    return Order(*fields)


def outcome_of(  # noqa: PLR0917
    item: PricedOrder, kind: str, number: int | None, used: int | None, row: asyncpg.Record, stored: dict[int, Order]
) -> Outcome:
    """What place_batch said of one item; `stored` are the orders that the batch repeats, by number."""
    new = item.order
    match kind, item.price:
        case "placed", _:
            assert number is not None  # noqa: S101  # the function numbers what it places
            return Placed(placed_order(item, number, row["moment"], row["is_live"]))
        case "repeat", _:
            assert number is not None  # noqa: S101  # and says which order is repeated
            order = stored[number]
            if is_repeat(new, order):
                return Replayed(order)
            detail = "The key belongs to an order with another currency or amount."
            return Refused(IdempotencyKeyReused(detail), by_ledger=True)
        case "expired", PriceRecord() as record:
            return Refused(stale(record.as_of, record.expires_at), by_ledger=True)
        case "over_cap", _:
            exposure = Exposure(row["cap"], used or 0, 0)
            room = format_btc(exposure.cap_satoshi - exposure.used_satoshi)
            # The cap may be raised while an earlier sending is still on its way.
            return Refused(ExposureCapExceeded(f"Only {room} BTC can still be sold.", **exposure.facts()))
        case "unpriced", DeskError() as error:
            return Refused(error, by_ledger=True)
    # After its deadline nobody waits for an order, unless clocks differ. It proves nothing of an earlier sending: that
    # one may have come while the clocks agreed, or come when they do again.
    detail = f"The clocks differ: at the ledger it is {format_time(row['moment'])}, and not when this order was sent."
    return Refused(ClockSkewed(detail, retry_after_seconds=5))
