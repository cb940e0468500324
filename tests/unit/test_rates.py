"""Rates at an edge: what it lets through, what it hears of others, and that nothing waits for the store."""

import asyncio
import logging
from collections.abc import Callable
from ipaddress import ip_address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buydesk.clients import rates
from buydesk.clients.model import ANYBODY, Caller
from buydesk.clients.rates import Lot, Rate, RateKind, RateLimiter, Window, refusal, seconds_after
from buydesk.errors import RateLimited, RatesUnavailable
from buydesk.hosts import Address
from buydesk.http.responses import problem_response
from buydesk.services.process_buy_orders import _PROCESSOR
from tests.builders import settings
from tests.clock import FakeClock
from tests.model_rates import ModelRates

SHOP, OTHER = Caller("shop", frozenset(), "key1"), Caller("other", frozenset(), "key2")
# A report's pause only costs time here; where it matters it is longer.
PAUSE_SECONDS = 0.001
HERE, THERE = ip_address("192.0.2.1"), ip_address("192.0.2.2")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "REPORT_PAUSE_SECONDS", PAUSE_SECONDS)


class Edges:
    """Some edges over one store, all by one clock."""

    def __init__(self, count: int = 1, **configured: Any) -> None:
        self.clock = FakeClock()
        self.store = ModelRates(self.clock)
        given = settings(**({"anonymous_rate": 60} | configured))
        self.all = [RateLimiter(self.store, given, self.clock) for _ in range(count)]

    def passing(
        self,
        requests: int,
        caller: Caller = SHOP,
        address: Address | None = HERE,
        kind: RateKind = "orders",
        edge: int = 0,
    ) -> int:
        """How many of the requests, all at once, are let through."""
        taken = [self.all[edge].take(kind, caller, address) for _ in range(requests)]
        return sum(rate is None or not rate.is_over for rate in taken)

    def rate(self, caller: Caller = SHOP, edge: int = 0) -> Rate | None:
        return self.all[edge].take("orders", caller, HERE)


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not is_so():
            await asyncio.sleep(0.001)


async def settled(edges: Edges) -> None:
    """Waits until all edges have heard of what they reported."""
    await until(lambda: all(edge._reporting is None or edge._reporting.done() for edge in edges.all))


async def test_sixty_at_once_pass_and_the_next_is_told_when_there_is_room_again() -> None:
    edges = Edges()
    assert edges.rate() is None  # more than half is left
    assert edges.passing(29) == 29
    assert edges.rate() == Rate("orders", 60, 29, 61, is_over=False)
    assert edges.passing(29) == 29
    assert edges.rate() == Rate("orders", 60, 0, 61, is_over=True)
    edges.clock.seconds += 61
    assert edges.passing(2) == 1


async def test_a_minute_that_is_over_counts_the_less_the_longer_it_is() -> None:
    edges = Edges()
    assert edges.passing(99) == 60
    edges.clock.seconds += 60 + 30
    assert edges.passing(99) == 30
    edges.clock.seconds += 30 + 120
    assert edges.passing(99) == 60


@given(st.lists(st.tuples(st.floats(0, 90), st.integers(1, 40)), min_size=1, max_size=20))
def test_whoever_waits_as_long_as_it_is_told_is_let_through(steps: list[tuple[float, int]]) -> None:
    window, now = Window(60.0), 0.0
    for pause, requests in steps:
        now += pause
        for _ in range(requests):
            if window.used(now) < 20:
                window.add(now)
        until_room = window.seconds_until(20, now)
        assert window.used(now + seconds_after(until_room)) < 20
        if until_room > 0.001:
            assert window.used(now + until_room - 0.001) >= 20


async def test_kinds_and_clients_are_counted_apart_and_all_keys_of_a_client_together() -> None:
    edges = Edges()
    assert edges.passing(61) == 60
    assert edges.passing(61, Caller("shop", frozenset(), "key3")) == 0
    assert edges.passing(61, OTHER) == 60
    for kind in ("reads", "lookups"):
        assert edges.passing(61, kind=kind) == 60


async def test_a_client_and_a_key_may_have_rates_of_their_own() -> None:
    edges = Edges(client_rate_per_minute=9)
    assert edges.passing(99) == 9
    assert edges.passing(99, Caller("large", frozenset(), "a", 80)) == 80
    slow = Caller("mixed", frozenset(), "b", 20, 5)
    assert edges.passing(2, slow) == 2
    assert edges.rate(slow) == Rate("orders", 5, 2, 61, is_over=False)
    assert edges.passing(99, slow) == 2
    assert edges.rate(slow) == Rate("orders", 5, 0, 61, is_over=True)
    assert edges.passing(99, Caller("mixed", frozenset(), "c", 20)) == 15
    assert edges.rate(slow) == Rate("orders", 20, 0, 61, is_over=True)


