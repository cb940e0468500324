"""Pages of orders over HTTP: which one is asked for, its links, what a client has already, its documentation."""

import hashlib
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec
from fastapi import Response

from buydesk.clients.rates import RateKind
from buydesk.errors import (
    InsufficientScope,
    InvalidRequest,
    LedgerUnavailable,
    OrderNotFound,
    Overloaded,
    PriceNotFound,
)
from buydesk.http.examples import EXAMPLE_EXPOSURE, EXAMPLE_ORDER, EXAMPLE_RECORD
from buydesk.http.members import Member, read_query, whole_number
from buydesk.http.openapi import id_in_path, operation
from buydesk.http.owners import CLIENT, EVERY_CLIENT, Owner, owner
from buydesk.http.requests import Request
from buydesk.http.responses import JSONBytesResponse, encode
from buydesk.orders.model import (
    KEY_PATTERN,
    NUMBER_MAX,
    PAGE_SIZE_MAX,
    Anchor,
    Page,
    PageAfter,
    PageBefore,
    PageFrom,
    parse_key,
)
from buydesk.orders.representations import OrderDocument, order_document
from buydesk.prices.documents import record_document

PAGE_SIZE = 10


def id_of(request: Request, name: str = "id") -> uuid.UUID:
    """The id that the path ends in; raises InvalidRequest, with `name` for what it is."""
    try:
        return uuid.UUID(request.parameter)
    except ValueError as error:
        raise InvalidRequest.of(name, "must be a UUID") from error


SIZE = whole_number("page_size", f"Default {PAGE_SIZE}.", PAGE_SIZE_MAX)
START = whole_number("start", "Leave out this many of the newest orders (default 0).", NUMBER_MAX, lowest=0)
ANCHORS = (
    START,
    whole_number("before", "The highest numbers below this one.", NUMBER_MAX, lowest=0),
    whole_number("after", "The lowest numbers above this one.", NUMBER_MAX, lowest=0),
)
KEY = Member("client_order_id", parse_key, {"type": "string", "pattern": KEY_PATTERN})
_ASKS_BY_KEY = re.compile(rf"(?:^|&){KEY.name}=")
_PAGE_MEMBERS = (SIZE, *ANCHORS, KEY, CLIENT)


def page_or_lookup(request: Request) -> RateKind:
    """What the request is counted as, whatever else is right or wrong with it. A name that is written in another way,
    percent-encoded, makes a page of it."""
    return "lookups" if _ASKS_BY_KEY.search(request.query) else "reads"


class PageRequest(NamedTuple):
    """Which page is asked for, of whose orders."""

    owner: Owner
    anchor: Anchor
    page_size: int


class KeyRequest(NamedTuple):
    """Which of the owner's orders is asked for, by the key that it gave it."""

    owner: Owner
    client: str
    client_order_id: str


def read_page_request(request: Request) -> PageRequest | KeyRequest:
    """Which page is asked for, or which one order; raises InsufficientScope, and InvalidRequest naming every parameter
    that is wrong, or excluded by another."""
    given = {name: value for name, value in read_query(request, *_PAGE_MEMBERS).items() if value is not None}
    whose = owner(request.caller, given.pop("client", None))
    key: str | None = given.pop("client_order_id", None)
    if key is not None:
        if given:
            raise InvalidRequest.of_all([(name, "cannot be combined with client_order_id") for name in given])
        if whose.client is None:
            raise InvalidRequest.of("client", "must be a name: two clients may have the same client_order_id")
        return KeyRequest(whose, whose.client, key)
    return PageRequest(whose, anchor_of(given), given.get("page_size", PAGE_SIZE))


def anchor_of(given: Mapping[str, int]) -> Anchor:
    """The anchor that is among the parameters; raises InvalidRequest when there are more than one."""
    anchors = {each.name: given[each.name] for each in ANCHORS if each.name in given}
    if len(anchors) > 1:
        raise InvalidRequest.of_all([(name, "start, before and after exclude each other") for name in anchors])
    if "before" in anchors:
        return PageBefore(anchors["before"])
    if "after" in anchors:
        return PageAfter(anchors["after"])
    return PageFrom(anchors.get("start", 0))


class RenderedPage(NamedTuple):
    """A page, or a price record, as it is answered."""

    body: bytes
    headers: list[tuple[bytes, bytes]]
    etag: str


def rendered(asked: PageRequest, page: Page, documents: Sequence[OrderDocument]) -> RenderedPage:
    """A page of orders. They may be settled or cancelled: whoever has the page asks whether it is still the same."""
    links = _links(asked, [asked.owner.number(order) for order in page.orders])
    about: dict[str, object] = {"page_size": asked.page_size}
    if isinstance(asked.anchor, PageFrom):
        about = {"start": asked.anchor.start, "page_size": asked.page_size, "total": page.total}
    body = encode(
        {"data": documents, "page": about, "_links": {relation: {"href": href} for relation, href in links.items()}}
    )
    link = ", ".join(f'<{href}>; rel="{relation}"' for relation, href in links.items() if relation != "self")
    return _with_etag(body, (b"link", link.encode()), owner=asked.owner.client or EVERY_CLIENT)


