"""The queue in front of a ledger: batches form by themselves, every order gets one honest answer, in time."""

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from msgspec.structs import replace

from buydesk.errors import (
    ClockSkewed,
    DeskError,
    InternalError,
    InvalidRequest,
    LedgerUnavailable,
    OutcomeUnknown,
    Overloaded,
    PriceStale,
    WrongMode,
)
from buydesk.orders.batching import OrderBatcher
from buydesk.orders.model import Outcome, Placed, PricedOrder, Refused, Replayed
from buydesk.orders.waiting import PendingOrder
from buydesk.times import parse_time
from tests.builders import new_order, priced_order, settings
from tests.model_ledger import ModelLedger


@dataclass
class Scripted(ModelLedger):
    """A ledger that does as told before each batch: an error to raise, an event to wait for, or nothing."""

    script: list[Any] = field(default_factory=list)
    batches: list[list[PricedOrder]] = field(default_factory=list)

    async def place(self, items: Sequence[PricedOrder], timeout_seconds: float) -> Sequence[Outcome]:
        self.batches.append(list(items))
        step = self.script.pop(0) if self.script else None
        if isinstance(step, asyncio.Event):
            await step.wait()
        if callable(step):
            return list(step(await super().place(items, timeout_seconds)))
        if isinstance(step, Exception):
            raise step
        return await super().place(items, timeout_seconds)


def queue(ledger: ModelLedger, **given: Any) -> OrderBatcher:
    return OrderBatcher(ledger, settings(resend_pause_seconds=0.001, **given), "create_buy_order")


def soon(seconds: float) -> float:
    return time.monotonic() + seconds


async def answers(waiting: list[PendingOrder]) -> list[Outcome]:
    return [await each.outcome for each in waiting]


def problem(outcome: Outcome) -> Any:
    assert isinstance(outcome, Refused)
    return outcome.problem


async def test_orders_that_arrive_while_a_batch_is_under_way_form_the_next() -> None:
    gate = asyncio.Event()
    ledger = Scripted(script=[gate], place_seconds=2)
    async with queue(ledger) as placing:
        first = placing.put([priced_order(100)], soon(5))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        later = [placing.put([priced_order(200 + number)], soon(5)) for number in range(5)]
        assert placing.waiting == 5
        gate.set()
        outcomes = [await answers(each) for each in [first, *later]]
    assert [len(batch) for batch in ledger.batches] == [1, 5]
    assert all(isinstance(outcome, Placed) for [outcome] in outcomes)


async def test_a_batch_has_a_bounded_size_and_keeps_the_order() -> None:
    ledger = Scripted(place_seconds=2)
    async with queue(ledger, batch_orders_max=3) as placing:
        items = [priced_order(100 + number) for number in range(8)]
        await answers(placing.put(items, soon(5)))
    assert [len(batch) for batch in ledger.batches] == [3, 3, 2]
    assert [item for batch in ledger.batches for item in batch] == items


@pytest.mark.parametrize(
    ("orders", "batches"), [(1, [1]), (32, [32]), (33, [32, 1]), (63, [32, 31]), (100, [50, 32, 18])]
)
async def test_an_edge_sends_half_of_a_long_queue(orders: int, batches: list[int]) -> None:
    ledger = Scripted(place_seconds=2)
    async with OrderBatcher(ledger, settings(), "create_buy_order", pipelined=True) as placing:
        items = [priced_order(100 + number) for number in range(orders)]
        assert all(isinstance(outcome, Placed) for outcome in await answers(placing.put(items, soon(5))))
    assert [len(batch) for batch in ledger.batches] == batches
    assert [item for batch in ledger.batches for item in batch] == items


def dry_run() -> PricedOrder:
    return priced_order(order=replace(new_order(), dry_run=True))


async def test_dry_run_whose_answer_was_lost_takes_the_next_one_whatever_that_is() -> None:
    ledger = Scripted(script=[OutcomeUnknown("lost"), OutcomeUnknown("lost")], cap_satoshi=1)
    async with queue(ledger) as placing:
        [outcome] = await answers(placing.put([dry_run()], soon(5)))
    assert problem(outcome).code == "exposure_cap_exceeded"
    assert len(ledger.batches) == 3