async def test_the_desk_s_own_are_not_limited() -> None:
    assert Edges().passing(999, _PROCESSOR) == 999


async def test_callers_without_a_key_are_counted_by_address_unless_it_is_unknown_or_nobody_counts() -> None:
    edges = Edges(anonymous_rate=7)
    assert edges.passing(9, ANYBODY) == 7
    assert edges.passing(9, ANYBODY, THERE) == 7
    assert edges.passing(99, ANYBODY, None) == 99
    assert edges.passing(4, ANYBODY, ip_address("2001:db8::1")) == 4
    assert edges.passing(9, ANYBODY, ip_address("2001:db8::ffff:1")) == 3  # of the same /64
    assert edges.passing(9, ANYBODY, ip_address("2001:db8:0:1::1")) == 7
    assert Edges(anonymous_rate="off").passing(99, ANYBODY) == 99


async def test_what_one_edge_let_through_another_knows_with_its_next_report() -> None:
    edges = Edges(2)
    assert edges.passing(40) == 40
    await settled(edges)
    assert edges.passing(1, edge=1) == 1
    await settled(edges)
    assert edges.passing(99, edge=1) == 19
    await settled(edges)
    assert edges.passing(99) == 20  # it has not heard: more than the limit, once
    await settled(edges)
    assert edges.passing(99) == 0


async def test_more_than_the_limit_is_owed_by_whoever_let_it_through() -> None:
    edges = Edges(3, client_rate_per_minute=10)
    assert [edges.passing(10, edge=edge) for edge in range(3)] == [10, 10, 10]
    await settled(edges)
    passed = 0
    for _ in range(60):  # in which a whole minute's requests are forgotten, and what is owed takes their place
        edges.clock.seconds += 1
        for edge in range(3):
            passed += edges.passing(1, edge=edge)
            await settled(edges)
    assert passed == 0
    for _ in range(600):
        edges.clock.seconds += 1
        for edge in range(3):
            passed += edges.passing(1, edge=edge)
            await settled(edges)
    assert 90 <= passed <= 10 * (10 + 3)  # in ten minutes: one beyond the limit for each edge


async def test_no_request_waits_for_the_store() -> None:
    edges = Edges()
    edges.store.gate.clear()
    assert edges.passing(99) == 60
    await until(lambda: len(edges.store.reports) == 1)
    edges.clock.seconds += 180
    assert edges.passing(99) == 60
    edges.store.gate.set()
    await settled(edges)


