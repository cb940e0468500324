"""The price guard: which prices that the quotes prove are not sold at yet, because they are far from the last ones.

A currency's price is unsettled when, compared with its anchor (the last price that was published),

1. it is further away than `anchor_bp_max`, or `old_anchor_bp_max` from an anchor older than a day: a fault that all
   sources share looks like that. It stays unsettled until an operator confirms it, or it comes back;
2. or the exchange rate to the dollar that it implies, for the dollar those to all others, differs by more than
   `cross_bp_max` from before, however long ago that was: two currencies that show one number look like that. It stays
   unsettled likewise;
3. or it is further away than `jump_bp_max`, and was seen no second time, by other quotes of as many sources as a price
   needs and no further than `jump_bp_max` from the first.

Where there is no price, the last one is not sold at any longer if quotes contradict it that prove their time, or if it
was made of quotes of sources that stand still.

A confirmation settles a price within its range. Where there is no anchor, nothing can be compared.

Another updater may have published since this one did. So after a tick without a price of its own it asks the ledger for
the anchors before it judges, and judges nothing without an answer.
"""

import asyncio
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import NamedTuple

from msgspec.structs import replace

from buydesk.errors import DeskError, PriceUnavailable
from buydesk.money import Currency, format_rate
from buydesk.prices.anchors import Anchor, AnchorStore, Confirmation, anchors_of
from buydesk.prices.model import PriceRecord, Quote
from buydesk.prices.rule import Verdict, differs, percent, proves_time, rule_of
from buydesk.settings.model import Settings
from buydesk.times import format_time

_OLD = timedelta(days=1)
_BP = 10_000
# A ledger that hangs must not delay the doubt, which stops the sales.
ASK_SECONDS_MAX = 1.0
# Sources answer sooner or later, so two ticks are not quite one interval apart; with one left out between, it is more.
_TICKS_BEHIND = 1.5
_UNTIL_CONFIRMED = "until an operator confirms it"


@dataclass(frozen=True, slots=True)
class ChangeLimits:
    """How far a price may be from the last one, in basis points of that."""

    jump_bp_max: int
    anchor_bp_max: int
    old_anchor_bp_max: int
    cross_bp_max: int


def change_limits(settings: Settings) -> ChangeLimits:
    """The limits of the settings."""
    return ChangeLimits(
        jump_bp_max=settings.price_jump_bp_max,
        anchor_bp_max=settings.price_anchor_bp_max,
        old_anchor_bp_max=settings.price_old_anchor_bp_max,
        cross_bp_max=settings.price_cross_bp_max,
    )


class Sighting(NamedTuple):
    """A price (`rate_e8` units) that was seen, by which quotes, and when."""

    rate_e8: int
    quotes: Collection[Quote]
    seen_at: datetime


class Sightings:
    """The first sighting of each currency's price, for as long as it has not moved further than `jump_bp_max` from that
    and as too few sources have said something else: over ticks without a price too, but no longer than `kept_for`."""

    def __init__(self, jump_bp_max: int, sources_min: int, kept_for: timedelta) -> None:
        self._jump_bp_max = jump_bp_max
        self._sources_min = sources_min
        self._kept_for = kept_for
        self._first: dict[Currency, Sighting] = {}

    def take(self, verdict: Verdict, now: datetime) -> dict[Currency, int]:
        """Takes in a verdict; the prices that were seen before it, where as many sources as a price needs have said
        something else since."""
        before_e8 = {}
        for currency, rate_e8 in verdict.rates_e8.items():
            quotes = {_said(quote) for quote in verdict.used if quote.currency == currency}
            first = self._first.get(currency)
            if first is not None and self._is_same(first, rate_e8, now):
                if len(quotes.difference(first.quotes)) < self._sources_min:
                    continue
                before_e8[currency] = first.rate_e8
            self._first[currency] = Sighting(rate_e8, quotes, now)
        return before_e8

    def _is_same(self, first: Sighting, rate_e8: int, now: datetime) -> bool:
        return now - first.seen_at <= self._kept_for and not differs(rate_e8, first.rate_e8, self._jump_bp_max)


