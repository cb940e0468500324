"""Webhooks at process_buy_orders over real TCP, in the model of a ledger: clients' endpoints, and what reaches them."""

import asyncio
import contextlib
import json
import shutil
import subprocess
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx2
import pytest
from aiohttp import web
from msgspec.structs import replace

from buydesk.backends.memory.reports import MemoryReportStore
from buydesk.clients.cache import KeyCache
from buydesk.errors import LedgerUnavailable
from buydesk.events import delivery
from buydesk.events.delivery import RETRY_SECONDS, Answer, Deliverer
from buydesk.events.model import EVENT_TYPES, WEBHOOKS_MAX, CreateWebhook, Webhook
from buydesk.http.webhooks import Webhooks
from buydesk.observability.reporter import Reporter
from buydesk.orders.life import Closing
from buydesk.orders.model import Order
from buydesk.services import process_buy_orders
from buydesk.times import utc_now
from tests.builders import new_order, priced_order, record, settings
from tests.callers import KEYS, key
from tests.endpoints import Endpoint, Message, Respond, delivering, endpoint
from tests.logged import logged
from tests.model_ledger import ModelLedger
from tests.model_webhooks import ModelWebhooks
from tests.problems import assert_problem
from tests.serving import served
from tests.signatures import valid_signatures

PRICE = record(1000 * 10**8, ttl=3600)
FAST = [0.01] * 9


@dataclass
class Desk:
    ledger: ModelLedger
    store: ModelWebhooks
    webhooks: Webhooks
    client: httpx2.AsyncClient
    metrics: Callable[[str], float | None]

    async def place(self, orders: int = 1, client: str = "other") -> list[Order]:
        items = [priced_order(order=replace(new_order(100), client=client), price=PRICE) for _ in range(orders)]
        await self.ledger.place(items, 1)
        return self.ledger.stored[-orders:]

    async def settle(self, order: Order) -> None:
        await self.ledger.close_orders([Closing(order.id, "settled", "bank-7")])

    async def create(self, url: str, client: str = "other", **given: Any) -> dict[str, Any]:
        answer = await self.client.post("/webhooks", json={"url": url} | given, headers=key(client))
        assert answer.status_code == 201, answer.text
        document: dict[str, Any] = answer.json()
        return document

    async def get(self, path: str, client: str = "other") -> Any:
        answer = await self.client.get(f"/webhooks{path}", headers=key(client))
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def post(self, path: str, document: object = None, client: str = "other") -> httpx2.Response:
        return await self.client.post(f"/webhooks{path}", json=document, headers=key(client))

    async def patch(self, path: str, client: str = "other", **given: Any) -> httpx2.Response:
        return await self.client.patch(f"/webhooks{path}", json=given, headers=key(client))

    async def until(self, hook: dict[str, Any], **expected: Any) -> dict[str, Any]:
        """The endpoint, once its document has these members."""
        async with asyncio.timeout(15):
            while True:
                found: dict[str, Any] = await self.get(f"/{hook['id']}")
                if found | expected == found:
                    return found
                await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def desk_with(**more: Any) -> AsyncIterator[Desk]:
    ledger = ModelLedger()
    store = ModelWebhooks(ledger)
    given = settings(access="keys")
    reporter = Reporter("process_buy_orders", MemoryReportStore(given), given)
    async with contextlib.AsyncExitStack() as stack:
        webhooks = await stack.enter_async_context(delivering(ledger, store, given, **more))
        check: Any = ledger.check
        app = process_buy_orders.create_app(given, ledger, check, reporter, webhooks)
        app.keys = KeyCache(KEYS, given)
        url = await stack.enter_async_context(served(app, settings=given))
        client = await stack.enter_async_context(httpx2.AsyncClient(base_url=url, timeout=20))
        yield Desk(ledger, store, webhooks, client, app.registry.get_sample_value)


@pytest.fixture(autouse=True)
def look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(delivery, "LOOK_AT_ALL_SECONDS", 0.1)


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    async with desk_with(retry_seconds=FAST) as running:
        yield running


@pytest.fixture
async def hook_at() -> AsyncIterator[Endpoint]:
    async with endpoint() as running:
        yield running


def sequences(messages: list[Message]) -> list[int]:
    return [each.sequence for each in messages]


def answering(*statuses: int, headers: dict[str, str] | None = None) -> Respond:
    """Answers so one after the other, and then with 204."""
    left = list(statuses)

    async def respond(_: web.Request) -> web.StreamResponse:
        return web.Response(status=left.pop(0) if left else 204, headers=headers)

    return respond


