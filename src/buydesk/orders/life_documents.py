"""What becomes of orders, between services as JSON: db_proxy takes closings and gives their results, open orders and
events. What is no such document raises WrongMember."""

import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec

from buydesk.errors import DeskError, problem, rebuild
from buydesk.orders.documents import order_from, stored_document
from buydesk.orders.life import CLOSED_AT_ONCE_MAX, AcceptedOrders, Closed, Closing, Event, parse_text
from buydesk.orders.model import Key, Order
from buydesk.reading import read

# More than wait for events at a service: it has no more connections.
CLIENTS_MAX = 10_000


class _Closing(msgspec.Struct):
    order_id: uuid.UUID
    status: Closed
    text: str | None

    def __post_init__(self) -> None:
        """Raises ValueError."""
        parse_text(self.text, self.status)


_Closings = Annotated[list[_Closing], msgspec.Meta(max_length=CLOSED_AT_ONCE_MAX)]


def closing_documents(closings: Sequence[Closing]) -> list[dict[str, object]]:
    """What is to become of orders, as a JSON list."""
    return [{"order_id": each.order_id, "status": each.status, "text": each.text} for each in closings]


def closings_from(document: object) -> list[Closing]:
    """What `closing_documents` wrote."""
    return [Closing(each.order_id, each.status, each.text) for each in read(_Closings, document, "body")]


def result_document(result: Order | DeskError) -> dict[str, object]:
    """What became of one order, or why not."""
    if isinstance(result, DeskError):
        return {"problem": problem(result, "/closings")}
    return {"order": stored_document(result)}


def result_from(document: Any) -> Order | DeskError:
    """The result that `result_document` wrote."""
    if "problem" in document:
        return rebuild(document["problem"])
    return order_from(document["order"])


def accepted_document(found: AcceptedOrders) -> dict[str, object]:
    """Open orders as JSON."""
    return {"data": [stored_document(order) for order in found.orders], "next_after": found.next_after}


def accepted_from(document: Any) -> AcceptedOrders:
    """The open orders that `accepted_document` wrote."""
    return AcceptedOrders([order_from(each) for each in document["data"]], int(document["next_after"]))


def event_documents(events: Sequence[Event]) -> dict[str, object]:
    """Events as JSON."""
    return {"data": [{"sequence": each.sequence, "order": stored_document(each.order)} for each in events]}


def events_from(document: Any) -> list[Event]:
    """The events that `event_documents` wrote."""
    return [Event(int(each["sequence"]), order_from(each["order"])) for each in document["data"]]


class _Clients(msgspec.Struct):
    clients: Annotated[list[Key], msgspec.Meta(max_length=CLIENTS_MAX)]


def clients_from(document: object) -> list[str]:
    """The clients of whom it is asked which their newest events are, `{"clients": […]}`."""
    return read(_Clients, document, "body").clients


def last_events_document(last: Mapping[str | None, int]) -> dict[str, object]:
    """The numbers of the newest events as JSON."""
    return {"desk": last[None], "clients": {name: last[name] for name in last if name is not None}}


def last_events_from(document: Any) -> Mapping[str | None, int]:
    """What `last_events_document` wrote."""
    return {None: int(document["desk"])} | {name: int(last) for name, last in document["clients"].items()}
