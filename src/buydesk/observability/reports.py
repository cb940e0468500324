"""Health: reports of the services, the state that follows from them; the port ReportStore."""

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from operator import attrgetter
from typing import Any, Literal, Protocol, get_args

from buydesk.observability.logs import escaped
from buydesk.times import format_time, parse_time

Level = Literal["debug", "info", "warning", "error", "critical"]
State = Literal["alive", "late", "dead", "unknown"]
LEVELS: tuple[Level, ...] = get_args(Level)

# A service reports every interval: one report may get lost before it counts as late, three before it counts as dead.
LATE_AFTER_INTERVALS = 1.5
DEAD_AFTER_INTERVALS = 4
STOPPED = "stopped"
# In Redis a report takes 9 KB at the most: 2000 characters of 4 bytes, and none that `shown` leaves takes more in JSON.
# With an allocator that rounds up it is 10.2 KB. The 4000 that `reports_kept_max` allows, the strangers', the last ones
# of each service and a day of prices (2 MB) are 50 to 56 of the 64 MB of the Redis that the desk runs itself: no flood
# of reports can push the prices out.
DATA_CHARS_MAX = 2000
# Anybody may report. What comes without the token of the desk's services is kept apart: the newest this many.
STRANGERS_KEPT_MAX = 1000
# Of services that are not ours, the last reports of this many are kept, the longest silent go; strangers' apart again.
OTHERS_KEPT_MAX = 100


@dataclass(frozen=True, slots=True)
class Report:
    """What a service says of itself. `status` is a number in the manner of HTTP; `data` is free text.

    The text may hold strangers' words, also in our own services' reports: from here on it is `shown`.
    """

    level: Level
    service: str
    status: int
    data: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", shown(self.data))

    @property
    def is_final(self) -> bool:
        """True for the final report of a service that was asked to stop, as Reporter makes it."""
        return (self.level, self.status, self.data) == ("info", 200, STOPPED)


@dataclass(frozen=True, slots=True)
class StoredReport:
    """A report with the time of its arrival. `verified` when a service's token came with it, not so for strangers'."""

    report: Report
    arrived_at: datetime
    verified: bool


class ReportStore(Protocol):
    """Where reports arrive and are kept, bounded: strangers' never push out a verified one."""

    async def report(self, report: Report, *, verified: bool) -> None:
        """Keeps a report; raises ReportsUnavailable."""
        ...

    async def reports(self, service: str | None, level: Level | None, limit: int) -> Sequence[StoredReport]:
        """The newest reports, strangers' too, newest first, of one service or level where given; raises
        ReportsUnavailable."""
        ...

    async def last_of_each(self) -> Sequence[StoredReport]:
        """The last verified report of each of our services, and of the last OTHERS_KEPT_MAX others; of the last
        OTHERS_KEPT_MAX names that are in neither, strangers' last report. Raises ReportsUnavailable."""
        ...

    async def check(self) -> None:
        """Raises ReportsUnavailable when reports cannot be kept."""
        ...

    async def close(self) -> None: ...


def service_state(last: StoredReport | None, now: datetime, interval: timedelta) -> State:
    """Alive, late or dead, by the age of a service's last report; dead at once when it said that it stopped.

    One that was never heard of is unknown: the reports may have been lost, by a restart of who keeps them. So is one
    whose report lies in the future by more than an interval: the clock was set back since, and its age means nothing.
    """
    if last is None or last.arrived_at - now > interval:
        return "unknown"
    if last.report.is_final:
        return "dead"
    age = now - last.arrived_at
    if age > DEAD_AFTER_INTERVALS * interval:
        return "dead"
    return "late" if age > LATE_AFTER_INTERVALS * interval else "alive"


def shown(text: str, chars_max: int = DATA_CHARS_MAX) -> str:
    """The text as it is kept and shown, with visible characters and ends of lines only; cut."""
    return escaped(text[:chars_max], but="\n\t")[:chars_max]


def newest_first(*kept: Iterable[StoredReport]) -> Iterator[StoredReport]:
    """One of several, by the time of arrival; each is newest first itself, and no further read than it has to be."""
    return heapq.merge(*kept, key=attrgetter("arrived_at"), reverse=True)


def stored_report_document(kept: StoredReport) -> dict[str, object]:
    """The report as JSON members; `stored_report_from` reads them back."""
    return {**asdict(kept.report), "verified": kept.verified, "arrived_at": format_time(kept.arrived_at)}


def stored_report_from(document: Mapping[str, Any]) -> StoredReport:
    """The report of a document made by `stored_report_document`, not verified if it does not say so.

    Raises LookupError, ValueError, TypeError or AttributeError."""
    report = Report(document["level"], document["service"], document["status"], document["data"])
    return StoredReport(report, parse_time(document["arrived_at"]), document.get("verified") is True)
