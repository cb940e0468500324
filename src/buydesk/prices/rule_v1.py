"""The first version of the pricing rule, for the records that were made by it: they stay with their orders.

It differs from the present one (`rule`) in what it makes of the quotes of a currency that are fit: those further from
their median than `deviation_bp_max` are set aside, the rest must be no further apart than that, and the price is their
median.
"""

from collections.abc import Collection, Sequence
from datetime import datetime

from buydesk.money import Currency
from buydesk.prices.model import Quote, RejectedQuote, Rule
from buydesk.prices.rule import Verdict, differs, fit_quotes, median, percent


def decide_by_first_version(
    quotes: Sequence[Quote], now: datetime, rule: Rule, currencies: Collection[Currency]
) -> Verdict:
    """The first version, applied to the quotes of the currencies at a time."""
    verdict = Verdict()
    for currency in currencies:
        fit, dropped = fit_quotes([quote for quote in quotes if quote.currency == currency], now, rule)
        near, far = _near(fit, rule)
        verdict.rejected += dropped + far
        problem = _disagreement(near, rule)
        if problem:
            verdict.leave_out(currency, problem, near)
        else:
            verdict.price(currency, near)
    return verdict


def _near(fit: Sequence[Quote], rule: Rule) -> tuple[list[Quote], list[RejectedQuote]]:
    """The quotes near their median, and the others."""
    if not fit:
        return [], []
    middle_e8 = median([quote.mid_e8 for quote in fit])
    far = [quote for quote in fit if differs(quote.mid_e8, middle_e8, rule.deviation_bp_max)]
    reason = f"is more than {percent(rule.deviation_bp_max)} from the median"
    near = [quote for quote in fit if quote not in far]
    return near, [RejectedQuote(quote.source, reason, quote) for quote in far]


def _disagreement(near: Sequence[Quote], rule: Rule) -> str:
    """Why these quotes prove no price, "" when they do."""
    if not near or len(near) < rule.sources_min:
        return f"only {len(near)} of at least {rule.sources_min} sources agree"
    mids_e8 = [quote.mid_e8 for quote in near]
    if differs(max(mids_e8), min(mids_e8), rule.deviation_bp_max):
        return f"the sources are more than {percent(rule.deviation_bp_max)} apart"
    return ""
