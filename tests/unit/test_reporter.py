"""Reporting: what reaches the desk, in which order, and that nothing about it ever stands in the way."""

import asyncio
import logging
import threading
from collections.abc import Callable, Mapping, Sequence

import pytest

from buydesk.backends.memory.reports import MemoryReportStore
from buydesk.errors import InvalidRequest, ReportsUnavailable
from buydesk.observability import reporter as reporting
from buydesk.observability.reporter import Reporter, ReportHandler
from buydesk.observability.reports import DATA_CHARS_MAX, STOPPED, Report
from buydesk.settings.model import Settings

CALM = Settings(report_interval_seconds=3600, report_retry_seconds=0.01)


class Desk(MemoryReportStore):
    """A desk that can be away, hang, or refuse what has "refused" in it."""

    def __init__(self) -> None:
        super().__init__(CALM)
        self.away = False
        self.hangs = False
        self.on_arrival: Callable[[], None] = lambda: None

    async def report(self, report: Report, *, verified: bool) -> None:
        self.on_arrival()
        if self.hangs:
            await asyncio.Event().wait()
        if self.away:
            raise ReportsUnavailable("away")
        if "refused" in report.data:
            raise InvalidRequest.of("data", "is not liked")
        await super().report(report, verified=verified)

    def kept(self) -> list[Report]:
        """What was reported as the services' own, the oldest first."""
        return [kept.report for kept in self._kept[True]]

    def data(self) -> list[str]:
        return [report.data for report in self.kept()]

    def last(self) -> Report:
        return self.kept()[-1]


@pytest.fixture
def desk() -> Desk:
    return Desk()


async def nothing_missing() -> Sequence[Mapping[str, str]]:
    return []


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # what is awaited is another object's state
            await asyncio.sleep(0.001)


async def test_service_says_that_it_started_and_that_it_stopped(desk: Desk) -> None:
    reporter = Reporter("db_proxy", desk, CALM)
    async with reporter.running(nothing_missing):
        await until(lambda: desk.data() == ["started"])
        assert desk.last() == Report("info", "db_proxy", 200, "started")
        reporter.report("error", 500, "something")
    assert desk.data() == ["started", "something", STOPPED]
    assert desk.last() == Report("info", "db_proxy", 200, STOPPED)
    assert reporter.dropped == 0


async def test_ready_service_says_so_every_interval(desk: Desk) -> None:
    reporter = Reporter("db_proxy", desk, Settings(report_interval_seconds=0.001))
    async with reporter.running(nothing_missing):
        await until(lambda: desk.data().count("ready") >= 3)
        assert desk.last() == Report("info", "db_proxy", 200, "ready")


async def test_service_that_misses_something_says_what(desk: Desk) -> None:
    async def missing() -> Sequence[Mapping[str, str]]:
        return [{"what": "ledger", "why": "It is away."}, {"what": "price", "why": "It is old."}]

    reporter = Reporter("create_buy_order", desk, Settings(report_interval_seconds=0.001))
    async with reporter.running(missing):
        await until(lambda: len(desk.data()) >= 2)
        assert desk.last() == Report(
            "warning", "create_buy_order", 503, "Missing: ledger: It is away.; price: It is old."
        )


