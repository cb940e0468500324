"""An order's life: it is accepted, and later settled or cancelled, once. Each of these is an event of the desk. The
port OrderLife."""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import msgspec

from buydesk.errors import DeskError, OrderStateConflict
from buydesk.orders.model import REFERENCE_CHARS_MAX, Order
from buydesk.reading import parse_line

# Closing many at once holds up those who buy: 500 took 8 ms.
CLOSED_AT_ONCE_MAX = 64
# How many orders are looked at for those that are still open.
LOOKED_AT_MAX = 10_000
REASON_CHARS_MAX = 500
TEXT_CHARS_MAX = {"settled": REFERENCE_CHARS_MAX, "cancelled": REASON_CHARS_MAX}

Closed = Literal["settled", "cancelled"]


class Closing(msgspec.Struct, frozen=True, gc=False):
    """What is to become of an order. `text` is the settlement's reference, if there is one, or the reason of a
    cancellation."""

    order_id: uuid.UUID
    status: Closed
    text: str | None


def parse_text(text: str | None, status: Closed) -> str | None:
    """The text with which an order can be closed so; raises ValueError with the reason. A settlement needs none."""
    if text is None and status == "settled":
        return None
    return parse_line(text or "", TEXT_CHARS_MAX[status])


class Event(msgspec.Struct, frozen=True, gc=False):
    """What happened, as the order was then. `sequence` counts the events of the desk or, where a client's were asked
    for, that client's: 1, 2, 3 … without gaps in the order of commit."""

    sequence: int
    order: Order


@dataclass(frozen=True, slots=True)
class AcceptedOrders:
    """Open orders, oldest first; all up to the desk's number `next_after` have been looked at."""

    orders: Sequence[Order]
    next_after: int


class OrderLife(Protocol):
    """What becomes of orders, beside the ledger that stores them."""

    async def close_orders(self, closings: Sequence[Closing]) -> Sequence[Order | DeskError]:
        """Settles and cancels orders as if one by one in this order, CLOSED_AT_ONCE_MAX at most, in one transaction;
        one result each: the order as it is then, for a repeat too, OrderNotFound, or OrderStateConflict.

        Raises LedgerUnavailable or Overloaded: certainly nothing was changed. Raises OutcomeUnknown: all or nothing
        was; doing it again is harmless.
        """
        ...

    async def accepted(self, after: int, limit: int) -> AcceptedOrders:
        """The lowest of the desk's numbers above `after` that are open: up to `limit`, and of the next LOOKED_AT_MAX
        numbers; raises LedgerUnavailable, Overloaded."""
        ...

    async def events(self, client: str | None, after: int, limit: int) -> Sequence[Event]:
        """The events after the `after`-th, oldest first, in the same time for every `after`: the client's or, without
        one, the desk's. Raises LedgerUnavailable, Overloaded."""
        ...

    async def last_events(self, clients: Sequence[str]) -> Mapping[str | None, int]:
        """The numbers of the newest events, 0 where there is none: the desk's, by None, and each of these clients'.
        Raises as `events`."""
        ...

    async def close(self) -> None: ...


def conflict(stored: Order) -> OrderStateConflict:
    """The error for whoever wants something else to become of an order that is closed already."""
    facts: dict[str, Any] = {"order_status": stored.status} | text_member(stored)
    return OrderStateConflict(f"The order was {stored.status} already, otherwise.", **facts)


def text_member(stored: Order) -> dict[str, str | None]:
    """The text that a closed order was closed with, as a member of its name."""
    if stored.status == "settled":
        return {"settlement_reference": stored.settlement_reference}
    return {"reason": stored.reason}
