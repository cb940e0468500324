"""The model of a key store."""

from collections.abc import Mapping, Sequence
from datetime import datetime

from msgspec.structs import replace

from buydesk.clients.keys import Key, new_key
from buydesk.clients.model import KeyStore, StoredKey
from buydesk.clients.registry import Limits
from buydesk.clients.scopes import Scope
from buydesk.errors import DeskError
from buydesk.times import utc_now


class ModelKeys(KeyStore):
    """Keys in memory. `fault` is raised instead of an answer; `asked` are the ids that were looked up."""

    def __init__(self) -> None:
        self.stored: dict[str, StoredKey] = {}
        self.asked: list[str] = []
        self.fault: DeskError | None = None

    def add(
        self,
        client: str,
        *scopes: Scope,
        livemode: bool = False,
        allow_from: Sequence[str] = (),
        expires_at: datetime | None = None,
        client_rate_per_minute: int | None = None,
        rate_per_minute: int | None = None,
        client_markup_bp: Mapping[str, int] | None = None,
        client_quote_seconds_max: int | None = None,
    ) -> Key:
        """A new key of the client, which is stored."""
        key = new_key(livemode=livemode)
        self.stored[key.id] = StoredKey(
            *(key.id, client, key.digest, list(scopes), list(allow_from), expires_at, None, None),
            client_rate_per_minute=client_rate_per_minute,
            rate_per_minute=rate_per_minute,
            client_markup_bp=client_markup_bp or {},
            client_quote_seconds_max=client_quote_seconds_max,
        )
        return key

    def limit(self, key: Key, limits: Limits) -> None:
        """Sets what is told of the key's client."""
        self.stored[key.id] = replace(
            self.stored[key.id],
            client_rate_per_minute=limits.rate_per_minute,
            client_markup_bp=limits.markup_bp,
            client_quote_seconds_max=limits.quote_seconds_max,
        )

    def revoke(self, key: Key) -> None:
        self.stored[key.id] = replace(self.stored[key.id], revoked_at=utc_now())

    async def key(self, key_id: str) -> StoredKey | None:
        self.asked.append(key_id)
        if self.fault is not None:
            raise self.fault
        return self.stored.get(key_id)

    async def note_used(self, key_ids: Sequence[str]) -> None:
        if self.fault is not None:
            raise self.fault
        for key_id in set(key_ids) & self.stored.keys():
            self.stored[key_id] = replace(self.stored[key_id], last_used_on=utc_now().date())

    async def close(self) -> None:
        pass
