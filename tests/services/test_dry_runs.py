"""Dry runs: what would become of an order, by the code that places one, and nothing of it stays."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import httpx2
import msgspec
import pytest

from buydesk.backends.memory.prices import MemoryPriceStore
from buydesk.backends.memory.rates import MemoryRateStore
from buydesk.backends.memory.reports import MemoryReportStore
from buydesk.backends.postgres.ledger import PostgresLedger
from buydesk.clients.cache import KeyCache
from buydesk.clients.rates import RateLimiter
from buydesk.errors import OutcomeUnknown
from buydesk.money import SATOSHI_PER_BTC
from buydesk.observability.reporter import Reporter
from buydesk.orders.model import Exposure, Outcome, PageFrom, PricedOrder
from buydesk.prices.documents import record_document
from buydesk.runtime.wiring import wire
from buydesk.services.create_buy_order import create_app
from buydesk.settings.model import Settings
from buydesk.times import utc_now
from tests.builders import TOKEN, record, settings
from tests.databases import CAP_SATOSHI, Databases
from tests.model_keys import ModelKeys
from tests.model_ledger import ModelAccount, ModelLedger
from tests.problems import assert_problem
from tests.recount import assert_adds_up
from tests.serving import served

PRICE = record(1000 * 10**8, ttl=3600)
STORED_ONLY = {"id", "number"}
THEN = {"created_at", "received_at"}


@dataclass
class Forgetful(ModelLedger):
    """A ledger whose answers are lost while `is_lost`."""

    is_lost: bool = False

    async def place(self, items: Sequence[PricedOrder], timeout_seconds: float) -> Sequence[Outcome]:
        outcomes = await super().place(items, timeout_seconds)
        if self.is_lost:
            raise OutcomeUnknown("lost")
        return outcomes


@dataclass
class Desk:
    ledger: Forgetful
    keys: ModelKeys
    client: httpx2.AsyncClient

    async def post(self, *, dry_run: object = True, key: str | None = None, **members: Any) -> httpx2.Response:
        body = {"currency": "EUR", "amount": "69.00", **members} | ({} if dry_run is ... else {"dry_run": dry_run})
        headers = {} if key is None else {"Idempotency-Key": key}
        return await self.client.post("/place_order/", json=body, headers=headers)


@contextlib.asynccontextmanager
async def desk_of(**given: Any) -> AsyncIterator[Desk]:
    configured = settings(price_ttl_seconds=3600, price_refresh_seconds=0.05, resend_pause_seconds=0.01, **given)
    ledger, keys, store = Forgetful(), ModelKeys(), MemoryPriceStore(configured)
    await store.publish(PRICE)
    app = create_app(configured, ledger, store, Reporter("create_buy_order", MemoryReportStore(configured), configured))
    app.keys, app.rates = KeyCache(keys, configured), RateLimiter(MemoryRateStore(), configured)
    async with served(app) as url, httpx2.AsyncClient(base_url=url) as client:
        yield Desk(ledger, keys, client)
    await app.rates.close()


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    async with desk_of() as desk:
        yield desk


async def test_dry_run_shows_the_order_as_it_would_be_placed_without_an_id_and_a_number(desk: Desk) -> None:
    members = {"reference": "invoice 7", "metadata": {"b": "1", "a": "2"}}
    dry = await desk.post(key="k", **members)
    assert dry.status_code == 200
    assert "location" not in dry.headers
    assert desk.ledger.stored == []
    placed = await desk.post(key="k", dry_run=..., **members)  # which finds the key free
    assert (placed.status_code, "idempotent-replayed" in placed.headers) == (201, False)
    assert dry.json()["data"] == "Order would be placed for EUR:69.00"
    shown, order = dry.json()["order"], placed.json()["order"]
    assert list(shown) == [name for name in order if name not in STORED_ONLY]
    assert {**shown, **{name: order[name] for name in THEN | STORED_ONLY}} == order
    assert shown["created_at"] < order["created_at"]


async def test_stored_key_shows_its_order_with_the_bytes_of_its_201(desk: Desk) -> None:
    placed = await desk.post(key="k", dry_run=False)
    dry = await desk.post(key="k")
    assert (dry.status_code, dry.content, dry.headers["location"]) == (200, placed.content, placed.headers["location"])
    assert dry.headers["idempotent-replayed"] == "true"
    assert_problem(await desk.post(key="k", amount="70.00"), 422, "idempotency_key_reused")
    assert len(desk.ledger.stored) == 1


async def test_dry_run_is_refused_as_the_order_would_be(desk: Desk) -> None:
    desk.ledger.clients["anonymous"] = ModelAccount(cap_satoshi=SATOSHI_PER_BTC, order_satoshi_max=SATOSHI_PER_BTC)
    for members, status, code in (
        ({"amount": "0"}, 422, "invalid_request"),
        ({"amount": "1000.01"}, 409, "order_too_large"),
        ({"amount": "1000.00"}, 200, None),
    ):
        answers = [await desk.post(dry_run=dry_run, **members) for dry_run in (True, True, False)]
        if code is None:
            assert [answer.status_code for answer in answers] == [200, 200, 201]
        else:
            problems = [assert_problem(answer, status, code) for answer in answers]
            assert problems[0] == problems[1] == problems[2]
    assert_problem(await desk.post(amount="0.01"), 409, "client_cap_exceeded")
    desk.ledger.paused = True
    assert_problem(await desk.post(), 503, "paused")


@pytest.mark.parametrize("dry_run", ["true", 1, 0, "", [], {}])
async def test_what_is_neither_true_nor_false_is_refused(desk: Desk, dry_run: object) -> None:
    problem = assert_problem(await desk.post(dry_run=dry_run), 422, "invalid_request")
    assert [each["member"] for each in problem["errors"]] == ["dry_run"]
    assert desk.ledger.stored == []


async def test_null_is_no_dry_run_and_a_query_has_none(desk: Desk) -> None:
    assert (await desk.post(dry_run=None)).status_code == 201
    answer = await desk.client.post("/place_order/?currency=EUR&amount=69&dry_run=true")
    assert_problem(answer, 422, "invalid_request")
    assert len(desk.ledger.stored) == 1


async def test_dry_run_whose_answer_is_lost_is_not_stored_for_certain() -> None:
    async with desk_of(order_seconds_max=0.5) as desk:
        desk.ledger.is_lost = True
        problem = assert_problem(await desk.post(key="k"), 503, "ledger_unavailable")
        assert "order_id" not in problem
        desk.ledger.is_lost = False
        assert (await desk.post(key="k")).status_code == 200
        assert desk.ledger.stored == []


async def test_dry_run_counts_as_an_order_and_beyond_them_shows_what_is_stored() -> None:
    async with desk_of(anonymous_rate=2) as desk:
        placed = await desk.post(key="k", dry_run=False)
        assert (await desk.post()).headers["ratelimit"].startswith('"orders";r=0;')
        assert_problem(await desk.post(), 429, "rate_limited")
        again = await desk.post(key="k")
        assert (again.status_code, again.content) == (200, placed.content)
        assert_problem(await desk.post(key="other"), 429, "rate_limited")


async def test_dry_run_needs_the_scope_of_an_order(desk: Desk) -> None:
    key = desk.keys.add("other", "orders:read")
    body = {"currency": "EUR", "amount": "69.00", "dry_run": True}
    answer = await desk.client.post("/place_order/", json=body, headers={"Authorization": f"Bearer {key.text}"})
    assert_problem(answer, 403, "insufficient_scope")


async def test_client_s_dry_runs_do_not_tell_what_others_have_bought(desk: Desk) -> None:
    key = desk.keys.add("third", "orders:create")
    desk.ledger.now = lambda: utc_now() + timedelta(seconds=5)  # whose moment would tell which of them it judged

    async def ask(**members: object) -> dict[str, Any]:
        body = {"currency": "EUR", "amount": "60000.00", "dry_run": True, **members}
        answer = await desk.client.post("/place_order/", json=body, headers={"Authorization": f"Bearer {key.text}"})
        return {"status": answer.status_code, **answer.json()}

    before = await ask()
    assert (await desk.post(dry_run=False, amount="60000.00")).status_code == 201
    after = await ask()
    own = ("created_at", "received_at")
    for said in (before, after):
        created_at, received_at = (datetime.fromisoformat(said["order"].pop(name)) for name in own)
        assert timedelta(0) <= created_at - received_at < timedelta(seconds=4)
    assert before["status"] == 200
    assert after == before
    assert (await ask(dry_run=False))["code"] == "exposure_cap_exceeded"
    assert len(desk.ledger.stored) == 1


async def test_client_s_dry_runs_are_refused_for_all_else_when_the_desk_is_sold_out(desk: Desk) -> None:
    key = desk.keys.add("third", "orders:create")
    desk.ledger.cap_satoshi = 0
    desk.ledger.clients["third"] = ModelAccount(cap_satoshi=2 * SATOSHI_PER_BTC, order_satoshi_max=3 * SATOSHI_PER_BTC)

    async def ask(**members: object) -> httpx2.Response:
        body = {"currency": "EUR", "amount": "1000.00", "dry_run": True, **members}
        return await desk.client.post("/place_order/", json=body, headers={"Authorization": f"Bearer {key.text}"})

    assert (await ask()).status_code == 200
    assert_problem(await ask(amount="3000.01"), 409, "order_too_large")
    assert_problem(await ask(amount="2000.01"), 409, "client_cap_exceeded")
    assert_problem(await ask(max_exchange_rate="999.99"), 409, "price_moved")
    desk.ledger.paused = True
    assert_problem(await ask(), 503, "paused")


async def test_dry_run_of_anybody_is_told_the_desk_s_room(desk: Desk) -> None:
    desk.ledger.cap_satoshi = SATOSHI_PER_BTC
    problem = assert_problem(await desk.post(amount="1000.01"), 409, "exposure_cap_exceeded")
    assert problem["available"] == "1.00000000"


@contextlib.asynccontextmanager
async def edge_of(given: Settings) -> AsyncIterator[httpx2.AsyncClient]:
    """A whole desk of its own at the database, with the price: a client of its create_buy_order."""
    wired = wire(given)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(wired.close)
        prices = await stack.enter_async_context(served(wired.apps["api_cache_proxy"], settings=given))
        client = await stack.enter_async_context(httpx2.AsyncClient(timeout=20))
        document = msgspec.to_builtins(record_document(PRICE))
        headers = {"Authorization": f"Bearer {TOKEN}"}
        assert (await client.post(f"{prices}/add/?ttl=3600", json=document, headers=headers)).status_code == 200
        await stack.enter_async_context(served(wired.apps["db_proxy"], settings=given))
        url = await stack.enter_async_context(served(wired.apps["create_buy_order"], settings=given))
        yield await stack.enter_async_context(httpx2.AsyncClient(base_url=url, timeout=20))


async def test_dry_runs_among_orders_that_race_for_the_cap_take_nothing_of_it(databases: Databases) -> None:
    dsn = await databases.new()
    given = settings(database_url=dsn, price_ttl_seconds=3600)
    async with edge_of(given) as first, edge_of(given) as second:

        async def send(number: int) -> httpx2.Response:
            body = {"currency": "EUR", "amount": "10000.00", "client_order_id": f"k{number // 3}"}
            # Two dry runs of each order, and then itself, or in between.
            return await (first, second)[number % 2].post(
                "/place_order/", json={**body, "dry_run": number % 3 != number // 3 % 3}
            )

        answers = await asyncio.gather(*map(send, range(90)))
    statuses = [answer.status_code for answer in answers]
    assert statuses.count(201) == 10  # of 10 BTC each
    assert set(statuses) == {200, 201, 409}
    ledger = PostgresLedger(dsn, settings(), livemode=False)
    assert await ledger.exposure(None) == Exposure(CAP_SATOSHI, CAP_SATOSHI, 10)
    orders = (await ledger.page(None, PageFrom(0), 100)).orders
    assert {str(order.id) for order in orders} == {
        answer.json()["order"]["id"] for answer in answers if answer.status_code == 201
    }
    await ledger.close()
    await assert_adds_up(dsn)
