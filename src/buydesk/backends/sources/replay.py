"""Replay: the price source of the sandbox. It shows recorded minutes as if they happened now.

The position in the series moves with the clock times a speed. At either end the series runs back, so there is never a
jump. The position survives a restart in a small file.
"""

import gzip
import logging
import math
import time
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from itertools import accumulate
from pathlib import Path

import msgspec

from buydesk.money import CENTS_PER_UNIT, RATE_SCALE, Currency
from buydesk.prices import Observation, Quote
from buydesk.settings import Settings
from buydesk.times import utc_now

SERIES = "btc_minutes_2023-03-09_17.txt.gz"
# Bid and ask lie this part of the close below and above it.
HALF_SPREAD_PARTS = 10_000
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

    position_minutes: float


class Replay:
    """PriceSource of recorded minutes. With `state_path` None the position is kept in memory only.

    `clock` counts seconds, monotonically. The time between two processes does not move the position.
    """

    name = "replay"

    def __init__(
        self,
        settings: Settings,
        state_path: Path | None,
        now: Callable[[], datetime] = utc_now,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._series = load_series()
        self._speed = settings.replay_speed
        self._state_path = state_path
        self._now = now
        self._clock = clock
        self._position_minutes = 0.0 if state_path is None else _read_position(state_path)
        self._moved_at: float | None = None
        self._can_write = True

    async def quotes(self) -> Observation:
        """The minute that the replay has come to, observed now: nothing is interpolated. Never raises."""
        self._move()
        self._keep_position()
        minute = turned(int(self._position_minutes), self._series.minutes)
        observed_at = self._now()
        return Observation(
            quotes=tuple(
                _quote(currency, closes[minute], observed_at) for currency, closes in self._series.closes_cents.items()
            ),
            replayed_from=self._series.start + timedelta(minutes=minute),
        )

    async def close(self) -> None:
        """See PriceSource: there is nothing to close."""

    def _move(self) -> None:
        moment = self._clock()
        if self._moved_at is not None:
            self._position_minutes += (moment - self._moved_at) / 60 * self._speed
        self._moved_at = moment
        self._position_minutes %= _round(self._series.minutes)

    def _keep_position(self) -> None:
        """Losing the position harms nobody: a disk that is full must not cost the price."""
        if self._state_path is None:
            return
        new = self._state_path.with_name(self._state_path.name + ".new")
        try:
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
    text = gzip.decompress((files("buydesk") / "data" / SERIES).read_bytes()).decode()
    (_, start), *lines = (line.split(" ") for line in text.splitlines())
    return Series(
        start=datetime.fromtimestamp(int(start), UTC),
        closes_cents={Currency(code): array("i", accumulate(map(int, changes))) for code, *changes in lines},
    )


def _round(minutes: int) -> int:
    """There and back, in minutes: both ends are shown once."""
    return 2 * (minutes - 1)


def _quote(currency: Currency, close_cents: int, observed_at: datetime) -> Quote:
    close_e8 = close_cents * _E8_PER_CENT
    half_spread_e8 = close_e8 // HALF_SPREAD_PARTS
    return Quote(Replay.name, currency, close_e8 - half_spread_e8, close_e8 + half_spread_e8, observed_at)


def _read_position(path: Path) -> float:
    try:
        position: float = msgspec.json.decode(path.read_bytes(), type=_State).position_minutes
        if not (math.isfinite(position) and position >= 0):
            raise ValueError("the position is not a minute of the series")
    except FileNotFoundError:
        return 0.0
    except (OSError, ValueError) as error:
        _log.warning("The replay starts at the beginning: %s cannot be read: %s", path, error)
        return 0.0
    return position
