"""The pricing rule: how the quotes of several independent sources become one price, or none. Pure, in integers.

For each currency by itself:

1. Quotes that no market shows are dropped: older than allowed or from the future, with a bid or ask outside the bounds
   of a rate, a bid above the ask, an ask too far above the bid. So are all of a source that gives more than one: it
   contradicts itself, and must not count twice.
2. The largest cluster of those that are left is found: quotes no two of which are further apart than
   `deviation_bp_max`. Of clusters of one size the tightest counts, of equally tight ones the highest: the desk sells.
3. The cluster must hold more than half of the quotes that are left, and at least `sources_min`: no minority makes a
   price, and no quote at the edge keeps the others from making one.
4. The price is the median of the cluster's middles of bid and ask. It lies between two quotes that agree.
5. Quotes that prove their time outrank those that do not. A quote proves it by its source's own clock or, without one,
   by a book that changed within `quote_age_seconds_max`. If more of them lie outside the cluster than in it, the price
   is unsettled, that is not sold at: what the others repeat may have stood still.

Anybody can check this by hand. A price that follows may be unsettled for other reasons too (`guard`).
"""

import uuid
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from buydesk.money import RATE_E8_MAX, RATE_E8_MIN, Currency
from buydesk.prices.model import Feed, PriceRecord, Quote, RejectedQuote, Rule, UnsettledRate
from buydesk.settings.model import Settings

_BP = 10_000


@dataclass(slots=True)
class Verdict:
    """What the rule makes of quotes: prices of some currencies, and for each other one why it has `missing` from them;
    `unsettled` says which of the prices are contradicted.

    `bids_e8` and `asks_e8` are the medians of the quotes used. Every quote is in `used` or, with its reason, in
    `rejected`; there without the quote if it is no rate at all.
    """

    rates_e8: dict[Currency, int] = field(default_factory=dict)
    bids_e8: dict[Currency, int] = field(default_factory=dict)
    asks_e8: dict[Currency, int] = field(default_factory=dict)
    missing: dict[Currency, str] = field(default_factory=dict)
    unsettled: dict[Currency, str] = field(default_factory=dict)
    used: list[Quote] = field(default_factory=list)
    rejected: list[RejectedQuote] = field(default_factory=list)

    def price(self, currency: Currency, agreed: Sequence[Quote]) -> None:
        """The quotes make the price of the currency."""
        self.rates_e8[currency] = median([quote.mid_e8 for quote in agreed])
        self.bids_e8[currency] = median([quote.bid_e8 for quote in agreed])
        self.asks_e8[currency] = median([quote.ask_e8 for quote in agreed])
        self.used += agreed

    def leave_out(self, currency: Currency, problem: str, quotes: Sequence[Quote]) -> None:
        """The quotes make no price of the currency."""
        self.missing[currency] = problem
        self.rejected += [RejectedQuote(quote.source, problem, quote) for quote in quotes]


def rule_of(settings: Settings) -> Rule:
    """The pricing rule with the limits of the settings."""
    return Rule(
        quote_age_seconds_max=settings.quote_age_seconds_max,
        spread_bp_max=settings.price_spread_bp_max,
        deviation_bp_max=settings.price_deviation_bp_max,
        sources_min=settings.price_sources_min,
    )


def decide(
    quotes: Sequence[Quote], now: datetime, rule: Rule, currencies: Collection[Currency] = tuple(Currency)
) -> Verdict:
    """The rule, applied to the quotes of the currencies at a time. The order of the quotes does not matter."""
    verdict = Verdict()
    for currency in currencies:
        fit, dropped = fit_quotes([quote for quote in quotes if quote.currency == currency], now, rule)
        verdict.rejected += dropped
        agreed = largest_cluster(fit, rule.deviation_bp_max)
        if problem := _no_majority(agreed, fit, rule):
            verdict.leave_out(currency, problem, fit)
            continue
        verdict.price(currency, agreed)
        if problem := _contradicted(agreed, fit, now, rule):
            verdict.unsettled[currency] = problem
        reason = f"is more than {percent(rule.deviation_bp_max)} from those that agree"
        verdict.rejected += [RejectedQuote(quote.source, reason, quote) for quote in fit if quote not in agreed]
    return verdict


def largest_cluster(fit: Sequence[Quote], deviation_bp_max: int) -> list[Quote]:
    """Step 2: the most quotes no two of which are further apart than allowed, in basis points of the lower one."""
    ordered = sorted(fit, key=lambda quote: (quote.mid_e8, quote.source))
    clusters = [
        [quote for quote in ordered[start:] if not differs(quote.mid_e8, lowest.mid_e8, deviation_bp_max)]
        for start, lowest in enumerate(ordered)
    ]
    return max(clusters, key=lambda each: (len(each), each[0].mid_e8 - each[-1].mid_e8, each[0].mid_e8), default=[])


