"""The sandbox's sources: which minute they show, at which time, what they remember, and how they misbehave."""

import gzip
import hashlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from buydesk.backends.sources import replay
from buydesk.backends.sources.replay import SERIES, load_series, turned
from buydesk.backends.sources.sandbox import sandbox_sources
from buydesk.errors import SourceFailed
from buydesk.money import Currency, format_rate
from buydesk.prices.model import PriceSource, Quote, Rule, SourceResponse
from buydesk.prices.rule import Verdict, decide, differs
from buydesk.settings.model import Settings
from buydesk.settings.types import SANDBOX_FAULTS, SandboxFault
from tests.clock import FakeClock

DATA = Path(replay.__file__).parent / "data"
START = datetime(2023, 3, 9, tzinfo=UTC)
NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)
MINUTES = 12_960
RULE = Rule(quote_age_seconds_max=30, spread_bp_max=1000, deviation_bp_max=100, sources_min=2)
FIRST_RATES = {"EUR": "20572.78", "GBP": "18271.51", "USD": "21712.51"}


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(NOON + timedelta(seconds=1000))


@pytest.fixture
def state_path(tmp_path: Path) -> Path:
    return tmp_path / "replay.json"


# So short a tick that every question of a test that moves the clock is one of its own.
def sources(
    clock: FakeClock,
    state_path: Path | None = None,
    speed: float = 1,
    fault: SandboxFault | None = None,
    interval_seconds: float = 0.5,
) -> list[PriceSource]:
    given = Settings(replay_speed=speed, sandbox_fault=fault, feed_interval_seconds=interval_seconds)
    return sandbox_sources(given, state_path, clock)


def source(clock: FakeClock, state_path: Path | None = None, speed: float = 1) -> PriceSource:
    """The one in the middle, whose prices are the closes."""
    return sources(clock, state_path, speed)[2]


async def asked(sources: Sequence[PriceSource]) -> list[Quote]:
    """The quotes of all that answer."""
    quotes: list[Quote] = []
    for each in sources:
        try:
            quotes += (await each.quotes()).quotes
        except SourceFailed:
            continue
    return quotes


async def decided(sources: Sequence[PriceSource], clock: FakeClock) -> Verdict:
    return decide(await asked(sources), clock.at, RULE)


def texts(verdict: Verdict) -> dict[str, str]:
    return {currency.value: format_rate(rate_e8) for currency, rate_e8 in verdict.rates_e8.items()}


def kept(state_path: Path) -> dict[str, float]:
    document: dict[str, float] = json.loads(state_path.read_text())
    return document


def delete(path: Path) -> None:
    path.unlink()


def names_in(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()]


async def minute_of(source: PriceSource) -> int:
    seen = await source.quotes()
    assert seen.replayed_from is not None
    minutes, rest = divmod(seen.replayed_from - START, timedelta(minutes=1))
    assert not rest
    return minutes


def rates(seen: SourceResponse) -> dict[str, str]:
    return {quote.currency.value: format_rate(quote.mid_e8) for quote in seen.quotes}


def test_series_has_every_minute_of_the_recording() -> None:
    series = load_series()
    assert (series.start, series.minutes) == (START, MINUTES)
    assert set(series.closes_cents) == set(Currency)
    assert {len(closes) for closes in series.closes_cents.values()} == {MINUTES}

    def row(minute: int) -> list[int]:
        return [series.closes_cents[currency][minute] for currency in (Currency.USD, Currency.EUR, Currency.GBP)]

    assert row(0) == [2171251, 2057278, 1827151]
    assert row(4320) == [2059815, 1945792, 1717317]
    assert row(MINUTES - 1) == [2745000, 2584016, 2260704]


def test_series_is_the_text_whose_digest_its_note_of_origin_states() -> None:
    text = gzip.decompress((DATA / SERIES).read_bytes())
    assert hashlib.sha256(text).hexdigest() in (DATA / "README.md").read_text()


