"""The one fake clock of the tests."""

import asyncio
import math
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta

from buydesk.times import Clock

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)


class FakeClock(Clock):
    """Stands still until a test, or somebody who sleeps, moves it: `seconds` on the monotonic clock, and with it the
    wall clock. `at` sets the wall clock alone.

    `reading_seconds` pass whenever the wall clock is read. A sleep beyond `seconds_max` is cancelled: so loops end.
    `meanwhile` happens in every sleep.
    """

    def __init__(self, at: datetime = NOON, *, reading_seconds: float = 0, seconds_max: float = math.inf) -> None:
        self.seconds = 1000.0
        self.slept: list[float] = []
        self.meanwhile: Callable[[], Awaitable[object]] | None = None
        self._wall_at_0 = at - timedelta(seconds=1000)
        self._reading_seconds = reading_seconds
        self.seconds_max = seconds_max

    @property
    def at(self) -> datetime:
        """What the wall clock shows."""
        return self._wall_at_0 + timedelta(seconds=self.seconds)

    @at.setter
    def at(self, moment: datetime) -> None:
        self._wall_at_0 = moment - timedelta(seconds=self.seconds)

    def now(self) -> datetime:
        self.at += timedelta(seconds=self._reading_seconds)
        return self.at

    def monotonic(self) -> float:
        return self.seconds

    async def sleep(self, seconds: float) -> None:
        if self.seconds + seconds >= 1000 + self.seconds_max:
            raise asyncio.CancelledError
        self.slept.append(seconds)
        self.seconds += seconds
        if self.meanwhile is not None:
            await self.meanwhile()
