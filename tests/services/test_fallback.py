"""Redis under every kind of fault: sales and reports go on, what is wrong is said once, and it heals by itself."""

import asyncio
import contextlib
import logging
import os
import re
import signal
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from pathlib import Path

import httpx2
import msgspec
import pytest
from msgspec.structs import replace
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from buydesk.backends.fallback import FallbackPriceStore, FallbackReportStore
from buydesk.backends.memory.prices import MemoryPriceStore
from buydesk.backends.memory.reports import MemoryReportStore
from buydesk.backends.redis import prices as redis_prices
from buydesk.backends.redis import reports as redis_health
from buydesk.backends.redis.faults import RedisCheck
from buydesk.backends.redis.prices import RedisPriceStore
from buydesk.backends.redis.reports import RedisReportStore
from buydesk.embedded.redis import EmbeddedRedis
from buydesk.errors import PriceStale, PriceUnavailable, ReportsUnavailable
from buydesk.money import Currency
from buydesk.observability.clock_skew import ClockMonitor
from buydesk.observability.reports import Report
from buydesk.prices.documents import record_document
from buydesk.prices.model import FeedStatus
from buydesk.runtime.wiring import wire
from buydesk.times import utc_now
from tests.builders import TOKEN, record, settings, without
from tests.databases import Databases
from tests.serving import served

SETTINGS = settings(remote_seconds_max=0.4, connect_seconds_max=0.4)


class Server:
    """A Redis of its own, to hurt."""

    def __init__(self, redis: EmbeddedRedis, directory: Path) -> None:
        self.redis = redis
        self.directory = directory

    def client(self) -> Redis:
        return Redis.from_url(self.redis.url, socket_timeout=0.4, socket_connect_timeout=0.4)

    async def say(self, *words: str | int) -> None:
        async with self.client() as client:
            await client.execute_command(*words)  # type: ignore[no-untyped-call]


