"""Kraken: the public ticker of a pair. It tells no time, and reports errors with status 200.

Each pair is asked for by itself: with one that it does not trade any more, a request for all is nothing but an error.
"""

from buydesk.backends.sources.answers import Unusable, words_in
from buydesk.backends.sources.exchange import Book, Exchange, member, price, text
from buydesk.money import Currency
from buydesk.reading import is_text

# It is asked under one name of a pair, and answers under another.
_PAIRS = {currency: f"XXBTZ{currency}" for currency in Currency}


def book(answer: object, currency: Currency) -> Book:
    """The book of a pair, if nothing is reported but warnings, which begin with W; raises Unusable."""
    said = member(answer, "error")
    if not isinstance(said, list):
        raise Unusable("the error is not a list")
    if not all(is_text(each) and each.startswith("W") for each in said):
        raise Unusable("an error without words")
    ticker = member(member(answer, "result"), _PAIRS[currency])
    return Book(_first(ticker, "b", "bid"), _first(ticker, "a", "ask"), warning=words_in(answer))


def _first(ticker: object, name: str, meaning: str) -> int:
    """`a` and `b` are lists that begin with the price."""
    level = member(ticker, name)
    if not isinstance(level, list) or not level:
        raise Unusable(f"no {meaning}")
    return price(text(level[0], meaning), meaning)


KRAKEN = Exchange("kraken", {f"/0/public/Ticker?pair=XBT{currency}": (currency,) for currency in Currency}, book)
