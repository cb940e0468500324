"""One contract for every ReportStore: in memory, in Redis, in both, in both without Redis, and over TCP."""

import contextlib
import socket
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from buydesk.backends.fallback import FallbackReportStore
from buydesk.backends.memory.prices import MemoryPriceStore
from buydesk.backends.memory.reports import MemoryReportStore
from buydesk.backends.redis.reports import RedisReportStore
from buydesk.backends.remote.reports import RemoteReportStore
from buydesk.errors import ReportsUnavailable
from buydesk.observability.reporter import Reporter
from buydesk.observability.reports import (
    DATA_CHARS_MAX,
    OTHERS_KEPT_MAX,
    STRANGERS_KEPT_MAX,
    Level,
    Report,
    ReportStore,
    StoredReport,
)
from buydesk.services.health_check import create_app
from buydesk.settings.model import Settings
from buydesk.topology import SERVICES
from tests.clock import FakeClock
from tests.serving import free_port, served

NOON = datetime(2026, 1, 31, 12, 0, 0, 123456, tzinfo=UTC)
KEPT_MAX = 1200


async def _nothing_missing() -> None:
    return


@contextlib.asynccontextmanager
async def remote_desk(behind: ReportStore, settings: Settings) -> AsyncIterator[RemoteReportStore]:
    """The desk as another process sees it. The service's own reports go elsewhere, so that the test's are alone."""
    app = create_app(
        settings,
        behind,
        _nothing_missing,
        MemoryPriceStore(settings),
        redis_check=None,
        reporter=Reporter("health_check", MemoryReportStore(settings), settings),
    )
    async with served(app) as url:
        report_store = RemoteReportStore(url, settings)
        yield report_store
        await report_store.close()


@pytest.fixture
def settings() -> Settings:
    return Settings(reports_kept_max=KEPT_MAX)


@pytest.fixture(params=["memory", "redis", "remote", "fallback", "fallen_back"])
async def report_store(
    request: pytest.FixtureRequest, settings: Settings, redis_url: str
) -> AsyncIterator[ReportStore]:
    if request.param == "memory":
        yield MemoryReportStore(settings, FakeClock(NOON - timedelta(seconds=1), reading_seconds=1))
    elif request.param == "remote":
        async with remote_desk(
            MemoryReportStore(settings, FakeClock(NOON - timedelta(seconds=1), reading_seconds=1)), settings
        ) as remote:
            yield remote
    elif request.param == "fallen_back":
        nowhere: Redis = Redis(port=free_port(), retry=Retry(NoBackoff(), 0))
        fallback = FallbackReportStore(
            RedisReportStore(nowhere, settings),
            MemoryReportStore(settings, FakeClock(NOON - timedelta(seconds=1), reading_seconds=1)),
        )
        yield fallback
        await fallback.close()
    else:
        client: Redis = Redis.from_url(redis_url)
        await client.flushdb()
        redis = RedisReportStore(client, settings, FakeClock(NOON - timedelta(seconds=1), reading_seconds=1))
        yield FallbackReportStore(redis, MemoryReportStore(settings)) if request.param == "fallback" else redis
        await redis.close()


def report(data: str, service: str = "db_proxy", level: Level = "info") -> Report:
    return Report(level, service, 200, data)


def data_of(kept: list[StoredReport]) -> list[str]:
    return [each.report.data for each in kept]


async def test_desk_without_reports_is_empty(report_store: ReportStore) -> None:
    assert list(await report_store.reports(None, None, 10)) == []
    assert list(await report_store.last_of_each()) == []


@pytest.mark.parametrize("verified", [True, False])
async def test_report_is_kept_as_it_came_with_the_time_of_its_arrival(
    report_store: ReportStore, verified: bool
) -> None:
    came = Report("critical", "strange-one", 503, 'Missing: "ledger"\n\t₿ \\')
    await report_store.report(came, verified=verified)
    assert list(await report_store.reports(None, None, 10)) == [StoredReport(came, NOON, verified)]
    assert list(await report_store.last_of_each()) == [StoredReport(came, NOON, verified)]