@pytest.fixture
async def server(open_directory: Path, redis_program: Path) -> AsyncIterator[Server]:
    directory = open_directory / "hurt-redis"
    directory.mkdir()
    directory.chmod(0o755)
    redis = EmbeddedRedis(directory, redis_program)
    await redis.start()
    yield Server(redis, directory)
    with contextlib.suppress(TypeError, ProcessLookupError):
        os.kill(redis.pid, signal.SIGCONT)  # type: ignore[arg-type]
    await redis.stop()
    (directory / "socket").chmod(0o700)
    for file in sorted(directory.rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    directory.rmdir()


class Bench:
    """The two ports over a server, and the check; its clients are new ones."""

    def __init__(self, server: Server) -> None:
        self.memory = MemoryPriceStore(SETTINGS)
        self.redis = RedisPriceStore(server.client(), SETTINGS)
        self.store = FallbackPriceStore(self.redis, self.memory)
        self.desk = FallbackReportStore(RedisReportStore(server.client(), SETTINGS), MemoryReportStore(SETTINGS))
        kinds = redis_prices.kinds(SETTINGS) | redis_health.KINDS
        self.check = RedisCheck(server.client(), kinds, SETTINGS.remote_seconds_max, ClockMonitor("health_check", 10))

    async def close(self) -> None:
        await self.store.close()
        await self.desk.close()
        await self.check.close()


@pytest.fixture
async def bench(server: Server, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    monkeypatch.setattr("buydesk.backends.fallback.REDIS_SECONDS_MAX", 0.2)
    bench = Bench(server)
    yield bench
    await bench.close()


async def refuse_saving(server: Server) -> None:
    """As a Redis that takes snapshots does when its disk is full."""
    (server.directory / "socket").chmod(0o500)
    await server.say("CONFIG", "SET", "save", "1 1")
    await server.say("SET", "something", "x")
    with contextlib.suppress(ResponseError):  # it saves already
        await server.say("BGSAVE")
    async with server.client() as client:
        while (await client.info("persistence"))["rdb_last_bgsave_status"] != "err":
            await asyncio.sleep(0.01)


async def save_again(server: Server) -> None:
    (server.directory / "socket").chmod(0o700)
    await server.say("CONFIG", "SET", "save", "")


async def fill(server: Server) -> None:
    await server.say("CONFIG", "SET", "maxmemory-policy", "noeviction")
    await server.say("CONFIG", "SET", "maxmemory", "1")


async def forbid(server: Server) -> None:
    await server.say("ACL", "SETUSER", "default", "-@write")


async def freeze(server: Server) -> None:
    assert server.redis.pid is not None
    os.kill(server.redis.pid, signal.SIGSTOP)


async def thaw(server: Server) -> None:
    assert server.redis.pid is not None
    os.kill(server.redis.pid, signal.SIGCONT)


Act = Callable[[Server], Awaitable[None]]


def saying(*words: str) -> Act:
    async def say(server: Server) -> None:
        await server.say(*words)

    return say


async def leave_strange_values(server: Server) -> None:
    for key in (*redis_prices.kinds(SETTINGS), *redis_health.KINDS):
        await server.say("DEL", key)
        await server.say("SETBIT", key, 7, 1) if "sources" not in key else await server.say("LPUSH", key, "x")


async def leave_nothing(server: Server) -> None:
    await server.say("FLUSHDB")


# How to make the fault and to mend it.
FAULTS: dict[str, tuple[Act, Act]] = {
    "down": (lambda server: server.redis.stop(), lambda server: server.redis.start()),
    "frozen": (freeze, thaw),
    "MISCONF": (refuse_saving, save_again),
    "READONLY": (saying("REPLICAOF", "127.0.0.1", "1"), saying("REPLICAOF", "NO", "ONE")),
    "OOM": (fill, saying("CONFIG", "SET", "maxmemory", "64mb")),
    "WRONGTYPE": (leave_strange_values, leave_nothing),
    "NOPERM": (forbid, saying("ACL", "SETUSER", "default", "+@all")),
    "NOEVAL": (saying("ACL", "SETUSER", "default", "-eval"), saying("ACL", "SETUSER", "default", "+@all")),
}


TABLE = (Path(__file__).parents[2] / "docs" / "operating.md").read_text().partition("## Redis under faults\n")[2]
# What operators read in docs/operating.md: by the fault's first word what `/status` says of it, and the log.
ROWS = re.findall(r"^\| (\w+)[^|]* \| ([^|]+) \| ([^|]+) \|$", TABLE.partition("\n## ")[0], re.MULTILINE)[1:]
DOCUMENTED = {fault: (detail, said) for fault, detail, said in ROWS}


def is_documented(documented: str, seen: str) -> bool:
    """Whether that is what is documented, where an ellipsis stands for anything."""
    return re.search(re.escape(documented).replace("…", ".+"), seen) is not None


def test_the_documented_faults_are_those_that_are_tried() -> None:
    assert list(DOCUMENTED) == list(FAULTS)


@pytest.mark.parametrize("fault", FAULTS)
async def test_prices_and_reports_go_on_and_what_is_wrong_is_said_once(
    server: Server, bench: Bench, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    begin, end = FAULTS[fault]
    detail, said = DOCUMENTED[fault]
    before, after = record(age=2), record(age=1)
    await bench.store.publish(before)
    await bench.check()
    assert not caplog.records
    caplog.set_level(logging.INFO)

    await begin(server)
    try:
        with pytest.raises(ReportsUnavailable) as raised:
            await bench.check()
        assert is_documented(detail, raised.value.detail)
        assert "127.0.0.1" not in raised.value.detail
        for _ in range(2):
            await bench.store.publish(after)
            await bench.store.put_feed_status(FeedStatus(utc_now(), "sandbox", "", ()))
            await bench.desk.report(Report("warning", "db_proxy", 400, "while Redis is hurt"), verified=True)
        assert await bench.store.latest() == after
        assert (await bench.store.feed_status()).problem == ""
        assert (await bench.store.history(60, 10))[-1] in (before.point(), after.point())
        assert [kept.report.data for kept in await bench.desk.reports(None, None, 9)] == ["while Redis is hurt"] * 2
        assert [kept.report.service for kept in await bench.desk.last_of_each()] == ["db_proxy"]
        await bench.store.check()
        await bench.desk.check()
    finally:
        await end(server)

    async with asyncio.timeout(10):
        while True:
            with contextlib.suppress(ReportsUnavailable):
                await bench.check()
                break
    await bench.store.publish(after)
    assert await bench.redis.latest() == after
    await bench.desk.report(Report("info", "db_proxy", 200, "well again"), verified=True)
    assert [kept.report.data for kept in await bench.desk.last_of_each()] == ["well again"]
    assert len(await bench.desk.reports(None, None, 9)) == 3
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("buydesk.services")]
    assert len(lines) == len(set(lines))
    for work in ("takes no price", "takes no reports"):
        [lost] = [line for line in lines if line.startswith(f"Redis {work}, and memory stands in: ")]
        assert is_documented(said, lost), lost
        assert f"Redis {work}: no longer so." in lines


@pytest.mark.parametrize("fault", FAULTS)
async def test_orders_are_taken_and_status_says_what_is_wrong(
    server: Server, databases: Databases, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("buydesk.backends.fallback.REDIS_SECONDS_MAX", 0.2)
    monkeypatch.setattr("buydesk.services.create_buy_order.FIRST_PRICE_SECONDS_MAX", 0.01)  # it is published later
    given = settings(
        database_url=await databases.new(18), redis_url=server.redis.url, remote_seconds_max=1, connect_seconds_max=0.4
    )
    wired = wire(given, ("create_buy_order", "db_proxy", "api_cache_proxy", "health_check"))
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(wired.close)
        urls = {name: await stack.enter_async_context(served(app, settings=given)) for name, app in wired.apps.items()}
        client = await stack.enter_async_context(httpx2.AsyncClient(timeout=20))
        begin, end = FAULTS[fault]
        await begin(server)
        try:
            published = record_document(record())
            shown = {"Authorization": f"Bearer {TOKEN}"}
            (await client.post(f"{urls['api_cache_proxy']}/add/", json=published, headers=shown)).raise_for_status()
            async with asyncio.timeout(10):
                while (await client.get(f"{urls['create_buy_order']}/readyz")).status_code != 200:
                    await asyncio.sleep(0.05)
            order = await client.post(f"{urls['create_buy_order']}/place_order/?currency=EUR&amount=1")
            status = (await client.get(f"{urls['health_check']}/status")).json()
            ready = {name: (await client.get(f"{url}/readyz")).status_code for name, url in urls.items()}
        finally:
            await end(server)
    assert order.status_code == 201
    assert ready == dict.fromkeys(urls, 200)
    assert (status["status"], status["redis"]["ok"], status["price"]["ok"]) == ("degraded", False, True)
    assert is_documented(DOCUMENTED[fault][0], status["redis"]["detail"])


async def test_command_of_the_publishing_script_that_is_forbidden_is_found(server: Server, bench: Bench) -> None:
    await server.say("ACL", "SETUSER", "default", "-zadd")
    with pytest.raises(ReportsUnavailable, match="Redis failed"):
        await bench.check()
    await server.say("ACL", "SETUSER", "default", "+@all")
    await bench.check()


async def test_a_cluster_is_refused_in_words(bench: Bench, server: Server) -> None:
    await server.redis.stop()
    cluster = await asyncio.start_unix_server(_answer_moved, server.directory / "socket" / "redis.sock")
    with pytest.raises(ReportsUnavailable, match="Redis runs as a cluster, and the desk needs a single server"):
        await bench.check()
    cluster.close()


async def _answer_moved(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(4096):
        is_greeting = b"CLIENT" in data or b"HELLO" in data
        writer.write((b"+OK\r\n" if is_greeting else b"-MOVED 3999 127.0.0.1:6381\r\n") * data.count(b"*"))
    writer.close()


async def test_another_process_s_newer_price_is_told(bench: Bench) -> None:
    own, others = record(age=2), record(age=1)
    await bench.store.publish(own)
    assert await bench.store.latest() == own
    await bench.redis.publish(others)
    assert await bench.store.latest() == others


async def test_a_doubt_that_redis_did_not_take_counts_for_more_than_the_price_before_it(
    bench: Bench, server: Server
) -> None:
    before = record(age=1)
    await bench.store.publish(before)
    doubt = without(replace(record(age=5), decided_at=utc_now()), unsettled=list(Currency))  # its quotes are older
    await forbid(server)
    await bench.store.publish(doubt)
    await server.say("ACL", "SETUSER", "default", "+@write")
    assert await bench.redis.latest() == before
    assert await bench.store.latest() == doubt
    settled = record()
    await bench.redis.publish(settled)
    assert await bench.store.latest() == settled


async def test_a_price_that_redis_has_for_a_shorter_time_ends_then(bench: Bench) -> None:
    price = record()
    brief = price.shortened(price.expires_at - price.as_of - (price.expires_at - utc_now()), price.as_of)
    await bench.redis.publish(brief)
    assert await bench.store.publish(price) == brief
    with pytest.raises(PriceStale):
        await bench.store.latest()


@pytest.mark.parametrize("forged", ["shortened", "ended", "unsigned", "nested too deeply"])
async def test_what_a_hand_makes_of_the_price_in_redis_ends_no_sale(bench: Bench, server: Server, forged: str) -> None:
    price = record()
    await bench.store.publish(price)
    ended = replace(price, expires_at=price.as_of + timedelta(milliseconds=1))
    made = {
        "shortened": msgspec.json.encode(record_document(price.shortened(timedelta(), utc_now()))),
        "ended": msgspec.json.encode(record_document(replace(ended, id=uuid.uuid4()))),
        "unsigned": msgspec.json.encode(record_document(replace(price, id=uuid.uuid4(), signature=None))),
        "nested too deeply": b"[" * 20_000,
    }[forged]
    async with server.client() as client:
        await client.hset(next(iter(redis_prices.kinds(SETTINGS))), "document", made)
    assert await bench.store.latest() == price


async def test_a_redis_that_lost_the_price_is_no_reason_to_lose_it(bench: Bench, server: Server) -> None:
    price = record()
    await bench.store.publish(price)
    await bench.store.put_feed_status(FeedStatus(utc_now(), "sandbox", "", ()))
    await server.say("FLUSHDB")
    assert await bench.store.latest() == price
    assert (await bench.store.feed_status()).problem == ""


async def test_an_old_price_in_memory_is_told_to_be_stale_and_not_to_be_none(bench: Bench, server: Server) -> None:
    with pytest.raises(PriceUnavailable):
        await bench.store.latest()
    await bench.store.publish(record(age=100))
    await server.say("FLUSHDB")
    with pytest.raises(PriceStale):
        await bench.store.latest()


async def test_the_last_report_of_a_service_is_the_newest_of_both_places(bench: Bench, server: Server) -> None:
    await bench.desk.report(Report("info", "db_proxy", 200, "in Redis"), verified=True)
    await freeze(server)
    await bench.desk.report(Report("info", "db_proxy", 200, "in memory"), verified=True)
    await thaw(server)
    assert [kept.report.data for kept in await bench.desk.last_of_each()] == ["in memory"]
    await bench.desk.report(Report("info", "db_proxy", 200, "in Redis again"), verified=True)
    assert [kept.report.data for kept in await bench.desk.last_of_each()] == ["in Redis again"]
