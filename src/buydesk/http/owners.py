"""Whose orders a request is about: the caller's own or, for who may read all, another client's or all of the desk."""

import re
from typing import NamedTuple

from buydesk.clients.model import Caller
from buydesk.clients.scopes import Scope
from buydesk.errors import InsufficientScope
from buydesk.http.members import Member
from buydesk.orders.model import KEY_PATTERN, Order, parse_key
from buydesk.orders.representations import OrderDocument, desk_document, order_document

EVERY_CLIENT = "*"
_READS_ALL: Scope = "orders:read_all"
_PATTERN = r"^(\*|[a-z0-9][a-z0-9-]{0,31})$"


def _client(text: str) -> str:
    if not re.fullmatch(_PATTERN, text):
        raise ValueError("must be a client's name, or * for all of the desk")
    return text


CLIENT = Member(
    "client",
    _client,
    {"type": "string", "pattern": _PATTERN},
    f"Whose: a client's name, or `{EVERY_CLIENT}` for all of the desk. Needs the scope `{_READS_ALL}`. Without it, the "
    "caller's own.",
)

# Between the desk's own services.
CLIENT_OR_DESK = Member(
    "client",
    parse_key,
    {"type": "string", "pattern": KEY_PATTERN},
    "What is this client's; without it, what is of all the desk.",
)


class Owner(NamedTuple):
    """Whose orders are meant: those of `client` or, for None, all of the desk. Only who reads for others is told in
    each document whose it is."""

    client: str | None
    is_told: bool

    def document(self, order: Order) -> OrderDocument:
        """The order as this reader sees it."""
        return desk_document(order) if self.is_told else order_document(order)

    def number(self, order: Order) -> int:
        """The order's number among those that are meant."""
        return order.number if self.client is None else order.client_number

    @property
    def query(self) -> str:
        """What a link has to say to mean the same."""
        return f"&client={self.client or EVERY_CLIENT}" if self.is_told else ""


def owner(caller: Caller, asked: str | None) -> Owner:
    """Whose orders are meant by the value of CLIENT, or without it: then a client means its own, and the desk's own
    services, which are none, mean all. Raises InsufficientScope for what is not the caller's own."""
    if asked is None and caller.client:
        return Owner(caller.client, is_told=False)
    if _READS_ALL not in caller.scopes:
        raise InsufficientScope.of(_READS_ALL)
    return Owner(None if asked in (None, EVERY_CLIENT) else asked, is_told=True)
