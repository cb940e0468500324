"""Replay: recorded minutes of the market, shown as if they happened now.

The position in the series moves with the clock times a speed. At either end the series runs back, so there is never a
jump. The position survives a restart in a small file.
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

from buydesk.money import Currency
from buydesk.settings.model import Settings
from buydesk.times import CLOCK, Clock

SERIES = "btc_minutes_2023-03-09_17.txt.gz"

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


@dataclass(frozen=True, slots=True)
class Minute:
    """The minute that the replay has come to: nothing is interpolated. `tick` counts from 1 since the start."""

    tick: int
    replayed_from: datetime
    closes_cents: Mapping[Currency, int]


class _State(msgspec.Struct, frozen=True):
    """What the file keeps: how far the replay is, in minutes since it began, there and back counted as one round."""

    position_minutes: Annotated[float, msgspec.Meta(ge=0)]


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
        self._tick = 0
        self._can_write = True

    def minute(self) -> Minute:
        """Where the replay is now; the same for all who ask within a tick. Never raises."""
        moment = self._clock.monotonic()
        if self._moved_at is None or moment - self._moved_at >= self._same_tick_seconds:
            if self._moved_at is not None:
                self._position_minutes += (moment - self._moved_at) / 60 * self._speed
            self._moved_at = moment
            self._tick += 1
            self._position_minutes %= _round(self._series.minutes)
            self._keep_position()
        index = turned(int(self._position_minutes), self._series.minutes)
        closes_cents = {currency: closes[index] for currency, closes in self._series.closes_cents.items()}
        return Minute(self._tick, self._series.start + timedelta(minutes=index), closes_cents)

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
