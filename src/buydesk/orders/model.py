"""Orders: what is asked for, what is stored, what placing can end in; the port OrderLedger.

What is stored of an order never changes. That it was settled or cancelled is stored beside it.
"""

import json
import re
import secrets
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, Protocol

import msgspec

from buydesk.errors import DeskError
from buydesk.money import Currency, format_btc
from buydesk.orders.quotes import OrderQuote
from buydesk.prices.model import PriceRecord
from buydesk.reading import Cents, Moment, RateE8, SaleRateE8, Satoshi, is_line, parse_line, text_type
from buydesk.times import utc_now

# The shape in which an order that is placed now is answered; `representations` has all there were.
REPRESENTATION = 2
ANONYMOUS = "anonymous"
PAGE_SIZE_MAX = 1000
NUMBER_MAX = 2**63 - 1
KEY_CHARS_MAX = 255
KEY_PATTERN = f"^[!-~]{{1,{KEY_CHARS_MAX}}}$"  # as JSON schemas have it
REFERENCE_CHARS_MAX = 128
METADATA_MEMBERS_MAX = 20
METADATA_BYTES_MAX = 2048

Status = Literal["accepted", "settled", "cancelled"]

_VISIBLE_ASCII = re.compile(r"[\x21-\x7e]+", re.ASCII)


# What every order passes through is a msgspec.Struct: made and written as JSON in a tenth of a dataclass's time.
# Without `gc` are those that can be in no reference cycle; an error can, by its traceback.
class NewOrder(msgspec.Struct, frozen=True, gc=False):
    """An order as its client asked for it. `id` is minted where the order enters; `client_order_id` is the client's
    idempotency key, if it gave one, unique per `client`.

    `reference` and `metadata` are the client's own, the latter as the JSON text that is answered. `representation` is
    the shape that whoever took the request answers in. A `dry_run` is judged as any order and never stored. An order by
    quote is what the `quote` says: its id is a key of the order too, whatever `client_order_id` is.
    """

    id: uuid.UUID
    client: str
    client_order_id: str | None
    currency: Currency
    amount_cents: int
    reference: str | None = None
    metadata: str | None = None
    received_at: datetime = msgspec.field(default_factory=utc_now)
    representation: int = REPRESENTATION
    dry_run: bool = False
    quote: OrderQuote | None = None


class PricedOrder(msgspec.Struct, frozen=True):
    """An order to place, with the price record or the quote it is priced with or, if it cannot be placed at one, the
    problem.

    `market_rate_e8` is that of the record, `markup_bp` what the desk adds to it, and `rate_e8` and `satoshi` follow
    from these, or all are what the quote says; 0 where there is neither: `pricing.price_order` is where.

    After `deadline` the ledger, by its own clock, stores it no more: whoever waits for a lost answer can then be sure.
    """

    order: NewOrder
    price: PriceRecord | OrderQuote | DeskError
    deadline: datetime
    market_rate_e8: int = 0
    markup_bp: int = 0
    rate_e8: int = 0
    satoshi: int = 0


_SHOWN_AS = {
    "number": "desk_number",
    "client_number": "number",
    "amount_cents": "amount",
    "rate_e8": "exchange_rate",
    "satoshi": "bitcoin_amount",
    "market_rate_e8": "market_rate",
    "metadata": "metadata_text",
}


class Order(msgspec.Struct, frozen=True, gc=False, rename=_SHOWN_AS):
    """A stored order. `number` counts the desk's orders, `client_number` those of its client: 1, 2, 3 … without gaps in
    the order of commit.

    The last four say what became of it until now, as far as whoever read it looked: a repeat shows an order as it was
    placed.
    """

    number: int
    client_number: int
    id: uuid.UUID
    created_at: Moment
    client: str
    client_order_id: str | None
    currency: Currency
    amount_cents: Cents
    rate_e8: SaleRateE8
    satoshi: Satoshi
    price_id: uuid.UUID
    price_as_of: Moment
    livemode: bool
    representation: int
    received_at: Moment
    market_rate_e8: RateE8
    markup_bp: int
    reference: str | None
    metadata: str | None
    quote_id: uuid.UUID | None
    status: Status = "accepted"
    settlement_reference: str | None = None
    reason: str | None = None
    closed_at: Moment | None = None


class Placed(msgspec.Struct, frozen=True, gc=False):
    order: Order


class Replayed(msgspec.Struct, frozen=True, gc=False):
    """The request was placed before, as this order."""

    order: Order


class Placeable(msgspec.Struct, frozen=True, gc=False):
    """The order that this dry run would become; nothing is stored under its id or numbers."""

    order: Order


class Refused(msgspec.Struct, frozen=True):
    """Not stored. `by_ledger` says that the ledger has looked for the order, under its id and its key, and that what it
    found refuses every sending of it; otherwise an earlier sending may be stored all the same (docs/decisions/0016)."""

    problem: DeskError
    by_ledger: bool = False


Outcome = Placed | Replayed | Placeable | Refused


