"""The health desk in the memory of the process: what is kept ends with it."""

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice

from cachetools import FIFOCache

from buydesk.observability.reports import (
    OTHERS_KEPT_MAX,
    STRANGERS_KEPT_MAX,
    Level,
    Report,
    ReportStore,
    StoredReport,
    newest_first,
)
from buydesk.settings.model import Settings
from buydesk.times import CLOCK, Clock
from buydesk.topology import SERVICES


class MemoryReportStore(ReportStore):
    """A filter looks through all that is kept: under 1 ms for 5000 reports."""

    def __init__(self, settings: Settings, clock: Clock = CLOCK) -> None:
        self._clock = clock
        self._last_of_ours: dict[str, StoredReport] = {}
        # By whether they are verified: the newest reports, and of services that are not ours the last one of each.
        self._kept: dict[bool, deque[StoredReport]] = {
            True: deque(maxlen=settings.reports_kept_max),
            False: deque(maxlen=STRANGERS_KEPT_MAX),
        }
        self._last_of_others = {each: FIFOCache[str, StoredReport](OTHERS_KEPT_MAX) for each in (True, False)}

    async def report(self, report: Report, *, verified: bool) -> None:
        kept = StoredReport(report, self._clock.now(), verified)
        self._kept[verified].append(kept)
        if report.service not in SERVICES:
            self._last_of_others[verified][report.service] = kept
        elif verified:
            self._last_of_ours[report.service] = kept

    async def reports(self, service: str | None, level: Level | None, limit: int) -> Sequence[StoredReport]:
        def matching(verified: bool) -> Iterator[StoredReport]:
            for kept in reversed(self._kept[verified]):
                if service in (None, kept.report.service) and level in (None, kept.report.level):
                    yield kept

        return list(islice(newest_first(matching(verified=True), matching(verified=False)), limit))

    async def last_of_each(self) -> Sequence[StoredReport]:
        last = {**self._last_of_others[False], **self._last_of_others[True], **self._last_of_ours}
        return list(last.values())

    async def check(self) -> None:
        """Memory is always there."""

    async def close(self) -> None:
        """There is nothing to close."""
