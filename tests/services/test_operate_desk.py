"""operate_desk over real TCP: what operators send, and what they are told."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import httpx2
import msgspec
import pytest

from buydesk.backends.memory.reports import MemoryReportStore
from buydesk.clients.cache import KeyCache
from buydesk.clients.keys import parse_key_text
from buydesk.clients.registry import (
    ConfirmPrice,
    CreateClient,
    CreateKey,
    LimitClient,
    Limits,
    Pause,
    Resume,
    RevokeKey,
    RotateKey,
    SetCap,
    SetCapCounts,
)
from buydesk.clients.scopes import SCOPES
from buydesk.errors import InsufficientScope, KeyRefused, LedgerUnavailable, OutcomeUnknown
from buydesk.money import RATE_SCALE, Currency, format_btc, satoshi_for
from buydesk.observability.reporter import Reporter
from buydesk.orders.refusals import Refusal
from buydesk.prices.documents import record_document
from buydesk.runtime.wiring import wire
from buydesk.services import operate_desk
from buydesk.times import format_time, utc_now
from tests.builders import TOKEN, new_order, record, settings
from tests.databases import Databases
from tests.model_keys import ModelKeys
from tests.model_registry import ModelRefusals, ModelRegistry
from tests.operators import key_for
from tests.problems import assert_problem
from tests.serving import served

WHY = {"why": "as agreed"}


@dataclass
class Desk:
    client: httpx2.AsyncClient
    registry: ModelRegistry
    refusals: ModelRefusals
    key: str
    ready: list[Exception] = field(default_factory=list)

    async def call(self, method: str, path: str, document: Any = None) -> httpx2.Response:
        if document is None:
            return await self.client.request(method, path)
        headers = {"Content-Type": "application/json"}
        return await self.client.request(method, path, content=json.dumps(document), headers=headers)

    def done(self) -> Any:
        """The last change, after a look that its reason and its operator came with it."""
        change, why, by = self.registry.done[-1]
        assert (why, by.text, by.address) == ("as agreed", self.key, "127.0.0.1")
        return change


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    registry, refusals, keys = ModelRegistry(), ModelRefusals(), ModelKeys()
    key = keys.add("operator", *SCOPES).text
    given = settings(access="keys")
    reporter = Reporter("operate_desk", MemoryReportStore(given), given)

    async def check() -> None:
        if running.ready:
            raise running.ready[0]

    app = operate_desk.create_app(registry, refusals, check, reporter)
    app.keys = KeyCache(keys, given)
    headers = {"Authorization": f"Bearer {key}"}
    async with served(app, settings=given) as url, httpx2.AsyncClient(base_url=url, headers=headers) as client:
        running = Desk(client, registry, refusals, key)
        yield running


async def test_a_client_is_made_limited_and_shown(desk: Desk) -> None:
    given: dict[str, Any] = {"cap": "1.5", "largest_order": "0.25", "daily_limits": {"EUR": "1000.00"}}
    given |= {"markup_bp": {"EUR": 75, "USD": 0}, "rate_per_minute": 600, "quote_seconds_max": 90}
    answer = await desk.call("POST", "/clients", {"client": "shop", **given, **WHY})
    shown: dict[str, Any] = {"client": "shop", "cap": "1.50000000", "cap_counts": "stored"}
    shown |= {"largest_order": "0.25000000", "daily_limits": {"EUR": "1000.00"}, "rate_per_minute": 600}
    shown |= {"markup_bp": {"EUR": 75, "USD": 0}, "quote_seconds_max": 90}
    assert (answer.status_code, answer.json()) == (201, shown)
    markups = {Currency.EUR: 75, Currency.USD: 0}
    limits = Limits(150_000_000, 25_000_000, 600, {Currency.EUR: 100_000}, markups, 90)
    assert desk.done() == CreateClient("shop", limits)
    changed = {"cap": None, "daily_limits": {"EUR": None, "GBP": "0.01"}, "markup_bp": {"USD": None, "GBP": 5}, **WHY}
    answer = await desk.call("PATCH", "/clients/shop", changed)
    shown |= {"cap": None, "daily_limits": {"GBP": "0.01"}, "markup_bp": {"EUR": 75, "GBP": 5}}
    assert (answer.status_code, answer.json()) == (200, shown)
    daily = {Currency.EUR: None, Currency.GBP: 1}
    markup = {Currency.USD: None, Currency.GBP: 5}
    assert desk.done() == LimitClient("shop", Limits(cap_satoshi=None, daily_cents_max=daily, markup_bp=markup))
    bought = {"orders": 0, "used": "0.00000000", "keys": 0}
    assert (await desk.call("GET", "/clients/shop/")).json() == shown | bought
    listed = (await desk.call("GET", "/clients")).json()["data"]
    assert [each["client"] for each in listed] == ["anonymous", "shop"]
    some = await desk.call("GET", "/clients?after=anonymous&limit=1")
    assert some.json()["data"] == [shown | bought]
    assert_problem(await desk.call("GET", "/clients/nobody"), 404, "client_not_found")


async def test_a_key_is_made_and_shown_once_and_its_hash_alone_goes_on(desk: Desk) -> None:
    ends_at = format_time(utc_now() + timedelta(days=90))
    given = {"client": "anonymous", "scopes": ["orders:read", "orders:create"], "allow_from": ["192.0.2.0/24", "::1"]}
    answer = await desk.call("POST", "/keys", given | {"expires_at": ends_at, "rate_per_minute": 5, **WHY})
    assert answer.status_code == 201
    key = parse_key_text(answer.json()["key"])
    assert answer.json()["id"] == key.id
    change = desk.done()
    assert isinstance(change, CreateKey)
    assert (change.digest, change.scopes) == (key.digest.hex(), ["orders:create", "orders:read"])
    assert (change.allow_from, change.rate_per_minute) == (["192.0.2.0/24", "::1/128"], 5)
    [shown] = (await desk.call("GET", "/keys?client=anonymous")).json()["data"]
    assert (shown["id"], shown["expires_at"], shown["revoked_at"]) == (key.id, ends_at, None)
    assert "digest" not in shown
    assert key.text not in str(shown)

    answer = await desk.call("POST", f"/keys/{key.id}/rotate", WHY)
    other = parse_key_text(answer.json()["key"])
    assert (answer.status_code, answer.json()["id"]) == (201, other.id)
    assert desk.done() == RotateKey(key.id, other.id, other.digest.hex(), 86400)
    await desk.call("POST", f"/keys/{key.id}/rotate", {"overlap_seconds": 60, **WHY})
    assert desk.done().overlap_seconds == 60

    answer = await desk.call("POST", f"/keys/{other.id}/revoke", WHY)
    assert (answer.status_code, answer.json()) == (200, {"id": other.id})
    assert desk.done() == RevokeKey(other.id)
    assert_problem(await desk.call("POST", f"/keys/{other.id}/rotate", WHY), 409, "key_ended")
    assert_problem(await desk.call("POST", f"/keys/{'0' * 10}/revoke", WHY), 404, "key_not_found")
    assert len((await desk.call("GET", "/keys")).json()["data"]) == 3
    least = await desk.call("POST", "/keys", {"client": "anonymous", "scopes": ["orders:read"], **WHY})
    assert parse_key_text(least.json()["key"]).livemode is False
    assert (desk.done().allow_from, desk.done().expires_at) == ((), None)


async def test_the_desk_s_cap_is_set_and_what_it_counts(desk: Desk) -> None:
    shown = {"livemode": False, "paused": False, "cap": "100.00000000", "used": "0.00000000"}
    shown |= {"available": "100.00000000", "cap_counts": "stored", "orders": 0}
    assert (await desk.call("GET", "/desk")).json() == shown
    answer = await desk.call("POST", "/cap", {"cap": "250", **WHY})
    state = {"paused": False, "cap": "250.00000000", "cap_counts": "stored"}  # not what others have bought
    assert (answer.status_code, answer.json()) == (200, state)
    assert desk.done() == SetCap(25_000_000_000)
    answer = await desk.call("POST", "/cap/counts", {"counts": "open", **WHY})
    assert answer.json() == state | {"cap_counts": "open"}
    assert desk.done() == SetCapCounts(None, open_only=True)
    answer = await desk.call("POST", "/cap/counts", {"counts": "stored", "client": "anonymous", **WHY})
    assert (answer.json()["client"], answer.json()["cap_counts"]) == ("anonymous", "stored")
    assert desk.done() == SetCapCounts("anonymous", open_only=False)


async def test_the_desk_is_paused_and_resumed(desk: Desk) -> None:
    assert (await desk.call("POST", "/pause", WHY)).json()["paused"] is True
    assert desk.done() == Pause()
    assert (await desk.call("POST", "/resume", WHY)).json()["paused"] is False
    assert desk.done() == Resume()


async def test_a_price_is_confirmed(desk: Desk) -> None:
    given = {"currency": "EUR", "from": "15000", "to": "16000.00", "minutes": 15, **WHY}
    answer = await desk.call("POST", "/prices/confirm", given)
    document = answer.json()
    assert answer.status_code == 200
    assert document.pop("expires_at") > format_time(utc_now())
    assert document == {"currency": "EUR", "from": "15000.00", "to": "16000.00", **WHY}
    assert desk.done() == ConfirmPrice(Currency.EUR, 15_000 * 10**8, 16_000 * 10**8, 15)


async def test_what_operators_did_is_read_from_any_act_on(desk: Desk) -> None:
    for _ in range(3):
        await desk.call("POST", "/pause", WHY)
    acts = (await desk.call("GET", "/audit?after=1&limit=1")).json()["data"]
    assert [(each["number"], each["act"], each["address"]) for each in acts] == [(2, "Pause", "127.0.0.1")]
    assert acts[0]["hash"] == "00" * 32
    assert acts[0]["at"].endswith("Z")
    assert len((await desk.call("GET", "/audit")).json()["data"]) == 3


async def test_refusals_of_all_or_of_one_client_are_read(desk: Desk) -> None:
    order = new_order()
    desk.refusals.kept = [
        Refusal(utc_now(), client, order.id, None, "paused", Currency.EUR, 6900) for client in ("shop", "bank")
    ]
    every = (await desk.call("GET", "/refusals?client=*")).json()["data"]
    assert [each["client"] for each in every] == ["bank", "shop"]
    [one] = (await desk.call("GET", "/refusals?client=shop")).json()["data"]
    assert (one["amount"], one["code"], one["order_id"]) == ("69.00", "paused", str(order.id))
    assert (await desk.call("GET", "/refusals")).json() == {"data": []}  # the operator's own


CONFIRM = {"currency": "EUR", "from": "15000", "to": "16000", "minutes": 15, **WHY}
KEY = {"client": "anonymous", "scopes": ["orders:read"], **WHY}


@pytest.mark.parametrize(
    ("path", "document", "member"),
    [
        ("POST /pause", {}, "why"),
        ("POST /pause", {"why": ""}, "why"),
        ("POST /pause", {"why": 7}, "why"),
        ("POST /pause", {"why": "two\nlines"}, "why"),
        ("POST /pause", {"why": "w" * 501}, "why"),
        ("POST /pause", {**WHY, "for": "ever"}, "for"),
        ("POST /cap", {"cap": 250, **WHY}, "cap"),
        ("POST /cap", {"cap": "a lot", **WHY}, "cap"),
        ("POST /cap", {"cap": None, **WHY}, "cap"),
        ("POST /cap", WHY, "cap"),
        ("POST /cap/counts", {"counts": "all", **WHY}, "counts"),
        ("POST /cap/counts", {"counts": True, **WHY}, "counts"),
        ("POST /cap/counts", {"counts": "open", "client": "", **WHY}, "client"),
        ("POST /clients", {"client": "Shop", **WHY}, "client"),
        ("POST /clients", {"client": "shop\n", **WHY}, "client"),
        ("POST /clients", {"client": "x" * 33, **WHY}, "client"),
        ("POST /clients", {"client": "shop", "cap": 1, **WHY}, "cap"),
        ("POST /clients", {"client": "shop", "rate_per_minute": 0, **WHY}, "rate_per_minute"),
        ("POST /clients", {"client": "shop", "rate_per_minute": 1_000_001, **WHY}, "rate_per_minute"),
        ("POST /clients", {"client": "shop", "rate_per_minute": "60", **WHY}, "rate_per_minute"),
        ("POST /clients", {"client": "shop", "rate_per_minute": 1.5, **WHY}, "rate_per_minute"),
        ("POST /clients", {"client": "shop", "daily_limits": "a lot", **WHY}, "daily_limits"),
        ("POST /clients", {"client": "shop", "daily_limits": {"CHF": "1"}, **WHY}, "daily_limits"),
        ("POST /clients", {"client": "shop", "daily_limits": {"EUR": True}, **WHY}, "daily_limits"),
        ("POST /clients", {"client": "shop", "daily_limits": {"\ud800": "1"}, **WHY}, "daily_limits"),
        ("POST /clients", {"client": "shop", "markup_bp": 75, **WHY}, "markup_bp"),
        ("POST /clients", {"client": "shop", "quote_seconds_max": 4, **WHY}, "quote_seconds_max"),
        ("POST /clients", {"client": "shop", "quote_seconds_max": 901, **WHY}, "quote_seconds_max"),
        ("POST /clients", {"client": "shop", "quote_seconds_max": "90", **WHY}, "quote_seconds_max"),
        ("POST /clients", {"client": "shop", "markup_bp": {"EUR": -1}, **WHY}, "markup_bp"),
        ("POST /clients", {"client": "shop", "markup_bp": {"EUR": 5001}, **WHY}, "markup_bp"),
        ("POST /clients", {"client": "shop", "markup_bp": {"EUR": 7.5}, **WHY}, "markup_bp"),
        ("POST /clients", {"client": "shop", "markup_bp": {"EUR": "75"}, **WHY}, "markup_bp"),
        ("POST /clients", {"client": "shop", "markup_bp": {"CHF": 75}, **WHY}, "markup_bp"),
        ("POST /keys", KEY | {"allow_from": ["::ffff:192.0.2.1"]}, "allow_from"),
        ("POST /keys", KEY | {"allow_from": ["fe80::1%eth0"]}, "allow_from"),
        ("POST /clients", {"client": "shop", "daily_limits": {"EUR": "0.001"}, **WHY}, "daily_limits"),
        ("PATCH /clients/Shop", WHY, "name"),
        ("POST /keys", KEY | {"scopes": []}, "scopes"),
        ("POST /keys", KEY | {"scopes": "orders:read"}, "scopes"),
        ("POST /keys", KEY | {"scopes": ["orders:paint"]}, "scopes"),
        ("POST /keys", KEY | {"scopes": [7]}, "scopes"),
        ("POST /keys", KEY | {"allow_from": "here"}, "allow_from"),
        ("POST /keys", KEY | {"allow_from": ["here"]}, "allow_from"),
        ("POST /keys", KEY | {"allow_from": [7]}, "allow_from"),
        ("POST /keys", KEY | {"allow_from": ["192.0.2.1"] * 101}, "allow_from"),
        ("POST /keys", KEY | {"expires_at": "tomorrow"}, "expires_at"),
        ("POST /keys", KEY | {"expires_at": "2026-01-31T09:05:00Z"}, "expires_at"),
        ("PATCH /clients/anonymous", WHY, "body"),
        ("POST /clients", {"client": "shop", "largest_order": "0", **WHY}, "largest_order"),
        ("GET /clients?limit=1001", None, "limit"),
        ("GET /clients?after=No!", None, "after"),
        ("GET /keys?limit=0", None, "limit"),
        ("POST /keys", KEY | {"expires_at": 1}, "expires_at"),
        ("POST /keys/0000000000/rotate", {"overlap_seconds": 0, **WHY}, "overlap_seconds"),
        ("POST /keys/0000000000/rotate", {"overlap_seconds": 90 * 86400 + 1, **WHY}, "overlap_seconds"),
        ("POST /keys/none/rotate", WHY, "id"),
        ("POST /keys/none/revoke", WHY, "id"),
        ("POST /prices/confirm", CONFIRM | {"currency": "CHF"}, "currency"),
        ("POST /prices/confirm", CONFIRM | {"currency": "eur"}, "currency"),
        ("POST /prices/confirm", CONFIRM | {"from": 15000}, "from"),
        ("POST /prices/confirm", CONFIRM | {"from": "1.5e4"}, "from"),
        ("POST /prices/confirm", CONFIRM | {"to": "14999.99"}, "to"),
        ("POST /prices/confirm", CONFIRM | {"why": ""}, "why"),
        ("POST /prices/confirm", CONFIRM | {"why": 1}, "why"),
        ("POST /prices/confirm", CONFIRM | {"minutes": 0}, "minutes"),
        ("POST /prices/confirm", CONFIRM | {"minutes": 16}, "minutes"),
        ("POST /prices/confirm", CONFIRM | {"minutes": "15"}, "minutes"),
        ("POST /prices/confirm", CONFIRM | {"until": "tomorrow"}, "until"),
        ("GET /audit?limit=1001", None, "limit"),
        ("GET /audit?after=-1", None, "after"),
        ("GET /desk?x=1", None, "x"),
        ("GET /clients?x=1", None, "x"),
        ("GET /clients/shop?x=1", None, "x"),
        ("GET /keys?client=*", None, "client"),
        ("GET /refusals?limit=0", None, "limit"),
    ],
    ids=str,
)
async def test_bad_members_are_named_and_nothing_is_changed(
    desk: Desk, path: str, document: dict[str, Any] | None, member: str
) -> None:
    method, _, where = path.partition(" ")
    answer = await desk.call(method, where, document)
    problem = assert_problem(answer, 422, "invalid_request")
    assert [each["member"] for each in problem["errors"]] == [member]
    assert desk.registry.done == []


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"1"])
async def test_a_body_that_is_no_object_is_refused(desk: Desk, body: bytes) -> None:
    answer = await desk.client.post("/pause", content=body, headers={"Content-Type": "application/json"})
    assert_problem(answer, 422, "invalid_request")
    assert_problem(await desk.client.post("/pause", content=body), 415, "unsupported_media_type")
    assert desk.registry.done == []


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        (OutcomeUnknown("lost", retry_after_seconds=1), 503),
        (LedgerUnavailable("away", retry_after_seconds=1), 503),
        (InsufficientScope("no", scope="desk:cap"), 403),
    ],
)
async def test_what_the_ledger_says_to_a_change_is_told(desk: Desk, fault: Any, status: int) -> None:
    desk.registry.fault = fault
    assert_problem(await desk.call("POST", "/cap", {"cap": "1", **WHY}), status, fault.code)


async def test_a_key_that_ended_meanwhile_is_none(desk: Desk) -> None:
    desk.registry.fault = KeyRefused("none")
    for path, members in (
        ("/pause", {}),
        ("/keys", {"client": "anonymous", "scopes": ["orders:read"]}),
        (f"/keys/{'0' * 10}/rotate", {}),
        ("/prices/confirm", {"currency": "EUR", "from": "15000", "to": "16000", "minutes": 15}),
    ):
        assert_problem(await desk.call("POST", path, WHY | members), 401, "unauthorized")


async def test_an_act_that_is_done_is_told_so_although_nothing_can_be_read_any_more(desk: Desk) -> None:
    async def away(*_: object) -> Any:
        raise LedgerUnavailable("away")

    for reading in ("desk", "clients", "client", "keys"):
        setattr(desk.registry, reading, away)
    for path, members, status in (("/pause", {}, 200), ("/cap", {"cap": "1"}, 200), ("/clients", {"client": "x"}, 201)):
        assert (await desk.call("POST", path, WHY | members)).status_code == status


async def test_it_is_ready_while_the_ledger_is(desk: Desk) -> None:
    assert (await desk.call("GET", "/readyz")).status_code == 200
    desk.ready.append(LedgerUnavailable("away"))
    problem = assert_problem(await desk.call("GET", "/readyz"), 503, "not_ready")
    assert problem["missing"] == [{"what": "ledger", "why": "away"}]


async def test_over_a_real_ledger_a_pause_holds_at_once_and_what_it_refused_is_on_record(databases: Databases) -> None:
    """All services in one process, as `up` runs them."""
    dsn = await databases.new()
    given = settings(database_url=dsn, access="keys")
    operator = {"Authorization": f"Bearer {(await key_for(dsn, 'anonymous', *SCOPES)).text}"}
    shop = {"Authorization": f"Bearer {(await key_for(dsn, 'other', 'orders:create', 'orders:read')).text}"}
    wired, urls = wire(given), {}
    names = ("db_proxy", "create_buy_order", "fetch_buy_orders", "operate_desk")
    async with contextlib.AsyncExitStack() as stack:
        client = await stack.enter_async_context(httpx2.AsyncClient(timeout=20))
        stack.push_async_callback(wired.close)
        urls["api_cache_proxy"] = await stack.enter_async_context(served(wired.apps["api_cache_proxy"], settings=given))
        publish = await client.post(
            f"{urls['api_cache_proxy']}/add/",
            json=msgspec.to_builtins(record_document(record())),
            headers={"Authorization": f"Bearer {TOKEN}"},
        )
        assert publish.status_code == 200
        for name in names:
            urls[name] = await stack.enter_async_context(served(wired.apps[name], settings=given))

        async def order(cents: int) -> httpx2.Response:
            document = {"currency": "EUR", "amount": f"0.{cents:02}", "client_order_id": f"k{cents}"}
            return await client.post(f"{urls['create_buy_order']}/place_order/", json=document, headers=shop)

        async def act(path: str, **members: Any) -> httpx2.Response:
            return await client.post(f"{urls['operate_desk']}{path}", json={**WHY, **members}, headers=operator)

        while (await order(1)).status_code != 201:  # until create_buy_order has the price
            await asyncio.sleep(0.05)
        assert (await act("/pause")).json()["paused"] is True
        assert_problem(await order(2), 503, "paused")
        assert (await order(1)).headers["idempotent-replayed"] == "true"
        assert (await act("/resume")).json()["paused"] is False
        limit = {"daily_limits": {"EUR": "0.03"}, **WHY}
        await client.patch(f"{urls['operate_desk']}/clients/other", json=limit, headers=operator)
        assert (await order(2)).status_code == 201
        refused = assert_problem(await order(3), 409, "daily_limit_exceeded")
        assert (refused["used"], refused["available"]) == ("0.03", "0.00")
        limit = {"daily_limits": {"EUR": None}, "markup_bp": {"EUR": 75}, **WHY}
        await client.patch(f"{urls['operate_desk']}/clients/other", json=limit, headers=operator)
        changed_at, cents = time.monotonic(), 10
        while (placed := (await order(cents)).json()["order"])["markup_bp"] == 0:
            cents += 1
            await asyncio.sleep(0.05)
        assert time.monotonic() - changed_at < given.key_cache_seconds + 5  # and a busy machine's
        assert (placed["market_rate"], placed["exchange_rate"]) == ("20000.00", "20150.00")
        assert placed["bitcoin_amount"] == format_btc(satoshi_for(cents, 20_150 * RATE_SCALE))
        found: list[Any] = []
        while len(found) < 2:
            await asyncio.sleep(0.2)
            answer = await client.get(f"{urls['fetch_buy_orders']}/refusals", headers=shop)
            found = [each for each in answer.json()["data"] if each["client_order_id"] != "k1"]
        assert [(each["code"], each["client_order_id"]) for each in found] == [
            *(("daily_limit_exceeded", "k3"), ("paused", "k2"))
        ]
        assert_problem(
            await client.post(f"{urls['operate_desk']}/pause", json=WHY, headers=shop), 403, "insufficient_scope"
        )
