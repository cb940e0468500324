"""fetch_buy_orders over real TCP: pages, links, look-ups, and what readers see while orders arrive."""

import asyncio
import re
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx2
import msgspec
import pytest

from buydesk.backends.memory.reports import MemoryReportStore
from buydesk.backends.postgres.ledger import PostgresLedger
from buydesk.errors import LedgerUnavailable, Overloaded
from buydesk.observability.reporter import Reporter
from buydesk.orders.life import Closing
from buydesk.orders.model import Anchor, Exposure, Order, Page
from buydesk.prices.documents import record_document, record_from
from buydesk.prices.model import PriceRecord
from buydesk.services.fetch_buy_orders import create_app
from tests.builders import priced_order, record, settings, shown
from tests.databases import Databases, fill
from tests.model_ledger import ModelLedger
from tests.model_registry import ModelRefusals
from tests.problems import assert_problem
from tests.serving import served

N_MAX = 2**63 - 1
STORED = 25
# In the names of tests, which are the same in each process that runs some.
AN_ID = uuid.UUID(int=1)


class Ledger(ModelLedger):
    """The model, with a fault to order."""

    fault: Exception | None = None

    def _fail(self) -> None:
        if self.fault is not None:
            raise self.fault

    async def page(self, client: str | None, anchor: Anchor, page_size: int) -> Page:
        self._fail()
        return await super().page(client, anchor, page_size)

    async def order(self, order_id: uuid.UUID, client: str | None) -> Order:
        self._fail()
        return await super().order(order_id, client)

    async def order_by_key(self, client: str, client_order_id: str) -> Order:
        self._fail()
        return await super().order_by_key(client, client_order_id)

    async def price_record(self, price_id: uuid.UUID) -> PriceRecord:
        self._fail()
        return await super().price_record(price_id)

    async def exposure(self, client: str | None) -> Exposure:
        self._fail()
        return await super().exposure(client)

    async def check(self) -> None:
        self._fail()


@dataclass
class Reading:
    ledger: Ledger
    client: httpx2.AsyncClient

    async def page(self, query: str = "") -> dict[str, Any]:
        answer = await self.client.get(f"/get_orders/{query}")
        assert answer.status_code == 200, answer.text
        document: dict[str, Any] = answer.json()
        assert list(document) == ["data", "page", "_links"]
        return document

    async def add(self, orders: int) -> None:
        first = len(self.ledger.stored) + 1
        items = [priced_order(100 + number, f"key-{number}") for number in range(first, first + orders)]
        await self.ledger.place(items, 1)


@pytest.fixture(scope="module")
async def service() -> AsyncIterator[Reading]:
    """One service for all tests of this file; each gets it with an empty ledger."""
    ledger = Ledger()
    reporter = Reporter("fetch_buy_orders", MemoryReportStore(settings()), settings())
    app = create_app(settings(), ledger, reporter, ModelRefusals())
    async with served(app) as url, httpx2.AsyncClient(base_url=url) as client:
        yield Reading(ledger, client)


@pytest.fixture
async def empty(service: Reading) -> Reading:
    service.ledger.stored, service.ledger.closed = [], {}
    service.ledger.fault = None
    return service


@pytest.fixture
async def desk(empty: Reading) -> Reading:
    await empty.add(STORED)
    return empty


def numbers(document: dict[str, Any]) -> list[int]:
    return [order["number"] for order in document["data"]]


def links(document: dict[str, Any]) -> dict[str, str]:
    found = document["_links"]
    assert all(list(link) == ["href"] for link in found.values())
    return {relation: link["href"] for relation, link in found.items()}


async def test_the_brief_s_call(desk: Reading) -> None:
    answer = await desk.client.get("/get_orders/?start=0&page_size=3")
    assert answer.headers["content-type"] == "application/json"
    document = answer.json()
    assert numbers(document) == [25, 24, 23]
    assert document["data"][0] == shown(desk.ledger.stored[-1])
    assert document["page"] == {"start": 0, "page_size": 3, "total": 25}
    assert links(document) == {
        "self": "/get_orders/?start=0&page_size=3",
        "next": "/get_orders/?before=23&page_size=3",
        "prev": "/get_orders/?after=25&page_size=3",
    }
    assert answer.headers["link"] == (
        '</get_orders/?before=23&page_size=3>; rel="next", </get_orders/?after=25&page_size=3>; rel="prev"'
    )


