"""RefusalStore in PostgreSQL, beside the orders."""

from collections.abc import Sequence

from buydesk.backends.postgres.ledger import PostgresLedger
from buydesk.backends.postgres.writing import write
from buydesk.money import CURRENCIES
from buydesk.orders.refusals import Refusal, RefusalStore


class PostgresRefusals(RefusalStore):
    """Uses the ledger's sessions; whoever made the ledger closes it."""

    def __init__(self, ledger: PostgresLedger) -> None:
        self._ledger = ledger

    async def note_refusals(self, refusals: Sequence[Refusal]) -> None:
        rows = [
            (each.at, each.client, each.order_id, each.client_order_id, each.code, each.currency, each.amount_cents)
            for each in refusals
        ]
        await write(self._ledger, "note_refusals", *map(list, zip(*rows, strict=True)))

    async def refusals(self, client: str | None, limit: int) -> Sequence[Refusal]:
        query, whose = ("refusals", ()) if client is None else ("client_refusals", (client,))
        rows = await self._ledger.fetch(query, *whose, limit)
        return [Refusal(**dict(row) | {"currency": CURRENCIES[row["currency"]]}) for row in rows]

    async def close(self) -> None:
        """Nothing here is its own."""
