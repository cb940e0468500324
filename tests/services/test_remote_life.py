"""What becomes of orders, at db_proxy across real TCP: what its answers, and answers that are lost, are taken for."""

import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx2
import pytest

from buydesk.backends.memory.reports import MemoryReportStore
from buydesk.backends.remote import RemoteLife
from buydesk.errors import DeskError, LedgerUnavailable, OutcomeUnknown, Overloaded
from buydesk.observability.reporter import Reporter
from buydesk.orders.life import CLOSED_AT_ONCE_MAX, Closing
from buydesk.orders.life_documents import CLIENTS_MAX
from buydesk.orders.model import Order
from buydesk.orders.refusals import RefusalRecorder
from buydesk.services import db_proxy
from tests.builders import TOKEN, priced_order, settings
from tests.lines import Fault, Line, line_to_url
from tests.model_anchors import ModelAnchors
from tests.model_keys import ModelKeys
from tests.model_ledger import ModelLedger
from tests.model_registry import ModelRefusals, ModelRegistry
from tests.model_webhooks import ModelWebhooks
from tests.problems import assert_problem
from tests.serving import served


class Ledger(ModelLedger):
    """The model, with faults to order."""

    def __init__(self) -> None:
        super().__init__()
        self.faults: list[DeskError] = []

    async def close_orders(self, closings: Sequence[Closing]) -> Sequence[Order | DeskError]:
        if self.faults:
            raise self.faults.pop(0)
        return await super().close_orders(closings)


@dataclass
class Proxy:
    ledger: Ledger
    life: RemoteLife
    line: Line
    url: str

    async def settle(self) -> Order:
        [settled] = await self.life.close_orders([Closing(self.ledger.stored[0].id, "settled", "bank-7")])
        assert isinstance(settled, Order)
        return settled


@pytest.fixture
async def proxy() -> AsyncIterator[Proxy]:
    ledger = Ledger()
    reporter = Reporter("db_proxy", MemoryReportStore(settings()), settings())
    app = db_proxy.create_app(
        settings(),
        ledger,
        ledger,
        ModelAnchors(),
        reporter,
        keys=ModelKeys(),
        registry=ModelRegistry(),
        refusals=RefusalRecorder(ModelRefusals()),
        webhooks=ModelWebhooks(),
    )
    async with served(app) as url, line_to_url(url) as (through, line):
        await ledger.place([priced_order()], 1)
        life = RemoteLife(through, settings())
        await life.last_events([])  # the next request finds a kept connection
        yield Proxy(ledger, life, line, url)
        await life.close()


@pytest.mark.parametrize("fault", ["before", "after"])
async def test_answer_that_is_lost_is_asked_for_once_more(proxy: Proxy, fault: Fault) -> None:
    proxy.line.fault = fault
    settled = await proxy.settle()
    assert proxy.line.struck.is_set()
    assert (settled.settlement_reference, len(proxy.ledger.happened)) == ("bank-7", 2)


async def test_answer_that_stays_lost_is_unknown(proxy: Proxy) -> None:
    proxy.line.fault = "after"
    proxy.line.refusing = True
    with pytest.raises(OutcomeUnknown):
        await proxy.settle()
    proxy.line.refusing = False
    assert (await proxy.settle()).status == "settled"
    assert len(proxy.ledger.happened) == 2


async def test_what_the_ledger_says_after_a_lost_answer_proves_nothing(proxy: Proxy) -> None:
    proxy.ledger.faults = [OutcomeUnknown("lost"), Overloaded("busy")]
    with pytest.raises(OutcomeUnknown, match="lost"):
        await proxy.settle()


async def test_ledger_that_is_away_did_nothing(proxy: Proxy) -> None:
    proxy.ledger.faults = [LedgerUnavailable("away")]
    with pytest.raises(LedgerUnavailable, match="away"):
        await proxy.settle()


async def test_without_db_proxy_nothing_was_done(proxy: Proxy) -> None:
    nobody = RemoteLife("http://127.0.0.1:1", settings())
    with pytest.raises(LedgerUnavailable):
        await nobody.close_orders([Closing(uuid.uuid4(), "settled", None)])
    await nobody.close()


async def test_nothing_to_close_is_not_asked(proxy: Proxy) -> None:
    proxy.ledger.faults = [LedgerUnavailable("away")]
    assert list(await proxy.life.close_orders([])) == []


async def test_what_db_proxy_finds_wrong_is_the_desk_s_fault(proxy: Proxy) -> None:
    too_many = [Closing(uuid.uuid4(), "settled", None)] * (CLOSED_AT_ONCE_MAX + 1)
    with pytest.raises(LedgerUnavailable, match="db_proxy answered invalid_request: body: "):
        await proxy.life.close_orders(too_many)


@pytest.mark.parametrize(
    ("body", "member"),
    [
        ({}, "body"),
        ([{"order_id": "x", "status": "settled", "text": None}], "0.order_id"),
        ([{"order_id": str(uuid.uuid4()), "status": "accepted", "text": None}], "0.status"),
        ([{"order_id": str(uuid.uuid4()), "status": "settled"}], "0.text"),
        ([{"order_id": str(uuid.uuid4()), "status": "settled", "text": "x" * 129}], "0"),
        ([{"order_id": str(uuid.uuid4()), "status": "settled", "text": "\0"}], "0"),
        ([{"order_id": str(uuid.uuid4()), "status": "cancelled", "text": None}], "0"),
    ],
    ids=range(7),
)
async def test_what_are_no_closings_is_refused_by_name(proxy: Proxy, body: Any, member: str) -> None:
    async with httpx2.AsyncClient(base_url=proxy.url, headers={"Authorization": f"Bearer {TOKEN}"}) as client:
        problem = assert_problem(await client.post("/closings", json=body), 422, "invalid_request")
        assert [each["member"] for each in problem["errors"]] == [member]
        for path in ("/accepted?limit=x", "/events?wait=1", "/events?client=a%20b"):
            assert_problem(await client.get(path), 422, "invalid_request")
        none: list[Any] = ["other", [7], ["c"] * (CLIENTS_MAX + 1), ["a\0b"]]
        bodies: list[Any] = [[], {}, *({"clients": each} for each in none)]
        for wrong in bodies:
            assert_problem(await client.post("/events/last", json=wrong), 422, "invalid_request")


async def test_nobody_without_the_token_closes_or_looks(proxy: Proxy) -> None:
    async with httpx2.AsyncClient(base_url=proxy.url) as stranger:
        assert_problem(await stranger.post("/closings", json=[]), 401, "unauthorized")
        assert_problem(await stranger.post("/events/last", json={"clients": []}), 401, "unauthorized")
        for path in ("/accepted", "/events"):
            assert_problem(await stranger.get(path), 401, "unauthorized")
