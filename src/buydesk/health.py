"""Health: reports of the services, the state that follows from them; the port HealthDesk."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal, Protocol

Level = Literal["debug", "info", "warning", "error", "critical"]
State = Literal["alive", "late", "dead"]

SERVICES = ("create_buy_order", "api_cache_proxy", "api_updater", "db_proxy", "fetch_buy_orders", "health_check")
# A service reports every interval: one report may get lost before it counts as late, three before it counts as dead.
LATE_AFTER_INTERVALS = 1.5
DEAD_AFTER_INTERVALS = 4
STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Report:
    """What a service says of itself. `status` is a number in the manner of HTTP; `data` is free text."""

    level: Level
    service: str
    status: int
    data: str


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
        """The last report of every service that ever reported; raises HealthUnavailable."""
        ...

    async def check(self) -> None:
        """Raises HealthUnavailable when reports cannot be kept."""
        ...

    async def close(self) -> None: ...


def service_state(last: KeptReport | None, now: datetime, interval: timedelta) -> State:
    """Alive, late or dead, by the age of a service's last report. One that said it stopped, or never spoke, is dead."""
    if last is None or last.report.data == STOPPED:
        return "dead"
    age = now - last.arrived_at
    if age > DEAD_AFTER_INTERVALS * interval:
        return "dead"
    return "late" if age > LATE_AFTER_INTERVALS * interval else "alive"