@pytest.mark.parametrize("verified", [True, False])
async def test_what_cannot_be_seen_of_a_text_is_kept_written_out(report_store: ReportStore, verified: bool) -> None:
    await report_store.report(report("\x00\x9b31m\u202eevil\u2028"), verified=verified)
    assert data_of(list(await report_store.reports(None, None, 10))) == [r"\x00\x9b31m\u202eevil\u2028"]


async def test_reports_of_strangers_and_verified_ones_come_newest_first_together(report_store: ReportStore) -> None:
    for number in range(6):
        await report_store.report(
            report(str(number), level="info" if number < 4 else "error"), verified=number in (1, 2, 5)
        )
    assert data_of(list(await report_store.reports(None, None, 10))) == ["5", "4", "3", "2", "1", "0"]
    assert data_of(list(await report_store.reports(None, None, 4))) == ["5", "4", "3", "2"]
    assert data_of(list(await report_store.reports("db_proxy", "info", 3))) == ["3", "2", "1"]
    assert [kept.verified for kept in await report_store.reports(None, None, 10)] == [
        True,
        False,
        False,
        True,
        True,
        False,
    ]


async def test_stranger_that_speaks_as_a_service_is_not_that_service(report_store: ReportStore) -> None:
    await report_store.report(report("ours"), verified=True)
    await report_store.report(report("theirs", "my-shop"), verified=True)
    for service in ("db_proxy", "api_updater", "my-shop", "another-shop"):
        await report_store.report(report("stranger", service), verified=False)
    last = {kept.report.service: (kept.report.data, kept.verified) for kept in await report_store.last_of_each()}
    assert last == {"db_proxy": ("ours", True), "my-shop": ("theirs", True), "another-shop": ("stranger", False)}
    assert len(await report_store.reports(None, None, 10)) == 6


async def test_reports_come_newest_first_and_no_more_than_asked_for(report_store: ReportStore) -> None:
    for number in range(5):
        await report_store.report(report(str(number)), verified=True)
    assert data_of(list(await report_store.reports(None, None, 3))) == ["4", "3", "2"]
    arrived = [each.arrived_at for each in await report_store.reports(None, None, 10)]
    assert arrived == [NOON + timedelta(seconds=number) for number in (4, 3, 2, 1, 0)]


async def test_filters_narrow_by_service_by_level_and_by_both(report_store: ReportStore) -> None:
    await report_store.report(report("1", "db_proxy", "error"), verified=True)
    await report_store.report(report("2", "db_proxy", "info"), verified=True)
    await report_store.report(report("3", "api_updater", "error"), verified=True)
    await report_store.report(report("4", "db_proxy", "error"), verified=True)
    assert data_of(list(await report_store.reports("db_proxy", None, 10))) == ["4", "2", "1"]
    assert data_of(list(await report_store.reports(None, "error", 10))) == ["4", "3", "1"]
    assert data_of(list(await report_store.reports("db_proxy", "error", 10))) == ["4", "1"]
    assert data_of(list(await report_store.reports("db_proxy", "error", 1))) == ["4"]
    assert list(await report_store.reports("db_proxy", "debug", 10)) == []
    assert list(await report_store.reports("db", None, 10)) == []


async def test_last_of_each_is_the_newest_report_of_every_service(report_store: ReportStore) -> None:
    for service in SERVICES:
        await report_store.report(report("old", service), verified=True)
    for service in (*SERVICES, "a-stranger"):
        await report_store.report(report(f"new {service}", service), verified=True)
    assert sorted(data_of(list(await report_store.last_of_each()))) == sorted(
        f"new {name}" for name in (*SERVICES, "a-stranger")
    )


async def test_desk_that_works_passes_its_check(report_store: ReportStore) -> None:
    await report_store.check()


# The bounds take thousands of reports. Across TCP they are those of the desk behind, so these ask that one directly.
@pytest.fixture(params=["memory", "redis"])
async def own_store(request: pytest.FixtureRequest, settings: Settings, redis_url: str) -> AsyncIterator[ReportStore]:
    client: Redis = Redis.from_url(redis_url)
    await client.flushdb()
    own: ReportStore = MemoryReportStore(settings) if request.param == "memory" else RedisReportStore(client, settings)
    yield own
    await own.close()
    await client.aclose()


