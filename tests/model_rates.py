"""The model of a rate store."""

import asyncio
from collections.abc import Sequence

from buydesk.clients.rates import Count, Lot, RateStore
from buydesk.errors import DeskError
from tests.clock import FakeClock


class ModelRates(RateStore):
    """Counts in memory by the clock; a counter's first minute begins with its first request. `reports` are the lots it
    was given, `fault` is raised instead of an answer, and it answers only while the gate is open."""

    def __init__(self, clock: FakeClock) -> None:
        self.reports: list[list[Lot]] = []
        self.fault: DeskError | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self._clock = clock
        self._windows: dict[str, tuple[float, int, int]] = {}  # when it began, its requests, those of the one before

    async def take(self, lots: Sequence[Lot]) -> Sequence[Count]:
        self.reports.append(list(lots))
        await self.gate.wait()
        if self.fault is not None:
            raise self.fault
        return [self._take(lot) for lot in lots]

    def _take(self, lot: Lot) -> Count:
        now = self._clock.monotonic()
        began, current, previous = self._windows.get(lot.counter, (now, 0, 0))
        while now - began >= 60:
            began, current, previous = began + 60, 0, current
        seconds = began + 60 - now
        taken = max(0, min(lot.requests, lot.per_minute - int(current + previous * seconds / 60)))
        self._windows[lot.counter] = (began, current + taken, previous)
        return Count(taken, current + taken, previous, seconds)

    async def close(self) -> None:
        pass
