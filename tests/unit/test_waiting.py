"""Fair shares: none waits behind all that another client has sent, and none is refused for its sake."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from msgspec.structs import replace

from buydesk.errors import LedgerUnavailable, OutcomeUnknown, Overloaded
from buydesk.orders.batching import OrderBatcher
from buydesk.orders.model import Outcome, Placed, PricedOrder, Refused
from buydesk.orders.waiting import PendingOrder, WaitingOrders
from tests.builders import new_order, priced_order, record, settings
from tests.model_ledger import ModelLedger

PRICE = record(ttl=3600)
BATCH = 50  # so many orders the ledger takes in a call
HAMMERING = 5_000


def order(client: str, cents: int = 6900) -> PricedOrder:
    return priced_order(price=PRICE, order=replace(new_order(cents), client=client))


def pending(name: str, give_up_at: float = 0) -> PendingOrder:
    """The client is the name's letter; the amount its number."""
    return PendingOrder(order(name[0], int(name[1:])), give_up_at, asyncio.get_running_loop().create_future(), None)


def names(orders: Sequence[PendingOrder]) -> list[str]:
    return [f"{each.item.order.client}{each.item.order.amount_cents}" for each in orders]


def waiting(text: str, *, fair: bool = True) -> WaitingOrders:
    orders = WaitingOrders(fair=fair)
    for name in text.split():
        orders.add([pending(name)])
    return orders


def given_up(orders: WaitingOrders, client: str) -> str | None:
    found = orders.make_room(client)
    return None if found is None else names([found])[0]


async def test_clients_take_turns_and_each_client_s_orders_keep_theirs() -> None:
    orders = waiting("a1 a2 a3 a4 b1 b2 c1")
    assert names(orders.take(100)) == ["a1", "b1", "c1", "a2", "b2", "a3", "a4"]
    assert orders.count == 0
    assert orders.take(1) == []


async def test_a_turn_is_kept_from_one_batch_to_the_next() -> None:
    orders = waiting("a1 a2 b1 b2 c1 c2")
    assert names(orders.take(2)) == ["a1", "b1"]
    orders.add([pending("d1"), pending("a3")])
    assert names(orders.take(3)) == ["c1", "a2", "b2"]
    assert names(orders.take(3)) == ["d1", "c2", "a3"]


async def test_one_client_s_orders_go_in_their_order() -> None:
    orders = waiting("a1 a2 a3 a4 a5")
    assert [names(orders.take(2)), names(orders.take(2)), names(orders.take(2))] == [["a1", "a2"], ["a3", "a4"], ["a5"]]


async def test_where_there_are_no_shares_the_first_is_the_first_and_nobody_gives_way() -> None:
    orders = waiting("a1 a2 b1 a3 c1", fair=False)
    assert orders.make_room("d") is None
    assert names(orders.take(3)) == ["a1", "a2", "b1"]
    assert names(orders.take(3)) == ["a3", "c1"]


async def test_the_newest_of_the_client_with_the_most_gives_way() -> None:
    orders = waiting("b1 a1 a2 b2 a3 c1 c2 a4")
    assert [given_up(orders, "d"), given_up(orders, "d")] == ["a4", "a3"]
    assert orders.count == 6
    assert names(orders.take(10)) == ["b1", "a1", "c1", "b2", "a2", "c2"]


@pytest.mark.parametrize("client", ["a", "b", "c"])
async def test_nobody_gives_way_to_a_client_that_would_have_as_many(client: str) -> None:
    orders = waiting("a1 a2 a3 b1 b2 b3 c1 c2")
    assert orders.make_room(client) is None
    assert orders.count == 8


async def test_clients_do_not_push_each_other_out_by_turns() -> None:
    orders, found = waiting("a1 a2 a3 a4 a5 a6"), []
    for number in range(1, 6):
        if name := given_up(orders, "b"):
            orders.add([pending(f"b{number}")])
            found.append(name)
    assert found == ["a6", "a5", "a4"]
    assert given_up(orders, "a") is None
    assert given_up(orders, "c") == "a3"  # of equals the first by name


