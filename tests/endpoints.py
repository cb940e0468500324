"""Clients' endpoints to test with, over real TCP; they keep what they get."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from buydesk.backends.endpoints import EndpointSender, allows_loopback
from buydesk.events.delivery import RETRY_SECONDS, Deliverer
from buydesk.events.model import WebhookStore
from buydesk.events.signing import WebhookKeys
from buydesk.http.webhooks import Webhooks
from buydesk.orders.life import OrderLife
from buydesk.settings.model import Settings
from buydesk.settings.types import tokens
from tests.builders import settings
from tests.model_webhooks import ModelWebhooks

Respond = Callable[[web.Request], Awaitable[web.StreamResponse]]


async def fine(_: web.Request) -> web.StreamResponse:
    return web.Response(status=204)


@dataclass
class Message:
    """What an endpoint got."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def document(self) -> Any:
        return json.loads(self.body)

    @property
    def sequence(self) -> int:
        sequence: int = self.document["data"]["sequence"]
        return sequence


@dataclass
class Endpoint:
    """An endpoint at `url`: `got` are all messages, `taken` those that it answered with a 2xx. `respond` answers."""

    port: int
    respond: Respond = fine
    got: list[Message] = field(default_factory=list)
    taken: list[Message] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook?token=hunter2"

    async def handle(self, request: web.Request) -> web.StreamResponse:
        headers = {name.lower(): value for name, value in request.headers.items()}
        message = Message(request.path_qs, headers, await request.read())
        self.got.append(message)
        answer = await self.respond(request)
        if 200 <= answer.status < 300:
            self.taken.append(message)
        return answer

    async def until_taken(self, count: int, seconds: float = 20) -> list[Message]:
        """The messages, once it has taken so many."""
        async with asyncio.timeout(seconds):
            while len(self.taken) < count:
                await asyncio.sleep(0.01)
        return self.taken

    async def until_got(self, count: int, seconds: float = 20) -> list[Message]:
        """The same for those that it refused too."""
        async with asyncio.timeout(seconds):
            while len(self.got) < count:
                await asyncio.sleep(0.01)
        return self.got


@contextlib.asynccontextmanager
async def endpoint(respond: Respond = fine, **given: Any) -> AsyncIterator[Endpoint]:
    """An endpoint on this machine; `given` are for its socket, such as `ssl_context`."""
    served = Endpoint(0, respond)
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", served.handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, **given)
    await site.start()
    served.port = runner.addresses[0][1]
    try:
        yield served
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def delivering(
    life: OrderLife, store: WebhookStore | None = None, given: Settings | None = None, **more: Any
) -> AsyncIterator[Webhooks]:
    """What process_buy_orders needs for webhooks; its sender is closed at the end."""
    given = given or settings()
    keys, sender = WebhookKeys(tokens(given.webhook_keys)), EndpointSender(given)
    store = store or ModelWebhooks()
    deliverer = Deliverer(store, life, sender, keys, **{"retry_seconds": RETRY_SECONDS} | more)
    try:
        yield Webhooks(store, life, keys, deliverer, allows_loopback(given))
    finally:
        await sender.close()
