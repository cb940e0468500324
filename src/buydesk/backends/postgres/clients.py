"""KeyStore in PostgreSQL, beside the orders."""

from collections.abc import Sequence

import asyncpg
import msgspec

from buydesk.backends.postgres.ledger import PostgresLedger
from buydesk.clients.model import OPERATOR, KeyStore, StoredKey
from buydesk.errors import CannotStart


def stored_key(row: asyncpg.Record) -> StoredKey:
    """The key of a row."""
    return StoredKey(**dict(row) | {"client_markup_bp": msgspec.json.decode(row["client_markup_bp"])})


class PostgresKeys(KeyStore):
    """Uses the ledger's sessions; whoever made the ledger closes it."""

    def __init__(self, ledger: PostgresLedger) -> None:
        self._ledger = ledger

    async def key(self, key_id: str) -> StoredKey | None:
        rows = await self._ledger.fetch("key", key_id, places=self._ledger.key_look_ups)
        return stored_key(rows[0]) if rows else None

    async def note_used(self, key_ids: Sequence[str]) -> None:
        await self._ledger.fetch("note_keys_used", key_ids)

    async def require_any(self) -> None:
        """Raises CannotStart when no client ever had a key, and DeskError when that cannot be known. That all have
        ended is no reason: orders are still settled, by who has a token."""
        if not (await self._ledger.fetch("has_keys", OPERATOR))[0]["has_keys"]:
            raise CannotStart(
                "no client could call this desk: there is no key. Make one (buydesk keys create --help), or set "
                "BUYDESK_ACCESS to open, which lets everybody in who reaches it, or proxy, for one that checks keys"
            )

    async def close(self) -> None:
        """Nothing here is its own."""
