"""How orders are written for their clients: every shape that a 201 has ever had, and the newest for all else.

A request that is sent again is answered with the bytes of the first answer. So each order is stored with the number of
the shape it was answered in, and a shape here is never changed: a new one gets the next number, which is then
`model.REPRESENTATION`.
"""

import uuid

import msgspec

from buydesk.money import Currency, format_btc, format_cents, format_rate
from buydesk.orders.model import Order, Status
from buydesk.times import format_time


class PlacedDocument1(msgspec.Struct, frozen=True, gc=False):
    """Representation 1, its members in the order in which they are written."""

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


class OrderDocument(PlacedDocument1, frozen=True, gc=False):
    """Representation 2, and after its placing the state of the order. `metadata` is JSON already; what became of an
    order has members only when something did."""

    status: Status
    received_at: str
    reference: str | None
    metadata: msgspec.Raw | None
    market_rate: str
    markup_bp: int
    quote_id: uuid.UUID | None
    settlement_reference: str | msgspec.UnsetType | None = msgspec.UNSET
    reason: str | msgspec.UnsetType = msgspec.UNSET
    closed_at: str | msgspec.UnsetType = msgspec.UNSET


def order_document(order: Order) -> OrderDocument:
    """The order as it is now, in the newest shape; msgspec writes it as JSON."""
    if order.closed_at is None:
        return _placed_2(order)
    return msgspec.structs.replace(
        _placed_2(order),
        status=order.status,
        settlement_reference=order.settlement_reference if order.status == "settled" else msgspec.UNSET,
        reason=msgspec.UNSET if order.reason is None else order.reason,
        closed_at=format_time(order.closed_at),
    )


def dry_run_document(order: Order) -> dict[str, object]:
    """The order as it would be placed, in the newest shape, without what it has only once it is stored."""
    shown = msgspec.structs.asdict(_placed_2(order))
    stored_only = {"id", "number"}
    return {name: value for name, value in shown.items() if name not in stored_only and value is not msgspec.UNSET}


class DeskDocument(OrderDocument, frozen=True, gc=False, kw_only=True):
    """An order as those see it who see all clients'."""

    desk_number: int
    client: str


def desk_document(order: Order) -> DeskDocument:
    """The order as it is now, for those who see all clients'."""
    shown = msgspec.structs.asdict(order_document(order))
    return DeskDocument(**shown, desk_number=order.number, client=order.client)


def placed_document(order: Order) -> PlacedDocument1:
    """The order as it was answered when it was placed, whatever became of it, in the shape of then.

    A newer program may have placed it: its shape is not known here, and the newest one that is comes closest.
    """
    return _placed_1(order) if order.representation == 1 else _placed_2(order)


def _placed_1(order: Order) -> PlacedDocument1:
    return PlacedDocument1(
        order.id,
        order.client_number,
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


def _placed_2(order: Order) -> OrderDocument:
    rate = format_rate(order.rate_e8)
    return OrderDocument(
        order.id,
        order.client_number,
        format_time(order.created_at),
        order.currency,
        format_cents(order.amount_cents),
        rate,
        format_btc(order.satoshi),
        order.client_order_id,
        order.price_id,
        format_time(order.price_as_of),
        order.livemode,
        "accepted",
        format_time(order.received_at),
        order.reference,
        None if order.metadata is None else msgspec.Raw(order.metadata.encode()),
        rate if order.market_rate_e8 == order.rate_e8 else format_rate(order.market_rate_e8),
        order.markup_bp,
        order.quote_id,
    )
