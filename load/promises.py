"""What every answer of the desk has to keep, as its clients see it.

Each function returns what is broken, in words, or None. They know nothing of Locust, and nothing of the desk's code:
what they compare with is what was asked and what was answered before.
"""

import math
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any, NamedTuple

SATOSHI_PER_BTC = 10**8
# A Date header has whole seconds, and it is written a little before the answer.
DATE_SECONDS_MAX = 2
# So many orders are remembered to find a number given twice; the oldest go.
REMEMBERED_MAX = 200_000

Document = Mapping[str, Any]


class Asked(NamedTuple):
    """An order as it was asked for: ISO currency, amount as text with two decimals, key or None."""

    currency: str
    amount: str
    key: str | None


def in_order(order: Document, asked: Asked) -> str | None:
    """The order is the one that was asked for, and its bitcoin amount is rounded up to the satoshi."""
    wanted = {"currency": asked.currency, "amount": asked.amount, "client_order_id": asked.key}
    for member, value in wanted.items():
        if order[member] != value:
            return f"asked for {member} {value} and got {order[member]}"
    satoshi = math.ceil(Fraction(order["amount"]) / Fraction(order["exchange_rate"]) * SATOSHI_PER_BTC)
    if Decimal(order["bitcoin_amount"]) * SATOSHI_PER_BTC != satoshi:
        return f"{order['amount']} at {order['exchange_rate']} is not {order['bitcoin_amount']} BTC, rounded up"
    return None


class Placed:
    """The orders that one process has seen placed: no number and no id belongs to two of them."""

    def __init__(self) -> None:
        self._ids: dict[int, str] = {}
        self._numbers: dict[str, int] = {}

    def broken_by(self, order: Document) -> str | None:
        """Remembers the order of a 201."""
        number, order_id = order["number"], order["id"]
        known_id, known_number = self._ids.get(number, order_id), self._numbers.get(order_id, number)
        if (known_id, known_number) != (order_id, number):
            return f"the orders {order_id} (number {number}) and {known_id} (number {known_number}) are no two orders"
        self._ids[number], self._numbers[order_id] = order_id, number
        if len(self._ids) > REMEMBERED_MAX:
            oldest = next(iter(self._ids))
            del self._numbers[self._ids.pop(oldest)]
        return None


def in_replay(first: bytes, again: bytes, is_replay: bool) -> str | None:
    """A repeated request gets the first answer, byte for byte, and is told so."""
    if first != again:
        return "a repeated request got other bytes than the first time"
    return None if is_replay else "a repeated request was not told that it is one"


def in_repeats(answers: Sequence[tuple[bytes, bool]]) -> str | None:
    """Of requests that were sent at once under one key one is new, all others repeat it: bodies, and whether each was
    told that it is a repeat."""
    if len({body for body, _ in answers}) > 1:
        return "requests with one key got different answers"
    return "one key was placed more than once" if sum(not is_replay for _, is_replay in answers) > 1 else None


class Walk:
    """One reader's way through the pages, newest first, by their links."""

    def __init__(self) -> None:
        self.newest: int | None = None
        self._oldest: int | None = None
        self._keys: dict[str, int] = {}

    def broken_by_next(self, page: Document) -> str | None:
        """The next page goes on where the last one ended: each order exactly once, no key twice."""
        numbers = [order["number"] for order in page["data"]]
        above = self._oldest if self._oldest is not None else (numbers[0] + 1 if numbers else 1)
        if numbers != list(range(above - 1, above - 1 - len(numbers), -1)):
            return f"the page after number {above} is {numbers}"
        if numbers:
            self._oldest = numbers[-1]
            self.newest = numbers[0] if self.newest is None else self.newest
            # Numbers start at 1: a page that does not reach it has a next one.
            if ("next" in page["_links"]) == (1 in numbers):
                return f"the page down to number {numbers[-1]} has the links {sorted(page['_links'])}"
        return self._broken_by_keys(page)

    def broken_by_newer(self, page: Document) -> str | None:
        """The page of what came since this walk began: the lowest numbers above its newest, newest first."""
        numbers = [order["number"] for order in page["data"]]
        newest = self.newest or 0
        if numbers != list(range(newest + len(numbers), newest, -1)):
            return f"the page of what is newer than number {newest} is {numbers}"
        return self._broken_by_keys(page)

    def _broken_by_keys(self, page: Document) -> str | None:
        for order in page["data"]:
            key, number = order["client_order_id"], order["number"]
            if key is not None and self._keys.setdefault(key, number) != number:
                return f"the orders {self._keys[key]} and {number} have the same key {key}: a duplicate"
        return None


def in_exposure(exposure: Document) -> str | None:
    """Never over the cap."""
    cap, used, available = (Decimal(exposure[member]) for member in ("cap", "used", "available"))
    if used > cap:
        return f"{used} BTC are sold and the cap is {cap}"
    return None if cap - used == available else f"{used} of {cap} BTC are used and {available} are left"


def in_record(record: Document, answered_at: datetime) -> str | None:
    """A price is answered with its proof, and never after its end; `answered_at` is by the desk's own clock."""
    as_of, expires_at = (datetime.fromisoformat(record[member]) for member in ("as_of", "expires_at"))
    if answered_at > expires_at + timedelta(seconds=DATE_SECONDS_MAX):
        return f"a price that was good until {expires_at} was answered at {answered_at}"
    if not as_of < expires_at:
        return f"a price observed at {as_of} is good until {expires_at}"
    if not record["sources"]["used"] or any(Decimal(rate) <= 0 for rate in record["rates"].values()):
        return "a price without a source, or below zero"
    return None
