"""Callers with keys: a key is the name of its client, and some have more scopes than a client's."""

from buydesk.clients.model import Caller
from buydesk.clients.scopes import CLIENT_SCOPES, Scope
from buydesk.errors import InsufficientScope, Unauthorized
from buydesk.http.access import Access
from buydesk.http.requests import Request

# Who reads for all, a client too; the desk's own service, which is none; and who may do hardly anything.
READER = Caller("reader", CLIENT_SCOPES | {"orders:read_all"}, "reader")
PROCESSOR = Caller("", frozenset({"orders:process", "events:read", "orders:read_all"}))
PLACER = Caller("placer", frozenset({"orders:create"}), "placer")
_CALLERS = {"reader": READER, "processor": PROCESSOR, "placer": PLACER}


def key(name: str) -> dict[str, str]:
    """The header that shows this key."""
    return {"Authorization": f"Bearer {name}"}


class KeyedAccess(Access):
    """Access of an open desk on which any client's name is its key, unless it is among `revoked`."""

    def __init__(self) -> None:
        self.revoked = {"wrong"}

    async def caller(self, request: Request, needs: Scope) -> Caller:
        shown = request.headers.get("authorization")
        if shown is None:
            return await super().caller(request, needs)
        name = shown.removeprefix("Bearer ")
        if name in self.revoked:
            raise Unauthorized("wrong")
        caller = _CALLERS.get(name) or Caller(name, CLIENT_SCOPES, name)
        if needs not in caller.scopes:
            raise InsufficientScope.of(needs)
        return caller
