"""Request ids over real TCP: on every answer, from service to service, and from an order to what became of it."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI, Response

from buydesk.backends.memory.prices import MemoryPriceStore
from buydesk.backends.memory.reports import MemoryReportStore
from buydesk.backends.remote import RemoteLedger
from buydesk.errors import ExposureCapExceeded, InternalError
from buydesk.http import app as web
from buydesk.http.requests import Request
from buydesk.http.responses import MsgspecResponse
from buydesk.observability import request_ids
from buydesk.observability.reporter import Reporter
from buydesk.orders.model import Outcome, PricedOrder, Refused
from buydesk.orders.refusals import RefusalRecorder
from buydesk.services import create_buy_order, db_proxy
from tests.builders import record, settings
from tests.logged import logged
from tests.model_anchors import ModelAnchors
from tests.model_keys import ModelKeys
from tests.model_ledger import ModelLedger
from tests.model_registry import ModelRefusals, ModelRegistry
from tests.model_webhooks import ModelWebhooks
from tests.serving import served

HEADER = "x-request-id"
EDGE, LEDGER = "buydesk.services.create_buy_order", "buydesk.services.db_proxy"
CALM = settings(report_interval_seconds=3600, resend_pause_seconds=0.01)


def bench() -> FastAPI:
    @asynccontextmanager
    async def lifespan() -> AsyncIterator[None]:
        yield

    async def whose(_: Request) -> Response:
        return MsgspecResponse(request_ids.current())

    async def refused(_: Request) -> Response:
        raise ExposureCapExceeded("Too much.")

    async def broken(_: Request) -> Response:
        raise ZeroDivisionError("an accident")

    app = web.service_app("db_proxy", "A bench.", {}, Reporter("db_proxy", MemoryReportStore(CALM), CALM), lifespan)
    for path, endpoint in (("/whose", whose), ("/refused", refused), ("/broken", broken)):
        app.add_direct_route(path, "GET", endpoint, {"responses": {}})

    @app.get("/typed/whose")
    async def typed_whose() -> str | None:
        return request_ids.current()

    @app.get("/typed/broken")
    async def typed_broken() -> None:
        raise ZeroDivisionError("an accident")

    return app


@pytest.fixture(scope="module")
async def client() -> AsyncIterator[httpx2.AsyncClient]:
    async with served(bench()) as url, httpx2.AsyncClient(base_url=url) as client:
        yield client


PATHS = {"/whose": 200, "/whose//": 200, "/typed/whose": 200, "/refused": 409, "/refused//": 409}
PATHS |= {"/broken": 500, "/typed/broken": 500, "/livez": 200, "/docs": 200, "/nowhere": 404}
PATHS |= {"/docs-files/swagger-ui.css": 200}


@pytest.mark.parametrize("path", PATHS)
async def test_every_answer_has_the_id_that_the_client_gave(client: httpx2.AsyncClient, path: str) -> None:
    answer = await client.get(path, headers={HEADER: "mine-1"})
    assert answer.status_code == PATHS[path]
    assert answer.headers.get_list(HEADER) == ["mine-1"]
    if "whose" in path:
        assert answer.json() == "mine-1"


@pytest.mark.parametrize("path", PATHS)
async def test_every_answer_has_a_fresh_id_when_the_client_gave_none_or_nonsense(
    client: httpx2.AsyncClient, path: str
) -> None:
    seen = set()
    for headers in ({}, {HEADER: "no id"}, {HEADER: "x" * 65}, {HEADER: ""}):
        answer = await client.get(path, headers=headers)
        [request_id] = answer.headers.get_list(HEADER)
        assert request_ids.begin(request_id) == request_id
        seen.add(request_id)
        if "whose" in path:
            assert answer.json() == request_id
    assert len(seen) == 4


@pytest.mark.parametrize("path", ["/whose", "/whose//", "/typed/whose"])
async def test_of_several_ids_the_last_counts_whichever_way_a_request_goes(
    client: httpx2.AsyncClient, path: str
) -> None:
    answer = await client.get(path, headers=[(HEADER, "far"), (HEADER, "near")])
    assert (answer.headers[HEADER], answer.json()) == ("near", "near")


async def test_requests_one_behind_the_other_have_each_its_own_id(client: httpx2.AsyncClient) -> None:
    reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
    for path in (b"/whose", b"/typed/whose"):
        writer.write(
            b"GET %b HTTP/1.1\r\nHost: x\r\nX-Request-Id: mine-1\r\n\r\n" % path
            + b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % path * 2
        )
        ids = []
        for _ in range(3):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            ids.append(head.partition(f"{HEADER}: ")[2].partition("\r\n")[0])
            await reader.readuntil(b'"' + ids[-1].encode() + b'"')
        assert ids[0] == "mine-1"
        assert len(set(ids)) == 3
    writer.close()
    await writer.wait_closed()


@pytest.mark.parametrize("path", ["/broken", "/broken//", "/typed/broken"])
async def test_an_accident_is_logged_under_its_request(client: httpx2.AsyncClient, path: str) -> None:
    with logged(LEDGER) as lines:
        await client.get(path, headers={HEADER: "mine-1"})
    assert [(each["request_id"], each["level"]) for each in lines] == [("mine-1", "ERROR")]


@dataclass(repr=False)
class Ledger(ModelLedger):
    """Notes under which ids it is called, and does as it is told before it places anything."""

    ids: list[str | None] = field(default_factory=list)
    script: list[Any] = field(default_factory=list)

    async def place(self, items: Sequence[PricedOrder], timeout_seconds: float) -> Sequence[Outcome]:
        self.ids.append(request_ids.current())
        step = self.script.pop(0) if self.script else None
        if isinstance(step, asyncio.Event):
            await step.wait()
        elif isinstance(step, Exception):
            raise step
        elif step is not None:
            return [Refused(step(str(item.order.id))) for item in items]
        return await super().place(items, timeout_seconds)

    async def check(self) -> None:
        self.ids.append(request_ids.current())


@dataclass(frozen=True)
class TwoHops:
    """An edge, which asks a db_proxy over TCP, which asks a ledger."""

    edge: httpx2.AsyncClient
    remote: RemoteLedger
    ledger: Ledger

    async def order(self, request_id: str) -> httpx2.Response:
        return await self.edge.post("/place_order/?currency=eur&amount=69", headers={HEADER: request_id})


@pytest.fixture
async def hops() -> AsyncIterator[TwoHops]:
    ledger, store, desk = Ledger(), MemoryPriceStore(CALM), MemoryReportStore(CALM)
    await store.publish(record())
    async with served(
        db_proxy.create_app(
            CALM,
            ledger,
            ledger,
            ModelAnchors(),
            Reporter("db_proxy", desk, CALM),
            keys=ModelKeys(),
            registry=ModelRegistry(),
            refusals=RefusalRecorder(ModelRefusals()),
            webhooks=ModelWebhooks(),
        )
    ) as ledger_url:
        remote = RemoteLedger(ledger_url, CALM)
        edge = create_buy_order.create_app(CALM, remote, store, Reporter("create_buy_order", desk, CALM))
        async with served(edge) as url, httpx2.AsyncClient(base_url=url) as client:
            yield TwoHops(client, remote, ledger)
        await remote.close()


def lines_of(lines: list[dict[str, Any]], logger: str) -> list[dict[str, Any]]:
    return [each for each in lines if each["logger"] == logger]


async def test_the_id_of_a_lone_order_reaches_the_ledger(hops: TwoHops) -> None:
    answer = await hops.order("mine-1")
    assert (answer.status_code, answer.headers[HEADER]) == (201, "mine-1")
    assert hops.ledger.ids == ["mine-1"]


async def test_reads_take_their_id_along(hops: TwoHops) -> None:
    await hops.edge.get("/readyz", headers={HEADER: "mine-1"})
    assert hops.ledger.ids == ["mine-1"]


async def test_calls_that_no_request_asked_for_get_an_id_where_they_arrive(hops: TwoHops) -> None:
    await hops.remote.check()
    [request_id] = hops.ledger.ids
    assert request_id is not None


async def test_an_order_that_met_a_fault_is_found_from_its_request_to_the_ledger(hops: TwoHops) -> None:
    hops.ledger.script = [lambda order_id: InternalError(f"Order {order_id} cannot be stored.")]
    with logged() as lines:
        answer = await hops.order("mine-1")
    assert (answer.status_code, answer.headers[HEADER]) == (500, "mine-1")
    for logger in (EDGE, LEDGER):
        [line] = lines_of(lines, logger)
        assert (line["request_id"], line["batch"]) == ("mine-1", "mine-1")


async def test_orders_of_a_batch_are_found_over_both_hops(hops: TwoHops) -> None:
    """From the request to its order and batch at the edge, from that batch to the next one's at db_proxy."""
    busy = asyncio.Event()
    hops.ledger.script = [busy, ZeroDivisionError("an accident")]
    with logged() as lines:
        first = asyncio.create_task(hops.order("first"))
        async with asyncio.timeout(10):
            while not hops.ledger.ids:
                await asyncio.sleep(0.001)
            others = [asyncio.create_task(hops.order(f"mine-{number}")) for number in range(6)]
            await asyncio.sleep(0.05)  # so that they travel together; what is shown here holds for one alone, too
            busy.set()
            answers = await asyncio.gather(first, *others)
    assert answers[0].status_code == 201
    accident, *_ = lines_of(lines, LEDGER)
    assert accident["level"] == "ERROR"
    at_edge = {name: line for line in lines_of(lines, EDGE) for name in line.get("orders", ())}
    for order_id, edge_batch in accident["orders"].items():
        line = at_edge[order_id]
        assert line["request_id"] == edge_batch
        assert line["orders"][order_id].startswith("mine-")
