"""Events as they are told: in lists and streams, and as the body of a webhook."""

import uuid
from datetime import datetime
from typing import Any

import msgspec

from buydesk.events.model import TEST_TYPE, EventType
from buydesk.orders.life import Event
from buydesk.orders.representations import OrderDocument, order_document
from buydesk.times import format_time


class EventDocument(msgspec.Struct, frozen=True, gc=False):
    """An event as it is told."""

    id: str
    type: EventType
    sequence: int
    created_at: str
    order: OrderDocument


class Message(msgspec.Struct, frozen=True):
    """The body of a webhook (Standard Webhooks 1.0): `timestamp` is when it happened, `data` what did."""

    type: str
    timestamp: str
    data: object


def told_event(event: Event, order: OrderDocument) -> EventDocument:
    """The event, with its order as whoever reads it sees it."""
    kind: Any = "placed" if event.order.status == "accepted" else event.order.status
    at: datetime = event.order.closed_at or event.order.created_at
    return EventDocument(f"{event.order.id}.{kind}", f"order.{kind}", event.sequence, format_time(at), order)  # type: ignore[arg-type]


def client_event(event: Event) -> EventDocument:
    """The event as its client reads it."""
    return told_event(event, order_document(event.order))


def message_of(document: EventDocument) -> bytes:
    """The body that tells the event: its `data` is what a list of events has."""
    return msgspec.json.encode(Message(document.type, document.created_at, document))


def new_test(webhook_id: uuid.UUID, at: datetime) -> tuple[str, bytes]:
    """The id and the body of a test, which tells of nothing that happened."""
    body = msgspec.json.encode(Message(TEST_TYPE, format_time(at), {"webhook": webhook_id}))
    return f"test.{uuid.uuid4()}", body
