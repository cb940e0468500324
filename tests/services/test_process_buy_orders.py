"""process_buy_orders over real TCP: settling, cancelling, open orders, and events as pages and as a stream."""

import asyncio
import contextlib
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx2
import pytest
from msgspec.structs import replace

from buydesk.backends.memory.reports import MemoryReportStore
from buydesk.errors import DeskError, LedgerUnavailable, OutcomeUnknown
from buydesk.observability.reporter import Reporter
from buydesk.orders.life import CLOSED_AT_ONCE_MAX, Closing, Event
from buydesk.orders.model import Order
from buydesk.services import process_buy_orders
from tests.builders import TOKEN, new_order, priced_order, record, settings, shown
from tests.endpoints import delivering
from tests.model_ledger import ModelLedger
from tests.problems import assert_problem
from tests.serving import served

PRICE = record(1000 * 10**8, ttl=3600)


class Ledger(ModelLedger):
    """The model, with faults to order; `sizes` are those of the lists that were closed together."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.faults: list[DeskError | None] = []
        self.looks = 0
        self.asked: Counter[str | None] = Counter()
        self.looked_for: Sequence[str] = ()

    async def check(self) -> None:
        if self.faults and self.faults[0] is not None:
            raise self.faults[0]

    async def close_orders(self, closings: Sequence[Closing]) -> Sequence[Order | DeskError]:
        if self.faults and (fault := self.faults.pop(0)) is not None:
            raise fault
        self.sizes.append(len(closings))
        return await super().close_orders(closings)

    async def events(self, client: str | None, after: int, limit: int) -> Sequence[Event]:
        await self.check()
        self.asked[client] += 1
        return await super().events(client, after, limit)

    async def last_events(self, clients: Sequence[str]) -> Mapping[str | None, int]:
        self.looks += 1
        self.looked_for = clients
        return await super().last_events(clients)


@dataclass
class Desk:
    ledger: Ledger
    client: httpx2.AsyncClient
    url: str

    async def place(self, orders: int = 1) -> list[Order]:
        await self.ledger.place([priced_order(100, price=PRICE) for _ in range(orders)], 1)
        return self.ledger.stored[-orders:]

    async def act(self, order: Order | uuid.UUID, act: str, **body: Any) -> httpx2.Response:
        order_id = order.id if isinstance(order, Order) else order
        return await self.client.post(f"/orders/{order_id}/{act}", json=body)


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    ledger = Ledger()
    reporter = Reporter("process_buy_orders", MemoryReportStore(settings()), settings())
    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with contextlib.AsyncExitStack() as stack:
        webhooks = await stack.enter_async_context(delivering(ledger))
        app = process_buy_orders.create_app(settings(), ledger, ledger.check, reporter, webhooks)
        url = await stack.enter_async_context(served(app))
        client = await stack.enter_async_context(httpx2.AsyncClient(base_url=url, headers=headers, timeout=10))
        yield Desk(ledger, client, url)


def seen(order: Order) -> dict[str, Any]:
    return shown(order) | {"desk_number": order.number, "client": order.client}


async def test_order_is_settled_once_and_the_same_act_has_the_same_bytes(desk: Desk) -> None:
    [order] = await desk.place()
    first = await desk.act(order, "settle", settlement_reference="bank-7")
    assert first.status_code == 200
    document = first.json()
    closed = {"status": "settled", "settlement_reference": "bank-7", "closed_at": document["closed_at"]}
    assert document == seen(order) | closed
    again = await desk.client.post(f"/orders/{order.id}/settle/", json={"settlement_reference": "bank-7"})
    assert (again.status_code, again.content) == (200, first.content)


@pytest.mark.parametrize("body", [{}, {"settlement_reference": None}, None])
async def test_settlement_needs_no_reference(desk: Desk, body: Any) -> None:
    [order] = await desk.place()
    answer = (
        await desk.client.post(f"/orders/{order.id}/settle", json=body)
        if body is not None
        else (await desk.client.post(f"/orders/{order.id}/settle"))
    )
    assert (answer.status_code, answer.json()["settlement_reference"]) == (200, None)


async def test_cancellation_needs_a_reason(desk: Desk) -> None:
    [order] = await desk.place()
    for answer in (await desk.act(order, "cancel"), await desk.act(order, "cancel", reason=None)):
        assert [each["member"] for each in assert_problem(answer, 422, "invalid_request")["errors"]] == ["reason"]
    answer = await desk.act(order, "cancel", reason="the client asked for it")
    assert (answer.status_code, answer.json()["reason"]) == (200, "the client asked for it")
    assert "settlement_reference" not in answer.json()


async def test_another_act_is_a_conflict_with_what_there_is(desk: Desk) -> None:
    [order] = await desk.place()
    await desk.act(order, "settle", settlement_reference="bank-7")
    for answer in (await desk.act(order, "settle"), await desk.act(order, "cancel", reason="why not")):
        problem = assert_problem(answer, 409, "order_state_conflict")
        assert (problem["order_status"], problem["settlement_reference"]) == ("settled", "bank-7")


async def test_order_that_is_not_there_is_not_found(desk: Desk) -> None:
    assert_problem(await desk.act(uuid.uuid4(), "settle"), 404, "order_not_found")


@pytest.mark.parametrize(
    ("path", "body", "members"),
    [
        ("/orders/7/settle", {}, ["id"]),
        ("/orders/7/cancel", {"reason": "", "why": "x"}, ["id", "reason", "why"]),
        (f"/orders/{uuid.UUID(int=1)}/settle", {"settlement_reference": "x" * 129}, ["settlement_reference"]),
        (f"/orders/{uuid.UUID(int=1)}/settle", {"settlement_reference": "a\nb"}, ["settlement_reference"]),
        (f"/orders/{uuid.UUID(int=1)}/settle", {"settlement_reference": 7}, ["settlement_reference"]),
        (f"/orders/{uuid.UUID(int=1)}/cancel", {"reason": "x" * 501}, ["reason"]),
        (f"/orders/{uuid.UUID(int=1)}/cancel", [], ["body"]),
        ("/orders/settle", {}, ["orders"]),
        ("/orders/settle", {"orders": []}, ["orders"]),
        ("/orders/settle", {"orders": [{"id": str(uuid.UUID(int=1))}] * 1001}, ["orders"]),
        ("/orders/settle", {"orders": "all"}, ["orders"]),
        ("/orders/settle", {"orders": [{"id": str(uuid.UUID(int=1))}], "reason": "x"}, ["orders"]),
        ("/orders/cancel", {"orders": [7, {"id": "x", "reason": "y", "why": "z"}]},
         ["orders.0.id", "orders.0.reason", "orders.1.id", "orders.1.why"]),
    ],
)  # fmt: skip
async def test_what_is_wrong_with_an_act_is_named(desk: Desk, path: str, body: Any, members: list[str]) -> None:
    problem = assert_problem(await desk.client.post(path, json=body), 422, "invalid_request")
    assert [each["member"] for each in problem["errors"]] == members
    assert desk.ledger.happened == []


async def test_body_of_another_type_is_refused(desk: Desk) -> None:
    for path in (f"/orders/{uuid.uuid4()}/settle", "/orders/settle"):
        answer = await desk.client.post(path, content=b"{}", headers={"Content-Type": "text/plain"})
        assert_problem(answer, 415, "unsupported_media_type")


async def test_list_is_closed_as_if_one_by_one_so_many_at_a_time(desk: Desk) -> None:
    orders = await desk.place(150)
    ids = [str(order.id) for order in orders]
    await desk.act(orders[3], "cancel", reason="why not")
    desk.ledger.sizes.clear()
    sent = [{"id": each, "settlement_reference": "bank-7"} for each in (*ids, str(uuid.uuid4()))]
    answer = await desk.client.post("/orders/settle", json={"orders": sent})
    assert answer.status_code == 200
    results = answer.json()["data"]
    assert desk.ledger.sizes == [CLOSED_AT_ONCE_MAX, CLOSED_AT_ONCE_MAX, 151 - 2 * CLOSED_AT_ONCE_MAX]
    assert [result["problem"]["code"] for result in results if "problem" in result] == [
        "order_state_conflict",
        "order_not_found",
    ]
    assert results[3]["problem"]["instance"] == f"/orders/{ids[3]}"
    settled = [result["order"] for result in results if "order" in result]
    assert {(order["status"], order["settlement_reference"]) for order in settled} == {("settled", "bank-7")}
    again = await desk.client.post("/orders/settle", json={"orders": sent})
    assert again.content == answer.content
    cancelled = await desk.client.post("/orders/cancel", json={"orders": [{"id": ids[3], "reason": "why not"}]})
    assert cancelled.json()["data"][0]["order"]["reason"] == "why not"


async def test_what_was_closed_before_the_ledger_failed_is_told_and_the_rest_is_not_tried(desk: Desk) -> None:
    orders = await desk.place(200)
    desk.ledger.faults = [None, OutcomeUnknown("lost")]
    sent = {"orders": [{"id": str(order.id)} for order in orders]}
    results = (await desk.client.post("/orders/settle", json=sent)).json()["data"]
    codes = [result["problem"]["code"] if "problem" in result else result["order"]["status"] for result in results]
    assert codes == ["settled"] * 64 + ["outcome_unknown"] * 64 + ["ledger_unavailable"] * 72
    results = (await desk.client.post("/orders/settle", json=sent)).json()["data"]
    assert all(result["order"]["status"] == "settled" for result in results)


async def test_lost_answer_is_told_as_unknown(desk: Desk) -> None:
    [order] = await desk.place()
    desk.ledger.faults = [OutcomeUnknown("lost", retry_after_seconds=1)]
    answer = await desk.act(order, "settle")
    assert_problem(answer, 503, "outcome_unknown")
    assert answer.headers["retry-after"] == "1"
    assert (await desk.act(order, "settle")).status_code == 200


async def test_open_orders_oldest_first(desk: Desk) -> None:
    orders = await desk.place(5)
    await desk.act(orders[1], "settle")
    answer = (await desk.client.get("/orders/?status=accepted&limit=2")).json()
    assert answer == {"data": [seen(orders[0]), seen(orders[2])], "next_after": 3}
    answer = (await desk.client.get(f"/orders?after={answer['next_after']}")).json()
    assert answer == {"data": [seen(orders[3]), seen(orders[4])], "next_after": 5}
    assert (await desk.client.get("/orders/?after=5")).json() == {"data": [], "next_after": 5}


@pytest.mark.parametrize(
    ("path", "member"),
    [
        ("/orders/?status=settled", "status"),
        ("/orders/?limit=0", "limit"),
        ("/orders/?limit=1001", "limit"),
        ("/orders/?after=-1", "after"),
        ("/orders/?start=1", "start"),
        ("/events?after=x", "after"),
        ("/events?limit=1001", "limit"),
        ("/events?wait=21", "wait"),
        ("/events?client=", "client"),
        ("/events?client=O", "client"),
    ],
)
async def test_what_is_wrong_with_a_question_is_named(desk: Desk, path: str, member: str) -> None:
    problem = assert_problem(await desk.client.get(path), 422, "invalid_request")
    assert [each["member"] for each in problem["errors"]] == [member]


async def test_wrong_last_event_id_is_named(desk: Desk) -> None:
    answer = await desk.client.get("/events", headers={"Last-Event-ID": "latest"})
    assert [each["member"] for each in assert_problem(answer, 422, "invalid_request")["errors"]] == ["Last-Event-ID"]


async def test_events_are_told_as_they_happened(desk: Desk) -> None:
    first, second = await desk.place(2)
    settled = (await desk.act(first, "settle", settlement_reference="bank-7")).json()
    cancelled = (await desk.act(second, "cancel", reason="why not")).json()
    page = (await desk.client.get("/events?after=0&limit=100")).json()
    assert page["next_after"] == 4
    assert [(each["id"], each["type"], each["sequence"], each["created_at"]) for each in page["data"]] == [
        (f"{first.id}.placed", "order.placed", 1, settled["created_at"]),
        (f"{second.id}.placed", "order.placed", 2, cancelled["created_at"]),
        (f"{first.id}.settled", "order.settled", 3, settled["closed_at"]),
        (f"{second.id}.cancelled", "order.cancelled", 4, cancelled["closed_at"]),
    ]
    assert [each["order"] for each in page["data"]] == [seen(first), seen(second), settled, cancelled]
    assert (await desk.client.get("/events?after=1&limit=2")).json() == {"data": page["data"][1:3], "next_after": 3}
    assert (await desk.client.get("/events?after=9")).json() == {"data": [], "next_after": 9}
    resumed = await desk.client.get("/events?after=0", headers={"Last-Event-ID": "3"})
    assert resumed.json()["data"] == page["data"][3:]


async def test_event_that_is_waited_for_comes_at_once(desk: Desk) -> None:
    waiting = [asyncio.create_task(desk.client.get("/events?after=0&wait=20")) for _ in range(20)]
    await asyncio.sleep(0.6)
    started = time.monotonic()
    [order] = await desk.place()
    answers = await asyncio.gather(*waiting)
    assert time.monotonic() - started < 2
    assert {answer.json()["data"][0]["order"]["id"] for answer in answers} == {str(order.id)}
    assert desk.ledger.looks < 20  # one look for all of them


async def test_wait_without_an_event_ends(desk: Desk) -> None:
    started = time.monotonic()
    answer = await desk.client.get("/events?wait=1")
    assert answer.json() == {"data": [], "next_after": 0}
    assert 0.9 < time.monotonic() - started < 3


async def test_without_the_ledger_events_are_unavailable(desk: Desk) -> None:
    desk.ledger.faults = [LedgerUnavailable("away", retry_after_seconds=1)]
    assert_problem(await desk.client.get("/events"), 503, "ledger_unavailable")
    missing = assert_problem(await desk.client.get("/readyz"), 503, "not_ready")["missing"]
    assert missing == [{"what": "ledger", "why": "away"}]


async def parts(response: httpx2.Response, count: int) -> list[str]:
    """So many parts of a stream, comments left out."""
    text, found = "", []
    async for each in response.aiter_text():
        text += each
        *whole, text = text.split("\n\n")
        found += [part for part in whole if not part.startswith(":")]
        if len(found) >= count:
            return found
    return found


async def test_events_as_a_stream_go_on_where_it_broke_off(desk: Desk) -> None:
    first, second = await desk.place(2)
    accept = {"Accept": "text/event-stream"}
    async with desk.client.stream("GET", "/events?limit=1", headers=accept) as response:
        assert (response.status_code, response.headers["content-type"]) == (200, "text/event-stream")
        assert "content-length" not in response.headers
        found = await parts(response, 2)
        assert [part.split("\n")[:2] for part in found] == [
            ["id: 1", "event: order.placed"],
            ["id: 2", "event: order.placed"],
        ]
        assert f'data: {{"id":"{first.id}.placed"' in found[0]
    async with desk.client.stream("GET", "/events", headers=accept | {"Last-Event-ID": "2"}) as response:
        await desk.act(second, "settle")
        [part] = await parts(response, 1)
        assert part.startswith("id: 3\nevent: order.settled\ndata: {")


async def test_stream_without_events_says_that_it_is_there(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_buy_orders, "HEARTBEAT_SECONDS", 0.05)
    async with desk.client.stream("GET", "/events", headers={"Accept": "text/event-stream"}) as response:
        async for each in response.aiter_text():
            assert each.startswith(":\n\n")
            break


async def test_stream_ends_when_the_ledger_is_away(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_buy_orders, "HEARTBEAT_SECONDS", 0.05)
    async with desk.client.stream("GET", "/events", headers={"Accept": "text/event-stream"}) as response:
        desk.ledger.faults = [LedgerUnavailable("away")]
        assert await parts(response, 1) == []


async def test_stream_s_head_is_asked_for_alone(desk: Desk) -> None:
    answer = await desk.client.head("/events", headers={"Accept": "text/event-stream"})
    assert (answer.status_code, answer.content) == (200, b"")


async def test_client_that_leaves_is_not_streamed_to_any_more(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_buy_orders, "HEARTBEAT_SECONDS", 0.02)
    async with desk.client.stream("GET", "/events", headers={"Accept": "text/event-stream"}) as response:
        async for _ in response.aiter_raw():
            break
    await asyncio.sleep(0.2)
    asked = dict(desk.ledger.asked)
    await asyncio.sleep(0.2)
    assert desk.ledger.asked == asked


async def test_client_that_reads_slowly_gets_every_event(desk: Desk) -> None:
    orders = await desk.place(1500)
    reader, writer = await asyncio.open_connection("127.0.0.1", httpx2.URL(desk.url).port, limit=1024)
    writer.write(
        f"GET /events?limit=1000 HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n"
        "Accept: text/event-stream\r\n\r\n".encode()
    )
    await asyncio.sleep(0.5)  # longer than it takes to fill what lies between
    told = b""
    while told.count(b"\nid: ") < len(orders):
        told += await reader.read(65536)
    writer.close()
    await writer.wait_closed()
    assert [int(line[4:]) for line in told.split(b"\n") if line.startswith(b"id: ")] == list(range(1, 1501))


async def test_stopping_ends_waits_and_streams_at_once() -> None:
    ledger = Ledger()
    reporter = Reporter("process_buy_orders", MemoryReportStore(settings()), settings())
    stack = contextlib.AsyncExitStack()
    webhooks = await stack.enter_async_context(delivering(ledger))
    app = process_buy_orders.create_app(settings(), ledger, ledger.check, reporter, webhooks)
    headers = {"Authorization": f"Bearer {TOKEN}"}

    async def stream(client: httpx2.AsyncClient) -> bytes:
        async with client.stream("GET", "/events", headers={"Accept": "text/event-stream"}) as response:
            return b"".join([part async for part in response.aiter_bytes()])

    async with stack, httpx2.AsyncClient(headers=headers, timeout=20) as client:
        async with served(app) as url:
            client.base_url = httpx2.URL(url)
            waiting = asyncio.create_task(client.get("/events?wait=20"))
            streaming = asyncio.create_task(stream(client))
            await asyncio.sleep(0.3)
            started = time.monotonic()
        assert time.monotonic() - started < 3
        assert (await waiting).json() == {"data": [], "next_after": 0}
        assert await streaming in (b"", b":\n\n")


@pytest.mark.parametrize("token", [None, "Bearer wrong", TOKEN])
async def test_nobody_without_the_token_acts_or_looks(desk: Desk, token: str | None) -> None:
    headers = {} if token is None else {"Authorization": token}
    async with httpx2.AsyncClient(base_url=desk.url, headers=headers) as stranger:
        assert_problem(await stranger.get("/orders/"), 401, "unauthorized")
        if token is not None:  # otherwise it is anonymous, on an open desk
            assert_problem(await stranger.get("/events"), 401, "unauthorized")
        for act in ("settle", "cancel"):
            for path in (f"/orders/{uuid.uuid4()}/{act}", f"/orders/{act}"):
                assert_problem(await stranger.post(path, json={}), 401, "unauthorized")


async def test_without_a_token_events_are_anonymous_s_own(desk: Desk) -> None:
    await desk.ledger.place([priced_order(order=replace(new_order(100), client="other"), price=PRICE)], 1)
    [order] = await desk.place()
    async with httpx2.AsyncClient(base_url=desk.url) as anybody:
        page = (await anybody.get("/events")).json()
        assert_problem(await anybody.get("/events?client=*"), 403, "insufficient_scope")
    assert [(each["sequence"], each["order"]) for each in page["data"]] == [(1, shown(order))]


async def test_other_methods_and_paths_are_none(desk: Desk) -> None:
    for path in (f"/orders/{uuid.uuid4()}/settle", "/orders/settle"):
        answer = await desk.client.get(path)
        assert_problem(answer, 405, "method_not_allowed")
        assert answer.headers["allow"] == "POST"
    for path in (f"/orders/{uuid.uuid4()}/refund", f"/orders/{uuid.uuid4()}", "/orders/a/b/settle"):
        assert_problem(await desk.client.post(path, json={}), 404, "not_found")


async def test_its_paths_are_documented_with_examples(desk: Desk) -> None:
    paths = (await desk.client.get("/openapi.json")).json()["paths"]
    for path, method in (
        ("/orders/", "get"),
        ("/events", "get"),
        ("/orders/settle", "post"),
        ("/orders/cancel", "post"),
        ("/orders/{order_id}/settle", "post"),
        ("/orders/{order_id}/cancel", "post"),
    ):
        assert {"200", "401", "422", "503"} <= set(paths[path][method]["responses"])
        assert paths[path][method]["responses"]["200"]["content"]["application/json"]["example"]