async def test_without_parameters_the_ten_newest_come(desk: Reading) -> None:
    for path in ("/get_orders", "/get_orders/", "/get_orders?"):
        answer = await desk.client.get(path)
        assert (answer.status_code, numbers(answer.json())) == (200, list(range(25, 15, -1)))
        assert answer.json()["page"] == {"start": 0, "page_size": 10, "total": 25}


@pytest.mark.parametrize(
    ("query", "shown"),
    [
        ("?start=1", range(24, 14, -1)),
        ("?start=20&page_size=10", range(5, 0, -1)),
        ("?start=24", [1]),
        ("?start=25", []),
        (f"?start={N_MAX}", []),
        ("?page_size=1000", range(25, 0, -1)),
        ("?page_size=1", [25]),
        ("?before=11&page_size=3", [10, 9, 8]),
        (f"?before={N_MAX}&page_size=2", [25, 24]),
        ("?before=3", [2, 1]),
        ("?before=1", []),
        ("?before=0", []),
        ("?after=0&page_size=3", [3, 2, 1]),
        ("?after=11&page_size=3", [14, 13, 12]),
        ("?after=23&page_size=3", [25, 24]),
        ("?after=25", []),
        (f"?after={N_MAX}", []),
    ],
)
async def test_pages_by_every_anchor_are_newest_first(desk: Reading, query: str, shown: Any) -> None:
    document = await desk.page(query)
    assert numbers(document) == list(shown)
    anchor = re.split("[?=]", query)[1]
    has_start = anchor in ("start", "page_size")
    assert set(document["page"]) == ({"start", "page_size", "total"} if has_start else {"page_size"})
    found = links(document)
    assert list(found) == [each for each in ("self", "next", "prev") if each in found]
    if document["data"]:
        assert ("next" in found) == (numbers(document)[-1] > 1)
        assert found["prev"].startswith(f"/get_orders/?after={numbers(document)[0]}&")


@pytest.mark.parametrize("query", ["?start=0", "?start=7", "?before=5", "?before=1", "?before=0", "?after=0"])
async def test_an_empty_ledger_has_empty_pages_that_lead_to_the_first_order(empty: Reading, query: str) -> None:
    document = await empty.page(query)
    assert document["data"] == []
    assert "next" not in links(document)
    await empty.add(3)
    assert numbers(await empty.page(links(document)["prev"].removeprefix("/get_orders/"))) == [3, 2, 1]


async def test_past_the_end_prev_leads_back(desk: Reading) -> None:
    found = links(await desk.page("?start=25&page_size=4"))
    assert found == {"self": "/get_orders/?start=25&page_size=4", "prev": "/get_orders/?after=0&page_size=4"}
    assert links(await desk.page("?before=1&page_size=4"))["prev"] == "/get_orders/?after=0&page_size=4"


async def test_the_prev_of_an_empty_after_page_repeats_itself_until_orders_come(desk: Reading) -> None:
    document = await desk.page("?after=25&page_size=2")
    assert (document["data"], document["page"]) == ([], {"page_size": 2})
    assert links(document) == {
        "self": "/get_orders/?after=25&page_size=2",
        "next": "/get_orders/?before=26&page_size=2",
        "prev": "/get_orders/?after=25&page_size=2",
    }
    assert numbers(await desk.page("?before=26&page_size=2")) == [25, 24]
    await desk.add(3)
    document = await desk.page("?after=25&page_size=2")
    assert numbers(document) == [27, 26]
    assert links(document)["prev"] == "/get_orders/?after=27&page_size=2"
    far = links(await desk.page(f"?after={N_MAX}"))
    assert numbers(await desk.page(far["next"].removeprefix("/get_orders/"))) == list(range(28, 18, -1))


async def test_next_is_absent_when_number_one_is_on_the_page(desk: Reading) -> None:
    for query in ("?start=24", "?before=2", "?before=11", "?after=0&page_size=1", "?after=0"):
        assert "next" not in links(await desk.page(query)), query
    answer = await desk.client.get("/get_orders/?before=2")
    assert answer.headers["link"] == '</get_orders/?after=1&page_size=10>; rel="prev"'


async def test_following_next_while_orders_arrive_shows_each_order_once(desk: Reading) -> None:
    seen: list[int] = []
    at: str | None = "?page_size=4"
    while at is not None:
        document = await desk.page(at)
        seen += numbers(document)
        await desk.add(3)
        following = links(document).get("next")
        at = following and following.removeprefix("/get_orders/")
    assert seen == list(range(25, 0, -1))