def _said(quote: Quote) -> Quote:
    """The quote without when we asked: a source without a clock repeats itself unless its book moves."""
    return quote if quote.changed_at is None else replace(quote, observed_at=quote.changed_at)


class PriceGuard:
    """The last prices of one updater, and what is said of the next ones. `store` keeps them, and confirmations."""

    def __init__(self, store: AnchorStore, settings: Settings, log: logging.Logger) -> None:
        self._store = store
        self._limits = change_limits(settings)
        self._log = log
        self._currencies = settings.currencies
        self._own_age_max = timedelta(seconds=_TICKS_BEHIND * settings.feed_interval_seconds)
        self._anchors: dict[Currency, Anchor] = {}
        self._rule = rule_of(settings)
        self._ttl = timedelta(seconds=settings.price_ttl_seconds)
        self._sightings = Sightings(settings.price_jump_bp_max, settings.price_sources_min, self._ttl)
        self._used: Mapping[Currency, Collection[str]] = {}
        self._is_loaded = False

    async def load(self) -> None:
        """Asks for the last prices, once; raises LedgerUnavailable and Overloaded."""
        if self._is_loaded:
            return
        self._anchors = dict(await self._store.anchors())
        self._is_loaded = True
        if new := [each for each in self._currencies if each not in self._anchors]:
            self._log.info("There are no last prices in %s: the first ones are believed.", ", ".join(new))

    async def unsettled(self, verdict: Verdict, now: datetime) -> dict[Currency, str]:
        """Why each of the prices of a tick that are unsettled is; raises PriceUnavailable where nobody can say."""
        rates_e8, before_e8 = verdict.rates_e8, self._sightings.take(verdict, now)
        reasons = unsettled_reasons(rates_e8, self._anchors, before_e8, (), now=now, limits=self._limits)
        is_behind = any(self._may_be_behind(currency, now) for currency in rates_e8)
        if not reasons and not is_behind:
            return {}
        try:
            # Another updater may have gone on, and an operator may have said something.
            async with asyncio.timeout(ASK_SECONDS_MAX):
                kept, confirmations = await asyncio.gather(self._store.anchors(), self._store.confirmations())
        except (DeskError, TimeoutError) as error:
            why = error.detail if isinstance(error, DeskError) else f"No answer within {ASK_SECONDS_MAX:g} s."
            if is_behind:
                raise PriceUnavailable(f"The last prices are not known: {why}") from error
            self._log.warning("Nobody can say whether the prices are confirmed: %s", why)
            return reasons
        for currency, anchor in kept.items():
            own = self._anchors.get(currency)
            if own is None or own.as_of < anchor.as_of:
                self._anchors[currency] = anchor
        return unsettled_reasons(rates_e8, self._anchors, before_e8, confirmations, now=now, limits=self._limits)

    def withdrawn(self, verdict: Verdict, frozen: Collection[str], now: datetime) -> dict[Currency, str]:
        """Why the last price of a currency that has none now is not sold at any longer; `frozen` are the sources that
        stand still."""
        reasons = {}
        for currency, missing in verdict.missing.items():
            anchor = self._anchors.get(currency)
            if anchor is None or now - anchor.as_of > self._ttl:
                continue  # it has ended anyway
            quotes = [each.quote for each in verdict.rejected if each.reason == missing and each.quote is not None]
            proven = [each for each in quotes if each.currency == currency and proves_time(each, now, self._rule)]
            against = [
                each.source for each in proven if differs(each.mid_e8, anchor.rate_e8, self._rule.deviation_bp_max)
            ]
            if 2 * len(against) > len(proven):
                reasons[currency] = f"{missing}, and {', '.join(sorted(against))} contradict the last price"
            elif still := sorted(set(self._used.get(currency, ())) & set(frozen)):
                reasons[currency] = f"{missing}, and {', '.join(still)}, of which the last price was made, stand still"
        return reasons

    def _may_be_behind(self, currency: Currency, now: datetime) -> bool:
        """Whether another updater may have published later prices than the one that is remembered here."""
        own = self._anchors.get(currency)
        return own is None or now - own.as_of > self._own_age_max

    async def note_published(self, record: PriceRecord) -> None:
        """Compares the next prices with those of this record. Where they cannot be kept, the next ones will be."""
        anchors = anchors_of(record, self._anchors)
        self._anchors |= anchors
        self._used = {**self._used, **{each: _sources_of(record, each) for each in record.rates_e8}}
        try:
            await self._store.keep_anchors(anchors)
        except DeskError as error:
            self._log.debug("The last prices could not be kept: %s", error.detail)


