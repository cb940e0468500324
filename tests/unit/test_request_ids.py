"""Request ids: which are taken, where they show, and how an order's is found from its batch's."""

import asyncio
import contextvars
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buydesk.backends.memory.reports import MemoryReportStore
from buydesk.errors import ExposureCapExceeded, InternalError, LedgerUnavailable, OutcomeUnknown
from buydesk.observability import logs, request_ids
from buydesk.observability.reporter import Reporter, ReportHandler
from buydesk.observability.reports import DATA_CHARS_MAX
from buydesk.orders.batching import OrderBatcher
from buydesk.orders.model import Outcome, Placed, PricedOrder, Refused
from buydesk.orders.waiting import PendingOrder
from tests.builders import priced_order, settings
from tests.logged import logged
from tests.model_ledger import ModelLedger
from tests.unit.test_batching import answers, soon


def apart(function: Callable[[], Any]) -> Any:
    """Runs it in a context of its own, without a request."""
    return contextvars.Context().run(function)


@pytest.mark.parametrize("text", ["a", "A.z_0-9", "x" * 64, "0123-abc"])
def test_an_id_of_the_client_s_is_kept_as_it_is(text: str) -> None:
    assert apart(lambda: [request_ids.begin(text), request_ids.current()]) == [text, text]


@pytest.mark.parametrize(
    "given_id", [None, "", "x" * 65, "a b", "a\n", "a/b", "\xe9", "\xff\xfe", "a,b", '"a"', "\u0661"]
)
def test_what_is_not_fit_to_be_an_id_is_replaced_by_a_fresh_one(given_id: str | None) -> None:
    begun, current = apart(lambda: [request_ids.begin(given_id), request_ids.current()])
    assert begun == current
    another = apart(lambda: request_ids.begin(given_id))
    assert another != begun
    for each in (begun, another):
        assert apart(partial(request_ids.begin, each)) == each


@given(st.text(max_size=80))
def test_an_id_is_never_anything_that_could_break_a_header_or_a_line(given_id: str) -> None:
    begun = apart(lambda: request_ids.begin(given_id))
    assert 1 <= len(begun) <= 64
    assert not set(begun) - set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")


async def test_what_a_request_starts_has_its_id_and_others_do_not() -> None:
    assert apart(request_ids.current) is None

    async def other() -> str | None:
        return request_ids.current()

    async def request(text: str) -> list[str | None]:
        request_ids.begin(text)
        await asyncio.sleep(0)
        return [request_ids.current(), await asyncio.create_task(other())]

    assert list(await asyncio.gather(request("one"), request("two"))) == [["one", "one"], ["two", "two"]]


def test_a_line_names_the_request() -> None:
    def work() -> None:
        request_ids.begin("r-1")
        logging.getLogger("buydesk").info("in it")

    with logged() as lines:
        apart(work)
        apart(lambda: logging.getLogger("buydesk").info("outside"))
    assert [each.get("request_id") for each in lines] == ["r-1", None]
    assert "request_id" not in lines[1]


def test_a_line_on_a_terminal_names_the_request() -> None:
    def work(begun: bool) -> str:
        if begun:
            request_ids.begin("r-1")
        record = logging.LogRecord("buydesk", logging.INFO, __file__, 1, "Ready", None, None)
        return logs._Text().format(record).partition("Z ")[2]

    assert apart(lambda: work(True)) == "INFO     buydesk [r-1]: Ready"
    assert apart(lambda: work(False)) == "INFO     buydesk: Ready"


async def test_a_report_begins_with_the_request_however_long_it_is() -> None:
    configured = settings()
    desk = MemoryReportStore(configured)
    reporter = Reporter("db_proxy", desk, configured)
    logger = logging.Logger("buydesk.services.db_proxy")
    logger.addHandler(ReportHandler({"db_proxy": reporter}, "db_proxy"))

    def work() -> None:
        request_ids.begin("r-1")
        logger.warning("late")
        logger.error("x" * DATA_CHARS_MAX, exc_info=OSError("away"))

    apart(work)

    async def missing() -> list[dict[str, str]]:
        return []

    async with reporter.running(missing):
        pass
    texts = [kept.report.data for kept in reversed(await desk.reports("db_proxy", None, 10))]
    assert texts[:2] == ["[r-1] late", f"[r-1] {'x' * (DATA_CHARS_MAX // 2)} (OSError: away)"]


