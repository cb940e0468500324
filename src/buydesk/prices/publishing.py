"""Hanging: a price record stays on the price board until its end, though the board may come and go.

Nothing here makes a record usable for longer: its validity is counted down on a monotonic clock from the moment the
price was decided, so that a wall clock that steps back adds nothing to it.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import TypeVar

from buydesk.errors import DeskError, PriceBoardUnavailable, PriceUnavailable
from buydesk.money import Currency
from buydesk.prices.model import HISTORY_MINUTES_MAX, FeedState, PriceBoard, PriceRecord, stale, valid_record
from buydesk.times import utc_now

# A price board that was restarted, with or without what it held, shall have the price again at once, not at the next
# tick: this often a board that is away is tried, and one that is there looked at.
BOARD_RETRY_SECONDS = 1.0

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class DecidedPrice:
    """A record, and until when it may be used on the monotonic clock, in seconds."""

    record: PriceRecord
    usable_until: float


class Hanging:
    """What one updater hangs on a board. `away` says why the board cannot be used, "" while it can.

    `last` is the record that was published last, valid or not. `clock` counts seconds, monotonically; `sleep` waits for
    so many of them. `log` gets one warning when the board goes away.
    """

    def __init__(
        self,
        board: PriceBoard,
        skew_seconds_max: float,
        log: logging.Logger,
        *,
        now: Callable[[], datetime] = utc_now,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.away = ""
        self.last: PriceRecord | None = None
        self._board = board
        self._skew_seconds_max = skew_seconds_max
        self._log = log
        self._now = now
        self._clock = clock
        self._sleep = sleep
        self._price: DecidedPrice | None = None
        self._state: FeedState | None = None
        self._is_heard = True

    async def publish(self, price: DecidedPrice, give_up_at: float) -> None:
        """Hangs a record, and offers it again and again to a board that is away.

        Raises PriceBoardUnavailable when `give_up_at` has come, PriceStale when the record has ended before,
        PriceUnavailable when it lies in the future, and what else the board raises.
        """
        await self._insist(partial(self._board.publish, price.record), price, give_up_at)
        self._price, self.last = price, price.record

    async def last_rates(self, price: DecidedPrice, give_up_at: float) -> Mapping[Currency, int] | None:
        """The rates that were published before `price`, by whomever: None if there are none. Raises as `publish`."""
        points = await self._insist(partial(self._board.history, HISTORY_MINUTES_MAX, 1), price, give_up_at)
        if points:
            return points[-1].rates_e8
        return self.last.rates_e8 if self.last else None  # a board that was restarted has forgotten it

    async def tell(self, state: FeedState) -> None:
        """Tells the board how the sources are. Raises nothing: a failure is logged."""
        self._state = state
        try:
            await self._reach(partial(self._board.tell, state))
        except PriceBoardUnavailable:
            pass  # which is in the log already
        except Exception as error:
            if self._is_heard:
                self._log.warning("The price board does not take how the sources are: %s", error)
            self._is_heard = False
        else:
            self._is_heard = True

    async def keep(self, due: float) -> None:
        """Waits until `due` on the clock, and hangs the record again when the board has lost it."""
        while due - self._clock() > BOARD_RETRY_SECONDS and self._price is not None:
            await self._sleep(BOARD_RETRY_SECONDS)
            await self._look(self._price)
        await self._sleep(max(0, due - self._clock()))

    async def _look(self, price: DecidedPrice) -> None:
        try:
            self._require_usable(price)
            hanging = await self._hanging()
            if hanging is None:
                # As it was first published: never valid for longer.
                await self._reach(partial(self._board.publish, price.record))
                self._log.info("The price board had lost the price, which hangs there again.")
                if self._state is not None:
                    await self.tell(self._state)
        except DeskError:
            pass  # it has ended, or the board has another updater's or is away: nothing that could be mended here
        except Exception as error:  # of whatever kind: the next tick comes, and says what it cannot do
            self._lose_sight(error)

    async def _hanging(self) -> PriceRecord | None:
        try:
            return await self._reach(self._board.latest)
        except PriceUnavailable:
            return None

    def _require_usable(self, price: DecidedPrice) -> None:
        """Raises PriceStale, or PriceUnavailable for a record from the future: the clock was set back since."""
        if self._clock() >= price.usable_until:
            raise stale(price.record.as_of, price.record.expires_at)
        valid_record(price.record, self._now(), self._skew_seconds_max)

    async def _insist(self, call: Callable[[], Awaitable[_T]], price: DecidedPrice, give_up_at: float) -> _T:
        while True:
            self._require_usable(price)
            try:
                return await self._reach(call)
            except PriceBoardUnavailable:
                if self._clock() + BOARD_RETRY_SECONDS >= give_up_at:
                    raise
                await self._sleep(BOARD_RETRY_SECONDS)

    async def _reach(self, call: Callable[[], Awaitable[_T]]) -> _T:
        """Calls the board, and keeps in mind whether it is there."""
        try:
            result = await call()
        except PriceBoardUnavailable as error:
            self._lose_sight(error)
            raise
        except DeskError:  # an answer of the board's own
            self._see_again()
            raise
        self._see_again()
        return result

    def _lose_sight(self, error: Exception) -> None:
        if not self.away:
            self._log.warning("The price board cannot be used: %s", error)
        self.away = str(error) or type(error).__name__

    def _see_again(self) -> None:
        if self.away:
            self._log.info("The price board can be used again.")
        self.away = ""
