"""What callers with keys see over real TCP: their own orders, numbers, exposure and events, and nothing of others'."""

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import httpx2
import pytest
from msgspec.structs import replace

from buydesk.backends.memory.prices import MemoryPriceStore
from buydesk.backends.memory.reports import MemoryReportStore
from buydesk.clients.cache import KeyCache
from buydesk.clients.model import Caller
from buydesk.clients.scopes import CLIENT_SCOPES
from buydesk.errors import ExposureCapExceeded
from buydesk.http.orders import refusal
from buydesk.observability.reporter import Reporter
from buydesk.orders.life import Closing, Event
from buydesk.orders.model import Order
from buydesk.orders.refusals import RefusalRecorder
from buydesk.services import create_buy_order, db_proxy, fetch_buy_orders, process_buy_orders
from tests.builders import new_order, priced_order, record, settings, shown
from tests.callers import KEYS, key, revoke
from tests.endpoints import delivering
from tests.model_anchors import ModelAnchors
from tests.model_ledger import ModelAccount, ModelLedger
from tests.model_registry import ModelRefusals, ModelRegistry
from tests.model_webhooks import ModelWebhooks
from tests.problems import assert_problem
from tests.serving import served

# One bitcoin costs 1000.00.
PRICE = record(1000 * 10**8, ttl=3600)
SETTINGS = settings(price_ttl_seconds=3600, order_seconds_max=5, key_cache_seconds=0.1)
SOME_ID = uuid.UUID(int=1)
CALLER = Caller("other", CLIENT_SCOPES, "0123456789")


class Ledger(ModelLedger):
    """The model, which counts whose events are asked for."""

    def __init__(self) -> None:
        super().__init__(place_seconds=0.001)
        self.asked: Counter[str | None] = Counter()
        self.looked_for: list[set[str]] = []

    async def events(self, client: str | None, after: int, limit: int) -> Sequence[Event]:
        self.asked[client] += 1
        return await super().events(client, after, limit)

    async def last_events(self, clients: Sequence[str]) -> Any:
        self.looked_for.append(set(clients))
        return await super().last_events(clients)


@dataclass(repr=False)
class Desk:
    ledger: Ledger
    create: httpx2.AsyncClient
    fetch: httpx2.AsyncClient
    process: httpx2.AsyncClient
    proxy: httpx2.AsyncClient

    async def place(self, *clients: str, cents: int = 100) -> list[Order]:
        """An order of each of these clients."""
        items = [priced_order(order=replace(new_order(cents), client=client), price=PRICE) for client in clients]
        await self.ledger.place(items, 1)
        return self.ledger.stored[-len(items) :]

    async def get(self, path: str, caller: str | None) -> httpx2.Response:
        return await self.fetch.get(path, headers={} if caller is None else key(caller))

    async def page(self, path: str, caller: str | None) -> Any:
        answer = await self.get(path, caller)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def events(self, query: str, caller: str | None) -> Any:
        answer = await self.process.get(f"/events{query}", headers={} if caller is None else key(caller))
        assert answer.status_code == 200, answer.text
        return answer.json()


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    ledger, reports, store = Ledger(), MemoryReportStore(SETTINGS), MemoryPriceStore(SETTINGS)
    await store.publish(PRICE)
    stack = AsyncExitStack()
    webhooks = await stack.enter_async_context(delivering(ledger))
    apps = [
        create_buy_order.create_app(SETTINGS, ledger, store, Reporter("create_buy_order", reports, SETTINGS)),
        fetch_buy_orders.create_app(SETTINGS, ledger, Reporter("fetch_buy_orders", reports, SETTINGS), ModelRefusals()),
        process_buy_orders.create_app(
            SETTINGS, ledger, ledger.check, Reporter("process_buy_orders", reports, SETTINGS), webhooks
        ),
        db_proxy.create_app(
            SETTINGS,
            ledger,
            ledger,
            ModelAnchors(),
            Reporter("db_proxy", reports, SETTINGS),
            keys=KEYS,
            registry=ModelRegistry(),
            refusals=RefusalRecorder(ModelRefusals()),
            webhooks=ModelWebhooks(),
        ),
    ]
    async with stack:
        clients = []
        for app in apps:
            app.keys = KeyCache(KEYS, SETTINGS)
            url = await stack.enter_async_context(served(app))
            clients.append(await stack.enter_async_context(httpx2.AsyncClient(base_url=url, timeout=10)))
        yield Desk(ledger, *clients)


