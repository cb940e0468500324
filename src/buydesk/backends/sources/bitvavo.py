"""Bitvavo: the best bid and ask of a pair, euros only. It tells no time."""

from buydesk.backends.sources.answers import Unusable
from buydesk.backends.sources.exchange import Book, Exchange, member, price, text
from buydesk.money import Currency


def book(answer: object, currency: Currency) -> Book:
    """The book of the pair that was asked for, which is named; raises Unusable."""
    if member(answer, "market") != f"BTC-{currency}":
        raise Unusable(f"the market is not BTC-{currency}")
    bid, ask = (price(text(member(answer, name), name), name) for name in ("bid", "ask"))
    return Book(bid, ask)


BITVAVO = Exchange("bitvavo", {"/v2/ticker/book?market=BTC-EUR": (Currency.EUR,)}, book)
