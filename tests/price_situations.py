"""Generated situations of the pricing rule, and the rule once more, written anew from its sentences in decimals.

A situation is what the sources say of one currency. `python -m tests.price_situations SEED` checks SITUATIONS of them.
"""

import random
import sys
import uuid
from collections import Counter
from datetime import UTC, datetime, timedelta
from decimal import ROUND_HALF_UP, Decimal
from itertools import chain, combinations

from msgspec.structs import replace

from buydesk.errors import PriceUnavailable, PriceUnsettled
from buydesk.money import Currency
from buydesk.orders.model import NewOrder
from buydesk.orders.pricing import placed_order, price_order
from buydesk.prices.model import Quote, Rule, valid_record
from buydesk.prices.rule import Verdict, decide, record_of
from tests.proof import discrepancies

CURRENCIES = tuple(Currency)
SITUATIONS = 50_000
TICKS_PER_MARKET = 200
NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)
TICK = timedelta(microseconds=1)
TTL = timedelta(seconds=60)
RULE = Rule(quote_age_seconds_max=30, spread_bp_max=100, deviation_bp_max=100, sources_min=2)
OTHER_RULES = [
    replace(RULE, sources_min=3),
    replace(RULE, sources_min=4),
    replace(RULE, deviation_bp_max=1),
    replace(RULE, deviation_bp_max=700, spread_bp_max=1),
    replace(RULE, quote_age_seconds_max=1),
]
SOURCES = ("bitfinex", "bitstamp", "coinbase", "gemini", "kraken", "sixth")
VARIANTS = 8
LOWEST, HIGHEST = 10**8, 10**18  # 1 and 10^10 of a currency for a bitcoin

Market = list[list[Quote]]  # by source: what it may say


def market(dice: random.Random, currency: Currency, rule: Rule) -> Market:
    """What the sources may say of one currency; every limit of the rule is met, and missed by the least there is."""
    close_e8 = int(10 ** (8 + 10 * dice.random())) if dice.random() < 0.2 else int(10 ** (11 + 4 * dice.random()))
    if dice.random() < 0.05:
        close_e8 = dice.choice([10**8, 10**18])
    return [[quote(dice, source, currency, close_e8, rule) for _ in range(VARIANTS)] for source in SOURCES]


def quote(dice: random.Random, source: str, currency: Currency, close_e8: int, rule: Rule) -> Quote:
    bid_e8, ask_e8 = bid_and_ask(dice, around(dice, close_e8, rule.deviation_bp_max), rule.spread_bp_max)
    age_max = timedelta(seconds=rule.quote_age_seconds_max)
    # Half of the sources have no clock; every second one of these has stood still for longer than is proven.
    changed_at = NOON - age_max * 4 * dice.random() ** 2 if source in SOURCES[3:] else None
    return Quote(source, currency, bid_e8, ask_e8, NOON - age(dice, age_max), changed_at)