async def test_endpoint_is_made_shown_changed_and_deleted(desk: Desk, hook_at: Endpoint) -> None:
    made = await desk.create(hook_at.url, description="the shop's books", events=["order.settled", "order.placed"])
    secret = made.pop("secret")
    assert secret.startswith("whsec_")
    created_at = made.pop("created_at")
    assert created_at.endswith("Z")
    assert made == {
        "id": made["id"],
        "url": hook_at.url,
        "events": ["order.placed", "order.settled"],
        "description": "the shop's books",
        "enabled": True,
        "disabled_reason": None,
        "delivered_up_to": 0,
        "failures": 0,
        "next_attempt_at": None,
    }
    shown = made | {"created_at": created_at}
    assert await desk.get("") == {"data": [shown]}
    assert await desk.get(f"/{made['id']}") == shown
    changed = await desk.patch(f"/{made['id']}", description="", enabled=False)
    assert changed.json() == shown | {"description": "", "enabled": False, "disabled_reason": "client"}
    deleted = await desk.client.delete(f"/webhooks/{made['id']}", headers=key("other"))
    assert deleted.json() == changed.json()
    assert await desk.get("") == {"data": []}


async def test_endpoint_of_another_client_does_not_exist(desk: Desk, hook_at: Endpoint) -> None:
    made = await desk.create(hook_at.url)
    path = f"/{made['id']}"
    assert await desk.get("", client="third") == {"data": []}
    for answer in (
        await desk.client.get(f"/webhooks{path}", headers=key("third")),
        await desk.client.get(f"/webhooks{path}/deliveries", headers=key("third")),
        await desk.client.delete(f"/webhooks{path}", headers=key("third")),
        await desk.patch(path, "third", enabled=False),
        await desk.post(f"{path}/rotate_secret", client="third"),
        await desk.post(f"{path}/test", client="third"),
        await desk.post(f"{path}/redeliver", {"after": 0}, client="third"),
        await desk.post(f"/{uuid.uuid4()}/test"),
    ):
        assert_problem(answer, 404, "webhook_not_found")
    assert hook_at.got == []


@pytest.mark.parametrize(
    ("given", "member"),
    [
        ({}, "url"),
        ({"url": 7}, "url"),
        ({"url": "http://shop.example"}, "url"),
        ({"url": "https://shop.example", "events": []}, "events"),
        ({"url": "https://shop.example", "events": ["order.paid"]}, "events"),
        ({"url": "https://shop.example", "events": "order.placed"}, "events"),
        ({"url": "https://shop.example", "description": "a\nb"}, "description"),
        ({"url": "https://shop.example", "description": "x" * 257}, "description"),
        ({"url": "https://shop.example", "enabled": True}, "enabled"),
        ({"url": "https://shop.example", "secret": "whsec_"}, "secret"),
    ],
)
async def test_what_is_wrong_with_an_endpoint_is_named(desk: Desk, given: dict[str, Any], member: str) -> None:
    answer = await desk.post("", given)
    assert [each["member"] for each in assert_problem(answer, 422, "invalid_request")["errors"]] == [member]


async def test_what_is_wrong_with_a_change_or_an_id_is_named(desk: Desk, hook_at: Endpoint) -> None:
    made = await desk.create(hook_at.url)
    for answer in (
        await desk.patch(f"/{made['id']}", enabled="yes"),
        await desk.patch(f"/{made['id']}", url=None),
        await desk.patch("/7", enabled=True),
        await desk.post("/7/test"),
        await desk.post(f"/{made['id']}/redeliver", {}),
        await desk.post(f"/{made['id']}/redeliver", {"event": "x", "after": 1}),
        await desk.post(f"/{made['id']}/redeliver", {"event": f"{uuid.uuid4()}.paid"}),
        await desk.post(f"/{made['id']}/redeliver", {"after": -1}),
        await desk.post(f"/{made['id']}/redeliver", {"after": "0"}),
        await desk.post(f"/{made['id']}/redeliver", {"after": 1}),
    ):
        assert_problem(answer, 422, "invalid_request")


async def test_client_has_so_many_endpoints_at_most(desk: Desk, hook_at: Endpoint) -> None:
    for _ in range(WEBHOOKS_MAX):
        await desk.create(hook_at.url)
    assert_problem(await desk.post("", {"url": hook_at.url}), 409, "too_many_webhooks")


