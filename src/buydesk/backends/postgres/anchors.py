"""AnchorStore in PostgreSQL, beside the orders: what was published last, and what an operator confirmed."""

from collections.abc import Mapping, Sequence

from buydesk.backends.postgres.ledger import PostgresLedger
from buydesk.money import CURRENCIES, Currency
from buydesk.prices.anchors import (
    CONFIRMATIONS_MAX,
    Anchor,
    AnchorStore,
    Confirmation,
    NewConfirmation,
    require_confirmable,
)

# A newer program's currencies may be in the database too.
_KNOWN = list(CURRENCIES)


class PostgresAnchors(AnchorStore):
    """Uses the ledger's sessions; whoever made the ledger closes it."""

    def __init__(self, ledger: PostgresLedger) -> None:
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

    async def confirm(self, new: NewConfirmation) -> Confirmation:
        require_confirmable(new)
        asked = (new.currency.value, new.low_e8, new.high_e8, new.why, new.minutes)
        [row] = await self._ledger.fetch("confirm_price", *asked)
        return Confirmation(new.currency, new.low_e8, new.high_e8, new.why, row["ends_at"])

    async def close(self) -> None:
        """Nothing here is its own."""
