"""Pricing: the one place where a price is applied to an order."""

from datetime import datetime

from buydesk.errors import DeskError
from buydesk.money import sale_rate, satoshi_for
from buydesk.orders.model import NewOrder, Order, PricedOrder
from buydesk.prices.model import PriceRecord


def price_order(order: NewOrder, price: PriceRecord | DeskError, deadline: datetime, markup_bp: int = 0) -> PricedOrder:
    """The order at the record's rate and the markup (`sale_rate`), in basis points, the bitcoin rounded up to the
    satoshi (`satoshi_for`), to be stored until the deadline; with the problem instead when there is no record, or none
    with a rate for its currency."""
    if isinstance(price, DeskError):
        return PricedOrder(order, price, deadline)
    market_e8 = price.rates_e8.get(order.currency)
    if market_e8 is None:
        return PricedOrder(order, price.problem_of(order.currency), deadline)
    rate_e8 = sale_rate(market_e8, markup_bp)
    return PricedOrder(order, price, deadline, market_e8, markup_bp, rate_e8, satoshi_for(order.amount_cents, rate_e8))


def placed_order(item: PricedOrder, number: int, client_number: int, created_at: datetime, livemode: bool) -> Order:
    """The order that is stored when the item is placed."""
    new, record = item.order, item.price
    assert isinstance(record, PriceRecord)  # noqa: S101  # no ledger places what has no price
    return Order(
        number,
        client_number,
        new.id,
        created_at,
        new.client,
        new.client_order_id,
        new.currency,
        new.amount_cents,
        item.rate_e8,
        item.satoshi,
        record.id,
        record.as_of,
        livemode,
        new.representation,
        new.received_at,
        item.market_rate_e8,
        item.markup_bp,
        new.reference,
        new.metadata,
        None,  # no order has a quote yet
    )