@dataclass(frozen=True, slots=True)
class Exposure:
    """What was sold, by the desk or to a client, against the cap that it has; a client may have none. In satoshi."""

    cap_satoshi: int | None
    used_satoshi: int
    orders: int

    @property
    def available_satoshi(self) -> int | None:
        """The room under the cap, if there is one."""
        return None if self.cap_satoshi is None else max(0, self.cap_satoshi - self.used_satoshi)

    def facts(self) -> dict[str, Any]:
        """The room under the cap as JSON members, BTC as decimal text; null where there is no cap."""
        named = {"cap": self.cap_satoshi, "used": self.used_satoshi, "available": self.available_satoshi}
        return {name: None if satoshi is None else format_btc(satoshi) for name, satoshi in named.items()}


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
    """Orders, newest first. `total` counts all that there are of the client, or the desk, at the moment of reading;
    only a PageFrom page has it."""

    orders: Sequence[Order]
    total: int | None


class OrderLedger(Protocol):
    """The one place where orders are stored, each once, below the cap.

    `batches_at_once` says how many calls of `place` under way at a time make sense, `place_seconds` how long a call has
    to be allowed for its outcome to be known, however slow the ledger is.

    What is read for a `client` is its own: what belongs to another is not there. For None it is the whole desk's.
    """

    batches_at_once: int
    place_seconds: float

    async def place(self, items: Sequence[PricedOrder], timeout_seconds: float) -> Sequence[Outcome]:
        """Settles the items as if they were sent one by one in this order; one outcome each.

        Repeats by id, by quote or by key come first, then IdempotencyKeyReused, then ClockSkewed (the ledger's clock
        differs from ours, or is past the item's deadline), the item's own price problem, PriceStale or QuoteExpired,
        OrderTooLarge, and last the caps of the client (ClientCapExceeded) and of the desk (ExposureCapExceeded); times
        are judged by the ledger's clock. Placed means committed to disk, on the standbys too where PostgreSQL waits for
        them. What is placed or replayed is shown as of its placing. That a quote does not follow from a price record
        that is kept is a problem of its item's: QuoteInvalid. A dry run ends in Replayed, Placeable or Refused, and
        changes nothing for the items after it.

        Raises LedgerUnavailable or Overloaded: certainly nothing was stored. Raises OutcomeUnknown: the whole batch
        may or may not be stored; sending the same items again settles it.
        """
        ...

    async def keep_price(self, record: PriceRecord) -> None:
        """Stores a record, as it was signed, for quotes to be given at it; the same record may come again. Once this
        returns it is there for good, as an order is that was placed.

        Raises LedgerUnavailable, Overloaded, and PriceUnavailable for one that the ledger does not take.
        """
        ...

    async def page(self, client: str | None, anchor: Anchor, page_size: int) -> Page:
        """Up to `page_size` orders, newest first, in the same time for every anchor, which counts the client's orders
        or, without one, the desk's; raises LedgerUnavailable or, as every read, Overloaded when too many wait."""
        ...

    async def order(self, order_id: uuid.UUID, client: str | None) -> Order:
        """Raises OrderNotFound, LedgerUnavailable.

        What is found, or not found, stays so, but for an order that is placed later than this look-up began.
        """
        ...

    async def order_by_key(self, client: str, client_order_id: str) -> Order:
        """As `order`."""
        ...

    async def exposure(self, client: str | None) -> Exposure:
        """Raises LedgerUnavailable."""
        ...

    async def price_record(self, price_id: uuid.UUID) -> PriceRecord:
        """The record an order or a quote was priced with; raises PriceNotFound, LedgerUnavailable."""
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


def parse_reference(text: str) -> str:
    """The text, which is fit to be a client's reference for an order; raises ValueError with the reason."""
    return parse_line(text, REFERENCE_CHARS_MAX)


def parse_metadata(text: str) -> str:
    """The JSON text of an order's metadata, as it is written here; raises ValueError with the reason."""
    try:
        members = msgspec.json.decode(text, type=dict[str, str])
    except msgspec.MsgspecError as error:
        raise ValueError("must be an object whose members are text") from error
    _require_metadata(members, text)
    return text


def metadata_text(members: Mapping[str, str]) -> str:
    """The JSON text of an order's metadata, as it is answered for ever; raises ValueError with the reason."""
    # Half of a surrogate pair cannot be written; whoever looks at the members finds it.
    text = json.dumps(members, ensure_ascii=False, separators=(",", ":"))
    _require_metadata(members, text)
    return text


def _require_metadata(members: Mapping[str, str], text: str) -> None:
    if not all(is_line(each) for member in members.items() for each in member if each):
        raise ValueError("must have no control characters")
    if len(members) > METADATA_MEMBERS_MAX or len(text.encode()) > METADATA_BYTES_MAX:
        raise ValueError(f"may have {METADATA_MEMBERS_MAX} members and {METADATA_BYTES_MAX} bytes at most")


if TYPE_CHECKING:
    Key = str
    Reference = str
    Metadata = str
else:
    Key, Reference, Metadata = text_type(parse_key), text_type(parse_reference), text_type(parse_metadata)


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
    """Whether the stored order is what `new` asks for, under the same key, id or quote: the same currency, cents,
    quote, reference and metadata, its members in any order. With the quote the key may be left out."""
    quote_id = None if new.quote is None else new.quote.id
    return (
        (new.currency, new.amount_cents, new.reference) == (stored.currency, stored.amount_cents, stored.reference)
        and (new.client, quote_id) == (stored.client, stored.quote_id)
        and (new.client_order_id == stored.client_order_id or (quote_id is not None and new.client_order_id is None))
        and _members(new.metadata) == _members(stored.metadata)
    )


def _members(metadata: str | None) -> object:
    return None if metadata is None else msgspec.json.decode(metadata)
