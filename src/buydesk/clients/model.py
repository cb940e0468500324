"""Callers: on whose behalf a request is made, and what it may do."""

from dataclasses import dataclass

from buydesk.clients.scopes import CLIENT_SCOPES, Scope
from buydesk.orders.model import ANONYMOUS


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls. One of the desk's own services is no client: its name is empty."""

    client: str
    scopes: frozenset[Scope]
    key_id: str | None = None

    @property
    def is_anybody(self) -> bool:
        """Whether it is whoever reaches an open desk, to whom the desk's exposure is its own."""
        return self.client == ANONYMOUS and self.key_id is None


ANYBODY = Caller(ANONYMOUS, CLIENT_SCOPES)