async def test_following_prev_shows_each_new_order_once(desk: Reading) -> None:
    at = links(await desk.page("?page_size=4"))["prev"]
    seen: list[int] = []
    for _ in range(12):
        await desk.add(3)
        document = await desk.page(at.removeprefix("/get_orders/"))
        seen += reversed(numbers(document))
        at = links(document)["prev"]
    assert seen == list(range(26, 26 + 36))


@pytest.mark.parametrize("name", ["start", "before", "after"])
@pytest.mark.parametrize(
    "value", ["-1", "x", "1" + "0" * 30, "1.0", "", "+1", " 1", "1e3", "0x1", str(2**63), "\u0661", "1" * 5000, "NaN"]
)
async def test_bad_anchors_are_named(desk: Reading, name: str, value: str) -> None:
    document = assert_problem(await desk.client.get("/get_orders/", params={name: value}), 422, "invalid_request")
    assert document["errors"] == [{"member": name, "reason": f"must be a whole number from 0 to {N_MAX}"}]


@pytest.mark.parametrize("value", ["0", "1001", "-1", "x", "1.0", "", "1" + "0" * 30])
async def test_bad_page_sizes_are_named(desk: Reading, value: str) -> None:
    document = assert_problem(
        await desk.client.get("/get_orders/", params={"page_size": value}), 422, "invalid_request"
    )
    assert document["errors"] == [{"member": "page_size", "reason": "must be a whole number from 1 to 1000"}]


@pytest.mark.parametrize(
    ("query", "members"),
    [
        ("?start=0&start=0", ["start"]),
        ("?page_size=1&page_size=2", ["page_size"]),
        ("?limit=3", ["limit"]),
        ("?Start=3", ["Start"]),
        ("?start=0&before=5", ["start", "before"]),
        ("?after=1&start=0", ["start", "after"]),
        ("?before=5&after=1", ["before", "after"]),
        ("?start=0&before=5&after=1", ["start", "before", "after"]),
        ("?start=x&page_size=0", ["page_size", "start"]),
        ("?client_order_id=k&start=0", ["start"]),
        ("?client_order_id=k&page_size=1&after=1", ["page_size", "after"]),
        ("?client_order_id=k&client_order_id=k", ["client_order_id"]),
        ("?client_order_id=", ["client_order_id"]),
        ("?client_order_id=a+b", ["client_order_id"]),
        ("?client_order_id=a%00", ["client_order_id"]),
        ("?client_order_id=%C3%A9", ["client_order_id"]),
        (f"?client_order_id={'k' * 256}", ["client_order_id"]),
    ],
    ids=lambda value: value[:45] if isinstance(value, str) else "",
)
async def test_bad_queries_are_named(desk: Reading, query: str, members: list[str]) -> None:
    document = assert_problem(await desk.client.get(f"/get_orders/{query}"), 422, "invalid_request")
    assert [each["member"] for each in document["errors"]] == members


@pytest.mark.parametrize("query", ["", "?start=25", "?after=3&page_size=3", "?before=11&page_size=3", "?before=1"])
async def test_page_that_a_client_has_is_sent_again_only_when_it_has_changed(desk: Reading, query: str) -> None:
    path = f"/get_orders/{query}"
    first = await desk.client.get(path)
    assert (first.headers["cache-control"], first.headers["vary"]) == ("private, no-cache", "Authorization")
    etag = first.headers["etag"]
    assert re.fullmatch(r'"[0-9a-f]{24}"', etag)
    for tags in (etag, f"W/{etag}", f'"other", {etag}', "*"):
        unchanged = await desk.client.get(path, headers={"If-None-Match": tags})
        assert (unchanged.status_code, unchanged.content) == (304, b"")
        assert "content-length" not in unchanged.headers
        for name in ("etag", "cache-control", "vary", "link"):
            assert unchanged.headers[name] == first.headers[name]
    two = [("If-None-Match", '"other"'), ("If-None-Match", etag)]
    assert (await desk.client.get(path, headers=two)).status_code == 304
    other = await desk.client.get(path, headers={"If-None-Match": '"other"'})
    assert (other.status_code, other.content) == (200, first.content)