def record_of(
    verdict: Verdict,
    unanswered: Sequence[RejectedQuote],
    feed: Feed,
    *,
    unsettled: Mapping[Currency, str],
    rule: Rule,
    decided_at: datetime,
    ttl: timedelta,
    replayed_from: datetime | None = None,
) -> PriceRecord:
    """The record of a verdict; `unsettled` says in which currencies, besides the verdict's, nothing is to be sold and
    why, `unanswered` which sources gave no quotes.

    It keeps every quote that was decided on and no other, so that everybody can decide again (`verification`).
    """
    as_of = min((quote.observed_at for quote in verdict.used), default=decided_at)
    unsettled = {**unsettled, **verdict.unsettled}
    return PriceRecord(
        id=uuid.uuid4(),
        as_of=as_of,
        expires_at=as_of + ttl,
        feed=feed,
        rates_e8={each: rate_e8 for each, rate_e8 in verdict.rates_e8.items() if each not in unsettled},
        bids_e8=verdict.bids_e8,
        asks_e8=verdict.asks_e8,
        missing={each: reason for each, reason in verdict.missing.items() if each not in unsettled},
        unsettled={each: UnsettledRate(verdict.rates_e8.get(each), reason) for each, reason in unsettled.items()},
        used=tuple(verdict.used),
        rejected=(*verdict.rejected, *(RejectedQuote(each.source, each.reason) for each in unanswered)),
        replayed_from=replayed_from,
        rule=rule,
        decided_at=decided_at,
    )


def median(values: Sequence[int]) -> int:
    """The middle value; of two middle values their mean, half a unit rounded up."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else -(-(ordered[middle - 1] + ordered[middle]) // 2)


def differs(one_e8: int, other_e8: int, bp_max: int) -> bool:
    """Whether the first rate is more than `bp_max` basis points of the other one away from it."""
    return abs(one_e8 - other_e8) * _BP > other_e8 * bp_max


def is_price(quote: Quote) -> bool:
    """Whether the quote's bid and ask can be what a bitcoin costs: within the bounds of a rate, and no floats."""
    rates_e8 = (quote.bid_e8, quote.ask_e8)
    return all(type(rate_e8) is int and RATE_E8_MIN <= rate_e8 <= RATE_E8_MAX for rate_e8 in rates_e8)


def percent(bp: int) -> str:
    """Basis points as people write them: 150 is ``"1.5 %"``."""
    return f"{bp // 100}.{bp % 100:02d}".rstrip("0").rstrip(".") + " %"


def listed(reasons: Mapping[Currency, str]) -> str:
    """What is the matter with each currency: ``"EUR, USD: is older than 30 s; GBP: …"``, "" when nothing is."""
    currencies: dict[str, list[str]] = {}
    for currency, reason in reasons.items():
        currencies.setdefault(reason, []).append(currency)
    return "; ".join(f"{', '.join(each)}: {reason}" for reason, each in currencies.items())


def fit_quotes(quotes: Sequence[Quote], now: datetime, rule: Rule) -> tuple[list[Quote], list[RejectedQuote]]:
    """Step 1, for the quotes of one currency: those that are fit by themselves, and the others."""
    fit: list[Quote] = []
    dropped: list[RejectedQuote] = []
    sources = Counter(quote.source for quote in quotes if is_price(quote))
    for quote in quotes:
        if not is_price(quote):  # what is no rate cannot be written down either
            dropped.append(RejectedQuote(quote.source, f"{quote.currency}: is no price of a bitcoin"))
        elif sources[quote.source] > 1:
            dropped.append(RejectedQuote(quote.source, "is not the only one of its source", quote))
        elif reason := _unfit(quote, now, rule):
            dropped.append(RejectedQuote(quote.source, reason, quote))
        else:
            fit.append(quote)
    return fit, dropped


def _unfit(quote: Quote, now: datetime, rule: Rule) -> str:
    """What is wrong with the quote by itself, "" when nothing is."""
    if quote.observed_at > now:
        return "is from the future"
    if now - quote.observed_at > timedelta(seconds=rule.quote_age_seconds_max):
        return f"is older than {rule.quote_age_seconds_max} s"
    if quote.bid_e8 > quote.ask_e8:
        return "has a bid above its ask"
    if differs(quote.ask_e8, quote.bid_e8, rule.spread_bp_max):
        return f"has an ask more than {percent(rule.spread_bp_max)} above its bid"
    return ""


def _no_majority(agreed: Sequence[Quote], fit: Sequence[Quote], rule: Rule) -> str:
    """Step 3: why these quotes, of those that are fit, make no price, "" when they do."""
    if len(agreed) < rule.sources_min:
        return f"only {len(agreed)} of at least {rule.sources_min} sources agree"
    if 2 * len(agreed) <= len(fit):
        return f"only {len(agreed)} of {len(fit)} sources agree, which is no majority"
    return ""


def _contradicted(agreed: Sequence[Quote], fit: Sequence[Quote], now: datetime, rule: Rule) -> str:
    """Step 5: who contradicts these quotes, "" when nobody does whose word counts for more."""
    proven = [quote for quote in fit if proves_time(quote, now, rule)]
    against = [quote.source for quote in proven if quote not in agreed]
    if 2 * len(against) > len(proven):
        return f"is contradicted by {', '.join(sorted(against))}, which prove their time"
    return ""


def proves_time(quote: Quote, now: datetime, rule: Rule) -> bool:
    """Whether the quote is known to be no older than allowed: by its source's clock, or a change of its book."""
    return quote.changed_at is None or now - quote.changed_at <= timedelta(seconds=rule.quote_age_seconds_max)
