"""Pricing: the one place where a price is applied to an order."""

from datetime import datetime

import msgspec

from buydesk.errors import DeskError, PriceMoved
from buydesk.money import format_btc, format_rate, sale_rate, satoshi_for
from buydesk.orders.model import NewOrder, Order, PricedOrder
from buydesk.orders.quotes import OrderQuote
from buydesk.prices.model import PriceRecord


class Guard(msgspec.Struct, frozen=True):
    """The worst price at which a client still buys: the highest rate, or the least bitcoin for its amount."""

    rate_e8_max: int | None = None
    satoshi_min: int | None = None

    def problem(self, rate_e8: int, satoshi: int) -> PriceMoved | None:
        """What refuses an order at this rate, for so much; None when the client still buys."""
        is_too_high = self.rate_e8_max is not None and rate_e8 > self.rate_e8_max
        is_too_little = self.satoshi_min is not None and satoshi < self.satoshi_min
        if not is_too_high and not is_too_little:
            return None
        rate, bitcoin = format_rate(rate_e8), format_btc(satoshi)
        limit = "max_exchange_rate" if is_too_high else "min_bitcoin_amount"
        detail = f"The exchange rate is {rate} now, for which the amount buys {bitcoin} BTC: {limit} does not allow it."
        return PriceMoved(detail, exchange_rate=rate, bitcoin_amount=bitcoin)


NO_GUARD = Guard()


def price_order(
    order: NewOrder,
    price: PriceRecord | OrderQuote | DeskError,
    deadline: datetime,
    markup_bp: int = 0,
    guard: Guard = NO_GUARD,
) -> PricedOrder:
    """The order at the record's rate and the markup (`sale_rate`), in basis points, the bitcoin rounded up to the
    satoshi (`satoshi_for`), to be stored until the deadline; with the problem instead when there is no record, none
    with a rate for its currency, or the guard does not allow the price. By a quote it is what the quote says."""
    if isinstance(price, DeskError):
        return PricedOrder(order, price, deadline)
    if isinstance(price, OrderQuote):
        return PricedOrder(order, price, deadline, price.market_rate_e8, price.markup_bp, price.rate_e8, price.satoshi)
    market_e8 = price.rates_e8.get(order.currency)
    if market_e8 is None:
        return PricedOrder(order, price.problem_of(order.currency), deadline)
    rate_e8 = sale_rate(market_e8, markup_bp)
    satoshi = satoshi_for(order.amount_cents, rate_e8)
    if moved := guard.problem(rate_e8, satoshi):
        return PricedOrder(order, moved, deadline)
    return PricedOrder(order, price, deadline, market_e8, markup_bp, rate_e8, satoshi)


def placeable_order(item: PricedOrder, moment: datetime, livemode: bool) -> Order:
    """What a dry run would be stored as at the moment, but for numbers, which only what is stored has."""
    return placed_order(item, 0, 0, moment, livemode)


def placed_order(item: PricedOrder, number: int, client_number: int, created_at: datetime, livemode: bool) -> Order:
    """The order that is stored when the item is placed."""
    new, price = item.order, item.price
    assert not isinstance(price, DeskError)  # noqa: S101  # no ledger places what has no price
    if isinstance(price, OrderQuote):
        price_id, price_as_of, quote_id = price.price_id, price.price_as_of, price.id
    else:
        price_id, price_as_of, quote_id = price.id, price.as_of, None
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
        price_id,
        price_as_of,
        livemode,
        new.representation,
        new.received_at,
        item.market_rate_e8,
        item.markup_bp,
        new.reference,
        new.metadata,
        quote_id,
    )
