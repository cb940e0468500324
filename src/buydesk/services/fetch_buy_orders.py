"""fetch_buy_orders: lists a caller's orders newest first, finds one or the price record it was priced with, and tells
how much of its cap is used. Who may read all sees others' too."""

from fastapi import Response

from buydesk.http.app import Service, service_app
from buydesk.http.members import read_query
from buydesk.http.owners import CLIENT, owner
from buydesk.http.pages import (
    GET_EXPOSURE,
    GET_ORDER,
    GET_ORDERS,
    GET_PRICE,
    KeyRequest,
    id_of,
    immutable,
    page_or_lookup,
    page_response,
    read_page_request,
    rendered,
)
from buydesk.http.refusals import GET_REFUSALS, refusals_route
from buydesk.http.requests import Request
from buydesk.http.responses import MsgspecResponse, encode
from buydesk.observability.reporter import Reporter
from buydesk.orders.documents import exposure_document
from buydesk.orders.model import OrderLedger
from buydesk.orders.paging import PageReader
from buydesk.orders.refusals import RefusalReads
from buydesk.prices.documents import record_document
from buydesk.settings.model import Settings

NAME = "fetch_buy_orders"


def create_app(settings: Settings, ledger: OrderLedger, reporter: Reporter, refusals: RefusalReads) -> Service:
    """The service over a ledger, and what it refused."""
    pages = PageReader(ledger, settings)

    app = service_app(NAME, "List buy orders: GET /get_orders/", {"ledger": ledger.check}, reporter)

    async def get_orders(request: Request) -> Response:
        """A page of orders or, by client_order_id, one order."""
        asked = read_page_request(request)
        if isinstance(asked, KeyRequest):
            found = await ledger.order_by_key(asked.client, asked.client_order_id)
            return MsgspecResponse(asked.owner.document(found))
        client, document = asked.owner.client, asked.owner.document
        page = await pages.read(client, asked.anchor, asked.page_size, document)
        return page_response(request, rendered(asked, *page))

    async def get_order(request: Request) -> Response:
        """One order by its id."""
        whose = owner(request.caller, read_query(request, CLIENT)["client"])
        return MsgspecResponse(whose.document(await ledger.order(id_of(request), whose.client)))

    async def get_price(request: Request) -> Response:
        """The price record that orders were priced with, whoever bought at it."""
        read_query(request)
        record = await ledger.price_record(id_of(request))
        return page_response(request, immutable(encode(record_document(record))))

    async def exposure(request: Request) -> Response:
        """What is sold and what can still be: to the caller or, on an open desk, by the desk."""
        asked = read_query(request, CLIENT)["client"]
        whose = owner(request.caller, asked).client
        if asked is None and request.caller.is_anybody:
            whose = None
        return MsgspecResponse(exposure_document(await ledger.exposure(whose)))

    app.add_direct_route("/get_orders/", "GET", get_orders, GET_ORDERS, needs="orders:read", counted=page_or_lookup)
    app.add_direct_route("/get_orders/{order_id}", "GET", get_order, GET_ORDER, needs="orders:read", counted="lookups")
    app.add_direct_route("/prices/{price_id}", "GET", get_price, GET_PRICE, needs="orders:read", counted="reads")
    app.add_direct_route("/exposure", "GET", exposure, GET_EXPOSURE, needs="orders:read", counted="reads")
    app.add_direct_route(
        "/refusals", "GET", refusals_route(refusals), GET_REFUSALS, needs="orders:read", counted="reads"
    )
    return app