async def test_what_waited_too_long_is_taken_out_wherever_it_stands_and_takes_no_turn() -> None:
    orders = WaitingOrders(fair=True)
    orders.add([pending("a1", 9), pending("a2", 1), pending("b1", 1), pending("c1", 9), pending("a3", 9)])
    assert orders.take_late(1) == []
    assert names(orders.take_late(2)) == ["a2", "b1"]
    assert orders.count == 3
    assert names(orders.take(9)) == ["a1", "c1", "a3"]


def taken_in_turn(model: dict[str, list[PendingOrder]], most: int) -> Iterator[PendingOrder]:
    for _ in range(most):
        if model:
            client = next(iter(model))
            own = model.pop(client)
            yield own.pop(0)
            if own:
                model[client] = own


@pytest.mark.parametrize("seed", range(20))
async def test_any_sequence_of_calls_ends_as_one_would_explain_it(seed: int) -> None:
    chance, orders = random.Random(seed), WaitingOrders(fair=True)  # noqa: S311
    model: dict[str, list[PendingOrder]] = {}  # in the order of turns
    for number in range(1, 300):
        each = pending(f"{chance.choice('aaaaaabbcdefg')}{number}", number)
        client = each.item.order.client
        match chance.choice(["add"] * 5 + ["make room"] * 3 * bool(model) + ["take", "late"]):
            case "take":
                most = chance.randrange(6)
                assert orders.take(most) == list(taken_in_turn(model, most))
                continue
            case "late":
                late = orders.take_late(number - 60)
                assert all(gone in model[gone.item.order.client] for gone in late)
                kept = {name: [own for own in mine if own.give_up_at >= number - 60] for name, mine in model.items()}
                model = {name: mine for name, mine in kept.items() if mine}
            case "make room":
                most = max(map(len, model.values()))
                found = orders.make_room(client)
                assert (found is not None) is (most > len(model.get(client, ())) + 1)
                if found is None:
                    continue
                longest = model[found.item.order.client]
                assert len(longest) == most
                assert longest.pop() is found
        orders.add([each])
        model.setdefault(client, []).append(each)
        assert orders.count == sum(map(len, model.values()))


@dataclass(repr=False)
class Stepped(ModelLedger):
    """A ledger that takes a batch at a time and settles it, whatever it holds, when it is told to."""

    place_seconds: float = 60
    batches: list[list[PricedOrder]] = field(default_factory=list)
    steps: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))
    problems: list[Exception] = field(default_factory=list)

    async def place(self, items: Sequence[PricedOrder], timeout_seconds: float) -> Sequence[Outcome]:
        self.batches.append(list(items))
        await self.steps.acquire()
        if self.problems:
            raise self.problems.pop(0)
        return [PLACED] * len(items)

    async def step(self) -> None:
        """Has the batch under way settled and the next one sent, if orders wait."""
        self.steps.release()
        await let_work()

    def settle_all(self) -> None:
        """Has every further batch settled at once."""
        for _ in range(HAMMERING):
            self.steps.release()


async def let_work() -> None:
    """Until the batcher's worker has done what it can."""
    for _ in range(50):
        await asyncio.sleep(0)


[PLACED] = asyncio.run(ModelLedger().place([order("somebody")], 1))


@asynccontextmanager
async def edge(ledger: Stepped, waiting_max: int, **given: Any) -> AsyncIterator[OrderBatcher]:
    """Its queue, which is emptied in the end whatever happened: a test that fails must not wait for ever."""
    limits = settings(orders_waiting_max=waiting_max, batch_orders_max=min(BATCH, waiting_max), **given)
    async with OrderBatcher(ledger, limits, "create_buy_order", pipelined=True) as placing:
        try:
            yield placing
        finally:
            ledger.settle_all()


def put(placing: OrderBatcher, client: str) -> PendingOrder:
    [each] = placing.put([order(client)], time.monotonic() + 600)
    return each


def hammer(placing: OrderBatcher, times: int) -> int:
    """Puts so many orders in, whatever becomes of them; how many were refused at once."""
    refused = 0
    for _ in range(times):
        try:
            put(placing, "hammering")
        except Overloaded:
            refused += 1
    return refused


