"""The pricing rule: how the quotes of several independent sources become one price, or none. Pure, in integers.

For each currency:

1. Quotes that no market shows are dropped: older than allowed or from the future, with a bid or ask outside the bounds
   of a rate, a bid above the ask, an ask too far above the bid. So are all of a source that gives more than one: it
   contradicts itself, and must not count twice.
2. Those further from the median of the rest than `deviation_bp_max` are set aside: a single wrong source, however far
   off, cannot move the median beyond its neighbours, so it is the wrong one that is found.
3. At least `sources_min` must be left, no two of them further apart than `deviation_bp_max`: two sources that disagree
   prove nothing, and neither does one.
4. The price is their median, which always lies between two quotes that agree.

This is all that five quotes allow, and anybody can check it by hand. A record is made only when every currency has a
price: a lasting fault in one should be noticed and fixed, not worked around, and one that lasts a tick or two costs
nothing, because the last record is still valid.

A price far from the last one is either news or a fault that all sources share: it has to be seen twice (`held_back`).
"""

import uuid
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from buydesk.money import RATE_E8_MAX, RATE_E8_MIN, Currency
from buydesk.prices.model import Feed, PriceRecord, Quote, RejectedQuote, Rule
from buydesk.settings.model import Settings

_BP = 10_000


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the rule makes of quotes: prices of some currencies, and for each other one why it has `missing` from them.

    Every quote is in `used` or, with its reason, in `rejected`; there without the quote if it is no rate at all.
    """

    rates_e8: Mapping[Currency, int]
    missing: Mapping[Currency, str]
    used: tuple[Quote, ...]
    rejected: tuple[RejectedQuote, ...]


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
    rates_e8: dict[Currency, int] = {}
    missing: dict[Currency, str] = {}
    used: list[Quote] = []
    rejected: list[RejectedQuote] = []
    for currency in currencies:
        fit, dropped = _fit([quote for quote in quotes if quote.currency == currency], now, rule)
        near, far = _near(fit, rule)
        rejected += dropped + far
        problem = _disagreement(near, rule)
        if problem:
            missing[currency] = problem
            rejected += [RejectedQuote(quote.source, problem, quote) for quote in near]
        else:
            rates_e8[currency] = median([quote.mid_e8 for quote in near])
            used += near
    return Verdict(rates_e8, missing, tuple(used), tuple(rejected))


def held_back(
    rates_e8: Mapping[Currency, int],
    last_e8: Mapping[Currency, int] | None,
    pending_e8: Mapping[Currency, int] | None,
    *,
    jump_bp_max: int,
    deviation_bp_max: int,
) -> list[Currency]:
    """The currencies whose rate jumps from the `last` one and was not seen before; empty when the rates may be used.

    `pending` are the rates of the tick before if they were held back too or could not be published, None otherwise;
    `last` is None before the first record.
    """
    if last_e8 is None or (pending_e8 is not None and not moved(rates_e8, pending_e8, deviation_bp_max)):
        return []
    return moved(rates_e8, last_e8, jump_bp_max)


def moved(rates_e8: Mapping[Currency, int], before_e8: Mapping[Currency, int], bp_max: int) -> list[Currency]:
    """The currencies whose rate is further from what it was before, if it was, than allowed."""
    both = rates_e8.keys() & before_e8.keys()
    return [each for each in rates_e8 if each in both and differs(rates_e8[each], before_e8[each], bp_max)]


def record_of(
    verdict: Verdict,
    unanswered: Sequence[RejectedQuote],
    feed: Feed,
    *,
    rule: Rule,
    decided_at: datetime,
    ttl: timedelta,
    replayed_from: datetime | None = None,
) -> PriceRecord:
    """The record of a verdict in which no currency is missing; `unanswered` says which sources gave no quotes.

    It keeps every quote that was decided on and no other, so that everybody can decide again (`verification`).
    """
    as_of = min(quote.observed_at for quote in verdict.used)
    return PriceRecord(
        id=uuid.uuid4(),
        as_of=as_of,
        expires_at=as_of + ttl,
        feed=feed,
        rates_e8=verdict.rates_e8,
        used=verdict.used,
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


def _fit(quotes: Sequence[Quote], now: datetime, rule: Rule) -> tuple[list[Quote], list[RejectedQuote]]:
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


def _near(fit: Sequence[Quote], rule: Rule) -> tuple[list[Quote], list[RejectedQuote]]:
    """Step 2: the quotes near their median, and the others."""
    if not fit:
        return [], []
    middle_e8 = median([quote.mid_e8 for quote in fit])
    far = [quote for quote in fit if differs(quote.mid_e8, middle_e8, rule.deviation_bp_max)]
    reason = f"is more than {percent(rule.deviation_bp_max)} from the median"
    near = [quote for quote in fit if quote not in far]
    return near, [RejectedQuote(quote.source, reason, quote) for quote in far]


def _disagreement(near: Sequence[Quote], rule: Rule) -> str:
    """Step 3: why these quotes prove no price, "" when they do."""
    if not near or len(near) < rule.sources_min:
        return f"only {len(near)} of at least {rule.sources_min} sources agree"
    mids_e8 = [quote.mid_e8 for quote in near]
    if differs(max(mids_e8), min(mids_e8), rule.deviation_bp_max):
        return f"the sources are more than {percent(rule.deviation_bp_max)} apart"
    return ""
