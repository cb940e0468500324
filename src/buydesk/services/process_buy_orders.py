"""process_buy_orders: what becomes of accepted orders, for those who settle and cancel them, and events: a client's own
and, for who may read all, the desk's, to be asked for, followed, or had sent to webhooks."""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial

from fastapi import Response

from buydesk.clients.model import Caller
from buydesk.errors import DeskError, LedgerUnavailable
from buydesk.http.app import Check, Endpoint, Service, service_app
from buydesk.http.life import (
    CANCEL_MANY,
    CANCEL_ONE,
    GET_ACCEPTED,
    GET_EVENTS,
    LIST_BYTES_MAX,
    SETTLE_MANY,
    SETTLE_ONE,
    EventsRequest,
    events_page,
    read_accepted,
    read_closing,
    read_closings,
    read_events,
    result,
    server_sent,
)
from buydesk.http.openapi import Json
from buydesk.http.requests import Request, require_json
from buydesk.http.responses import MsgspecResponse, StreamedResponse
from buydesk.http.webhooks import Webhooks, add_webhook_routes
from buydesk.limits import SharedCheck
from buydesk.observability.reporter import Reporter
from buydesk.orders.life import CLOSED_AT_ONCE_MAX, Closed, Closing, Event, OrderLife
from buydesk.orders.model import Order
from buydesk.orders.representations import desk_document
from buydesk.settings.model import Settings
from buydesk.settings.types import tokens

NAME = "process_buy_orders"
# How often it is asked whether there are new events, by all who wait together.
LOOK_SECONDS = 0.25
# How often a stream without events says that it is there: proxies close what is silent.
HEARTBEAT_SECONDS = 10.0
# Raises a DeskError when what is waited for is not permitted any more.
Permitted = Callable[[], Awaitable[None]]
_PROCESSOR = Caller("", frozenset({"orders:process", "events:read", "orders:read_all"}))


class EventFeed:
    """Events for those who wait for them. One look for all who wait says whose newest events are which, and wakes only
    those whose own came; the end of the service, `stopping`, wakes all."""

    def __init__(self, life: OrderLife, stopping: asyncio.Event) -> None:
        self._life = life
        self._stopping = stopping
        self._waiting: Counter[str | None] = Counter()  # for whose events; None are the desk's
        self._last: Mapping[str | None, int] = {}
        self._looked_at = -LOOK_SECONDS
        self._look = SharedCheck(self._look_once)

    async def after(self, client: str | None, after: int, limit: int, wait_seconds: float) -> Sequence[Event]:
        """The events of the client, or the desk, after the `after`-th; if there are none yet, the first that come in
        this time. Raises LedgerUnavailable, Overloaded."""
        give_up_at = time.monotonic() + wait_seconds
        events = await self._life.events(client, after, limit)
        with self._named(client):
            while not events and not self._stopping.is_set() and (left := give_up_at - time.monotonic()) > 0:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(left, LOOK_SECONDS)):
                        await self._stopping.wait()
                if time.monotonic() - self._looked_at >= LOOK_SECONDS:
                    await self._look()
                if self._last.get(client, 0) > after:
                    events = await self._life.events(client, after, limit)
        return events

    @contextlib.contextmanager
    def _named(self, client: str | None) -> Iterator[None]:
        """While entered, looks ask for this client's events too."""
        self._waiting[client] += 1
        try:
            yield
        finally:
            self._waiting[client] -= 1
            if not self._waiting[client]:
                del self._waiting[client]

    async def _look_once(self) -> None:
        self._looked_at = time.monotonic()
        self._last = await self._life.last_events([client for client in self._waiting if client is not None])

    async def stream(self, asked: EventsRequest, permitted: Permitted) -> AsyncGenerator[bytes]:
        """The events from there on as server-sent events, until the service ends, the ledger is away, or they are not
        `permitted` any more: whoever reads comes back then, and says where it was."""
        after = asked.after
        while not self._stopping.is_set():
            try:
                events = await self.after(asked.owner.client, after, asked.limit, HEARTBEAT_SECONDS)
                await permitted()
            except DeskError:
                return
            after = events[-1].sequence if events else after
            yield server_sent(events, asked.owner)