async def test_dry_run_of_which_nothing_is_learnt_in_time_is_not_stored_for_certain() -> None:
    ledger = Scripted(script=[OutcomeUnknown("lost")] * 1000)
    async with queue(ledger) as placing:
        outcomes = await answers(placing.put([dry_run(), priced_order()], soon(0.05)))
    assert [problem(each).code for each in outcomes] == ["ledger_unavailable", "outcome_unknown"]
    assert problem(outcomes[0]).facts == {}


async def test_leaving_finishes_what_was_accepted_and_takes_no_more() -> None:
    gate = asyncio.Event()
    ledger = Scripted(script=[gate])
    placing = queue(ledger)
    async with placing:
        waiting = placing.put([priced_order(100), priced_order(200)], soon(5))
        asyncio.get_running_loop().call_later(0.02, gate.set)
    assert [type(each.outcome.result()) for each in waiting] == [Placed, Placed]
    with pytest.raises(Overloaded, match="stopping"):
        placing.put([priced_order()], soon(5))


async def test_a_full_queue_refuses_all_of_what_does_not_fit() -> None:
    gate = asyncio.Event()
    async with queue(Scripted(script=[gate]), orders_waiting_max=2, batch_orders_max=2) as placing:
        first = placing.put([priced_order()], soon(5))
        await asyncio.sleep(0.01)
        placing.put([priced_order()], soon(5))
        with pytest.raises(Overloaded, match="waiting already"):
            placing.put([priced_order(), priced_order()], soon(5))
        assert placing.waiting == 1
        gate.set()
        await answers(first)


async def test_a_batch_of_unknown_outcome_is_sent_again_with_the_same_items() -> None:
    ledger = Scripted(script=[OutcomeUnknown("lost"), OutcomeUnknown("lost")])
    item = priced_order(key="k")
    async with queue(ledger) as placing:
        [waiting] = placing.put([item], soon(5))
        outcome = await waiting.outcome
    assert isinstance(outcome, Placed)
    assert waiting.resent
    assert ledger.batches == [[item]] * 3


async def test_an_order_that_was_stored_before_its_answer_was_lost_comes_back_once() -> None:
    def lose(_: Sequence[Outcome]) -> Sequence[Outcome]:
        raise OutcomeUnknown("the answer was lost")

    ledger = Scripted(script=[lose])
    async with queue(ledger) as placing:
        [outcome] = await answers(placing.put([priced_order()], soon(5)))
    assert isinstance(outcome, Replayed)
    assert len(ledger.stored) == 1


async def test_only_items_whose_own_outcome_is_unknown_are_sent_again() -> None:
    def second_unknown(outcomes: Sequence[Outcome]) -> Sequence[Outcome]:
        return [outcomes[0], Refused(OutcomeUnknown("db_proxy lost it"))]

    ledger = Scripted(script=[second_unknown])
    items = [priced_order(100), priced_order(200)]
    async with queue(ledger) as placing:
        outcomes = await answers(placing.put(items, soon(5)))
    assert [type(outcome) for outcome in outcomes] == [Placed, Replayed]
    assert ledger.batches == [items, items[1:]]


async def test_a_definite_failure_answers_at_once() -> None:
    ledger = Scripted(script=[LedgerUnavailable("down")])
    async with queue(ledger) as placing:
        [outcome] = await answers(placing.put([priced_order()], soon(5)))
    assert isinstance(problem(outcome), LedgerUnavailable)
    assert len(ledger.batches) == 1


async def test_a_definite_failure_after_a_lost_answer_proves_nothing() -> None:
    ledger = Scripted(script=[OutcomeUnknown("lost"), LedgerUnavailable("down"), LedgerUnavailable("down")])
    async with queue(ledger) as placing:
        [outcome] = await answers(placing.put([priced_order()], soon(5)))
    assert isinstance(outcome, Placed)
    assert len(ledger.batches) == 4


async def test_an_item_s_own_definite_failure_after_a_lost_answer_proves_nothing_either() -> None:
    """So db_proxy answers, item by item, when PostgreSQL went away after it had committed."""

    def lose(_: Sequence[Outcome]) -> Sequence[Outcome]:
        raise OutcomeUnknown("the answer was lost")

    def unavailable(_: Sequence[Outcome]) -> Sequence[Outcome]:
        return [Refused(LedgerUnavailable("down"))]

    ledger = Scripted(script=[lose, unavailable])
    async with queue(ledger) as placing:
        [outcome] = await answers(placing.put([priced_order()], soon(5)))
    assert isinstance(outcome, Replayed)
    assert len(ledger.batches) == 3