async def test_full_page_next_to_its_anchor_has_the_same_orders_for_ever_and_shows_what_became_of_them(
    desk: Reading,
) -> None:
    path = "/get_orders/?before=11&page_size=3"
    first = await desk.client.get(path)
    await desk.add(5)
    if_changed = {"If-None-Match": first.headers["etag"]}
    assert (await desk.client.get(path, headers=if_changed)).status_code == 304
    order = desk.ledger.stored[8]
    await desk.ledger.close_orders([Closing(order.id, "settled", "bank-7")])
    changed = await desk.client.get(path, headers=if_changed)
    assert changed.status_code == 200
    assert numbers(changed.json()) == [10, 9, 8]
    [settled] = [each for each in changed.json()["data"] if each["number"] == 9]
    assert settled == shown(order) | {
        "status": "settled",
        "settlement_reference": "bank-7",
        "closed_at": settled["closed_at"],
    }
    assert (await desk.client.get(f"/get_orders/{order.id}")).json() == settled


async def test_an_order_by_its_id(desk: Reading) -> None:
    order = desk.ledger.stored[3]
    for path in (f"/get_orders/{order.id}", f"/get_orders/{order.id}/", f"/get_orders/{str(order.id).upper()}"):
        answer = await desk.client.get(path)
        assert (answer.status_code, answer.json()) == (200, shown(order))
    assert_problem(await desk.client.get(f"/get_orders/{uuid.uuid4()}"), 404, "order_not_found")


async def test_the_price_an_order_was_made_at_by_its_price_id(desk: Reading) -> None:
    order = desk.ledger.stored[3]
    price = desk.ledger.records[order.price_id]
    for path in (f"/prices/{order.price_id}", f"/prices/{order.price_id}/", f"/prices/{str(order.price_id).upper()}"):
        answer = await desk.client.get(path)
        assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
        assert answer.json() == record_document(price)
        assert record_from(answer.json()) == price
    assert_problem(await desk.client.get(f"/prices/{uuid.uuid4()}"), 404, "price_not_found")
    assert_problem(await desk.client.get(f"/prices/{order.id}"), 404, "price_not_found")


async def test_a_price_record_never_changes_and_may_be_kept(desk: Reading) -> None:
    path = f"/prices/{desk.ledger.stored[3].price_id}"
    first = await desk.client.get(path)
    assert first.headers["cache-control"] == "private, max-age=31536000, immutable"
    assert re.fullmatch(r'"[0-9a-f]{24}"', first.headers["etag"])
    unchanged = await desk.client.get(path, headers={"If-None-Match": first.headers["etag"]})
    assert (unchanged.status_code, unchanged.content) == (304, b"")
    assert unchanged.headers["etag"] == first.headers["etag"]
    other = await desk.client.get(path, headers={"If-None-Match": '"other"'})
    assert (other.status_code, other.content) == (200, first.content)
    none = await desk.client.get(f"/prices/{uuid.uuid4()}")
    assert "immutable" not in none.headers.get("cache-control", "")


@pytest.mark.parametrize("path", ["get_orders", "prices"])
@pytest.mark.parametrize("order_id", ["1", "x", "01926e60-7a7c-7cc3-9c4e-3a1d1f1d8a3", "%00", "a" * 5000, "-1", "null"])
async def test_ids_that_are_not_uuids_are_named(desk: Reading, path: str, order_id: str) -> None:
    document = assert_problem(await desk.client.get(f"/{path}/{order_id}"), 422, "invalid_request")
    assert document["errors"] == [{"member": "id", "reason": "must be a UUID"}]


async def test_an_order_by_its_key(desk: Reading) -> None:
    answer = await desk.client.get("/get_orders/?client_order_id=key-4")
    assert (answer.status_code, answer.json()) == (200, shown(desk.ledger.stored[3]))
    assert answer.json()["client_order_id"] == "key-4"
    assert_problem(await desk.client.get("/get_orders/?client_order_id=key-26"), 404, "order_not_found")
    assert_problem(await desk.client.get(f"/get_orders/?client_order_id={'k' * 255}"), 404, "order_not_found")


async def test_parameters_where_there_are_none_are_named(desk: Reading) -> None:
    order = desk.ledger.stored[0]
    for path in (f"/get_orders/{order.id}?start=1", f"/prices/{order.price_id}?start=1", "/exposure?start=1"):
        document = assert_problem(await desk.client.get(path), 422, "invalid_request")
        assert [each["member"] for each in document["errors"]] == ["start"]


