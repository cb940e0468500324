"""Webhooks over HTTP: how clients make, change and test their endpoints, and read what was delivered."""

import re
import uuid
from typing import Any, Literal, NamedTuple

import msgspec
from fastapi import Response

from buydesk.errors import (
    DeskError,
    EventNotFound,
    InvalidRequest,
    LedgerUnavailable,
    OutcomeUnknown,
    Overloaded,
    TooManyWebhooks,
    WebhookBusy,
    WebhookKeyLost,
    WebhookNotFound,
)
from buydesk.events.delivery import Deliverer
from buydesk.events.documents import client_event, message_of, new_test
from buydesk.events.model import (
    DESCRIPTION_CHARS_MAX,
    EVENT_TYPES,
    OVERLAP_SECONDS,
    WEBHOOKS_MAX,
    ChangeWebhook,
    CreateWebhook,
    DeleteWebhook,
    Delivery,
    Rewind,
    RotateSecret,
    Webhook,
    WebhookStore,
)
from buydesk.events.signing import WebhookKeys
from buydesk.events.urls import URL_CHARS_MAX, URL_PATTERN, parse_url
from buydesk.http.app import Endpoint, Service
from buydesk.http.members import Member, Reasons, body_schema, json_members, read_members, read_query, unknown
from buydesk.http.openapi import Json, operation
from buydesk.http.pages import id_of
from buydesk.http.requests import Request, require_json
from buydesk.http.responses import MsgspecResponse
from buydesk.http.webhook_store import BEFORE, EXAMPLE_DELIVERY, EXAMPLE_WEBHOOK, LIMIT, WEBHOOK_ID
from buydesk.orders.life import Closed, OrderLife
from buydesk.orders.model import NUMBER_MAX
from buydesk.reading import LINE_PATTERN, Number, is_text, parse_line
from buydesk.times import format_time, utc_now

_EVENT_ID = re.compile(
    r"([0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12})\.(placed|settled|cancelled)", re.ASCII
)
_WHOLE = re.compile(r"[0-9]{1,19}", re.ASCII)


class Webhooks(NamedTuple):
    """What the routes need: where endpoints are kept, events, the keys of secrets, the way out, and whether endpoints
    may be of this machine."""

    store: WebhookStore
    life: OrderLife
    keys: WebhookKeys
    deliverer: Deliverer
    allows_loopback: bool


def _text(value: object) -> str:
    if not is_text(value):
        raise ValueError("must be text")
    return value


def _events(value: object) -> list[str]:
    if not isinstance(value, list) or not value or not all(each in EVENT_TYPES for each in value):
        raise ValueError(f"must be a list of {', '.join(EVENT_TYPES)}, of one at least")
    return [each for each in EVENT_TYPES if each in value]


def _description(value: object) -> str:
    text = _text(value)
    return parse_line(text, DESCRIPTION_CHARS_MAX) if text else text


