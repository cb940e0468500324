"""api_updater: the loop that asks the feed's source for prices and publishes them. Nobody calls it."""

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import datetime, timedelta

from fastapi import FastAPI

from buydesk.errors import DeskError, PriceBoardUnavailable, PriceStale, PriceSuperseded, PriceUnavailable, SourceFailed
from buydesk.prices import PriceBoard, PriceRecord, PriceSource, price_record, valid_record
from buydesk.reporting import Reporter
from buydesk.settings import Settings
from buydesk.times import utc_now
from buydesk.web import Service, service_app

# A price board that was restarted, with or without what it held, shall have the price again at once, not at the next
# tick: this often a board that is away is tried, and one that is there looked at.
BOARD_RETRY_SECONDS = 1.0

_log = logging.getLogger(__name__)


def create_app(settings: Settings, source: PriceSource, board: PriceBoard, reporter: Reporter) -> Service:
    """The service. It closes none of what it is given."""
    updater = Updater(settings, source, board)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        running = asyncio.create_task(updater.run())
        try:
            yield
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    return service_app(
        "api_updater", "Asks for prices and publishes them", {"prices": updater.check}, reporter, lifespan
    )


class Updater:
    """The loop. `clock` counts seconds, monotonically; `sleep` waits for so many of them."""

    def __init__(
        self,
        settings: Settings,
        source: PriceSource,
        board: PriceBoard,
        *,
        now: Callable[[], datetime] = utc_now,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._feed = settings.price_feed
        self._ttl = timedelta(seconds=settings.price_ttl_seconds)
        self._interval_seconds = settings.feed_interval_seconds
        self._source_seconds_max = settings.source_seconds_max
        self._source = source
        self._board = board
        self._now = now
        self._clock = clock
        self._sleep = sleep
        self._failure: str | None = "No price has been published yet."
        self._skew_seconds_max = settings.clock_skew_seconds_max
        self._published: PriceRecord | None = None
        self._is_board_seen = True

    async def run(self) -> None:
        """Asks and publishes every interval, the first time at once, until cancelled."""
        due = self._clock()
        while True:
            await self._tick(due + self._interval_seconds)
            due = next_due(due, self._clock(), self._interval_seconds)
            await self._keep_hanging(due)

    async def check(self) -> None:
        """Raises PriceUnavailable unless the last price was published."""
        if self._failure is not None:
            raise PriceUnavailable(self._failure, retry_after_seconds=math.ceil(self._interval_seconds))

    async def _tick(self, next_tick_at: float) -> None:
        try:
            await self._publish(await self._observe(), next_tick_at)
        except DeskError as error:
            self._failure = error.detail
            _log.warning("No price was published: %s", error.detail)
        except Exception as error:  # a fault of one answer must not end the prices of all later ones
            self._failure = f"Something went wrong here ({type(error).__name__})."
            _log.exception("No price was published")

    async def _observe(self) -> PriceRecord:
        try:
            async with asyncio.timeout(self._source_seconds_max):
                seen = await self._source.quotes()
        except TimeoutError as error:
            raise SourceFailed(f"{self._source.name} gave no answer within {self._source_seconds_max:g} s.") from error
        return price_record(seen.quotes, (), self._feed, self._ttl, seen.replayed_from)

    async def _publish(self, record: PriceRecord, next_tick_at: float) -> None:
        """Offers the record, until it hangs, has expired or the next one is due, to a board that is away."""
        is_first = True
        while True:
            record.require_fresh(self._now())
            try:
                await self._board.publish(record)
            except PriceBoardUnavailable as error:
                if self._clock() + BOARD_RETRY_SECONDS >= next_tick_at:
                    raise
                self._failure = error.detail
                if is_first:
                    _log.warning("No price was published yet: %s", error.detail)
                is_first = False
                await self._sleep(BOARD_RETRY_SECONDS)
            else:
                self._failure = None
                self._published = record
                return

    async def _keep_hanging(self, due: float) -> None:
        """Waits until the next tick is due, and hangs the last record again when the board has lost it."""
        while due - self._clock() > BOARD_RETRY_SECONDS and (record := self._still_valid()) is not None:
            await self._sleep(BOARD_RETRY_SECONDS)
            await self._hang_again(record)
        await self._sleep(max(0, due - self._clock()))

    def _still_valid(self) -> PriceRecord | None:
        try:
            return valid_record(self._published, self._now(), self._skew_seconds_max)
        except (PriceUnavailable, PriceStale):
            return None

    async def _hang_again(self, record: PriceRecord) -> None:
        """Never makes it valid for longer: the board gets it as it was first published."""
        try:
            record.require_fresh(self._now())
            try:
                await self._board.latest()
            except PriceUnavailable:
                await self._board.publish(record)
                _log.info("The price board had lost the price, which hangs there again.")
        except (PriceStale, PriceSuperseded):
            pass  # it has expired, or the board has another updater's: nothing to mend
        except Exception as error:  # of whatever kind: the next tick comes, and says what it cannot do
            if self._is_board_seen:
                _log.warning("The price board cannot be looked at: %s", error)
            self._is_board_seen = False
            return
        self._is_board_seen = True


def next_due(due: float, moment: float, interval: float) -> float:
    """The first time of the schedule after `moment`: ticks that were missed are not made up for."""
    missed = max(0, math.floor((moment - due) / interval))
    return due + (missed + 1) * interval