async def test_events_arrive_in_order_signed_and_as_the_list_of_events_has_them(desk: Desk, hook_at: Endpoint) -> None:
    await desk.place(2)
    made = await desk.create(hook_at.url)
    [order] = await desk.place()
    await desk.place(1, "third")
    await desk.settle(order)
    messages = await hook_at.until_taken(2)
    listed = await desk.client.get("/events?after=2", headers=key("other"))
    told = listed.json()["data"]
    assert [each["type"] for each in told] == ["order.placed", "order.settled"]
    for message, event in zip(messages, told, strict=True):
        document = message.document
        assert document == {"type": event["type"], "timestamp": event["created_at"], "data": event}
        assert message.headers["webhook-id"] == event["id"]
        assert abs(int(message.headers["webhook-timestamp"]) - time.time()) < 60
        assert valid_signatures(made["secret"], message.headers, message.body) == 1
        assert message.headers["content-type"] == "application/json"
        assert message.path == "/hook?token=hunter2"
    await desk.until(made, delivered_up_to=4)
    noted = (await desk.get(f"/{made['id']}/deliveries"))["data"]
    assert [(each["number"], each["event"], each["sequence"]) for each in noted] == [
        (2, told[1]["id"], 4),
        (1, told[0]["id"], 3),
    ]
    assert {(each["outcome"], each["status"], each["attempt"]) for each in noted} == {("delivered", 204, 1)}
    assert desk.metrics("buydesk_webhook_deliveries_total", {"outcome": "delivered"}) == 2  # type: ignore[call-arg]
    assert desk.metrics("buydesk_webhook_lag_seconds_count") == 2
    assert (await desk.get(f"/{made['id']}/deliveries?before=2&limit=1"))["data"] == noted[1:]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is missing")
async def test_signature_is_what_openssl_makes_of_it(desk: Desk, hook_at: Endpoint, tmp_path: Path) -> None:
    made = await desk.create(hook_at.url)
    await desk.place()
    [message] = await hook_at.until_taken(1)
    secret, signed = tmp_path / "secret", tmp_path / "signed"
    signed.write_bytes(
        f"{message.headers['webhook-id']}.{message.headers['webhook-timestamp']}.".encode() + message.body
    )
    secret.write_text(made["secret"].removeprefix("whsec_"))

    def said(*command: str) -> bytes:
        return subprocess.run(command, capture_output=True, check=True).stdout  # noqa: S603  # ours

    hexkey = (await asyncio.to_thread(said, "openssl", "base64", "-d", "-A", "-in", str(secret))).hex()
    mac = await asyncio.to_thread(
        said, *("openssl", "dgst", "-sha256", "-mac", "HMAC", "-macopt", f"hexkey:{hexkey}", "-binary", str(signed))
    )
    (tmp_path / "mac").write_bytes(mac)
    text = await asyncio.to_thread(said, "openssl", "base64", "-A", "-in", str(tmp_path / "mac"))
    assert message.headers["webhook-signature"] == f"v1,{text.decode().strip()}"


async def test_body_stays_below_20_kilobytes_whatever_the_client_put_into_its_order(
    desk: Desk, hook_at: Endpoint
) -> None:
    await desk.create(hook_at.url)
    wide = "\U0001f600"
    metadata = json.dumps({"k": "\x01" * 338})  # six characters each
    assert 2000 < len(metadata) <= 2048
    order = replace(new_order(100), client="other", reference=wide * 128, metadata=metadata)
    await desk.ledger.place([priced_order(order=order, price=PRICE)], 1)
    await desk.ledger.close_orders([Closing(order.id, "cancelled", wide * 500)])
    messages = await hook_at.until_taken(2)
    assert max(len(each.body) for each in messages) < 20_000


async def test_only_events_that_are_wanted_are_sent_and_the_others_are_passed_over(
    desk: Desk, hook_at: Endpoint
) -> None:
    made = await desk.create(hook_at.url, events=["order.settled"])
    orders = await desk.place(120)
    await desk.settle(orders[-1])
    assert sequences(await hook_at.until_taken(1)) == [121]
    await desk.until(made, delivered_up_to=121)
    async with asyncio.timeout(5):
        while desk.metrics("buydesk_webhook_events_waiting") != 0:
            await asyncio.sleep(0.02)
    await desk.place(delivery.EVENTS_AT_ONCE)
    await desk.until(made, delivered_up_to=121 + delivery.EVENTS_AT_ONCE)
    assert len(hook_at.got) == 1


