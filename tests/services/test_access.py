"""Who may call what: every route of every service, by every kind of caller. A new one is found by its documentation."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

import httpx2
import pytest
from fastapi.routing import APIRoute

from buydesk.clients.cache import KeyCache
from buydesk.clients.keys import CHECKSUM_CHARS, SECRET_CHARS, Key, new_key
from buydesk.clients.scopes import CLIENT_SCOPES, SCOPES
from buydesk.errors import LedgerUnavailable
from buydesk.http.app import Service
from buydesk.http.openapi import EVERY_SERVICE
from buydesk.runtime.wiring import wire
from buydesk.settings.model import Settings
from buydesk.times import utc_now
from tests.builders import TOKEN, settings
from tests.databases import Databases
from tests.model_keys import ModelKeys
from tests.problems import assert_problem
from tests.serving import served

# What anybody may call who reaches it: prices, and how the desk is. A proxy in front lets none of it through.
PUBLIC = {
    ("api_cache_proxy", "GET", "/record"),
    ("api_cache_proxy", "GET", "/history"),
    ("api_cache_proxy", "GET", "/sources/"),
    ("api_cache_proxy", "GET", "/v1/bpi/currentprice.json"),
    ("api_cache_proxy", "GET", "/v1/bpi/currentprice/{code}.json"),
    ("health_check", "GET", "/status"),
    ("health_check", "GET", "/reports"),
    ("health_check", "POST", "/report"),
}
# What a caller needs a scope for. All other routes take a token of the desk's own services.
NEEDS = {
    ("create_buy_order", "POST", "/place_order/"): "orders:create",
    ("create_buy_order", "POST", "/quotes/"): "quotes:create",
    ("fetch_buy_orders", "GET", "/get_orders/"): "orders:read",
    ("fetch_buy_orders", "GET", "/get_orders/{order_id}"): "orders:read",
    ("fetch_buy_orders", "GET", "/prices/{price_id}"): "orders:read",
    ("fetch_buy_orders", "GET", "/exposure"): "orders:read",
    ("fetch_buy_orders", "GET", "/refusals"): "orders:read",
    ("db_proxy", "GET", "/get/"): "orders:read",
    ("process_buy_orders", "GET", "/orders/"): "orders:process",
    ("process_buy_orders", "POST", "/orders/settle"): "orders:process",
    ("process_buy_orders", "POST", "/orders/cancel"): "orders:process",
    ("process_buy_orders", "POST", "/orders/{order_id}/settle"): "orders:process",
    ("process_buy_orders", "POST", "/orders/{order_id}/cancel"): "orders:process",
    ("process_buy_orders", "GET", "/events"): "events:read",
    ("process_buy_orders", "GET", "/webhooks"): "webhooks:manage",
    ("process_buy_orders", "POST", "/webhooks"): "webhooks:manage",
    ("process_buy_orders", "GET", "/webhooks/{webhook_id}"): "webhooks:manage",
    ("process_buy_orders", "PATCH", "/webhooks/{webhook_id}"): "webhooks:manage",
    ("process_buy_orders", "DELETE", "/webhooks/{webhook_id}"): "webhooks:manage",
    ("process_buy_orders", "POST", "/webhooks/{webhook_id}/rotate_secret"): "webhooks:manage",
    ("process_buy_orders", "GET", "/webhooks/{webhook_id}/deliveries"): "webhooks:manage",
    ("process_buy_orders", "POST", "/webhooks/{webhook_id}/redeliver"): "webhooks:manage",
    ("process_buy_orders", "POST", "/webhooks/{webhook_id}/test"): "webhooks:manage",
    ("operate_desk", "GET", "/clients"): "clients:manage",
    ("operate_desk", "POST", "/clients"): "clients:manage",
    ("operate_desk", "GET", "/clients/{name}"): "clients:manage",
    ("operate_desk", "PATCH", "/clients/{name}"): "clients:manage",
    ("operate_desk", "GET", "/keys"): "clients:manage",
    ("operate_desk", "POST", "/keys"): "clients:manage",
    ("operate_desk", "POST", "/keys/{key_id}/rotate"): "clients:manage",
    ("operate_desk", "POST", "/keys/{key_id}/revoke"): "clients:manage",
    ("operate_desk", "GET", "/audit"): "clients:manage",
    ("operate_desk", "GET", "/desk"): "orders:read_all",
    ("operate_desk", "GET", "/refusals"): "orders:read_all",
    ("operate_desk", "POST", "/cap"): "desk:cap",
    ("operate_desk", "POST", "/cap/counts"): "desk:cap",
    ("operate_desk", "POST", "/pause"): "desk:pause",
    ("operate_desk", "POST", "/resume"): "desk:pause",
    ("operate_desk", "POST", "/prices/confirm"): "prices:confirm",
}
# What every service has, for whoever reaches it.
COMMON = {"/", "/livez", "/readyz", "/metrics", "/openapi.json", "/docs", "/docs-files"}
REFUSED = (
    *("no key", "wrong scheme", "no text", "wrong checksum", "unknown", "another's secret", "revoked", "expired"),
    *("other mode", "foreign address", "two keys"),
)


class Place(NamedTuple):
    service: str
    method: str
    path: str


@dataclass
class Desk:
    """All services of a desk that takes keys, and the keys."""

    apps: dict[str, Service]
    urls: dict[str, str]
    keys: ModelKeys
    client: httpx2.AsyncClient

    def places(self) -> Iterator[Place]:
        """Every documented operation that is not one of every service."""
        for service, app in self.apps.items():
            for path, methods in app.openapi()["paths"].items():
                for method, operation in methods.items():
                    if EVERY_SERVICE not in operation.get("tags", ()):
                        yield Place(service, method.upper(), path)

    async def call(self, place: Place, *shown: str) -> httpx2.Response:
        path = place.path.replace("{key_id}", "0" * 10).replace("{code}", "EUR").replace("{name}", "nobody")
        path = path.replace("{order_id}", "01a21e65-4e55-7073-9a23-44cc51d983ee")
        path = path.replace("{webhook_id}", "5c9f1d1e-7a3b-4c56-9d8e-2f4a6b8c0d1e")
        path = path.replace("{price_id}", "01a21e65-4e55-7073-9a23-44cc51d983ee")
        body: Any = {} if place.method in ("POST", "PUT", "PATCH") else None
        headers = [("Authorization", each) for each in shown]
        return await self.client.request(place.method, self.urls[place.service] + path, json=body, headers=headers)

    def shown(self, kind: str) -> list[str]:
        """What a caller shows who is to be refused."""
        key, every = new_key(livemode=False), tuple(SCOPES)
        match kind:
            case "wrong scheme":
                return [f"Basic {self.keys.add('other', *every).text}"]
            case "no text":
                return ["Bearer"]
            case "wrong checksum":
                text = self.keys.add("other", *every).text
                return [f"Bearer {text[:-1]}{'0' if text[-1] != '0' else '1'}"]
            case "unknown":
                return [f"Bearer {key.text}"]
            case "another's secret":
                self.keys.stored[key.id] = self.keys.stored[self.keys.add("other", *every).id]
                return [f"Bearer {key.text}"]
            case "revoked":
                key = self.keys.add("other", *every)
                self.keys.revoke(key)
            case "expired":
                key = self.keys.add("other", *every, expires_at=utc_now() - timedelta(seconds=1))
            case "other mode":
                key = self.keys.add("other", *every, livemode=True)
            case "foreign address":
                key = self.keys.add("other", *every, allow_from=["192.0.2.0/24"])
            case "two keys":
                return [f"Bearer {self.keys.add('other', *every).text}"] * 2
            case _:
                return []
        return [f"Bearer {key.text}"]


@contextlib.asynccontextmanager
async def desk_of(databases: Databases, **given: Any) -> AsyncIterator[Desk]:
    configured: Settings = settings(database_url=await databases.new(), order_seconds_max=1, **given)
    wired, keys, urls = wire(configured), ModelKeys(), {}
    async with contextlib.AsyncExitStack() as stack:
        for name, app in wired.apps.items():
            app.keys = KeyCache(keys, configured)
            app.rates = None  # more are refused here than may guess
            urls[name] = await stack.enter_async_context(served(app, settings=configured))
        client = await stack.enter_async_context(httpx2.AsyncClient(timeout=20))
        stack.push_async_callback(wired.close)
        yield Desk(wired.apps, urls, keys, client)


@pytest.fixture(scope="module")
async def desk(databases: Databases) -> AsyncIterator[Desk]:
    async with desk_of(databases, access="keys") as running:
        yield running


async def test_every_route_is_documented_and_so_among_those_that_are_called_here(desk: Desk) -> None:
    found: set[Place] = set()
    for service, app in desk.apps.items():
        for routes in app._direct.values():
            found |= {Place(service, method, route.path) for method, route in routes.items()}
        for route in app.routes:
            methods = route.methods or () if isinstance(route, APIRoute) else ("GET",)
            found |= {Place(service, method, str(getattr(route, "path", route))) for method in methods}
    assert {place for place in found if place.path not in COMMON} == set(desk.places())


async def test_every_route_is_public_needs_a_scope_or_takes_the_token_of_a_service(desk: Desk) -> None:
    places = set(desk.places())
    assert places >= PUBLIC | NEEDS.keys()
    for place in places:
        answer = await desk.call(place)
        if place in PUBLIC:
            assert answer.status_code != 401, place
        else:
            assert_problem(answer, 401, "unauthorized")
            assert answer.headers["www-authenticate"] == "Bearer"
        documented = desk.apps[place.service].openapi()["paths"][place.path][place.method.lower()]
        assert ("security" in documented) is (place not in PUBLIC), place


@pytest.mark.parametrize("kind", REFUSED)
async def test_no_route_takes_a_key_that_is_none_and_none_says_what_was_wrong(desk: Desk, kind: str) -> None:
    told = set()
    for place in desk.places():
        if place not in PUBLIC:
            shown = desk.shown(kind)
            answer = await desk.call(place, *shown)
            problem = assert_problem(answer, 401, "unauthorized")
            secrets = [each[-CHECKSUM_CHARS - SECRET_CHARS :] for each in shown if "bd_" in each]
            assert not any(secret in f"{answer.text}{answer.headers}" for secret in secrets)
            told.add((place in NEEDS, problem["detail"]))
    assert len(told) == 2  # one text for callers, one for the desk's own services


WHY = {
    "no key": "nothing_shown",
    "wrong scheme": "not_a_key",
    "no text": "not_a_key",
    "wrong checksum": "not_a_key",
    "unknown": "unknown",
    "another's secret": "wrong_secret",
    "revoked": "ended",
    "expired": "ended",
    "other mode": "other_mode",
    "foreign address": "foreign_address",
    "two keys": "not_a_key",
}


@pytest.mark.parametrize("kind", REFUSED)
async def test_a_refusal_is_counted_by_why_and_no_use_of_the_key_is_noted(desk: Desk, kind: str) -> None:
    counted = {"service": "fetch_buy_orders", "why": WHY[kind]}
    registry = desk.apps["fetch_buy_orders"].registry
    before = registry.get_sample_value("buydesk_callers_refused_total", counted) or 0
    shown = desk.shown(kind)
    await desk.call(Place("fetch_buy_orders", "GET", "/exposure"), *shown)
    assert registry.get_sample_value("buydesk_callers_refused_total", counted) == before + 1
    assert all(key.last_used_on is None for key in desk.keys.stored.values() if f"_{key.id}" in "".join(shown))


@pytest.mark.parametrize("place", NEEDS, ids=map(" ".join, NEEDS))
async def test_a_route_takes_a_key_with_its_scope_and_names_the_scope_that_another_lacks(
    desk: Desk, place: tuple[str, str, str]
) -> None:
    scope = NEEDS[place]
    lacking = desk.keys.add("other", *(SCOPES - {scope}))
    answer = await desk.call(Place(*place), f"Bearer {lacking.text}")
    problem = assert_problem(answer, 403, "insufficient_scope")
    assert problem["scope"] == scope
    assert answer.headers["www-authenticate"] == f'Bearer error="insufficient_scope", scope="{scope}"'
    permitted = desk.keys.add("other", scope)  # type: ignore[arg-type]
    for scheme in ("Bearer", "bearer"):
        answer = await desk.call(Place(*place), f"{scheme} {permitted.text}")
        assert answer.status_code in (200, 404, 422), answer.text


async def test_no_route_of_the_desk_s_own_services_takes_a_key(desk: Desk) -> None:
    key = desk.keys.add("other", *SCOPES)
    for place in set(desk.places()) - PUBLIC - NEEDS.keys():
        assert_problem(await desk.call(place, f"Bearer {key.text}"), 401, "unauthorized")


async def test_what_cannot_be_a_key_of_this_desk_costs_no_look_up(desk: Desk) -> None:
    asked = len(desk.keys.asked)
    for kind in ("wrong scheme", "no text", "wrong checksum", "other mode", "two keys"):
        await desk.call(Place("fetch_buy_orders", "GET", "/exposure"), *desk.shown(kind))
    assert len(desk.keys.asked) == asked


async def test_a_key_that_cannot_be_looked_up_is_not_called_wrong(desk: Desk) -> None:
    known, unknown = desk.keys.add("other", "orders:read"), desk.keys.add("other", "orders:read")
    place = Place("db_proxy", "GET", "/get/")
    assert (await desk.call(place, f"Bearer {known.text}")).status_code == 200
    desk.keys.fault = LedgerUnavailable("away", retry_after_seconds=1)
    try:
        assert (await desk.call(place, f"Bearer {known.text}")).status_code == 200
        assert_problem(await desk.call(place, f"Bearer {unknown.text}"), 503, "ledger_unavailable")
    finally:
        desk.keys.fault = None


@pytest.mark.parametrize("access", ["open", "proxy"])
async def test_on_an_open_desk_and_behind_a_proxy_callers_need_no_key_but_one_that_is_shown_counts(
    databases: Databases, access: str
) -> None:
    async with desk_of(databases, access=access) as desk:
        for place in map(Place._make, NEEDS):
            answer = await desk.call(place)
            assert (answer.status_code == 401) is (NEEDS[place] not in CLIENT_SCOPES), place
            assert_problem(await desk.call(place, *desk.shown("unknown")), 401, "unauthorized")
        for path in ("/orders/", "/events"):
            answer = await desk.call(Place("process_buy_orders", "GET", path), f"Bearer {TOKEN}")
            assert answer.status_code == 200


@pytest.mark.parametrize(
    ("forwarded", "status"),
    [
        (["192.0.2.7"], 200),
        (["203.0.113.1, 192.0.2.7"], 200),
        (["::ffff:192.0.2.7"], 200),
        (["192.0.2.7", "203.0.113.1"], 401),
        (["192.0.2.7, 203.0.113.1"], 401),
        (["somebody"], 401),
        ([], 401),
    ],
)
async def test_behind_a_proxy_a_key_is_used_from_where_the_proxy_says(
    databases: Databases, forwarded: list[str], status: int
) -> None:
    async with desk_of(databases, access="keys", proxies="127.0.0.0/8") as desk:
        key: Key = desk.keys.add("other", "orders:read", allow_from=["192.0.2.0/24"])
        headers = [("Authorization", f"Bearer {key.text}"), *(("X-Forwarded-For", each) for each in forwarded)]
        answer = await desk.client.get(f"{desk.urls['fetch_buy_orders']}/exposure", headers=headers)
        assert answer.status_code == status


async def test_a_key_that_was_taken_a_moment_ago_is_still_refused_once_it_ends_or_comes_from_elsewhere(
    databases: Databases,
) -> None:
    async with desk_of(databases, access="keys", proxies="127.0.0.0/8", key_cache_seconds=0.3) as desk:
        url = f"{desk.urls['fetch_buy_orders']}/exposure"

        async def status(key: Key, origin: str = "192.0.2.7") -> int:
            headers = {"Authorization": f"Bearer {key.text}", "X-Forwarded-For": origin}
            return (await desk.client.get(url, headers=headers)).status_code

        ending = desk.keys.add("other", "orders:read", expires_at=utc_now() + timedelta(seconds=0.2))
        assert [await status(ending) for _ in range(2)] == [200, 200]
        await asyncio.sleep(0.2)
        assert await status(ending) == 401
        local = desk.keys.add("other", "orders:read", allow_from=["192.0.2.0/24"])
        assert [await status(local, origin) for origin in ("192.0.2.7", "203.0.113.1", "192.0.2.8")] == [200, 401, 200]
        asked = len(desk.keys.asked)
        desk.keys.revoke(local)
        await asyncio.sleep(0.3)
        assert await status(local) == 401
        assert len(desk.keys.asked) == asked + 1


async def test_a_service_that_cannot_look_keys_up_takes_none(databases: Databases) -> None:
    async with desk_of(databases, access="open") as desk:
        desk.apps["fetch_buy_orders"].keys = None
        key = desk.keys.add("other", "orders:read")
        async with served(desk.apps["fetch_buy_orders"], settings=settings()) as url:
            answer = await desk.client.get(f"{url}/exposure", headers={"Authorization": f"Bearer {key.text}"})
        assert_problem(answer, 401, "unauthorized")