def _sources_of(record: PriceRecord, currency: Currency) -> set[str]:
    return {quote.source for quote in record.used if quote.currency == currency}


def unsettled_reasons(
    rates_e8: Mapping[Currency, int],
    anchors: Mapping[Currency, Anchor],
    before_e8: Mapping[Currency, int],
    confirmations: Collection[Confirmation],
    *,
    now: datetime,
    limits: ChangeLimits,
) -> dict[Currency, str]:
    """Why each of the prices that are unsettled is; `before_e8` are those seen before (`Sightings`). Pure, in
    integers."""
    reasons = {}
    for currency, rate_e8 in rates_e8.items():
        anchor = anchors.get(currency)
        if anchor is None or is_confirmed(currency, rate_e8, confirmations):
            continue
        reason = _far(rate_e8, anchor, now, limits) or _crossed(currency, rates_e8, anchors, confirmations, limits)
        if reason := reason or _jumped(rate_e8, anchor, before_e8.get(currency), limits):
            reasons[currency] = reason
    return reasons


def is_confirmed(currency: Currency, rate_e8: int, confirmations: Collection[Confirmation]) -> bool:
    """Whether an operator said that a bitcoin may cost that."""
    return any(each.currency == currency and each.low_e8 <= rate_e8 <= each.high_e8 for each in confirmations)


def _far(rate_e8: int, anchor: Anchor, now: datetime, limits: ChangeLimits) -> str:
    bp_max = limits.old_anchor_bp_max if now - anchor.as_of > _OLD else limits.anchor_bp_max
    if not differs(rate_e8, anchor.rate_e8, bp_max):
        return ""
    last = f"{format_rate(anchor.rate_e8)} of {format_time(anchor.as_of)}"
    return f"is more than {percent(bp_max)} from the last price, {last}, {_UNTIL_CONFIRMED}"


def _crossed(
    currency: Currency,
    rates_e8: Mapping[Currency, int],
    anchors: Mapping[Currency, Anchor],
    confirmations: Collection[Confirmation],
    limits: ChangeLimits,
) -> str:
    # Each through the dollars of its own time: between prices of different times the bitcoin itself has moved.
    dollars_e8 = {each: dollar for each in rates_e8 if each in anchors and (dollar := anchors[each].dollar_e8)}
    others = [each for each in dollars_e8 if each != currency] if currency in dollars_e8 else []
    if Currency.USD in others:  # the implied EUR/USD and GBP/USD rates
        others = [Currency.USD]
    against = []
    for other in others:
        before = anchors[currency].rate_e8 * dollars_e8[other] * rates_e8[other]
        after = rates_e8[currency] * anchors[other].rate_e8 * dollars_e8[currency]
        if abs(after - before) * _BP <= before * limits.cross_bp_max:
            return ""
        if not is_confirmed(other, rates_e8[other], confirmations):  # or it is the other that has moved
            against.append(other)
    if not against:
        return ""
    named = " and ".join(sorted(against))
    return f"has moved more than {percent(limits.cross_bp_max)} against {named}, {_UNTIL_CONFIRMED}"


def _jumped(rate_e8: int, anchor: Anchor, before_e8: int | None, limits: ChangeLimits) -> str:
    if not differs(rate_e8, anchor.rate_e8, limits.jump_bp_max):
        return ""
    if before_e8 is not None and not differs(rate_e8, before_e8, limits.jump_bp_max):
        return ""
    last = format_rate(anchor.rate_e8)
    return f"is more than {percent(limits.jump_bp_max)} from the last price, {last}, and was not seen twice yet"