async def test_event_that_fails_is_sent_again_before_those_after_it(desk: Desk, hook_at: Endpoint) -> None:
    hook_at.respond = answering(204, 500, 302, 404)
    made = await desk.create(hook_at.url)
    await desk.place(3)
    await hook_at.until_taken(3)
    assert sequences(hook_at.got) == [1, 2, 2, 2, 2, 3]
    await desk.until(made, delivered_up_to=3, failures=0)
    noted = (await desk.get(f"/{made['id']}/deliveries"))["data"][::-1]
    assert [(each["sequence"], each["attempt"], each["status"]) for each in noted] == [
        (1, 1, 204),
        (2, 1, 500),
        (2, 2, 302),
        (2, 3, 404),
        (2, 4, 204),
        (3, 1, 204),
    ]
    assert {each["outcome"] for each in noted[1:4]} == {"rejected"}


async def test_endpoint_that_never_takes_an_event_is_disabled_and_goes_on_when_it_is_enabled(
    desk: Desk, hook_at: Endpoint
) -> None:
    hook_at.respond = answering(*[500] * 10)
    made = await desk.create(hook_at.url)
    await desk.place(2)
    shown = await desk.until(made, enabled=False, disabled_reason="failing")
    assert (shown["failures"], shown["delivered_up_to"], shown["next_attempt_at"]) == (10, 0, None)
    assert sequences(hook_at.got) == [1] * 10
    await desk.place(1)
    answer = await desk.patch(f"/{made['id']}", enabled=True)
    assert (answer.json()["enabled"], answer.json()["failures"]) == (True, 0)
    assert sequences(await hook_at.until_taken(3)) == [1, 2, 3]


async def test_endpoint_that_is_gone_is_disabled_at_once(desk: Desk, hook_at: Endpoint) -> None:
    hook_at.respond = answering(410)
    made = await desk.create(hook_at.url)
    await desk.place(2)
    await desk.until(made, enabled=False, disabled_reason="gone", delivered_up_to=0)
    assert len(hook_at.got) == 1


@pytest.mark.parametrize(
    ("status", "said", "least", "most"),
    [
        (500, "3600", 5, 6),
        (429, "3600", 3600, 4320),
        (503, "3600", 3600, 4320),
        (429, "1", 5, 6),
        (429, "9999999", 86_400, 103_680),
        (429, "soon", 5, 6),
        (503, "Sat, 01 Jan 2022 00:00:00 GMT", 5, 6),
        (503, "in an hour", 3550, 4320),
        (400, "", 5, 6),
    ],
)
async def test_retry_after_is_kept_to_within_bounds(status: int, said: str, least: int, most: int) -> None:
    if said == "in an hour":
        said = (utc_now() + timedelta(hours=1)).strftime("%a, %d %b %Y %H:%M:%S GMT")
    async with endpoint(answering(status, headers={"Retry-After": said})) as at, desk_with() as desk:
        made = await desk.create(at.url)
        await desk.place()
        shown = await desk.until(made, failures=1)
        due = desk.store.stored[uuid.UUID(made["id"])].due_at - utc_now()
        assert least - 5 <= due.total_seconds() <= most
        assert shown["next_attempt_at"] is not None


async def test_retries_take_three_days_and_are_spread(desk: Desk) -> None:
    assert len(RETRY_SECONDS) == 9
    assert 72 * 3600 < sum(RETRY_SECONDS) < 80 * 3600


async def test_endpoint_that_is_slow_or_dead_keeps_no_other_waiting(desk: Desk, hook_at: Endpoint) -> None:
    async def slow(_: web.Request) -> web.StreamResponse:
        await asyncio.sleep(0.5)
        return web.Response(status=204)

    async def dead(_: web.Request) -> web.StreamResponse:
        await asyncio.sleep(3600)
        raise AssertionError("unreachable")

    async with endpoint(slow) as slow_at, endpoint(dead) as dead_at:
        await desk.create(slow_at.url)
        await desk.create(dead_at.url)
        await desk.create(hook_at.url)
        await desk.place(30)
        started = time.monotonic()
        await hook_at.until_taken(30, seconds=5)
        assert time.monotonic() - started < 3
        assert len(slow_at.taken) < 10
        assert (len(dead_at.got), len(dead_at.taken)) == (1, 0)


