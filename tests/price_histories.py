"""Generated histories of a market and of what five sources say of it, tick by tick: frozen, lying, late and leaving
sources, real jumps, and restarts of the updater between. What is published is held against what is known here.

`python -m tests.price_histories SEED` checks SITUATIONS of them, each one tick of one currency.
"""

import random
import sys
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from buydesk.money import Currency
from buydesk.prices.anchors import Anchor
from buydesk.prices.guard import Sightings, change_limits, unsettled_reasons
from buydesk.prices.model import Quote, Rule
from buydesk.prices.rule import decide, differs
from tests.builders import settings

SITUATIONS = 50_000
TICKS = 200
TICK_SECONDS = 15
UNCHANGED_SECONDS_MAX = 120
CLOCKED = ("bitstamp", "coinbase")
SOURCES = (*CLOCKED, "bitfinex", "gemini", "kraken")
NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)
RULE = Rule(quote_age_seconds_max=30, spread_bp_max=100, deviation_bp_max=100, sources_min=2)
LIMITS = change_limits(settings())
EUR = Currency.EUR
# How a source is for a while, and how likely that begins at a tick.
MOODS = {"frozen": 0.004, "lying": 0.004, "late": 0.01, "away": 0.006, "wide": 0.003}


@dataclass
class Source:
    """What one source says. A frozen one repeats its last answer; those that lie in step share a factor."""

    name: str
    mood: str = "right"
    ticks_left: int = 0
    factor: float = 1.0
    bid_e8: int = 0
    ask_e8: int = 0
    changed_at: datetime = NOON

    def next_mood(self, dice: random.Random, shared_lie: float) -> None:
        self.ticks_left -= 1
        if self.ticks_left > 0:
            return
        self.mood, self.ticks_left = "right", 1
        drawn = dice.random()
        for mood, likely in MOODS.items():
            if drawn < likely:
                self.mood, self.ticks_left = mood, dice.randint(1, 30)
                self.factor = (
                    shared_lie if dice.random() < 0.5 else dice.choice([0.5, 0.97, 0.99, 1.0096, 1.015, 1.2, 2])
                )
                return
            drawn -= likely

    def quote(self, dice: random.Random, now: datetime, true_e8: int) -> Quote | None:
        if self.mood == "away" or (self.mood == "frozen" and not self.bid_e8):
            return None
        if self.mood != "frozen":
            factor = self.factor if self.mood == "lying" else 1.0
            middle_e8 = int(true_e8 * factor * (1 + dice.uniform(-0.001, 0.001)))
            half_e8 = middle_e8 * (dice.choice([60, 400]) if self.mood == "wide" else dice.randint(0, 5)) // 10_000
            self.bid_e8, self.ask_e8, self.changed_at = middle_e8 - half_e8, middle_e8 + half_e8, now
        observed_at = now
        if self.mood == "late":
            observed_at = now - timedelta(seconds=dice.randint(1, 45))
        if self.name in CLOCKED:
            return Quote(self.name, EUR, self.bid_e8, self.ask_e8, min(observed_at, self.changed_at))
        if now - self.changed_at > timedelta(seconds=UNCHANGED_SECONDS_MAX):
            return None  # set aside by the poller
        return Quote(self.name, EUR, self.bid_e8, self.ask_e8, observed_at, min(observed_at, self.changed_at))


def sightings() -> Sightings:
    return Sightings(LIMITS.jump_bp_max, RULE.sources_min, timedelta(seconds=60))