def test_series_is_the_recorded_table_digit_by_digit() -> None:
    """The digest is that of the rows of the original CSV file, without its first line and last line end."""
    closes = load_series().closes_cents
    columns = [closes[currency] for currency in (Currency.USD, Currency.EUR, Currency.GBP)]
    rows = (
        f"{1678320000 + 60 * minute},"
        + ",".join(f"{column[minute] // 100}.{column[minute] % 100:02d}" for column in columns)
        for minute in range(MINUTES)
    )
    digest = hashlib.sha256("\n".join(rows).encode()).hexdigest()
    assert digest == "6111703fc6451ed87810bb75319a1d99834f990d409cb182b5d3687138510a9b"


def test_series_is_small_and_loads_fast() -> None:
    assert (DATA / SERIES).stat().st_size < 300_000
    started = time.process_time()
    series = load_series()
    assert time.process_time() - started < 0.5, "it takes about 10 ms"
    assert sum(closes.itemsize * len(closes) for closes in series.closes_cents.values()) < 200_000


async def test_first_quotes_are_the_first_closes_observed_now(clock: FakeClock) -> None:
    seen = await source(clock).quotes()
    assert rates(seen) == FIRST_RATES
    assert seen.replayed_from == START
    assert {quote.observed_at for quote in seen.quotes} == {clock.at}


async def test_bid_and_ask_lie_closely_around_the_close(clock: FakeClock) -> None:
    for quote in (await source(clock).quotes()).quotes:
        assert quote.source == "sandbox-3"
        assert quote.bid_e8 < quote.mid_e8 < quote.ask_e8
        assert quote.ask_e8 - quote.bid_e8 <= quote.mid_e8 // 1000


async def test_five_sources_differ_a_little_and_their_price_is_the_close(clock: FakeClock) -> None:
    five = sources(clock)
    assert [each.name for each in five] == [f"sandbox-{number}" for number in range(1, 6)]
    for _ in range(20):
        verdict = await decided(five, clock)
        [third] = [rates(await five[2].quotes())]
        assert texts(verdict) == third
        assert (len(verdict.used), verdict.rejected) == (15, [])
        for currency, rate_e8 in verdict.rates_e8.items():
            mids = {quote.mid_e8 for quote in verdict.used if quote.currency == currency}
            assert len(mids) == 5
            assert not any(differs(mid_e8, rate_e8, 10) for mid_e8 in mids)
        clock.seconds += 60 * 600


async def test_all_who_ask_within_half_a_tick_see_the_same_minute_however_fast_it_runs(clock: FakeClock) -> None:
    five = sources(clock, speed=60, interval_seconds=15)
    first = await five[0].quotes()
    clock.seconds += 7.4  # 7 minutes of the series
    assert [(await each.quotes()).replayed_from for each in five] == [first.replayed_from] * 5
    clock.seconds += 7.6
    shown = [(await each.quotes()).replayed_from for each in five]
    assert shown == [START + timedelta(minutes=15)] * 5


async def test_position_is_kept_once_a_tick(clock: FakeClock, state_path: Path) -> None:
    five = sources(clock, state_path)
    await asked(five)
    delete(state_path)
    await asked(five)
    assert names_in(state_path.parent) == []
    clock.seconds += 30
    await asked(five)
    assert kept(state_path) == {"position_minutes": 0.5}


@pytest.mark.parametrize("fault", ["source-down", "outlier", "garbage"])
async def test_one_source_that_misbehaves_costs_no_price(clock: FakeClock, fault: SandboxFault) -> None:
    verdict = await decided(sources(clock, fault=fault), clock)
    assert verdict.missing == {}
    assert {quote.source for quote in verdict.used} == {"sandbox-2", "sandbox-3", "sandbox-4", "sandbox-5"}
    for quote in (await source(clock).quotes()).quotes:
        assert not differs(verdict.rates_e8[quote.currency], quote.mid_e8, 2)
    assert {each.source for each in verdict.rejected} == ({"sandbox-1"} if fault != "source-down" else set())