def create_app(
    settings: Settings, life: OrderLife, check_ledger: Check, reporter: Reporter, webhooks: Webhooks
) -> Service:
    """The service over what becomes of orders; as long as it runs, it delivers to webhooks."""
    checks = {"ledger": check_ledger}

    def delivering() -> AbstractAsyncContextManager[None]:
        return webhooks.deliverer.running(app.stopping)

    app = service_app(NAME, "Settle and cancel orders, and follow events", checks, reporter, delivering)
    app.registry.register(webhooks.deliverer.metrics)
    add_webhook_routes(app, webhooks)
    feed = EventFeed(life, app.stopping)
    app.tokens = dict.fromkeys(tokens(settings.processing_tokens), _PROCESSOR)

    async def get_orders(request: Request) -> Response:
        """Open orders, oldest first."""
        after, limit = read_accepted(request)
        found = await life.accepted(after, limit)
        return MsgspecResponse({"data": [desk_document(each) for each in found.orders], "next_after": found.next_after})

    async def get_events(request: Request) -> Response:
        """Events, oldest first: a page, waited for if there is none yet, or a stream of all that come."""

        async def permitted() -> None:
            # A key may end while its events are waited for.
            request.caller = await app.access.caller(request, "events:read")
            read_events(request)

        asked = read_events(request)
        if asked.is_stream:
            return StreamedResponse(feed.stream(asked, permitted), "text/event-stream")
        found = await feed.after(asked.owner.client, asked.after, asked.limit, asked.wait_seconds)
        if asked.wait_seconds:
            await permitted()
        return MsgspecResponse(events_page(found, asked.after, asked.owner))

    async def close_one(request: Request, status: Closed) -> Response:
        body = await request.body()
        if body:
            require_json(request)
        [found] = await life.close_orders([read_closing(request.parameter, status, body)])
        if isinstance(found, DeskError):
            raise found
        return MsgspecResponse(desk_document(found))

    async def close_many(request: Request, status: Closed) -> Response:
        require_json(request)
        closings = read_closings(status, await request.body(LIST_BYTES_MAX))
        found = await _close_all(life, closings)
        return MsgspecResponse({"data": [result(*each) for each in zip(closings, found, strict=True)]})

    def add(path: str, act: Endpoint, operation: Json) -> None:
        app.add_direct_route(path, "POST", act, operation, needs="orders:process")

    add("/orders/settle", partial(close_many, status="settled"), SETTLE_MANY)
    add("/orders/cancel", partial(close_many, status="cancelled"), CANCEL_MANY)
    add("/orders/{order_id}/settle", partial(close_one, status="settled"), SETTLE_ONE)
    add("/orders/{order_id}/cancel", partial(close_one, status="cancelled"), CANCEL_ONE)
    app.add_direct_route("/orders/", "GET", get_orders, GET_ACCEPTED, needs="orders:process")
    app.add_direct_route("/events", "GET", get_events, GET_EVENTS, needs="events:read", counted="reads")
    return app


async def _close_all(life: OrderLife, closings: Sequence[Closing]) -> list[Order | DeskError]:
    """One result each. What was closed before the ledger failed stays so, and what comes after is not tried."""
    results: list[Order | DeskError] = []
    for start in range(0, len(closings), CLOSED_AT_ONCE_MAX):
        some = closings[start : start + CLOSED_AT_ONCE_MAX]
        try:
            results += await life.close_orders(some)
        except DeskError as error:
            results += [error] * len(some)
            rest = LedgerUnavailable("It was not tried, because the ledger failed before.", retry_after_seconds=1)
            return results + [rest] * (len(closings) - len(results))
    return results
