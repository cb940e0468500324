"""Places, shared checks and slices: what readers may take, and what they are told when that is taken."""

import asyncio

import pytest

from buydesk import limits
from buydesk.errors import LedgerUnavailable, Overloaded
from buydesk.limits import SLICE_ITEMS, Bulkhead, SharedCheck, in_slices

FAILURE_COUNTS_SECONDS = limits.FAILURE_COUNTS_SECONDS


async def _hold(places: Bulkhead, until: asyncio.Event, order: list[int], who: int) -> None:
    async with places:
        order.append(who)
        await until.wait()


async def test_so_many_are_let_in_and_the_others_wait_in_the_order_they_came() -> None:
    places, until, order = Bulkhead(2, 3, 60), asyncio.Event(), list[int]()
    holders = [asyncio.create_task(_hold(places, until, order, who)) for who in range(5)]
    await asyncio.sleep(0)
    assert order == [0, 1]
    with pytest.raises(Overloaded, match="3 reads are waiting already") as raised:
        await _hold(places, until, order, 5)
    assert raised.value.retry_after_seconds == 1
    until.set()
    await asyncio.gather(*holders)
    assert order == [0, 1, 2, 3, 4]
    await _hold(places, until, order, 6)


async def test_who_waits_too_long_is_told_so_and_its_place_in_the_queue_is_free() -> None:
    places, until, order = Bulkhead(1, 1, 0.001), asyncio.Event(), list[int]()
    holder = asyncio.create_task(_hold(places, until, order, 0))
    await asyncio.sleep(0)
    for _ in range(2):
        with pytest.raises(Overloaded, match="waited too long"):
            await _hold(places, until, order, 1)
    until.set()
    await holder
    await _hold(places, until, order, 2)
    assert order == [0, 2]


async def test_who_gives_up_waiting_or_fails_leaves_its_place() -> None:
    places, until, order = Bulkhead(1, 1, 60), asyncio.Event(), list[int]()
    holder = asyncio.create_task(_hold(places, until, order, 0))
    await asyncio.sleep(0)
    waiter = asyncio.create_task(_hold(places, until, order, 1))
    await asyncio.sleep(0)
    for task in (waiter, holder):
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    until.set()
    await _hold(places, until, order, 2)
    assert order == [0, 2]


async def test_all_who_ask_while_a_check_runs_share_it() -> None:
    runs, go = 0, asyncio.Event()

    async def check() -> None:
        nonlocal runs
        runs += 1
        await go.wait()
        raise LedgerUnavailable("away")

    shared = SharedCheck(check)
    askers = [asyncio.create_task(shared()) for _ in range(50)]
    await asyncio.sleep(0)
    askers[0].cancel()  # who gives up does not end it for the others
    go.set()
    found = await asyncio.gather(*askers, return_exceptions=True)
    assert [type(each) for each in found] == [asyncio.CancelledError, *[LedgerUnavailable] * 49]
    assert runs == 1


async def test_a_failure_counts_for_a_second_and_what_is_well_is_asked_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Strangers may ask as often as they like: a check that fails takes a new connection each time."""
    monkeypatch.setattr(limits, "FAILURE_COUNTS_SECONDS", FAILURE_COUNTS_SECONDS)
    found: list[Exception | None] = [LedgerUnavailable("away"), RuntimeError("a fault"), None, None]

    async def check() -> None:
        if (error := found.pop(0)) is not None:
            raise error

    shared = SharedCheck(check)
    for error in (LedgerUnavailable, RuntimeError):
        for _ in range(5):
            with pytest.raises(error):
                await shared()
        await asyncio.sleep(1.0)
    await shared()
    await shared()
    assert found == []


async def test_others_run_between_slices_and_every_item_is_made_in_its_order() -> None:
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    beside = asyncio.create_task(other())
    assert await in_slices(str, range(3 * SLICE_ITEMS + 1)) == [str(each) for each in range(3 * SLICE_ITEMS + 1)]
    assert turns == 3
    assert await in_slices(str, range(SLICE_ITEMS)) == [str(each) for each in range(SLICE_ITEMS)]
    assert await in_slices(str, []) == []
    assert turns == 3  # what is one slice waits for nobody
    beside.cancel()