async def test_source_that_is_down_says_so_and_the_others_go_on(clock: FakeClock) -> None:
    first, *others = sources(clock, fault="source-down")
    with pytest.raises(SourceFailed, match="sandbox-1 gives no answer"):
        await first.quotes()
    assert len(await asked(others)) == 12


async def test_outlier_is_thirty_percent_too_low(clock: FakeClock) -> None:
    first, _, third, *_ = sources(clock, fault="outlier")
    low, right = (await first.quotes()).quotes, (await third.quotes()).quotes
    assert [round(quote.mid_e8 / one.mid_e8, 5) for quote, one in zip(low, right, strict=True)] == [0.7] * 3


async def test_garbage_is_crossed_astronomic_and_zero(clock: FakeClock) -> None:
    verdict = await decided(sources(clock, fault="garbage"), clock)
    assert [(each.reason, each.quote is None) for each in verdict.rejected] == [
        ("has a bid above its ask", False),
        ("GBP: is no price of a bitcoin", True),
        ("USD: is no price of a bitcoin", True),
    ]


async def test_sources_that_disagree_are_two_percent_apart_and_make_no_price(clock: FakeClock) -> None:
    five = sources(clock, fault="disagree")
    verdict = await decided(five, clock)
    assert (verdict.rates_e8, set(verdict.missing)) == ({}, set(Currency))
    mids = [quote.mid_e8 for quote in await asked(five) if quote.currency == Currency.EUR]
    assert [round(mid_e8 / mids[2], 5) for mid_e8 in mids] == [0.96, 0.98, 1, 1.02, 1.04]


async def test_clocks_that_stand_still_make_a_price_until_the_quotes_are_too_old(clock: FakeClock) -> None:
    five = sources(clock, fault="stale")
    first_seen = clock.at
    assert texts(await decided(five, clock)) == FIRST_RATES
    clock.seconds += 30
    assert texts(await decided(five, clock)).keys() == FIRST_RATES.keys()
    clock.seconds += 0.5
    verdict = await decided(five, clock)
    assert verdict.rates_e8 == {}
    assert {each.reason for each in verdict.rejected} == {"is older than 30 s"}
    assert {each.quote.observed_at for each in verdict.rejected if each.quote} == {first_seen}


@pytest.mark.parametrize("fault", SANDBOX_FAULTS)
async def test_series_goes_on_whatever_the_fault(clock: FakeClock, fault: SandboxFault) -> None:
    five = sources(clock, fault=fault)
    assert await minute_of(five[1]) == 0
    clock.seconds += 120
    await asked(five)
    assert await minute_of(five[4]) == 2
    for each in five:
        await each.close()


async def test_position_moves_with_the_clock_by_whole_minutes(clock: FakeClock) -> None:
    replaying = source(clock)
    assert await minute_of(replaying) == 0
    clock.seconds += 59
    assert await minute_of(replaying) == 0
    clock.seconds += 1
    assert await minute_of(replaying) == 1


async def test_time_before_the_first_question_does_not_count(clock: FakeClock) -> None:
    replaying = source(clock)
    clock.seconds += 3600
    assert await minute_of(replaying) == 0


async def test_speed_moves_the_position_and_not_the_time_of_observation(clock: FakeClock) -> None:
    replaying = source(clock, speed=60)
    await replaying.quotes()
    clock.seconds += 15
    seen = await replaying.quotes()
    assert seen.replayed_from == START + timedelta(minutes=15)
    assert {quote.observed_at for quote in seen.quotes} == {clock.at}


async def test_speed_zero_stands_still(clock: FakeClock) -> None:
    replaying = source(clock, speed=0)
    await replaying.quotes()
    clock.seconds += 1e6
    assert await minute_of(replaying) == 0


