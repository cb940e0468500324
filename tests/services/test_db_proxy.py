"""db_proxy over real TCP: who may call it, what it settles, what it refuses by name."""

import asyncio
import contextlib
import re
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import httpx2
import msgspec
import pytest
from msgspec.structs import replace

from buydesk.backends.memory.reports import MemoryReportStore
from buydesk.errors import LedgerUnavailable, Overloaded, PriceUnavailable, RateLimited, WrongMode
from buydesk.money import Currency
from buydesk.observability.reporter import Reporter
from buydesk.orders.documents import priced_order_documents, stored_document
from buydesk.orders.model import Order, Outcome, PricedOrder
from buydesk.orders.pricing import price_order
from buydesk.orders.quotes import QuoteSigner
from buydesk.orders.refusals import RefusalRecorder
from buydesk.prices.anchors import NewConfirmation
from buydesk.prices.documents import record_document, record_from
from buydesk.prices.model import PriceRecord
from buydesk.services import db_proxy
from buydesk.services.db_proxy import ADD_BYTES_MAX, ITEMS_MAX, ExposureSeen, create_app
from buydesk.signing_keys import new_signing_key
from buydesk.times import format_time, utc_now
from tests.builders import order_quote, priced_order, quote_figures, quoted_order, record, settings, shown
from tests.model_anchors import ModelAnchors
from tests.model_keys import ModelKeys
from tests.model_ledger import ModelLedger
from tests.model_registry import ModelRefusals, ModelRegistry
from tests.model_webhooks import ModelWebhooks
from tests.problems import assert_problem
from tests.serving import served

PRICE = record(EUR=4119191 * 10**6, ttl=3600)
TOKEN = {"Authorization": "Bearer test-token"}
JSON = {"Content-Type": "application/json"}
Document = dict[str, Any]


class Ledger(ModelLedger):
    """The model, with faults to order."""

    fault: Exception | None = None
    gate: asyncio.Event | None = None
    entered = asyncio.Event()

    async def place(self, items: Sequence[PricedOrder], timeout_seconds: float) -> Sequence[Outcome]:
        if self.gate is not None:
            self.entered.set()
            await self.gate.wait()
        if self.fault is not None:
            raise self.fault
        return await super().place(items, timeout_seconds)

    async def check(self) -> None:
        if self.fault is not None:
            raise self.fault


@dataclass(repr=False)
class Proxy:
    ledger: Ledger
    anchors: ModelAnchors
    client: httpx2.AsyncClient

    async def post(self, body: object, **headers: str) -> httpx2.Response:
        content = body if isinstance(body, bytes) else msgspec.json.encode(body)
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.client.post("/add/", content=content, headers=TOKEN | JSON | given)

    async def add_within(self, milliseconds: object, *documents: Any) -> httpx2.Response:
        within = {"answer_within_ms": str(milliseconds)}
        return await self.client.post("/add/", params=within, json=msgspec.to_builtins(documents), headers=TOKEN)

    async def add(self, *documents: Any) -> list[Document]:
        answer = await self.post(list(documents))
        assert answer.status_code == 200, answer.text
        results: list[Document] = answer.json()
        return results

    async def read(self, path: str) -> httpx2.Response:
        return await self.client.get(path, headers=TOKEN)


@contextlib.asynccontextmanager
async def proxy_with(**given: Any) -> AsyncIterator[Proxy]:
    """The service with an empty ledger and these settings."""
    configured = settings(price_ttl_seconds=3600, **given)
    ledger, anchors = Ledger(), ModelAnchors()
    app = create_app(
        configured,
        ledger,
        ledger,
        anchors,
        Reporter("db_proxy", MemoryReportStore(configured), configured),
        keys=ModelKeys(),
        registry=ModelRegistry(),
        refusals=RefusalRecorder(ModelRefusals()),
        webhooks=ModelWebhooks(),
    )
    async with served(app) as url, httpx2.AsyncClient(base_url=url, timeout=20) as client:
        yield Proxy(ledger, anchors, client)


@pytest.fixture(scope="module")
async def service() -> AsyncIterator[Proxy]:
    """One service for most tests of this file; each gets it with an empty ledger."""
    async with proxy_with(order_seconds_max=1) as proxy:
        yield proxy