@dataclass
class History:
    """A market and what the desk makes of it."""

    dice: random.Random
    now: datetime = NOON
    true_e8: int = 20_000 * 10**8
    sources: list[Source] = field(default_factory=lambda: [Source(name) for name in SOURCES])
    anchors: dict[Currency, Anchor] = field(default_factory=dict)
    sightings: Sightings = field(default_factory=sightings)

    def tick(self, seen: Counter[str]) -> None:
        dice = self.dice
        self.now += timedelta(seconds=TICK_SECONDS)
        self.true_e8 = int(self.true_e8 * (1 + dice.gauss(0, 0.0008)))
        if dice.random() < 0.0005:
            self.true_e8 = int(self.true_e8 * dice.choice([0.88, 0.93, 1.07, 1.15]))
        if dice.random() < 0.01:
            self.sightings = sightings()  # the updater is started again; the ledger keeps the anchors
        shared_lie = dice.choice([0.5, 0.9, 0.98, 1.03, 1.3])
        said = []
        for source in self.sources:
            source.next_mood(dice, shared_lie)
            if quote := source.quote(dice, self.now, self.true_e8):
                said.append(quote)
        self.judge(said, seen)

    def judge(self, said: list[Quote], seen: Counter[str]) -> None:
        verdict = decide(said, self.now, RULE, [EUR])
        rates_e8 = verdict.rates_e8
        before_e8 = self.sightings.take(verdict, self.now)
        reasons = unsettled_reasons(rates_e8, self.anchors, before_e8, (), now=self.now, limits=LIMITS)
        reasons |= verdict.unsettled
        fit = [each for each in said if is_fit(each, self.now)]
        # A frozen one may be right too, for as long as nothing moves.
        right = [each for each in fit if not differs(each.mid_e8, self.true_e8, 40)]
        seen["situations"] += 1
        if EUR in rates_e8 and EUR not in reasons:
            self.check_price(rates_e8[EUR], verdict.used, len(fit), seen)
            self.anchors[EUR] = Anchor(rates_e8[EUR], self.now)
        if self.must_have_price(right, fit):
            seen["due"] += 1
            seen["met"] += EUR in rates_e8 and EUR not in reasons
        seen["unsettled"] += EUR in reasons

    def must_have_price(self, right: list[Quote], fit: list[Quote]) -> bool:
        """Whether a strict majority is right, and no more of those that prove their time are wrong than right."""
        proven = [each for each in fit if each.changed_at is None or (self.now - each.changed_at).total_seconds() <= 30]
        proven_right = [each for each in proven if each in right]
        return len(right) >= RULE.sources_min and 2 * len(right) > len(fit) and 2 * len(proven_right) >= len(proven)

    def check_price(self, rate_e8: int, used: list[Quote], fit: int, seen: Counter[str]) -> None:
        seen["prices"] += 1
        mids_e8 = [each.mid_e8 for each in used]
        assert type(rate_e8) is int
        assert min(mids_e8) <= rate_e8 <= max(mids_e8)
        assert not differs(max(mids_e8), min(mids_e8), 100)
        assert 2 * len(used) > fit >= len(used) >= RULE.sources_min
        for each in used:
            assert self.now - each.observed_at <= timedelta(seconds=30)
            assert each.changed_at is None or (self.now - each.changed_at).total_seconds() <= UNCHANGED_SECONDS_MAX
        anchor = self.anchors.get(EUR)
        assert anchor is None or not differs(rate_e8, anchor.rate_e8, 2000)


def is_fit(quote: Quote, now: datetime) -> bool:
    return now - quote.observed_at <= timedelta(seconds=30) and quote.ask_e8 * 100 <= quote.bid_e8 * 101


def check(seed: int, situations: int) -> Counter[str]:
    """Raises AssertionError when something is published that must not be; counts what was seen."""
    dice = random.Random(seed)  # noqa: S311  # nobody has to be kept from guessing
    seen: Counter[str] = Counter()
    while seen["situations"] < situations:
        history = History(dice)
        for _ in range(TICKS):
            try:
                history.tick(seen)
            except AssertionError as error:
                error.add_note(f"python -m tests.price_histories {seed} came to {history.sources}")
                raise
    return seen


if __name__ == "__main__":
    print(check(int(sys.argv[1]), SITUATIONS))  # noqa: T201