async def batches_until_answered(waiting_max: int, hammering: int) -> list[int]:
    """For each of a polite client's orders, the batches settled until it was placed, ten at the most: the one under way
    and those after it. Beside it another client keeps so many orders waiting, and sends a hundred for each of them."""
    ledger, counts = Stepped(), []
    async with edge(ledger, waiting_max) as placing:
        for _ in range(100):
            put(placing, "somebody")
            hammer(placing, hammering - placing.waiting)
            await let_work()
            polite, batches = put(placing, "polite"), 0
            hammer(placing, 100 if hammering else 0)
            while not polite.outcome.done() and batches < 10:
                await ledger.step()
                batches += 1
            counts.append(batches)
    return sorted(counts)


@pytest.mark.parametrize("waiting_max", [HAMMERING, 4 * HAMMERING], ids=["full", "with room"])
async def test_a_client_that_hammers_does_not_slow_another_s_p99_by_more_than_half_in_batches(waiting_max: int) -> None:
    alone = await batches_until_answered(waiting_max, 0)
    beside = await batches_until_answered(waiting_max, HAMMERING)
    p99 = 98  # of 100, sorted
    assert alone[p99] == 2  # the one under way and its own
    assert beside[p99] <= 1.5 * alone[p99]


async def test_an_order_is_in_the_next_batch_whatever_another_client_has_waiting() -> None:
    ledger = Stepped()
    async with edge(ledger, 2 * HAMMERING) as placing:
        hammer(placing, HAMMERING + BATCH)
        await let_work()
        for _ in range(20):
            polite = put(placing, "polite")
            hammer(placing, 100)
            assert placing.waiting >= HAMMERING
            await ledger.step()
            assert polite.item in ledger.batches[-1]
            assert len(ledger.batches[-1]) == BATCH


async def test_a_full_queue_refuses_none_of_who_has_few_waiting_and_the_newest_of_who_fills_it() -> None:
    ledger = Stepped()
    async with edge(ledger, 100) as placing:
        first = put(placing, "hammering")
        await let_work()
        hammering = [put(placing, "hammering") for _ in range(100)]
        assert hammer(placing, 1) == 1
        polite = [put(placing, "polite") for _ in range(3)]
        assert hammer(placing, 10) == 10
        assert placing.waiting == 100
        assert [each.outcome.done() for each in hammering] == [False] * 97 + [True] * 3
        refused = [each.outcome.result() for each in hammering[97:]]
        assert [type(each.problem) for each in refused if isinstance(each, Refused)] == [Overloaded] * 3
        ledger.settle_all()
        answered = [await each.outcome for each in [first, *hammering[:97], *polite]]
    assert all(isinstance(outcome, Placed) for outcome in answered)
    sent = {item.order.id for batch in ledger.batches for item in batch}
    assert not sent & {each.item.order.id for each in hammering[97:]}


async def test_a_list_is_taken_as_a_whole_or_not_at_all() -> None:
    ledger = Stepped()
    async with edge(ledger, 3) as placing:
        put(placing, "hammering")
        await let_work()
        hammering = [put(placing, "hammering") for _ in range(3)]
        with pytest.raises(Overloaded, match="3 orders are waiting already"):
            placing.put([order("polite"), order("polite")], time.monotonic() + 600)
        assert not any(each.outcome.done() for each in hammering)


async def test_all_that_wait_are_refused_when_the_ledger_is_down_whoever_s_they_are() -> None:
    ledger = Stepped(problems=[OutcomeUnknown("lost"), LedgerUnavailable("down")])
    async with edge(ledger, 100, resend_pause_seconds=0.001) as placing:
        lost = put(placing, "polite")
        await let_work()
        others = [put(placing, client) for client in ("polite", "hammering", "hammering")]
        ledger.settle_all()
        outcomes = [await each.outcome for each in others]
        assert [type(each.problem) for each in outcomes if isinstance(each, Refused)] == [LedgerUnavailable] * 3
        assert await lost.outcome is PLACED


async def test_db_proxy_s_queue_is_first_come_first_served() -> None:
    ledger = Stepped()
    async with OrderBatcher(ledger, settings(orders_waiting_max=4, batch_orders_max=2), "db_proxy") as placing:
        items = [order(client) for client in "aaab"]
        orders = placing.put(items, time.monotonic() + 600)
        with pytest.raises(Overloaded):
            put(placing, "c")
        ledger.settle_all()
        assert [await each.outcome for each in orders] == [PLACED] * 4
    assert ledger.batches == [items[:2], items[2:]]
