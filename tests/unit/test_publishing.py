"""Hanging: a price stays on the board for as long as it may be used and no longer, though the board comes and goes."""

import logging
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from buydesk.backends.memory.prices import MemoryPriceBoard
from buydesk.errors import InvalidRequest, PriceBoardUnavailable, PriceStale, PriceSuperseded, PriceUnavailable
from buydesk.money import Currency
from buydesk.prices.model import FeedState, PricePoint, PriceRecord
from buydesk.prices.publishing import DecidedPrice, Hanging
from buydesk.settings import Settings

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)
RATES = dict.fromkeys(Currency, 10**11)
RECORD = PriceRecord(uuid.UUID(int=1), NOON, NOON + timedelta(seconds=60), "sandbox", RATES)
STATE = FeedState(NOON, "sandbox", "", ())
OLD_RATES = dict.fromkeys(Currency, 2 * 10**11)
LOG = "tests.hanging"


class Time:
    """A monotonic clock that only sleeping moves, and a wall clock that can be set beside it."""

    def __init__(self) -> None:
        self.seconds = 1000.0
        self.slept: list[float] = []
        self.wall_is_off = timedelta()
        self.meanwhile: Callable[[], Awaitable[object]] | None = None

    def clock(self) -> float:
        return self.seconds

    def now(self) -> datetime:
        return NOON + timedelta(seconds=self.seconds - 1000) + self.wall_is_off

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.seconds += seconds
        if self.meanwhile is not None:
            await self.meanwhile()


class Board(MemoryPriceBoard):
    """A real board that is away, fails or loses what it holds when a test says so."""

    def __init__(self, time: Time) -> None:
        super().__init__(Settings(), time.now, time.clock)
        self.failure: Exception | None = None
        self.published: list[PriceRecord] = []
        self.told: list[FeedState] = []

    async def publish(self, record: PriceRecord) -> PriceRecord:
        self._fail()
        hanging = await super().publish(record)
        self.published.append(record)
        return hanging

    async def latest(self) -> PriceRecord:
        self._fail()
        return await super().latest()

    async def history(self, minutes: int, points: int) -> Sequence[PricePoint]:
        self._fail()
        return await super().history(minutes, points)

    async def tell(self, state: FeedState) -> None:
        self._fail()
        await super().tell(state)
        self.told.append(state)

    def lose(self) -> None:
        self._hanging = None

    def forget(self) -> None:
        self.lose()
        self._points.clear()

    def _fail(self) -> None:
        if self.failure is not None:
            raise self.failure


AWAY = PriceBoardUnavailable("The board is away.")


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def board(time: Time) -> Board:
    return Board(time)


