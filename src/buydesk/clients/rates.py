"""Rates: how many requests a minute a client, a key or an address may make, and the port RateStore, which counts them
for all services of a desk.

No request waits for the store. An edge decides by what it let through itself and by what the store said last, and
reports afterwards (docs/decisions/0025). All counting is by sliding windows: the requests of this minute and, the less
the longer it is over, those of the minute before.
"""

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncIterator, Sequence
from functools import lru_cache
from itertools import islice
from typing import Annotated, Any, Literal, NamedTuple, Protocol
from weakref import WeakValueDictionary

import msgspec
from cachetools import LRUCache

from buydesk.clients.model import Caller
from buydesk.errors import DeskError, RateLimited
from buydesk.hosts import Address, counted
from buydesk.settings.model import Settings
from buydesk.times import CLOCK, Clock

# What a caller does is counted by kind; `guesses` are keys that are none.
RateKind = Literal["orders", "reads", "lookups", "guesses"]

MINUTE_SECONDS = 60.0
GUESSES_PER_MINUTE = 60
# Of callers with keys, and as many of addresses: strangers who have many of these drive no client's count out.
COUNTERS_MAX = 50_000
# What a report gathers requests for, unless they are a tenth of a limit.
REPORT_PAUSE_SECONDS = 0.2
HURRY_SHARE = 10
# A count that is used up, and a store that failed, are asked for no more often.
ASK_SECONDS = 1.0
LOTS_MAX = 100
COUNTER_CHARS_MAX = 300
PER_MINUTE_MAX = 1_000_000

_log = logging.getLogger(__name__)
_PerMinute = Annotated[int, msgspec.Meta(ge=1, le=PER_MINUTE_MAX)]


class Lot(msgspec.Struct, frozen=True):
    """Requests that were let through and are to be counted together; none only asks."""

    counter: Annotated[str, msgspec.Meta(min_length=1, max_length=COUNTER_CHARS_MAX)]
    per_minute: _PerMinute
    requests: Annotated[int, msgspec.Meta(ge=0, le=PER_MINUTE_MAX)]


class Count(msgspec.Struct, frozen=True):
    """What a counter has come to: how many of a lot it took, and the requests in this minute, which ends in so many
    seconds, and in the one before."""

    taken: int
    current: int
    previous: int
    seconds: float


class RateStore(Protocol):
    """Where requests are counted for all who count into it."""

    async def take(self, lots: Sequence[Lot]) -> Sequence[Count]:
        """Counts the lots, at most LOTS_MAX, each as far as there is room below its limit; one count each, in order.
        Raises RatesUnavailable."""
        ...

    async def close(self) -> None: ...


class Rate(NamedTuple):
    """How it stands with a caller: `left` of `per_minute` requests, and the seconds until it is one more."""

    kind: RateKind
    per_minute: int
    left: int
    seconds: int
    is_over: bool


_OVER: dict[RateKind, str] = {
    "orders": "The limit is {} orders a minute.",
    "reads": "The limit is {} reads a minute.",
    "lookups": "The limit is {} look-ups a minute.",
    "guesses": "Too many invalid keys came from this address: {} a minute are the limit.",
}


def refusal(rate: Rate) -> RateLimited:
    """What a caller hears that is over its rate."""
    return RateLimited(
        _OVER[rate.kind].format(rate.per_minute),
        retry_after_seconds=rate.seconds,
        policy=rate.kind,
        per_minute=rate.per_minute,
    )


def rate_of(error: RateLimited) -> Rate | None:
    """The rate that was exceeded; None for what is limited for all callers together."""
    if "policy" not in error.facts:
        return None
    kind: Any = error.facts["policy"]
    per_minute: Any = error.facts["per_minute"]
    return Rate(kind, per_minute, 0, error.retry_after_seconds or 1, is_over=True)


class Window:
    """Requests of a minute, which ends at a monotonic time, and of the one before."""

    __slots__ = ("current", "ends_at", "previous")

    def __init__(self, ends_at: float, current: int = 0, previous: int = 0) -> None:
        self.ends_at = ends_at
        self.current = current
        self.previous = previous

    def used(self, now: float) -> float:
        """How many count now."""
        left = self.ends_at - now
        if left > 0:
            return self.current + self.previous * left / MINUTE_SECONDS
        return self.current * max(0.0, left + MINUTE_SECONDS) / MINUTE_SECONDS

    def add(self, now: float) -> None:
        """Counts one."""
        if now >= self.ends_at:
            is_next = now < self.ends_at + MINUTE_SECONDS
            self.previous = self.current if is_next else 0
            self.current = 0
            self.ends_at = (self.ends_at if is_next else now) + MINUTE_SECONDS
        self.current += 1

    def seconds_until(self, fewer_than: float, now: float) -> float:
        """When fewer than so many will count, if no more come: from after this time on."""
        left = self.ends_at - now
        if left > 0 and self.current < fewer_than:
            if not self.previous:
                return 0.0
            return max(0.0, left - (fewer_than - self.current) * MINUTE_SECONDS / self.previous)
        if not self.current:
            return 0.0
        return max(0.0, left + MINUTE_SECONDS - fewer_than * MINUTE_SECONDS / self.current)