async def test_rotated_secret_signs_beside_the_new_one(desk: Desk, hook_at: Endpoint) -> None:
    made = await desk.create(hook_at.url)
    rotated = (await desk.post(f"/{made['id']}/rotate_secret")).json()
    assert rotated["secret"] != made["secret"]
    await desk.place()
    [message] = await hook_at.until_taken(1)
    for secret in (made["secret"], rotated["secret"]):
        assert valid_signatures(secret, message.headers, message.body) == 1
    assert len(message.headers["webhook-signature"].split(" ")) == 2
    stored = desk.store.stored[uuid.UUID(made["id"])]
    ended = replace(stored.secrets[1], ends_at=utc_now() - timedelta(seconds=1))
    assert ended.ends_at is not None
    desk.store.stored[stored.id] = replace(stored, secrets=[stored.secrets[0], ended])
    await desk.until(made, delivered_up_to=1)
    desk.store.stored[stored.id] = replace(desk.store.stored[stored.id], secrets=[stored.secrets[0], ended])
    await desk.place()
    message = (await hook_at.until_taken(2))[1]
    assert valid_signatures(made["secret"], message.headers, message.body) == 0
    assert valid_signatures(rotated["secret"], message.headers, message.body) == 1


async def test_test_is_sent_at_once_and_tells_what_came_of_it(desk: Desk, hook_at: Endpoint) -> None:
    made = await desk.create(hook_at.url)
    hook_at.respond = answering(418)
    answer = (await desk.post(f"/{made['id']}/test")).json()
    assert (answer["outcome"], answer["status"], answer["type"], answer["sequence"]) == (
        *("rejected", 418),
        *("webhook.test", None),
    )
    [message] = hook_at.got
    assert message.document["type"] == "webhook.test"
    assert message.document["data"] == {"webhook": made["id"]}
    assert message.headers["webhook-id"] == answer["event"]
    assert valid_signatures(made["secret"], message.headers, message.body) == 1
    assert [each["event"] for each in (await desk.get(f"/{made['id']}/deliveries"))["data"]] == [answer["event"]]


async def test_one_event_is_delivered_again_or_all_since_a_number(desk: Desk, hook_at: Endpoint) -> None:
    made = await desk.create(hook_at.url)
    orders = await desk.place(4)
    await desk.settle(orders[0])
    await hook_at.until_taken(5)
    await desk.until(made, delivered_up_to=5)
    answer = await desk.post(f"/{made['id']}/redeliver", {"event": f"{orders[0].id}.settled"})
    assert (answer.json()["outcome"], answer.json()["sequence"]) == ("delivered", 5)
    assert hook_at.got[5].body == hook_at.got[4].body
    again = await desk.post(f"/{made['id']}/redeliver", {"after": 3})
    assert again.json()["delivered_up_to"] == 3
    assert sequences((await hook_at.until_taken(8))[6:]) == [4, 5]
    for missing in (f"{orders[1].id}.settled", f"{uuid.uuid4()}.placed"):
        answer = await desk.post(f"/{made['id']}/redeliver", {"event": missing})
        assert_problem(answer, 404, "event_not_found")
    [foreign] = await desk.place(1, "third")
    answer = await desk.post(f"/{made['id']}/redeliver", {"event": f"{foreign.id}.placed"})
    assert_problem(answer, 404, "event_not_found")


async def test_secret_of_a_key_that_is_lost_is_told_and_rotated(desk: Desk, hook_at: Endpoint) -> None:
    made = await desk.create(hook_at.url)
    stored = desk.store.stored[uuid.UUID(made["id"])]
    strange = [replace(stored.secrets[0], key="0" * 16)]
    desk.store.stored[stored.id] = replace(stored, secrets=strange)
    await desk.place()
    [order] = desk.ledger.stored
    assert_problem(await desk.post(f"/{made['id']}/test"), 409, "webhook_key_lost")
    answer = await desk.post(f"/{made['id']}/redeliver", {"event": f"{order.id}.placed"})
    assert_problem(answer, 409, "webhook_key_lost")
    async with asyncio.timeout(5):
        while desk.metrics("buydesk_webhooks_without_key") != 1:
            await asyncio.sleep(0.02)
    rotated = (await desk.post(f"/{made['id']}/rotate_secret")).json()
    [message] = await hook_at.until_taken(1)
    assert valid_signatures(rotated["secret"], message.headers, message.body) == 1
    assert len(message.headers["webhook-signature"].split(" ")) == 1  # the lost one cannot sign


