"""Bitfinex: all our pairs in one request, a row each, prices as JSON numbers. It tells no time."""

from buydesk.backends.sources.answers import Unusable
from buydesk.backends.sources.exchange import Book, Exchange, number, price
from buydesk.money import Currency

# SYMBOL, BID, BID_SIZE, ASK, …
_BID = 1
_ASK = 3


def book(answer: object, currency: Currency) -> Book:
    """The book of a pair, whose row is there once; raises Unusable."""
    symbol = f"tBTC{currency}"
    rows = answer if isinstance(answer, list) else []
    found = [row for row in rows if isinstance(row, list) and len(row) > _ASK and row[0] == symbol]
    if len(found) != 1:
        raise Unusable(f"{len(found)} rows of {symbol}")
    bid, ask = (price(number(found[0][place], name), name) for place, name in ((_BID, "bid"), (_ASK, "ask")))
    return Book(bid, ask)


_SYMBOLS = ",".join(f"tBTC{currency}" for currency in Currency)
BITFINEX = Exchange("bitfinex", {f"/v2/tickers?symbols={_SYMBOLS}": tuple(Currency)}, book)
