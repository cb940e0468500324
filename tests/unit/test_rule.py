"""The pricing rule: each sentence by example, both sides of each limit; then hypothesis; then a million situations."""

import os
import random
import uuid
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime, timedelta
from itertools import combinations
from multiprocessing import get_context

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from buydesk.money import RATE_E8_MAX, RATE_E8_MIN, Currency
from buydesk.prices.model import Quote, RejectedQuote, Rule, UnsettledRate
from buydesk.prices.rule import Verdict, decide, differs, largest_cluster, listed, median, percent, record_of
from tests import price_histories, price_situations

NOW = datetime(2026, 1, 31, 9, 5, tzinfo=UTC)
TICK = timedelta(microseconds=1)
RULE = Rule(quote_age_seconds_max=30, spread_bp_max=100, deviation_bp_max=100, sources_min=2)
EUR, GBP, USD = Currency
MILLION = 1_000_000


def quote(source: str, mid_e8: int, *, half_spread_e8: int = 0, age: timedelta = timedelta()) -> Quote:
    return Quote(source, EUR, mid_e8 - half_spread_e8, mid_e8 + half_spread_e8, NOW - age)


def quotes_of(*mids_e8: int) -> list[Quote]:
    """One quote of each of as many sources."""
    return [quote(f"source-{number}", mid_e8) for number, mid_e8 in enumerate(mids_e8, 1)]


def everywhere(quotes: Sequence[Quote]) -> list[Quote]:
    """The same quotes for each currency."""
    return [replace(each, currency=currency) for currency in Currency for each in quotes]


def euros(quotes: Sequence[Quote], rule: Rule = RULE) -> tuple[int | None, dict[str, str]]:
    """The price of the euro quotes, None if there is none, and what was rejected: the reason by source."""
    verdict = decide(quotes, NOW, rule)
    return verdict.rates_e8.get(EUR), {each.source: each.reason for each in verdict.rejected}


GOOD = 50_000_000_000


def test_price_is_the_median_of_the_sources() -> None:
    assert euros(quotes_of(GOOD, GOOD + 5, GOOD + 1)) == (GOOD + 1, {})


@pytest.mark.parametrize(
    ("values", "middle"), [([7], 7), ([9, 1, 5], 5), ([4, 2], 3), ([1, 2], 2), ([8, 1, 4, 3], 4), ([5, 5, 5, 1], 5)]
)
def test_median_of_an_even_number_is_the_mean_of_the_middle_two_rounded_up(values: list[int], middle: int) -> None:
    assert median(values) == middle


def test_each_currency_is_priced_by_itself_and_what_is_missing_is_named() -> None:
    quotes = [*quotes_of(GOOD, GOOD), *(replace(each, currency=USD) for each in quotes_of(3 * GOOD, GOOD, GOOD + 2))]
    verdict = decide(quotes, NOW, RULE)
    assert verdict.rates_e8 == {EUR: GOOD, USD: GOOD + 1}
    assert verdict.missing == {GBP: "only 0 of at least 2 sources agree"}
    assert verdict.used == [*quotes[:2], *quotes[3:]]
    assert verdict.rejected == [RejectedQuote("source-1", "is more than 1 % from those that agree", quotes[2])]