def _enabled(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def _event_id(value: object) -> tuple[uuid.UUID, Literal["placed"] | Closed]:
    found = _EVENT_ID.fullmatch(_text(value))
    if found is None:
        raise ValueError("must be the id of an event, such as 01938f6e-5f3a-7c1b-9d2e-4a6b8c0d1e2f.placed")
    return uuid.UUID(found[1]), found[2]  # type: ignore[return-value]  # what the pattern lets through


def _after(value: object) -> int:
    if not isinstance(value, Number) or not _WHOLE.fullmatch(value) or int(value) > NUMBER_MAX:
        raise ValueError(f"must be a whole number from 0 to {NUMBER_MAX}")
    return int(value)


def _members(*, allows_loopback: bool) -> tuple[Member, Member, Member]:
    return (
        Member(
            "url",
            lambda value: parse_url(_text(value), allows_loopback=allows_loopback),
            {"type": "string", "format": "uri", "maxLength": URL_CHARS_MAX, "pattern": URL_PATTERN},
            "An https address of the public internet; for a sandbox on this machine, one of this machine too.",
            is_required=True,
        ),
        Member(
            "events",
            _events,
            {"type": "array", "minItems": 1, "items": {"type": "string", "enum": list(EVENT_TYPES)}},
            "Which events; all, if not given.",
            default=EVENT_TYPES,
        ),
        Member(
            "description",
            _description,
            {"type": "string", "maxLength": DESCRIPTION_CHARS_MAX, "pattern": LINE_PATTERN.replace("+$", "*$")},
            default="",
        ),
    )


_ENABLED = Member(
    "enabled",
    _enabled,
    {"type": "boolean"},
    "An endpoint that is enabled is asked at once, and goes on after what it has got.",
)
_EVENT = Member(
    "event", _event_id, {"type": "string", "pattern": f"^{_EVENT_ID.pattern}$"}, "This event, at once, beside others."
)
_AFTER = Member(
    "after",
    _after,
    {"type": "integer", "minimum": 0, "maximum": NUMBER_MAX},
    "All events after this `sequence`, in order, as far as they were delivered.",
)


async def _read_body(request: Request, *members: Member) -> dict[str, Any]:
    """The members that are given or have a default; raises InvalidRequest naming every one that is wrong."""
    require_json(request)
    given = json_members(await request.body())
    reasons: Reasons = []
    found = read_members(given, members, reasons)
    reasons += unknown(given, members, "a webhook")
    if reasons:
        raise InvalidRequest.of_all(reasons)
    return {name: value for name, value in found.items() if name in given or value is not None}


def webhook_document(hook: Webhook) -> dict[str, object]:
    """An endpoint as its client sees it: all but its secret."""
    return {
        "id": hook.id,
        "url": hook.url,
        "events": hook.events,
        "description": hook.description,
        "enabled": hook.disabled is None,
        "disabled_reason": hook.disabled,
        "created_at": format_time(hook.created_at),
        "delivered_up_to": hook.delivered,
        "failures": hook.failures,
        "next_attempt_at": format_time(hook.due_at) if hook.failures and hook.disabled is None else None,
    }


def delivery_document(delivery: Delivery) -> dict[str, object]:
    """An attempt as its client sees it."""
    return {
        "number": delivery.number,
        "event": delivery.event,
        "type": delivery.type,
        "sequence": delivery.sequence,
        "at": format_time(delivery.at),
        "attempt": delivery.attempt,
        "outcome": delivery.outcome,
        "status": delivery.status,
        "milliseconds": delivery.milliseconds,
    }


def add_webhook_routes(app: Service, webhooks: Webhooks) -> None:
    """The routes for clients, each for its own endpoints."""
    _add_endpoints(app, webhooks)
    _add_deliveries(app, webhooks)


def _add(app: Service, path: str, method: str, endpoint: Endpoint, described: Json) -> None:
    app.add_direct_route(path, method, endpoint, described, needs="webhooks:manage", counted="reads")


def _add_endpoints(app: Service, webhooks: Webhooks) -> None:
    store, keys = webhooks.store, webhooks.keys
    url, *others = _members(allows_loopback=webhooks.allows_loopback)
    changeable = (url._replace(is_required=False), *(each._replace(default=None) for each in others), _ENABLED)

    async def create(request: Request) -> Response:
        given = await _read_body(request, url, *others)
        client, webhook_id = request.caller.client, uuid.uuid4()
        hook = await store.change(CreateWebhook(client, webhook_id, **given, key=keys.current))
        return MsgspecResponse(_with_secret(keys, hook), 201)

    async def get_all(request: Request) -> Response:
        read_query(request)
        return MsgspecResponse({"data": list(map(webhook_document, await store.webhooks(request.caller.client)))})

    async def get_one(request: Request) -> Response:
        read_query(request)
        return MsgspecResponse(webhook_document(await _own(request, store)))

    async def change(request: Request) -> Response:
        webhook_id, given = id_of(request, "webhook_id"), await _read_body(request, *changeable)
        return MsgspecResponse(
            webhook_document(await store.change(ChangeWebhook(request.caller.client, webhook_id, **given)))
        )

    async def delete(request: Request) -> Response:
        webhook_id = id_of(request, "webhook_id")
        return MsgspecResponse(webhook_document(await store.change(DeleteWebhook(request.caller.client, webhook_id))))

    async def rotate(request: Request) -> Response:
        rotated = RotateSecret(request.caller.client, id_of(request, "webhook_id"), keys.current)
        return MsgspecResponse(_with_secret(keys, await store.change(rotated)))

    _add(app, "/webhooks", "POST", create, _create_operation((url, *others)))
    _add(app, "/webhooks", "GET", get_all, _GET_ALL)
    _add(app, "/webhooks/{webhook_id}", "GET", get_one, _GET_ONE)
    _add(app, "/webhooks/{webhook_id}", "PATCH", change, _change_operation(changeable))
    _add(app, "/webhooks/{webhook_id}", "DELETE", delete, _DELETE)
    _add(app, "/webhooks/{webhook_id}/rotate_secret", "POST", rotate, _ROTATE)


async def _own(request: Request, store: WebhookStore) -> Webhook:
    return await store.webhook(request.caller.client, id_of(request, "webhook_id"))


def _with_secret(keys: WebhookKeys, hook: Webhook) -> dict[str, object]:
    return webhook_document(hook) | {"secret": keys.secret(hook.id, hook.secrets[0])}


def _add_deliveries(app: Service, webhooks: Webhooks) -> None:
    store = webhooks.store

    async def deliveries(request: Request) -> Response:
        asked = read_query(request, BEFORE, LIMIT)
        hook = await _own(request, store)
        found = await store.deliveries(hook.client, hook.id, **asked)
        return MsgspecResponse({"data": list(map(delivery_document, found))})

    async def redeliver(request: Request) -> Response:
        given = await _read_body(request, _EVENT, _AFTER)
        if len(given) != 1:
            raise InvalidRequest.of("body", "must have either event or after")
        hook = await _own(request, store)
        if "event" in given:
            return MsgspecResponse(delivery_document(await _redeliver(webhooks, hook, *given["event"])))
        if given["after"] > hook.delivered:
            raise InvalidRequest.of("after", f"must be at most {hook.delivered}, up to which events were delivered")
        return MsgspecResponse(webhook_document(await store.change(Rewind(hook.client, hook.id, given["after"]))))

    async def test(request: Request) -> Response:
        hook = await _own(request, store)
        _require_key(webhooks.keys, hook)
        message, body = new_test(hook.id, utc_now())
        return MsgspecResponse(delivery_document(await webhooks.deliverer.send(hook, None, message, body)))

    _add(app, "/webhooks/{webhook_id}/deliveries", "GET", deliveries, _DELIVERIES)
    _add(app, "/webhooks/{webhook_id}/redeliver", "POST", redeliver, _REDELIVER)
    _add(app, "/webhooks/{webhook_id}/test", "POST", test, _TEST)


async def _redeliver(
    webhooks: Webhooks, hook: Webhook, order_id: uuid.UUID, what: Literal["placed"] | Closed
) -> Delivery:
    """Sends one event once more; raises EventNotFound, WebhookKeyLost."""
    _require_key(webhooks.keys, hook)
    sequence = await webhooks.store.sequence_of(hook.client, order_id, what)
    events = [] if sequence is None else await webhooks.life.events(hook.client, sequence - 1, 1)
    if not events:
        raise EventNotFound("No event of yours has this id.")
    document = client_event(events[0])
    return await webhooks.deliverer.send(hook, document, document.id, message_of(document))


def _require_key(keys: WebhookKeys, hook: Webhook) -> None:
    if hook.secrets[0].key not in keys.fingerprints:
        raise WebhookKeyLost("The desk does not have the key of this webhook's secret any more: rotate the secret.")


_AWAY = (LedgerUnavailable, Overloaded)
_SECRET = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD"  # noqa: S105  # of the documentation
_SHOWN = webhook_document(EXAMPLE_WEBHOOK)
_MADE = _SHOWN | {"secret": _SECRET}


def _operation(summary: str, example: tuple[str, object], *errors: type[DeskError], **given: Any) -> Json:
    """An operation on one of the client's endpoints, whose id is in the path."""
    return operation(
        summary,
        example,
        errors=(*errors, WebhookNotFound, InvalidRequest, *_AWAY),
        tag="webhooks",
        parameters=[WEBHOOK_ID],
        **given,
    )


def _create_operation(members: tuple[Member, ...]) -> Json:
    return operation(
        "Have events sent to an endpoint",
        ("The endpoint, and its secret, which is not shown again", _MADE),
        errors=(TooManyWebhooks, OutcomeUnknown, *_AWAY),
        description="Events are posted to it from now on, at least once each and in order, signed as Standard Webhooks "
        f"1.0 says (https://www.standardwebhooks.com). A client has at most {WEBHOOKS_MAX} endpoints. The secret is "
        "shown here and by `rotate_secret` only.",
        tag="webhooks",
        body={
            "schema": body_schema(members),
            "example": {"url": EXAMPLE_WEBHOOK.url, "events": EVENT_TYPES, "description": EXAMPLE_WEBHOOK.description},
        },
        status=201,
    )


def _change_operation(members: tuple[Member, ...]) -> Json:
    return _operation(
        "Change an endpoint",
        ("The endpoint", _SHOWN),
        OutcomeUnknown,
        description="What is not given stays.",
        body={"schema": body_schema(members), "example": {"enabled": True}},
    )


_GET_ALL = operation(
    "Your endpoints", ("The oldest first", {"data": [_SHOWN]}), errors=(InvalidRequest, *_AWAY), tag="webhooks"
)
_GET_ONE = _operation("One of your endpoints", ("The endpoint", _SHOWN))
_DELETE = _operation("Delete an endpoint", ("The endpoint as it was", _SHOWN), OutcomeUnknown)
_ROTATE = _operation(
    "Give an endpoint a new secret",
    ("The endpoint, and its new secret", _MADE),
    OutcomeUnknown,
    description=f"For {OVERLAP_SECONDS // 3600} hours messages are signed with the secret of before too.",
)
_DELIVERIES = _operation(
    "The last attempts to deliver to an endpoint",
    ("The newest first", {"data": [delivery_document(EXAMPLE_DELIVERY)]}),
    query=(BEFORE, LIMIT),
)
_REDELIVER = _operation(
    "Have events delivered again",
    ("The attempt, of one event; of all after a number, the endpoint", delivery_document(EXAMPLE_DELIVERY)),
    *(EventNotFound, WebhookKeyLost, WebhookBusy, OutcomeUnknown),
    description="Either one event, by its id, at once; or all after a `sequence`, in order, when it is the endpoint's "
    "turn.",
    body={"schema": body_schema((_EVENT, _AFTER)), "example": {"event": EXAMPLE_DELIVERY.event}},
)
_TEST = _operation(
    "Send an endpoint a test",
    ("The attempt", delivery_document(msgspec.structs.replace(EXAMPLE_DELIVERY, type="webhook.test", sequence=None))),
    *(WebhookKeyLost, WebhookBusy, OutcomeUnknown),
    description="A message of the type `webhook.test`, which tells of nothing that happened.",
)
