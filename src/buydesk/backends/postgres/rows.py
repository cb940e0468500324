"""Orders between this program and PostgreSQL: the arguments and the rows of the named queries."""

import uuid
from collections.abc import Sequence
from datetime import UTC, datetime, time, timedelta
from functools import lru_cache
from typing import Any, NamedTuple

import asyncpg
import msgspec
from msgspec.structs import replace

from buydesk.errors import (
    ClientCapExceeded,
    ClockSkewed,
    DailyLimitExceeded,
    DeskError,
    ExposureCapExceeded,
    IdempotencyKeyReused,
    OrderTooLarge,
    Paused,
)
from buydesk.money import CURRENCIES, format_btc, format_cents
from buydesk.orders.model import (
    Exposure,
    NewOrder,
    Order,
    Outcome,
    Placeable,
    Placed,
    PricedOrder,
    Refused,
    Replayed,
    is_repeat,
)
from buydesk.orders.pricing import placeable_order, placed_order
from buydesk.prices.documents import record_document
from buydesk.prices.model import PriceRecord, stale
from buydesk.times import format_time

PAUSED_RETRY_SECONDS = 5
_FIELDS = len(Order.__struct_fields__)
_CURRENCY = Order.__struct_fields__.index("currency")


def place_arguments(items: Sequence[PricedOrder], window: tuple[float, float]) -> tuple[Any, ...]:
    """The arguments of place_orders, one list a column, as text where text is safe. A slot is the place, from 1, of the
    first of equal things.

    `window` are the Unix times, by our clock, between which the ledger's clock has to be.
    """
    # Sorted as PostgreSQL does by the bytes of their UTF-8.
    client_slots = {name: slot for slot, name in enumerate(sorted({item.order.client for item in items}), 1)}
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
                client_slots[new.client],
                key,
                new.currency,
                new.amount_cents,
                item.rate_e8,
                item.satoshi,
                item.deadline.timestamp(),
                new.received_at.timestamp(),
                new.representation,
                new.reference,
                new.metadata,
                price_slot,
                id_slots.setdefault(new.id, place),
                key_slot,
            )
        )
    prices = [(record.id, record.as_of, record.expires_at, _signed_text(record)) for _, record in records.values()]
    price_columns = zip(*prices, strict=True) if prices else ((),) * 4
    ids, slots, keys, *numeric, references, metadatas, price_slots, ids_first, keys_first = map(
        list, zip(*rows, strict=True)
    )
    return (
        _array_text(ids),
        _array_text(slots),
        keys,
        *map(_array_text, numeric),
        _unless_none(references),
        _unless_none(metadatas),
        *map(_array_text, (price_slots, ids_first, keys_first)),
        list(client_slots),
        *map(list, price_columns),
        *window,
        *_markup_columns(items),
        _array_text([item.order.dry_run for item in items]) if any(item.order.dry_run for item in items) else None,
    )


def _markup_columns(items: Sequence[PricedOrder]) -> tuple[str | None, str | None]:
    """The market's rates and the markups. Where nothing is added to any rate it is the market's, and costs nothing."""
    if not any(item.markup_bp for item in items):
        return None, None
    return _array_text([item.market_rate_e8 for item in items]), _array_text([item.markup_bp for item in items])


def _unless_none(texts: list[Any]) -> list[Any] | None:
    """A column in which no row has anything costs nothing: elements of NULL are NULL."""
    return texts if any(text is not None for text in texts) else None


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


class Judged(NamedTuple):
    """What place_orders said of one item."""

    kind: str
    number: int | None
    client_number: int | None
    used: int | None
    limit: int | None


def judged(row: asyncpg.Record) -> list[Judged]:
    """What place_orders said of each item."""
    columns = (row[name] for name in ("outcomes", "numbers", "client_numbers", "used_then", "limits_then"))
    return list(map(Judged, *columns))


def outcome_of(item: PricedOrder, said: Judged, row: asyncpg.Record, stored: dict[int, Order]) -> Outcome:
    """What place_orders said of one item; `stored` are the orders that the batch repeats, by number."""
    new = item.order
    match said.kind, item.price:
        case "placed", _:
            assert said.number is not None  # noqa: S101  # the function numbers what it places, twice
            assert said.client_number is not None  # noqa: S101
            return Placed(placed_order(item, said.number, said.client_number, row["moment"], row["is_live"]))
        case "placeable", _:
            return Placeable(placeable_order(item, row["moment"], row["is_live"]))
        case "repeat", _:
            assert said.number is not None  # noqa: S101  # and says which order is repeated
            order = stored[said.number]
            if is_repeat(new, order):
                return Replayed(order)
            detail = "The key belongs to an order with another currency, amount, reference or metadata."
            return Refused(IdempotencyKeyReused(detail), by_ledger=True)
        case "expired", PriceRecord() as record:
            return Refused(stale(record.as_of, record.expires_at), by_ledger=True)
        case "unpriced", DeskError() as error:
            return Refused(error, by_ledger=True)
        # A pause may end, and limits may be raised, while an earlier sending is still on its way.
        case "paused", _:
            return Refused(Paused("The desk is paused by its operator.", retry_after_seconds=PAUSED_RETRY_SECONDS))
        case "over_day", _:
            return Refused(_over_day(new, said, row["moment"]))
        case "too_large" | "over_client_cap" | "over_cap", _:
            return Refused(_over_limit(said))
    # After its deadline nobody waits for an order, unless clocks differ. It proves nothing of an earlier sending: that
    # one may have come while the clocks agreed, or come when they do again.
    detail = f"The clocks differ: at the ledger it is {format_time(row['moment'])}, and not when this order was sent."
    return Refused(ClockSkewed(detail, retry_after_seconds=5))


def _over_day(new: NewOrder, said: Judged, moment: datetime) -> DailyLimitExceeded:
    limit, used = said.limit or 0, said.used or 0
    next_day = datetime.combine(moment.astimezone(UTC).date() + timedelta(days=1), time(), UTC)
    left = format_cents(max(0, limit - used))
    return DailyLimitExceeded(
        f"Only {new.currency} {left} can still be bought today by this client.",
        currency=new.currency.value,
        limit=format_cents(limit),
        used=format_cents(used),
        available=left,
        resets_at=format_time(next_day),
    )


def _over_limit(said: Judged) -> DeskError:
    limit_satoshi = said.limit or 0
    if said.kind == "too_large":
        largest = format_btc(limit_satoshi)
        return OrderTooLarge(f"An order may be of {largest} BTC at most.", bitcoin_amount_max=largest)
    exposure = Exposure(limit_satoshi, said.used or 0, 0)
    room = exposure.facts()["available"]
    if said.kind == "over_client_cap":
        return ClientCapExceeded(f"Only {room} BTC can still be bought below this client's cap.", **exposure.facts())
    return ExposureCapExceeded(f"Only {room} BTC can still be sold.", **exposure.facts())
