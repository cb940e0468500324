"""MemoryPriceBoard: the price board of a desk without Redis; it lasts as long as the process that owns it."""

import itertools
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from uuid import UUID

from buydesk.prices import KEPT_FOR, PriceRecord, observed_by, superseded, valid_record
from buydesk.settings import Settings
from buydesk.times import utc_now


class MemoryPriceBoard:
    """PriceBoard, in this process. Keeps a day of records, `settings.price_history_records_max` at the most."""

    def __init__(self, settings: Settings, now: Callable[[], datetime] = utc_now) -> None:
        self._records_max = settings.price_history_records_max
        self._skew_seconds_max = settings.clock_skew_seconds_max
        self._now = now
        self._hanging: PriceRecord | None = None
        # In the order of observation: when an older record takes the place of one from the future, newer ones leave.
        self._records: dict[UUID, PriceRecord] = {}

    async def publish(self, record: PriceRecord) -> None:
        """See PriceBoard."""
        hanging = self._hanging
        if hanging is not None and hanging.id == record.id:
            if record.expires_at >= hanging.expires_at:
                return
        elif hanging is not None and record.as_of < hanging.as_of <= observed_by(self._now(), self._skew_seconds_max):
            raise superseded(hanging.as_of)
        while self._records and next(reversed(self._records.values())).as_of > record.as_of:
            self._records.popitem()
        self._hanging = self._records[record.id] = record
        while len(self._records) > self._records_max or self._oldest().as_of <= record.as_of - KEPT_FOR:
            del self._records[self._oldest().id]

    async def latest(self) -> PriceRecord:
        """See PriceBoard."""
        return valid_record(self._hanging, self._now(), self._skew_seconds_max)

    async def history(self, minutes: int) -> Sequence[PriceRecord]:
        """See PriceBoard."""
        since = self._now() - timedelta(minutes=minutes)
        recent = itertools.takewhile(lambda record: record.as_of > since, reversed(self._records.values()))
        return list(recent)[::-1]

    async def check(self) -> None:
        """See PriceBoard: memory is always there."""

    async def close(self) -> None:
        """See PriceBoard: there is nothing to close."""

    def _oldest(self) -> PriceRecord:
        return next(iter(self._records.values()))