@pytest.mark.parametrize(
    "problem",
    [InvalidRequest.of("deadline", "is wrong"), InternalError("a fault"), ClockSkewed("off"), PriceStale("old")],
    ids=lambda error: error.code,
)
async def test_only_the_ledger_s_own_refusal_holds_for_an_order_whose_answer_was_lost(problem: DeskError) -> None:
    def lose(_: Sequence[Outcome]) -> Sequence[Outcome]:
        raise OutcomeUnknown("the answer was lost")

    def refuse(_: Sequence[Outcome]) -> Sequence[Outcome]:
        return [Refused(problem)]

    ledger = Scripted(script=[lose, refuse])
    async with queue(ledger) as placing:
        [outcome] = await answers(placing.put([priced_order()], soon(5)))
    assert isinstance(outcome, Replayed)
    assert len(ledger.batches) == 3

    refusal = Refused(problem, by_ledger=True)
    ledger = Scripted(script=[OutcomeUnknown("lost"), lambda _: [refusal]])
    async with queue(ledger) as placing:
        assert await answers(placing.put([priced_order()], soon(5))) == [refusal]


@pytest.mark.parametrize("away", [LedgerUnavailable("away"), WrongMode("another ledger")], ids=lambda error: error.code)
@pytest.mark.parametrize("in_outcomes", [True, False])
async def test_orders_do_not_wait_behind_one_that_is_sent_again_to_a_ledger_that_is_away(
    away: DeskError, in_outcomes: bool
) -> None:
    gate = asyncio.Event()
    told: Any = (lambda _: [Refused(away)]) if in_outcomes else away
    ledger = Scripted(script=[OutcomeUnknown("lost"), told, gate])
    async with queue(ledger) as placing:
        [lost] = placing.put([priced_order(100)], soon(5))
        await asyncio.sleep(0)
        others = placing.put([priced_order(200), priced_order(300)], soon(5))
        assert await answers(others) == [Refused(away)] * 2
        assert not lost.outcome.done()
        gate.set()
        assert not isinstance(await lost.outcome, Refused)


async def test_orders_wait_behind_one_that_is_sent_again_to_a_ledger_that_is_only_busy() -> None:
    ledger = Scripted(script=[OutcomeUnknown("lost"), Overloaded("busy")])
    async with queue(ledger) as placing:
        first = placing.put([priced_order(100)], soon(5))
        await asyncio.sleep(0)
        second = placing.put([priced_order(200)], soon(5))
        assert [type(outcome) for outcome in await answers(first + second)] == [Placed, Placed]


async def test_when_time_is_up_a_lost_order_is_unknown_and_says_until_when() -> None:
    ledger = Scripted(script=[OutcomeUnknown("lost")] * 1000)
    item = priced_order()
    async with queue(ledger, statement_seconds_max=2) as placing:
        [outcome] = await answers(placing.put([item], soon(0.05)))
    found = problem(outcome)
    assert found.code == "outcome_unknown"
    assert found.facts["order_id"] == str(item.order.id)
    assert (
        parse_time(found.facts["final_after"]) - item.deadline
    ).total_seconds() == 22  # twice the skew, and the statement
    assert found.retry_after_seconds == 1


async def test_one_order_s_end_of_time_leaves_the_others_of_its_batch_going() -> None:
    ledger = Scripted(script=[OutcomeUnknown("lost")] * 60)
    async with queue(ledger) as placing:
        # Both go into one batch: the worker has not run yet.
        [hasty], [patient] = placing.put([priced_order(100)], soon(0.02)), placing.put([priced_order(200)], soon(10))
        assert problem(await hasty.outcome).code == "outcome_unknown"
        assert isinstance(await patient.outcome, Placed)


async def test_an_order_whose_time_is_up_before_it_was_sent_is_overloaded() -> None:
    gate = asyncio.Event()
    ledger = Scripted(script=[gate])
    async with queue(ledger) as placing:
        first = placing.put([priced_order(100)], soon(5))
        await asyncio.sleep(0.01)
        [late] = await answers(placing.put([priced_order(200)], soon(0.01)))
        assert problem(late).code == "overloaded"
        gate.set()
        await answers(first)
    assert len(ledger.stored) == 1