async def test_service_that_was_not_ready_says_at_once_when_it_is_again(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("buydesk.observability.reporter.RECHECK_SECONDS", 0.001)
    parts = [{"what": "ledger", "why": "It is away."}]
    asked = 0

    async def missing() -> Sequence[Mapping[str, str]]:
        nonlocal asked
        asked += 1
        return parts

    desk.away = True
    reporter = Reporter("db_proxy", desk, CALM)
    async with reporter.running(missing):
        await until(lambda: reporter.failures >= 1)
        desk.away = False  # which is when a service says how it is, however long its interval
        await until(lambda: asked >= 5)
        assert desk.data() == ["started", "Missing: ledger: It is away."]
        parts.clear()
        await until(lambda: desk.data()[2:] == ["ready"])
        asked = 0
        await asyncio.sleep(0.02)
        assert (asked, desk.data()[2:]) == (0, ["ready"])


async def test_service_says_how_it_is_soon_after_it_told_of_something(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("buydesk.observability.reporter.RECHECK_SECONDS", 0.01)
    reporter = Reporter("db_proxy", desk, CALM)
    async with reporter.running(nothing_missing):
        await until(lambda: desk.data() == ["started"])
        reporter.report_event("error", 500, "an order could not be stored")
        await until(lambda: desk.data() == ["started", "an order could not be stored", "ready"])
        await asyncio.sleep(0.03)
        assert len(desk.data()) == 3


async def test_check_that_breaks_is_reported_and_asked_again(desk: Desk) -> None:
    answers = iter([ZeroDivisionError("by zero")])

    async def missing() -> Sequence[Mapping[str, str]]:
        for error in answers:
            raise error
        return []

    reporter = Reporter("db_proxy", desk, Settings(report_interval_seconds=0.001))
    async with reporter.running(missing):
        await until(lambda: "ready" in desk.data())
    assert desk.data()[:3] == ["started", "The checks failed: ZeroDivisionError: by zero", "ready"]


async def test_full_queue_lets_the_oldest_go_and_counts_them(desk: Desk) -> None:
    reporter = Reporter("db_proxy", desk, Settings(reports_waiting_max=3, report_interval_seconds=3600))
    for number in range(5):
        reporter.report("info", 200, str(number))
    assert reporter.dropped == 2
    async with reporter.running(nothing_missing):
        await until(lambda: bool(desk.data()))
    assert desk.data() == ["3", "4", "started", STOPPED]
    assert reporter.dropped == 3


async def test_desk_that_comes_back_gets_what_waited_in_order(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    desk.away = True
    reporter = Reporter("db_proxy", desk, CALM)
    with caplog.at_level(logging.DEBUG, "buydesk"):
        async with reporter.running(nothing_missing):
            reporter.report("warning", 400, "while away")
            await until(lambda: reporter.failures >= 3)
            desk.away = False
            # What is so now comes at once, long before the next report is due.
            await until(lambda: len(desk.data()) == 3)
            assert desk.data()[0] == "started"
            assert set(desk.data()) == {"started", "while away", "ready"}
    assert reporter.dropped == 0
    # A warning about a report would be the next report.
    assert {record.levelno for record in caplog.records} == {logging.DEBUG}


async def test_report_that_the_desk_refuses_holds_up_no_other(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    reporter = Reporter("db_proxy", desk, CALM)
    with caplog.at_level(logging.DEBUG, "buydesk"):
        async with reporter.running(nothing_missing):
            reporter.report("info", 200, "refused")
            reporter.report("info", 200, "next")
    assert desk.data() == ["started", "next", STOPPED]
    assert (reporter.dropped, reporter.failures) == (1, 1)
    assert {record.levelno for record in caplog.records} == {logging.DEBUG}


async def test_report_that_failed_while_the_queue_filled_is_the_oldest_and_goes(desk: Desk) -> None:
    reporter = Reporter("db_proxy", desk, Settings(reports_waiting_max=1, report_retry_seconds=60))
    desk.away = True
    desk.on_arrival = lambda: reporter.report("info", 200, "newer")
    async with reporter.running(nothing_missing):
        await until(lambda: reporter.failures == 1)
        assert reporter.dropped == 1
        desk.away = False
        desk.on_arrival = lambda: None
    assert desk.data() == [STOPPED]


async def test_leaving_does_not_wait_for_a_desk_that_is_away(desk: Desk) -> None:
    desk.away = True
    reporter = Reporter("db_proxy", desk, Settings(report_retry_seconds=3600))
    async with asyncio.timeout(10), reporter.running(nothing_missing):
        await until(lambda: reporter.failures == 1)
    assert reporter.failures == 2


async def test_leaving_sends_at_once_what_waited_for_the_next_try(desk: Desk) -> None:
    desk.away = True
    reporter = Reporter("db_proxy", desk, Settings(report_retry_seconds=3600))
    async with asyncio.timeout(10), reporter.running(nothing_missing):
        await until(lambda: reporter.failures == 1)
        desk.away = False
    assert desk.data() == ["started", STOPPED]


async def test_leaving_gives_up_on_a_desk_that_hangs(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporting, "FINAL_REPORT_SECONDS_MAX", 0.01)
    desk.hangs = True
    reporter = Reporter("db_proxy", desk, CALM)
    async with asyncio.timeout(10), reporter.running(nothing_missing):
        pass
    assert desk.data() == []


async def test_service_that_fails_says_that_it_stopped_and_fails(desk: Desk) -> None:
    reporter = Reporter("db_proxy", desk, CALM)
    with pytest.raises(ZeroDivisionError):
        async with reporter.running(nothing_missing):
            raise ZeroDivisionError
    assert desk.data() == ["started", STOPPED]


async def test_service_may_start_again(desk: Desk) -> None:
    reporter = Reporter("db_proxy", desk, CALM)
    for _ in range(2):
        async with reporter.running(nothing_missing):
            pass
        reporter.report("info", 200, "in between")
    assert desk.data() == ["started", STOPPED, "in between", "started", STOPPED]


async def test_reports_from_many_threads_all_arrive(desk: Desk) -> None:
    reporter = Reporter("db_proxy", desk, CALM)

    def talk() -> None:
        for number in range(50):
            reporter.report("info", 200, str(number))

    threads = [threading.Thread(target=talk) for _ in range(8)]
    async with reporter.running(nothing_missing):
        for thread in threads:
            thread.start()
        await until(lambda: len(desk.data()) == 401)
        for thread in threads:
            thread.join()
    assert sorted(desk.data()) == sorted([*[str(number) for number in range(50)] * 8, "started", STOPPED])


def test_report_after_the_loop_has_closed_raises_nothing(desk: Desk) -> None:
    reporter = Reporter("db_proxy", desk, CALM)
    # A thread that reports while the process ends may find the loop closed under its hands.
    reporter._loop = asyncio.new_event_loop()
    reporter._loop.close()
    reporter.report("info", 200, "too late")
    assert reporter.dropped == 0


async def test_data_is_cut_masked_and_made_fit_to_send(desk: Desk) -> None:
    reporter = Reporter("db_proxy", desk, CALM)
    async with reporter.running(nothing_missing):
        reporter.report("info", 200, "x" * DATA_CHARS_MAX * 2)
        reporter.report("info", 200, "at redis://:s3cret@cache/0")
        reporter.report("info", 200, "file \ud800.txt")
    assert desk.data()[1:-1] == ["x" * DATA_CHARS_MAX, "at redis://:***@cache/0", "file \\ud800.txt"]


class Reported:
    """Two reporters behind one handler, and what they sent."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.reporters = {name: Reporter(name, desk, CALM) for name in ("db_proxy", "create_buy_order")}
        self.handler = ReportHandler(self.reporters, "create_buy_order")

    def log(self, name: str, level: int, message: object, *arguments: object, exc_info: object = None) -> None:
        logger = logging.Logger(name)
        logger.addHandler(self.handler)
        logger.log(level, message, *arguments, exc_info=exc_info)  # type: ignore[arg-type]

    async def reports(self) -> list[Report]:
        for reporter in self.reporters.values():
            async with reporter.running(nothing_missing):
                pass
        return [report for report in self.desk.kept() if report.data not in ("started", STOPPED)]


@pytest.fixture
def reported(desk: Desk) -> Reported:
    return Reported(desk)


@pytest.mark.parametrize(
    ("logger_name", "service"),
    [
        ("buydesk.services.db_proxy", "db_proxy"),
        ("buydesk.services.db_proxy.batches", "db_proxy"),
        ("buydesk.services.fetch_buy_orders", "create_buy_order"),
        ("buydesk.services.", "create_buy_order"),
        ("other.buydesk.services.db_proxy", "create_buy_order"),
        ("asyncio", "create_buy_order"),
    ],
)
async def test_warning_is_the_report_of_the_service_that_logged_it(
    reported: Reported, logger_name: str, service: str
) -> None:
    reported.log(logger_name, logging.WARNING, "The %s is slow", "pool")
    assert await reported.reports() == [Report("warning", service, 400, "The pool is slow")]


async def test_levels_of_logging_become_levels_of_reports(reported: Reported) -> None:
    for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL):
        reported.log("buydesk.services.db_proxy", level, "x")
    levels = [(report.level, report.status) for report in await reported.reports()]
    assert levels == [("warning", 400), ("error", 500), ("critical", 500)]


async def test_exception_is_named_in_the_report_even_after_a_long_message(reported: Reported) -> None:
    error = OSError("no way to redis://:s3cret@cache")
    reported.log("buydesk", logging.ERROR, "Failed", exc_info=error)
    reported.log("buydesk", logging.ERROR, "Failed", exc_info=(None, None, None))
    reported.log("buydesk", logging.ERROR, "x" * DATA_CHARS_MAX * 2, exc_info=error)
    first, second, third = [report.data for report in await reported.reports()]
    assert first == "Failed (OSError: no way to redis://:***@cache)"
    assert second == "Failed"
    assert third == "x" * (DATA_CHARS_MAX // 2) + " (OSError: no way to redis://:***@cache)"


async def test_message_that_cannot_be_formatted_fails_nobody(
    reported: Reported, capsys: pytest.CaptureFixture[str]
) -> None:
    reported.log("buydesk", logging.ERROR, "%d", "three")
    assert "Logging error" in capsys.readouterr().err
    assert await reported.reports() == []


async def test_what_strangers_put_into_a_service_s_words_steers_no_terminal(reported: Reported) -> None:
    reported.log("buydesk", logging.ERROR, "No such key: \x9b31m\u202e\n")
    reported.log("buydesk", logging.ERROR, "\x9b" * DATA_CHARS_MAX, exc_info=OSError("\u202eaway"))
    first, second = [report.data for report in await reported.reports()]
    assert first == "No such key: \\x9b31m\\u202e\n"
    assert second == "\\x9b" * (DATA_CHARS_MAX // 8) + " (OSError: \\u202eaway)"
