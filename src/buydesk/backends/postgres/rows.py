"""Orders between this program and PostgreSQL: the arguments and the rows of the named queries."""

import uuid
from collections.abc import Sequence
from datetime import UTC, datetime, time, timedelta
from typing import Any, NamedTuple

import asyncpg
import msgspec

from buydesk.backends.postgres.prices import signed_text
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
from buydesk.orders.quotes import OrderQuote, expired
from buydesk.prices.model import PriceRecord, stale
from buydesk.times import format_time

PAUSED_RETRY_SECONDS = 5
_FIELDS = len(Order.__struct_fields__)
_CURRENCY = Order.__struct_fields__.index("currency")


def place_arguments(items: Sequence[PricedOrder], window: tuple[float, float]) -> tuple[Any, ...]:
    """The arguments of place_items, one list a column, as text where text is safe. A slot is the place, from 1, of the
    first of equal things; items by one quote are equal, whatever their ids.

    `window` are the Unix times, by our clock, between which the ledger's clock has to be.
    """
    # Sorted as PostgreSQL does by the bytes of their UTF-8.
    client_slots = {name: slot for slot, name in enumerate(sorted({item.order.client for item in items}), 1)}
    id_slots: dict[uuid.UUID, int] = {}
    key_slots: dict[tuple[str, str], int] = {}
    # By the end of its validity too: a copy of a record that was shortened later must not live as long as the first.
    # Quotes have ends of their own, and a record that is stored.
    prices: dict[tuple[uuid.UUID, datetime, bool], tuple[int, PriceRecord | OrderQuote]] = {}
    rows = []
    for place, item in enumerate(items, 1):
        new = item.order
        price_slot = 0
        if isinstance(item.price, PriceRecord):
            copy = item.price.id, item.price.expires_at, False
            price_slot, _ = prices.setdefault(copy, (len(prices) + 1, item.price))
        elif isinstance(item.price, OrderQuote):
            copy = item.price.price_id, item.price.expires_at, True
            price_slot, _ = prices.setdefault(copy, (len(prices) + 1, item.price))
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
                id_slots.setdefault(new.id if new.quote is None else new.quote.id, place),
                key_slot,
            )
        )
    price_columns = zip(*(_price_row(price) for _, price in prices.values()), strict=True) if prices else ((),) * 4
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
        *_quote_columns(items),
    )


def _price_row(price: PriceRecord | OrderQuote) -> tuple[uuid.UUID, datetime, datetime, str | None]:
    """A price's id, when it was observed, when it ends, and its document, if that has to be brought."""
    if isinstance(price, OrderQuote):
        return price.price_id, price.price_as_of, price.expires_at, None
    return price.id, price.as_of, price.expires_at, signed_text(price)


def _markup_columns(items: Sequence[PricedOrder]) -> tuple[str | None, str | None]:
    """The market's rates and the markups. Where nothing is added to any rate it is the market's, and costs nothing."""
    if not any(item.markup_bp for item in items):
        return None, None
    return _array_text([item.market_rate_e8 for item in items]), _array_text([item.markup_bp for item in items])


def _quote_columns(items: Sequence[PricedOrder]) -> tuple[str | None, list[datetime | None] | None]:
    """The quotes' ids, and when they were given; nothing where there are none."""
    quotes = [item.order.quote for item in items]
    if not any(quotes):
        return None, None
    ids = [None if quote is None else quote.id for quote in quotes]
    return _array_text(ids), [None if quote is None else quote.quoted_at for quote in quotes]


def _unless_none(texts: list[Any]) -> list[Any] | None:
    """A column in which no row has anything costs nothing: elements of NULL are NULL."""
    return texts if any(text is not None for text in texts) else None


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
    """What place_items said of one item."""

    kind: str
    number: int | None
    client_number: int | None
    used: int | None
    limit: int | None


def judged(row: asyncpg.Record) -> list[Judged]:
    """What place_items said of each item."""
    columns = (row[name] for name in ("outcomes", "numbers", "client_numbers", "used_then", "limits_then"))
    return list(map(Judged, *columns))


def outcome_of(item: PricedOrder, said: Judged, row: asyncpg.Record, stored: dict[int, Order]) -> Outcome:
    """What place_items said of one item; `stored` are the orders that the batch repeats, by number."""
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
            if new.quote is not None or order.quote_id is not None:
                detail = "The key or the quote belongs to an order with another key, quote, reference or metadata."
            return Refused(IdempotencyKeyReused(detail), by_ledger=True)
        case "expired", PriceRecord() as record:
            return Refused(stale(record.as_of, record.expires_at), by_ledger=True)
        case "expired", OrderQuote() as quote:
            return Refused(expired(quote), by_ledger=True)
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