async def test_an_order_taken_from_the_queue_too_late_is_never_sent() -> None:
    ledger = Scripted()
    async with queue(ledger) as placing:
        [outcome] = await answers(placing.put([priced_order()], soon(0)))
    assert problem(outcome).code == "overloaded"
    assert ledger.batches == []


async def test_an_order_that_has_less_time_left_than_the_ledger_may_take_is_not_sent() -> None:
    ledger = Scripted(place_seconds=0.5)
    async with queue(ledger) as placing:
        waiting = placing.put([priced_order(100)], soon(0.4)) + placing.put([priced_order(200)], soon(5))
        late, placed = await answers(waiting)
    assert problem(late).code == "overloaded"
    assert isinstance(placed, Placed)
    assert [len(batch) for batch in ledger.batches] == [1]


async def test_an_order_that_waits_too_long_is_refused_while_it_waits_wherever_it_stands() -> None:
    gate = asyncio.Event()
    async with queue(Scripted(script=[gate], place_seconds=0.5)) as placing:
        first = placing.put([priced_order(100)], soon(5))
        await asyncio.sleep(0.01)
        patient, hasty = placing.put([priced_order(200)], soon(5)), placing.put([priced_order(300)], soon(0.6))
        assert problem((await answers(hasty))[0]).code == "overloaded"
        assert placing.waiting == 1
        gate.set()
        assert [type(outcome) for outcome in await answers(first + patient)] == [Placed, Placed]


async def test_batches_are_as_large_as_the_ledger_is_fast() -> None:
    seconds_an_order = 0.004

    class Slow(Scripted):
        async def place(self, items: Sequence[PricedOrder], timeout_seconds: float) -> Sequence[Outcome]:
            await asyncio.sleep(len(items) * seconds_an_order)
            return await super().place(items, timeout_seconds)

    ledger = Slow(place_seconds=0.04)
    async with queue(ledger, batch_orders_max=40) as placing:
        await answers(placing.put([priced_order(100 + number) for number in range(80)], soon(5)))
        # The first takes 160 ms. In half of 40 ms are 5 orders; twice as many are tried now and then.
        slow = [len(batch) for batch in ledger.batches]
        seconds_an_order = 0
        await answers(placing.put([priced_order(300 + number) for number in range(120)], soon(5)))
    assert slow[0] == 40
    assert all(1 <= size <= 10 for size in slow[1:])
    assert max(len(batch) for batch in ledger.batches[len(slow) :]) == 40


async def test_a_fault_of_our_own_leaves_the_outcome_unknown_and_the_queue_working(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ledger = Scripted(script=[ZeroDivisionError("a fault")])
    async with queue(ledger) as placing:
        with caplog.at_level(logging.ERROR):
            [outcome] = await answers(placing.put([priced_order()], soon(5)))
        assert problem(outcome).code == "outcome_unknown"
        assert "failed unexpectedly" in caplog.text
        [outcome] = await answers(placing.put([priced_order()], soon(5)))
        assert isinstance(outcome, Placed)


async def test_an_order_whose_asker_is_gone_hurts_none_of_its_batch() -> None:
    gate = asyncio.Event()
    ledger = Scripted(script=[gate])
    async with queue(ledger) as placing:
        waiting = placing.put([priced_order(100 + number) for number in range(4)], soon(5))
        await asyncio.sleep(0.01)
        waiting[1].outcome.cancel()
        gate.set()
        for each in (waiting[0], waiting[2], waiting[3]):
            assert isinstance(await each.outcome, Placed)


async def test_one_sending_takes_no_longer_than_a_ledger_that_works() -> None:
    allowed: list[float] = []

    class Silent(ModelLedger):
        async def place(self, items: Sequence[PricedOrder], timeout_seconds: float) -> Sequence[Outcome]:
            allowed.append(timeout_seconds)
            if len(allowed) == 1:
                raise OutcomeUnknown("no answer in time")
            return await super().place(items, timeout_seconds)

    async with queue(Silent(), connect_seconds_max=0.5, statement_seconds_max=1) as placing:
        [outcome] = await answers(placing.put([priced_order()], soon(8)))
    assert isinstance(outcome, Placed)
    assert allowed == [1.5, 1.5]
