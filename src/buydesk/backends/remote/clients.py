"""Keys at db_proxy."""

from collections.abc import Sequence
from typing import Any, ClassVar

from buydesk.backends.remote import RemoteService
from buydesk.clients.model import KEY_READERS, KeyStore, StoredKey
from buydesk.errors import LedgerUnavailable
from buydesk.reading import read
from buydesk.settings.types import tokens


class RemoteKeys(RemoteService, KeyStore):
    """The keys at db_proxy, which every service may ask for that callers call."""

    service = "db_proxy"
    unavailable = LedgerUnavailable
    tokens: ClassVar = {}

    def token(self, _: str) -> str | None:
        """One that this process has got, whatever else it is for."""
        given = [name for name in KEY_READERS if name in self._settings.model_fields_set]
        return tokens(getattr(self._settings, given[0]))[0] if given else None

    async def key(self, key_id: str) -> StoredKey | None:
        return await self.read(_stored_key, f"/keys/{key_id}")

    async def note_used(self, key_ids: Sequence[str]) -> None:
        await self.ask(lambda _: None, "/keys/used", body={"ids": list(key_ids)})


def _stored_key(document: Any) -> StoredKey | None:
    return None if document["key"] is None else read(StoredKey, document["key"])
