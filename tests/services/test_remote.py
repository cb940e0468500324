"""The ports over HTTP when the other side is away, cut off or not itself: what is certain, and what is not."""

import asyncio
import contextlib
import socket
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import msgspec
import pytest
from fastapi import FastAPI, Request, Response

from buydesk.backends.memory.reports import MemoryReportStore
from buydesk.backends.remote import RemoteLedger, RemotePriceStore, RemoteService
from buydesk.backends.remote.registry import RemoteRegistry
from buydesk.backends.remote.reports import RemoteReportStore
from buydesk.clients.registry import ClientState
from buydesk.errors import (
    DeskError,
    ExposureCapExceeded,
    InternalError,
    InvalidRequest,
    LedgerUnavailable,
    MethodNotAllowed,
    NotFound,
    NotReady,
    OrderNotFound,
    OutcomeUnknown,
    Overloaded,
    PayloadTooLarge,
    PriceMoved,
    PriceStale,
    PriceStoreUnavailable,
    PriceUnavailable,
    PriceUnsettled,
    ReportsUnavailable,
    Unauthorized,
    UnsupportedMediaType,
    WrongMode,
    problem,
)
from buydesk.http.operating import client_document
from buydesk.http.responses import MsgspecResponse, problem_response
from buydesk.money import Currency
from buydesk.observability.reporter import Reporter
from buydesk.observability.reports import Report, StoredReport
from buydesk.orders.documents import outcome_document
from buydesk.orders.model import Outcome, PageAfter, PageBefore, PageFrom, Placed, Refused, Replayed
from buydesk.orders.refusals import RefusalRecorder
from buydesk.prices.documents import record_document
from buydesk.prices.model import FeedStatus
from buydesk.reading import read
from buydesk.services import db_proxy
from tests.builders import at, priced_order, record, settings, without
from tests.lines import Line, line_to_url
from tests.model_anchors import ModelAnchors
from tests.model_keys import ModelKeys
from tests.model_ledger import ModelLedger
from tests.model_registry import ModelRefusals, ModelRegistry
from tests.model_webhooks import ModelWebhooks
from tests.serving import free_port, served

SECONDS = 5.0
SOME_ID = uuid.uuid4()
Call = Callable[[Any], Awaitable[object]]

READS: dict[str, Call] = {
    "page_from": lambda ledger: ledger.page(None, PageFrom(0), 10),
    "page_before": lambda ledger: ledger.page(None, PageBefore(5), 10),
    "page_after": lambda ledger: ledger.page(None, PageAfter(5), 10),
    "order": lambda ledger: ledger.order(SOME_ID, None),
    "order_by_key": lambda ledger: ledger.order_by_key("anonymous", "k"),
    "exposure": lambda ledger: ledger.exposure(None),
    "price_record": lambda ledger: ledger.price_record(SOME_ID),
    "keep_price": lambda ledger: ledger.keep_price(record()),
}
STORE_CALLS: dict[str, Call] = {
    "latest": lambda store: store.latest(),
    "history": lambda store: store.history(5, 10),
    "feed_status": lambda store: store.feed_status(),
}
DESK_CALLS: dict[str, Call] = {
    "reports": lambda desk: desk.reports("db_proxy", None, 5),
    "last_of_each": lambda desk: desk.last_of_each(),
}
WRITES: dict[str, Call] = {
    "publish": lambda store: store.publish(record()),
    "put_feed_status": lambda store: store.put_feed_status(FeedStatus(at(2026, 1, 31, 9, 5), "sandbox", "", ())),
    "report": lambda desk: desk.report(Report("info", "db_proxy", 200, "x"), verified=True),
}


