"""Price records in PostgreSQL: each is stored once, as it was signed, with the first order or quote at it. Whether a
quote follows from the one that it names."""

import logging
import uuid
from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import lru_cache

import asyncpg
import msgspec
from cachetools import LRUCache
from msgspec.structs import replace

from buydesk.backends.postgres.sessions import Ask, Session
from buydesk.errors import PriceNotFound, QuoteInvalid
from buydesk.orders.model import PricedOrder
from buydesk.orders.pricing import price_order
from buydesk.orders.quotes import OrderQuote, discrepancies_of_quote
from buydesk.prices.documents import record_document, record_from
from buydesk.prices.model import PriceRecord

logger = logging.getLogger("buydesk.services.db_proxy")

# Quotes are valid for 15 minutes at the most, and a record is current for 15 s.
_RECORDS_KNOWN_MAX = 128


# Batch after batch is priced with the same record.
@lru_cache(maxsize=8)
def signed_text(record: PriceRecord) -> str:
    """The record as it was signed: a copy that was shortened since has the same text."""
    if record.signature is not None:
        record = replace(record, expires_at=record.signature.expires_at)
    return msgspec.json.encode(record_document(record)).decode()


def keeping(record: PriceRecord) -> Ask:
    """Stores the record. Then it is on the disk, and on the standbys where PostgreSQL waits for them."""

    async def ask(session: Session, seconds: float) -> list[asyncpg.Record]:
        rows = await session.fetch("keep_price_record", record.id, signed_text(record), seconds=seconds)
        if rows[0]["has_standbys"] and not rows[0]["is_new"]:
            # Nothing was written and no standby waited for: what is here may be of this server only.
            await session.reach_durable_point(seconds=seconds)
        return rows

    return ask


def stored_record(rows: Sequence[asyncpg.Record], price_id: uuid.UUID) -> PriceRecord:
    """The record of the rows that were found of it; raises PriceNotFound."""
    if not rows:
        raise PriceNotFound(f"No order or quote was priced with a record of the id {price_id}.")
    return record_from(msgspec.json.decode(rows[0]["document"]))


class QuoteProofs:
    """Whether quotes follow from the price records that are stored, so that whoever has a signing key of quotes can at
    the most sell at prices of the last minutes."""

    def __init__(self, clock_skew_seconds_max: float) -> None:
        self._skew = timedelta(seconds=clock_skew_seconds_max)
        self._records: LRUCache[uuid.UUID, PriceRecord] = LRUCache(_RECORDS_KNOWN_MAX)

    async def proven(self, session: Session, items: Sequence[PricedOrder], seconds: float) -> Sequence[PricedOrder]:
        """The items; those by a quote that does not follow from its record have that problem in the place of a price.
        Raises what `session.fetch` raises."""
        quotes = [item.price for item in items if isinstance(item.price, OrderQuote)]
        if not quotes:
            return items
        wanted = {quote.price_id for quote in quotes}
        records = {price_id: self._records[price_id] for price_id in wanted & self._records.keys()}
        if missing := list(wanted - records.keys()):
            rows = await session.fetch("price_records", missing, seconds=seconds)
            found = [record_from(msgspec.json.decode(row["document"])) for row in rows]
            records |= {record.id: record for record in found}
            self._records.update(records)
        return [self._unless_unproven(item, records) for item in items]

    def _unless_unproven(self, item: PricedOrder, records: Mapping[uuid.UUID, PriceRecord]) -> PricedOrder:
        quote = item.price
        if not isinstance(quote, OrderQuote):
            return item
        record = records.get(quote.price_id)
        why = (
            "its price is not there" if record is None else "; ".join(discrepancies_of_quote(quote, record, self._skew))
        )
        if not why:
            return item
        logger.error("quote %s is signed and not proven: %s", quote.id, why)
        return price_order(item.order, QuoteInvalid(f"The quote is not proven: {why}."), item.deadline)