@pytest.fixture
def hanging(time: Time, board: Board) -> Hanging:
    return Hanging(board, 10, logging.getLogger(LOG), now=time.now, clock=time.clock, sleep=time.sleep)


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What was logged until now, as "LEVEL message"."""
    caplog.set_level(logging.INFO, LOG)
    return lambda: [f"{each.levelname} {each.getMessage()}" for each in caplog.records]


def decided(usable_seconds: float = 60, record: PriceRecord = RECORD) -> DecidedPrice:
    return DecidedPrice(record, 1000 + usable_seconds)


def at(time: Time, seconds: float, act: Callable[[], object]) -> None:
    """Does something at a second of the test."""

    async def act_when_due() -> None:
        if time.seconds == 1000 + seconds:
            act()

    time.meanwhile = act_when_due


async def test_price_hangs_on_a_board_that_is_there(hanging: Hanging, board: Board) -> None:
    assert hanging.last is None
    await hanging.publish(decided(), 1015)
    assert await board.latest() is hanging.last is RECORD


async def test_board_that_is_away_is_offered_the_price_every_second_and_one_warning(
    time: Time, hanging: Hanging, board: Board, logged: Callable[[], list[str]]
) -> None:
    board.failure = AWAY
    at(time, 3, lambda: setattr(board, "failure", None))
    await hanging.publish(decided(), 1015)
    assert time.slept == [1, 1, 1]
    assert board.published == [RECORD]
    assert logged() == [
        "WARNING The price board cannot be used: The board is away.",
        "INFO The price board can be used again.",
    ]
    assert hanging.away == ""


@pytest.mark.parametrize(("give_up_at", "slept"), [(1002.5, [1, 1]), (1002, [1]), (1000, [])])
async def test_board_that_stays_away_is_given_up_before_the_next_tick(
    time: Time, hanging: Hanging, board: Board, give_up_at: float, slept: list[float]
) -> None:
    board.failure = AWAY
    with pytest.raises(PriceBoardUnavailable):
        await hanging.publish(decided(), give_up_at)
    assert time.slept == slept
    assert hanging.last is None
    assert hanging.away == "The board is away."


async def test_price_that_ends_while_the_board_is_away_is_not_offered_any_more(
    time: Time, hanging: Hanging, board: Board
) -> None:
    board.failure = AWAY
    at(time, 5, lambda: setattr(board, "failure", None))
    with pytest.raises(PriceStale):
        await hanging.publish(decided(usable_seconds=5), 1015)
    assert board.published == []


async def test_wall_clock_that_steps_back_makes_no_price_usable_for_longer(
    time: Time, hanging: Hanging, board: Board
) -> None:
    board.failure = AWAY

    def step_back() -> None:
        time.wall_is_off = -timedelta(seconds=9)
        board.failure = None

    at(time, 60, step_back)
    assert NOON + timedelta(seconds=60 - 9) < RECORD.expires_at
    with pytest.raises(PriceStale):
        await hanging.publish(decided(), 1100)


async def test_wall_clock_that_steps_forward_ends_a_price_too(time: Time, hanging: Hanging) -> None:
    time.wall_is_off = timedelta(seconds=60)
    with pytest.raises(PriceStale):
        await hanging.publish(decided(), 1015)


async def test_price_from_further_in_the_future_than_clocks_differ_is_refused(
    time: Time, hanging: Hanging, board: Board
) -> None:
    time.wall_is_off = -timedelta(seconds=10)
    await hanging.publish(decided(), 1015)
    time.wall_is_off -= timedelta(microseconds=1)
    with pytest.raises(PriceUnavailable):
        await hanging.publish(decided(), 1015)
    assert len(board.published) == 1


async def test_newer_price_on_the_board_stays(hanging: Hanging, board: Board) -> None:
    newer = replace(RECORD, id=uuid.UUID(int=2), as_of=NOON + timedelta(seconds=1))
    await board.publish(newer)
    with pytest.raises(PriceSuperseded):
        await hanging.publish(decided(), 1015)
    assert await board.latest() is newer
    assert hanging.away == ""


async def test_last_rates_are_those_on_the_board_whoever_published_them(hanging: Hanging, board: Board) -> None:
    other = replace(RECORD, id=uuid.UUID(int=2), as_of=NOON + timedelta(seconds=1), rates_e8=OLD_RATES)
    await hanging.publish(decided(), 1015)
    assert await hanging.last_rates(decided(), 1015) == RATES
    await board.publish(other)
    assert await hanging.last_rates(decided(), 1015) == OLD_RATES


async def test_last_rates_of_a_board_that_has_forgotten_them_are_those_this_updater_published(
    hanging: Hanging, board: Board
) -> None:
    await hanging.publish(decided(), 1015)
    board.forget()
    assert await hanging.last_rates(decided(), 1015) == RATES


async def test_last_rates_after_a_start_are_the_newest_of_the_boards_history(
    time: Time, hanging: Hanging, board: Board
) -> None:
    assert await hanging.last_rates(decided(), 1015) is None
    for minutes, rates_e8 in ((600, RATES), (500, OLD_RATES)):
        as_of = NOON - timedelta(minutes=minutes)
        await board.publish(replace(RECORD, id=uuid.uuid4(), as_of=as_of, rates_e8=rates_e8))
    assert await hanging.last_rates(decided(), 1015) == OLD_RATES
    board.failure = AWAY
    at(time, 2, lambda: setattr(board, "failure", None))
    assert await hanging.last_rates(decided(), 1015) == OLD_RATES
    assert time.slept == [1, 1]


async def test_price_that_the_board_has_lost_hangs_again_within_a_second_as_it_was_and_word_of_the_sources_too(
    time: Time, hanging: Hanging, board: Board, logged: Callable[[], list[str]]
) -> None:
    await hanging.publish(decided(), 1015)
    await hanging.tell(STATE)
    at(time, 5, board.lose)
    await hanging.keep(1015)
    assert board.published == [RECORD] * 2
    assert board.told == [STATE] * 2
    assert time.seconds == 1015
    assert logged() == ["INFO The price board had lost the price, which hangs there again."]


async def test_price_that_was_lost_before_anything_was_told_hangs_again(
    time: Time, hanging: Hanging, board: Board
) -> None:
    await hanging.publish(decided(), 1015)
    at(time, 5, board.lose)
    await hanging.keep(1015)
    assert (len(board.published), board.told) == (2, [])


async def test_lost_price_is_hung_again_until_it_ends_and_not_longer(
    time: Time, hanging: Hanging, board: Board
) -> None:
    async def lose() -> None:
        board.lose()

    await hanging.publish(decided(usable_seconds=20), 1015)
    time.meanwhile = lose
    await hanging.keep(1045)
    assert len(board.published) == 1 + 19  # every second but the 20th


async def test_board_that_was_set_back_in_time_gets_no_price_from_the_future(
    time: Time, hanging: Hanging, board: Board
) -> None:
    await hanging.publish(decided(), 1015)
    time.wall_is_off = -timedelta(hours=1)
    await hanging.keep(1015)
    assert len(board.published) == 1


async def test_board_that_is_away_between_ticks_is_one_warning_each_time(
    time: Time, hanging: Hanging, board: Board, logged: Callable[[], list[str]]
) -> None:
    async def come_and_go() -> None:
        board.failure = AWAY if time.seconds in (1002, 1003, 1004, 1008) else None

    await hanging.publish(decided(), 1015)
    time.meanwhile = come_and_go
    await hanging.keep(1015)
    away, back = "WARNING The price board cannot be used: The board is away.", "INFO The price board can be used again."
    assert logged() == [away, back] * 2


async def test_board_that_fails_in_a_way_not_foreseen_ends_nothing(
    time: Time, hanging: Hanging, board: Board, logged: Callable[[], list[str]]
) -> None:
    await hanging.publish(decided(), 1015)
    board.failure = RuntimeError()
    await hanging.keep(1015)
    assert hanging.away == "RuntimeError"
    assert len(logged()) == 1
    await hanging.tell(STATE)
    assert board.told == []


async def test_record_that_another_updater_hung_is_left_alone(
    time: Time, hanging: Hanging, board: Board, logged: Callable[[], list[str]]
) -> None:
    await hanging.publish(decided(), 1015)
    board.lose()
    await board.publish(replace(RECORD, id=uuid.UUID(int=2), expires_at=NOON + timedelta(seconds=1)))
    await hanging.keep(1015)
    assert len(board.published) == 2
    assert logged() == []


async def test_board_is_not_looked_at_when_the_next_tick_is_due(time: Time, hanging: Hanging) -> None:
    await hanging.publish(decided(), 1015)
    await hanging.keep(1002)
    assert time.slept == [1, 1]


async def test_nothing_is_looked_at_before_there_is_a_price(time: Time, hanging: Hanging, board: Board) -> None:
    board.failure = RuntimeError("nobody may call")
    await hanging.keep(1015)
    await hanging.keep(1010)
    assert time.slept == [15, 0]


@pytest.mark.parametrize("failure", [InvalidRequest("It is not plausible."), RuntimeError("a fault")])
async def test_board_that_does_not_take_the_state_is_one_warning_until_it_does(
    hanging: Hanging, board: Board, logged: Callable[[], list[str]], failure: Exception
) -> None:
    for each in (failure, failure, None, failure):
        board.failure = each
        await hanging.tell(STATE)
    assert board.told == [STATE]
    assert logged() == [f"WARNING The price board does not take how the sources are: {failure}"] * 2


async def test_state_that_cannot_be_told_because_the_board_is_away_is_no_further_warning(
    hanging: Hanging, board: Board, logged: Callable[[], list[str]]
) -> None:
    board.failure = AWAY
    await hanging.tell(STATE)
    await hanging.tell(STATE)
    assert logged() == ["WARNING The price board cannot be used: The board is away."]