def told(order: Order) -> dict[str, Any]:
    """The order as who reads for all sees it."""
    return shown(order) | {"desk_number": order.number, "client": order.client}


def numbers(page: Any) -> list[int]:
    return [order["number"] for order in page["data"]]


async def test_pages_are_a_caller_s_own_and_count_its_own_orders(desk: Desk) -> None:
    orders = await desk.place("other", "anonymous", "other", "third", "other", "anonymous")
    own = [order for order in orders if order.client == "other"]
    page = await desk.page("/get_orders/?page_size=2", "other")
    assert page == {
        "data": [shown(own[2]), shown(own[1])],
        "page": {"start": 0, "page_size": 2, "total": 3},
        "_links": {
            "self": {"href": "/get_orders/?start=0&page_size=2"},
            "next": {"href": "/get_orders/?before=2&page_size=2"},
            "prev": {"href": "/get_orders/?after=3&page_size=2"},
        },
    }
    assert numbers(page) == [3, 2]
    assert "desk_number" not in page["data"][0]
    assert numbers(await desk.page("/get_orders/?before=2", "other")) == [1]
    assert numbers(await desk.page("/get_orders/?after=1", "other")) == [3, 2]
    assert numbers(await desk.page("/get_orders/?start=2", "other")) == [1]
    assert (await desk.page("/get_orders/", None))["page"]["total"] == 2
    assert (await desk.page("/get_orders/", "stranger"))["data"] == []
    listed = await desk.proxy.get("/get/?page_size=2", headers=key("other"))
    assert listed.json() == page["data"]
    assert [order["id"] for order in (await desk.proxy.get("/get/")).json()] == [str(orders[5].id), str(orders[1].id)]


async def test_what_belongs_to_another_is_not_there(desk: Desk) -> None:
    order = replace(new_order(100, "k"), client="other")
    await desk.ledger.place([priced_order(order=order, price=PRICE)], 1)
    [stored] = desk.ledger.stored
    for path in (f"/get_orders/{stored.id}", "/get_orders/?client_order_id=k"):
        assert await desk.page(path, "other") == shown(stored)
        found = []
        for caller in (None, "third"):
            problem = assert_problem(await desk.get(path, caller), 404, "order_not_found")
            found.append(problem["detail"].replace(str(stored.id), "…"))
        nothing = path.replace(str(stored.id), str(SOME_ID)).replace("=k", "=l")
        detail = assert_problem(await desk.get(nothing, "third"), 404, "order_not_found")["detail"]
        assert set(found) == {detail.replace(str(SOME_ID), "…")}  # as for what nobody has
    assert (await desk.page(f"/prices/{stored.price_id}", "third"))["id"] == str(stored.price_id)


async def test_who_may_read_all_asks_for_another_s_or_for_the_desk_s(desk: Desk) -> None:
    first, second, third = await desk.place("other", "third", "other")
    page = await desk.page("/get_orders/?client=other&page_size=1", "reader")
    assert page["data"] == [told(third)]
    assert page["page"]["total"] == 2
    assert page["_links"] == {
        "self": {"href": "/get_orders/?start=0&page_size=1&client=other"},
        "next": {"href": "/get_orders/?before=2&page_size=1&client=other"},
        "prev": {"href": "/get_orders/?after=2&page_size=1&client=other"},
    }
    page = await desk.page("/get_orders/?client=*&page_size=2", "reader")
    assert page["data"] == [told(third), told(second)]
    assert page["page"]["total"] == 3
    assert page["_links"]["next"] == {"href": "/get_orders/?before=2&page_size=2&client=*"}
    assert (await desk.page(page["_links"]["next"]["href"], "reader"))["data"] == [told(first)]
    assert await desk.page(f"/get_orders/{first.id}?client=*", "reader") == told(first)
    assert await desk.page(f"/get_orders/{first.id}?client=other", "reader") == told(first)
    assert_problem(await desk.get(f"/get_orders/{first.id}?client=third", "reader"), 404, "order_not_found")
    assert_problem(await desk.get(f"/get_orders/{first.id}", "reader"), 404, "order_not_found")
    assert (await desk.page("/get_orders/", "reader"))["data"] == []  # its own