def seconds_after(seconds: float) -> int:
    """The first whole number of seconds that is certainly more, however the time is rounded."""
    return int(seconds + 1e-6) + 1


class _Counter:
    """What an edge knows of one count: what it let through itself, exactly, and what the store said last, to which it
    adds what the store has not taken yet. That is owed as long as it is in the edge's own window."""

    __slots__ = ("asked_at", "name", "own", "per_minute", "shared", "unreported")

    def __init__(self, name: str, now: float) -> None:
        self.name = name
        self.per_minute = 0
        self.own = Window(now + MINUTE_SECONDS)
        self.shared = Window(now)
        self.unreported = 0
        self.asked_at = -math.inf

    def used(self, now: float) -> float:
        own = self.own.used(now)
        return max(own, self.shared.used(now) + min(self.unreported, own))

    def seconds_until(self, fewer_than: int, now: float) -> int:
        """Whole seconds, after which certainly fewer count, as far as this edge knows."""
        shared = self.shared.seconds_until(max(fewer_than - self.unreported, 1), now)
        return seconds_after(max(shared, self.own.seconds_until(fewer_than, now)))

    def lot(self, now: float) -> Lot:
        self.unreported = min(self.unreported, math.ceil(self.own.used(now)))
        return Lot(self.name, self.per_minute, self.unreported)


