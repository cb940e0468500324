"""The price cache of create_buy_order: the current price record, fetched every second, and how long it is valid."""

import asyncio
import contextlib
import logging
from dataclasses import replace
from datetime import datetime, timedelta

from buydesk.errors import DeskError, InvalidRequest, PriceStale, PriceStoreUnavailable, PriceUnavailable
from buydesk.money import Currency
from buydesk.prices.model import (
    RETRY_AFTER_SECONDS,
    PriceRecord,
    PriceStore,
    UsablePrice,
    latest_time,
    seconds_to_next_tick,
)
from buydesk.prices.verification import require_proven
from buydesk.reading import WrongMember
from buydesk.settings.model import Settings
from buydesk.times import CLOCK, Clock

FIRST_PRICE_SECONDS_MAX = 5.0
_FIRST_PRICE_PAUSE_SECONDS = 0.05


class PriceCache:
    """The prices to sell at. Once a record is here, nothing makes it valid for longer: not a wall clock that steps
    back, and not the store. `log` gets what goes wrong without anybody being refused for it.

    Where the newest record has no price in a currency, the one before goes on being valid; where it doubts the price,
    nothing is sold in that currency from then on.
    """

    def __init__(self, store: PriceStore, settings: Settings, log: logging.Logger, clock: Clock = CLOCK) -> None:
        self._store = store
        self._settings = settings
        self._log = log
        self._clock = clock
        self._latest: UsablePrice | None = None
        self._prices: dict[Currency, UsablePrice] = {}
        self._problem: DeskError = PriceUnavailable("No price has been looked up yet.", retry_after_seconds=1)
        self._ticked_at: datetime | None = None
        self._ticks_missed_after = timedelta(seconds=1.5 * settings.feed_interval_seconds)

    def price(self, currency: Currency) -> PriceRecord | DeskError:
        """The record to price with now in a currency or, when there is none, why.

        InvalidRequest where nothing is sold for the currency: like every such reason it goes to the ledger with the
        order, which answers one that it has already.
        """
        if currency not in self._settings.currencies:
            return InvalidRequest.of("currency", f"must be one of {', '.join(self._settings.currencies)}")
        moment = self._clock.monotonic()
        own = self._prices.get(currency)
        if own is not None and moment < own.until:
            return own.record
        problem = self._problem_of(currency, moment)
        if self._ticked_at is not None:
            interval_seconds = self._settings.feed_interval_seconds
            problem.retry_after_seconds = seconds_to_next_tick(self._ticked_at, interval_seconds, self._clock.now())
        return problem

    def _problem_of(self, currency: Currency, moment: float) -> DeskError:
        if self._latest is None:
            return self._problem
        try:
            return self._latest.usable(moment).problem_of(currency)
        except PriceStale as error:
            return error

    async def refresh(self) -> None:
        """Fetches the record once. What is here stays until it expires, unless the store says that it has, or that
        prices are unsettled."""
        started = self._clock.monotonic()
        try:
            record = await self._store.latest()
        except DeskError as error:
            self._problem = error
            if isinstance(error, PriceStoreUnavailable):
                self._problem = PriceUnavailable(error.detail, retry_after_seconds=error.retry_after_seconds)
            if isinstance(error, PriceStale):
                self._end(error, started)
            return
        now = self._clock.now()
        try:
            require_proven(record, self._settings, now)
        except WrongMember as error:
            detail = f"The price store holds what is no price of this desk: {error}."
            self._problem = PriceUnavailable(detail, retry_after_seconds=RETRY_AFTER_SECONDS)
            return
        if not self._has_newer(record, now):
            self._take(UsablePrice.seen(record, now, started, self._latest))

    def _take(self, price: UsablePrice) -> None:
        before, self._latest = self._ticked_at, price
        self._ticked_at = price.record.decided_at
        if before is None or self._ticked_at is None or self._ticked_at - before > self._ticks_missed_after:
            self._prices.clear()  # a record between that was not seen may have had doubts
        self._prices |= dict.fromkeys(price.record.rates_e8, price)
        for currency in price.record.unsettled:
            self._prices.pop(currency, None)

    def _end(self, stale: PriceStale, moment: float) -> None:
        """The store says that a price has ended, and with it all before."""
        if self._ticked_at is not None and self._clock.now() - self._ticked_at > self._ticks_missed_after:
            self._prices.clear()  # a record that was not seen, and may have had doubts, is what has ended
        for currency, price in self._prices.items():
            if stale.is_of(price.record.as_of):
                self._prices[currency] = replace(price, until=moment)
        if self._latest is not None and stale.is_of(self._latest.record.as_of):
            self._latest = replace(self._latest, until=moment)

    def _has_newer(self, record: PriceRecord, now: datetime) -> bool:
        """Whether what is here is newer: an older record comes from a store that lost the newer one, or from a hand.
        One from the future is not newer (`latest_time`)."""
        latest = latest_time(now, self._settings.clock_skew_seconds_max)
        return self._latest is not None and record.made_at < self._latest.record.made_at <= latest

    async def wait_for_first(self, seconds_max: float) -> None:
        """Returns once a price is here or the store says that the sources prove none, or after so many seconds."""
        give_up_at = self._clock.monotonic() + seconds_max
        await self.refresh()
        while not self._prices and self._clock.monotonic() < give_up_at:
            with contextlib.suppress(DeskError):  # there is no status yet
                if (await self._store.feed_status()).problem:
                    return
            await asyncio.sleep(_FIRST_PRICE_PAUSE_SECONDS)
            await self.refresh()

    async def refresh_forever(self) -> None:
        """Refreshes for as long as the service runs."""
        while True:
            try:
                await self.refresh()
            except Exception:  # a fault of one look must not end all later ones: orders would stop for good
                self._log.exception("the price could not be looked up")
            await asyncio.sleep(self._settings.price_refresh_seconds)

    async def check(self) -> None:
        """Raises what stands in the way of pricing an order now, in whatever currency."""
        found = [self.price(currency) for currency in self._settings.currencies]
        problems = [each for each in found if isinstance(each, DeskError)]
        if len(problems) == len(found):
            raise problems[0]