class Ledger(ModelLedger):
    """Does as it is told, batch by batch, and notes under which id it is called."""

    def __init__(self, *script: Callable[[list[Outcome]], Sequence[Outcome]] | Exception | None) -> None:
        super().__init__()
        self.script = list(script)
        self.ids: list[str | None] = []

    async def place(self, items: Sequence[PricedOrder], timeout_seconds: float) -> Sequence[Outcome]:
        self.ids.append(request_ids.current())
        step = self.script.pop(0) if self.script else None
        if isinstance(step, Exception):
            raise step
        outcomes = list(await super().place(items, timeout_seconds))
        return outcomes if step is None else step(outcomes)


async def placed(ledger: Ledger, *requests: str) -> tuple[list[PendingOrder], list[Outcome]]:
    """Orders that arrive in one batch, each with a request of its own."""
    items = [priced_order(100 + number) for number, _ in enumerate(requests)]
    waiting: list[PendingOrder] = []

    async def request(text: str, item: PricedOrder) -> None:
        request_ids.begin(text)
        waiting.extend(queue.put([item], soon(5)))

    queue = OrderBatcher(ledger, settings(resend_pause_seconds=0.001), "create_buy_order")
    for each in zip(requests, items, strict=True):
        await asyncio.create_task(request(*each))
    async with queue:
        return waiting, await answers(waiting)


def told(lines: list[dict[str, Any]]) -> list[tuple[str, object]]:
    return [(each["request_id"], each.get("orders")) for each in lines]


async def test_a_batch_of_one_goes_under_the_id_of_its_order_s_request() -> None:
    ledger = Ledger()
    await placed(ledger, "r-1")
    assert ledger.ids == ["r-1"]


async def test_a_batch_of_several_has_an_id_of_its_own_which_costs_no_line() -> None:
    ledger = Ledger()
    with logged() as lines:
        await placed(ledger, "r-1", "r-2")
    assert len(ledger.ids) == 1
    assert not {"r-1", "r-2", None} & set(ledger.ids)
    assert lines == []


async def test_orders_that_no_request_brought_go_under_a_fresh_id() -> None:
    ledger = Ledger(OutcomeUnknown("lost"))
    queue = OrderBatcher(ledger, settings(resend_pause_seconds=0.001), "create_buy_order")

    async def nobody() -> list[PendingOrder]:
        return queue.put([priced_order()], soon(5))

    [waiting] = await asyncio.create_task(nobody(), context=contextvars.Context())
    with logged() as lines:
        async with queue:
            assert isinstance(await waiting.outcome, Placed)
    assert told(lines) == [(ledger.ids[0], {str(waiting.item.order.id): None})]


@pytest.mark.parametrize(
    "loss",
    [OutcomeUnknown("cut off"), lambda outcomes: [Refused(OutcomeUnknown("db_proxy gave up")) for _ in outcomes]],
    ids=["the whole answer", "as the ledger says"],
)
async def test_orders_whose_answer_is_lost_are_named_once_with_their_requests(loss: Any) -> None:
    ledger = Ledger(loss, loss)
    with logged(level=logging.WARNING) as lines:
        waiting, outcomes = await placed(ledger, "r-1", "r-2")
    assert {type(outcome).__name__ for outcome in outcomes} <= {"Placed", "Replayed"}
    batch = ledger.ids[0]
    assert set(ledger.ids) == {batch}
    names = {str(each.item.order.id): text for each, text in zip(waiting, ("r-1", "r-2"), strict=True)}
    assert told(lines) == [(batch, names), (batch, None)]


async def test_an_order_that_met_a_fault_is_named_under_its_own_request_with_its_batch() -> None:
    def second_fails(outcomes: list[Outcome]) -> list[Outcome]:
        return [outcomes[0], Refused(InternalError("It cannot be stored."))]

    ledger = Ledger(second_fails)
    with logged() as lines:
        waiting, _ = await placed(ledger, "r-1", "r-2")
    [line] = lines
    assert (line["request_id"], line["batch"]) == ("r-2", ledger.ids[0])
    assert str(waiting[1].item.order.id) in line["message"]


async def test_a_fault_of_the_queue_s_own_names_the_orders_that_have_no_answer() -> None:
    ledger = Ledger(ZeroDivisionError("an accident"))
    with logged() as lines:
        [waiting], _ = await placed(ledger, "r-1")
    assert told(lines) == [("r-1", {str(waiting.item.order.id): "r-1"})]


@pytest.mark.parametrize(
    "refusal", [LedgerUnavailable("away"), lambda outcomes: [Refused(ExposureCapExceeded("full")) for _ in outcomes]]
)
async def test_orders_that_were_certainly_not_stored_cost_no_line(refusal: Any) -> None:
    with logged() as lines:
        _, outcomes = await placed(Ledger(refusal), "r-1", "r-2")
    assert {type(outcome) for outcome in outcomes} == {Refused}
    assert lines == []
