"""fetch_buy_orders: lists orders newest first, finds one or the price record it was priced with, and tells how much of
the cap is used."""

from fastapi import Response

from buydesk.http.app import Service, service_app
from buydesk.http.members import read_query
from buydesk.http.pages import (
    GET_EXPOSURE,
    GET_ORDER,
    GET_ORDERS,
    GET_PRICE,
    immutable,
    page_response,
    read_id,
    read_page_request,
    rendered,
)
from buydesk.http.requests import Request
from buydesk.http.responses import MsgspecResponse, encode
from buydesk.observability.reporter import Reporter
from buydesk.orders.model import OrderLedger
from buydesk.orders.paging import PageReader
from buydesk.orders.representations import order_document
from buydesk.prices.documents import record_document
from buydesk.settings.model import Settings

NAME = "fetch_buy_orders"


def create_app(settings: Settings, ledger: OrderLedger, reporter: Reporter) -> Service:
    """The service over a ledger."""
    pages = PageReader(ledger, settings)

    app = service_app(NAME, "List buy orders: GET /get_orders/", {"ledger": ledger.check}, reporter)

    async def get_orders(request: Request) -> Response:
        """A page of orders or, by client_order_id, one order."""
        asked = read_page_request(request)
        if isinstance(asked, str):
            return MsgspecResponse(order_document(await ledger.order_by_key(request.caller.client, asked)))
        anchor, page_size = asked
        page = rendered(anchor, page_size, *await pages.read(anchor, page_size, order_document))
        return page_response(request, page)

    async def get_order(request: Request) -> Response:
        """One order by its id."""
        return MsgspecResponse(order_document(await ledger.order(read_id(request))))

    async def get_price(request: Request) -> Response:
        """The price record that orders were priced with."""
        record = await ledger.price_record(read_id(request))
        return page_response(request, immutable(encode(record_document(record))))

    async def exposure(request: Request) -> Response:
        """What is sold and what can still be."""
        read_query(request)
        found = await ledger.exposure()
        return MsgspecResponse(found.facts() | {"orders": found.orders})

    app.add_direct_route("/get_orders/", "GET", get_orders, GET_ORDERS, needs="orders:read")
    app.add_direct_route("/get_orders/{order_id}", "GET", get_order, GET_ORDER, needs="orders:read")
    app.add_direct_route("/prices/{price_id}", "GET", get_price, GET_PRICE, needs="orders:read")
    app.add_direct_route("/exposure", "GET", exposure, GET_EXPOSURE, needs="orders:read")
    return app
