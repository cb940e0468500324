"""Asking one price source: whatever it does, asking it ends in time, raises nothing and is told."""

import asyncio
import gc
import logging
import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

from buydesk.errors import PriceUnavailable, SourceFailed
from buydesk.money import RATE_E8_MAX, Currency
from buydesk.prices.model import Quote, RejectedQuote, SourceResponse, SourceStatus
from buydesk.prices.polling import ANSWER_ITEMS_MAX, SourcePoller
from buydesk.settings.model import Settings
from tests.clock import FakeClock

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)
EUR, GBP, USD = Currency
QUOTES = tuple(Quote("exchange", currency, 999 * 10**8, 1001 * 10**8, NOON) for currency in Currency)

Behaviour = Callable[[], Awaitable[Any]]


class Exchange:
    """A stand-in for an exchange, which does one after the other what a test wants, the last for ever."""

    name = "exchange"

    def __init__(self, *behaviours: Behaviour) -> None:
        self.asked = 0
        self._behaviours = behaviours

    async def quotes(self) -> Any:
        self.asked += 1
        return await self._behaviours[min(self.asked, len(self._behaviours)) - 1]()

    async def close(self) -> None:
        raise AssertionError("who asks does not close")


def saying(said: object) -> Behaviour:
    async def say() -> object:
        return said

    return say


def raising(error: BaseException) -> Behaviour:
    async def fail() -> SourceResponse:
        raise error

    return fail


async def hang() -> SourceResponse:
    await asyncio.Event().wait()
    raise AssertionError("unreachable")


well = saying(SourceResponse(QUOTES))
closed = raising(SourceFailed("exchange is closed."))


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def asked(clock: FakeClock, *behaviours: Behaviour, **settings: Any) -> SourcePoller:
    return SourcePoller(Exchange(*behaviours), Settings(**settings), clock=clock)


async def reason_of(source: SourcePoller) -> str:
    """Why the source gives no quotes, when it is asked."""
    seen = await source.poll()
    assert seen.quotes == ()
    [rejected] = seen.rejected
    assert rejected.source == "exchange"
    return rejected.reason


async def test_source_that_answers_well_is_passed_on_and_known(clock: FakeClock) -> None:
    said = SourceResponse(QUOTES, (RejectedQuote("exchange", "one of four is missing"),), NOON)
    source = asked(clock, saying(said))
    assert await source.poll() == said
    assert source.state() == SourceStatus("exchange", "", 0, dict.fromkeys(Currency, 1000 * 10**8), NOON, None)
    assert source.failures_total == 0


async def test_source_that_was_not_asked_yet_says_so(clock: FakeClock) -> None:
    assert asked(clock, well).state() == SourceStatus("exchange", "has not been asked yet", 0, None, None, None)


async def test_why_quotes_were_not_used_is_told_of_a_source_that_answers(clock: FakeClock) -> None:
    source = asked(clock, well, closed)
    await source.poll()
    assert source.state("EUR: is older than 30 s").detail == "EUR: is older than 30 s"
    await source.poll()
    assert source.state("EUR: is older than 30 s").detail == "is closed"


async def test_last_quotes_of_a_source_that_fails_stay_known_with_their_time(clock: FakeClock) -> None:
    early = Quote("exchange", GBP, 10**11, 10**11, NOON - timedelta(seconds=9))
    source = asked(clock, saying(SourceResponse((QUOTES[0], early))), closed)
    await source.poll()
    await source.poll()
    state = source.state()
    assert state.mids_e8 == {EUR: 1000 * 10**8, GBP: 10**11}
    assert state.quoted_at == NOON - timedelta(seconds=9)
    assert (state.failures, state.detail) == (1, "is closed")


async def test_what_is_no_rate_is_passed_on_to_the_rule_but_not_shown(clock: FakeClock) -> None:
    source = asked(clock, saying(SourceResponse((Quote("exchange", EUR, 0, RATE_E8_MAX + 1, NOON), QUOTES[2]))))
    assert len((await source.poll()).quotes) == 2
    assert source.state().mids_e8 == {USD: 1000 * 10**8}


async def test_quotes_are_of_the_source_that_was_asked_whatever_name_they_bear(clock: FakeClock) -> None:
    said = SourceResponse(
        tuple(Quote(f"other-{each.currency}", *_rest(each)) for each in QUOTES), (RejectedQuote("x", "y"),)
    )
    seen = await asked(clock, saying(said)).poll()
    assert seen.quotes == QUOTES
    assert seen.rejected == (RejectedQuote("exchange", "y"),)


def _rest(quote: Quote) -> tuple[Currency, int, int, datetime]:
    return quote.currency, quote.bid_e8, quote.ask_e8, quote.observed_at


