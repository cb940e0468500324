"""OKX: the ticker of a pair in euros or dollars, with the time in milliseconds since 1970, as text.

Its answers always have status 200 and a list, which is empty when there is an error.
"""

import re
from datetime import timedelta

from buydesk.backends.sources.answers import Unusable
from buydesk.backends.sources.exchange import Book, Exchange, member, price, text
from buydesk.money import Currency
from buydesk.times import EPOCH

_MILLISECONDS = re.compile(r"[0-9]{1,13}", re.ASCII)  # until the year 2286


def book(answer: object, currency: Currency) -> Book:
    """The book of the pair that was asked for, whose row is the only one; raises Unusable."""
    rows = member(answer, "data")
    if not isinstance(rows, list) or len(rows) != 1:
        raise Unusable("not one row of data")
    [row] = rows
    if member(row, "instId") != f"BTC-{currency}":
        raise Unusable(f"the instId is not BTC-{currency}")
    bid, ask = (price(text(member(row, f"{name}Px"), name), name) for name in ("bid", "ask"))
    milliseconds = text(member(row, "ts"), "ts")
    if not _MILLISECONDS.fullmatch(milliseconds):
        raise Unusable("the ts is not a number of milliseconds since 1970")
    return Book(bid, ask, EPOCH + timedelta(milliseconds=int(milliseconds)))


_REAL = (Currency.EUR, Currency.USD)
OKX = Exchange("okx", {f"/api/v5/market/ticker?instId=BTC-{currency}": (currency,) for currency in _REAL}, book)
