"""The embedded Redis: a bounded cache on a socket of its own."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import psutil
import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from buydesk.embedded import redis as embedded_redis
from buydesk.embedded.accounts import Account, server_account
from buydesk.embedded.data_dir import locked
from buydesk.embedded.redis import EmbeddedRedis
from buydesk.embedded.supervisor import poll_until, supervise
from buydesk.errors import CannotStart


@pytest.fixture
def directory(open_directory: Path, request: pytest.FixtureRequest) -> Path:
    return open_directory / f"redis-{abs(hash(request.node.name)) % 10_000}"


@pytest.fixture
async def server(directory: Path, redis_program: Path) -> AsyncIterator[EmbeddedRedis]:
    with locked(directory) as claimed_directory:
        server = EmbeddedRedis(claimed_directory, redis_program)
        await server.start()
        yield server
        await server.stop()


async def setting(server: EmbeddedRedis, name: str) -> object:
    async with Redis.from_url(server.url) as client:
        found = await client.config_get(name)
        return next(iter(found.values()))


async def test_it_answers_at_its_url_and_is_gone_after_stop(server: EmbeddedRedis) -> None:
    async with Redis.from_url(server.url) as client:
        assert await client.set("key", "value")
        await server.stop()
        assert server.pid is None
        assert await server.wait() == "exit code 0"
        with pytest.raises(RedisConnectionError):
            await client.get("key")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("maxmemory", str(64 * 1024 * 1024)),
        ("maxmemory-policy", "allkeys-lru"),
        ("port", "0"),
        ("save", ""),
        ("appendonly", "no"),
    ],
)
async def test_it_is_a_bounded_cache_without_network_or_disk(server: EmbeddedRedis, name: str, value: str) -> None:
    assert await setting(server, name) in (value, value.encode())


async def test_it_knows_nothing_of_the_environment_of_the_desk(server: EmbeddedRedis) -> None:
    assert set(psutil.Process(server.pid).environ()) <= {"PATH", "LD_LIBRARY_PATH", "LC_ALL", "TZ"}


async def test_an_orphan_of_a_killed_desk_is_ended_by_the_next_start(
    server: EmbeddedRedis, directory: Path, redis_program: Path
) -> None:
    next_server = EmbeddedRedis(directory, redis_program)
    await next_server.start()
    try:
        assert server.pid is None
        async with Redis.from_url(next_server.url) as client:
            assert (await client.info("server"))["process_id"] == next_server.pid
    finally:
        await next_server.stop()


@pytest.mark.parametrize("left", ["frozen", "with a password"])
async def test_an_orphan_that_does_not_listen_to_us_is_killed_by_the_next_start(
    server: EmbeddedRedis, directory: Path, redis_program: Path, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    monkeypatch.setattr(embedded_redis, "STOP_SECONDS_MAX", 0.3)
    orphan = server.pid
    assert orphan is not None
    if left == "frozen":
        os.kill(orphan, signal.SIGSTOP)
    else:
        async with Redis.from_url(server.url) as client:
            await client.config_set("requirepass", "somebody's")
    another = EmbeddedRedis(directory, redis_program)
    await another.start()
    assert another.pid not in (None, orphan)
    assert "SIGKILL" in await server.wait()
    await another.stop()


async def test_root_does_not_run_it_itself(server: EmbeddedRedis) -> None:
    account = server_account() or Account("own", os.geteuid(), os.getegid())
    assert account.uid != 0
    process = psutil.Process(server.pid)
    assert (process.uids().real, process.gids().real) == (account.uid, account.gid)


async def test_where_its_account_cannot_get_it_is_not_started(
    open_directory: Path, redis_program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded_redis, "server_account", lambda _: Account("stranger", 64_000, 64_000))
    closed = open_directory / "closed to redis"
    closed.mkdir(mode=0o700)
    with locked(closed / "data") as directory, pytest.raises(CannotStart, match=r"^Redis, .* cannot enter .*closed"):
        await EmbeddedRedis(directory, redis_program).start()


async def test_a_killed_server_is_started_again(server: EmbeddedRedis, caplog: pytest.LogCaptureFixture) -> None:
    first = server.pid
    assert first is not None
    watching = asyncio.create_task(supervise(server))
    os.kill(first, signal.SIGKILL)
    await poll_until(lambda: server.pid not in (None, first), 10)
    watching.cancel()
    assert [record.getMessage() for record in caplog.records] == ["redis ended (signal SIGKILL), restart in 0.2 s"]


def socket_in(data_dir: Path) -> Path:
    (data_dir / "socket").mkdir()
    return data_dir / "socket" / "redis.sock"


@contextlib.asynccontextmanager
async def listening(
    handle: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]], path: Path
) -> AsyncIterator[None]:
    """A server that is no Redis; on leaving every connection it took is gone, those just taken too."""
    open_now: set[asyncio.StreamWriter] = set()

    async def counted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        open_now.add(writer)
        await handle(reader, writer)
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        open_now.remove(writer)

    async with await asyncio.start_unix_server(counted, path):
        yield
        await asyncio.sleep(0.02)
        while open_now:
            await asyncio.sleep(0.01)


async def test_a_socket_that_another_program_holds_is_named(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    monkeypatch.setattr(embedded_redis, "STOP_SECONDS_MAX", 0.05)
    with locked(directory) as claimed_directory:
        async with listening(hold, socket_in(claimed_directory)):
            with pytest.raises(CannotStart, match=r"redis\.sock is in use and cannot be freed: use another --data-dir"):
                await EmbeddedRedis(claimed_directory, Path("redis-server")).start()


async def test_a_connection_that_breaks_is_no_answer(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    monkeypatch.setattr(embedded_redis, "STOP_SECONDS_MAX", 0.05)
    with locked(directory) as claimed_directory:
        async with listening(reset, socket_in(claimed_directory)):
            with pytest.raises(CannotStart, match="cannot be freed"):
                await EmbeddedRedis(claimed_directory, Path("redis-server")).start()
