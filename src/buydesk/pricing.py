"""The pricing rule: how the quotes of several independent sources become one price, or none. Pure, in integers.

For each currency:

1. Quotes that no market shows are dropped: older than allowed or from the future, with a bid or ask outside the bounds
   of a rate, a bid above the ask, an ask too far above the bid, and any but the first of the same source.
2. Those further from the median of the rest than `deviation_bp_max` are set aside: a single wrong source, however far
   off, cannot move the median beyond its neighbours, so it is the wrong one that is found.
3. At least `sources_min` must be left, no two of them further apart than `deviation_bp_max`: two sources that disagree
   prove nothing, and neither does one.
4. The price is their median, which always lies between two quotes that agree.

Nothing cleverer: of five quotes no better statistics can be made, and everybody can check this with a pencil. A record
is made only when every currency has a price: a lasting fault in one shall be seen and mended, not sold around, and one
that lasts a tick or two costs nothing, because the last record is still valid.
"""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from buydesk.money import RATE_E8_MAX, RATE_E8_MIN, Currency
from buydesk.prices import Feed, PriceRecord, Quote, Rejection, Rule

_BP = 10_000


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the rule makes of quotes: prices of some currencies, and for each other one why it has `missing` from them.

    Every quote is in `used` or, with its reason, in `rejected`.
    """

    rates_e8: Mapping[Currency, int]
    missing: Mapping[Currency, str]
    used: tuple[Quote, ...]
    rejected: tuple[Rejection, ...]


def decide(quotes: Sequence[Quote], now: datetime, rule: Rule) -> Verdict:
    """The rule, applied to quotes at a time. The order of the quotes does not matter, except among those of one source
    for one currency."""
    rates_e8: dict[Currency, int] = {}
    missing: dict[Currency, str] = {}
    used: list[Quote] = []
    rejected: list[Rejection] = []
    for currency in Currency:
        fit, set_aside = _apart(quotes, currency, now, rule)
        rejected += set_aside
        problem = _disagreement(fit, rule)
        if problem:
            missing[currency] = problem
            rejected += [Rejection(quote.source, problem, quote) for quote in fit]
        else:
            rates_e8[currency] = median([quote.mid_e8 for quote in fit])
            used += fit
    return Verdict(rates_e8, missing, tuple(used), tuple(rejected))


def median(values: Sequence[int]) -> int:
    """The middle value; of two middle values their mean, half a unit rounded up."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else -(-(ordered[middle - 1] + ordered[middle]) // 2)


def differs(one_e8: int, other_e8: int, bp_max: int) -> bool:
    """Whether the first rate is more than `bp_max` basis points of the other one away from it."""
    return abs(one_e8 - other_e8) * _BP > other_e8 * bp_max


def moved(rates_e8: Mapping[Currency, int], before_e8: Mapping[Currency, int], bp_max: int) -> list[Currency]:
    """The currencies whose rate is further from what it was before than allowed."""
    return [currency for currency, rate_e8 in rates_e8.items() if differs(rate_e8, before_e8[currency], bp_max)]


def record_of(
    verdict: Verdict,
    unanswered: Sequence[Rejection],
    feed: Feed,
    *,
    rule: Rule,
    decided_at: datetime,
    ttl: timedelta,
    replayed_from: datetime | None = None,
) -> PriceRecord:
    """The record of a verdict in which no currency is missing; `unanswered` are the sources that gave no quotes."""
    as_of = min(quote.observed_at for quote in verdict.used)
    return PriceRecord(
        id=uuid.uuid4(),
        as_of=as_of,
        expires_at=as_of + ttl,
        feed=feed,
        rates_e8=verdict.rates_e8,
        used=verdict.used,
        rejected=(*verdict.rejected, *unanswered),
        replayed_from=replayed_from,
        rule=rule,
        decided_at=decided_at,
    )


def _apart(
    quotes: Sequence[Quote], currency: Currency, now: datetime, rule: Rule
) -> tuple[list[Quote], list[Rejection]]:
    """Steps 1 and 2: the quotes of a currency that are fit to agree, and the others."""
    fit: dict[str, Quote] = {}
    rejected = []
    for quote in quotes:
        if quote.currency != currency:
            continue
        if not _is_rate(quote.bid_e8) or not _is_rate(quote.ask_e8):
            rejected.append(
                Rejection(quote.source, f"the {currency} quote is no price of a bitcoin")
            )  # nor can be kept
            continue
        reason = "is a second quote of the same source" if quote.source in fit else _unfit(quote, now, rule)
        if reason:
            rejected.append(Rejection(quote.source, reason, quote))
        else:
            fit[quote.source] = quote
    if not fit:
        return [], rejected
    middle_e8 = median([quote.mid_e8 for quote in fit.values()])
    near = []
    for quote in fit.values():
        if differs(quote.mid_e8, middle_e8, rule.deviation_bp_max):
            reason = f"is more than {percent(rule.deviation_bp_max)} from the median"
            rejected.append(Rejection(quote.source, reason, quote))
        else:
            near.append(quote)
    return near, rejected


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


def _is_rate(rate_e8: int) -> bool:
    return RATE_E8_MIN <= rate_e8 <= RATE_E8_MAX


def _disagreement(fit: Sequence[Quote], rule: Rule) -> str:
    """Step 3: why these quotes prove no price, "" when they do."""
    if len(fit) < rule.sources_min:
        return f"only {len(fit)} of at least {rule.sources_min} sources agree"
    mids_e8 = [quote.mid_e8 for quote in fit]
    if differs(max(mids_e8), min(mids_e8), rule.deviation_bp_max):
        return f"the sources are more than {percent(rule.deviation_bp_max)} apart"
    return ""


def percent(bp: int) -> str:
    """Basis points as people write them: 150 is ``"1.5 %"``."""
    return f"{bp // 100}.{bp % 100:02d}".rstrip("0").rstrip(".") + " %"