@pytest.fixture
async def proxy(service: Proxy) -> Proxy:
    service.ledger.stored, service.ledger.records = [], {}
    service.ledger.fault = service.ledger.gate = None
    service.ledger.place_seconds = 0.001
    service.anchors.kept, service.anchors.confirmed = {}, []
    return service


def documents(*items: PricedOrder) -> list[Document]:
    made: list[Document] = msgspec.json.decode(msgspec.json.encode(priced_order_documents(items)))
    return made


def internal(order: Order) -> Document:
    """The order as the other services read it."""
    document: Document = msgspec.to_builtins(stored_document(order))
    return document


def outcomes(results: list[Document]) -> list[str]:
    return [result["problem"]["code"] if result["outcome"] == "refused" else result["outcome"] for result in results]


async def test_a_list_gets_a_list_of_results_in_its_order(proxy: Proxy) -> None:
    items = [priced_order(100, "a", price=PRICE), priced_order(200, price=PRICE), priced_order(100, "a", price=PRICE)]
    items += [priced_order(300, "a", price=PRICE), priced_order(100, price=PriceUnavailable("none"))]
    results = await proxy.add(*documents(*items))
    assert outcomes(results) == ["placed", "placed", "replayed", "idempotency_key_reused", "price_unavailable"]
    first, second = proxy.ledger.stored
    assert [results[place]["order"] for place in (0, 1, 2)] == [internal(each) for each in (first, second, first)]


async def test_one_item_gets_one_result(proxy: Proxy) -> None:
    [document] = documents(priced_order(6900, price=PRICE))
    answer = await proxy.post(document)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    assert answer.json() == {"outcome": "placed", "order": internal(proxy.ledger.stored[0])}
    assert (await proxy.post(document)).json()["outcome"] == "replayed"


async def test_an_empty_list_gets_an_empty_list(proxy: Proxy) -> None:
    assert await proxy.add() == []


async def test_one_item_that_is_none_gets_its_refusal(proxy: Proxy) -> None:
    result = (await proxy.post({})).json()
    assert (result["outcome"], result["problem"]["code"]) == ("refused", "invalid_request")


async def test_bad_items_are_refused_by_name_and_the_good_ones_of_the_list_settled(proxy: Proxy) -> None:
    """The first item brings the price record that all others name; that it is bad itself changes nothing for them."""
    sent = documents(*(priced_order(cents, f"k{cents}", price=PRICE) for cents in range(100, 110)))
    changes: dict[int, Document] = {
        0: {"amount": "0"},
        2: {"currency": "BTC"},
        3: {"bitcoin_amount": "0.00000001"},
        4: {"exchange_rate": "1.00"},
        6: {"id": "x"},
        7: {"client_order_id": "\x00"},
        8: {"price": str(uuid.uuid4())},
    }
    for place, change in changes.items():
        sent[place] |= change
    results = await proxy.add(*sent[:9], [], sent[9])
    refused = {place: result for place, result in enumerate(results) if result["outcome"] == "refused"}
    named = {place: result["problem"]["errors"][0]["member"] for place, result in refused.items()}
    assert named == {place: next(iter(change)) for place, change in changes.items()} | {9: "item"}
    assert [order.client_order_id for order in proxy.ledger.stored] == ["k101", "k105", "k109"]
    assert results[3]["problem"]["errors"][0]["reason"].startswith("must be 0.0000")


async def test_an_item_that_does_not_fit_says_how_much_room_there_is(proxy: Proxy) -> None:
    [result] = await proxy.add(*documents(priced_order(99_999_999_999, price=PRICE)))
    assert result["problem"]["code"] == "exposure_cap_exceeded"
    assert result["problem"]["available"] == "100.00000000"


@pytest.mark.parametrize(
    "headers",
    [{}, {"Authorization": ""}, {"Authorization": "Bearer wrong"}, {"Authorization": "test-token"},
     {"Authorization": "Basic test-token"}, {"Authorization": "Bearer test-token2"}],
)  # fmt: skip
async def test_internal_paths_need_the_token(proxy: Proxy, headers: dict[str, str]) -> None:
    body = msgspec.json.encode(documents(priced_order(price=PRICE)))
    paths = ["/page?page_size=1", f"/order/{SOME_ID}", "/order?client=c&client_order_id=k", "/exposure"]
    answers = [await proxy.client.get(path, headers=headers) for path in (*paths, f"/price/{SOME_ID}")]
    answers.append(await proxy.client.post("/add/", content=body, headers=headers | JSON))
    for answer in answers:
        assert_problem(answer, 401, "unauthorized")
        assert answer.headers["www-authenticate"] == "Bearer"
    assert proxy.ledger.stored == []


