"""api_updater: its loop on clocks of the test's own, and the service as it runs."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx2
import pytest

from buydesk.backends.memory_health import MemoryHealthDesk
from buydesk.backends.memory_prices import MemoryPriceBoard
from buydesk.backends.remote import RemotePriceBoard
from buydesk.errors import PriceBoardUnavailable, PriceUnavailable, SourceFailed
from buydesk.money import Currency
from buydesk.prices import Observation, PriceBoard, PriceRecord, Quote
from buydesk.reporting import Reporter
from buydesk.services import api_cache_proxy, api_updater
from buydesk.services.api_updater import Updater, next_due
from buydesk.settings import Settings
from tests.serving import free_port, served

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)
HISTORIC = datetime(2023, 3, 9, tzinfo=UTC)


class Time:
    """A clock that only sleeping moves; it ends the loop so many seconds after its beginning."""

    def __init__(self, seconds_max: float = 15) -> None:
        self.seconds = 1000.0
        self.slept: list[float] = []
        self.seconds_max = seconds_max
        self.meanwhile: Callable[[], Awaitable[object]] | None = None

    def clock(self) -> float:
        return self.seconds

    def now(self) -> datetime:
        return NOON + timedelta(seconds=self.seconds - 1000)

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        if self.seconds + seconds >= 1000 + self.seconds_max:
            raise asyncio.CancelledError
        self.seconds += seconds
        if self.meanwhile is not None:
            await self.meanwhile()


Behaviour = Callable[[], Awaitable[Observation]]


class Exchange:
    """A stand-in for an exchange, which does one after the other what a test wants, the last for ever."""

    name = "exchange"

    def __init__(self, time: Time, *behaviours: Behaviour) -> None:
        self.asked = 0
        self.asked_at: list[float] = []
        self._time = time
        self._behaviours = behaviours or (self.answer,)

    async def quotes(self) -> Observation:
        self.asked += 1
        self.asked_at.append(self._time.seconds - 1000)
        return await self._behaviours[min(self.asked, len(self._behaviours)) - 1]()

    async def answer(self) -> Observation:
        return observation(self._time.now())

    async def close(self) -> None:
        raise AssertionError("the service closes nothing that it was given")


def observation(observed_at: datetime, currencies: tuple[Currency, ...] = tuple(Currency)) -> Observation:
    quotes = tuple(Quote("exchange", currency, 999 * 10**8, 1001 * 10**8, observed_at) for currency in currencies)
    return Observation(quotes, HISTORIC)


def answering(time: Time) -> Behaviour:
    async def answer() -> Observation:
        return observation(time.now())

    return answer


def failing(error: Exception) -> Behaviour:
    async def fail() -> Observation:
        raise error

    return fail


def taking(time: Time, seconds: float) -> Behaviour:
    async def take() -> Observation:
        time.seconds += seconds
        return observation(time.now())

    return take


def updater(time: Time, exchange: Exchange, board: PriceBoard, **settings: Any) -> Updater:
    return Updater(Settings(**settings), exchange, board, now=time.now, clock=time.clock, sleep=time.sleep)


async def run(updater: Updater) -> None:
    with pytest.raises(asyncio.CancelledError):
        await updater.run()


async def failure_of(updater: Updater) -> str:
    with pytest.raises(PriceUnavailable) as refusal:
        await updater.check()
    return refusal.value.detail


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def board(time: Time) -> MemoryPriceBoard:
    return MemoryPriceBoard(Settings(), time.now)


@contextlib.asynccontextmanager
async def served_board(behind: MemoryPriceBoard, time: Time, port: int) -> AsyncIterator[str]:
    """api_cache_proxy at a port, over a board in memory."""
    settings = Settings(internal_token="the-token")
    reporter = Reporter("api_cache_proxy", MemoryHealthDesk(settings), settings)
    async with served(api_cache_proxy.create_app(settings, behind, reporter, time.now), port) as url:
        yield url


@pytest.fixture
async def far_board() -> AsyncIterator[RemotePriceBoard]:
    """A board whose service does not run."""
    remote = RemotePriceBoard(f"http://127.0.0.1:{free_port()}", Settings(internal_token="the-token"))
    yield remote
    await remote.close()


def port_of(far_board: RemotePriceBoard) -> int:
    return int(far_board._url.rpartition(":")[2])


async def test_first_price_is_published_at_once(time: Time, board: MemoryPriceBoard) -> None:
    await run(updater(time, Exchange(time), board, feed_interval_seconds=15, price_ttl_seconds=45))
    published = await board.latest()
    assert (published.as_of, published.expires_at) == (NOON, NOON + timedelta(seconds=45))
    assert published.rates_e8 == dict.fromkeys(Currency, 1000 * 10**8)
    assert len(published.used) == 3
    assert (published.feed, published.replayed_from) == ("sandbox", HISTORIC)


async def test_record_names_the_feed_of_the_settings(time: Time, board: MemoryPriceBoard) -> None:
    await run(updater(time, Exchange(time), board, price_feed="live"))
    assert (await board.latest()).feed == "live"


async def test_a_new_price_is_published_every_interval(time: Time, board: MemoryPriceBoard) -> None:
    time.seconds_max = 60
    await run(updater(time, Exchange(time), board, feed_interval_seconds=15))
    assert [(each.as_of - NOON).total_seconds() for each in await board.history(60)] == [0, 15, 30, 45]


async def test_ticks_keep_to_their_schedule_however_long_they_take(time: Time, board: MemoryPriceBoard) -> None:
    time.seconds_max = 60
    exchange = Exchange(time, taking(time, 0.25), taking(time, 4), taking(time, 0))
    await run(updater(time, exchange, board, feed_interval_seconds=15))
    assert exchange.asked_at == [0, 15, 30, 45]


async def test_ticks_that_were_missed_are_not_made_up_for(time: Time, board: MemoryPriceBoard) -> None:
    time.seconds_max = 75
    exchange = Exchange(time, taking(time, 40), answering(time))
    await run(updater(time, exchange, board, feed_interval_seconds=15))
    assert exchange.asked_at == [0, 45, 60]


@pytest.mark.parametrize(
    ("moment", "due"),
    [(100, 115), (100.1, 115), (114.9, 115), (115, 130), (131, 145), (99, 115), (1e6 + 100, 1e6 + 105)],
)
def test_next_tick_is_the_first_of_the_schedule_to_come(moment: float, due: float) -> None:
    assert next_due(100, moment, 15) == due


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        (failing(SourceFailed("The exchange is closed.")), "The exchange is closed."),
        (failing(RuntimeError("a fault")), "Something went wrong here (RuntimeError)."),
    ],
)
async def test_failing_source_publishes_nothing_and_does_not_end_the_loop(
    time: Time, board: MemoryPriceBoard, caplog: pytest.LogCaptureFixture, behaviour: Behaviour, reason: str
) -> None:
    time.seconds_max = 30
    failed = updater(time, Exchange(time, behaviour), board)
    await run(failed)
    assert list(await board.history(60)) == []
    assert await failure_of(failed) == reason
    assert [each.name for each in caplog.records] == ["buydesk.services.api_updater"] * 2
    assert {each.levelno for each in caplog.records} <= {logging.WARNING, logging.ERROR}


async def test_quotes_that_lack_a_currency_publish_nothing(time: Time, board: MemoryPriceBoard) -> None:
    async def euros() -> Observation:
        return observation(time.now(), (Currency.EUR,))

    failed = updater(time, Exchange(time, euros), board)
    await run(failed)
    assert await failure_of(failed) == "There is no usable quote for GBP, USD."
    assert list(await board.history(60)) == []


async def test_two_quotes_for_a_currency_publish_nothing(time: Time, board: MemoryPriceBoard) -> None:
    async def twice() -> Observation:
        return observation(time.now(), (*Currency, Currency.EUR))

    failed = updater(time, Exchange(time, twice), board)
    await run(failed)
    assert await failure_of(failed) == "There is more than one quote for a currency."


async def test_old_price_is_never_published_again_while_the_source_fails(time: Time, board: MemoryPriceBoard) -> None:
    time.seconds_max = 45
    fails = failing(SourceFailed("The exchange is closed."))
    failed = updater(time, Exchange(time, answering(time), fails), board)
    await run(failed)
    assert len(await board.history(60)) == 1
    assert (await board.latest()).expires_at == NOON + timedelta(seconds=60)
    assert await failure_of(failed) == "The exchange is closed."


async def test_source_that_recovers_is_published_again(time: Time, board: MemoryPriceBoard) -> None:
    time.seconds_max = 30
    healed = updater(time, Exchange(time, failing(SourceFailed("no")), answering(time)), board)
    await run(healed)
    await healed.check()
    assert (await board.latest()).as_of == NOON + timedelta(seconds=15)


async def test_source_that_hangs_is_given_up_after_its_time_limit(time: Time, board: MemoryPriceBoard) -> None:
    failed = updater(time, Exchange(time, hang), board, source_seconds_max=0.02)
    await run(failed)
    assert await failure_of(failed) == "exchange gave no answer within 0.02 s."


async def test_quotes_that_have_expired_on_arrival_are_not_published(time: Time, board: MemoryPriceBoard) -> None:
    async def late() -> Observation:
        seen = observation(time.now())
        time.seconds += 60
        return seen

    failed = updater(time, Exchange(time, late), board, price_ttl_seconds=60)
    await run(failed)
    assert "could be used until" in await failure_of(failed)
    assert list(await board.history(60)) == []


async def test_newer_price_on_the_board_stays_and_is_told(
    time: Time, board: MemoryPriceBoard, caplog: pytest.LogCaptureFixture
) -> None:
    await run(updater(time, Exchange(time), board))
    hanging = await board.latest()
    earlier = Time(seconds_max=10)
    earlier.seconds -= 5
    superseded = updater(earlier, Exchange(earlier), board)
    await run(superseded)
    assert await board.latest() == hanging
    assert "hangs already" in await failure_of(superseded)
    assert len(caplog.records) == 1


async def test_board_that_is_away_is_offered_the_same_price_every_second_and_one_warning(
    time: Time, board: MemoryPriceBoard, far_board: RemotePriceBoard, caplog: pytest.LogCaptureFixture
) -> None:
    async with contextlib.AsyncExitStack() as stack:

        async def come_back() -> None:
            if len(time.slept) == 3:
                await stack.enter_async_context(served_board(board, time, port_of(far_board)))

        time.meanwhile = come_back
        exchange = Exchange(time)
        healed = updater(time, exchange, far_board, feed_interval_seconds=15)
        await run(healed)
        assert (await far_board.latest()).as_of == NOON
        await healed.check()
    assert exchange.asked == 1
    warnings = [each for each in caplog.records if each.name == "buydesk.services.api_updater"]
    assert [each.levelno for each in warnings] == [logging.WARNING]


async def test_board_that_stays_away_gets_the_next_price_when_it_is_due(
    time: Time, far_board: RemotePriceBoard, caplog: pytest.LogCaptureFixture
) -> None:
    time.seconds_max = 3.5
    exchange = Exchange(time)
    failed = updater(time, exchange, far_board, feed_interval_seconds=2.5)
    await run(failed)
    assert time.slept == [1, 1, 0.5, 1]
    assert exchange.asked == 2
    assert "gave no answer" in await failure_of(failed)
    assert len(caplog.records) == 3


async def test_price_that_expires_while_the_board_is_away_is_not_offered_any_more(
    time: Time, far_board: RemotePriceBoard
) -> None:
    async def two_seconds_before_it_expires() -> Observation:
        return observation(time.now() - timedelta(seconds=58))

    exchange = Exchange(time, two_seconds_before_it_expires)
    failed = updater(time, exchange, far_board, feed_interval_seconds=15, price_ttl_seconds=60)
    await run(failed)
    assert time.slept == [1, 1, 13]
    assert "could be used until" in await failure_of(failed)


class Restarting(MemoryPriceBoard):
    """A board that loses everything, is away, or fails at the seconds a test says."""

    def __init__(self, time: Time, **at: Callable[[float], bool]) -> None:
        super().__init__(Settings(), time.now)
        self._time = time
        self._at = at
        self.published: list[PriceRecord] = []

    async def publish(self, record: PriceRecord) -> None:
        self.published.append(record)
        await super().publish(record)

    async def latest(self) -> PriceRecord:
        seconds = self._time.seconds - 1000
        if self._at.get("away", never)(seconds):
            raise PriceBoardUnavailable("The board is away.")
        if self._at.get("loses", never)(seconds):
            self._hanging = None
        return await super().latest()


def never(_: float) -> bool:
    return False


async def test_price_that_the_board_has_lost_hangs_again_within_a_second_and_as_it_was(
    time: Time, caplog: pytest.LogCaptureFixture
) -> None:
    board = Restarting(time, loses=lambda seconds: seconds == 5)
    with caplog.at_level(logging.INFO, "buydesk"):
        exchange = Exchange(time)
        await run(updater(time, exchange, board))
    assert exchange.asked == 1
    assert board.published == [await board.latest()] * 2
    assert [each.levelno for each in caplog.records] == [logging.INFO]


async def test_lost_price_is_hung_again_until_it_expires_and_not_longer(time: Time) -> None:
    time.seconds_max = 60
    board = Restarting(time, loses=lambda _: True)
    fails = failing(SourceFailed("The exchange is closed."))
    failed = updater(time, Exchange(time, answering(time), fails), board, price_ttl_seconds=20)
    await run(failed)
    # Every second but the 15th, when the source is asked instead, and not in the 20th.
    assert len(board.published) == 19
    assert {each.expires_at for each in board.published} == {NOON + timedelta(seconds=20)}
    assert await failure_of(failed) == "The exchange is closed."


async def test_board_that_is_away_between_ticks_is_one_warning_each_time(
    time: Time, caplog: pytest.LogCaptureFixture
) -> None:
    board = Restarting(time, away=lambda seconds: 2 <= seconds <= 5 or 8 <= seconds <= 9)
    watched = updater(time, Exchange(time), board)
    await run(watched)
    await watched.check()
    assert [each.getMessage() for each in caplog.records] == [
        "The price board cannot be looked at: The board is away."
    ] * 2


async def test_record_that_another_updater_hung_is_left_alone(time: Time, caplog: pytest.LogCaptureFixture) -> None:
    board = Restarting(time)

    async def shorten() -> None:
        if len(time.slept) == 3:
            hanging = await board.latest()
            await MemoryPriceBoard.publish(board, replace(hanging, expires_at=time.now()))

    time.meanwhile = shorten
    await run(updater(time, Exchange(time), board))
    assert len(board.published) == 1
    assert caplog.records == []


def app_of(exchange: Exchange, board: PriceBoard, **settings: Any) -> Any:
    chosen = Settings(**settings)
    reporter = Reporter("api_updater", MemoryHealthDesk(chosen), chosen)
    return api_updater.create_app(chosen, exchange, board, reporter)


@contextlib.asynccontextmanager
async def asking(url: str) -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(base_url=url, trust_env=False, timeout=30) as client:
        yield client


async def answer_now() -> Observation:
    return observation(datetime.now(UTC))


async def hang() -> Observation:
    await asyncio.Event().wait()
    raise AssertionError("unreachable")


async def test_service_publishes_while_it_runs_and_not_after(time: Time) -> None:
    third_asked = asyncio.Event()

    async def third() -> Observation:
        third_asked.set()
        return await answer_now()

    exchange, board = Exchange(time, answer_now, answer_now, third), MemoryPriceBoard(Settings())
    async with served(app_of(exchange, board, feed_interval_seconds=0.01)):
        await third_asked.wait()
    assert len(await board.history(60)) == exchange.asked >= 3
    assert not [task for task in asyncio.all_tasks() if "Updater" in repr(task)]


async def test_service_is_ready_only_when_the_last_tick_published(time: Time) -> None:
    opened, closed, failed, asked_again = (asyncio.Event() for _ in range(4))

    async def wait_for_opening() -> Observation:
        await opened.wait()
        return await answer_now()

    async def fail_when_closed() -> Observation:
        asked_again.set()
        await closed.wait()
        raise SourceFailed("The exchange is closed.")

    async def hang_after_failure() -> Observation:
        failed.set()
        return await hang()

    exchange = Exchange(time, wait_for_opening, fail_when_closed, hang_after_failure)
    app = app_of(exchange, MemoryPriceBoard(Settings()), feed_interval_seconds=0.01, source_seconds_max=60)
    async with served(app) as url, asking(url) as client:
        missing = (await client.get("/readyz")).json()["missing"]
        assert missing == [{"what": "prices", "why": "No price has been published yet."}]
        opened.set()
        await asked_again.wait()
        assert (await client.get("/readyz")).json() == {"status": "ready"}
        closed.set()
        await failed.wait()
        missing = (await client.get("/readyz")).json()["missing"]
        assert missing == [{"what": "prices", "why": "The exchange is closed."}]


async def test_service_stops_at_once_though_its_source_hangs(time: Time, board: MemoryPriceBoard) -> None:
    asked = asyncio.Event()

    async def hang_when_asked() -> Observation:
        asked.set()
        return await hang()

    async with asyncio.timeout(5), served(app_of(Exchange(time, hang_when_asked), board, source_seconds_max=3600)):
        await asked.wait()


async def test_service_serves_only_what_every_service_serves(time: Time, board: MemoryPriceBoard) -> None:
    async with served(app_of(Exchange(time), board)) as url, asking(url) as client:
        assert (await client.get("/")).json()["service"] == "api_updater"
        paths = (await client.get("/openapi.json")).json()["paths"]
        assert set(paths) == {"/", "/livez", "/readyz", "/metrics"}
        assert (await client.get("/add/")).status_code == 404