def around(dice: random.Random, close_e8: int, bp: int) -> int:
    """A middle: mostly near the close, often at the very edge of what agrees, sometimes anywhere."""
    kind = dice.random()
    if kind < 0.55:
        return close_e8 + int(close_e8 * bp * (dice.random() - 0.5) * 0.9 / 10_000)
    if kind < 0.80:
        edge = dice.choice([-2, -1, 1, 2]) * close_e8 * bp // 20_000
        return close_e8 + edge + dice.randint(-2, 2)
    if kind < 0.92:
        return close_e8 + int(close_e8 * bp * (dice.random() - 0.5) * 6 / 10_000)
    return dice.choice([close_e8 * 7 // 10, close_e8 * 13 // 10, close_e8 * 100, close_e8 // 100, 10**8, 10**18, 1])


def bid_and_ask(dice: random.Random, middle_e8: int, spread_bp: int) -> tuple[int, int]:
    kind = dice.random()
    if kind < 0.7:
        half_e8 = int(middle_e8 * spread_bp * dice.random() / 25_000)
        return middle_e8 - half_e8, middle_e8 + half_e8 + dice.randint(0, 1)
    if kind < 0.8:
        return middle_e8, middle_e8
    if kind < 0.9:  # as wide as allowed, or a little less or more
        return middle_e8, middle_e8 + middle_e8 * spread_bp // 10_000 + dice.randint(-1, 1)
    if kind < 0.94:
        return middle_e8 + 1, middle_e8
    nonsense: list[tuple[int, int]] = [
        (0, 0),
        (-middle_e8, -middle_e8),
        (10**38, 10**38),
        (0, middle_e8),
        (10**8 - 1, 10**8),
        (10**18, 10**18 + 1),
        (float(middle_e8), float(middle_e8)),  # type: ignore[list-item]
        (middle_e8, float("nan")),  # type: ignore[list-item]
        (middle_e8, float("inf")),  # type: ignore[list-item]
    ]
    return dice.choice(nonsense)


def age(dice: random.Random, age_max: timedelta) -> timedelta:
    kind = dice.random()
    if kind < 0.8:
        return age_max * dice.random()
    return dice.choice([timedelta(0), -TICK, age_max, age_max + TICK, -TTL, TTL, timedelta(days=1)])


def said(dice: random.Random, market: Market) -> list[Quote]:
    """What those say who answer: each one thing, or in a situation of 32 one of them two things."""
    bits = dice.getrandbits(11)
    quotes = [variants[int(VARIANTS * dice.random())] for number, variants in enumerate(market) if bits >> number & 1]
    if quotes and bits >> 6 == 0:
        quotes.append(market[SOURCES.index(quotes[0].source)][0])
    return quotes


def price_by_hand(quotes: list[Quote], rule: Rule) -> tuple[Decimal, list[Quote], bool] | None:
    """The rule for one currency, in decimals: the price in units of 10^-8, the quotes that agreed on it and whether it
    is contradicted; or None."""
    rates = [each for each in quotes if isinstance(each.bid_e8, int) and isinstance(each.ask_e8, int)]
    rates = [each for each in rates if LOWEST <= each.bid_e8 <= HIGHEST and LOWEST <= each.ask_e8 <= HIGHEST]
    names = [each.source for each in rates]
    oldest = NOON - timedelta(seconds=rule.quote_age_seconds_max)
    spread_max = 1 + Decimal(rule.spread_bp_max) / 10_000
    fit = []
    for each in rates:
        bid, ask = Decimal(each.bid_e8), Decimal(each.ask_e8)
        if names.count(each.source) == 1 and oldest <= each.observed_at <= NOON and bid <= ask <= bid * spread_max:
            fit.append((middle_of([bid, ask]), each))
    agreed = largest_that_agree(fit, Decimal(rule.deviation_bp_max) / 100)
    if len(agreed) < rule.sources_min or len(agreed) <= len(fit) / 2:
        return None
    proven = [each for each in fit if each[1].changed_at is None or each[1].changed_at >= oldest]
    is_contradicted = len([each for each in proven if each in agreed]) < len(proven) / 2
    return middle_of([mid for mid, _ in agreed]), [each for _, each in agreed], is_contradicted


def largest_that_agree(fit: list[tuple[Decimal, Quote]], percent_max: Decimal) -> list[tuple[Decimal, Quote]]:
    """Of all sets of quotes those that agree, of these the largest, then the tightest, then the highest."""
    ordered = sorted(fit, key=lambda each: (each[0], each[1].source))
    for size in range(len(ordered), 0, -1):
        chosen = map(list, combinations(ordered, size))
        if sets := [each for each in chosen if near(each[-1][0], each[0][0], percent_max)]:
            return min(sets, key=lambda each: (each[-1][0] - each[0][0], -each[0][0]))
    return []


def near(one: Decimal, other: Decimal, percent_max: Decimal) -> bool:
    return abs(one - other) * 100 <= other * percent_max


def middle_of(values: list[Decimal]) -> Decimal:
    """The lower and the upper median's mean, to a whole unit."""
    ordered, last = sorted(values), len(values) - 1
    return ((ordered[last // 2] + ordered[-1 - last // 2]) / 2).to_integral_value(ROUND_HALF_UP)


def check(seed: int, situations: int) -> Counter[str]:
    """Raises AssertionError when a situation yields anything but what the rule says; counts what was seen."""
    dice = random.Random(seed)  # noqa: S311  # nobody has to be kept from guessing
    seen: Counter[str] = Counter()
    while seen["situations"] < situations:
        rule = RULE if dice.random() < 0.7 else dice.choice(OTHER_RULES)
        markets = [market(dice, currency, rule) for currency in Currency]
        for _ in range(TICKS_PER_MARKET):
            quotes = [said(dice, each) for each in markets]
            try:
                check_tick(quotes, rule, seen)
            except AssertionError as error:
                error.add_note(f"python -m tests.price_situations {seed} came to {quotes} and {rule}")
                raise
    return seen


def check_tick(quotes: list[list[Quote]], rule: Rule, seen: Counter[str]) -> None:
    """One application of the rule: a situation of each currency, and the record if one of them has a price."""
    verdict = decide(list(chain(*quotes)), NOON, rule)
    by_hand = [price_by_hand(each, rule) for each in quotes]
    assert list(verdict.used) == [each for priced in by_hand if priced for each in priced[1]]
    assert len(verdict.used) + len(verdict.rejected) == sum(map(len, quotes))
    for currency, priced in zip(Currency, by_hand, strict=True):
        seen["situations"] += 1
        if priced is None:
            assert currency in verdict.missing
            assert currency not in verdict.rates_e8
        else:
            price, agreed, is_contradicted = priced
            assert currency not in verdict.missing
            assert (currency in verdict.unsettled) is is_contradicted
            check_price(verdict.rates_e8[currency], price, agreed, rule)
            seen["contradicted"] += is_contradicted
            seen["prices"] += 1
    if verdict.rates_e8:
        check_record(verdict, rule)
        seen["records"] += 1
    for rejected in verdict.rejected:
        seen[rejected.reason] += 1


def check_price(rate_e8: int, price: Decimal, agreed: list[Quote], rule: Rule) -> None:
    mids_e8 = [each.mid_e8 for each in agreed]
    assert type(rate_e8) is int
    assert Decimal(rate_e8) == price
    assert min(mids_e8) <= rate_e8 <= max(mids_e8)
    assert len({each.source for each in agreed}) == len(agreed) >= rule.sources_min


def check_record(verdict: Verdict, rule: Rule) -> None:
    """What is published is fresh, and the orders priced with it can be proven."""
    unsettled = {each: "moved" for each in verdict.rates_e8 if verdict.rates_e8[each] % 7 == 0}
    record = record_of(verdict, [], "live", unsettled=unsettled, rule=rule, decided_at=NOON, ttl=TTL)
    assert NOON - timedelta(seconds=rule.quote_age_seconds_max) <= record.as_of <= NOON
    assert record.expires_at - record.as_of == TTL
    assert valid_record(record, NOON, 0) is record
    for currency in CURRENCIES:
        new = NewOrder(uuid.UUID(int=1), "anonymous", None, currency, record.as_of.microsecond + 1)
        priced = price_order(new, record, NOON)
        if currency in record.rates_e8:
            assert discrepancies(placed_order(priced, 1, 1, NOON, livemode=True), record) == []
        else:
            assert isinstance(priced.price, PriceUnsettled if currency in record.unsettled else PriceUnavailable)


if __name__ == "__main__":
    print(check(int(sys.argv[1]), SITUATIONS))  # noqa: T201
