"""What operators read and change, and refusals on record, at db_proxy."""

from collections.abc import Sequence
from typing import ClassVar

from buydesk.backends.remote import RemoteService
from buydesk.clients.audit import Act
from buydesk.clients.model import StoredKey
from buydesk.clients.registry import AnyChange, Client, Desk, Registry, ShownKey
from buydesk.errors import LedgerUnavailable
from buydesk.orders.refusals import Refusal, RefusalReads
from buydesk.reading import read
from buydesk.settings.types import tokens


class RemoteRegistry(RemoteService, Registry[ShownKey]):
    """The registry at db_proxy."""

    service = "db_proxy"
    unavailable = LedgerUnavailable
    tokens: ClassVar = dict.fromkeys(("GET", "POST"), "operating_tokens")

    async def change(self, change: AnyChange, why: str, by: ShownKey) -> object:
        body = {"by": by, "why": why, "change": change}
        return await self.ask_once(lambda document: document["said"], "/changes", body=body)

    async def desk(self) -> Desk:
        return await self.read(lambda document: read(Desk, document), "/desk")

    async def clients(self, after: str, limit: int) -> Sequence[Client]:
        return await self.read(
            lambda document: read(list[Client], document["data"]), "/clients", limit=limit, **_named("after", after)
        )

    async def client(self, name: str) -> Client:
        return await self.read(lambda document: read(Client, document), f"/clients/{name}")

    async def keys(self, client: str | None, limit: int) -> Sequence[StoredKey]:
        return await self.read(
            lambda document: read(list[StoredKey], document["data"]), "/keys", limit=limit, **_named("client", client)
        )

    async def acts(self, after: int, limit: int) -> Sequence[Act]:
        return await self.read(lambda document: read(list[Act], document["data"]), "/acts", after=after, limit=limit)


class RemoteRefusals(RemoteService, RefusalReads):
    """The refusals at db_proxy, which notes them itself."""

    service = "db_proxy"
    unavailable = LedgerUnavailable
    tokens: ClassVar = {}

    def token(self, _: str) -> str | None:
        """One that this process has got."""
        given = [name for name in ("reading_tokens", "operating_tokens") if name in self._settings.model_fields_set]
        return tokens(getattr(self._settings, given[0]))[0] if given else None

    async def refusals(self, client: str | None, limit: int) -> Sequence[Refusal]:
        return await self.read(
            lambda document: read(list[Refusal], document["data"]), "/refusals", limit=limit, **_named("client", client)
        )


def _named(name: str, value: str | None) -> dict[str, str]:
    return {name: value} if value else {}