async def test_order_of_another_is_found_by_its_key_where_its_client_is_named(desk: Desk) -> None:
    order = replace(new_order(100, "k"), client="other")
    await desk.ledger.place([priced_order(order=order, price=PRICE)], 1)
    path = "/get_orders/?client_order_id=k"
    assert await desk.page(f"{path}&client=other", "reader") == told(desk.ledger.stored[0])
    assert_problem(await desk.get(path, "reader"), 404, "order_not_found")
    problem = assert_problem(await desk.get(f"{path}&client=*", "reader"), 422, "invalid_request")
    assert [each["member"] for each in problem["errors"]] == ["client"]


async def test_client_that_is_not_there_has_nothing(desk: Desk) -> None:
    await desk.place("other")
    page = await desk.page("/get_orders/?client=nobody", "reader")
    assert (page["data"], page["page"]["total"]) == ([], 0)
    nothing = {"cap": None, "used": "0.00000000", "available": None, "orders": 0}
    assert await desk.page("/exposure?client=nobody", "reader") == nothing
    assert (await desk.events("?client=nobody", "reader"))["data"] == []


@pytest.mark.parametrize("name", ["", "Other", "a b", "-a", "%2A%2A", "x" * 33, "%D0%B0", "other%0A"])
async def test_what_is_no_client_s_name_is_named(desk: Desk, name: str) -> None:
    answers = [await desk.get(f"{path}?client={name}", "reader") for path in ("/get_orders/", "/exposure")]
    answers.append(await desk.get(f"/get_orders/{SOME_ID}?client={name}", "reader"))
    answers.append(await desk.process.get(f"/events?client={name}", headers=key("reader")))
    for answer in answers:
        problem = assert_problem(answer, 422, "invalid_request")
        assert [each["member"] for each in problem["errors"]] == ["client"]


@pytest.mark.parametrize("caller", [None, "other"])
@pytest.mark.parametrize("client", ["*", "other", "third"])
async def test_nobody_else_asks_for_any_client_itself_included(desk: Desk, caller: str | None, client: str) -> None:
    await desk.place("other", "third")
    paths = ("/get_orders/?", f"/get_orders/{SOME_ID}?", "/get_orders/?client_order_id=k&", "/exposure?")
    answers = [await desk.get(f"{path}client={client}", caller) for path in paths]
    headers = {} if caller is None else key(caller)
    answers.append(await desk.process.get(f"/events?client={client}", headers=headers))
    for answer in answers:
        assert assert_problem(answer, 403, "insufficient_scope")["scope"] == "orders:read_all"
        assert answer.headers["www-authenticate"] == 'Bearer error="insufficient_scope", scope="orders:read_all"'


async def test_exposure_is_the_caller_s_own_and_for_anybody_the_desk_s(desk: Desk) -> None:
    await desk.place("other", "anonymous", "other", cents=100_000)
    desk.ledger.clients["other"] = ModelAccount(cap_satoshi=3 * 10**8)
    whole = {"cap": "100.00000000", "used": "3.00000000", "available": "97.00000000", "orders": 3}
    own = {"cap": "3.00000000", "used": "2.00000000", "available": "1.00000000", "orders": 2}
    assert await desk.page("/exposure", None) == whole
    assert await desk.page("/exposure", "other") == own
    one = {"cap": None, "used": "1.00000000", "available": None, "orders": 1}
    assert await desk.page("/exposure", "anonymous") == one  # with a key it is a client like others
    assert await desk.page("/exposure", "third") == one | {"used": "0.00000000", "orders": 0}
    assert await desk.page("/exposure?client=other", "reader") == own
    assert await desk.page("/exposure?client=*", "reader") == whole


async def test_answers_are_kept_for_nobody_else(desk: Desk) -> None:
    [order] = await desk.place("other")
    paths = ["/get_orders/", f"/get_orders/{order.id}", "/get_orders/?client_order_id=k", "/exposure"]
    paths += [f"/get_orders/{SOME_ID}", "/get_orders/?start=x", "/get_orders/?client=*", f"/prices/{order.price_id}"]
    for caller in (None, "other", "placer", "wrong"):
        answers = [await desk.get(path, caller) for path in paths]
        answers.append(await desk.proxy.get("/get/", headers={} if caller is None else key(caller)))
        answers.append(await desk.process.get("/events", headers={} if caller is None else key(caller)))
        for answer in answers:
            assert answer.headers.get_list("vary") == ["Authorization"], answer.url
            [kept] = answer.headers.get_list("cache-control")
            assert kept.startswith("private"), answer.url