async def test_times_are_brought_to_utc(clock: FakeClock) -> None:
    there = NOON.astimezone(timezone(timedelta(hours=9)))
    seen = await asked(clock, saying(SourceResponse((Quote("exchange", EUR, 10**11, 10**11, there),)))).poll()
    assert seen.quotes[0].observed_at.tzinfo is UTC
    assert seen.quotes[0].observed_at == NOON


class Odd(BaseException):
    pass


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        (closed, "is closed"),
        (raising(SourceFailed("Somebody else's words")), "Somebody else's words"),
        (raising(RuntimeError("a fault")), "failed (RuntimeError)"),
        (raising(PriceUnavailable("none")), "failed (PriceUnavailable)"),
        (raising(MemoryError()), "failed (MemoryError)"),
        (raising(asyncio.CancelledError()), "failed (CancelledError)"),
        (raising(SystemExit(3)), "failed (SystemExit)"),
        (raising(KeyboardInterrupt()), "failed (KeyboardInterrupt)"),
        (raising(GeneratorExit()), "failed (GeneratorExit)"),
        (raising(Odd()), "failed (Odd)"),
        (saying(None), "failed (AttributeError)"),
        (saying(SourceResponse(None)), "failed (TypeError)"),  # type: ignore[arg-type]
        (saying(SourceResponse((None,))), "failed (AttributeError)"),  # type: ignore[arg-type]
        (saying(SourceResponse(())), "gave no quotes"),
        (
            saying(SourceResponse((), (RejectedQuote("x", "EUR: no"), RejectedQuote("x", "GBP: no")))),
            "gave no quotes; EUR: no; GBP: no",
        ),
        (
            saying(SourceResponse((Quote("exchange", EUR, 1, 1, NOON.replace(tzinfo=None)),))),
            "gave a time without a zone",
        ),
        (
            saying(
                SourceResponse((Quote("x", EUR, 1, 1, datetime.max.replace(tzinfo=timezone(-timedelta(hours=9)))),))
            ),
            "failed (OverflowError)",
        ),
        (saying(SourceResponse(QUOTES * 4, (RejectedQuote("x", "y"),))), "said more than 12 things at once"),
        (raising(SourceFailed("exchange said \ud800\x00\n☃ " + "x" * 1000)), ("said ???☃ " + "x" * 1000)[:200]),
    ],
)
async def test_whatever_a_source_does_is_a_reason_and_no_error(
    clock: FakeClock, behaviour: Behaviour, reason: str
) -> None:
    source = asked(clock, behaviour)
    assert await reason_of(source) == reason
    assert (source.state().detail, source.state().failures, source.failures_total) == (reason, 1, 1)


async def test_source_may_say_as_much_as_allowed(clock: FakeClock) -> None:
    seen = await asked(clock, saying(SourceResponse(QUOTES * 3, (RejectedQuote("x", "y"),) * 3))).poll()
    assert len(seen.quotes) + len(seen.rejected) == ANSWER_ITEMS_MAX


async def test_reasons_that_a_source_gives_for_some_of_its_quotes_are_bounded_too(clock: FakeClock) -> None:
    said = SourceResponse(QUOTES, (RejectedQuote("x", "\udfff" + "y" * 1000, QUOTES[0]),))
    [rejected] = (await asked(clock, saying(said)).poll()).rejected
    assert rejected == RejectedQuote("exchange", "?" + "y" * 199)


async def test_source_that_is_no_coroutine_is_a_reason_too(clock: FakeClock) -> None:
    class NoSource:
        name = "exchange"
        quotes = None

    source = SourcePoller(NoSource(), Settings(), clock=clock)  # type: ignore[arg-type]
    assert await reason_of(source) == "failed (TypeError)"