async def test_one_message_that_was_asked_for_is_on_its_way_to_an_endpoint_at_a_time(
    desk: Desk, hook_at: Endpoint
) -> None:
    answered = asyncio.Event()

    async def respond(_: web.Request) -> web.StreamResponse:
        await answered.wait()
        return web.Response(status=204)

    hook_at.respond = respond
    made, other = await desk.create(hook_at.url), await desk.create(hook_at.url)
    first = asyncio.create_task(desk.post(f"/{made['id']}/test"))
    await hook_at.until_got(1)
    assert_problem(await desk.post(f"/{made['id']}/test"), 409, "webhook_busy")
    second = asyncio.create_task(desk.post(f"/{other['id']}/test"))
    await hook_at.until_got(2)
    answered.set()
    assert {(await each).json()["outcome"] for each in (first, second)} == {"delivered"}
    assert (await desk.post(f"/{made['id']}/test")).json()["outcome"] == "delivered"


async def test_delivery_waits_for_a_ledger_that_is_away_and_says_so_once(desk: Desk, hook_at: Endpoint) -> None:
    await desk.create(hook_at.url)
    with logged() as lines:
        desk.store.fault = LedgerUnavailable("away", retry_after_seconds=1)
        await desk.place(3)
        await asyncio.sleep(0.5)
        desk.store.fault = None
        await hook_at.until_taken(3)
    assert [each["message"] for each in lines if "webhooks wait" in each["message"]] == [
        "webhooks wait for the ledger: away"
    ]
    assert sequences(hook_at.got) == [1, 2, 3]


async def test_what_cannot_be_stored_is_tried_again_before_it_is_delivered_again(
    desk: Desk, hook_at: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "REPORT_PAUSE_SECONDS", 0.05)

    async def respond(_: web.Request) -> web.StreamResponse:
        desk.store.fault = LedgerUnavailable("away", retry_after_seconds=1) if len(hook_at.got) == 3 else None
        asyncio.get_running_loop().call_later(0.2, setattr, desk.store, "fault", None)
        return web.Response(status=204)

    hook_at.respond = respond
    made = await desk.create(hook_at.url)
    await desk.place(3)
    await hook_at.until_taken(3)
    await asyncio.sleep(0.3)
    await desk.until(made, delivered_up_to=3)
    assert sequences(hook_at.got) == [1, 2, 3]


async def test_turn_whose_lease_is_lost_delivers_nothing_more(desk: Desk, hook_at: Endpoint) -> None:
    """Another replica took the endpoint: what this one delivered meanwhile does not count, and comes again."""

    async def respond(_: web.Request) -> web.StreamResponse:
        if len(hook_at.got) == 1:
            for lease in desk.store.leases.values():
                lease.id, lease.until = uuid.uuid4(), utc_now() + timedelta(seconds=0.5)
        return web.Response(status=204)

    hook_at.respond = respond
    await desk.create(hook_at.url)
    await desk.place(2)
    await hook_at.until_taken(4)
    assert sequences(hook_at.got) == [1, 2, 1, 2]


class Sender:
    """Keeps what is sent; `meanwhile` happens before each answer."""

    def __init__(self, meanwhile: Callable[[int], Awaitable[object]] | None = None) -> None:
        self.sent: list[int] = []
        self.meanwhile = meanwhile

    async def send(self, client: str, url: str, headers: object, body: bytes) -> Answer:
        self.sent.append(json.loads(body)["data"]["sequence"])
        if self.meanwhile is not None:
            await self.meanwhile(self.sent[-1])
        return Answer("delivered", 200)

    async def close(self) -> None:
        pass


async def started(sender: Sender, events: int = 3, **more: Any) -> tuple[Deliverer, ModelWebhooks, Webhook]:
    """A deliverer by itself, and an endpoint of `other` with events."""
    async with delivering(ModelLedger()) as made:
        keys = made.keys
    ledger = ModelLedger()
    store = ModelWebhooks(ledger)
    deliverer = Deliverer(store, ledger, sender, keys, **more)
    hook = await store.change(
        CreateWebhook("other", uuid.uuid4(), "https://shop.example", EVENT_TYPES, "", keys.current)
    )
    items = [priced_order(order=replace(new_order(100), client="other"), price=PRICE) for _ in range(events)]
    await ledger.place(items, 1)
    return deliverer, store, hook