async def test_page_of_another_with_the_same_bytes_has_another_etag(desk: Desk) -> None:
    pages = [await desk.get("/get_orders/?before=1", caller) for caller in (None, "other", "third")]
    assert len({page.content for page in pages}) == 1
    assert len({page.headers["etag"] for page in pages}) == 3
    headers = key("other") | {"If-None-Match": pages[2].headers["etag"]}
    assert (await desk.fetch.get("/get_orders/?before=1", headers=headers)).status_code == 200
    headers = key("other") | {"If-None-Match": pages[1].headers["etag"]}
    assert (await desk.fetch.get("/get_orders/?before=1", headers=headers)).status_code == 304


async def test_following_pages_while_others_and_oneself_buy_shows_each_own_order_once(desk: Desk) -> None:
    await desk.place(*["other", "third", "anonymous"] * 9)
    seen: list[int] = []
    at: str | None = "/get_orders/?page_size=2"
    while at is not None:
        page = await desk.page(at, "other")
        seen += numbers(page)
        await desk.place("third", "other", "third")
        at = page["_links"].get("next", {}).get("href")
    assert seen == list(range(9, 0, -1))


async def test_events_are_the_caller_s_own_in_a_dense_sequence(desk: Desk) -> None:
    first, _, third = await desk.place("other", "third", "other")
    await desk.ledger.close_orders([Closing(first.id, "settled", "bank-7")])
    [fourth] = await desk.place("other")
    page = await desk.events("?after=0", "other")
    assert page["next_after"] == 4
    assert [(each["sequence"], each["id"]) for each in page["data"]] == [
        (1, f"{first.id}.placed"),
        (2, f"{third.id}.placed"),
        (3, f"{first.id}.settled"),
        (4, f"{fourth.id}.placed"),
    ]
    settled = shown(desk.ledger.now_of(first))
    assert [each["order"] for each in page["data"]] == [shown(first), shown(third), settled, shown(fourth)]
    assert await desk.events("?after=2&limit=1", "other") == {"data": page["data"][2:3], "next_after": 3}
    assert len((await desk.events("", "third"))["data"]) == 1
    assert (await desk.events("", None))["data"] == []  # on an open desk: anonymous has none


async def test_who_may_read_all_follows_another_s_events_or_the_desk_s(desk: Desk) -> None:
    first, second = await desk.place("third", "other")
    page = await desk.events("?client=other", "reader")
    assert [(each["sequence"], each["order"]) for each in page["data"]] == [(1, told(second))]
    whole = await desk.events("?client=*", "reader")
    assert [(each["sequence"], each["order"]) for each in whole["data"]] == [(1, told(first)), (2, told(second))]
    assert (await desk.events("", "reader"))["data"] == []  # its own
    # The desk's own service is no client: without one it follows the desk.
    assert await desk.events("", "processor") == whole
    assert await desk.events("?client=other", "processor") == page


async def test_own_events_come_as_a_stream(desk: Desk) -> None:
    await desk.place("third", "other", "third", "other")
    headers = key("other") | {"Accept": "text/event-stream", "Last-Event-ID": "1"}
    async with desk.process.stream("GET", "/events", headers=headers) as response:
        assert response.headers["vary"] == "Authorization"
        async for text in response.aiter_text():
            assert text.startswith("id: 2\nevent: order.placed\ndata: {")
            assert '"number":2' in text
            assert "desk_number" not in text
            break


async def test_only_those_whose_own_events_came_are_woken_by_one_look(desk: Desk) -> None:
    waiting = {
        caller: asyncio.create_task(desk.events("?wait=2" if caller == "third" else "?wait=20", caller))
        for caller in ("other", "third", "processor")
    }
    await asyncio.sleep(0.6)
    assert desk.ledger.looked_for[-1] == {"other", "third"}
    started = time.monotonic()
    looks = len(desk.ledger.looked_for)
    await desk.place("other")
    assert len((await waiting["other"])["data"]) == len((await waiting["processor"])["data"]) == 1
    assert time.monotonic() - started < 1.5
    assert len(desk.ledger.looked_for) - looks < 5
    assert (await waiting["third"])["data"] == []
    assert desk.ledger.asked == {"other": 2, None: 2, "third": 1}
    further = asyncio.create_task(desk.events("?after=1&wait=1", "other"))
    await further
    assert desk.ledger.looked_for[-1] == {"other"}  # nobody else waits any more


