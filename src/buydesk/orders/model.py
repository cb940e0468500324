"""Orders: what is asked for, what is stored, what placing can end in; the port OrderLedger.

An order's JSON never changes: each stored order keeps the version of its representation, and a repeated request is
answered with the bytes of the first answer.
"""

import re
import secrets
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from buydesk.errors import DeskError
from buydesk.money import Currency, format_btc, format_cents, format_rate
from buydesk.prices.model import PriceRecord
from buydesk.reading import Cents, Moment, RateE8, Satoshi, text_type
from buydesk.times import format_time

REPRESENTATION = 1
ANONYMOUS = "anonymous"
PAGE_SIZE_MAX = 1000
NUMBER_MAX = 2**63 - 1
KEY_CHARS_MAX = 255

_VISIBLE_ASCII = re.compile(r"[\x21-\x7e]+", re.ASCII)


# What every order passes through is a msgspec.Struct: made and written as JSON in a tenth of a dataclass's time.
# Without `gc` are those that can be in no reference cycle; an error can, by its traceback.
class NewOrder(msgspec.Struct, frozen=True, gc=False):
    """An order as its client asked for it. `id` is minted where the order enters; `client_order_id` is the client's
    idempotency key, if it gave one, unique per `client`."""

    id: uuid.UUID
    client: str
    client_order_id: str | None
    currency: Currency
    amount_cents: int


class PricedOrder(msgspec.Struct, frozen=True):
    """An order to place, with the price record it is priced with or, when there is none, the problem.

    `rate_e8` and `satoshi` are what the record makes of it, 0 without a record: `pricing.price_order` is where.

    After `deadline` the ledger, by its own clock, stores it no more: whoever waits for a lost answer can then be sure.
    """

    order: NewOrder
    price: PriceRecord | DeskError
    deadline: datetime
    rate_e8: int
    satoshi: int


_SHOWN_AS = {"amount_cents": "amount", "rate_e8": "exchange_rate", "satoshi": "bitcoin_amount"}


class Order(msgspec.Struct, frozen=True, gc=False, rename=_SHOWN_AS):
    """A stored order. `number` counts 1, 2, 3 … without gaps in the order of commit."""

    number: int
    id: uuid.UUID
    created_at: Moment
    client: str
    client_order_id: str | None
    currency: Currency
    amount_cents: Cents
    rate_e8: RateE8
    satoshi: Satoshi
    price_id: uuid.UUID
    price_as_of: Moment
    livemode: bool
    representation: int


class Placed(msgspec.Struct, frozen=True, gc=False):
    order: Order


class Replayed(msgspec.Struct, frozen=True, gc=False):
    """The request was placed before, as this order."""

    order: Order


class Refused(msgspec.Struct, frozen=True):
    """Not stored. `by_ledger` says that the ledger has looked for the order, under its id and its key, and that what it
    found refuses every sending of it; otherwise an earlier sending may be stored all the same (docs/decisions/0016)."""

    problem: DeskError
    by_ledger: bool = False


Outcome = Placed | Replayed | Refused


@dataclass(frozen=True, slots=True)
class Exposure:
    """What the desk has sold against its cap, in satoshi."""

    cap_satoshi: int
    used_satoshi: int
    orders: int

    def facts(self) -> dict[str, Any]:
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
    """Orders, newest first. `total` counts all stored orders at the moment of reading; only a PageFrom page has it."""

    orders: Sequence[Order]
    total: int | None


class OrderLedger(Protocol):
    """The one place where orders are stored, each once, below the cap.

    `batches_at_once` says how many calls of `place` under way at a time make sense, `place_seconds` how long a call has
    to be allowed for its outcome to be known, however slow the ledger is.
    """

    batches_at_once: int
    place_seconds: float

    async def place(self, items: Sequence[PricedOrder], timeout_seconds: float) -> Sequence[Outcome]:
        """Settles the items as if they were sent one by one in this order; one outcome each.

        Repeats by id or by key come first, then IdempotencyKeyReused, then ClockSkewed (the ledger's clock differs from
        ours, or is past the item's deadline), the item's own price problem, PriceStale, and last the cap
        (ExposureCapExceeded); times are judged by the ledger's clock. Placed means committed to disk, on the standbys
        too where PostgreSQL waits for them.

        Raises LedgerUnavailable or Overloaded: certainly nothing was stored. Raises OutcomeUnknown: the whole batch
        may or may not be stored; sending the same items again settles it.
        """
        ...

    async def page(self, anchor: Anchor, page_size: int) -> Page:
        """Up to `page_size` orders, newest first, in the same time for every anchor; raises LedgerUnavailable or, as
        every read, Overloaded when too many wait."""
        ...

    async def order(self, order_id: uuid.UUID) -> Order:
        """Raises OrderNotFound, LedgerUnavailable.

        What is found, or not found, stays so, but for an order that is placed later than this look-up began.
        """
        ...

    async def order_by_key(self, client: str, client_order_id: str) -> Order:
        """As `order`."""
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


def parse_key(text: str) -> str:
    """The text, which is fit to be a client's name or its key for an order; raises ValueError with the reason."""
    if len(text) > KEY_CHARS_MAX or not _VISIBLE_ASCII.fullmatch(text):
        raise ValueError(f"must be 1 to {KEY_CHARS_MAX} visible ASCII characters")
    return text


if TYPE_CHECKING:
    Key = str
else:
    Key = text_type(parse_key)


def new_order_id() -> uuid.UUID:
    """A UUID of version 7 (RFC 9562, section 5.7): random, and close in time is close in the index."""
    if not _random_bits:
        _random_bits.extend(_fresh_random_bits())
    random = _random_bits.pop()
    unix_ms = time.time_ns() // 1_000_000
    return uuid.UUID(int=unix_ms << 80 | 0x7 << 76 | (random >> 68) << 64 | 0b10 << 62 | random & ((1 << 62) - 1))


# The system's random numbers, 80 bits an id, fetched for many ids at once: the call costs more than the id.
_random_bits: list[int] = []


def _fresh_random_bits(ids: int = 256) -> list[int]:
    fetched = secrets.token_bytes(10 * ids)
    return [int.from_bytes(fetched[at : at + 10], "big") for at in range(0, len(fetched), 10)]


def is_repeat(new: NewOrder, stored: Order) -> bool:
    """Whether the stored order is what `new` asks for: the same currency and cents, under the same key or id."""
    same_request = (new.currency, new.amount_cents) == (stored.currency, stored.amount_cents)
    return same_request and (new.client, new.client_order_id) == (stored.client, stored.client_order_id)


class OrderDocument(msgspec.Struct, frozen=True, gc=False):
    """The order as its clients see it: representation 1, its members in the order in which they are written."""

    id: uuid.UUID
    number: int
    created_at: str
    currency: Currency
    amount: str
    exchange_rate: str
    bitcoin_amount: str
    client_order_id: str | None
    price_id: uuid.UUID
    price_as_of: str
    livemode: bool


def order_document(order: Order) -> OrderDocument:
    """The order as its clients see it; msgspec writes it as JSON."""
    return OrderDocument(
        order.id,
        order.number,
        format_time(order.created_at),
        order.currency,
        format_cents(order.amount_cents),
        format_rate(order.rate_e8),
        format_btc(order.satoshi),
        order.client_order_id,
        order.price_id,
        format_time(order.price_as_of),
        order.livemode,
    )
