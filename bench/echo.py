"""The edge without a ledger: the same server, shell, validation and answer as the desk's; nothing is stored. And an
endpoint for events, which takes all of them.

What the desk does less in a second than this one is what storing costs. `python -m bench.echo PORT`.
"""

import asyncio
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import uvloop
from fastapi import Response

from buydesk.backends.memory.reports import MemoryReportStore
from buydesk.errors import QuoteInvalid
from buydesk.http import app as web
from buydesk.http.examples import EXAMPLE_ORDER
from buydesk.http.listeners import BACKLOG, allow_connections
from buydesk.http.orders import created, read_order
from buydesk.http.requests import Request
from buydesk.http.responses import JSONBytesResponse
from buydesk.http.server import serving
from buydesk.observability.reporter import Reporter
from buydesk.orders.quotes import OrderQuote
from buydesk.services.create_buy_order import NAME
from buydesk.settings.model import Settings


def no_quote(_: str, __: str) -> OrderQuote:
    """Without a price there are no quotes."""
    raise QuoteInvalid("There are no quotes here.")


def create_app(settings: Settings) -> web.Service:
    """The service: what it answers looks placed and is not."""
    orders_url = f"{settings.url('fetch_buy_orders')}/get_orders/"

    @asynccontextmanager
    async def lifespan() -> AsyncIterator[None]:
        yield

    async def place_order(request: Request) -> Response:
        """A made-up order with what was asked for in it."""
        new, _ = await read_order(request, no_quote)
        order = msgspec.structs.replace(
            EXAMPLE_ORDER,
            id=new.id,
            client_order_id=new.client_order_id,
            currency=new.currency,
            amount_cents=new.amount_cents,
        )
        return created(order, orders_url, is_replay=False)

    async def receive(request: Request) -> Response:
        await request.body()
        return JSONBytesResponse(b"{}")

    reporter = Reporter(NAME, MemoryReportStore(settings), settings)
    app = web.service_app("echo", "Answers orders without storing them", {}, reporter, lifespan)
    app.add_direct_route("/place_order/", "POST", place_order, {}, needs="orders:create")
    app.add_direct_route("/events", "POST", receive, {}, needs="orders:create")
    return app


async def serve(port: int) -> None:
    """Serves until it is ended."""
    allow_connections()
    settings = Settings()
    listener = socket.create_server(("127.0.0.1", port), backlog=BACKLOG)
    async with serving(create_app(settings), listener, settings):
        await asyncio.Event().wait()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(int(sys.argv[1])))