async def until_delivered(store: ModelWebhooks, hook: Webhook, count: int) -> None:
    async with asyncio.timeout(10):
        while store.stored[hook.id].delivered < count:
            await asyncio.sleep(0.01)


async def test_lease_is_renewed_for_as_long_as_a_turn_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "LEASE_SECONDS", 0.4)
    monkeypatch.setattr(delivery, "RENEW_SECONDS", 0.1)
    sender = Sender(lambda _: asyncio.sleep(0.5))
    deliverer, store, hook = await started(sender)
    async with deliverer.running():
        await until_delivered(store, hook, 3)
    assert sender.sent == [1, 2, 3]


async def test_turn_ends_when_its_lease_cannot_be_renewed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "LEASE_SECONDS", 0.4)
    monkeypatch.setattr(delivery, "RENEW_SECONDS", 0.05)
    sender = Sender()
    deliverer, store, hook = await started(sender)

    async def meanwhile(sequence: int) -> None:
        if len(sender.sent) == 1:
            store.fault = LedgerUnavailable("away", retry_after_seconds=1)
            await asyncio.sleep(0.6)
            assert await store.ledger.events("other", 0, 1)

    sender.meanwhile = meanwhile
    async with deliverer.running():
        async with asyncio.timeout(5):
            while not sender.sent:
                await asyncio.sleep(0.01)
        await asyncio.sleep(1)
        assert sender.sent == [1]
        store.fault = None
        await until_delivered(store, hook, 3)
    assert sender.sent == [1, 1, 2, 3]


async def test_endpoint_that_comes_again_before_its_turn_has_ended_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lease ended by the ledger's clock, and nobody noticed here: no two turns of one endpoint at a time."""
    monkeypatch.setattr(delivery, "LEASE_SECONDS", 30.0)
    sender = Sender()
    deliverer, store, hook = await started(sender, 2)
    at_once: list[int] = []
    under_way = 0

    async def meanwhile(sequence: int) -> None:
        nonlocal under_way
        under_way += 1
        at_once.append(under_way)
        if len(sender.sent) == 1:
            store.leases[hook.id].until = utc_now()
            await asyncio.sleep(0.5)
            store.leases[hook.id].until = utc_now()
        under_way -= 1

    sender.meanwhile = meanwhile
    async with deliverer.running():
        await until_delivered(store, hook, 2)
    assert set(at_once) == {1}


async def test_turn_of_many_events_makes_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "TURN_SECONDS", 0.1)
    monkeypatch.setattr(delivery, "REPORT_SECONDS", 0.05)
    monkeypatch.setattr(delivery, "TURNS_AT_ONCE_MAX", 1)
    sender = Sender(lambda _: asyncio.sleep(0.01))
    deliverer, store, hook = await started(sender, 100)
    second = await store.change(
        CreateWebhook("third", uuid.uuid4(), "https://b.example", EVENT_TYPES, "", hook.secrets[0].key)
    )
    items = [priced_order(order=replace(new_order(100), client="third"), price=PRICE) for _ in range(3)]
    await store.ledger.place(items, 1)
    async with deliverer.running():
        await until_delivered(store, second, 3)
        assert store.stored[hook.id].delivered < 100
        await until_delivered(store, hook, 100)
    assert [each.sequence for each in store.noted[hook.id]] == list(range(1, 101))


async def test_end_lets_what_is_under_way_be_finished_and_begins_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    sender = Sender(lambda _: asyncio.sleep(0.3))
    deliverer, store, hook = await started(sender)
    async with deliverer.running(), asyncio.timeout(5):
        while not sender.sent:
            await asyncio.sleep(0.01)
    assert sender.sent == [1]
    assert store.stored[hook.id].delivered == 1
    monkeypatch.setattr(delivery, "END_SECONDS", 0.1)
    hanging, store, hook = await started(Sender(lambda _: asyncio.sleep(3600)))
    async with hanging.running():
        await asyncio.sleep(0.3)
    assert store.stored[hook.id].delivered == 0


async def test_nothing_is_begun_once_the_service_is_stopping() -> None:
    sender, stopping = Sender(), asyncio.Event()
    deliverer, store, hook = await started(sender)
    stopping.set()
    async with deliverer.running(stopping):
        await asyncio.sleep(0.3)
    assert sender.sent == []
    assert store.stored[hook.id].delivered == 0


