"""The five price sources of the sandbox, and how they misbehave on request.

They show the same minute of the replay, each a little off its closes, so that their median is the close itself. Two
have a clock of their own, as two of the five exchanges do. A fault (`settings.sandbox_fault`) is one play of all five.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from buydesk.backends.sources.replay import Minute, Replay
from buydesk.errors import SourceFailed
from buydesk.money import CENTS_PER_UNIT, RATE_SCALE, Currency
from buydesk.prices.model import PriceSource, Quote, RejectedQuote, SourceResponse
from buydesk.settings.model import Settings
from buydesk.settings.types import SandboxFault
from buydesk.times import CLOCK, Clock

PARTS = 10_000
# How far from the close each source's middle of bid and ask lies, in parts of it: in the middle the close itself.
OFFSET_PARTS = {"sandbox-1": -6, "sandbox-2": -2, "sandbox-3": 0, "sandbox-4": 3, "sandbox-5": 5}
CLOCKLESS = ("sandbox-3", "sandbox-4", "sandbox-5")
# The source that has the fault, when one has, and that is left when others go; two when two have it.
FAULTY = "sandbox-1"
FAULTY_TWO = ("sandbox-1", "sandbox-2")
# The first one at which what needs a price before it happens.
LATER_TICK = 3
OUTLIER_PARTS = -3_000
# With the fault `disagree`: 2 % from one to the next.
APART_PARTS = {"sandbox-1": -400, "sandbox-2": -200, "sandbox-3": 0, "sandbox-4": 200, "sandbox-5": 400}
# With the fault `frozen`: so far the others move on with each tick, and so far in all.
AWAY_PARTS, AWAY_PARTS_MAX = 100, 400
JUMP_PARTS = 1_000
CRASHED_CENTS = CENTS_PER_UNIT
_E8_PER_CENT = RATE_SCALE // CENTS_PER_UNIT
_ASKED_FOR = "(a fault that was asked for)"


def sandbox_sources(settings: Settings, state_path: Path | None, clock: Clock = CLOCK) -> list[PriceSource]:
    """The five sources of the sandbox. With `state_path` None the position is kept in memory only.

    The time between two processes does not move the position.
    """
    replay, fault = Replay(settings, state_path, clock), settings.sandbox_fault
    stopped_at = clock.now() if fault == "stale" else None
    return [SandboxSource(name, replay, clock, stopped_at, fault) for name in OFFSET_PARTS]


@dataclass
class SandboxSource(PriceSource):
    """One of the five. Its quotes are of `stopped_at`, if that is given, for ever."""

    name: str
    replay: Replay
    clock: Clock
    stopped_at: datetime | None
    fault: SandboxFault | None
    frozen: Minute | None = None

    async def quotes(self) -> SourceResponse:
        """The minute that the replay has come to, as this source sees it now; raises SourceFailed for its fault."""
        minute = self._minute()
        if is_away(self.fault, self.name, minute.tick):
            raise SourceFailed(f"{self.name} gives no answer {_ASKED_FOR}.")
        closes, missing = shown(self.fault, self.name, minute)
        parts = offset_parts(self.fault, self.name, minute.tick)
        is_nonsense = self.fault == "garbage" and self.name == FAULTY
        quotes_of = self._nonsense if is_nonsense else self._around
        return SourceResponse(
            quotes_of(closes, parts, self.stopped_at or self.clock.now()),
            tuple(RejectedQuote(self.name, f"{currency}: has no book {_ASKED_FOR}") for currency in missing),
            minute.replayed_from,
            # The number of the tick is all that has changed for certain.
            b"%d" % minute.tick if self.name in CLOCKLESS else None,
        )

    async def close(self) -> None:
        """There is nothing to close."""

    def _minute(self) -> Minute:
        minute = self.replay.minute()
        if self.fault == "frozen" and self.name in CLOCKLESS:
            self.frozen = self.frozen or minute
            return self.frozen
        return minute

    def _around(self, closes_cents: Mapping[Currency, int], parts: int, observed_at: datetime) -> tuple[Quote, ...]:
        """Books closely around the closes, so many parts off."""
        quotes = []
        for currency, close_cents in closes_cents.items():
            middle_cents = close_cents * (PARTS + parts) // PARTS
            half_spread_cents = middle_cents // PARTS
            bid_cents, ask_cents = middle_cents - half_spread_cents, middle_cents + half_spread_cents
            quotes.append(Quote(self.name, currency, bid_cents * _E8_PER_CENT, ask_cents * _E8_PER_CENT, observed_at))
        return tuple(quotes)

    def _nonsense(self, closes_cents: Mapping[Currency, int], _: int, observed_at: datetime) -> tuple[Quote, ...]:
        """A bid above its ask, 10^30 of a currency for a bitcoin, and a bitcoin for nothing."""
        close_e8 = closes_cents[Currency.EUR] * _E8_PER_CENT
        return (
            Quote(self.name, Currency.EUR, close_e8 + RATE_SCALE, close_e8, observed_at),
            Quote(self.name, Currency.GBP, 10**30 * RATE_SCALE, 10**30 * RATE_SCALE, observed_at),
            Quote(self.name, Currency.USD, 0, 0, observed_at),
        )


def is_away(fault: SandboxFault | None, name: str, tick: int) -> bool:
    """Whether the source gives no answer."""
    match fault:
        case "source-down":
            return name == FAULTY
        case "swapped":  # once there has been a price, nobody but those who are wrong is left
            return name not in FAULTY_TWO and tick >= LATER_TICK
        case _:
            return False


def shown(fault: SandboxFault | None, name: str, minute: Minute) -> tuple[Mapping[Currency, int], tuple[Currency, ...]]:
    """The closes, in cents, that the source sees in the minute, and the currencies that it has no book of."""
    closes = minute.closes_cents
    match fault:
        case "one-currency" if name != FAULTY:
            return {each: cents for each, cents in closes.items() if each != Currency.GBP}, (Currency.GBP,)
        case "crash" if minute.tick >= LATER_TICK:
            return dict.fromkeys(closes, CRASHED_CENTS), ()
        case "jump" if minute.tick >= LATER_TICK:
            return {each: cents * (PARTS + JUMP_PARTS) // PARTS for each, cents in closes.items()}, ()
        case "swapped" if name in FAULTY_TWO:
            return dict.fromkeys(closes, closes[Currency.USD]), ()
        case _:
            return closes, ()


def offset_parts(fault: SandboxFault | None, name: str, tick: int) -> int:
    """How far from those closes the source lies, in parts."""
    match fault:
        case "disagree":
            return APART_PARTS[name]
        case "outlier" if name == FAULTY:
            return OUTLIER_PARTS
        case "crash" if tick >= LATER_TICK:
            return 0
        case "frozen" if name not in CLOCKLESS:
            return OFFSET_PARTS[name] + min((tick - 1) * AWAY_PARTS, AWAY_PARTS_MAX)
        case _:
            return OFFSET_PARTS[name]
