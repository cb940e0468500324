"""AnchorStore in PostgreSQL, beside the orders: what was published last, and what an operator confirmed."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import asyncpg

from buydesk.money import CURRENCIES, Currency
from buydesk.prices.anchors import CONFIRMATIONS_MAX, Anchor, AnchorStore, Confirmation

# A newer program's currencies may be in the database too.
_KNOWN = list(CURRENCIES)


class _Fetches(Protocol):
    async def fetch(self, query: str, *arguments: object) -> list[asyncpg.Record]: ...


class PostgresAnchors(AnchorStore):
    """Uses the sessions of the ledger, or of whatever else fetches what named queries find; whoever made that closes
    it."""

    def __init__(self, ledger: _Fetches) -> None:
        self._ledger = ledger

    async def anchors(self) -> Mapping[Currency, Anchor]:
        rows = await self._ledger.fetch("price_anchors", _KNOWN)
        return {CURRENCIES[row["currency"]]: Anchor(row["rate_e8"], row["as_of"], row["dollar_e8"]) for row in rows}

    async def keep_anchors(self, anchors: Mapping[Currency, Anchor]) -> None:
        given = anchors.values()
        await self._ledger.fetch(
            "keep_price_anchors",
            [currency.value for currency in anchors],
            [anchor.rate_e8 for anchor in given],
            [anchor.as_of for anchor in given],
            [anchor.dollar_e8 for anchor in given],
        )

    async def confirmations(self) -> Sequence[Confirmation]:
        rows = await self._ledger.fetch("price_confirmations", _KNOWN, CONFIRMATIONS_MAX)
        return [
            Confirmation(CURRENCIES[row["currency"]], row["low_e8"], row["high_e8"], row["why"], row["expires_at"])
            for row in rows
        ]

    async def close(self) -> None:
        """Nothing here is its own."""
