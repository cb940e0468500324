"""Orders: what is asked for, what is stored, what placing can end in; the port OrderLedger.

An order's JSON never changes: each stored order keeps the version of its representation, and a repeated request is
answered with the bytes of the first answer.
"""

import secrets
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from buydesk.errors import DeskError
from buydesk.money import Currency, format_btc, format_cents, format_rate, satoshi_for
from buydesk.prices import PriceRecord
from buydesk.times import format_time

REPRESENTATION = 1
ANONYMOUS = "anonymous"
PAGE_SIZE_MAX = 1000
NUMBER_MAX = 2**63 - 1


@dataclass(frozen=True, slots=True)
class NewOrder:
    """An order as its client asked for it. `id` is minted where the order enters; `client_order_id` is the client's
    idempotency key, if it gave one, unique per `client`."""

    id: uuid.UUID
    client: str
    client_order_id: str | None
    currency: Currency
    amount_cents: int


@dataclass(frozen=True, slots=True)
class Placement:
    """An order to place, with the price record it is to be priced with or, when there is none, the problem."""

    order: NewOrder
    price: PriceRecord | DeskError


@dataclass(frozen=True, slots=True)
class Order:
    """A stored order. `number` counts 1, 2, 3 … without gaps in the order of commit."""

    number: int
    id: uuid.UUID
    created_at: datetime
    client: str
    client_order_id: str | None
    currency: Currency
    amount_cents: int
    rate_e8: int
    satoshi: int
    price_id: uuid.UUID
    price_as_of: datetime
    livemode: bool
    representation: int = REPRESENTATION


@dataclass(frozen=True, slots=True)
class Placed:
    order: Order


@dataclass(frozen=True, slots=True)
class Replayed:
    """The request was placed before, as this order."""

    order: Order


@dataclass(frozen=True, slots=True)
class Refused:
    problem: DeskError


Outcome = Placed | Replayed | Refused


@dataclass(frozen=True, slots=True)
class Exposure:
    """What the desk has sold against its cap, in satoshi."""

    cap_satoshi: int
    used_satoshi: int
    orders: int

    def facts(self) -> dict[str, str]:
        """The room under the cap as JSON members, BTC as decimal text."""
        return {
            "cap": format_btc(self.cap_satoshi),
            "used": format_btc(self.used_satoshi),
            "available": format_btc(max(0, self.cap_satoshi - self.used_satoshi)),
        }


@dataclass(frozen=True, slots=True)
class PageFrom:
    """A page that leaves out the `start` newest orders."""

    start: int


@dataclass(frozen=True, slots=True)
class PageBefore:
    """The page of the highest numbers below `number`."""

    number: int


@dataclass(frozen=True, slots=True)
class PageAfter:
    """The page of the lowest numbers above `number`."""

    number: int


Anchor = PageFrom | PageBefore | PageAfter


@dataclass(frozen=True, slots=True)
class Page:
    """Orders, newest first; `total` counts all stored orders at the moment of reading."""

    orders: Sequence[Order]
    total: int


class OrderLedger(Protocol):
    """The one place where orders are stored, each once, below the cap."""

    async def place(self, items: Sequence[Placement], timeout_seconds: float) -> Sequence[Outcome]:
        """Settles the items as if they were sent one by one in this order; one outcome each.

        Repeats by id or by key come first, then IdempotencyKeyReused, then the item's own price problem, PriceStale
        (by the ledger's clock), then the cap (ExposureCapExceeded). Placed means committed to disk.

        Raises LedgerUnavailable or Overloaded: certainly nothing was stored. Raises OutcomeUnknown: the whole batch
        may or may not be stored; sending the same items again settles it.
        """
        ...

    async def page(self, anchor: Anchor, page_size: int) -> Page:
        """Up to `page_size` orders, newest first, in the same time for every anchor; raises LedgerUnavailable."""
        ...

    async def order(self, order_id: uuid.UUID) -> Order:
        """Raises OrderNotFound, LedgerUnavailable."""
        ...

    async def order_by_key(self, client: str, client_order_id: str) -> Order:
        """Raises OrderNotFound, LedgerUnavailable."""
        ...

    async def exposure(self) -> Exposure:
        """Raises LedgerUnavailable."""
        ...

    async def price_record(self, price_id: uuid.UUID) -> PriceRecord:
        """The record an order was priced with; raises PriceNotFound, LedgerUnavailable."""
        ...

    async def check(self) -> None:
        """Raises LedgerUnavailable when orders cannot be stored."""
        ...

    async def close(self) -> None: ...


def new_order_id() -> uuid.UUID:
    """A UUID of version 7 (RFC 9562, section 5.7): random, and close in time is close in the index."""
    unix_ms = time.time_ns() // 1_000_000
    random = secrets.randbits(74)
    return uuid.UUID(int=unix_ms << 80 | 0x7 << 76 | (random >> 62) << 64 | 0b10 << 62 | random & (1 << 62) - 1)


def priced(placement: Placement) -> tuple[PriceRecord, int, int]:
    """The record, `rate_e8` and satoshi at which a placement is to be stored; raises the placement's price problem."""
    if isinstance(placement.price, DeskError):
        raise placement.price
    rate_e8 = placement.price.rates_e8[placement.order.currency]
    return placement.price, rate_e8, satoshi_for(placement.order.amount_cents, rate_e8)


def order_document(order: Order) -> dict[str, object]:
    """The order as its clients see it: representation 1."""
    return {
        "id": str(order.id),
        "number": order.number,
        "created_at": format_time(order.created_at),
        "currency": order.currency.value,
        "amount": format_cents(order.amount_cents),
        "exchange_rate": format_rate(order.rate_e8),
        "bitcoin_amount": format_btc(order.satoshi),
        "client_order_id": order.client_order_id,
        "price_id": str(order.price_id),
        "price_as_of": format_time(order.price_as_of),
        "livemode": order.livemode,
    }
