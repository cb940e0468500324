"""The ledger over HTTP, as db_proxy reads it to the other services and lists a caller's orders: how each read is asked
for, and documented. What has no `client` is of all the desk."""

from buydesk.errors import InvalidRequest, LedgerUnavailable, OrderNotFound, Overloaded, PriceNotFound, PriceUnavailable
from buydesk.http.examples import EXAMPLE_EXPOSURE, EXAMPLE_ORDER, EXAMPLE_RECORD
from buydesk.http.members import read_query
from buydesk.http.openapi import id_in_path, operation
from buydesk.http.owners import CLIENT_OR_DESK
from buydesk.http.pages import ANCHORS, KEY, PAGE_SIZE, SIZE, START, anchor_of
from buydesk.http.requests import Request
from buydesk.orders.documents import page_document, stored_document
from buydesk.orders.model import Anchor, Page, PageFrom
from buydesk.orders.representations import order_document
from buydesk.prices.documents import record_document

_SIZE = SIZE._replace(is_required=True)
_CLIENT = CLIENT_OR_DESK._replace(is_required=True)
_KEY = KEY._replace(is_required=True)


def read_list(request: Request) -> tuple[PageFrom, int]:
    """Which orders `GET /get/` lists, and how many at most; raises InvalidRequest."""
    found = read_query(request, START, SIZE)
    return PageFrom(found["start"] or 0), found["page_size"] or PAGE_SIZE


def read_page(request: Request) -> tuple[str | None, Anchor, int]:
    """Whose page another service asks for, which, and of what size; raises InvalidRequest."""
    found = read_query(request, _SIZE, *ANCHORS, CLIENT_OR_DESK)
    given = {name: value for name, value in found.items() if value is not None}
    return found["client"], anchor_of(given), found["page_size"]


def read_client(request: Request) -> str | None:
    """Whose another service asks for; raises InvalidRequest."""
    client: str | None = read_query(request, CLIENT_OR_DESK)["client"]
    return client


def read_key(request: Request) -> tuple[str, str]:
    """A client, and its key for an order; raises InvalidRequest."""
    found = read_query(request, _CLIENT, _KEY)
    return found["client"], found["client_order_id"]


_ORDER = stored_document(EXAMPLE_ORDER)
_READ = (InvalidRequest, LedgerUnavailable, Overloaded)
LIST = operation(
    "The caller's orders, newest first",
    ("The orders", [order_document(EXAMPLE_ORDER)]),
    errors=_READ,
    tag="orders",
    query=(START, SIZE),
)
PAGE = operation(
    "A page by anchor",
    ("The page", page_document(Page([EXAMPLE_ORDER], 1), [_ORDER])),
    errors=_READ,
    tag="internal",
    query=(_SIZE, *ANCHORS, CLIENT_OR_DESK),
    is_internal=True,
)
ORDER = operation(
    "An order by its id",
    ("The order", _ORDER),
    errors=(OrderNotFound, *_READ),
    tag="internal",
    query=(CLIENT_OR_DESK,),
    parameters=[id_in_path("order_id")],
    is_internal=True,
)
ORDER_BY_KEY = operation(
    "An order by its client's key",
    ("The order", _ORDER),
    errors=(OrderNotFound, *_READ),
    tag="internal",
    query=(_CLIENT, _KEY),
    is_internal=True,
)
EXPOSURE = operation(
    "Cap and use", ("BTC", EXAMPLE_EXPOSURE), errors=_READ, tag="internal", query=(CLIENT_OR_DESK,), is_internal=True
)
PRICE = operation(
    "A price record that orders or quotes were priced with",
    ("The record", record_document(EXAMPLE_RECORD)),
    errors=(PriceNotFound, *_READ),
    tag="internal",
    parameters=[id_in_path("price_id")],
    is_internal=True,
)
KEEP_PRICE = operation(
    "Store a price record, to give quotes at it",
    ("It is stored, on disk.", {"id": EXAMPLE_RECORD.id}),
    errors=(PriceUnavailable, LedgerUnavailable, Overloaded),
    description="As it was signed; the same record may come again.",
    tag="internal",
    parameters=[id_in_path("price_id")],
    body={"schema": {"type": "object"}, "example": record_document(EXAMPLE_RECORD)},
    is_internal=True,
)
