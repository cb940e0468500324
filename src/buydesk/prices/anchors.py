"""Anchors: the last price of each currency that the desk published, which no restart forgets.

A price far from it is more likely a fault that all sources share than news: it is not sold at until an operator
confirms it. Pure, but for the port.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

from buydesk.errors import InvalidRequest
from buydesk.money import RATE_E8_MAX, RATE_E8_MIN, Currency
from buydesk.prices.model import PriceRecord, Written
from buydesk.reading import Moment, RateE8

CONFIRMED_MINUTES_MAX = 15
WHY_CHARS_MAX = 500
# Nobody confirms so many within CONFIRMED_MINUTES_MAX; the ones that end last are given.
CONFIRMATIONS_MAX = 100


class Anchor(Written, frozen=True, omit_defaults=True):
    """The last published price of a currency (`rate_e8` units) and when it was decided (`PriceRecord.made_at`).

    `dollar_e8` is what a bitcoin cost in dollars then: with it the exchange rate that the price implied can be told,
    however long ago that was. None where nobody knows.
    """

    rate_e8: RateE8
    as_of: Moment
    dollar_e8: RateE8 | None = None


def anchors_of(record: PriceRecord, before: Mapping[Currency, Anchor]) -> dict[Currency, Anchor]:
    """The anchors that a published record makes. Where it has no price in dollars to sell at, the exchange rates are
    those of `before`: what cannot be compared now must not be forgotten."""
    dollar_e8 = record.rates_e8.get(Currency.USD)
    return {
        currency: Anchor(rate_e8, record.made_at, dollar_e8 or _dollar_as_before(rate_e8, before.get(currency)))
        for currency, rate_e8 in record.rates_e8.items()
    }


def _dollar_as_before(rate_e8: int, old: Anchor | None) -> int | None:
    return None if old is None or old.dollar_e8 is None else old.dollar_e8 * rate_e8 // old.rate_e8


class _Range(Written, frozen=True, rename={"low_e8": "from", "high_e8": "to"}):
    """What an operator says that a bitcoin may cost (`rate_e8` units, both ends included), and why."""

    currency: Currency
    low_e8: RateE8
    high_e8: RateE8
    why: str


class NewConfirmation(_Range, frozen=True):
    """The same, for so many minutes from now."""

    minutes: int


class Confirmation(_Range, frozen=True):
    """The same, until it has ended."""

    expires_at: Moment


class AnchorStore(Protocol):
    """Where anchors and confirmations are kept for ever: in the ledger. Everything raises LedgerUnavailable and
    Overloaded; what was to be kept may then be kept all the same, and keeping it again does no harm."""

    async def anchors(self) -> Mapping[Currency, Anchor]:
        """Those that there are."""
        ...

    async def keep_anchors(self, anchors: Mapping[Currency, Anchor]) -> None:
        """Keeps the anchors of these currencies, unless a later one is kept. One that was decided in the future, by
        the ledger's clock, counts as decided now, and one that is kept gives way: it must not stand in the way of
        later ones."""
        ...

    async def confirmations(self) -> Sequence[Confirmation]:
        """Those that have not ended by the ledger's clock, the one that ends last first: CONFIRMATIONS_MAX at the
        most."""
        ...

    async def close(self) -> None: ...


def require_confirmable(new: NewConfirmation) -> None:
    """Raises InvalidRequest, naming every member of the confirmation's document that is wrong."""
    reasons = [
        (member, "must be an exchange rate between 1 and 10000000000")
        for member, rate_e8 in (("from", new.low_e8), ("to", new.high_e8))
        if not RATE_E8_MIN <= rate_e8 <= RATE_E8_MAX
    ]
    if new.low_e8 > new.high_e8:
        reasons.append(("to", "must not be less than from"))
    elif not reasons and 2 * new.high_e8 > 3 * new.low_e8:
        reasons.append(("to", "must be at most half as much again as from: it cannot be taken back"))
    # It is shown on terminals, where control characters do things.
    if not 1 <= len(new.why) <= WHY_CHARS_MAX or not new.why.isprintable() or not new.why.strip():
        reasons.append(("why", f"must be 1 to {WHY_CHARS_MAX} printable characters on one line"))
    if not 1 <= new.minutes <= CONFIRMED_MINUTES_MAX:
        reasons.append(("minutes", f"must be a whole number from 1 to {CONFIRMED_MINUTES_MAX}"))
    if reasons:
        raise InvalidRequest.of_all(reasons)
