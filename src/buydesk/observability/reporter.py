"""Reporting: what a service says to the health desk, by itself and when something is logged as wrong.

Reports never stand in an order's way: they wait in a bounded queue that one task empties. When the queue is full the
oldest go, counted, so that a health desk that comes back hears of the present first.
"""

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence

from buydesk.errors import ReportsUnavailable
from buydesk.observability.logs import redacted, request_id_of, service_of
from buydesk.observability.reports import DATA_CHARS_MAX, STOPPED, Level, Report, ReportStore, shown
from buydesk.settings.model import Settings

FINAL_REPORT_SECONDS_MAX = 1.0

STATUS_READY = 200
STATUS_NOT_READY = 503
# What is logged has no status of its own: a warning counts as the caller's doing, anything worse as ours.
STATUS_WARNING = 400
STATUS_ERROR = 500

# A service that was not ready is asked this often whether it is again.
RECHECK_SECONDS = 5.0

_State = tuple[Level, int, str]
_READY: _State = ("info", STATUS_READY, "ready")
Missing = Callable[[], Awaitable[Sequence[Mapping[str, str]]]]

# Never above debug for anything about sending: a warning here would become a report that cannot be sent either.
_log = logging.getLogger(__name__)


class Reporter:
    """What one service reports. `dropped` counts reports that were given up, `failures` failed attempts."""

    def __init__(self, service: str, report_store: ReportStore, settings: Settings) -> None:
        self.service = service
        self.dropped = 0
        self.failures = 0
        self._report_store = report_store
        self._settings = settings
        self._waiting: deque[Report] = deque()
        self._lock = threading.Lock()
        self._wake = asyncio.Event()
        self._leaving = asyncio.Event()
        self._is_back = asyncio.Event()
        self._told_event = False
        self._loop: asyncio.AbstractEventLoop | None = None

    def report_event(self, level: Level, status: int, data: str) -> None:
        """Queues a report of something that happened; soon another one says how the service is."""
        self._told_event = True
        self.report(level, status, data)

    def report(self, level: Level, status: int, data: str) -> None:
        """Queues a report, from any thread; never waits for the desk, never raises. `data` is masked and cut."""
        report = Report(level, self.service, status, redacted(data))
        with self._lock:
            if len(self._waiting) >= self._settings.reports_waiting_max:
                self._waiting.popleft()
                self.dropped += 1
            self._waiting.append(report)
        loop = self._loop
        if loop is not None and not self._wake.is_set():
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile, in another thread
                loop.call_soon_threadsafe(self._wake.set)

    @contextlib.asynccontextmanager
    async def running(self, missing: Missing) -> AsyncIterator[None]:
        """While entered, what is queued is sent, and every interval, and when a desk that was away is back, the service
        says that it is ready or what is `missing`: items of {"what", "why"}. Leaving says "stopped" and takes
        at most FINAL_REPORT_SECONDS_MAX."""
        self._loop = asyncio.get_running_loop()
        self.report("info", STATUS_READY, "started")
        sender = asyncio.create_task(self._send())
        regular = asyncio.create_task(self._report_regularly(missing))
        try:
            yield
        finally:
            regular.cancel()
            self.report("info", STATUS_READY, STOPPED)
            self._loop = None
            self._leaving.set()
            self._wake.set()
            await asyncio.wait([sender], timeout=FINAL_REPORT_SECONDS_MAX)
            sender.cancel()
            await asyncio.gather(sender, regular, return_exceptions=True)

    async def _report_regularly(self, missing: Missing) -> None:
        last = _READY
        while True:
            last = await self._next_state(missing, last)
            self._is_back.clear()
            self.report(*last)

    async def _next_state(self, missing: Missing, last: _State) -> _State:
        """What to say next: after an interval, when a desk is back, soon after something else was reported, or as soon
        as a service that was not ready is: whoever reads its last report must not take what is over for what is."""
        loop = asyncio.get_running_loop()
        due = loop.time() + self._settings.report_interval_seconds
        while (left := due - loop.time()) > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._is_back.wait(), min(left, RECHECK_SECONDS))
                break
            if self._told_event:
                break
            if last != _READY and await _state(missing) == _READY:
                return _READY
        self._told_event = False
        return await _state(missing)

    async def _send(self) -> None:
        """Sends until the queue is empty after leaving, or until the desk fails after leaving."""
        was_away = False
        while True:
            report = self._next()
            if report is None:
                if self._leaving.is_set():
                    return
                await self._wake.wait()
            elif await self._delivered(report):
                if was_away:
                    self._is_back.set()
                was_away = False
            else:
                was_away = True
                self._put_back(report)
                if self._leaving.is_set():
                    return
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._leaving.wait(), self._settings.report_retry_seconds)

    def _next(self) -> Report | None:
        with self._lock:
            if self._waiting:
                return self._waiting.popleft()
            self._wake.clear()  # under the lock: whatever is queued from here on sets it again
            return None

    def _put_back(self, report: Report) -> None:
        with self._lock:
            if len(self._waiting) < self._settings.reports_waiting_max:
                self._waiting.appendleft(report)
            else:
                self.dropped += 1

    async def _delivered(self, report: Report) -> bool:
        """False when it makes sense to send the report again."""
        try:
            await self._report_store.report(report, verified=True)
        except ReportsUnavailable as error:
            self.failures += 1
            _log.debug("A report has to wait: %s", error.detail)
            return False
        except Exception:
            # The desk refuses this report, or has a fault of its own: the others must not wait for it.
            self.failures += 1
            self.dropped += 1
            _log.debug("A report was dropped.", exc_info=True)
        return True


class ReportHandler(logging.Handler):
    """Makes reports of warnings and worse: status 400 for a warning, 500 for what is worse.

    They are the report of the service that the logger is named after (`buydesk.services.<service>`), otherwise of
    `default`: the process as a whole. The text begins with the id of the request that it is about, if it is about one.
    """

    def __init__(self, reporters: Mapping[str, Reporter], default: str) -> None:
        super().__init__(logging.WARNING)
        self._reporters = reporters
        self._default = reporters[default]

    def emit(self, record: logging.LogRecord) -> None:
        """Queues the report of a log record; never raises."""
        try:
            text = record.getMessage()
            if record.exc_info and record.exc_info[1] is not None:
                # A long message leaves room for the exception; redacted first, because half a password shows as such.
                text = f"{shown(redacted(text), DATA_CHARS_MAX // 2)} ({_described(record.exc_info[1])})"
            if request_id := request_id_of(record):
                text = f"[{request_id}] {text}"
            level: Level = "warning"
            if record.levelno >= logging.ERROR:
                level = "critical" if record.levelno >= logging.CRITICAL else "error"
            status = STATUS_WARNING if level == "warning" else STATUS_ERROR
            self._reporters.get(service_of(record.name), self._default).report_event(level, status, text)
        except Exception:  # as every handler of logging: a bad format string fails nobody's request
            self.handleError(record)


async def _state(missing: Missing) -> _State:
    try:
        parts = await missing()
    except Exception as error:  # whatever a check did, the next one is asked
        return "error", STATUS_ERROR, f"The checks failed: {_described(error)}"
    if not parts:
        return _READY
    reasons = "; ".join(f"{part['what']}: {part['why']}" for part in parts)
    return "warning", STATUS_NOT_READY, f"Missing: {reasons}"


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
