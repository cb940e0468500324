"""Access: who calls, and whether it may."""

from buydesk.clients.model import ANYBODY, Caller
from buydesk.clients.scopes import Scope
from buydesk.errors import Unauthorized
from buydesk.http.requests import Request


class Access:
    """Finds the caller of a request."""

    async def caller(self, request: Request, needs: Scope) -> Caller:
        """Who calls, for something that needs the scope. Raises Unauthorized."""
        if needs not in ANYBODY.scopes:
            raise Unauthorized("Show a key that permits this.")
        return ANYBODY
