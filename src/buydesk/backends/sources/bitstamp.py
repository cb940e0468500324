"""Bitstamp: the ticker of a pair, with the time in whole seconds since 1970, as text.

Its `last` may lie outside bid and ask, when the last trade is long ago; it is not used.
"""

import re
from datetime import UTC, datetime

from buydesk.backends.sources.answers import Unusable
from buydesk.backends.sources.exchange import Book, Exchange, member, price, text
from buydesk.money import Currency

_SECONDS = re.compile(r"[0-9]{1,10}", re.ASCII)  # until the year 2286


def book(answer: object, _: Currency) -> Book:
    """The book of the pair that was asked for; raises Unusable."""
    bid, ask = (price(text(member(answer, name), name), name) for name in ("bid", "ask"))
    seconds = text(member(answer, "timestamp"), "timestamp")
    if not _SECONDS.fullmatch(seconds):
        raise Unusable("the timestamp is not a number of seconds since 1970")
    return Book(bid, ask, datetime.fromtimestamp(int(seconds), UTC))


BITSTAMP = Exchange("bitstamp", {f"/api/v2/ticker/btc{currency.lower()}/": (currency,) for currency in Currency}, book)
