"""Refusals on record: which are, how many, and that nothing waits for them."""

import asyncio
from collections.abc import Sequence

import pytest
from msgspec.structs import replace

from buydesk.errors import (
    ClientCapExceeded,
    DailyLimitExceeded,
    DeskError,
    ExposureCapExceeded,
    IdempotencyKeyReused,
    LedgerUnavailable,
    OrderTooLarge,
    Overloaded,
    Paused,
    PriceMoved,
    PriceStale,
    PriceUnavailable,
    PriceUnsettled,
)
from buydesk.http.examples import EXAMPLE_ORDER
from buydesk.http.orders import PLACE_ORDER
from buydesk.orders import refusals
from buydesk.orders.model import NewOrder, Placed, Refused
from buydesk.orders.refusals import OF_CLIENT_MAX, RECORDED, WAITING_MAX, Refusal, RefusalRecorder
from tests.builders import new_order, priced_order
from tests.clock import FakeClock
from tests.model_registry import ModelRefusals

FULL = ExposureCapExceeded("full")


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals, "PAUSE_SECONDS", 0)
    monkeypatch.setattr(refusals, "RETRY_SECONDS", 0)


def note(recorder: RefusalRecorder, order: NewOrder, problem: DeskError) -> None:
    recorder.note([priced_order(order=order)], [Refused(problem)])


def unrecorded(recorder: RefusalRecorder) -> float:
    [metric] = recorder.collect()
    [sample] = metric.samples
    return sample.value


@pytest.mark.parametrize(
    "kind",
    [
        *(OrderTooLarge, ClientCapExceeded, DailyLimitExceeded, ExposureCapExceeded),
        *(Paused, PriceUnavailable, PriceStale, PriceUnsettled, PriceMoved),
    ],
)
async def test_what_the_ledger_refused_is_recorded_with_who_asked_for_what_and_when(kind: type[DeskError]) -> None:
    store, clock = ModelRefusals(), FakeClock()
    recorder = RefusalRecorder(store, clock)
    order = replace(new_order(6900, "k"), client="shop")
    async with recorder.running():
        note(recorder, order, kind("no"))
    assert store.kept == [Refusal(clock.now(), "shop", order.id, "k", kind.code, order.currency, 6900)]
    assert unrecorded(recorder) == 0


@pytest.mark.parametrize("problem", [IdempotencyKeyReused("no"), Overloaded("no"), LedgerUnavailable("no")])
async def test_what_it_had_no_say_in_is_not(problem: DeskError) -> None:
    store = ModelRefusals()
    recorder = RefusalRecorder(store)
    async with recorder.running():
        note(recorder, new_order(), problem)
    assert store.kept == []


async def test_dry_runs_are_not() -> None:
    store = ModelRefusals()
    recorder = RefusalRecorder(store)
    async with recorder.running():
        note(recorder, replace(new_order(), dry_run=True), FULL)
    assert store.kept == []


async def test_of_a_batch_what_was_placed_is_not() -> None:
    store = ModelRefusals()
    recorder = RefusalRecorder(store)
    one, other = priced_order(), priced_order()
    async with recorder.running():
        recorder.note([one, other], [Placed(EXAMPLE_ORDER), Refused(FULL)])
    assert [each.order_id for each in store.kept] == [other.order.id]


async def test_they_are_recorded_in_the_background_together() -> None:
    store = Slow()
    recorder = RefusalRecorder(store)
    async with recorder.running():
        for _ in range(3):
            note(recorder, new_order(), FULL)
        assert store.kept == []
        await store.noted.wait()
        assert (len(store.kept), store.calls) == (3, 1)


class Slow(ModelRefusals):
    def __init__(self) -> None:
        super().__init__()
        self.noted = asyncio.Event()
        self.calls = 0

    async def note_refusals(self, refusals: Sequence[Refusal]) -> None:
        await super().note_refusals(refusals)
        self.calls += 1
        self.noted.set()


async def test_of_one_client_so_many_a_minute_are_recorded_and_the_rest_is_counted() -> None:
    store, clock = ModelRefusals(), FakeClock()
    recorder = RefusalRecorder(store, clock)
    async with recorder.running():
        for _ in range(OF_CLIENT_MAX + 7):
            note(recorder, replace(new_order(), client="loud"), FULL)
        note(recorder, replace(new_order(), client="quiet"), FULL)
        await clock.sleep(60)
        note(recorder, replace(new_order(), client="loud"), FULL)
    assert [each.client for each in store.kept].count("loud") == OF_CLIENT_MAX + 1
    assert [each.client for each in store.kept].count("quiet") == 1
    assert unrecorded(recorder) == 7


async def test_no_more_than_so_many_wait() -> None:
    store = ModelRefusals()
    recorder = RefusalRecorder(store)
    for number in range(WAITING_MAX + 3):
        note(recorder, replace(new_order(), client=f"client-{number}"), FULL)
    async with recorder.running():
        pass
    assert len(store.kept) == WAITING_MAX
    assert unrecorded(recorder) == 3


async def test_what_a_store_does_not_take_is_counted_and_logged_and_the_next_ones_are_recorded(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = ModelRefusals(fault=LedgerUnavailable("away", server_said="gone fishing"))
    recorder = RefusalRecorder(store)
    async with recorder.running():
        note(recorder, new_order(), FULL)
        while not caplog.messages:
            await asyncio.sleep(0)
        store.fault = None
        note(recorder, new_order(), FULL)
    assert len(store.kept) == 1
    assert unrecorded(recorder) == 1
    [told] = caplog.messages
    assert told.startswith("1 refusals are not on record: away")


async def test_a_fault_of_the_store_s_own_ends_no_recording(caplog: pytest.LogCaptureFixture) -> None:
    store = Broken()
    recorder = RefusalRecorder(store)
    async with recorder.running():
        note(recorder, new_order(), FULL)
        while not caplog.messages:
            await asyncio.sleep(0)
        note(recorder, new_order(), FULL)
    assert len(store.kept) == 1
    assert unrecorded(recorder) == 1
    assert caplog.records[0].exc_info


class Broken(ModelRefusals):
    """Whose first call fails unexpectedly."""

    is_first = True

    async def note_refusals(self, refusals: Sequence[Refusal]) -> None:
        if self.is_first:
            self.is_first = False
            raise ZeroDivisionError
        await super().note_refusals(refusals)


async def test_at_the_end_a_store_that_takes_nothing_is_not_waited_for() -> None:
    store = ModelRefusals(fault=LedgerUnavailable("away"))
    recorder = RefusalRecorder(store)
    for number in range(refusals.NOTED_AT_ONCE_MAX + 1):
        note(recorder, replace(new_order(), client=f"client-{number}"), FULL)
    async with recorder.running():
        pass
    assert unrecorded(recorder) == refusals.NOTED_AT_ONCE_MAX


def test_all_that_is_recorded_is_documented_where_orders_are_placed() -> None:
    examples = [
        example
        for response in PLACE_ORDER["responses"].values()
        for example in response["content"].get("application/problem+json", {}).get("examples", {})
    ]
    assert {kind.code for kind in RECORDED} <= set(examples)