async def test_fault_that_is_not_foreseen_is_logged_with_its_traceback_and_is_no_warning(
    clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        await asked(clock, raising(RuntimeError("a fault"))).poll()
        await asked(clock, closed).poll()
    [told] = caplog.records
    assert told.levelno == logging.INFO
    assert told.exc_info is not None
    assert "exchange failed" in told.getMessage()


async def test_call_that_hangs_is_given_up_after_the_time_limit_and_cancelled(clock: FakeClock) -> None:
    cancelled = asyncio.Event()

    async def hang_until_cancelled() -> SourceResponse:
        try:
            return await hang()
        finally:
            cancelled.set()

    source = asked(clock, hang_until_cancelled, well, source_seconds_max=0.01)
    assert await reason_of(source) == "gave no answer within 0.01 s"
    await cancelled.wait()
    assert (await source.poll()).quotes == QUOTES


async def test_call_that_cannot_be_cancelled_is_waited_for_no_longer_and_no_second_one_is_made(
    clock: FakeClock,
) -> None:
    released = asyncio.Event()

    async def refuse_to_end() -> SourceResponse:
        while not released.is_set():
            try:
                await released.wait()
            except asyncio.CancelledError:
                continue
        raise RuntimeError("too late to be heard")

    exchange = Exchange(refuse_to_end, well)
    source = SourcePoller(exchange, Settings(source_seconds_max=0.01), clock=clock)
    async with asyncio.timeout(5):
        assert await reason_of(source) == "gave no answer within 0.01 s"
        assert await reason_of(source) == "is still busy with an earlier call"
        assert exchange.asked == 1
        released.set()
        await asyncio.sleep(0)
        assert (await source.poll()).quotes == QUOTES
    gc.collect()  # an exception that nobody fetched would be a warning now, and with that an error


async def test_who_asks_can_be_cancelled_at_once_and_takes_the_call_along(clock: FakeClock) -> None:
    started, ended = asyncio.Event(), asyncio.Event()

    async def hang_until_cancelled() -> SourceResponse:
        started.set()
        try:
            return await hang()
        finally:
            ended.set()

    asking = asyncio.create_task(asked(clock, hang_until_cancelled, source_seconds_max=3600).poll())
    async with asyncio.timeout(5):
        await started.wait()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await ended.wait()


RESTING: dict[str, Any] = {"source_cooldown_seconds": 10, "source_cooldown_seconds_max": 35}


async def fail_until_it_rests(source: SourcePoller) -> None:
    for failures in (1, 2, 3):
        assert source.state().resting_until is None
        assert await reason_of(source) == "is closed"
        assert source.state().failures == failures


async def test_source_that_failed_three_times_in_a_row_is_left_alone_for_its_rest(clock: FakeClock) -> None:
    exchange = Exchange(closed, closed, closed, well)
    source = SourcePoller(exchange, Settings(**RESTING), clock=clock)
    await fail_until_it_rests(source)
    assert source.state().resting_until == NOON + timedelta(seconds=10)
    clock.seconds += 9.5
    assert await reason_of(source) == "is left alone after 3 failures in a row; the last: is closed"
    assert (exchange.asked, source.failures_total) == (3, 3)
    rests_until = NOON + timedelta(seconds=10)
    assert source.state() == SourceStatus("exchange", "is closed", 3, None, None, rests_until, "is closed", NOON)
    clock.seconds += 0.5
    assert (await source.poll()).quotes == QUOTES
    assert (source.state().failures, source.state().resting_until, source.state().detail) == (0, None, "")
    assert (source.state().last_error, source.state().failed_at) == ("is closed", NOON), "it is not forgotten"


async def test_each_further_failure_doubles_the_rest_up_to_the_longest(clock: FakeClock) -> None:
    source = asked(clock, closed, **RESTING)
    await fail_until_it_rests(source)
    for rest_seconds in (10, 20, 35, 35):
        clock.seconds += rest_seconds - 0.01
        assert (await reason_of(source)).startswith("is left alone")
        clock.seconds += 0.01
        assert await reason_of(source) == "is closed"
    assert source.failures_total == 7


async def test_rest_begins_anew_after_a_success(clock: FakeClock) -> None:
    source = asked(clock, *[closed] * 4, well, closed, **RESTING)
    await fail_until_it_rests(source)
    clock.seconds += 10
    assert await reason_of(source) == "is closed"
    clock.seconds += 20
    assert (await source.poll()).quotes == QUOTES
    await fail_until_it_rests(source)
    assert source.state().resting_until == clock.now() + timedelta(seconds=10)


async def test_failures_that_a_success_parts_are_not_in_a_row(clock: FakeClock) -> None:
    source = asked(clock, closed, closed, well, closed, closed, well, **RESTING)
    answers = [bool((await source.poll()).quotes) for _ in range(6)]
    assert answers == [False, False, True, False, False, True]
    assert source.failures_total == 4


async def test_source_that_never_comes_back_rests_as_long_as_ever_after_any_time(clock: FakeClock) -> None:
    """The rest is doubled at most so often that no number overflows."""
    source = asked(clock, closed, source_cooldown_seconds=1, source_cooldown_seconds_max=2)
    for _ in range(1100):
        await source.poll()
        clock.seconds += 2
    assert source.state().failures == source.failures_total == 1100
    assert sys.float_info.max_exp < 1100


async def test_longest_rest_is_never_exceeded(clock: FakeClock) -> None:
    source = asked(clock, closed, source_cooldown_seconds=100, source_cooldown_seconds_max=5)
    await fail_until_it_rests(source)
    assert source.state().resting_until == NOON + timedelta(seconds=5)