async def test_series_runs_back_at_its_end_and_forth_at_its_beginning(clock: FakeClock) -> None:
    replaying = source(clock)
    await replaying.quotes()
    shown = []
    clock.seconds += 60 * (MINUTES - 3)
    for _ in range(5):
        shown.append(await minute_of(replaying))
        clock.seconds += 60
    assert shown == [MINUTES - 3, MINUTES - 2, MINUTES - 1, MINUTES - 2, MINUTES - 3]
    clock.seconds += 60 * (MINUTES - 6)
    shown = []
    for _ in range(4):
        shown.append(await minute_of(replaying))
        clock.seconds += 60
    assert shown == [2, 1, 0, 1]


def test_turning_never_jumps() -> None:
    shown = [turned(step, 4) for step in range(14)]
    assert shown == [0, 1, 2, 3, 2, 1, 0, 1, 2, 3, 2, 1, 0, 1]


async def test_position_survives_a_restart(clock: FakeClock, state_path: Path) -> None:
    before = source(clock, state_path)
    await before.quotes()
    clock.seconds += 90
    assert await minute_of(before) == 1
    await before.close()
    clock.seconds += 3600  # nobody replays while the desk is closed
    after = source(clock, state_path)
    assert await minute_of(after) == 1
    clock.seconds += 30
    assert await minute_of(after) == 2


async def test_way_back_survives_a_restart(clock: FakeClock, state_path: Path) -> None:
    before = source(clock, state_path)
    await before.quotes()
    clock.seconds += 60 * MINUTES
    assert await minute_of(before) == MINUTES - 2
    after = source(clock, state_path)
    await after.quotes()
    clock.seconds += 60
    assert await minute_of(after) == MINUTES - 3


async def test_position_of_a_year_later_is_still_one_round(clock: FakeClock, state_path: Path) -> None:
    replaying = source(clock, state_path)
    await replaying.quotes()
    clock.seconds += 366 * 24 * 3600
    await replaying.quotes()
    position = kept(state_path)["position_minutes"]
    assert 0 <= position < 2 * MINUTES


async def test_without_a_file_the_position_is_kept_in_memory_only(clock: FakeClock, tmp_path: Path) -> None:
    await source(clock).quotes()
    assert names_in(tmp_path) == []


async def test_nothing_but_the_file_is_left_behind(clock: FakeClock, state_path: Path) -> None:
    await source(clock, state_path).quotes()
    assert names_in(state_path.parent) == [state_path.name]


async def test_missing_file_starts_at_the_beginning_in_silence(
    clock: FakeClock, state_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert await minute_of(source(clock, state_path)) == 0
    assert caplog.records == []


@pytest.fixture
def broken_path(request: pytest.FixtureRequest, state_path: Path) -> Path:
    state_path.write_bytes(request.param)
    return state_path


@pytest.mark.parametrize(
    "broken_path",
    [
        b"",
        b"nothing",
        b"{}",
        b"[5]",
        b'{"position_minutes": "7"}',
        b'{"position_minutes": -1}',
        b'{"position_minutes": 1e999}',
        b'{"position_minutes": null}',
        b"\xff\x00",
    ],
    indirect=True,
)
async def test_broken_file_starts_at_the_beginning_with_a_warning_and_is_mended(
    clock: FakeClock, broken_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert await minute_of(source(clock, broken_path)) == 0
    assert [each.levelno for each in caplog.records] == [logging.WARNING]
    assert str(broken_path) in caplog.text
    assert kept(broken_path) == {"position_minutes": 0}


async def test_position_that_cannot_be_kept_costs_no_price_and_one_warning_until_it_can(
    clock: FakeClock, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "later"
    replaying = source(clock, directory / "replay.json")
    await replaying.quotes()
    clock.seconds += 60
    assert await minute_of(replaying) == 1
    assert len(caplog.records) == 1
    directory.mkdir()
    clock.seconds += 60
    await replaying.quotes()
    assert kept(directory / "replay.json") == {"position_minutes": 2}
    (directory / "replay.json").unlink()
    directory.rmdir()
    clock.seconds += 60
    await replaying.quotes()
    assert len(caplog.records) == 2


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.WARNING, logger=replay.__name__):
        yield
