"""Gemini: the ticker of a pair. Its only time is not the book's.

`volume.timestamp` is the end of the 24 hours that the volume is of, which moves every few minutes only: taken for the
time of the book, it would make nearly every quote too old.
"""

from buydesk.backends.sources.exchange import Book, Exchange, member, price, text
from buydesk.money import Currency


def book(answer: object, currency: Currency) -> Book:
    """The book of the pair that was asked for, which only the members of `volume` name; raises Unusable."""
    bid, ask = (price(text(member(answer, name), name), name) for name in ("bid", "ask"))
    member(member(answer, "volume"), currency)
    return Book(bid, ask)


GEMINI = Exchange("gemini", {f"/v1/pubticker/btc{currency.lower()}": (currency,) for currency in Currency}, book)