@pytest.mark.parametrize(
    ("doubtful", "reason"),
    [
        (quote("odd", GOOD, age=timedelta(seconds=30)), ""),
        (quote("odd", GOOD, age=timedelta(seconds=30) + TICK), "is older than 30 s"),
        (quote("odd", GOOD, age=timedelta(0)), ""),
        (quote("odd", GOOD, age=-TICK), "is from the future"),
        (Quote("odd", EUR, GOOD, GOOD, NOW), ""),
        (Quote("odd", EUR, GOOD + 1, GOOD, NOW), "has a bid above its ask"),
        (Quote("odd", EUR, GOOD, GOOD + GOOD // 100, NOW), ""),
        (Quote("odd", EUR, GOOD, GOOD + GOOD // 100 + 1, NOW), "has an ask more than 1 % above its bid"),
        (Quote("odd", EUR, RATE_E8_MIN - 1, GOOD, NOW), "EUR: is no price of a bitcoin"),
        (Quote("odd", EUR, GOOD, RATE_E8_MAX + 1, NOW), "EUR: is no price of a bitcoin"),
        (Quote("odd", EUR, 0, 0, NOW), "EUR: is no price of a bitcoin"),
        (Quote("odd", EUR, -GOOD, -GOOD, NOW), "EUR: is no price of a bitcoin"),
        (Quote("odd", EUR, 10**38, 10**38, NOW), "EUR: is no price of a bitcoin"),
        (Quote("odd", EUR, float(GOOD), GOOD, NOW), "EUR: is no price of a bitcoin"),  # type: ignore[arg-type]
        (Quote("odd", EUR, GOOD, float("nan"), NOW), "EUR: is no price of a bitcoin"),  # type: ignore[arg-type]
    ],
)
def test_quotes_that_no_market_shows_are_dropped(doubtful: Quote, reason: str) -> None:
    _, rejected = euros([doubtful, *quotes_of(GOOD, GOOD, GOOD)])
    assert rejected == ({"odd": reason} if reason else {})


@pytest.mark.parametrize("rate_e8", [RATE_E8_MIN, RATE_E8_MAX])
def test_lowest_and_highest_rate_can_be_a_price(rate_e8: int) -> None:
    assert euros(quotes_of(rate_e8, rate_e8)) == (rate_e8, {})


def test_what_is_no_rate_is_rejected_without_the_quote_because_it_cannot_be_written_down() -> None:
    [rejected] = decide([Quote("odd", EUR, 0, 10**38, NOW)], NOW, RULE).rejected
    assert rejected.quote is None


def test_source_with_two_quotes_for_a_currency_counts_for_nothing() -> None:
    honest = quotes_of(GOOD, GOOD + 1)
    twice = [quote("twice", GOOD), quote("twice", GOOD)]
    assert euros(twice)[0] is None
    assert euros([*honest, *twice]) == (GOOD + 1, {"twice": "is not the only one of its source"})
    assert euros([twice[0], quote("twice", GOOD, age=timedelta(hours=1)), honest[0]])[0] is None


def test_source_that_says_nonsense_beside_one_quote_is_taken_at_that() -> None:
    nonsense = Quote("source-1", EUR, 0, 0, NOW)
    assert euros([nonsense, *quotes_of(GOOD, GOOD)]) == (GOOD, {"source-1": "EUR: is no price of a bitcoin"})


@pytest.mark.parametrize(
    ("far_e8", "is_set_aside"),
    [
        (GOOD + GOOD // 100, False),
        (GOOD + GOOD // 100 + 1, True),
        (GOOD - GOOD // 101, False),
        (GOOD - GOOD // 100, True),  # of itself that is more than a percent
        (GOOD * 7 // 10, True),
        (GOOD * 100, True),
    ],
)
def test_quote_further_than_a_percent_from_those_that_agree_is_set_aside(far_e8: int, is_set_aside: bool) -> None:
    rejected = {"source-2": "is more than 1 % from those that agree"} if is_set_aside else {}
    assert euros(quotes_of(GOOD, far_e8, GOOD, GOOD)) == (GOOD, rejected)


def test_no_quote_at_the_edge_denies_the_rest() -> None:
    """Beside four within 0.12 %, one 0.96 % above the middle: no price for good by the first version of the rule."""
    near = [GOOD - GOOD * 6 // 10_000, GOOD, GOOD + GOOD * 6 // 10_000, GOOD]
    edge = GOOD + GOOD * 96 // 10_000
    assert euros(quotes_of(*near, edge)) == (GOOD, {"source-5": "is more than 1 % from those that agree"})


def test_no_minority_makes_a_price() -> None:
    percents = [90, 95, 100, 100.5, 110]
    rate_e8, rejected = euros(quotes_of(*(int(GOOD * each) // 100 for each in percents)))
    assert rate_e8 is None
    assert set(rejected.values()) == {"only 2 of 5 sources agree, which is no majority"}


@pytest.mark.parametrize(
    ("mids_e8", "cluster"),
    [
        ([], []),
        ([1000, 1005, 1010, 1020, 1025, 1030], [1020, 1025, 1030]),  # of two that are as tight the higher
        ([1000, 1004, 1008, 1020, 1025, 1030], [1000, 1004, 1008]),  # the tighter
        ([1000, 1010, 1020], [1010, 1020]),
    ],
)
def test_largest_cluster_is_the_tightest_and_of_these_the_highest(mids_e8: list[int], cluster: list[int]) -> None:
    found = largest_cluster([quote(f"source-{each}", each) for each in mids_e8], 100)
    assert [each.mid_e8 for each in found] == cluster


def clockless(source: str, mid_e8: int, *, seconds: float) -> Quote:
    """Of a source without a clock, whose answer changed last so long ago."""
    return replace(quote(source, mid_e8), changed_at=NOW - timedelta(seconds=seconds))


@pytest.mark.parametrize(
    ("changed_before", "contradicting", "is_priced"),
    [
        (31, 0, True),  # nobody contradicts those that stand still
        (31, 1, False),
        (31, 2, False),
        (30, 1, True),  # those that moved lately prove their time as well as a clock does
        (30, 2, True),
    ],
)
def test_quotes_that_prove_their_time_outrank_those_that_do_not(
    changed_before: float, contradicting: int, is_priced: bool
) -> None:
    frozen = [clockless(name, GOOD, seconds=changed_before) for name in ("kraken", "bitfinex", "gemini")]
    live = [quote(name, 2 * GOOD) for name in ("coinbase", "bitstamp")[:contradicting]]
    verdict = decide([*frozen, *live], NOW, RULE, [EUR])
    assert verdict.rates_e8 == {EUR: GOOD}
    names = ", ".join(sorted(each.source for each in live))
    contradicted = {EUR: f"is contradicted by {names}, which prove their time"}
    assert verdict.unsettled == ({} if is_priced else contradicted)


def test_one_clock_of_two_that_agrees_is_enough() -> None:
    frozen = [clockless(name, GOOD, seconds=60) for name in ("kraken", "bitfinex")]
    assert euros([*frozen, quote("coinbase", GOOD), quote("bitstamp", 2 * GOOD)])[0] == GOOD


@pytest.mark.parametrize("lying", list(combinations(range(5), 2)))
@pytest.mark.parametrize("lie_e8", [GOOD // 2, GOOD * 98 // 100, GOOD * 102 // 100, 2 * GOOD])
def test_two_of_five_that_lie_in_step_are_never_sold_at(lying: tuple[int, int], lie_e8: int) -> None:
    mids = [GOOD + number for number in range(5)]
    for each in lying:
        mids[each] = lie_e8
    rate_e8, _ = euros(quotes_of(*mids))
    assert rate_e8 is not None
    assert GOOD <= rate_e8 <= GOOD + 4


class Drifting(price_histories.History):
    """A market that rises by 0.4 % a tick, of which nobody tells anything wrong by himself."""

    async def tick(self) -> None:
        self.now += price_histories.TICK
        market = {currency: rate_e8 * 1004 // 1000 for currency, rate_e8 in self.markets[-1].items()}
        self.markets = [*self.markets[1:], market]
        await self.publish(
            [quote for source in self.sources for quote in source.quotes(self.dice, self.now, self.markets)]
        )

    def begin(self, names: Sequence[str], mood: str) -> None:
        for source in self.sources:
            if source.name in names:
                source.begin(price_histories.Mood(mood, 1000))


@pytest.mark.parametrize("frozen", list(combinations(price_histories.SOURCES, 2)), ids="-".join)
@pytest.mark.parametrize("away", [0, 1, 2])
async def test_two_of_five_that_are_frozen_are_never_sold_at(frozen: tuple[str, str], away: int) -> None:
    """Whoever is left contradicts them as soon as they are 1 % off, and in the end their time is up."""
    alive = [name for name in price_histories.SOURCES if name not in frozen]
    history = Drifting(random.Random(1), Counter())  # noqa: S311
    for _ in range(4):
        await history.tick()
    history.begin(frozen, "frozen")
    history.begin(alive[:away], "away")
    for tick in range(1, 21):
        await history.tick()
        for currency, record in history.for_sale.items():
            # 1 %, and what the books of one tick differ by.
            assert not differs(record.rates_e8[currency], history.markets[-1][currency], 115)
        assert history.newest is not None
        is_of_now = history.newest.made_at == history.now
        assert away or (is_of_now and history.newest.rates_e8.keys() == set(Currency))
        used = {each.source for each in history.newest.used if each.currency in history.newest.rates_e8}
        assert tick <= 5 or not is_of_now or not used & set(frozen)  # too far off by now to agree with anybody
    # Two that are right are enough again once the time of the frozen ones is up; one never is.
    assert bool(history.for_sale) is (away < 2)


@pytest.mark.parametrize(
    ("mids_e8", "rule", "rate_e8", "reason"),
    [
        ((GOOD,), RULE, None, "only 1 of at least 2 sources agree"),
        ((GOOD,), replace(RULE, sources_min=1), GOOD, ""),
        ((GOOD, GOOD), replace(RULE, sources_min=3), None, "only 2 of at least 3 sources agree"),
        ((GOOD, GOOD, GOOD), replace(RULE, sources_min=3), GOOD, ""),
        ((GOOD, GOOD + GOOD // 100), RULE, GOOD + GOOD // 200, ""),
        ((GOOD, GOOD + GOOD // 100 + 1), RULE, None, "only 1 of at least 2 sources agree"),
        ((GOOD, 3 * GOOD), RULE, None, "only 1 of at least 2 sources agree"),
        ((GOOD, GOOD, 3 * GOOD, 3 * GOOD), RULE, None, "only 2 of 4 sources agree, which is no majority"),
        ((), replace(RULE, sources_min=0), None, "only 0 of 0 sources agree, which is no majority"),
    ],
)
def test_price_needs_enough_sources_that_agree(
    mids_e8: tuple[int, ...], rule: Rule, rate_e8: int | None, reason: str
) -> None:
    verdict = decide(quotes_of(*mids_e8), NOW, rule)
    assert verdict.rates_e8.get(EUR) == rate_e8
    assert verdict.missing.get(EUR, "") == reason
    assert len(verdict.used) == (0 if reason else len(mids_e8))


def test_two_sources_that_disagree_are_rejected_for_it() -> None:
    one, other = quotes_of(GOOD, GOOD + GOOD // 80)
    reason = "only 1 of at least 2 sources agree"
    verdict = decide([one, other], NOW, RULE)
    assert verdict.rejected == [RejectedQuote("source-1", reason, one), RejectedQuote("source-2", reason, other)]


@pytest.mark.parametrize(
    ("one", "other", "is_different"), [(101, 100, False), (102, 100, True), (99, 100, False), (98, 100, True)]
)
def test_rates_differ_by_more_than_a_part_of_the_other(one: int, other: int, is_different: bool) -> None:
    assert differs(one, other, 100) is is_different


@pytest.mark.parametrize(("bp", "text"), [(100, "1 %"), (150, "1.5 %"), (1, "0.01 %"), (1000, "10 %"), (25, "0.25 %")])
def test_basis_points_are_shown_as_percent(bp: int, text: str) -> None:
    assert percent(bp) == text


def test_currencies_with_the_same_matter_are_listed_together() -> None:
    assert listed({EUR: "is old", GBP: "is new", USD: "is old"}) == "EUR, USD: is old; GBP: is new"
    assert listed({}) == ""


def test_record_is_as_old_as_its_oldest_quote_and_ends_from_there() -> None:
    quotes = everywhere([quote("one", GOOD, age=timedelta(seconds=7)), quote("two", GOOD + 2), quote("liar", 9 * GOOD)])
    quotes[1] = replace(quotes[1], observed_at=NOW - timedelta(seconds=9))
    kept = quote("slow", GOOD)
    record = record_of(
        decide(quotes, NOW, RULE),
        [RejectedQuote("slow", "gave no answer", kept)],
        "live",
        unsettled={USD: "has moved"},
        rule=RULE,
        decided_at=NOW,
        ttl=timedelta(seconds=60),
    )
    assert record.as_of == NOW - timedelta(seconds=9)
    assert record.expires_at == record.as_of + timedelta(seconds=60)
    assert record.rates_e8 == {EUR: GOOD + 1, GBP: GOOD + 1}
    assert record.unsettled == {USD: UnsettledRate(GOOD + 1, "has moved")}
    assert record.bids_e8 == record.asks_e8 == dict.fromkeys(Currency, GOOD + 1)
    assert record.missing == {}
    assert (record.rule, record.decided_at, record.feed, record.replayed_from) == (RULE, NOW, "live", None)
    assert [each.source for each in record.used] == ["one", "two"] * 3
    assert [each.quote for each in record.rejected[:3]] == quotes[2::3]
    assert record.rejected[3:] == (
        RejectedQuote("slow", "gave no answer"),
    )  # only what was decided on can be decided again


def test_each_record_has_an_id_of_its_own_and_the_minute_it_replays() -> None:
    verdict = decide(everywhere(quotes_of(GOOD, GOOD)), NOW, RULE)
    minute = NOW - timedelta(days=1000)

    def record_id() -> uuid.UUID:
        record = record_of(
            verdict,
            [],
            "sandbox",
            unsettled={},
            rule=RULE,
            decided_at=NOW,
            ttl=timedelta(seconds=60),
            replayed_from=minute,
        )
        assert record.replayed_from == minute
        return record.id

    assert record_id() != record_id()


# --- whatever the quotes are

seconds = st.integers(-5, 40).map(lambda number: timedelta(seconds=number))
any_quotes = st.lists(
    st.builds(
        Quote,
        st.sampled_from(["one", "two", "three", "four", "five"]),
        st.sampled_from(Currency),
        st.integers(GOOD - GOOD // 80, GOOD + GOOD // 80) | st.integers(-(10**40), 10**40),
        st.integers(GOOD - GOOD // 80, GOOD + GOOD // 80) | st.integers(-(10**40), 10**40),
        seconds.map(lambda age: NOW - age),
        st.none() | seconds.map(lambda age: NOW - 4 * age),
    ),
    max_size=20,
)


def same(verdict: Verdict) -> tuple[object, ...]:
    """What of a verdict must not depend on the order of the quotes."""
    return verdict.rates_e8, verdict.missing, set(verdict.used), sorted(map(repr, verdict.rejected))


@given(any_quotes, st.randoms(use_true_random=False))
def test_order_of_the_quotes_does_not_matter(quotes: list[Quote], dice: random.Random) -> None:
    shuffled = list(quotes)
    dice.shuffle(shuffled)
    assert same(decide(shuffled, NOW, RULE)) == same(decide(quotes, NOW, RULE))


@given(any_quotes)
def test_every_quote_is_used_or_rejected_and_every_currency_priced_or_missing(quotes: list[Quote]) -> None:
    verdict = decide(quotes, NOW, RULE)
    assert len(verdict.used) + len(verdict.rejected) == len(quotes)
    assert {*verdict.rates_e8, *verdict.missing} == set(Currency)
    assert not {*verdict.rates_e8} & {*verdict.missing}


@given(any_quotes)
def test_quotes_that_were_not_used_change_nothing(quotes: list[Quote]) -> None:
    verdict = decide(quotes, NOW, RULE)
    priced = decide(verdict.used, NOW, RULE)
    assert (priced.rates_e8, priced.used, priced.rejected) == (verdict.rates_e8, verdict.used, [])


def check_agreement(verdict: Verdict, rule: Rule) -> None:
    for currency, rate_e8 in verdict.rates_e8.items():
        agreed = [each for each in verdict.used if each.currency == currency]
        mids_e8 = [each.mid_e8 for each in agreed]
        assert min(mids_e8) <= rate_e8 <= max(mids_e8)
        assert (max(mids_e8) - min(mids_e8)) * 10_000 <= min(mids_e8) * rule.deviation_bp_max
        assert len({each.source for each in agreed}) == len(agreed) >= rule.sources_min
        assert all(0 <= (NOW - each.observed_at).total_seconds() <= rule.quote_age_seconds_max for each in agreed)


@given(
    any_quotes, st.builds(Rule, st.integers(0, 100), st.integers(0, 10_000), st.integers(0, 10_000), st.integers(1, 5))
)
def test_price_lies_within_fresh_quotes_of_enough_sources_that_agree(quotes: list[Quote], rule: Rule) -> None:
    check_agreement(decide(quotes, NOW, rule), rule)


honest = st.integers(GOOD, GOOD + GOOD // 100)


@given(
    st.lists(honest, min_size=3, max_size=4), st.integers(RATE_E8_MIN, RATE_E8_MAX) | st.integers(GOOD - 10**9, 10**11)
)
def test_one_liar_among_honest_sources_never_moves_the_price_outside_theirs(mids_e8: list[int], lie_e8: int) -> None:
    rate_e8, _ = euros([quote("liar", lie_e8), *quotes_of(*mids_e8)])
    assert rate_e8 is not None
    near = [each for each in [*mids_e8, lie_e8] if not differs(each, GOOD, 200)]
    assert min(near) <= rate_e8 <= max(near)


@given(st.lists(honest, min_size=3, max_size=4), st.sampled_from([0.01, 0.7, 0.97, 1.03, 1.3, 100.0]))
def test_one_plain_liar_among_honest_sources_costs_no_price(mids_e8: list[int], factor: float) -> None:
    rate_e8, rejected = euros([quote("liar", int(GOOD * factor)), *quotes_of(*mids_e8)])
    assert rate_e8 == median(mids_e8)
    assert rejected == {"liar": "is more than 1 % from those that agree"}


@given(honest, st.integers(RATE_E8_MIN, RATE_E8_MAX))
def test_two_sources_that_disagree_are_no_price(mid_e8: int, other_e8: int) -> None:
    low_e8, high_e8 = sorted([mid_e8, other_e8])
    rate_e8, _ = euros(quotes_of(mid_e8, other_e8))
    assert (rate_e8 is not None) == (high_e8 * 100 <= low_e8 * 101)


@given(st.lists(honest, min_size=2, max_size=5))
def test_honest_sources_always_make_a_price(mids_e8: list[int]) -> None:
    assert euros(quotes_of(*mids_e8)) == (median(mids_e8), {})


@pytest.mark.timeout(600)
def test_a_million_situations_yield_what_the_rule_says_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    """Never a price outside the quotes that agreed, a stale one or a float; `price_situations` says how it is known."""
    seed = int(os.environ.get("PRICE_SITUATIONS_SEED") or random.SystemRandom().getrandbits(32))
    runs = MILLION // price_situations.SITUATIONS
    with capsys.disabled():
        print(f"\n{MILLION} situations of the pricing rule with PRICE_SITUATIONS_SEED={seed}")  # noqa: T201
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        checked = list(pool.map(price_situations.check, range(seed, seed + runs), [price_situations.SITUATIONS] * runs))
    seen = sum(checked, start=type(checked[0])())
    assert seen["situations"] >= MILLION
    assert seen["prices"] > MILLION // 4
    assert seen["records"] > MILLION // 100


@pytest.mark.timeout(600)
def test_histories_with_sources_that_freeze_lie_and_leave_sell_nothing_wrong_and_nearly_always(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Several ticks long, three currencies, with restarts; PRICE_HISTORIES=1000000 makes as many situations."""
    seed = int(os.environ.get("PRICE_SITUATIONS_SEED") or random.SystemRandom().getrandbits(32))
    runs = int(os.environ.get("PRICE_HISTORIES") or 200_000) // price_histories.SITUATIONS
    with capsys.disabled():
        print(f"\n{runs * price_histories.SITUATIONS} ticks of markets with PRICE_SITUATIONS_SEED={seed}")  # noqa: T201
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        checked = list(pool.map(price_histories.check, range(seed, seed + runs), [price_histories.SITUATIONS] * runs))
    seen = sum(checked, start=type(checked[0])())
    assert seen["situations"] >= runs * price_histories.SITUATIONS
    assert min(seen["unsettled"], seen["leaning on frozen"], seen["sold from before"]) > 0
    assert seen["due"] > seen["situations"] * 9 // 10
    assert seen["met"] >= seen["due"] * 999 // 1000
    with capsys.disabled():
        print(f"{seen['met']} prices in {seen['due']} ticks in which a strict majority was right; {dict(seen)}")  # noqa: T201
