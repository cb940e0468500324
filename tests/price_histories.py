"""Generated histories of a market and of what five sources say of it, tick by tick: frozen, lying, late and leaving
sources, some without a currency or with the dollar's number for another, alone or together; real jumps, and restarts of
the updater between; an operator confirms what is right. What the real rule and guard make of it is held against what is
known here.

`python -m tests.price_histories SEED` checks SITUATIONS of them, each one tick of one currency.
"""

import asyncio
import logging
import random
import sys
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from buydesk.money import Currency
from buydesk.prices.anchors import Confirmation
from buydesk.prices.guard import PriceGuard
from buydesk.prices.model import PriceRecord, Quote, Rule
from buydesk.prices.rule import decide, differs, record_of
from buydesk.times import EPOCH
from tests.builders import settings
from tests.model_anchors import ModelAnchors

SITUATIONS = 50_000
TICKS = 200
TICK = timedelta(seconds=15)
TTL = timedelta(seconds=60)
PROVEN_FOR = timedelta(seconds=30)
UNCHANGED_MAX = timedelta(seconds=120)
CONFIRMED_FOR = timedelta(minutes=15)
CLOCKED = ("bitstamp", "coinbase")
SOURCES = (*CLOCKED, "bitfinex", "gemini", "kraken")
NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)
RULE = Rule(quote_age_seconds_max=30, spread_bp_max=100, deviation_bp_max=100, sources_min=2)
SETTINGS = settings()
EUR, GBP, USD = Currency
# How a source is for a while, and how likely that begins at a tick.
MOODS = {
    "frozen": 0.004,  # repeats its last answer
    "lying": 0.004,
    "late": 0.01,  # tells an old market, and how old it is
    "away": 0.006,
    "wide": 0.003,
    "lacking": 0.003,  # a currency
    "swapped": 0.002,  # gives the dollar's number for another currency
}
LIES = (0.5, 0.9, 0.97, 0.98, 0.99, 1.0096, 1.015, 1.03, 1.08, 1.2, 1.3, 2)
TOGETHER = 0.001  # how likely several sources begin the same at a tick: a lie in step, or a shared outage
_log = logging.getLogger(__name__)

Book = tuple[int, int]
Market = Mapping[Currency, int]  # what a bitcoin costs in truth


@dataclass(frozen=True)
class Mood:
    """How a source is for some ticks; `factor` is of a lie, `currencies` are those that are lacking or swapped."""

    name: str = "right"
    ticks: int = 1
    factor: float = 1.0
    currencies: tuple[Currency, ...] = ()


def drawn_mood(dice: random.Random, name: str) -> Mood:
    swapped = dice.choice([(EUR,), (GBP,), (EUR, GBP)])
    currencies = swapped if name == "swapped" else (dice.choice([EUR, GBP, USD]),)
    return Mood(name, dice.randint(1, 30), dice.choice(LIES) if name == "lying" else 1.0, currencies)


