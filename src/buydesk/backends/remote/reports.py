"""The report store over HTTP: health_check has it."""

from collections.abc import Sequence
from typing import Any, ClassVar

from buydesk.backends.remote import RemoteService
from buydesk.errors import ReportsUnavailable
from buydesk.observability.reports import Level, Report, ReportStore, StoredReport, stored_report_from


class RemoteReportStore(RemoteService, ReportStore):
    """The report store at health_check."""

    service = "health_check"
    unavailable = ReportsUnavailable
    tokens: ClassVar = {"POST": "reporting_tokens"}

    async def report(self, report: Report, *, verified: bool) -> None:
        await self.ask(lambda _: None, "/report", body=report, shows_token=verified)

    async def reports(self, service: str | None, level: Level | None, limit: int) -> Sequence[StoredReport]:
        query = {name: value for name, value in (("service", service), ("level", level)) if value is not None}
        return await self.read(
            lambda document: [stored_report_from(each) for each in document["data"]], "/reports", limit=limit, **query
        )

    async def last_of_each(self) -> Sequence[StoredReport]:
        return await self.read(_last_reports, "/status")


def _last_reports(status: Any) -> list[StoredReport]:
    if not status["reports"]["ok"]:
        raise ReportsUnavailable(status["reports"]["detail"], retry_after_seconds=1)
    last = [each["last_report"] for each in status["services"].values()]
    return [stored_report_from(each) for each in last if each is not None]