async def test_fault_of_a_turn_or_a_look_is_logged_and_ends_nothing_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sender = Sender()
    deliverer, store, hook = await started(sender, 1)
    wrong: list[Any] = [ValueError("of the sender")]

    async def meanwhile(_: int) -> None:
        if wrong:
            raise wrong.pop()

    sender.meanwhile = meanwhile
    looked: list[int] = []
    totals = store.totals

    async def totals_once(keys: Any) -> Any:
        looked.append(1)
        if len(looked) == 1:
            raise ValueError("of the look")
        return await totals(keys)

    monkeypatch.setattr(store, "totals", totals_once)
    async with deliverer.running():
        async with asyncio.timeout(5):
            while not sender.sent:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        store.leases[hook.id].until = utc_now()
        await until_delivered(store, hook, 1)
    assert [each.message for each in caplog.records if each.levelname == "ERROR"] == [
        "webhooks cannot be looked at",
        f"a turn of the webhook {hook.id} failed",
    ]


async def test_nothing_is_asked_of_the_ledger_when_nobody_has_an_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = ModelLedger()
    asked: list[str] = []
    store = ModelWebhooks(ledger)
    take, last = store.take, ledger.last_events

    async def counted_take(*given: Any) -> Any:
        asked.append("take")
        return await take(*given)

    async def counted_last(clients: Any) -> Any:
        asked.append("last")
        return await last(clients)

    monkeypatch.setattr(store, "take", counted_take)
    monkeypatch.setattr(ledger, "last_events", counted_last)
    async with delivering(ledger, store) as made, made.deliverer.running():
        await asyncio.sleep(0.55)
    assert "last" not in asked
    assert len(asked) <= 7


@pytest.mark.parametrize("wrong", [LedgerUnavailable("away", retry_after_seconds=1), ValueError("of the ledger")])
async def test_lease_of_a_turn_that_broke_off_ends_while_other_turns_of_the_replica_go_on(
    monkeypatch: pytest.MonkeyPatch, wrong: Exception
) -> None:
    monkeypatch.setattr(delivery, "LEASE_SECONDS", 0.5)
    monkeypatch.setattr(delivery, "RENEW_SECONDS", 0.1)
    sender = Sender(lambda sequence: asyncio.sleep(0.3 if sequence <= 20 else 0))
    deliverer, store, _ = await started(sender, 20)
    events, broken = store.ledger.events, [wrong]

    async def events_but_once(client: str, after: int, limit: int) -> Any:
        if client == "third" and broken:
            raise broken.pop()
        return await events(client, after, limit)

    monkeypatch.setattr(store.ledger, "events", events_but_once)
    async with deliverer.running():
        async with asyncio.timeout(5):
            while not sender.sent:
                await asyncio.sleep(0.01)
        url, key_name = "https://b.example", deliverer._keys.current
        victim = await store.change(CreateWebhook("third", uuid.uuid4(), url, EVENT_TYPES, "", key_name))
        items = [priced_order(order=replace(new_order(100), client="third"), price=PRICE) for _ in range(1)]
        await store.ledger.place(items, 1)
        async with asyncio.timeout(3):
            await until_delivered(store, victim, 1)
    assert broken == []


async def test_renewal_that_fails_in_a_way_that_nobody_expected_is_logged_and_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(delivery, "LEASE_SECONDS", 0.6)
    monkeypatch.setattr(delivery, "RENEW_SECONDS", 0.1)
    sender = Sender(lambda _: asyncio.sleep(0.8))
    deliverer, store, hook = await started(sender, 2)
    renew, wrong = store.renew, [ValueError("of the store")]

    async def renew_but_once(*given: Any) -> Any:
        if wrong:
            raise wrong.pop()
        return await renew(*given)

    monkeypatch.setattr(store, "renew", renew_but_once)
    async with deliverer.running():
        await until_delivered(store, hook, 2)
    assert sender.sent == [1, 2]
    assert [each.message for each in caplog.records if each.levelname == "ERROR"] == [
        "leases of webhooks cannot be renewed"
    ]


async def test_event_that_failed_and_is_not_wanted_any_more_counts_as_no_failure_of_the_next() -> None:
    deliverer, store, hook = await started(Sender(), 1)
    [order] = store.ledger.stored
    await store.ledger.close_orders([Closing(order.id, "settled", None)])
    store.stored[hook.id] = replace(hook, events=["order.settled"], failures=3)
    async with deliverer.running():
        await until_delivered(store, hook, 2)
    assert [(each.sequence, each.attempt) for each in store.noted[hook.id]] == [(2, 1)]