async def test_the_exposure(desk: Reading) -> None:
    used = sum(order.satoshi for order in desk.ledger.stored)
    answer = await desk.client.get("/exposure")
    assert answer.json() == {
        "cap": "100.00000000",
        "used": f"0.{used:08d}",
        "available": f"99.{100_000_000 - used:08d}",
        "orders": 25,
    }


@pytest.mark.parametrize(
    "path", ["/get_orders/", f"/get_orders/{AN_ID}", "/get_orders/?client_order_id=k", f"/prices/{AN_ID}"]
)
async def test_without_the_ledger_reads_are_unavailable(desk: Reading, path: str) -> None:
    desk.ledger.fault = LedgerUnavailable("PostgreSQL is away", retry_after_seconds=1)
    for each in (path, "/exposure"):
        answer = await desk.client.get(each)
        assert_problem(answer, 503, "ledger_unavailable")
        assert answer.headers["retry-after"] == "1"
    missing = assert_problem(await desk.client.get("/readyz"), 503, "not_ready")["missing"]
    assert missing == [{"what": "ledger", "why": "PostgreSQL is away"}]


async def test_where_too_many_read_a_further_one_is_overloaded_and_the_service_ready(
    desk: Reading, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(*_: object) -> Page:
        raise Overloaded("100 reads are waiting already.", retry_after_seconds=1)

    monkeypatch.setattr(desk.ledger, "page", full)
    answer = await desk.client.get("/get_orders/?page_size=1000")
    assert_problem(answer, 503, "overloaded")
    assert answer.headers["retry-after"] == "1"
    assert (await desk.client.get("/readyz")).status_code == 200


async def test_wrong_methods_and_paths(desk: Reading) -> None:
    for path in ("/get_orders/", "/exposure", f"/get_orders/{uuid.uuid4()}", f"/prices/{uuid.uuid4()}"):
        answer = await desk.client.post(path)
        assert_problem(answer, 405, "method_not_allowed")
        assert "GET" in answer.headers["allow"]
    assert_problem(await desk.client.get("/get_order/"), 404, "not_found")


async def test_the_paths_are_documented_with_examples(desk: Reading) -> None:
    paths = (await desk.client.get("/openapi.json")).json()["paths"]
    expected = {
        "/get_orders/": {"200", "304", "401", "403", "404", "422", "429", "503"},
        "/get_orders/{order_id}": {"200", "401", "403", "404", "422", "429", "503"},
        "/prices/{price_id}": {"200", "304", "401", "403", "404", "422", "429", "503"},
        "/exposure": {"200", "401", "403", "422", "429", "503"},
    }
    for path, statuses in expected.items():
        responses = paths[path]["get"]["responses"]
        assert set(responses) - {"500"} == statuses
        assert responses["200"]["content"]["application/json"]["example"]
    order = desk.ledger.stored[0]
    example = paths["/get_orders/"]["get"]["responses"]["200"]["content"]["application/json"]["example"]
    assert list(example["data"][0]) == list(shown(order))
    example = paths["/prices/{price_id}"]["get"]["responses"]["200"]["content"]["application/json"]["example"]
    assert record_document(record_from(example)) == example
    assert example["sources"]["used"]


async def test_each_of_200_000_orders_is_read_once_while_eight_writers_add_more(databases: Databases) -> None:
    stored = 200_000
    dsn = await databases.new()
    await fill(dsn, stored)
    ledger = PostgresLedger(dsn, settings(), livemode=False)
    app = create_app(
        settings(), ledger, Reporter("fetch_buy_orders", MemoryReportStore(settings()), settings()), ModelRefusals()
    )
    price = record()
    is_reading = True

    async def write() -> int:
        written = 0
        while is_reading:
            await ledger.place([priced_order(1, price=price)], 5)
            written += 1
            await asyncio.sleep(0.01)
        return written

    async with served(app) as url, httpx2.AsyncClient(base_url=url) as client:
        writers = [asyncio.create_task(write()) for _ in range(8)]
        seen: list[int] = []
        at: str | None = "/get_orders/?page_size=1000"
        while at is not None:
            document = msgspec.json.decode((await client.get(at)).content)
            seen += numbers(document)
            at = links(document).get("next")
        is_reading = False
        written = sum(await asyncio.gather(*writers))
        total = (await client.get("/exposure")).json()["orders"]
    await ledger.close()
    assert seen == list(range(seen[0], 0, -1))
    assert stored <= seen[0] < total == stored + written
