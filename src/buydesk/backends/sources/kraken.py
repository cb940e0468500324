"""Kraken: the public ticker of all our pairs in one request. It tells no time, and reports errors with status 200."""

from buydesk.backends.sources.exchange import Book, Exchange, Unusable, member, price, text
from buydesk.money import Currency

_ERROR_CHARS_MAX = 100
# It is asked under one name of a pair, and answers under another.
_PAIRS = {currency: f"XXBTZ{currency}" for currency in Currency}


def book(answer: object, currency: Currency) -> Book:
    """The book of a pair, if nothing is reported as an error; raises Unusable."""
    errors = member(answer, "error")
    if not isinstance(errors, list):
        raise Unusable("the error is not a list")
    if errors:
        said = ascii(", ".join(error for error in errors if isinstance(error, str)))
        raise Unusable(f"an error: {said[:_ERROR_CHARS_MAX]}")
    ticker = member(member(answer, "result"), _PAIRS[currency])
    return Book(_first(ticker, "b", "bid"), _first(ticker, "a", "ask"))


def _first(ticker: object, name: str, meaning: str) -> int:
    """`a` and `b` are lists that begin with the price."""
    level = member(ticker, name)
    if not isinstance(level, list) or not level:
        raise Unusable(f"no {meaning}")
    return price(text(level[0], meaning), meaning)


_ASKED = ",".join(f"XBT{currency}" for currency in Currency)
KRAKEN = Exchange("kraken", {f"/0/public/Ticker?pair={_ASKED}": tuple(Currency)}, book)
