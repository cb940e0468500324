"""Verification of price records: whether a price follows from its record's quotes, by the rule with the limits it had.

Everything is computed again. Pure.
"""

from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from functools import lru_cache

from buydesk.money import Currency, format_rate
from buydesk.prices.model import SOURCES, PriceRecord, Rule, require_plausible
from buydesk.prices.rule import decide, listed, rule_of
from buydesk.prices.rule_v1 import decide_by_first_version
from buydesk.prices.signing import signature_discrepancy
from buydesk.reading import WrongMember
from buydesk.settings.model import PRICE_TTL_SECONDS_MAX, SOURCES_MIN, Settings
from buydesk.times import format_time

_DECIDE = {1: decide_by_first_version, 2: decide}


def require_proven(record: PriceRecord, settings: Settings, now: datetime) -> None:
    """Raises WrongMember unless the record may be a price of this desk: plausible now (`require_plausible`), signed
    with a key that the settings accept, of this desk's sources, and proven by its own quotes with limits that allow no
    more than the settings do.

    Whoever takes a record from another process, to publish, sell or store at it, asks this: what that one was set to,
    or got wrong, sells nothing.
    """
    require_plausible(record, settings.price_feed, settings.price_ttl_seconds, settings.clock_skew_seconds_max, now)
    if why := _unproven(record, rule_of(settings), settings.accepted_price_keys):
        raise WrongMember("record", why)


# For a minute each order brings the same record.
@lru_cache(maxsize=8)
def _unproven(record: PriceRecord, limits: Rule, keys: tuple[str, ...]) -> str:
    """Why the record's price is not proven within the limits, "" when it is."""
    of_limits = _discrepancies_of_limits(record.rule or limits, limits)
    return "; ".join([*_discrepancies_of_origin(record, keys), *discrepancies_of_record(record), *of_limits])


def _discrepancies_of_origin(record: PriceRecord, keys: tuple[str, ...]) -> Iterator[str]:
    if why := signature_discrepancy(record, keys):
        yield why
    named = {quote.source for quote in record.used} | {each.source for each in record.rejected}
    if strange := sorted(named.difference(SOURCES[record.feed])):
        yield f"the desk has no source {', '.join(strange)}"


def _discrepancies_of_limits(rule: Rule, limits: Rule) -> Iterator[str]:
    for name in ("quote_age_seconds", "spread_bp", "deviation_bp"):
        most, limit = getattr(rule, f"{name}_max"), getattr(limits, f"{name}_max")
        if most > limit:
            yield f"its rule allows a {name} of {most}, and this desk {limit}"
    if rule.version != limits.version:
        yield f"it was made by version {rule.version} of the rule, and this desk sells by version {limits.version}"
    if rule.sources_min < limits.sources_min:
        yield f"its rule is content with {rule.sources_min} sources, and this desk needs {limits.sources_min}"


def discrepancies_of_record(record: PriceRecord) -> Iterator[str]:
    """What of the record's price does not follow from its quotes, by the rule with the limits it had."""
    valid_for = record.expires_at - record.as_of
    if not timedelta() < valid_for <= timedelta(seconds=PRICE_TTL_SECONDS_MAX):
        yield f"the record is valid for {valid_for.total_seconds():g} s"
    if not record.used and record.rates_e8:
        yield "the record has no quotes"
    elif record.as_of != min((quote.observed_at for quote in record.used), default=record.decided_at):
        yield f"the record is dated {format_time(record.as_of)}, which is not when its oldest quote was observed"
    if record.rule is None or record.decided_at is None:
        yield "the record tells no rule, and not when it was applied"
    elif record.rule.sources_min < SOURCES_MIN:
        yield f"by the record's rule {record.rule.sources_min} source is enough, which proves nothing"
    elif record.rule.version not in _DECIDE:
        yield f"version {record.rule.version} of the pricing rule is not known"
    else:
        yield from _discrepancies_of_rule(record, record.rule, record.decided_at)


def _discrepancies_of_rule(record: PriceRecord, rule: Rule, decided_at: datetime) -> Iterator[str]:
    rejected = [each.quote for each in record.rejected if each.quote is not None]
    rates_e8, missing = dict(record.rates_e8), set(record.missing)
    for each, unsettled in record.unsettled.items():
        if unsettled.rate_e8 is None:
            missing.add(each)
        else:
            rates_e8[each] = unsettled.rate_e8
    # Of the currencies that it tells of: the desk may have got another one since.
    verdict = _DECIDE[rule.version]([*record.used, *rejected], decided_at, rule, dict.fromkeys([*rates_e8, *missing]))
    unexpected = {each: why for each, why in verdict.missing.items() if each not in missing}
    if unexpected:
        yield f"by the rule there is no price: {listed(unexpected)}"
    elif verdict.rates_e8 != rates_e8:
        yield f"the rates are {_written(rates_e8)}, and by the rule {_written(verdict.rates_e8)}"
    elif verdict.missing.keys() != missing:
        yield "by the rule no price is missing that is said to be"
    if sold := {each: why for each, why in verdict.unsettled.items() if each in record.rates_e8}:
        yield f"by the rule nothing is sold at a price: {listed(sold)}"
    if set(verdict.used) != set(record.used):
        yield "by the rule other quotes are used"
    if rule.version > 1 and (verdict.bids_e8, verdict.asks_e8) != (record.bids_e8, record.asks_e8):
        yield "by the rule the bids and asks are others"


def _written(rates_e8: Mapping[Currency, int]) -> str:
    return ", ".join(f"{currency} {format_rate(rate_e8)}" for currency, rate_e8 in rates_e8.items()) or "none"
