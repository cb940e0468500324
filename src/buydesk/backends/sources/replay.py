"""Replay: the price sources of the sandbox. They show recorded minutes as if those happened now.

Five sources share one position in the series, each a little off its closes, so that their median is the close itself.
The position moves with the clock times a speed. At either end the series runs back, so there is never a jump. The
position survives a restart in a small file. A fault (`settings.sandbox_fault`) shows what the desk does with sources
that misbehave.
"""

import gzip
import logging
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from itertools import accumulate
from pathlib import Path
from typing import Annotated

import msgspec

from buydesk.errors import SourceFailed
from buydesk.money import CENTS_PER_UNIT, RATE_SCALE, Currency
from buydesk.prices.model import PriceSource, Quote, SourceResponse
from buydesk.settings.model import Settings
from buydesk.times import CLOCK, Clock

SERIES = "btc_minutes_2023-03-09_17.txt.gz"
# How far from the close each source's middle of bid and ask lies, in parts of it: in the middle the close itself.
OFFSET_PARTS = {"sandbox-1": -6, "sandbox-2": -2, "sandbox-3": 0, "sandbox-4": 3, "sandbox-5": 5}
# With the fault `disagree`: 2 % from one to the next.
APART_PARTS = {"sandbox-1": -400, "sandbox-2": -200, "sandbox-3": 0, "sandbox-4": 200, "sandbox-5": 400}
# The source that has the fault, when one source has.
FAULTY = "sandbox-1"
OUTLIER_PARTS = -3_000
PARTS = 10_000
_E8_PER_CENT = RATE_SCALE // CENTS_PER_UNIT

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Series:
    """The closes of consecutive minutes, in cents."""

    start: datetime
    closes_cents: Mapping[Currency, "array[int]"]

    @property
    def minutes(self) -> int:
        """How many there are."""
        return len(self.closes_cents[Currency.EUR])


class _State(msgspec.Struct, frozen=True):
    """What the file keeps: how far the replay is, in minutes since it began, there and back counted as one round."""

    position_minutes: Annotated[float, msgspec.Meta(ge=0)]


def sandbox_sources(settings: Settings, state_path: Path | None, clock: Clock = CLOCK) -> list[PriceSource]:
    """The five sources of the sandbox. With `state_path` None the position is kept in memory only.

    The time between two processes does not move the position.
    """
    replay = Replay(settings, state_path, clock)
    fault = settings.sandbox_fault
    parts = dict(APART_PARTS if fault == "disagree" else OFFSET_PARTS)
    if fault == "outlier":
        parts[FAULTY] = OUTLIER_PARTS
    stopped_at = clock.now() if fault == "stale" else None
    return [
        SandboxSource(name, parts[name], replay, clock, stopped_at, fault if name == FAULTY else None) for name in parts
    ]


@dataclass
class SandboxSource(PriceSource):
    """One of the five, `parts` off the closes. Its quotes are of `stopped_at`, if that is given, for ever; `fault` is
    what is wrong with this one."""

    name: str
    parts: int
    replay: "Replay"
    clock: Clock
    stopped_at: datetime | None
    fault: str | None

    async def quotes(self) -> SourceResponse:
        """The minute that the replay has come to, as this source sees it now; raises SourceFailed for its fault."""
        replayed_from, closes_cents = self.replay.minute()
        if self.fault == "source-down":
            raise SourceFailed(f"{self.name} gives no answer (a fault that was asked for).")
        quotes_of = self._nonsense if self.fault == "garbage" else self._seen
        observed_at = self.stopped_at or self.clock.now()
        return SourceResponse(quotes_of(closes_cents, observed_at), replayed_from=replayed_from)

    async def close(self) -> None:
        """There is nothing to close."""

    def _seen(self, closes_cents: Mapping[Currency, int], observed_at: datetime) -> tuple[Quote, ...]:
        quotes = []
        for currency, close_cents in closes_cents.items():
            middle_cents = close_cents * (PARTS + self.parts) // PARTS
            half_spread_cents = middle_cents // PARTS
            bid_cents, ask_cents = middle_cents - half_spread_cents, middle_cents + half_spread_cents
            quotes.append(Quote(self.name, currency, bid_cents * _E8_PER_CENT, ask_cents * _E8_PER_CENT, observed_at))
        return tuple(quotes)

    def _nonsense(self, closes_cents: Mapping[Currency, int], observed_at: datetime) -> tuple[Quote, ...]:
        """A bid above its ask, 10^30 of a currency for a bitcoin, and a bitcoin for nothing."""
        close_e8 = closes_cents[Currency.EUR] * _E8_PER_CENT
        return (
            Quote(self.name, Currency.EUR, close_e8 + RATE_SCALE, close_e8, observed_at),
            Quote(self.name, Currency.GBP, 10**30 * RATE_SCALE, 10**30 * RATE_SCALE, observed_at),
            Quote(self.name, Currency.USD, 0, 0, observed_at),
        )


