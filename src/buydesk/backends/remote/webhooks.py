"""Webhooks at db_proxy."""

import uuid
from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar, Literal

from buydesk.backends.remote import RemoteService
from buydesk.errors import LedgerUnavailable
from buydesk.events.model import AnyWebhookChange, Delivery, Totals, Turn, Webhook, WebhookStore
from buydesk.orders.life import Closed
from buydesk.reading import read


class RemoteWebhooks(RemoteService, WebhookStore):
    """The endpoints at db_proxy."""

    service = "db_proxy"
    unavailable = LedgerUnavailable
    tokens: ClassVar = dict.fromkeys(("GET", "POST"), "processing_tokens")

    async def change(self, change: AnyWebhookChange) -> Webhook:
        return await self.ask_once(lambda document: read(Webhook, document), "/webhooks/changes", body=change)

    async def webhooks(self, client: str) -> Sequence[Webhook]:
        return await self.read(lambda document: read(list[Webhook], document["data"]), "/webhooks", client=client)

    async def webhook(self, client: str, webhook_id: uuid.UUID) -> Webhook:
        return await self.read(lambda document: read(Webhook, document), f"/webhooks/{webhook_id}", client=client)

    async def deliveries(self, client: str, webhook_id: uuid.UUID, before: int, limit: int) -> Sequence[Delivery]:
        path, bounds = f"/webhooks/{webhook_id}/deliveries", {"before": before, "limit": limit}
        return await self.read(lambda document: read(list[Delivery], document["data"]), path, client=client, **bounds)

    async def note_delivery(self, webhook_id: uuid.UUID, delivery: Delivery) -> None:
        await self.ask_once(lambda _: None, f"/webhooks/{webhook_id}/deliveries", body=delivery)

    async def sequence_of(self, client: str, order_id: uuid.UUID, what: Literal["placed"] | Closed) -> int | None:
        path, asked = f"/events/{order_id}", {"client": client, "what": what}
        return await self.read(lambda document: read(int | None, document["sequence"]), path, **asked)  # type: ignore[arg-type]

    async def take(self, lease: uuid.UUID, keys: Sequence[str], limit: int, lease_seconds: float) -> Sequence[Webhook]:
        body = {"lease": lease, "keys": keys, "limit": limit, "lease_seconds": lease_seconds}
        return await self.ask_once(
            lambda document: read(list[Webhook], document["data"]), "/webhooks/leases", body=body
        )

    async def renew(self, leases: Mapping[uuid.UUID, uuid.UUID], lease_seconds: float) -> Collection[uuid.UUID]:
        body = {"leases": leases, "lease_seconds": lease_seconds}
        return await self.ask_once(
            lambda document: read(set[uuid.UUID], document["data"]), "/webhooks/renewals", body=body
        )

    async def report(self, lease: uuid.UUID, turn: Turn, lease_seconds: float) -> bool:
        body = {"lease": lease, "lease_seconds": lease_seconds, "turn": turn}
        return await self.ask_once(lambda document: read(bool, document["counts"]), "/webhooks/turns", body=body)

    async def totals(self, keys: Sequence[str]) -> Totals:
        return await self.read(lambda document: read(Totals, document), "/webhooks/totals", body={"keys": keys})
