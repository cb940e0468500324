"""Coinbase Exchange: the ticker of a pair, whose time is that of its last trade.

The book is newer than that trade. Taken for as old, it is left out while nobody trades the pair, and that is safe.
"""

from datetime import datetime

from buydesk.backends.sources.answers import Unusable
from buydesk.backends.sources.exchange import Book, Exchange, member, price, text
from buydesk.money import Currency
from buydesk.times import parse_time


def book(answer: object, _: Currency) -> Book:
    """The book of the pair that was asked for; raises Unusable."""
    bid, ask = (price(text(member(answer, name), name), name) for name in ("bid", "ask"))
    return Book(bid, ask, _time(text(member(answer, "time"), "time")))


def _time(written: str) -> datetime:
    try:
        return parse_time(written)
    except ValueError as error:
        raise Unusable("the time is not ISO 8601 with a zone") from error


COINBASE = Exchange("coinbase", {f"/products/BTC-{currency}/ticker": (currency,) for currency in Currency}, book)
