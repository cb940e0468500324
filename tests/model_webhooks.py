"""The model of endpoints and of turns: plainly right, and nothing more."""

import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Literal

import msgspec
from msgspec.structs import asdict, replace

from buydesk.errors import ClientNotFound, DeskError, TooManyWebhooks, WebhookNotFound
from buydesk.events.model import (
    DELIVERIES_KEPT,
    AnyWebhookChange,
    ChangeWebhook,
    CreateWebhook,
    DeleteWebhook,
    Delivery,
    Rewind,
    RotateSecret,
    Secret,
    Totals,
    Turn,
    Webhook,
)
from buydesk.orders.life import Closed
from buydesk.times import CLOCK, Clock
from tests.model_ledger import ModelLedger

CLIENTS = ("anonymous", "other", "third")


@dataclass
class Lease:
    id: uuid.UUID | None = None
    until: datetime | None = None
    taken: int = 0


@dataclass(repr=False)
class ModelWebhooks:
    """WebhookStore as one would explain it; `fault` is raised instead."""

    ledger: ModelLedger = field(default_factory=ModelLedger)
    clock: Clock = CLOCK
    stored: dict[uuid.UUID, Webhook] = field(default_factory=dict)
    leases: dict[uuid.UUID, Lease] = field(default_factory=dict)
    noted: dict[uuid.UUID, list[Delivery]] = field(default_factory=dict)
    fault: DeskError | None = None
    turns: int = 0

    async def _last(self, client: str) -> int:
        return (await self.ledger.last_events([client]))[client]

    async def change(self, change: AnyWebhookChange) -> Webhook:
        self._check()
        if isinstance(change, CreateWebhook):
            return await self._create(change)
        hook = await self.webhook(change.client, change.id)
        lease = self.leases[hook.id]
        match change:
            case ChangeWebhook():
                given = {name: value for name, value in asdict(change).items() if value is not msgspec.UNSET}
                if given.keys() & {"url", "events", "enabled"}:
                    lease.id = None
                enabled = given.pop("enabled", None)
                again: dict[str, Any] = {"failures": 0, "due_at": self.clock.now()}
                given |= again if enabled or given.keys() & {"url", "events"} else {}
                given |= {} if enabled is None else {"disabled": None if enabled else "client"}
                hook = replace(hook, **given)
            case Rewind(after=after):
                lease.id = None
                hook = replace(hook, delivered=min(hook.delivered, after), failures=0, due_at=self.clock.now())
            case RotateSecret():
                lease.id = None
                hook = self._rotate(hook, change)
            case DeleteWebhook():
                del self.stored[hook.id]
                return hook
        self.stored[hook.id] = hook
        return hook

    async def _create(self, new: CreateWebhook) -> Webhook:
        if new.client not in CLIENTS:
            raise ClientNotFound("none")
        if new.id in self.stored:
            return self.stored[new.id]
        if len(await self.webhooks(new.client)) >= new.most:
            raise TooManyWebhooks("enough")
        now, last = self.clock.now(), await self._last(new.client)
        hook = Webhook(
            *(new.id, new.client, new.url, list(new.events), new.description, now, [Secret(1, new.key, None)]),
            *(None, last, 0, now),
        )
        self.stored[hook.id], self.leases[hook.id], self.noted[hook.id] = hook, Lease(), []
        return hook

    def _rotate(self, hook: Webhook, change: RotateSecret) -> Webhook:
        now = self.clock.now()
        ends = now + timedelta(seconds=change.overlap_seconds)
        older = [each for each in hook.secrets if each.ends_at is None or each.ends_at > now][: change.most - 1]
        older = [replace(each, ends_at=each.ends_at or ends) for each in older]
        return replace(hook, secrets=[Secret(hook.secrets[0].version + 1, change.key, None), *older])

    async def webhooks(self, client: str) -> Sequence[Webhook]:
        self._check()
        return [hook for hook in self.stored.values() if hook.client == client]

    async def webhook(self, client: str, webhook_id: uuid.UUID) -> Webhook:
        self._check()
        hook = self.stored.get(webhook_id)
        if hook is None or hook.client != client:
            raise WebhookNotFound("none")
        return hook

    async def deliveries(self, client: str, webhook_id: uuid.UUID, before: int, limit: int) -> Sequence[Delivery]:
        hook = self.stored.get(webhook_id)
        if hook is None or hook.client != client:
            return []
        kept = self.noted[webhook_id][-DELIVERIES_KEPT:]
        return [each for each in kept[::-1] if each.number < before][:limit]

    async def note_delivery(self, webhook_id: uuid.UUID, delivery: Delivery) -> None:
        if webhook_id in self.noted:
            self.noted[webhook_id].append(replace(delivery, number=len(self.noted[webhook_id]) + 1))

    async def sequence_of(self, client: str, order_id: uuid.UUID, what: Literal["placed"] | Closed) -> int | None:
        for event in await self.ledger.events(client, 0, 1_000_000):
            happened = "placed" if event.order.status == "accepted" else event.order.status
            if (event.order.id, happened) == (order_id, what):
                return event.sequence
        return None

    async def take(self, lease: uuid.UUID, keys: Sequence[str], limit: int, lease_seconds: float) -> Sequence[Webhook]:
        self._check()
        now = self.clock.now()
        taken: list[Webhook] = []
        for hook in sorted(self.stored.values(), key=lambda each: self.leases[each.id].taken):
            until = self.leases[hook.id].until
            is_free = until is None or until <= now
            is_due = hook.disabled is None and hook.due_at <= now and await self._last(hook.client) > hook.delivered
            if is_free and is_due and hook.secrets[0].key in keys and len(taken) < limit:
                self.turns += 1
                self.leases[hook.id] = Lease(lease, now + timedelta(seconds=lease_seconds), self.turns)
                taken.append(hook)
        return taken

    async def renew(self, leases: Mapping[uuid.UUID, uuid.UUID], lease_seconds: float) -> Collection[uuid.UUID]:
        self._check()
        now, renewed = self.clock.now(), set()
        for hook_id, lease in self.leases.items():
            if lease.id == leases.get(hook_id, 0) and lease.until is not None and lease.until > now:
                lease.until = now + timedelta(seconds=lease_seconds)
                renewed.add(hook_id)
        return renewed

    async def report(self, lease: uuid.UUID, turn: Turn, lease_seconds: float) -> bool:
        self._check()
        hook = self.stored.get(turn.webhook)
        if hook is None or self.leases[hook.id].id != lease:
            return False
        now, leased = self.clock.now(), self.leases[hook.id]
        due_at = now + timedelta(seconds=turn.due_seconds)
        self.stored[hook.id] = replace(
            hook, delivered=turn.delivered, failures=turn.failures, due_at=due_at, disabled=turn.disabled
        )
        leased.until = now + timedelta(seconds=lease_seconds) if turn.keep else None
        leased.id = lease if turn.keep else None
        for each in turn.deliveries:
            await self.note_delivery(hook.id, each)
        return True

    async def totals(self, keys: Sequence[str]) -> Totals:
        self._check()
        enabled = [hook for hook in self.stored.values() if hook.disabled is None]
        behind = [await self._last(each.client) - each.delivered for each in enabled if not each.failures]
        without = [each for each in enabled if each.secrets[0].key not in keys]
        return Totals(len(enabled), sum(1 for each in enabled if each.failures), len(without), sum(behind))

    def _check(self) -> None:
        if self.fault is not None:
            raise self.fault

    async def close(self) -> None:
        pass