@dataclass
class Source:
    """What one source says, and what the updater remembers of one without a clock: its last answer, since when that is
    the same, and when each of its books was seen to move. A restart forgets that: nothing is proven until books move.
    """

    name: str
    mood: Mood = Mood()
    ticks_left: int = 0
    books: dict[Currency, Book] = field(default_factory=dict)
    observed_at: datetime = NOON
    heard: dict[Currency, Book] = field(default_factory=dict)
    unchanged_since: datetime = EPOCH
    is_set_aside: bool = False
    moved: dict[Currency, tuple[Book, datetime]] = field(default_factory=dict)

    def forget(self) -> None:
        self.heard, self.moved, self.is_set_aside = {}, {}, False

    def begin(self, mood: Mood) -> None:
        self.mood, self.ticks_left = mood, mood.ticks

    def next_mood(self, dice: random.Random) -> None:
        self.ticks_left -= 1
        if self.ticks_left > 0:
            return
        self.begin(Mood())
        drawn = dice.random()
        for name, likely in MOODS.items():
            if drawn < likely:
                self.begin(drawn_mood(dice, name))
                break
            drawn -= likely

    def quotes(self, dice: random.Random, now: datetime, markets: Sequence[Market]) -> list[Quote]:
        """What the poller makes of its answer; `markets` are those of the last ticks."""
        if self.mood.name == "away":
            return []
        if self.mood.name != "frozen":
            late_seconds = dice.randint(1, 45) if self.mood.name == "late" else 0
            self.observed_at = now - timedelta(seconds=late_seconds)
            self.books = self.new_books(dice, markets[-1 - -(-late_seconds // 15)])
        if self.name in CLOCKED:
            return [Quote(self.name, each, *book, self.observed_at) for each, book in self.books.items()]
        if self.mood.name == "frozen":
            self.observed_at = now  # nothing tells how old it is
        if self.heard != self.books:
            self.heard, self.unchanged_since = self.books, now
        self.is_set_aside = now - self.unchanged_since > UNCHANGED_MAX
        if self.is_set_aside:
            return []
        return [self.dated(each, book) for each, book in self.books.items()]

    def new_books(self, dice: random.Random, market: Market) -> dict[Currency, Book]:
        books = {}
        for currency in market:
            is_odd = currency in self.mood.currencies
            if is_odd and self.mood.name == "lacking":
                continue
            told_e8 = market[USD if is_odd and self.mood.name == "swapped" else currency]
            middle_e8 = int(told_e8 * self.mood.factor * (0.999 + 0.002 * dice.random()))
            half_bp = dice.choice([60, 400]) if self.mood.name == "wide" else 5 * dice.random()
            half_e8 = int(middle_e8 * half_bp / 10_000)
            books[currency] = middle_e8 - half_e8, middle_e8 + half_e8
        return books

    def dated(self, currency: Currency, book: Book) -> Quote:
        before = self.moved.get(currency)
        if before is None:
            self.moved[currency] = before = book, EPOCH
        elif before[0] != book:
            self.moved[currency] = before = book, self.observed_at
        return Quote(self.name, currency, *book, self.observed_at, min(before[1], self.observed_at))


class History:
    """A market and what the desk makes of it."""

    def __init__(self, dice: random.Random, seen: Counter[str]) -> None:
        self.dice = dice
        self.seen = seen
        self.now = NOON
        dollars_e8 = 20_000 * 10**8
        self.fx = {EUR: dice.uniform(0.78, 0.98), GBP: dice.uniform(0.7, 0.86), USD: 1.0}
        self.markets: list[Market] = [{each: int(dollars_e8 * fx) for each, fx in self.fx.items()}] * 4
        self.sources = [Source(name) for name in SOURCES]
        self.ledger = ModelAnchors(now=lambda: self.now)
        self.guard = PriceGuard(self.ledger, SETTINGS, _log)
        self.published: dict[Currency, int] = {}
        # The last published EUR/USD and GBP/USD, as the two prices.
        self.exchanged: dict[Currency, tuple[int, int]] = {}
        self.newest: PriceRecord | None = None
        self.for_sale: dict[Currency, PriceRecord] = {}

    async def tick(self) -> None:
        dice = self.dice
        self.now += TICK
        self.move_market()
        if dice.random() < 0.01:  # the updater is started again; the ledger keeps what it has
            self.guard = PriceGuard(self.ledger, SETTINGS, _log)
            for source in self.sources:
                source.forget()
        for source in self.sources:
            source.next_mood(dice)
        if dice.random() < TOGETHER:
            mood = drawn_mood(dice, dice.choice([*MOODS, *["swapped"] * 5]))
            for source in dice.sample(self.sources, dice.randint(2, 5)):
                source.begin(mood)
        said = [quote for source in self.sources for quote in source.quotes(dice, self.now, self.markets)]
        await self.publish(said)

    def move_market(self) -> None:
        dice = self.dice
        moved = 1 + dice.gauss(0, 0.0008)
        if dice.random() < 0.0003:  # news, one in half a day: each costs a tick, as decided
            moved *= dice.choice([0.88, 0.93, 1.07, 1.15])
        for currency in (EUR, GBP):
            self.fx[currency] *= 1 + dice.gauss(0, 0.00002)
        dollars = self.markets[-1][USD] * moved
        self.markets = [*self.markets[1:], {each: int(dollars * fx) for each, fx in self.fx.items()}]

    async def publish(self, said: list[Quote]) -> None:
        await self.guard.load()
        verdict = decide(said, self.now, RULE)
        frozen = [source.name for source in self.sources if source.is_set_aside]
        withdrawn = self.guard.withdrawn(verdict, frozen, self.now)
        unsettled = {**withdrawn, **await self.guard.unsettled(verdict, self.now)}
        record = None
        if verdict.rates_e8 or withdrawn:
            record = record_of(verdict, [], "live", unsettled=unsettled, rule=RULE, decided_at=self.now, ttl=TTL)
            await self.guard.note_published(record)
            self.seen["unsettled"] += len(record.unsettled)
        rates_e8 = record.rates_e8 if record else {}
        fit = self.fit_quotes(said)
        for currency in Currency:
            if currency in rates_e8:
                used = [each for each in verdict.used if each.currency == currency]
                self.check_price(currency, rates_e8[currency], used, fit[currency])
            self.seen["situations"] += 1
            if self.must_have_price(currency, fit[currency]):
                self.seen["due"] += 1
                self.seen["met"] += currency in rates_e8
        self.check_exchange_rates(rates_e8)
        self.published.update(rates_e8)
        self.check_sales(record, fit)
        if record:
            self.confirm(record)

    def confirm(self, record: PriceRecord) -> None:
        """An operator confirms what is right, a minute after he was asked to, or so."""
        for currency, doubted in record.unsettled.items():
            true_e8 = self.markets[-1][currency]
            is_right = doubted.rate_e8 is not None and not differs(doubted.rate_e8, true_e8, 100)
            if is_right and doubted.reason.endswith("until an operator confirms it") and self.dice.random() < 0.25:
                low_e8, high_e8 = true_e8 * 98 // 100, true_e8 * 102 // 100
                ends_at = self.now + CONFIRMED_FOR
                self.ledger.confirmed.append(Confirmation(currency, low_e8, high_e8, "is right", ends_at))
                self.seen["confirmed"] += 1

    def is_confirmed(self, currency: Currency) -> bool:
        return any(each.currency == currency and each.expires_at > self.now for each in self.ledger.confirmed)

    def fit_quotes(self, said: Sequence[Quote]) -> dict[Currency, list[Quote]]:
        oldest = self.now - PROVEN_FOR
        fit: dict[Currency, list[Quote]] = {each: [] for each in Currency}
        for quote in said:
            if quote.observed_at >= oldest and quote.ask_e8 * 100 <= quote.bid_e8 * 101:
                fit[quote.currency].append(quote)
        return fit

    def must_have_price(self, currency: Currency, fit: Sequence[Quote]) -> bool:
        """Whether a strict majority is right. A frozen one may be right too, for as long as nothing moves."""
        true_e8 = self.markets[-1][currency]
        right = sum(abs(each.mid_e8 - true_e8) * 250 <= true_e8 for each in fit)
        return right >= RULE.sources_min and 2 * right > len(fit)

    def check_price(self, currency: Currency, rate_e8: int, used: Sequence[Quote], fit: Sequence[Quote]) -> None:
        """Within quotes of a strict majority that agree, none older than allowed, and not beyond the last price."""
        self.seen["prices"] += 1
        mids_e8 = [each.mid_e8 for each in used]
        names = {each.source for each in used}
        assert type(rate_e8) is int
        assert min(mids_e8) <= rate_e8 <= max(mids_e8)
        assert not differs(max(mids_e8), min(mids_e8), 100)
        assert {id(each) for each in used} <= {id(each) for each in fit}
        assert len(names) == len(used) >= RULE.sources_min
        assert 2 * len(used) > len(fit)
        for source in self.sources:
            if source.heard and source.name in names:
                assert self.now - source.unchanged_since <= UNCHANGED_MAX
        self.check_alive(names, fit)
        before_e8 = self.published.get(currency, rate_e8)
        assert not differs(rate_e8, before_e8, 2000) or self.is_confirmed(currency)
        self.seen["over 1 % off"] += differs(rate_e8, self.markets[-1][currency], 100)

    def check_alive(self, used: Collection[str], fit: Sequence[Quote]) -> None:
        """That no more of those that prove their time contradict a price than agree (decision 0022). Only then may a
        strict majority lean on sources that are frozen here; these cases are counted."""
        proven = [each.source in used for each in self.proven(fit)]
        assert 2 * sum(proven) >= len(proven)
        frozen = {source.name for source in self.sources if source.mood.name == "frozen"}
        alive = [each.source in used for each in fit if each.source not in frozen]
        self.seen["leaning on frozen"] += sum(alive) < RULE.sources_min or 2 * sum(alive) <= len(alive)

    def proven(self, fit: Sequence[Quote]) -> list[Quote]:
        oldest = self.now - PROVEN_FOR
        return [each for each in fit if each.changed_at is None or each.changed_at >= oldest]

    def check_exchange_rates(self, rates_e8: Mapping[Currency, int]) -> None:
        """That no EUR/USD or GBP/USD moves by more than 10 % from the last one published, however long ago."""
        if USD not in rates_e8:
            return
        for currency in (EUR, GBP):
            if currency in rates_e8:
                own_e8, dollars_e8 = rates_e8[currency], rates_e8[USD]
                own_before_e8, dollars_before_e8 = self.exchanged.get(currency, (own_e8, dollars_e8))
                is_far = differs(own_e8 * dollars_before_e8, own_before_e8 * dollars_e8, 1000)
                assert not is_far or self.is_confirmed(currency) or self.is_confirmed(USD)
                self.exchanged[currency] = own_e8, dollars_e8

    def check_sales(self, record: PriceRecord | None, fit: Mapping[Currency, Sequence[Quote]]) -> None:
        """What `PriceCache` sells until the next tick: prices of this record, or of one before while that is valid,
        unless they are in doubt by now. None is contradicted by most of those that prove their time."""
        if record is not None:
            if self.newest is None or record.made_at - self.newest.made_at > 1.5 * TICK:
                self.for_sale.clear()
            self.for_sale |= dict.fromkeys(record.rates_e8, record)
            for currency in record.unsettled:
                self.for_sale.pop(currency, None)
            self.newest = record
        for currency, sold in self.for_sale.items():
            if sold is record or sold.expires_at <= self.now:
                continue
            self.seen["sold from before"] += 1
            assert self.newest is not None
            assert sold is self.newest or currency in self.newest.missing
            assert self.now - min(each.observed_at for each in sold.used) < TTL
            proven = self.proven(fit[currency])
            far = [each for each in proven if differs(each.mid_e8, sold.rates_e8[currency], 100)]
            assert 2 * len(far) <= len(proven)


def check(seed: int, situations: int) -> Counter[str]:
    """Raises AssertionError when something is published or sold that must not be; counts what was seen."""
    return asyncio.run(_check(seed, situations))


async def _check(seed: int, situations: int) -> Counter[str]:
    dice = random.Random(seed)  # noqa: S311  # nobody has to be kept from guessing
    seen: Counter[str] = Counter()
    while seen["situations"] < situations:
        history = History(dice, seen)
        for _ in range(TICKS):
            try:
                await history.tick()
            except AssertionError as error:
                error.add_note(f"python -m tests.price_histories {seed} came to {history.sources}")
                raise
    return seen


if __name__ == "__main__":
    print(check(int(sys.argv[1]), SITUATIONS))  # noqa: T201
