"""WebhookStore in PostgreSQL, beside the orders."""

import uuid
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import asyncpg
import msgspec

from buydesk.backends.postgres.ledger import PostgresLedger
from buydesk.backends.postgres.writing import write
from buydesk.errors import ClientNotFound, InvalidRequest, TooManyWebhooks, WebhookNotFound
from buydesk.events.model import AnyWebhookChange, Delivery, Secret, Totals, Turn, Webhook, WebhookStore
from buydesk.orders.life import Closed
from buydesk.reading import read

_TOO_MANY = "BD409"


class PostgresWebhooks(WebhookStore):
    """Uses the ledger's sessions; whoever made the ledger closes it."""

    def __init__(self, ledger: PostgresLedger) -> None:
        self._ledger = ledger

    async def change(self, change: AnyWebhookChange) -> Webhook:
        called, given = change.__struct_config__.tag, msgspec.json.encode(change).decode()
        try:
            return _one(await self._write("change_webhook", called, given))
        except asyncpg.NoDataFoundError as error:
            raise ClientNotFound(f"There is no client {change.client}.") from error
        except asyncpg.PostgresError as error:
            if error.sqlstate != _TOO_MANY:
                raise
            raise TooManyWebhooks("A client has no more webhooks: delete one first.") from error

    async def _write(self, query: str, *arguments: object) -> list[asyncpg.Record]:
        """As `write`; raises InvalidRequest for what the tables do not take."""
        try:
            return await write(self._ledger, query, *arguments)
        except (asyncpg.IntegrityConstraintViolationError, asyncpg.DataError) as error:
            rule = getattr(error, "constraint_name", None) or type(error).__name__
            raise InvalidRequest.of("webhook", f"is against the rule {rule}") from error

    async def webhooks(self, client: str) -> Sequence[Webhook]:
        return list(map(_webhook, await self._ledger.fetch("webhooks", client)))

    async def webhook(self, client: str, webhook_id: uuid.UUID) -> Webhook:
        return _one(await self._ledger.fetch("webhook", client, webhook_id))

    async def deliveries(self, client: str, webhook_id: uuid.UUID, before: int, limit: int) -> Sequence[Delivery]:
        rows = await self._ledger.fetch("webhook_deliveries", client, webhook_id, before, limit)
        return [Delivery(**row) for row in rows]

    async def note_delivery(self, webhook_id: uuid.UUID, delivery: Delivery) -> None:
        await self._write("note_deliveries", webhook_id, _json([delivery]))

    async def sequence_of(self, client: str, order_id: uuid.UUID, what: Literal["placed"] | Closed) -> int | None:
        rows = await self._ledger.fetch("event_of_order", client, order_id, what)
        return rows[0]["sequence"] if rows else None

    async def take(self, lease: uuid.UUID, keys: Sequence[str], limit: int, lease_seconds: float) -> Sequence[Webhook]:
        rows = await self._write("take_webhooks", lease, list(keys), limit, lease_seconds)
        return list(map(_webhook, rows))

    async def renew(self, leases: Mapping[uuid.UUID, uuid.UUID], lease_seconds: float) -> Collection[uuid.UUID]:
        rows = await self._write("renew_webhooks", list(leases), list(leases.values()), lease_seconds)
        return {row["id"] for row in rows}

    async def report(self, lease: uuid.UUID, turn: Turn, lease_seconds: float) -> bool:
        told = turn.delivered, turn.failures, turn.due_seconds, turn.disabled
        kept = lease_seconds if turn.keep else None
        rows = await self._write("report_turn", lease, turn.webhook, *told, kept, _json(turn.deliveries))
        return bool(rows[0]["counts"])

    async def totals(self, keys: Sequence[str]) -> Totals:
        [row] = await self._ledger.fetch("webhook_totals", list(keys))
        return Totals(**row)

    async def close(self) -> None:
        """Nothing here is its own."""


def _webhook(row: asyncpg.Record) -> Webhook:
    secrets: Any = msgspec.json.decode(row["secrets"])
    return Webhook(**dict(row) | {"id": uuid.UUID(bytes=row["id"].bytes), "secrets": read(list[Secret], secrets)})


def _one(rows: Sequence[asyncpg.Record]) -> Webhook:
    if not rows:
        raise WebhookNotFound("There is no webhook of this id.")
    return _webhook(rows[0])


def _json(deliveries: Sequence[Delivery]) -> str:
    return msgspec.json.encode(deliveries).decode()
