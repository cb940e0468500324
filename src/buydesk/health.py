"""Health: reports of the services, the state that follows from them; the port HealthDesk."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any, Literal, Protocol, get_args

from buydesk.times import format_time, parse_time

Level = Literal["debug", "info", "warning", "error", "critical"]
State = Literal["alive", "late", "dead", "unknown"]
LEVELS: tuple[Level, ...] = get_args(Level)

SERVICES = ("create_buy_order", "api_cache_proxy", "api_updater", "db_proxy", "fetch_buy_orders", "health_check")
# A service reports every interval: one report may get lost before it counts as late, three before it counts as dead.
LATE_AFTER_INTERVALS = 1.5
DEAD_AFTER_INTERVALS = 4
STOPPED = "stopped"
# Anybody may report. In Redis a report takes 12.6 KB at the most (one of 2000 control characters, which JSON writes in
# 6 bytes each): the 4000 that `reports_kept_max` allows, the last ones of each service and a day of prices (then
# 6 MB, now 2) took 56 of the 64 MB of the Redis that the desk runs itself: no flood of reports can push the prices out.
DATA_CHARS_MAX = 2000
# Anybody may report: of services that are not ours, the last reports of this many are kept, the longest silent go.
OTHERS_KEPT_MAX = 100


@dataclass(frozen=True, slots=True)
class Report:
    """What a service says of itself. `status` is a number in the manner of HTTP; `data` is free text."""

    level: Level
    service: str
    status: int
    data: str

    @property
    def is_farewell(self) -> bool:
        """True for the last words of a service that was told to end, as Reporter says them."""
        return (self.level, self.status, self.data) == ("info", 200, STOPPED)


@dataclass(frozen=True, slots=True)
class KeptReport:
    """A report with the time of its arrival."""

    report: Report
    arrived_at: datetime


class HealthDesk(Protocol):
    """Where reports arrive and are kept, bounded."""

    async def report(self, report: Report) -> None:
        """Keeps a report; raises HealthUnavailable."""
        ...

    async def reports(self, service: str | None, level: Level | None, limit: int) -> Sequence[KeptReport]:
        """The newest reports, newest first, of one service or of one level where given; raises HealthUnavailable."""
        ...

    async def last_of_each(self) -> Sequence[KeptReport]:
        """The last report of each of our services and of the last OTHERS_KEPT_MAX others; raises HealthUnavailable."""
        ...

    async def check(self) -> None:
        """Raises HealthUnavailable when reports cannot be kept."""
        ...

    async def close(self) -> None: ...


def service_state(last: KeptReport | None, now: datetime, interval: timedelta) -> State:
    """Alive, late or dead, by the age of a service's last report; dead at once when it said that it stopped.

    One that was never heard of is unknown: the reports may have been lost, by a restart of who keeps them.
    """
    if last is None:
        return "unknown"
    if last.report.is_farewell:
        return "dead"
    age = now - last.arrived_at
    if age > DEAD_AFTER_INTERVALS * interval:
        return "dead"
    return "late" if age > LATE_AFTER_INTERVALS * interval else "alive"


def kept_document(kept: KeptReport) -> dict[str, object]:
    """The report as JSON members; `kept_from` reads them back."""
    return {**asdict(kept.report), "arrived_at": format_time(kept.arrived_at)}


def kept_from(document: Mapping[str, Any]) -> KeptReport:
    """The report of a document made by `kept_document`; raises LookupError or ValueError."""
    report = Report(document["level"], document["service"], document["status"], document["data"])
    return KeptReport(report, parse_time(document["arrived_at"]))