async def test_filter_finds_what_lies_below_many_others(own_store: ReportStore) -> None:
    await own_store.report(report("rare one", "api_updater", "error"), verified=True)
    await own_store.report(report("rare two", "api_updater", "error"), verified=True)
    for number in range(KEPT_MAX - 2):
        await own_store.report(report(str(number)), verified=True)
    assert data_of(list(await own_store.reports("api_updater", None, 100))) == ["rare two", "rare one"]
    assert data_of(list(await own_store.reports(None, "error", 1))) == ["rare two"]


async def test_oldest_reports_go_but_the_last_of_each_service_stays(own_store: ReportStore) -> None:
    await own_store.report(report("first", "api_updater"), verified=True)
    for number in range(KEPT_MAX + 10):
        await own_store.report(report(str(number)), verified=True)
    kept = data_of(list(await own_store.reports(None, None, KEPT_MAX * 2)))
    assert kept == [str(number) for number in reversed(range(10, KEPT_MAX + 10))]
    assert sorted(data_of(list(await own_store.last_of_each()))) == [str(KEPT_MAX + 9), "first"]


@pytest.mark.parametrize("verified", [True, False])
async def test_of_too_many_others_the_longest_silent_is_forgotten_and_never_one_of_ours(
    own_store: ReportStore, verified: bool
) -> None:
    await own_store.report(report("ours", "db_proxy"), verified=True)
    for number in range(OTHERS_KEPT_MAX):
        await own_store.report(report("other", f"other-{number}"), verified=verified)
    await own_store.report(report("other", "other-0"), verified=verified)
    await own_store.report(report("other", "one-too-many"), verified=verified)
    names = {kept.report.service for kept in await own_store.last_of_each()}
    assert len(names) == OTHERS_KEPT_MAX + 1
    assert {"db_proxy", "other-0", "one-too-many"} <= names
    assert "other-1" not in names


async def test_flood_of_strangers_with_ever_new_names_pushes_out_no_verified_report(own_store: ReportStore) -> None:
    await own_store.report(report("ours", level="error"), verified=True)
    await own_store.report(report("theirs", "my-shop"), verified=True)
    for number in range(STRANGERS_KEPT_MAX + 10):
        await own_store.report(report("stranger", f"stranger-{number}", "error"), verified=False)
    for _ in range(10):
        await own_store.report(report("stranger"), verified=False)
    kept = await own_store.reports(None, None, STRANGERS_KEPT_MAX * 2)
    assert data_of(list(kept))[STRANGERS_KEPT_MAX:] == ["theirs", "ours"]
    assert data_of(list(await own_store.reports("my-shop", None, 10))) == ["theirs"]
    last = {kept.report.service: kept.report.data for kept in await own_store.last_of_each()}
    assert len(last) == 2 + OTHERS_KEPT_MAX
    assert (last["db_proxy"], last["my-shop"]) == ("ours", "theirs")


async def test_flood_of_verified_reports_pushes_out_no_stranger_s(own_store: ReportStore) -> None:
    await own_store.report(report("stranger", "my-shop"), verified=False)
    for number in range(KEPT_MAX + 10):
        await own_store.report(report("ours", f"replica-{number}"), verified=True)
    assert data_of(list(await own_store.reports(None, None, KEPT_MAX * 2))) == ["ours"] * KEPT_MAX + ["stranger"]
    assert "my-shop" in {kept.report.service for kept in await own_store.last_of_each()}


async def test_fullest_desk_leaves_the_prices_their_room_in_the_redis_that_the_desk_runs(redis_url: str) -> None:
    client: Redis = Redis.from_url(redis_url)
    await client.flushdb()
    own_store = RedisReportStore(client, Settings())
    # No report takes more room: the longest name, and the longest text of the longest characters.
    largest = Report("critical", '"' * 64, 999, "\U0001f600" * DATA_CHARS_MAX)
    for _ in range(20):
        await own_store.report(largest, verified=False)
    bytes_max = (await client.memory_usage("buydesk:reports", samples=0) or 0) / 20
    await own_store.close()
    kept_max = Settings().reports_kept_max + STRANGERS_KEPT_MAX + len(SERVICES) + 2 * OTHERS_KEPT_MAX
    # A report takes 10.4 to 10.6 KiB: a stream's index grows with the time between two entries.
    assert 8 * 1024 * kept_max < bytes_max * kept_max < 56 * 1024**2