def immutable(body: bytes) -> RenderedPage:
    """What never changes: who has it need not ask again."""
    return _with_etag(body, (b"cache-control", b"private, max-age=31536000, immutable"))


def _with_etag(body: bytes, *headers: tuple[bytes, bytes], owner: str = "") -> RenderedPage:
    # An owner's own, even where another's page has the same bytes: who kept one must not be told that it has the other.
    etag = f'"{hashlib.blake2b(body, digest_size=12, key=owner.encode()).hexdigest()}"'
    return RenderedPage(body, [*headers, (b"etag", etag.encode())], etag)


def page_response(request: Request, page: RenderedPage) -> Response:
    """The page, or a 304 for a client that has it."""
    if _has(request, page.etag):
        return JSONBytesResponse(b"", 304, page.headers)
    return JSONBytesResponse(page.body, 200, page.headers)


def _has(request: Request, etag: str) -> bool:
    """Whether the client has this page already (If-None-Match, RFC 9110, section 13.1.2: compared weakly)."""
    tags = ",".join(request.headers.getall("if-none-match", [])).split(",")
    return any(tag.strip().removeprefix("W/") in ("*", etag) for tag in tags)


def _links(asked: PageRequest, numbers: Sequence[int]) -> dict[str, str]:
    """Links by number, so that a reader who follows them while orders arrive sees each order exactly once."""
    anchor = asked.anchor

    def href(name: str, number: int) -> str:
        return f"/get_orders/?{name}={number}&page_size={asked.page_size}{asked.owner.query}"

    # An empty page is past the end: all that there is, or will be, is newer. Only an empty `after` page is at the top.
    newer_than, older_than = 0, 0
    if isinstance(anchor, PageFrom):
        links = {"self": href("start", anchor.start)}
    elif isinstance(anchor, PageBefore):
        links = {"self": href("before", anchor.number)}
    else:
        links = {"self": href("after", anchor.number)}
        newer_than, older_than = anchor.number, min(anchor.number + 1, NUMBER_MAX)
    if numbers:
        newer_than, older_than = numbers[0], numbers[-1]
    if older_than > 1:
        links["next"] = href("before", older_than)
    links["prev"] = href("after", newer_than)
    return links


_ORDER_EXAMPLE = order_document(EXAMPLE_ORDER)
_ASKED = PageRequest(Owner(EXAMPLE_ORDER.client, is_told=False), PageFrom(0), 3)
_PAGE_EXAMPLE = msgspec.json.decode(rendered(_ASKED, Page([EXAMPLE_ORDER], 1), [_ORDER_EXAMPLE]).body)
_READ = (InsufficientScope, InvalidRequest, LedgerUnavailable, Overloaded)
GET_ORDERS = operation(
    "A page of orders, newest first, or the order with a client_order_id",
    ("A page", _PAGE_EXAMPLE),
    errors=(OrderNotFound, *_READ),
    description="The caller's own orders, counted by their `number`. `start`, `before` and `after` exclude each other. "
    f"Follow `_links`, or the Link header. With a `client` the orders have `client` and `desk_number` too; with "
    f"`{EVERY_CLIENT}` it is the latter that is counted.",
    tag="orders",
    query=_PAGE_MEMBERS,
    unchanged="The page that the client has (If-None-Match)",
)
GET_ORDER = operation(
    "One order by its id",
    ("The order", _ORDER_EXAMPLE),
    errors=(OrderNotFound, *_READ),
    description="What belongs to another client is not found.",
    tag="orders",
    query=(CLIENT,),
    parameters=[id_in_path("order_id")],
)
GET_PRICE = operation(
    "The price record that orders were priced with, by an order's `price_id`",
    ("The price record", record_document(EXAMPLE_RECORD)),
    errors=(InvalidRequest, PriceNotFound, LedgerUnavailable, Overloaded),
    description="The proof of a price: every quote there was, used or rejected and why, the rule with its limits, and "
    "the time at which it was applied. It never changes. It says nothing of who bought, or how much.",
    tag="orders",
    parameters=[id_in_path("price_id")],
    unchanged="The record that the client has (If-None-Match)",
)
GET_EXPOSURE = operation(
    "The cap, what is used and what is available, in BTC",
    ("The exposure", EXAMPLE_EXPOSURE),
    errors=_READ,
    description="The caller's own; `cap` and `available` are null where it has no cap of its own. The desk's for who "
    f"calls an open desk without a key, and with `client={EVERY_CLIENT}`.",
    tag="orders",
    query=(CLIENT,),
)