class RateLimiter:
    """An edge's limits, over a store. Its own count of a minute is exact: it never lets more through than a limit,
    whatever the store says or does. What other edges let through it hears with the answer to its next report."""

    def __init__(self, store: RateStore, settings: Settings, clock: Clock = CLOCK) -> None:
        self._store = store
        self._clock = clock
        self._client_rate = settings.client_rate_per_minute
        self._anonymous_rate = None if settings.anonymous_rate == "off" else settings.anonymous_rate
        self._of_keys: LRUCache[str, _Counter] = LRUCache(COUNTERS_MAX)
        self._of_addresses: LRUCache[str, _Counter] = LRUCache(COUNTERS_MAX)
        # What bounds the look-ups under way, by the counter of their guesses; kept by who looks up or waits.
        self._looking: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        self._due: dict[str, _Counter] = {}
        self._hurry = asyncio.Event()
        self._reporting: asyncio.Task[None] | None = None
        self._is_away = False
        self._is_closed = False

    def take(self, kind: RateKind, caller: Caller, address: Address | None) -> Rate | None:
        """Counts a request, or finds that it is over a limit: then it is not counted. None where there is no limit, or
        half of it is left: nobody has to know before."""
        counters = self._counters(kind, caller, address)
        if not counters:
            return None
        now = self._clock.monotonic()
        if not any(map(_may_be_half_used, counters)):  # nearly always, and quicker to see
            for each in counters:
                self._count(each, now)
            return None
        used = [(each, each.used(now)) for each in counters]
        over = [self._over(kind, each, now) for each, count in used if count >= each.per_minute]
        if over:
            return max(over, key=_seconds)
        for each in counters:
            self._count(each, now)
        rates = [_rate(kind, each, int(count) + 1, now) for each, count in used]
        return min((each for each in rates if 2 * each.left < each.per_minute), key=_left, default=None)

    def _counters(self, kind: RateKind, caller: Caller, address: Address | None) -> tuple[_Counter, ...]:
        if not caller.client:  # the desk's own
            return ()
        if caller.key_id is None:
            if self._anonymous_rate is None or address is None:
                return ()
            return (self._of_address(kind, address, self._anonymous_rate),)
        client_rate = caller.client_rate_per_minute
        client_rate = self._client_rate if client_rate is None else client_rate
        of_client = self._counter(self._of_keys, f"{kind}:client:{caller.client}", client_rate)
        if caller.rate_per_minute is None:
            return (of_client,)
        return of_client, self._counter(self._of_keys, f"{kind}:key:{caller.key_id}", caller.rate_per_minute)

    def _of_address(self, kind: RateKind, address: Address, per_minute: int) -> _Counter:
        return self._counter(self._of_addresses, f"{kind}:address:{_whose(address)}", per_minute)

    def _counter(self, among: LRUCache[str, _Counter], name: str, per_minute: int) -> _Counter:
        try:
            counter = among[name]
        except KeyError:
            counter = among[name] = _Counter(name, self._clock.monotonic())
        counter.per_minute = per_minute
        return counter

    def _count(self, counter: _Counter, now: float) -> None:
        counter.own.add(now)
        counter.unreported += 1
        self._report_soon(counter, now)

    def _over(self, kind: RateKind, counter: _Counter, now: float) -> Rate:
        if now - counter.asked_at >= ASK_SECONDS:
            counter.asked_at = now
            self._report_soon(counter, now)
        return Rate(kind, counter.per_minute, 0, counter.seconds_until(counter.per_minute, now), is_over=True)

    @contextlib.asynccontextmanager
    async def guess(self, address: Address) -> AsyncIterator[None]:
        """While entered, a key from the address is looked up; what would be more at once than may be wrong waits: many
        clients may come from there, whose keys are not known yet. Raises RateLimited when too many were wrong
        (`note_wrong_guess`)."""
        counter = self._of_address("guesses", address, GUESSES_PER_MINUTE)
        looking = self._looking.get(counter.name)
        if looking is None:
            looking = self._looking[counter.name] = asyncio.Semaphore(GUESSES_PER_MINUTE)
        async with looking:
            now = self._clock.monotonic()
            if counter.used(now) >= GUESSES_PER_MINUTE:
                raise refusal(self._over("guesses", counter, now))
            yield

    def note_wrong_guess(self, address: Address) -> None:
        """Counts a key that was none."""
        self._count(self._of_address("guesses", address, GUESSES_PER_MINUTE), self._clock.monotonic())

    def _report_soon(self, counter: _Counter, now: float) -> None:
        if len(self._due) < COUNTERS_MAX:  # what is beyond counts here alone
            self._due[counter.name] = counter
        is_unknown = now - counter.asked_at >= ASK_SECONDS  # how it stands elsewhere
        if is_unknown or counter.unreported * HURRY_SHARE >= counter.per_minute or len(self._due) >= LOTS_MAX:
            self._hurry.set()
        if not self._is_closed and (self._reporting is None or self._reporting.done()):
            self._reporting = asyncio.create_task(self._report_all())

    async def _report_all(self) -> None:
        while self._due:
            if len(self._due) < LOTS_MAX:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(REPORT_PAUSE_SECONDS):
                        await self._hurry.wait()
            self._hurry.clear()
            if not await self._report([self._due.pop(name) for name in list(islice(self._due, LOTS_MAX))]):
                await self._clock.sleep(ASK_SECONDS)

    async def _report(self, counters: Sequence[_Counter]) -> bool:
        """Reports what they let through, and hears how they stand; returns whether the store answered."""
        now = self._clock.monotonic()
        lots = [each.lot(now) for each in counters]
        try:
            counts = await self._store.take(lots)
        except DeskError as error:
            # The store may have counted them all the same: they are not sent again, and count here anyway.
            for each, lot in zip(counters, lots, strict=True):
                each.unreported -= lot.requests
            self._note_away(error)
            return False
        self._note_away(None)
        now = self._clock.monotonic()
        for each, count in zip(counters, counts, strict=True):
            each.unreported -= count.taken
            each.shared = Window(now + count.seconds, count.current, count.previous)
            each.asked_at = now
        return True

    def _note_away(self, fault: DeskError | None) -> None:
        if fault is not None and not self._is_away:
            _log.warning("requests are counted in this process alone: %s", fault.for_operators)
        elif fault is None and self._is_away:
            _log.info("requests are counted for all services again")
        self._is_away = fault is not None

    async def close(self) -> None:
        """Reports no more."""
        self._is_closed = True
        if self._reporting is not None:
            self._reporting.cancel()
            await asyncio.gather(self._reporting, return_exceptions=True)


@lru_cache(maxsize=4096)  # writing a network takes several times as long as all the rest
def _whose(address: Address) -> str:
    return str(counted(address))


def _may_be_half_used(counter: _Counter) -> bool:
    """Whether half of it may be used up with one more: what counts is at most all that both minutes had."""
    own = counter.own.current + counter.own.previous
    shared = counter.shared.current + counter.shared.previous + counter.unreported
    return 2 * (own if own > shared else shared) + 2 > counter.per_minute


def _rate(kind: RateKind, counter: _Counter, used: int, now: float) -> Rate:
    left, seconds = counter.per_minute - used, counter.seconds_until(used, now)
    return Rate(kind, counter.per_minute, left, seconds, is_over=False)


def _left(rate: Rate) -> int:
    return rate.left


def _seconds(rate: Rate) -> int:
    return rate.seconds
