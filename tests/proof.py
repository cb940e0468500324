"""Proof: whether a price follows from its record's quotes, and an order's price and satoshi from its price record.

Everything is computed again, the price from its quotes by the rule with the limits it had. Pure.
"""

from collections.abc import Iterator
from datetime import datetime, timedelta

from buydesk.money import format_btc, format_rate, sale_rate, satoshi_for
from buydesk.orders.model import Order
from buydesk.prices.model import PriceRecord
from buydesk.prices.verification import discrepancies_of_record
from buydesk.times import format_time


def discrepancies(
    order: Order, record: PriceRecord, clock_skew: timedelta = timedelta(), quoted_at: datetime | None = None
) -> list[str]:
    """What of the order does not follow from the record; an empty list means that it is proven.

    `clock_skew` is how far the clock that dated the order may be behind the one that dated the price. The price has to
    be one of `quoted_at`, for an order by quote.
    """
    priced_at = order.created_at if quoted_at is None else quoted_at
    return [*_discrepancies_of_order(order, record, priced_at, clock_skew), *discrepancies_of_record(record)]


def _discrepancies_of_order(
    order: Order, record: PriceRecord, priced_at: datetime, clock_skew: timedelta
) -> Iterator[str]:
    if order.price_id != record.id:
        yield f"the order was priced with record {order.price_id}, and this is {record.id}"
    if order.livemode != (record.feed == "live"):
        yield f"an order with livemode {order.livemode} was priced with a {record.feed} record"
    yield from _discrepancies_of_amount(order, record.rates_e8.get(order.currency, 0))
    if order.price_as_of != record.as_of:
        yield f"the price is dated {format_time(order.price_as_of)}, and the record {format_time(record.as_of)}"
    if priced_at >= record.expires_at:
        ended = format_time(record.expires_at)
        yield f"the order is of {format_time(priced_at)}, and the price ended at {ended}"
    known_at = record.decided_at or record.as_of
    if priced_at + clock_skew < known_at:
        yield f"the order is of {format_time(priced_at)}, and the price came at {format_time(known_at)}"


def _discrepancies_of_amount(order: Order, market_e8: int) -> Iterator[str]:
    if market_e8 <= 0:
        yield f"the record has no rate for {order.currency}"
        return
    if order.market_rate_e8 != market_e8:
        yield f"the market's rate is {format_rate(order.market_rate_e8)}, and the record's is {format_rate(market_e8)}"
    rate_e8 = sale_rate(market_e8, order.markup_bp)
    if order.markup_bp < 0 or order.rate_e8 != rate_e8:
        made = f"the record's and {order.markup_bp} basis points are {format_rate(rate_e8)}"
        yield f"the rate is {format_rate(order.rate_e8)}, and {made}"
    satoshi = satoshi_for(order.amount_cents, rate_e8)
    if order.satoshi != satoshi:
        yield f"the bitcoin amount is {format_btc(order.satoshi)}, and the record makes it {format_btc(satoshi)}"