SOME_ID = uuid.uuid4()


async def test_the_brief_s_call_needs_no_token(proxy: Proxy) -> None:
    await proxy.add(*documents(*(priced_order(100 + cents, price=PRICE) for cents in range(12))))
    answer = await proxy.client.get("/get/?start=0&page_size=5")
    assert answer.status_code == 200
    assert answer.json() == [shown(order) for order in reversed(proxy.ledger.stored[7:])]
    assert [order["number"] for order in (await proxy.client.get("/get")).json()] == list(range(12, 2, -1))
    assert (await proxy.client.get("/get/?start=12")).json() == []


@pytest.mark.parametrize(
    ("query", "member"),
    [
        ("start=-1", "start"),
        ("start=x", "start"),
        (f"start={10**30}", "start"),
        ("page_size=0", "page_size"),
        ("page_size=1001", "page_size"),
        ("pagesize=3", "pagesize"),
        ("start=0&start=0", "start"),
    ],
)
async def test_bad_pages_are_named(proxy: Proxy, query: str, member: str) -> None:
    document = assert_problem(await proxy.client.get(f"/get/?{query}"), 422, "invalid_request")
    assert [each["member"] for each in document["errors"]] == [member]


async def test_reads_for_the_other_services(proxy: Proxy) -> None:
    await proxy.add(*documents(*(priced_order(100 + cents, f"k{cents}", price=PRICE) for cents in range(6))))
    stored = [internal(order) for order in proxy.ledger.stored]

    async def page(query: str) -> Document:
        document: Document = (await proxy.read(f"/page?{query}")).json()
        return document

    assert await page("page_size=2") == {"data": [stored[5], stored[4]], "total": 6}
    assert await page("page_size=2&start=3") == {"data": [stored[2], stored[1]], "total": 6}
    assert await page("page_size=2&before=3") == {"data": [stored[1], stored[0]], "total": None}
    assert await page("page_size=2&after=3") == {"data": [stored[4], stored[3]], "total": None}
    assert (await proxy.read(f"/order/{stored[2]['id']}")).json() == stored[2]
    assert (await proxy.read("/order?client=anonymous&client_order_id=k2")).json() == stored[2]
    used = sum(order.satoshi for order in proxy.ledger.stored)
    assert (await proxy.read("/exposure")).json() == {
        "cap": "100.00000000",
        "used": f"0.{used:08d}",
        "available": f"99.{10**8 - used:08d}",
        "orders": 6,
    }
    shown = (await proxy.read(f"/price/{PRICE.id}")).json()
    assert (shown, record_from(shown)) == (record_document(PRICE), PRICE)


async def test_what_is_not_there_is_not_found(proxy: Proxy) -> None:
    assert_problem(await proxy.read(f"/order/{SOME_ID}"), 404, "order_not_found")
    assert_problem(await proxy.read("/order?client=anonymous&client_order_id=k"), 404, "order_not_found")
    assert_problem(await proxy.read(f"/price/{SOME_ID}"), 404, "price_not_found")