async def test_key_that_is_revoked_gets_no_event_that_it_waited_for(desk: Desk) -> None:
    shown = key("leaver")
    waiting = asyncio.create_task(desk.process.get("/events?wait=20", headers=shown))
    async with desk.process.stream("GET", "/events", headers=shown | {"Accept": "text/event-stream"}) as stream:
        await asyncio.sleep(0.3)
        revoke("leaver")
        await desk.place("leaver")
        assert [part async for part in stream.aiter_bytes()] == []
    assert_problem(await waiting, 401, "unauthorized")


async def test_scope_that_is_missing_is_named(desk: Desk) -> None:
    for answer, scope in (
        (await desk.get("/get_orders/", "placer"), "orders:read"),
        (await desk.process.get("/events", headers=key("placer")), "events:read"),
        (await desk.process.get("/orders/", headers=key("other")), "orders:process"),
        (await desk.proxy.get("/get/", headers=key("placer")), "orders:read"),
    ):
        assert assert_problem(answer, 403, "insufficient_scope")["scope"] == scope


async def test_desk_s_room_is_told_to_anybody_and_to_no_client(desk: Desk) -> None:
    await desk.place("other", cents=9_999_900)
    path = "/place_order/?currency=eur&amount=100"
    problem = assert_problem(await desk.create.post(path), 409, "exposure_cap_exceeded")
    assert (problem["cap"], problem["used"], problem["available"]) == ("100.00000000", "99.99900000", "0.00100000")
    for caller in ("third", "anonymous"):
        problem = assert_problem(await desk.create.post(path, headers=key(caller)), 409, "exposure_cap_exceeded")
        assert not {"cap", "used", "available"} & problem.keys()
        assert not any(digit in problem["detail"] for digit in "0123456789")


async def test_client_s_own_limits_are_told_with_its_own_numbers(desk: Desk) -> None:
    desk.ledger.clients["other"] = ModelAccount(cap_satoshi=3 * 10**8, order_satoshi_max=2 * 10**8)
    await desk.place("other", "third", cents=200_000)
    post = desk.create.post
    answer = await post("/place_order/?currency=eur&amount=1001", headers=key("other"))
    problem = assert_problem(answer, 409, "client_cap_exceeded")
    assert (problem["cap"], problem["used"], problem["available"]) == ("3.00000000", "2.00000000", "1.00000000")
    answer = await post("/place_order/?currency=eur&amount=2001", headers=key("other"))
    assert assert_problem(answer, 409, "order_too_large")["bitcoin_amount_max"] == "2.00000000"


async def test_same_key_of_two_clients_is_two_orders(desk: Desk) -> None:
    async def post(caller: str, amount: int) -> httpx2.Response:
        headers = key(caller) | {"Idempotency-Key": "k"}
        return await desk.create.post(f"/place_order/?currency=eur&amount={amount}", headers=headers)

    answers = [await post("other", 1), await post("third", 2), await post("other", 1), await post("third", 2)]
    assert [answer.status_code for answer in answers] == [201] * 4
    assert [answer.json()["order"]["number"] for answer in answers] == [1] * 4
    assert [answer.headers.get("idempotent-replayed") for answer in answers] == [None, None, "true", "true"]
    assert (answers[2].content, answers[3].content) == (answers[0].content, answers[1].content)
    problem = assert_problem(await post("other", 2), 422, "idempotency_key_reused")
    assert problem.keys() == {"type", "title", "status", "detail", "instance", "code"}


def test_other_refusals_are_told_as_they_are() -> None:
    problem = ExposureCapExceeded("Only 1 BTC can still be sold.", cap="2", used="1", available="1")
    assert refusal(problem, CALLER).facts == {}
    assert refusal(problem.__class__.by_code["price_stale"]("old", as_of="then"), CALLER).facts == {"as_of": "then"}
