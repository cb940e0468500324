"""Publishing: a price record stays in the price store until it expires, even if the store goes down in between.

Nothing here makes a record usable for longer: its validity is counted down on a monotonic clock from the moment the
price was decided, so that a wall clock that steps back adds nothing to it.
"""

import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

from buydesk.errors import DeskError, PriceStoreUnavailable, PriceUnavailable
from buydesk.prices.model import FeedStatus, PriceRecord, PriceStore, UsablePrice, valid_record
from buydesk.times import CLOCK, Clock

# A price store that was restarted, with or without its data, gets the price again at once, not at the next tick: this
# often a store that is down is tried, and one that is up is checked.
STORE_RETRY_SECONDS = 1.0

_T = TypeVar("_T")


class PricePublisher:
    """What one updater publishes to a store. `down` says why the store cannot be used, "" while it can.

    `last` is the record that was published last, valid or not. `log` gets one warning when the store goes down.
    """

    def __init__(
        self, store: PriceStore, skew_seconds_max: float, log: logging.Logger, *, clock: Clock = CLOCK
    ) -> None:
        self.down = ""
        self.last: PriceRecord | None = None
        self._store = store
        self._skew_seconds_max = skew_seconds_max
        self._log = log
        self._clock = clock
        self._price: UsablePrice | None = None
        self._status: FeedStatus | None = None
        self._status_is_taken = True

    async def publish(self, price: UsablePrice, give_up_at: float) -> None:
        """Publishes a record, and tries again and again while the store is down.

        Raises PriceStoreUnavailable when `give_up_at` has come, PriceStale when the record has ended before,
        PriceUnavailable when it lies in the future, and what else the store raises.
        """
        await self._retry_until(partial(self._store.publish, price.record), price, give_up_at)
        self._price, self.last = price, price.record

    async def put_feed_status(self, status: FeedStatus) -> None:
        """Stores how the sources are. Raises nothing: a failure is logged."""
        self._status = status
        try:
            await self._call_store(partial(self._store.put_feed_status, status))
        except PriceStoreUnavailable:
            pass  # which is in the log already
        except Exception as error:
            if self._status_is_taken:
                self._log.warning("The status of the sources could not be stored: %s", error)
            self._status_is_taken = False
        else:
            self._status_is_taken = True

    async def keep_published(self, due: float) -> None:
        """Waits until `due` on the clock, and publishes the record again when the store has lost it."""
        while due - self._clock.monotonic() > STORE_RETRY_SECONDS and self._price is not None:
            await self._clock.sleep(STORE_RETRY_SECONDS)
            await self._publish_again_if_lost(self._price)
        await self._clock.sleep(max(0, due - self._clock.monotonic()))

    async def _publish_again_if_lost(self, price: UsablePrice) -> None:
        try:
            self._require_usable(price)
            current = await self._current_record()
            if current is None or current.made_at < price.record.made_at:
                # As it was first published: never valid for longer.
                await self._call_store(partial(self._store.publish, price.record))
                self._log.info("The price store had lost the price, which is published again.")
                if self._status is not None:
                    await self.put_feed_status(self._status)
        except DeskError:
            pass  # it has expired, or the store has another updater's or is down: nothing that could be mended here
        except Exception as error:  # of whatever kind: the next tick comes, and says what it cannot do
            self._mark_down(error)

    async def _current_record(self) -> PriceRecord | None:
        try:
            return await self._call_store(self._store.latest)
        except PriceUnavailable:
            return None

    def _require_usable(self, price: UsablePrice) -> None:
        """Raises PriceStale, or PriceUnavailable for a record from the future: the clock was set back since."""
        valid_record(price.usable(self._clock.monotonic()), self._clock.now(), self._skew_seconds_max)

    async def _retry_until(self, call: Callable[[], Awaitable[_T]], price: UsablePrice, give_up_at: float) -> _T:
        while True:
            self._require_usable(price)
            try:
                return await self._call_store(call)
            except PriceStoreUnavailable:
                if self._clock.monotonic() + STORE_RETRY_SECONDS >= give_up_at:
                    raise
                await self._clock.sleep(STORE_RETRY_SECONDS)

    async def _call_store(self, call: Callable[[], Awaitable[_T]]) -> _T:
        """Calls the store, and remembers whether it is up."""
        try:
            result = await call()
        except PriceStoreUnavailable as error:
            self._mark_down(error)
            raise
        except DeskError:  # an answer of the store's own
            self._mark_up()
            raise
        self._mark_up()
        return result

    def _mark_down(self, error: Exception) -> None:
        if not self.down:
            self._log.warning("The price store is down: %s", error)
        self.down = str(error) or type(error).__name__

    def _mark_up(self) -> None:
        if self.down:
            self._log.info("The price store is up again.")
        self.down = ""
