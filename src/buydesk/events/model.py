"""Webhooks: endpoints of clients, what can be changed of them, and what was delivered. The port WebhookStore."""

import uuid
from collections.abc import Collection, Mapping, Sequence
from typing import Literal, Protocol

import msgspec

from buydesk.orders.life import Closed
from buydesk.reading import Moment

EventType = Literal["order.placed", "order.settled", "order.cancelled"]
EVENT_TYPES: tuple[EventType, ...] = ("order.placed", "order.settled", "order.cancelled")
TEST_TYPE = "webhook.test"
WEBHOOKS_MAX = 10
DESCRIPTION_CHARS_MAX = 256
# Of each endpoint the last attempts are kept; note_deliveries in schema.sql lets go of older ones.
DELIVERIES_KEPT = 200
# For so long after a rotation the secret of before signs too.
OVERLAP_SECONDS = 24 * 3600
# Of one endpoint at a time: a rotation whose answer was lost is made again.
SECRETS_MAX = 4
# Why an endpoint is not asked any more: its client said so, it said itself that it is gone, or all retries failed.
Disabled = Literal["client", "gone", "failing"]
# What came of an attempt: a 2xx, another status, nothing in time, no connection, or no certificate to trust.
Outcome = Literal["delivered", "rejected", "timed_out", "unreachable", "tls_failed"]


class Secret(msgspec.Struct, frozen=True):
    """A version of an endpoint's secret, and the fingerprint of the desk's key that it is derived from; `ends_at`,
    until when it signs, is None for the newest."""

    version: int
    key: str
    ends_at: Moment | None


class Webhook(msgspec.Struct, frozen=True):
    """An endpoint. It has got the events of its client up to the `delivered`-th, those that it wants; the next one has
    failed `failures` times in a row and is due again at `due_at`. `secrets` begin with the newest."""

    id: uuid.UUID
    client: str
    url: str
    events: Sequence[str]
    description: str
    created_at: Moment
    secrets: Sequence[Secret]
    disabled: Disabled | None
    delivered: int
    failures: int
    due_at: Moment

    def __repr__(self) -> str:
        """Without the address, whose query may hold a secret of the client's."""
        return f"Webhook({self.id}, {self.client})"


class Delivery(msgspec.Struct, frozen=True):
    """An attempt to deliver an event, the `number`-th of its endpoint and the `attempt`-th of this event in a row.
    A test has no `sequence`, and what got no answer no `status`."""

    event: str
    type: str
    sequence: int | None
    at: Moment
    attempt: int
    outcome: Outcome
    status: int | None
    milliseconds: int
    number: int = 0


class CreateWebhook(msgspec.Struct, frozen=True, tag="create"):
    """Makes an endpoint, which gets what happens from now on; `key` is the fingerprint of the desk's key."""

    client: str
    id: uuid.UUID
    url: str
    events: Sequence[str]
    description: str
    key: str
    most: int = WEBHOOKS_MAX


class ChangeWebhook(msgspec.Struct, frozen=True, tag="change", omit_defaults=True):
    """Changes what is given. An endpoint that is enabled is asked at once, and goes on where it was."""

    client: str
    id: uuid.UUID
    url: str | msgspec.UnsetType = msgspec.UNSET
    events: Sequence[str] | msgspec.UnsetType = msgspec.UNSET
    description: str | msgspec.UnsetType = msgspec.UNSET
    enabled: bool | msgspec.UnsetType = msgspec.UNSET


class DeleteWebhook(msgspec.Struct, frozen=True, tag="delete"):
    """Deletes an endpoint, and what is known of deliveries to it."""

    client: str
    id: uuid.UUID


class RotateSecret(msgspec.Struct, frozen=True, tag="rotate"):
    """Gives an endpoint a new secret, of the key with this fingerprint. The one of before signs for OVERLAP_SECONDS."""

    client: str
    id: uuid.UUID
    key: str
    overlap_seconds: int = OVERLAP_SECONDS
    most: int = SECRETS_MAX


class Rewind(msgspec.Struct, frozen=True, tag="rewind"):
    """Has the events after the `after`-th delivered again, as far as they were; skips none."""

    client: str
    id: uuid.UUID
    after: int


AnyWebhookChange = CreateWebhook | ChangeWebhook | DeleteWebhook | RotateSecret | Rewind


class Turn(msgspec.Struct, frozen=True):
    """What a replica tells of an endpoint that it holds: the events up to the `delivered`-th are delivered; the next
    one has failed `failures` times and is due in so many seconds. `keep` says whether it goes on."""

    webhook: uuid.UUID
    delivered: int
    failures: int
    due_seconds: float
    disabled: Disabled | None
    keep: bool
    deliveries: Sequence[Delivery]


class Totals(msgspec.Struct, frozen=True):
    """Of all endpoints that are enabled: how many there are, how many fail, how many have a secret of another key, and
    how many events those that do not fail have not got yet."""

    enabled: int
    failing: int
    without_key: int
    waiting: int


class WebhookStore(Protocol):
    """Where endpoints are kept, beside the orders. Everything raises LedgerUnavailable and Overloaded, when certainly
    nothing was done; what writes raises OutcomeUnknown too."""

    async def change(self, change: AnyWebhookChange) -> Webhook:
        """Makes or changes an endpoint; it as it is then or, deleted, was. Raises WebhookNotFound for one that the
        client does not have, TooManyWebhooks, ClientNotFound."""
        ...

    async def webhooks(self, client: str) -> Sequence[Webhook]:
        """The client's endpoints, the oldest first."""
        ...

    async def webhook(self, client: str, webhook_id: uuid.UUID) -> Webhook:
        """One of the client's endpoints; raises WebhookNotFound."""
        ...

    async def deliveries(self, client: str, webhook_id: uuid.UUID, before: int, limit: int) -> Sequence[Delivery]:
        """The last attempts with numbers below `before`, the newest first: none for an endpoint that there is not."""
        ...

    async def note_delivery(self, webhook_id: uuid.UUID, delivery: Delivery) -> None:
        """Notes an attempt that was no part of a turn."""
        ...

    async def sequence_of(self, client: str, order_id: uuid.UUID, what: Literal["placed"] | Closed) -> int | None:
        """The number among the client's events of what happened to its order; None if it did not."""
        ...

    async def take(self, lease: uuid.UUID, keys: Sequence[str], limit: int, lease_seconds: float) -> Sequence[Webhook]:
        """Leases endpoints that have not got all their client's events, that are due and leased to nobody, and whose
        newest secret is of one of these keys: those that have waited longest for a turn. `lease` is new each time."""
        ...

    async def renew(self, leases: Mapping[uuid.UUID, uuid.UUID], lease_seconds: float) -> Collection[uuid.UUID]:
        """Makes these leases, by the endpoints' ids, last so long from now; the endpoints of those that still hold."""
        ...

    async def report(self, lease: uuid.UUID, turn: Turn, lease_seconds: float) -> bool:
        """Stores what is told of a turn. Whether that counts: not if the endpoint has another lease by now, or was
        changed."""
        ...

    async def totals(self, keys: Sequence[str]) -> Totals:
        """How all endpoints are."""
        ...

    async def close(self) -> None: ...
