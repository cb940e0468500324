"""Limits at the door: what callers see of them, over real TCP, with the services in one process and in several."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest

from buydesk.backends.remote.rates import RemoteRateStore
from buydesk.clients import rates as limiting
from buydesk.clients.cache import KeyCache
from buydesk.clients.keys import Key, new_key
from buydesk.clients.scopes import CLIENT_SCOPES
from buydesk.embedded.data_dir import locked
from buydesk.embedded.redis import EmbeddedRedis
from buydesk.errors import LedgerUnavailable
from buydesk.http.app import Service
from buydesk.prices.documents import record_document
from buydesk.runtime.wiring import wire
from tests.builders import TOKEN, record, settings
from tests.databases import Databases
from tests.model_keys import ModelKeys
from tests.problems import assert_problem
from tests.serving import free_port, served

ORDER = "/place_order/?currency=EUR&amount=1"
NOBODY = "01a21e65-4e55-7073-9a23-44cc51d983ee"
KINDS = {
    "orders": [("create_buy_order", "POST", ORDER)],
    "reads": [
        ("fetch_buy_orders", "GET", "/get_orders/"),
        ("fetch_buy_orders", "GET", "/get_orders/?client=client_order_id&page_size=1"),
        ("fetch_buy_orders", "GET", f"/prices/{NOBODY}"),
        ("fetch_buy_orders", "GET", "/exposure"),
        ("fetch_buy_orders", "HEAD", "/exposure"),
        ("db_proxy", "GET", "/get/"),
        ("process_buy_orders", "GET", "/events"),
    ],
    "lookups": [
        ("fetch_buy_orders", "GET", f"/get_orders/{NOBODY}"),
        ("fetch_buy_orders", "GET", "/get_orders/?client_order_id=7"),
        ("fetch_buy_orders", "GET", "/get_orders/?page_size=1&client_order_id=7"),
        ("create_buy_order", "POST", "/quotes/"),
    ],
}


@dataclass
class Desk:
    """Services of a desk, each at its URL, and the keys that they know."""

    keys: ModelKeys
    client: httpx2.AsyncClient
    apps: dict[str, Service] = field(default_factory=dict)
    urls: dict[str, str] = field(default_factory=dict)

    async def call(
        self, service: str, method: str, path: str, key: Key | None = None, /, forwarded: str = "", **given: Any
    ) -> httpx2.Response:
        headers = given.pop("headers", {})
        if key is not None:
            headers |= {"Authorization": f"Bearer {key.text}"}
        if forwarded:
            headers |= {"X-Forwarded-For": forwarded}
        return await self.client.request(method, self.urls[service] + path, headers=headers, **given)

    async def order(self, key: Key | None = None, service: str = "create_buy_order", **given: Any) -> httpx2.Response:
        return await self.call(service, "POST", ORDER, key, **given)

    async def statuses(self, count: int, key: Key | None = None, **given: Any) -> list[int]:
        """Of so many orders, one after the other."""
        return [(await self.order(key, **given)).status_code for _ in range(count)]


@contextlib.asynccontextmanager
async def desk_of(databases: Databases, **given: Any) -> AsyncIterator[Desk]:
    """All services in this process, as `up` has them, with a price."""
    keys = ModelKeys()
    configured = settings(database_url=await databases.new(), order_seconds_max=2, **({"access": "keys"} | given))
    async with contextlib.AsyncExitStack() as stack:
        desk = Desk(keys, await stack.enter_async_context(httpx2.AsyncClient(timeout=20)))
        wired = wire(configured)
        stack.push_async_callback(wired.close)
        for name, app in wired.apps.items():
            if name != "api_updater":
                app.keys = KeyCache(keys, configured)
                desk.apps[name] = app
                desk.urls[name] = await stack.enter_async_context(served(app, settings=configured))
                if name == "api_cache_proxy":
                    await publish(desk)
        yield desk


async def publish(desk: Desk) -> None:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    answer = await desk.client.post(
        f"{desk.urls['api_cache_proxy']}/add/", json=record_document(record()), headers=headers
    )
    assert answer.status_code == 200, answer.text


@contextlib.asynccontextmanager
async def edges_of(
    databases: Databases, redis_url: str | None = None, *, has_ledger: bool = True, order_seconds_max: float = 2
) -> AsyncIterator[Desk]:
    """Two create_buy_orders, as in two processes, with one api_cache_proxy and one db_proxy."""
    keys, database_url = ModelKeys(), await databases.new()
    async with contextlib.AsyncExitStack() as stack:
        desk = Desk(keys, await stack.enter_async_context(httpx2.AsyncClient(timeout=20)))

        async def serve(name: str, service: str, **further: Any) -> None:
            configured = settings(access="keys", order_seconds_max=order_seconds_max, **further)
            wired = wire(configured, [service])
            stack.push_async_callback(wired.close)
            app = desk.apps[name] = wired.apps[service]
            app.keys = KeyCache(keys, configured)
            desk.urls[name] = await stack.enter_async_context(served(app, settings=configured))

        nobody = f"http://127.0.0.1:{free_port()}"
        await serve("api_cache_proxy", "api_cache_proxy", redis_url=redis_url, health_check_url=nobody)
        await publish(desk)
        if has_ledger:
            await serve("db_proxy", "db_proxy", database_url=database_url, health_check_url=nobody)
        behind = {f"{name}_url": desk.urls.get(name, nobody) for name in ("api_cache_proxy", "db_proxy")}
        for edge in ("one", "two"):
            await serve(edge, "create_buy_order", health_check_url=nobody, **behind)
        yield desk


async def reported(desk: Desk) -> None:
    """Waits until every edge has heard of what it reported."""
    async with asyncio.timeout(5):
        for app in desk.apps.values():
            assert app.rates is not None
            while app.rates._reporting is not None and not app.rates._reporting.done():
                await asyncio.sleep(0.005)


async def test_the_61st_order_is_429_and_says_when_to_come_back_and_all_others_go_on(databases: Databases) -> None:
    async with desk_of(databases) as desk:
        shop, second, other = (desk.keys.add(name, *CLIENT_SCOPES) for name in ("other", "other", "third"))
        first = await desk.order(shop)
        assert first.status_code == 201
        assert "ratelimit" not in first.headers  # more than half is left
        answers = [await desk.order((shop, second)[number % 2]) for number in range(59)]
        assert {answer.status_code for answer in answers} == {201}
        assert ["ratelimit" in answer.headers for answer in answers] == [False] * 29 + [True] * 30
        assert answers[29].headers["ratelimit-policy"] == '"orders";q=60;w=60'
        assert answers[29].headers["ratelimit"].startswith('"orders";r=29;t=')
        assert answers[-1].headers["ratelimit"].startswith('"orders";r=0;t=')
        for key in (shop, second):
            over = await desk.order(key)
            problem = assert_problem(over, 429, "rate_limited")
            assert (problem["policy"], problem["per_minute"]) == ("orders", 60)
            seconds = int(over.headers["retry-after"])
            assert 50 < seconds <= 122
            assert over.headers.get_list("ratelimit-policy") == ['"orders";q=60;w=60']
            assert over.headers.get_list("ratelimit") == [f'"orders";r=0;t={seconds}']
            assert over.headers["cache-control"] == "private, no-cache"
        assert (await desk.order(other)).status_code == 201
        for kind in ("reads", "lookups"):
            assert (await desk.call(*KINDS[kind][0], shop)).status_code in (200, 404)
        counted = {"service": "create_buy_order", "why": "rate"}
        assert desk.apps["create_buy_order"].registry.get_sample_value("buydesk_callers_refused_total", counted) == 2


@pytest.mark.parametrize("kind", KINDS)
async def test_every_route_of_a_kind_counts_together_also_of_several_services(databases: Databases, kind: str) -> None:
    async with desk_of(databases, client_rate_per_minute=10) as desk:
        shop = desk.keys.add("other", *CLIENT_SCOPES)
        for number in range(10):
            place = KINDS[kind][number % len(KINDS[kind])]
            answer = await desk.call(*place, shop)
            assert answer.status_code in (200, 201, 403, 404, 415, 422), place
            told = answer.headers.get("ratelimit", "")
            assert told.startswith(f'"{kind}";r={9 - number};t=' if number >= 5 else ""), place
            assert bool(told) is (number >= 5)
        for place in KINDS[kind]:
            assert (await desk.call(*place, shop)).status_code == 429, place
        # Before anything is read of them.
        assert (await desk.call(*KINDS[kind][0], shop, content=b"{")).status_code == 429
        others = [place for other, places in KINDS.items() if other != kind for place in places]
        for place in others:
            assert (await desk.call(*place, shop)).status_code != 429, place


async def test_every_route_that_needs_a_client_s_scope_is_counted_and_no_processor_s(databases: Databases) -> None:
    async with desk_of(databases, client_rate_per_minute=1, anonymous_rate=1, access="open") as desk:
        for app in desk.apps.values():
            for methods in app._direct.values():
                for route in methods.values():
                    assert (route.counted is not None) is (route.needs in CLIENT_SCOPES), route
        processor = desk.keys.add("settler", "orders:process")
        for _ in range(3):
            assert (await desk.call("process_buy_orders", "GET", "/orders/", processor)).status_code == 200
            headers = {"Authorization": f"Bearer {TOKEN}"}
            assert (await desk.call("process_buy_orders", "GET", "/events", headers=headers)).status_code == 200
            for path in ("/record", "/livez", "/readyz", "/metrics"):
                answer = await desk.call("api_cache_proxy", "GET", path)
                assert answer.status_code == 200, path
                assert "ratelimit" not in answer.headers
        assert await desk.statuses(2) == [201, 429]


async def test_scope_comes_before_rate(databases: Databases) -> None:
    async with desk_of(databases, client_rate_per_minute=1) as desk:
        reader = desk.keys.add("other", "orders:read")
        for _ in range(3):
            assert (await desk.order(reader)).status_code == 403
        assert await desk.statuses(2, desk.keys.add("other", "orders:create")) == [201, 429]


async def test_a_client_and_a_key_have_the_rates_that_are_stored(databases: Databases) -> None:
    async with desk_of(databases, client_rate_per_minute=2) as desk:
        wide = desk.keys.add("other", "orders:create", client_rate_per_minute=4)
        narrow = desk.keys.add("other", "orders:create", client_rate_per_minute=4, rate_per_minute=1)
        assert await desk.statuses(2, narrow) == [201, 429]
        assert await desk.statuses(4, wide) == [201, 201, 201, 429]
        assert await desk.statuses(3, desk.keys.add("third", "orders:create")) == [201, 201, 429]


async def test_callers_without_a_key_are_limited_by_the_address_that_the_proxy_tells(databases: Databases) -> None:
    async with desk_of(databases, access="proxy", anonymous_rate=2, proxies="127.0.0.0/8") as desk:
        assert await desk.statuses(3, forwarded="203.0.113.9, 192.0.2.1") == [201, 201, 429]
        assert await desk.statuses(1, forwarded="192.0.2.1, 203.0.113.9") == [201]
        assert await desk.statuses(2, forwarded="2001:db8::1") == [201, 201]
        assert await desk.statuses(1, forwarded="2001:db8::ffff:2") == [429]  # of the same /64
        assert await desk.statuses(1, forwarded="2001:db8:0:1::1") == [201]
        for unknown in ("", "somebody"):
            assert await desk.statuses(4, forwarded=unknown) == [201] * 4
        answer = await desk.order()
        assert "ratelimit" not in answer.headers


async def test_without_a_proxy_it_is_the_peer_s_and_off_counts_nobody(databases: Databases) -> None:
    async with desk_of(databases, access="open", anonymous_rate=2) as desk:
        assert await desk.statuses(3, forwarded="192.0.2.1") == [201, 201, 429]
    async with desk_of(databases, access="open", anonymous_rate="off") as desk:
        assert await desk.statuses(70) == [201] * 70


async def test_beyond_its_orders_a_client_gets_its_repeats_as_far_as_its_look_ups_go(databases: Databases) -> None:
    async with desk_of(databases, client_rate_per_minute=3) as desk:
        shop = desk.keys.add("other", *CLIENT_SCOPES)
        body = {"currency": "EUR", "amount": "7.00", "client_order_id": "a", "reference": "r", "metadata": {"x": "1"}}

        async def place(**changed: Any) -> httpx2.Response:
            given = body | changed
            headers = given.pop("headers", {})
            return await desk.call("create_buy_order", "POST", "/place_order/", shop, json=given, headers=headers)

        first = await place()
        assert first.status_code == 201
        assert await desk.statuses(2, shop) == [201, 201]
        again = await place(amount=7)
        assert (again.status_code, again.content) == (201, first.content)
        assert again.headers["idempotent-replayed"] == "true"
        assert again.headers["location"] == first.headers["location"]
        assert "ratelimit" not in again.headers
        reused = await place(amount=8)
        assert_problem(reused, 422, "idempotency_key_reused")
        assert reused.headers["ratelimit"].startswith('"lookups";r=1;t=')
        over = await place(client_order_id=None, headers={"Idempotency-Key": "b"})
        assert_problem(over, 429, "rate_limited")
        assert over.headers["ratelimit-policy"] == '"orders";q=3;w=60'
        # Its look-ups are used up now; an order that cannot be a repeat costs none.
        assert_problem(await place(), 429, "rate_limited")
        assert_problem(await desk.call(*KINDS["lookups"][0], shop), 429, "rate_limited")
        exposure = await desk.call("fetch_buy_orders", "GET", "/exposure", shop)
        assert exposure.json()["orders"] == 3


@pytest.mark.parametrize(
    "given",
    [
        {"json": {"currency": "EUR", "amount": "7.00"}},
        {"json": {"currency": "EUR", "amount": "x", "client_order_id": "a"}},
        {"content": b"{", "headers": {"Content-Type": "application/json"}},
        {"content": b"x" * 20_000, "headers": {"Content-Type": "application/json"}},
        {"content": b"x"},
    ],
)
async def test_beyond_its_orders_what_can_be_no_repeat_is_429_and_costs_no_look_up(
    databases: Databases, given: dict[str, Any]
) -> None:
    async with desk_of(databases, client_rate_per_minute=1) as desk:
        shop = desk.keys.add("other", *CLIENT_SCOPES)
        assert await desk.statuses(1, shop) == [201]
        assert_problem(await desk.call("create_buy_order", "POST", "/place_order/", shop, **given), 429, "rate_limited")
        assert (await desk.call(*KINDS["lookups"][0], shop)).status_code == 404


async def test_a_repeat_beyond_the_rate_is_looked_up_over_the_wire_too(databases: Databases) -> None:
    async with edges_of(databases) as desk:
        other = desk.keys.add("other", *CLIENT_SCOPES, client_rate_per_minute=1)
        headers = {"Idempotency-Key": "a"}
        first, again = [await desk.order(other, "one", headers=dict(headers)) for _ in range(2)]
        assert (first.status_code, again.status_code, again.content) == (201, 201, first.content)
        assert again.headers["idempotent-replayed"] == "true"
        other = desk.keys.add("third", *CLIENT_SCOPES, client_rate_per_minute=1)
        assert [(await desk.order(other, "one", headers=dict(headers))).status_code for _ in range(1)] == [201]
        assert_problem(await desk.order(other, "one", headers={"Idempotency-Key": "b"}), 429, "rate_limited")


async def test_a_repeat_beyond_the_rate_that_the_ledger_cannot_look_up_is_503(databases: Databases) -> None:
    async with edges_of(databases, has_ledger=False) as desk:
        other = desk.keys.add("other", *CLIENT_SCOPES, client_rate_per_minute=1)
        for _ in range(2):
            answer = await desk.order(other, "one", headers={"Idempotency-Key": "a"})
            assert_problem(answer, 503, "ledger_unavailable")
        assert_problem(await desk.order(other, "one"), 429, "rate_limited")


@pytest.mark.parametrize("has_redis", [False, True], ids=["memory", "redis"])
async def test_edges_count_together(databases: Databases, redis_url: str, has_redis: bool) -> None:
    async with edges_of(databases, redis_url if has_redis else None) as desk:
        other = desk.keys.add("other", "orders:create", client_rate_per_minute=20)
        assert await desk.statuses(15, other, service="one") == [201] * 15
        await reported(desk)
        assert (await desk.order(other, "two")).status_code == 201
        await reported(desk)
        assert await desk.statuses(6, other, service="two") == [201] * 4 + [429] * 2
        await reported(desk)
        # As the other learns with its next report: at worst it lets through what it would alone.
        assert (await desk.order(other, "one")).status_code == 201
        await reported(desk)
        assert await desk.statuses(3, other, service="one") == [429] * 3


async def test_without_redis_and_without_api_cache_proxy_it_is_still_limited_and_still_open(
    databases: Databases, open_directory: Path, redis_program: Path
) -> None:
    with locked(open_directory / "redis_of_rates") as directory:
        redis = EmbeddedRedis(directory, redis_program)
        await redis.start()
        async with edges_of(databases, redis.url) as desk:
            other = desk.keys.add("other", "orders:create", client_rate_per_minute=10)
            assert await desk.statuses(6, other, service="one") == [201] * 6
            await reported(desk)
            await redis.stop()
            # Its own it knows; what it reports now is counted in api_cache_proxy's memory.
            assert await desk.statuses(6, other, service="one") == [201] * 4 + [429] * 2
            await reported(desk)
            assert (await desk.order(other, "two")).status_code == 201
            await reported(desk)
            assert await desk.statuses(9, other, service="two") == [201] * 5 + [429] * 4
            limiter = desk.apps["two"].rates
            assert limiter is not None
            assert isinstance(limiter._store, RemoteRateStore)
            limiter._store._url = f"http://127.0.0.1:{free_port()}"
            third = desk.keys.add("third", "orders:create", client_rate_per_minute=10)
            assert await desk.statuses(12, third, service="two") == [201] * 10 + [429] * 2


def texts(count: int) -> list[Key]:
    return [new_key(livemode=False) for _ in range(count)]


async def test_guesses_are_stopped_before_they_are_looked_up_and_a_known_key_goes_on(databases: Databases) -> None:
    async with desk_of(databases, proxies="127.0.0.0/8") as desk:
        known, late = (desk.keys.add("other", *CLIENT_SCOPES) for _ in range(2))
        place = ("fetch_buy_orders", "GET", "/exposure")
        address = "2001:db8::1"
        assert (await desk.call(*place, known, forwarded=address)).status_code == 200
        answers = await asyncio.gather(*(desk.call(*place, key, forwarded=address) for key in texts(150)))
        statuses = [answer.status_code for answer in answers]
        assert 60 <= statuses.count(401) < 120
        assert statuses.count(401) + statuses.count(429) == 150
        asked = len(desk.keys.asked)
        refused = await desk.call(*place, texts(1)[0], forwarded="2001:db8::ffff:2")
        problem = assert_problem(refused, 429, "rate_limited")
        assert problem["policy"] == "guesses"
        assert int(refused.headers["retry-after"]) > 50
        assert refused.headers["ratelimit"].startswith('"guesses";r=0;t=')
        # One that is right and not known here waits with them: it cannot be told from theirs.
        assert (await desk.call(*place, late, forwarded=address)).status_code == 429
        assert len(desk.keys.asked) == asked
        assert (await desk.call(*place, known, forwarded=address)).status_code == 200
        assert (await desk.call(*place, late, forwarded="192.0.2.1")).status_code == 200
        assert (await desk.call(*place, late, forwarded=address)).status_code == 200
        counted = {"service": "fetch_buy_orders", "why": "rate"}
        refused_count = desk.apps["fetch_buy_orders"].registry.get_sample_value(
            "buydesk_callers_refused_total", counted
        )
        assert refused_count == statuses.count(429) + 2


async def test_many_clients_of_one_address_are_all_let_in_when_a_service_has_just_started(databases: Databases) -> None:
    async with desk_of(databases) as desk:
        keys = [desk.keys.add("other", *CLIENT_SCOPES, client_rate_per_minute=1000) for _ in range(150)]
        answers = await asyncio.gather(*(desk.call("fetch_buy_orders", "GET", "/exposure", key) for key in keys))
        assert {answer.status_code for answer in answers} == {200}


async def test_wrong_secrets_of_a_known_key_count_as_guesses_too(
    databases: Databases, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limiting, "GUESSES_PER_MINUTE", 2)
    async with desk_of(databases) as desk:
        known, [key, further] = desk.keys.add("other", *CLIENT_SCOPES), texts(2)
        desk.keys.stored[key.id] = desk.keys.stored[known.id]
        place = ("fetch_buy_orders", "GET", "/exposure")
        assert [(await desk.call(*place, key)).status_code for _ in range(3)] == [401] * 3
        assert (await desk.call(*place, further)).status_code == 429
        assert (await desk.call(*place, known)).status_code == 429  # not known here yet


async def test_a_ledger_that_is_away_makes_no_guess_of_a_key_and_unknown_addresses_have_no_limit(
    databases: Databases, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limiting, "GUESSES_PER_MINUTE", 2)
    async with desk_of(databases, proxies="127.0.0.0/8") as desk:
        key = desk.keys.add("other", *CLIENT_SCOPES)
        place = ("fetch_buy_orders", "GET", "/exposure")
        desk.keys.fault = LedgerUnavailable("away", retry_after_seconds=1)
        for _ in range(4):
            assert (await desk.call(*place, key, forwarded="192.0.2.1")).status_code == 503
        desk.keys.fault = None
        assert (await desk.call(*place, key, forwarded="192.0.2.1")).status_code == 200
        for wrong in texts(5):
            assert (await desk.call(*place, wrong)).status_code == 401