@pytest.mark.parametrize(
    ("path", "member"),
    [
        ("/order/x", "order_id"),
        ("/price/x", "price_id"),
        ("/order?client=c", "client_order_id"),
        ("/order?client=c&client_order_id=%00", "client_order_id"),
        ("/order?client=%C3%A9&client_order_id=k", "client"),
        ("/order?client=c&client_order_id=", "client_order_id"),
        (f"/order?client=c&client_order_id={'k' * 256}", "client_order_id"),
        ("/page", "page_size"),
        ("/page?page_size=1&before=-1", "before"),
        (f"/page?page_size=1&after={2**63}", "after"),
        ("/page?page_size=1&x=1", "x"),
        ("/page?page_size=1&page_size=1", "page_size"),
        ("/order?client=c&client_order_id=k&x=1", "x"),
        (f"/order/{uuid.UUID(int=1)}?x=1", "x"),
        (f"/price/{uuid.UUID(int=1)}?x=1", "x"),
        ("/exposure?x=1", "x"),
    ],
)
async def test_bad_reads_are_named(proxy: Proxy, path: str, member: str) -> None:
    document = assert_problem(await proxy.read(path), 422, "invalid_request")
    assert [each["member"] for each in document["errors"]] == [member]


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[", b"\xff", b'["\xff"]', b"[" * 100_000, b'{"a":' * 100_000, b"[1,]", b"NaN", b"1e400", b"[]x"],
    ids=lambda body: body[:8],
)
async def test_what_is_no_json_is_refused(proxy: Proxy, body: bytes) -> None:
    document = assert_problem(await proxy.post(body), 422, "invalid_request")
    assert [each["member"] for each in document["errors"]] == ["body"]
    assert len(document["detail"]) < 250


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", ""])
async def test_what_is_not_json_by_its_type_is_unsupported(proxy: Proxy, content_type: str) -> None:
    assert_problem(await proxy.post([], Content_Type=content_type), 415, "unsupported_media_type")


async def test_a_body_too_large_is_refused(proxy: Proxy) -> None:
    assert_problem(await proxy.post(b" " * (ADD_BYTES_MAX + 1)), 413, "payload_too_large")


async def test_the_longest_list_is_settled_and_a_longer_one_refused_as_a_whole() -> None:
    sent = documents(*(priced_order(1, "k" * 240 + str(each), price=PRICE) for each in range(ITEMS_MAX + 1)))
    async with proxy_with() as proxy:
        proxy.ledger.place_seconds = 2
        document = assert_problem(await proxy.post(sent), 422, "invalid_request")
        assert document["errors"] == [{"member": "body", "reason": "may have at most 1000 items"}]
        assert proxy.ledger.stored == []
        assert set(outcomes(await proxy.add(*sent[:ITEMS_MAX]))) == {"placed"}
        assert len(proxy.ledger.stored) == ITEMS_MAX


async def test_when_a_list_does_not_fit_into_the_queue_nothing_of_it_is_stored() -> None:
    async with proxy_with(orders_waiting_max=2, batch_orders_max=2) as proxy:
        answer = await proxy.post(documents(*(priced_order(100, price=PRICE) for _ in range(3))))
        assert_problem(answer, 503, "overloaded")
        assert answer.headers["retry-after"] == "1"
        assert proxy.ledger.stored == []
        assert (
            outcomes(await proxy.add(*documents(*(priced_order(100, price=PRICE) for _ in range(2))))) == ["placed"] * 2
        )


@pytest.mark.parametrize("fault", [LedgerUnavailable("away", retry_after_seconds=2), WrongMode("live")])
async def test_a_ledger_that_cannot_place_is_said_of_each_item(proxy: Proxy, fault: Any) -> None:
    proxy.ledger.fault = fault
    results = await proxy.add(*documents(priced_order(price=PRICE), priced_order(price=PRICE)), "x")
    assert outcomes(results) == [fault.code, fault.code, "invalid_request"]
    assert [result["retry_after_seconds"] for result in results] == [fault.retry_after_seconds] * 2 + [None]
    missing = assert_problem(await proxy.client.get("/readyz"), 503, "not_ready")["missing"]
    assert missing == [{"what": "database", "why": fault.detail}]


async def test_an_answer_comes_before_the_sender_gives_up(proxy: Proxy) -> None:
    proxy.ledger.gate = asyncio.Event()
    first = asyncio.create_task(proxy.add(*documents(priced_order(100, price=PRICE))))
    await proxy.ledger.entered.wait()
    async with asyncio.timeout(3):
        [result] = await proxy.add(*documents(priced_order(200, price=PRICE)))
    assert result["problem"]["code"] == Overloaded.code
    proxy.ledger.gate.set()
    assert outcomes(await first) == ["placed"]


async def test_wrong_methods_and_paths(proxy: Proxy) -> None:
    for method, path in (("GET", "/add/"), ("POST", "/get/"), ("DELETE", f"/order/{SOME_ID}")):
        assert_problem(await proxy.client.request(method, path, headers=TOKEN), 405, "method_not_allowed")
    assert_problem(await proxy.read("/orders"), 404, "not_found")


async def test_every_path_is_documented_with_examples_problems_and_the_token(proxy: Proxy) -> None:
    document = (await proxy.client.get("/openapi.json")).json()
    bearer = {"type": "http", "scheme": "bearer"}
    assert document["components"]["securitySchemes"] == {"internal_token": bearer, "key": bearer}
    expected = {
        ("/add/", "post"): {"401", "413", "415", "422", "503"},
        ("/get/", "get"): {"401", "403", "422", "429", "503"},
        ("/page", "get"): {"401", "422", "503"},
        ("/order", "get"): {"401", "404", "422", "503"},
        ("/order/{order_id}", "get"): {"401", "404", "422", "503"},
        ("/exposure", "get"): {"401", "422", "503"},
        ("/price/{price_id}", "get"): {"401", "404", "422", "503"},
    }
    for (path, method), statuses in expected.items():
        operation = document["paths"][path][method]
        assert set(operation["responses"]) - {"500"} == statuses | {"200"}, path
        assert operation["responses"]["200"]["content"]["application/json"]["example"], path
        assert ("security" in operation) == ("401" in statuses), path
        for status in statuses:
            assert operation["responses"][status]["content"]["application/problem+json"]["examples"]
    shown = document["paths"]["/get/"]["get"]["responses"]["503"]["content"]["application/problem+json"]["examples"]
    assert set(shown) == {"ledger_unavailable", "wrong_mode", "overloaded"}


@pytest.mark.parametrize("document", ["text", 5, 1.5, True, None])
async def test_what_is_neither_an_item_nor_a_list_is_refused_as_a_whole(proxy: Proxy, document: object) -> None:
    found = assert_problem(await proxy.post(document), 422, "invalid_request")
    assert found["errors"] == [{"member": "body", "reason": "must be an item or a list of items"}]


async def test_the_documented_example_is_understood(proxy: Proxy) -> None:
    operation = (await proxy.client.get("/openapi.json")).json()["paths"]["/add/"]["post"]
    example = operation["requestBody"]["content"]["application/json"]["example"]
    # Its deadline is long gone.
    assert outcomes(await proxy.add(*example)) == ["clock_skewed"]


NOW = utc_now()


@pytest.mark.parametrize(
    ("price", "member"),
    [
        (replace(record(), feed="live"), "feed"),
        (replace(record(), expires_at=NOW + timedelta(days=365)), "expires_at"),
        (record(age=-3600), "as_of"),
    ],
    ids=["feed", "expires_at", "as_of"],
)
async def test_a_price_this_desk_would_never_publish_is_none_and_repeats_are_answered(
    proxy: Proxy, price: PriceRecord, member: str
) -> None:
    [document] = await proxy.add(*priced_order_documents([priced_order(key="k", price=price)]))
    assert (document["outcome"], document["problem"]["code"]) == ("refused", "price_unavailable")
    assert f" {member}: " in document["problem"]["detail"]
    assert proxy.ledger.stored == []
    await proxy.add(*priced_order_documents([priced_order(key="k")]))
    assert outcomes(await proxy.add(*priced_order_documents([priced_order(key="k", price=price)]))) == ["replayed"]


async def test_a_deadline_beyond_any_edge_s_means_that_the_clocks_differ(proxy: Proxy) -> None:
    [document] = priced_order_documents([priced_order()])
    far = "9999-12-31T23:59:59.999999Z"
    for deadline, ahead in ((far, "[0-9]{10,}"), (format_time(utc_now() + timedelta(seconds=22)), "21")):
        [result] = await proxy.add(document | {"deadline": deadline})
        assert (result["problem"]["code"], result["problem"]["status"]) == ("clock_skewed", 503)
        assert re.search(f"by db_proxy's clock this order comes from {ahead} s ahead", result["problem"]["detail"])
        assert result["by_ledger"] is False
    assert proxy.ledger.stored == []


async def test_only_what_the_ledger_itself_refused_holds_for_an_earlier_sending(proxy: Proxy) -> None:
    whole_cap = priced_order(price=record(rate_e8=10**8), cents=100 * 100)
    unproven = priced_order(price=replace(record(), feed="live"))
    no_price = priced_order(price=PriceUnavailable("none"))
    invalid = priced_order_documents([priced_order()])[0] | {"amount": "0"}
    told = await proxy.add(*documents(whole_cap, priced_order(), unproven, no_price), invalid)
    assert outcomes(told) == [
        "placed",
        "exposure_cap_exceeded",
        "price_unavailable",
        "price_unavailable",
        "invalid_request",
    ]
    assert [each.get("by_ledger") for each in told] == [None, False, False, True, False]


@pytest.mark.parametrize("told", ["0", "-1", "1.5", "", "1001", "99999999999"])
async def test_how_long_the_sender_waits_is_a_number_of_milliseconds(proxy: Proxy, told: str) -> None:
    answer = await proxy.add_within(told)
    assert (answer.status_code, answer.json()["errors"]) == (
        422,
        [{"member": "answer_within_ms", "reason": "must be a whole number from 1 to 1000"}],
    )


async def test_an_order_whose_sender_does_not_wait_long_enough_is_not_placed(proxy: Proxy) -> None:
    proxy.ledger.place_seconds = 0.5
    for waits_ms, outcome in ((600, "overloaded"), (1000, "placed")):
        answer = await proxy.add_within(waits_ms, *documents(priced_order()))
        assert outcomes(answer.json()) == [outcome]
    assert len(proxy.ledger.stored) == 1


async def test_a_desk_that_takes_nobody_s_prices_is_not_ready_until_it_takes_one(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with other price keys than the edges have: it would refuse every order, and look well."""
    other_desk_s = priced_order(price=replace(record(), feed="live"))
    async with proxy_with(order_seconds_max=1) as proxy:
        assert (await proxy.client.get("/readyz")).status_code == 200
        for _ in range(2):
            [refused] = await proxy.add(*documents(other_desk_s))
        [missing] = assert_problem(await proxy.client.get("/readyz"), 503, "not_ready")["missing"]
        assert missing == {"what": "prices", "why": refused["problem"]["detail"]}
        assert caplog.messages == [f"orders are refused: {missing['why']}"]
        monkeypatch.setattr(db_proxy, "REFUSAL_SHOWN_SECONDS", 0.0)  # nobody has tried since, and it may be well
        assert (await proxy.client.get("/readyz")).status_code == 200
        monkeypatch.setattr(db_proxy, "REFUSAL_SHOWN_SECONDS", 60.0)
        assert (await proxy.client.get("/readyz")).status_code == 503
        await proxy.add(*documents(priced_order(100, price=PRICE)))
        assert (await proxy.client.get("/readyz")).status_code == 200


async def test_prices_that_are_taken_outweigh_a_sender_whose_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    other_desk_s = priced_order(price=replace(record(), feed="live"))
    async with proxy_with(order_seconds_max=1) as proxy:
        await proxy.add(*documents(priced_order(100, price=PRICE), other_desk_s))
        for _ in range(3):
            await proxy.add(*documents(other_desk_s))
            await proxy.add(*documents(priced_order(price=PriceUnavailable("none"))))  # which shows nothing
        assert (await proxy.client.get("/readyz")).status_code == 200
        monkeypatch.setattr(db_proxy, "PROVEN_SHOWN_SECONDS", 0.0)
        assert (await proxy.client.get("/readyz")).status_code == 503


async def test_metrics_tell_the_exposure_that_readiness_saw_last(proxy: Proxy) -> None:
    async def told() -> dict[str, float]:
        lines = (await proxy.client.get("/metrics")).text.splitlines()
        named = [line.split() for line in lines if line.startswith("buydesk_exposure_")]
        return {name: float(value) for name, value in named}

    await proxy.add(*documents(priced_order(6900, price=PRICE)))
    sold = proxy.ledger.stored[0].satoshi
    assert (await proxy.client.get("/readyz")).status_code == 200
    assert await told() == {"buydesk_exposure_used_satoshi": sold, "buydesk_exposure_cap_satoshi": 100 * 10**8}
    proxy.ledger.fault = LedgerUnavailable("gone")
    assert (await proxy.client.get("/readyz")).status_code == 503
    assert (await told())["buydesk_exposure_used_satoshi"] == sold


async def test_a_desk_whose_readers_are_too_many_is_ready(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    async def full(_: object) -> None:
        raise Overloaded("100 reads are waiting already.", retry_after_seconds=1)

    monkeypatch.setattr(proxy.ledger, "exposure", full)
    assert (await proxy.client.get("/readyz")).status_code == 200
    assert_problem(await proxy.read("/exposure"), 503, "overloaded")


async def test_a_batch_takes_no_parameters_and_says_what_is_wrong_with_its_encoding(proxy: Proxy) -> None:
    answer = await proxy.client.post("/add/?x=1", content=b"[]", headers=TOKEN | JSON)
    assert assert_problem(answer, 422, "invalid_request")["errors"][0]["member"] == "x"
    document = assert_problem(await proxy.post(b"\xef\xbb\xbf[]"), 422, "invalid_request")
    assert document["detail"] == "body: starts with a byte order mark; send plain UTF-8"


async def test_before_the_first_check_nothing_is_told_of_the_exposure() -> None:
    seen = ExposureSeen(ModelLedger())
    assert list(seen.collect()) == []


# --- anchors and confirmations

ANCHORS = {"EUR": {"rate": "41191.91", "as_of": "2026-01-31T12:00:00.123456Z", "dollar": "43251.50"}}
NEW = NewConfirmation(Currency.EUR, 15_000 * 10**8, 16_000 * 10**8, "it's the news", 15)


async def test_anchors_are_put_as_they_are_got(proxy: Proxy) -> None:
    put = await proxy.client.put("/anchors", json=ANCHORS, headers=TOKEN)
    assert (put.status_code, put.json()) == (200, ANCHORS)
    assert (await proxy.read("/anchors/")).json() == ANCHORS


async def test_anchor_may_have_no_price_in_dollars(proxy: Proxy) -> None:
    unknown = {"EUR": {"rate": "41191.91", "as_of": "2026-01-31T12:00:00.123456Z"}}
    assert (await proxy.client.put("/anchors", json=unknown, headers=TOKEN)).json() == unknown
    assert proxy.anchors.kept[Currency.EUR].dollar_e8 is None


async def test_answer_to_an_earlier_anchor_is_the_one_that_stays(proxy: Proxy) -> None:
    await proxy.client.put("/anchors", json=ANCHORS, headers=TOKEN)
    earlier = {"EUR": {"rate": "1.00", "as_of": "2026-01-31T12:00:00Z"}}
    assert (await proxy.client.put("/anchors", json=earlier, headers=TOKEN)).json() == ANCHORS


async def test_confirmations_that_hold_are_listed(proxy: Proxy) -> None:
    kept = await proxy.anchors.confirm(NEW)
    shown = {"currency": "EUR", "from": "15000.00", "to": "16000.00", "why": "it's the news"}
    shown["expires_at"] = format_time(kept.expires_at)
    assert (await proxy.read("/confirmations")).json() == {"data": [shown]}


@pytest.mark.parametrize(
    ("sent", "member"),
    [
        ({"CHF": ANCHORS["EUR"]}, "CHF"),
        ({"eur": ANCHORS["EUR"]}, "eur"),
        ({"EUR": "41191.91"}, "EUR"),
        ({"EUR": {"rate": "0", "as_of": "2026-01-31T12:00:00Z"}}, "EUR.rate"),
        ({"EUR": {"rate": 41191.91, "as_of": "2026-01-31T12:00:00Z"}}, "EUR.rate"),
        ({"EUR": {"rate": "41191.91"}}, "EUR.as_of"),
        ({"EUR": {"rate": "41191.91", "as_of": "2026-01-31T12:00:00"}}, "EUR.as_of"),
        ({"EUR": {"rate": "41191.91", "as_of": 0}}, "EUR.as_of"),
        ({"EUR": ANCHORS["EUR"] | {"dollar": "0"}}, "EUR.dollar"),
        ({"EUR": ANCHORS["EUR"] | {"dollar": 43251.5}}, "EUR.dollar"),
    ],
)
async def test_bad_anchors_are_named_and_none_is_kept(proxy: Proxy, sent: Document, member: str) -> None:
    sent = {"USD": ANCHORS["EUR"]} | sent
    answer = await proxy.client.put("/anchors", json=sent, headers=TOKEN)
    document = assert_problem(answer, 422, "invalid_request")
    assert [each["member"] for each in document["errors"]] == [member]
    assert proxy.anchors.kept == {}


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[]", b"[" * 10_000, b"1"])
async def test_body_that_is_no_object_is_refused(proxy: Proxy, body: bytes) -> None:
    method, path = "PUT", "/anchors"
    answer = await proxy.client.request(method, path, content=body, headers=TOKEN | JSON)
    document = assert_problem(answer, 422, "invalid_request")
    assert [each["member"] for each in document["errors"]] == ["body"]
    assert_problem(await proxy.client.request(method, path, content=body, headers=TOKEN), 415, "unsupported_media_type")
    large = await proxy.client.request(method, path, content=b" " * 20_000, headers=TOKEN | JSON)
    assert_problem(large, 413, "payload_too_large")


@pytest.mark.parametrize(
    ("method", "path", "sent"),
    [("GET", "/anchors", None), ("PUT", "/anchors", ANCHORS), ("GET", "/confirmations", None)],
)
async def test_anchors_and_confirmations_need_the_token_that_publishes(
    method: str, path: str, sent: Document | None
) -> None:
    async with proxy_with(publishing_tokens="of-publishers") as proxy:
        for headers in ({}, TOKEN):
            assert_problem(await proxy.client.request(method, path, json=sent, headers=headers), 401, "unauthorized")
        assert (proxy.anchors.kept, proxy.anchors.confirmed) == ({}, [])
        right = {"Authorization": "Bearer of-publishers"}
        assert (await proxy.client.request(method, path, json=sent, headers=right)).status_code == 200
        wrong = await proxy.client.request(method, f"{path}?x=1", json=sent, headers=right)
        assert_problem(wrong, 422, "invalid_request")


async def put(proxy: Proxy, document: object, price_id: object, **headers: str) -> httpx2.Response:
    content = msgspec.json.encode(document)
    return await proxy.client.put(f"/price/{price_id}", content=content, headers=TOKEN | JSON | headers)


async def test_a_price_record_is_kept_for_quotes_if_this_desk_may_have_published_it(proxy: Proxy) -> None:
    for _ in range(2):
        answer = await put(proxy, record_document(PRICE), PRICE.id)
        assert (answer.status_code, answer.json()) == (200, {"id": str(PRICE.id)})
    assert proxy.ledger.records == {PRICE.id: PRICE}


async def test_a_record_that_is_none_or_not_of_this_desk_is_not_kept(proxy: Proxy) -> None:
    wrong = assert_problem(await put(proxy, record_document(PRICE), SOME_ID), 422, "invalid_request")
    assert wrong["errors"] == [{"member": "id", "reason": "is not that of the path"}]
    document = record_document(PRICE) | {"rates": {"EUR": "1.00"}}
    assert_problem(await put(proxy, document, PRICE.id), 503, "price_unavailable")
    assert_problem(await put(proxy, {"id": str(PRICE.id)}, PRICE.id), 422, "invalid_request")
    assert_problem(await put(proxy, [], PRICE.id), 422, "invalid_request")
    answer = await put(proxy, record_document(PRICE), PRICE.id, Authorization="Bearer wrong")
    assert_problem(answer, 401, "unauthorized")
    assert proxy.ledger.records == {}


async def test_what_an_order_by_quote_is_the_token_alone_says(proxy: Proxy) -> None:
    await proxy.ledger.keep_price(PRICE)
    quote = order_quote(PRICE, 6900, reference="r", seconds=900)
    [sent] = documents(quoted_order(quote))
    assert not {"price", "exchange_rate", "bitcoin_amount"} & set(sent)
    other = order_quote(PRICE, 6900, client="other")
    others = [
        sent | {"amount": "70.00"},
        sent | {"currency": "USD"},
        sent | {"client": "other"},
        sent | {"reference": None},
        sent | {"quote": other.token},
        sent | {"quote": quote.token[:-1]},
        sent | {"quote": None},
        sent | {"quote": QuoteSigner(new_signing_key()).sign(quote_figures(PRICE)).token},
    ]
    results = await proxy.add(*others, sent, sent)
    assert outcomes(results) == ["invalid_request"] * 8 + ["placed", "replayed"]
    assert {result["problem"]["errors"][0]["member"] for result in results[:8]} == {"quote"}
    [order] = proxy.ledger.stored
    assert (order.quote_id, order.amount_cents, order.satoshi) == (quote.id, 6900, quote.satoshi)


async def test_an_order_by_quote_that_came_with_a_problem_is_a_repeat_or_has_that_problem(proxy: Proxy) -> None:
    await proxy.ledger.keep_price(PRICE)
    stored, fresh = (order_quote(PRICE, seconds=900) for _ in range(2))
    over = RateLimited("too many")
    refused = [price_order(item.order, over, item.deadline) for item in map(quoted_order, (stored, fresh))]
    results = await proxy.add(*documents(quoted_order(stored), *refused))
    assert outcomes(results) == ["placed", "replayed", "rate_limited"]
