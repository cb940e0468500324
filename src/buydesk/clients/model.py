"""Callers: on whose behalf a request is made, and what it may do."""

from dataclasses import dataclass

from buydesk.clients.scopes import CLIENT_SCOPES, Scope
from buydesk.orders.model import ANONYMOUS


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls. Without `key_id` it is whoever reaches an open desk, to whom the desk's orders are its own."""

    client: str
    scopes: frozenset[Scope]
    key_id: str | None = None


ANYBODY = Caller(ANONYMOUS, CLIENT_SCOPES)