class Replay:
    """The position in the series, moved and kept once a tick, however many sources ask in it."""

    def __init__(self, settings: Settings, state_path: Path | None, clock: Clock = CLOCK) -> None:
        self._series = load_series()
        self._speed = settings.replay_speed
        # All sources are asked at once; what comes sooner than this belongs to the same tick.
        self._same_tick_seconds = settings.feed_interval_seconds / 2
        self._state_path = state_path
        self._clock = clock
        self._position_minutes = 0.0 if state_path is None else _read_position(state_path)
        self._moved_at: float | None = None
        self._can_write = True

    def minute(self) -> tuple[datetime, Mapping[Currency, int]]:
        """The minute that the replay has come to and its closes in cents, nothing interpolated; the same for all who
        ask within a tick. Never raises."""
        moment = self._clock.monotonic()
        if self._moved_at is None or moment - self._moved_at >= self._same_tick_seconds:
            if self._moved_at is not None:
                self._position_minutes += (moment - self._moved_at) / 60 * self._speed
            self._moved_at = moment
            self._position_minutes %= _round(self._series.minutes)
            self._keep_position()
        index = turned(int(self._position_minutes), self._series.minutes)
        closes_cents = {currency: closes[index] for currency, closes in self._series.closes_cents.items()}
        return self._series.start + timedelta(minutes=index), closes_cents

    def _keep_position(self) -> None:
        """Losing the position harms nobody: a disk that is full must not cost the price."""
        if self._state_path is None:
            return
        new = self._state_path.with_name(self._state_path.name + ".new")
        try:
            new.touch(mode=0o600)
            new.write_bytes(msgspec.json.encode(_State(self._position_minutes)))
            new.replace(self._state_path)
        except OSError as error:
            if self._can_write:
                _log.warning("The position of the replay cannot be kept in %s: %s", self._state_path, error)
            self._can_write = False
        else:
            self._can_write = True


def turned(step: int, minutes: int) -> int:
    """The index of a step in a series of `minutes` that runs to its end and back again, for ever: 0 1 2 1 0 1 2 1 …"""
    step %= _round(minutes)
    return min(step, _round(minutes) - step)


def load_series() -> Series:
    """The recorded minutes in the package; `data/README.md` tells their origin and form."""
    text = gzip.decompress((files("buydesk.backends.sources") / "data" / SERIES).read_bytes()).decode()
    (_, start), *lines = (line.split(" ") for line in text.splitlines())
    return Series(
        start=datetime.fromtimestamp(int(start), UTC),
        closes_cents={Currency(code): array("i", accumulate(map(int, changes))) for code, *changes in lines},
    )


def _round(minutes: int) -> int:
    """There and back, in minutes: both ends are shown once."""
    return 2 * (minutes - 1)


def _read_position(path: Path) -> float:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_State).position_minutes
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        _log.warning("The replay starts at the beginning: %s cannot be read: %s", path, error)
    return 0.0