async def test_reports_of_a_version_that_told_nobody_apart_count_as_strangers(
    settings: Settings, redis_url: str
) -> None:
    client: Redis = Redis.from_url(redis_url)
    await client.flushdb()
    own_store = RedisReportStore(client, settings, FakeClock(NOON - timedelta(seconds=1), reading_seconds=1))
    for service in ("db_proxy", "my-shop"):
        old = {"level": "info", "service": service, "status": 200, "data": "old \x9b"}
        text = msgspec.json.encode({**old, "arrived_at": "2026-01-31T11:00:00.000000Z"})
        await client.xadd("buydesk:reports", {"service": service, "level": "info", "document": text})
        await client.hset("buydesk:reports:last", service, text)
    await client.zadd("buydesk:reports:others", {"my-shop": 1769857200.0})
    await own_store.report(report("new", "api_updater"), verified=True)
    kept = [(each.report.service, each.report.data, each.verified) for each in await own_store.reports(None, None, 10)]
    assert kept == [("api_updater", "new", True), ("my-shop", r"old \x9b", False), ("db_proxy", r"old \x9b", False)]
    last = {each.report.service: each.verified for each in await own_store.last_of_each()}
    assert last == {"api_updater": True, "my-shop": False}
    await own_store.report(report("new"), verified=True)
    assert {each.report.service for each in await own_store.last_of_each()} == {"db_proxy", "api_updater", "my-shop"}
    await own_store.close()


async def assert_unavailable(own_store: ReportStore) -> None:
    with pytest.raises(ReportsUnavailable):
        await own_store.report(report("lost"), verified=True)
    with pytest.raises(ReportsUnavailable):
        await own_store.reports(None, None, 1)
    with pytest.raises(ReportsUnavailable):
        await own_store.last_of_each()
    with pytest.raises(ReportsUnavailable):
        await own_store.check()


async def test_redis_that_is_away_makes_the_desk_unavailable(settings: Settings) -> None:
    client: Redis = Redis.from_url(f"redis://:secret@127.0.0.1:{free_port()}", retry=Retry(NoBackoff(), 0))
    own_store = RedisReportStore(client, settings)
    await assert_unavailable(own_store)
    with pytest.raises(ReportsUnavailable) as caught:
        await own_store.check()
    assert "secret" not in str(caught.value)
    await own_store.close()


async def test_redis_that_holds_something_else_makes_the_desk_unavailable(settings: Settings, redis_url: str) -> None:
    client: Redis = Redis.from_url(redis_url)
    await client.flushdb()
    own_store = RedisReportStore(client, settings)
    for kept in ("buydesk:reports:verified", "buydesk:reports"):
        for document in ("[]", "{", "{}", '{"level": 1, "service": 2, "status": 3, "data": [], "arrived_at": 5}'):
            await client.flushdb()
            await client.xadd(kept, {"service": "db_proxy", "level": "info", "document": document})
            await client.hset(f"{kept}:last", "db_proxy", document)
            for asked in (own_store.reports(None, None, 1), own_store.last_of_each()):
                with pytest.raises(ReportsUnavailable, match="not a report"):
                    await asked
    await client.flushdb()
    await own_store.close()


async def test_redis_that_hangs_makes_the_desk_unavailable_in_bounded_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as hanging:
        client: Redis = Redis(port=hanging.getsockname()[1])
        own_store = RedisReportStore(client, Settings(remote_seconds_max=0.05))
        await assert_unavailable(own_store)
        await own_store.close()


async def test_health_check_that_is_away_makes_the_remote_desk_unavailable(settings: Settings) -> None:
    own_store = RemoteReportStore(f"http://127.0.0.1:{free_port()}", settings)
    await assert_unavailable(own_store)
    await own_store.close()


async def test_fault_behind_health_check_reaches_the_remote_desk(settings: Settings) -> None:
    client: Redis = Redis(port=free_port(), retry=Retry(NoBackoff(), 0))
    broken = RedisReportStore(client, settings)
    async with remote_desk(broken, settings) as own_store:
        await assert_unavailable(own_store)
    await broken.close()