async def test_an_edge_that_has_not_heard_of_a_counter_lately_reports_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or whoever goes from edge to edge would have the whole limit at each."""
    monkeypatch.setattr(rates, "REPORT_PAUSE_SECONDS", 1000)
    edges = Edges(3)
    assert edges.passing(60) == 60
    await settled(edges)
    for edge in (1, 2):
        assert edges.passing(1, edge=edge) == 1
        await settled(edges)
        assert edges.passing(60, edge=edge) == 0
    edges.clock.seconds += 120
    assert edges.passing(59) == 59
    await settled(edges)
    assert edges.passing(1, edge=1) == 1
    await settled(edges)
    assert edges.passing(60, edge=1) == 0


async def test_within_sixty_seconds_twice_the_limit_may_pass_and_no_more() -> None:
    """Those at the end of a minute are taken for spread over it: the bound that is documented."""
    edges = Edges()
    assert edges.passing(1) == 1
    edges.clock.seconds += 59
    first, passed = edges.passing(60), 0
    assert first == 59
    for _ in range(59):
        edges.clock.seconds += 1
        passed += edges.passing(60)
    assert 50 < passed <= 60


async def test_requests_are_reported_together_after_a_pause_and_a_tenth_of_the_limit_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rates, "REPORT_PAUSE_SECONDS", 0.05)
    edges = Edges()
    edges.passing(3)
    edges.passing(2, OTHER)
    await settled(edges)
    assert edges.store.reports == [[Lot("orders:client:shop", 60, 3), Lot("orders:client:other", 60, 2)]]
    monkeypatch.setattr(rates, "REPORT_PAUSE_SECONDS", 1000)
    edges.passing(6)
    await settled(edges)
    assert edges.store.reports[1:] == [[Lot("orders:client:shop", 60, 6)]]


async def test_one_report_is_under_way_at_a_time_and_has_a_bounded_number_of_lots(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rates, "LOTS_MAX", 5)
    monkeypatch.setattr(rates, "COUNTERS_MAX", 12)
    monkeypatch.setattr(rates, "REPORT_PAUSE_SECONDS", 1000)
    edges = Edges()
    edges.store.gate.clear()
    for number in range(20):
        assert edges.passing(1, ANYBODY, ip_address(number)) == 1
    await until(lambda: len(edges.store.reports) == 1)
    await asyncio.sleep(0.02)
    assert [len(each) for each in edges.store.reports] == [5]
    monkeypatch.setattr(rates, "REPORT_PAUSE_SECONDS", PAUSE_SECONDS)
    edges.store.gate.set()
    await settled(edges)
    assert [len(each) for each in edges.store.reports] == [5, 5, 2]  # what was too much counts here alone


async def test_a_count_that_is_used_up_is_asked_for_once_a_second_however_many_are_refused() -> None:
    edges = Edges(2)
    edges.passing(60, edge=1)
    await settled(edges)
    edges.passing(1)
    await settled(edges)
    asked = len(edges.store.reports)
    for _ in range(50):
        assert edges.passing(9) == 0
        await settled(edges)
    assert len(edges.store.reports) == asked
    edges.clock.seconds += 1
    edges.passing(9)
    await settled(edges)
    assert edges.store.reports[asked:] == [[Lot("orders:client:shop", 60, 1)]]  # what it owes


async def test_while_the_store_is_away_each_edge_counts_alone_and_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    edges = Edges(2)
    edges.store.fault = RatesUnavailable("away")
    with caplog.at_level(logging.INFO, "buydesk.clients.rates"):
        for edge in range(2):
            assert edges.passing(50, edge=edge) == 50
            await settled(edges)
            assert edges.passing(50, edge=edge) == 10
            await settled(edges)
            assert edges.passing(50, edge=edge) == 0
        assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
        await settled(edges)
        edges.store.fault = None
        edges.clock.seconds += 180
        assert edges.passing(30) == 30
        await settled(edges)
        assert edges.passing(1, edge=1) == 1
        await settled(edges)
        assert edges.passing(99, edge=1) == 29
        assert [record.levelname for record in caplog.records[2:]] == ["INFO"] * 2
    await settled(edges)


async def test_strangers_drive_no_client_out_and_who_was_driven_out_is_found_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rates, "COUNTERS_MAX", 10)
    edges = Edges()
    edges.passing(60)
    edges.passing(60, ANYBODY, HERE)
    for number in range(100):
        edges.passing(1, ANYBODY, ip_address(number))
        await settled(edges)
    assert edges.passing(1) == 0
    assert edges.passing(1, ANYBODY, HERE) == 1  # as nothing is known of it any more; but that is asked for
    await settled(edges)
    assert edges.passing(99, ANYBODY, HERE) == 0


def test_what_is_limited_for_all_callers_together_tells_no_rate() -> None:
    together = RateLimited("Too many.", retry_after_seconds=3)
    assert dict(problem_response(together, "/report").headers).keys() == {
        "retry-after",
        "content-length",
        "content-type",
    }
    own = problem_response(refusal(Rate("reads", 60, 0, 7, is_over=True)), "/exposure").headers
    assert (own["retry-after"], own["ratelimit"]) == ("7", '"reads";r=0;t=7')


async def test_wrong_guesses_are_limited_by_address_and_right_ones_cost_nothing() -> None:
    edges = Edges()
    [limiter] = edges.all
    for _ in range(99):
        async with limiter.guess(HERE):
            pass
    for _ in range(60):
        async with limiter.guess(HERE):
            limiter.note_wrong_guess(HERE)
    with pytest.raises(RateLimited) as refused:
        async with limiter.guess(HERE):
            raise AssertionError("it must not be looked up")
    assert refused.value.facts == {"policy": "guesses", "per_minute": 60}
    assert refused.value.retry_after_seconds == 61
    async with limiter.guess(THERE):
        pass
    edges.clock.seconds += 61
    async with limiter.guess(HERE):
        pass
    await settled(edges)


async def test_no_more_guesses_are_under_way_than_may_be_wrong_and_right_ones_only_wait() -> None:
    [limiter] = Edges().all
    under_way, most, passed = 0, 0, 0

    async def look_up(*, is_right: bool) -> None:
        nonlocal under_way, most, passed
        async with limiter.guess(HERE):
            under_way += 1
            most = max(most, under_way)
            await asyncio.sleep(0.001)
            under_way -= 1
            passed += 1
            if not is_right:
                limiter.note_wrong_guess(HERE)

    await asyncio.gather(*(look_up(is_right=True) for _ in range(200)))
    assert (passed, most) == (200, 60)
    results = await asyncio.gather(*(look_up(is_right=False) for _ in range(200)), return_exceptions=True)
    assert 260 <= passed < 320  # that a key was wrong is known once it was looked up
    assert most == 60
    assert sum(isinstance(each, RateLimited) for each in results) == 400 - passed
    await limiter.close()


async def test_a_limiter_that_is_closed_reports_no_more() -> None:
    edges = Edges()
    await edges.all[0].close()
    edges.passing(1)
    await edges.all[0].close()
    await asyncio.sleep(0.1)
    assert edges.store.reports == []