class Answers:
    """A service that answers everything with what it is told."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.respond: Callable[[], Response | Awaitable[Response]] = Response

    def say(self, document: object, status: int = 200, **headers: str) -> None:
        body = document if isinstance(document, bytes) else msgspec.json.encode(document)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.respond = lambda: Response(body, status, named, "application/json")

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.api_route("/{path:path}", methods=["GET", "POST", "PUT"])
        async def anything(path: str, request: Request) -> Response:
            await request.body()
            self.asked.append(path)
            answer = self.respond()
            return answer if isinstance(answer, Response) else await answer

        return app


@pytest.fixture(scope="module")
async def answering() -> AsyncIterator[tuple[Answers, str]]:
    answers = Answers()
    async with served(answers.app()) as url:
        yield answers, url


@contextlib.asynccontextmanager
async def opened(kind: type[Any], url: str, **given: Any) -> AsyncIterator[Any]:
    remote = kind(url, settings(**given))
    try:
        yield remote
    finally:
        await remote.close()


@pytest.fixture
async def told(answering: tuple[Answers, str]) -> AsyncIterator[tuple[Answers, RemoteLedger]]:
    """A ledger at a service that answers as it is told."""
    answers, url = answering
    answers.asked.clear()
    async with opened(RemoteLedger, url, remote_seconds_max=0.3) as ledger:
        yield answers, ledger


async def failure_of(awaitable: Awaitable[object]) -> DeskError:
    with pytest.raises(DeskError) as raised:
        await awaitable
    return raised.value


@pytest.mark.parametrize(
    ("kind", "calls", "unavailable"),
    [
        (RemoteLedger, {**READS, "check": lambda remote: remote.check()}, LedgerUnavailable),
        (
            RemotePriceStore,
            {**STORE_CALLS, "publish": WRITES["publish"], "put_feed_status": WRITES["put_feed_status"]},
            PriceStoreUnavailable,
        ),
        (RemoteReportStore, {**DESK_CALLS, "report": WRITES["report"]}, ReportsUnavailable),
    ],
)
async def test_nobody_at_the_port_is_unavailable(
    kind: type[RemoteService], calls: dict[str, Call], unavailable: type[DeskError]
) -> None:
    async with opened(kind, f"http://127.0.0.1:{free_port()}") as remote:
        for call in calls.values():
            error = await failure_of(call(remote))
            assert type(error) is unavailable
            assert error.retry_after_seconds == 1


async def test_an_order_for_which_no_connection_was_made_is_certainly_not_stored() -> None:
    for url in (f"http://127.0.0.1:{free_port()}", "http://"):
        async with opened(RemoteLedger, url) as ledger:
            assert type(await failure_of(ledger.place([priced_order()], SECONDS))) is LedgerUnavailable


async def test_a_connection_that_is_not_made_in_time_is_certain_too() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, contextlib.ExitStack() as clients:
        port = full.getsockname()[1]
        for _ in range(2):  # nobody accepts: the queue of the kernel is full, and further calls get no answer
            client = clients.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", port))
        async with opened(RemoteLedger, f"http://127.0.0.1:{port}", connect_seconds_max=0.05) as ledger:
            error = await failure_of(ledger.place([priced_order()], SECONDS))
    assert type(error) is LedgerUnavailable
    assert "ConnectionTimeoutError" in error.detail


async def test_a_remote_that_was_never_used_closes() -> None:
    await RemoteLedger("http://127.0.0.1:1", settings()).close()


class Proxy:
    """A db_proxy over the model, behind a line that can be cut."""

    def __init__(self, model: ModelLedger, remote: RemoteLedger, line: Line) -> None:
        self.model = model
        self.remote = remote
        self.line = line


@pytest.fixture
async def proxy() -> AsyncIterator[Proxy]:
    model = ModelLedger()
    app = db_proxy.create_app(
        settings(),
        model,
        model,
        ModelAnchors(),
        Reporter("db_proxy", MemoryReportStore(settings()), settings()),
        keys=ModelKeys(),
        registry=ModelRegistry(),
        refusals=RefusalRecorder(ModelRefusals()),
        webhooks=ModelWebhooks(),
    )
    async with served(app) as url, line_to_url(url) as (through, line), opened(RemoteLedger, through) as remote:
        await remote.check()  # the next request finds a kept connection
        yield Proxy(model, remote, line)


async def test_a_cut_before_or_after_the_batch_leaves_the_outcome_unknown_and_sent_again_it_is_placed_once(
    proxy: Proxy,
) -> None:
    items = [priced_order(100), priced_order(200)]
    proxy.line.fault = "before"
    assert type(await failure_of(proxy.remote.place(items, SECONDS))) is OutcomeUnknown
    assert proxy.model.stored == []
    proxy.line.fault = "after"
    assert type(await failure_of(proxy.remote.place(items, SECONDS))) is OutcomeUnknown
    again = await proxy.remote.place(items, SECONDS)
    assert again == [Replayed(order) for order in proxy.model.stored]
    assert [order.number for order in proxy.model.stored] == [1, 2]


@pytest.mark.parametrize("fault", ["before", "after"])
async def test_a_read_on_a_kept_connection_that_is_cut_is_asked_once_more(proxy: Proxy, fault: Any) -> None:
    [placed] = await proxy.remote.place([priced_order(key="k")], SECONDS)
    assert isinstance(placed, Placed)
    proxy.line.fault = fault
    assert await proxy.remote.order_by_key("anonymous", "k") == placed.order
    proxy.line.fault = fault
    assert await proxy.remote.order(placed.order.id, None) == placed.order
    proxy.line.fault = fault
    assert (await proxy.remote.exposure(None)).orders == 1
    proxy.line.fault, price = fault, record()
    await proxy.remote.keep_price(price)
    assert proxy.model.records[price.id] == price


async def test_a_read_that_is_cut_again_and_again_is_unavailable(proxy: Proxy) -> None:
    proxy.line.cut_all()
    proxy.line.refusing = True
    calls = proxy.line.calls
    assert type(await failure_of(proxy.remote.exposure(None))) is LedgerUnavailable
    assert proxy.line.calls - calls <= 4  # aiohttp's own second try included
    proxy.line.refusing = False
    assert (await proxy.remote.exposure(None)).orders == 0


async def test_an_answer_that_breaks_off_is_a_cut(told: tuple[Answers, RemoteLedger]) -> None:
    answers, ledger = told
    answers.say(b"[", Content_Length="1000")

    class Broken(Response):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1000")]})
            await send({"type": "http.response.body", "body": b"[", "more_body": True})
            raise ConnectionAbortedError

    answers.respond = Broken
    assert type(await failure_of(ledger.place([priced_order()], SECONDS))) is OutcomeUnknown
    assert answers.asked == ["add/"]
    assert type(await failure_of(ledger.exposure(None))) is LedgerUnavailable
    assert answers.asked == ["add/", "exposure", "exposure"]


async def test_no_answer_in_time_is_unknown_for_orders_and_unavailable_for_reads(
    told: tuple[Answers, RemoteLedger],
) -> None:
    answers, ledger = told
    gate = asyncio.Event()

    async def late() -> Response:
        await gate.wait()
        return Response()

    answers.respond = late
    error = await failure_of(ledger.place([priced_order()], 0.05))
    assert type(error) is OutcomeUnknown
    assert "TimeoutError" in error.detail
    assert type(await failure_of(ledger.exposure(None))) is LedgerUnavailable
    assert answers.asked == ["add/", "exposure"]
    gate.set()


NO_ANSWERS: list[tuple[object, int]] = [
    (b"", 200), (b"<html>", 200), (b"\xff", 200), (b"[" * 5000, 200), (b"", 204), (b"", 301), (b"not found", 404),
    (b"Bad Gateway", 502), (b"[]", 503), (b'{"detail":"x"}', 503), (b'"code"', 503), (b"", 500),
]  # fmt: skip


@pytest.mark.parametrize(("body", "status"), NO_ANSWERS)
async def test_an_answer_that_is_no_problem_document_is_no_answer(
    told: tuple[Answers, RemoteLedger], body: object, status: int
) -> None:
    answers, ledger = told
    answers.say(body, status)
    assert type(await failure_of(ledger.place([priced_order()], SECONDS))) is OutcomeUnknown
    for call in READS.values():
        assert type(await failure_of(call(ledger))) is LedgerUnavailable


OTHER_SHAPES: list[object] = [
    None, 5, "x", [], {}, [5], [None], [{}], {"data": 5, "total": 1}, {"data": [{}], "total": 1}, {"data": None},
    {"cap": 1, "used": "1", "orders": 1}, {"cap": "x", "used": "1", "orders": 1}, {"reports": None},
    {"reports": {"ok": True}, "services": []}, {"reports": {"ok": True}, "services": {"x": {}}}, {"data": [5]},
]  # fmt: skip


@pytest.mark.parametrize("document", OTHER_SHAPES, ids=str)
async def test_an_answer_of_another_shape_is_no_answer(answering: tuple[Answers, str], document: object) -> None:
    answers, url = answering
    answers.say(document)
    for kind, calls, unavailable in (
        (RemoteLedger, READS, LedgerUnavailable),
        (RemotePriceStore, STORE_CALLS, PriceStoreUnavailable),
        (RemoteReportStore, DESK_CALLS, ReportsUnavailable),
    ):
        async with opened(kind, url) as remote:
            for name, call in calls.items():
                assert type(await failure_of(call(remote))) is unavailable, name
    async with opened(RemoteLedger, url) as ledger:
        assert type(await failure_of(ledger.place([priced_order()], SECONDS))) is OutcomeUnknown


@pytest.mark.parametrize("answered", [0, 1, 3])
async def test_more_or_fewer_outcomes_than_items_are_no_answer(
    told: tuple[Answers, RemoteLedger], answered: int
) -> None:
    answers, ledger = told
    answers.say([{"outcome": "refused", "problem": {"code": "price_stale", "detail": "x"}}] * answered)
    assert type(await failure_of(ledger.place([priced_order(), priced_order()], SECONDS))) is OutcomeUnknown


@pytest.mark.parametrize(
    "error",
    [
        Overloaded("full", retry_after_seconds=7),
        LedgerUnavailable("away", retry_after_seconds=1),
        WrongMode("live"),
        PriceUnsettled("moved", retry_after_seconds=9, as_of="x", currencies={"EUR": "jumped"}),
        InvalidRequest.of("body", "is not JSON"),
        NotReady("Missing: database.", retry_after_seconds=1, missing=[{"what": "database", "why": "away"}]),
    ],
    ids=lambda error: error.code,
)
async def test_a_problem_comes_back_as_the_error_it_was(told: tuple[Answers, RemoteLedger], error: DeskError) -> None:
    answers, ledger = told
    answers.respond = lambda: problem_response(error, "/x")
    calls: list[Awaitable[object]] = [ledger.exposure(None)]
    if not isinstance(error, InvalidRequest):
        calls.append(ledger.place([priced_order()], SECONDS))
    for call in calls:
        found = await failure_of(call)
        assert type(found) is type(error)
        assert (found.detail, found.retry_after_seconds, found.facts) == (
            error.detail,
            error.retry_after_seconds,
            error.facts,
        )


@pytest.mark.parametrize(
    "error",
    [InvalidRequest.of("deadline", "is missing"), PayloadTooLarge("large"), UnsupportedMediaType("not JSON")],
    ids=lambda error: error.code,
)
async def test_a_batch_that_db_proxy_does_not_understand_is_no_fault_of_a_client_s(
    told: tuple[Answers, RemoteLedger], error: DeskError
) -> None:
    answers, ledger = told
    answers.respond = lambda: problem_response(error, "/x")
    found = await failure_of(ledger.place([priced_order()], SECONDS))
    assert isinstance(found, LedgerUnavailable)
    assert found.detail == f"db_proxy answered {error.code}: {error.detail}"


async def test_an_item_that_db_proxy_does_not_understand_is_no_fault_of_a_client_s(
    told: tuple[Answers, RemoteLedger],
) -> None:
    answers, ledger = told
    refused = outcome_document(Refused(InvalidRequest.of("deadline", "is missing")))
    answers.respond = lambda: MsgspecResponse([refused])
    [outcome] = await ledger.place([priced_order()], SECONDS)
    assert isinstance(outcome, Refused)
    assert isinstance(outcome.problem, LedgerUnavailable)
    assert outcome.problem.detail == "db_proxy answered invalid_request: deadline: is missing"


async def test_problem_that_an_older_db_proxy_does_not_know_is_told_as_it_was_sent(
    told: tuple[Answers, RemoteLedger],
) -> None:
    answers, ledger = told
    moved = PriceMoved("The exchange rate is 2.00 now.", exchange_rate="2.00", bitcoin_amount="0.50000000")
    items = [priced_order(price=moved), priced_order(price=moved), priced_order()]
    found = [Refused(InternalError(moved.detail), by_ledger=by_ledger) for by_ledger in (True, False, True)]
    answers.respond = lambda: MsgspecResponse([outcome_document(each) for each in found])
    own, not_looked_for, faulty = await ledger.place(items, SECONDS)
    assert own == Refused(moved, by_ledger=True)
    for outcome in (not_looked_for, faulty):
        assert isinstance(outcome, Refused)
        assert isinstance(outcome.problem, InternalError)


async def test_what_the_ledger_refuses_as_invalid_is_the_client_s_fault(told: tuple[Answers, RemoteLedger]) -> None:
    answers, ledger = told
    refused = Refused(InvalidRequest.of("currency", "must be one of EUR, USD"), by_ledger=True)
    answers.respond = lambda: MsgspecResponse([outcome_document(refused)])
    [outcome] = await ledger.place([priced_order(price=refused.problem)], SECONDS)
    assert isinstance(outcome, Refused)
    assert isinstance(outcome.problem, InvalidRequest)
    assert (outcome.problem.facts, outcome.by_ledger) == (refused.problem.facts, True)


async def test_reads_leave_connections_to_orders_and_checks_and_one_too_many_is_overloaded(
    answering: tuple[Answers, str],
) -> None:
    answers, url = answering
    answers.asked.clear()
    go = asyncio.Event()

    async def when_told() -> Response:
        if not answers.asked[-1].startswith("order/"):
            return MsgspecResponse([])
        await go.wait()
        return problem_response(OrderNotFound("none"), "/order")

    answers.respond = when_told
    async with opened(RemoteLedger, url, remote_connections_max=5, reads_waiting_max=2) as ledger:
        readers = [asyncio.create_task(ledger.order(SOME_ID, None)) for _ in range(3)]
        while not answers.asked:
            await asyncio.sleep(0.001)
        assert type(await failure_of(ledger.exposure(None))) is Overloaded
        await asyncio.gather(*(ledger.check() for _ in range(50)))
        assert answers.asked == [f"order/{SOME_ID}", "readyz"]
        assert type(await failure_of(ledger.place([priced_order()], SECONDS))) is OutcomeUnknown  # it was asked
        assert answers.asked[2:] == ["add/"]
        go.set()
        found = await asyncio.gather(*readers, return_exceptions=True)
    assert [type(each) for each in found] == [OrderNotFound] * 3


@pytest.mark.parametrize("header", ["soon", "-1", "1.5", "", "Wed, 21 Oct 2026 07:28:00 GMT"])
async def test_a_retry_after_that_is_no_number_of_seconds_is_left_out(
    told: tuple[Answers, RemoteLedger], header: str
) -> None:
    answers, ledger = told
    answers.say(problem(OrderNotFound("none"), "/"), 404, Retry_After=header)
    error = await failure_of(ledger.order(SOME_ID, None))
    assert error.retry_after_seconds is None


@pytest.mark.parametrize("error", [InvalidRequest("no"), PayloadTooLarge("big"), UnsupportedMediaType("no")])
async def test_a_price_that_db_proxy_does_not_understand_is_no_fault_of_a_client_s(
    told: tuple[Answers, RemoteLedger], error: DeskError
) -> None:
    answers, ledger = told
    answers.respond = lambda: problem_response(error, "/price")
    assert type(await failure_of(ledger.keep_price(record()))) is LedgerUnavailable
    answers.respond = lambda: problem_response(PriceUnavailable("not proven", retry_after_seconds=5), "/price")
    assert type(await failure_of(ledger.keep_price(record()))) is PriceUnavailable
    answers.say({"id": str(SOME_ID)})  # that it kept another one proves nothing of this
    assert type(await failure_of(ledger.keep_price(record()))) is LedgerUnavailable


@pytest.mark.parametrize("error", [Unauthorized("token"), NotFound("no path"), MethodNotAllowed("GET", allow="POST")])
async def test_services_that_misunderstand_each_other_do_not_blame_the_client(
    told: tuple[Answers, RemoteLedger], error: DeskError
) -> None:
    answers, ledger = told
    answers.respond = lambda: problem_response(error, "/x")
    for call in (ledger.place([priced_order()], SECONDS), ledger.exposure(None)):
        found = await failure_of(call)
        assert type(found) is LedgerUnavailable
        assert found.detail == f"db_proxy answered {error.code}: {error.detail}"


async def test_a_fault_of_the_other_side_leaves_the_outcome_unknown(told: tuple[Answers, RemoteLedger]) -> None:
    answers, ledger = told
    answers.respond = lambda: problem_response(InternalError("It has been logged."), "/add/")
    assert type(await failure_of(ledger.place([priced_order()], SECONDS))) is OutcomeUnknown
    assert type(await failure_of(ledger.exposure(None))) is InternalError
    answers.say({"code": "a_code_of_the_future", "detail": "?"}, 500)
    assert type(await failure_of(ledger.place([priced_order()], SECONDS))) is OutcomeUnknown


async def test_each_item_s_problem_comes_back_with_its_facts(told: tuple[Answers, RemoteLedger]) -> None:
    answers, ledger = told
    full = ExposureCapExceeded("full", cap="1.00000000", used="1.00000000", available="0.00000000")
    stale = PriceStale("old", retry_after_seconds=5, as_of="then")
    answers.say(
        [
            {"outcome": "refused", "problem": problem(each, "/add/"), "retry_after_seconds": each.retry_after_seconds}
            for each in (full, stale)
        ]
    )
    outcomes: Sequence[Outcome] = await ledger.place([priced_order(), priced_order()], SECONDS)
    for outcome, error in zip(outcomes, (full, stale), strict=True):
        assert isinstance(outcome, Refused)
        found = outcome.problem
        assert type(found) is type(error)
        assert (found.facts, found.retry_after_seconds) == (error.facts, error.retry_after_seconds)


async def test_readiness_is_the_other_side_s_own(told: tuple[Answers, RemoteLedger]) -> None:
    answers, ledger = told
    two = [{"what": "database", "why": "It is away."}, {"what": "clock", "why": "It is off."}]
    for missing, detail in ((two, "It is away. It is off."), ([], "Missing."), (7, "Missing."), ([{}], "Missing.")):
        answers.respond = lambda missing=missing: problem_response(NotReady("Missing.", missing=missing), "/readyz")  # type: ignore[misc]
        error = await failure_of(ledger.check())
        assert (type(error), error.detail) == (LedgerUnavailable, detail)
    answers.say({"status": "ready"})
    await ledger.check()


async def test_the_last_report_of_each_service_that_spoke(answering: tuple[Answers, str]) -> None:
    answers, url = answering
    report = {"level": "info", "service": "db_proxy", "status": 200, "data": "ready"}
    spoke = {"last_report": report | {"verified": True, "arrived_at": "2026-01-31T09:05:00.000000Z"}}
    answers.say({"reports": {"ok": True}, "services": {"db_proxy": spoke, "api_updater": {"last_report": None}}})
    async with opened(RemoteReportStore, url) as desk:
        assert list(await desk.last_of_each()) == [StoredReport(Report(**report), at(2026, 1, 31, 9, 5), verified=True)]  # type: ignore[arg-type]


async def test_putting_and_reporting_need_only_be_taken(answering: tuple[Answers, str]) -> None:
    answers, url = answering
    answers.say(None)
    async with opened(RemotePriceStore, url) as store, opened(RemoteReportStore, url) as desk:
        await WRITES["put_feed_status"](store)
        await WRITES["report"](desk)


async def test_a_record_without_any_price_to_sell_at_comes_with_the_problem(answering: tuple[Answers, str]) -> None:
    answers, url = answering
    doubted = without(record(), unsettled=tuple(Currency))
    error = doubted.unsettled_problem(doubted.unsettled)
    error.facts["record"] = msgspec.to_builtins(record_document(doubted))
    answers.respond = lambda: problem_response(error, "/record")
    async with opened(RemotePriceStore, url) as store:
        assert await store.latest() == doubted


@pytest.mark.parametrize("document", [None, 5, {}, {"id": "7"}], ids=str)
async def test_prices_that_are_unsettled_without_a_record_are_no_answer(
    answering: tuple[Answers, str], document: object
) -> None:
    answers, url = answering
    told: dict[str, Any] = {} if document is None else {"record": document}
    answers.respond = lambda: problem_response(PriceUnsettled("moved", retry_after_seconds=5, **told), "/record")
    async with opened(RemotePriceStore, url) as store:
        error = await failure_of(store.latest())
    assert (type(error), error.retry_after_seconds) == (PriceStoreUnavailable, 1)


async def test_token_that_health_check_does_not_know_makes_it_unavailable_and_nobody_a_stranger(
    answering: tuple[Answers, str],
) -> None:
    answers, url = answering
    answers.respond = lambda: problem_response(Unauthorized("The token is not the one"), "/report")
    async with opened(RemoteReportStore, url) as desk:
        error = await failure_of(WRITES["report"](desk))
    assert type(error) is ReportsUnavailable
    assert "unauthorized" in error.detail


async def test_reports_that_the_desk_has_lost_are_unavailable(answering: tuple[Answers, str]) -> None:
    answers, url = answering
    answers.say({"reports": {"ok": False, "detail": "Redis is away"}, "services": {}})
    async with opened(RemoteReportStore, url) as desk:
        error = await failure_of(desk.last_of_each())
    assert (type(error), error.detail) == (ReportsUnavailable, "Redis is away")


async def test_clients_of_an_older_db_proxy_have_no_markup_of_their_own(answering: tuple[Answers, str]) -> None:
    answers, url = answering
    has_set: dict[str, Any] = dict.fromkeys(("cap_satoshi", "order_satoshi_max", "rate_per_minute"))
    has_set |= {"cap_counts_open": False, "daily_cents_max": {"EUR": 100}}
    told = {"name": "shop", **has_set, "used_satoshi": 1, "orders": 2, "keys": 3}
    async with opened(RemoteRegistry, url) as registry:
        answers.say(told)
        assert client_document(await registry.client("shop"))["markup_bp"] == {}
        answers.say({"data": [told]})
        [client] = await registry.clients("", 10)
        assert (client.orders, client.markup_bp) == (2, {})
    assert read(ClientState, has_set).markup_bp == {}
