"""Replicas of process_buy_orders deliver from one PostgreSQL: they share the endpoints, and double nothing."""

import asyncio
import contextlib
import json
import uuid
from collections import Counter, defaultdict
from collections.abc import Mapping

import pytest
from msgspec.structs import replace

from buydesk.backends.postgres.ledger import PostgresLedger
from buydesk.backends.postgres.life import PostgresLife
from buydesk.backends.postgres.webhooks import PostgresWebhooks
from buydesk.events import delivery
from buydesk.events.delivery import Answer, Deliverer
from buydesk.events.model import EVENT_TYPES, CreateWebhook, Webhook
from buydesk.events.signing import WebhookKeys
from buydesk.orders.life import Closing
from tests.builders import SIGNING_KEY, new_order, priced_order, record, settings
from tests.databases import Databases, as_db_proxy

PRICE = record(1000 * 10**8, ttl=3600)
CLIENTS = ("anonymous", "other", "third")
ORDERS = 60


class Out:
    """The way out of one replica: what reached which endpoint, for all replicas together, and by whom."""

    def __init__(self, name: str, got: dict[str, list[int]], by: Counter[str]) -> None:
        self._name, self._got, self._by = name, got, by
        self._at_once: set[str] = set()

    async def send(self, client: str, url: str, headers: Mapping[str, str], body: bytes) -> Answer:
        assert url not in self._at_once
        self._at_once.add(url)
        await asyncio.sleep(0.002)
        self._at_once.remove(url)
        self._got[url].append(json.loads(body)["data"]["sequence"])
        self._by[self._name] += 1
        return Answer("delivered", 200)

    async def close(self) -> None:
        pass


async def test_replicas_share_endpoints_and_each_event_is_sent_once(
    databases: Databases, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "TURN_SECONDS", 0.1)
    monkeypatch.setattr(delivery, "TURNS_AT_ONCE_MAX", 3)
    ledger = PostgresLedger(as_db_proxy(await databases.new()), settings(price_ttl_seconds=3600), livemode=False)
    store, life, keys = PostgresWebhooks(ledger), PostgresLife(ledger), WebhookKeys([SIGNING_KEY])
    got, by = defaultdict[str, list[int]](list), Counter[str]()
    hooks: list[Webhook] = []
    for number in range(9):
        url, client = f"https://{number}.example/", CLIENTS[number % 3]
        hooks.append(await store.change(CreateWebhook(client, uuid.uuid4(), url, EVENT_TYPES, "", keys.current)))
    replicas = [Deliverer(store, life, Out(name, got, by), keys) for name in ("one", "two", "three")]
    async with contextlib.AsyncExitStack() as stack:
        for replica in replicas:
            await stack.enter_async_context(replica.running())
        for client in CLIENTS:
            items = [priced_order(order=replace(new_order(100), client=client), price=PRICE) for _ in range(ORDERS)]
            await ledger.place(items, 5)
            for each in items:
                await life.close_orders([Closing(each.order.id, "settled", None)])
        async with asyncio.timeout(30):
            while sum(map(len, got.values())) < len(hooks) * 2 * ORDERS:
                await asyncio.sleep(0.02)
        await asyncio.sleep(0.5)
    assert dict(got) == {hook.url: list(range(1, 2 * ORDERS + 1)) for hook in hooks}
    assert set(by) == {"one", "two", "three"}
    for hook in hooks:
        assert (await store.webhook(hook.client, hook.id)).delivered == 2 * ORDERS
    await ledger.close()
