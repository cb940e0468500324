"""Sessions with PostgreSQL on one of several hosts: the first that fits, however the others are."""

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest

from buydesk.backends.postgres.migrate import migrate
from buydesk.backends.postgres.sessions import connect, open_session
from buydesk.backends.postgres.sql import QUERIES
from buydesk.errors import CannotStart
from tests.builders import settings
from tests.databases import Databases
from tests.lines import Line

SECONDS = 5.0
MINE = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"


@contextlib.asynccontextmanager
async def port_of(dsn: str) -> AsyncIterator[int]:
    """A port that leads to the server of a DSN."""
    line = Line(Path(dsn.split("?host=")[1].split("&", maxsplit=1)[0]) / ".s.PGSQL.5432")
    server = await asyncio.start_server(line.relay, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()
    line.cut_all()
    await server.wait_closed()


@pytest.fixture
def silent() -> Iterator[int]:
    """A port that takes connections and says nothing, as of a server that is frozen."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.fixture
def refusing() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


@pytest.fixture
async def two(databases: Databases) -> AsyncIterator[tuple[str, int, int]]:
    """The name of a database that two servers have, one of them read-only, with the ports of the other and of that."""
    writable, standby = await databases.new(18), await databases.new(16)
    name = urlsplit(writable).path[1:]
    server = await asyncpg.connect(standby.replace(urlsplit(standby).path[1:], "postgres"))
    await server.execute(f"CREATE DATABASE {name}_of_two")
    await server.execute(f"ALTER DATABASE {name}_of_two SET default_transaction_read_only = on")
    await server.close()
    server = await asyncpg.connect(writable)
    await server.execute(f"CREATE DATABASE {name}_of_two")
    await server.close()
    async with port_of(writable) as first, port_of(standby) as second:
        yield f"{name}_of_two", first, second


def url(name: str, *ports: int) -> str:
    hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
    return f"postgresql://buydesk:secret@{hosts}/{name}?sslmode=disable"


async def test_a_silent_host_and_one_that_refuses_cost_nothing(
    two: tuple[str, int, int], silent: int, refusing: int
) -> None:
    name, port, _ = two
    for ports in ((silent, refusing, port), (port, silent), (refusing, port)):
        started = time.monotonic()
        session = await open_session(url(name, *ports), settings(), SECONDS)
        assert time.monotonic() - started < SECONDS / 2
        session.end()
        assert session.is_closed


async def test_of_several_hosts_only_one_that_takes_writes_fits_unless_the_url_says_otherwise(
    two: tuple[str, int, int],
) -> None:
    name, writable, read_only = two
    for _ in range(5):
        connection = await connect(url(name, read_only, writable), SECONDS)
        assert connection.get_server_version().major == 18
        await connection.close()
    connection = await connect(url(name, read_only, read_only) + "&target_session_attrs=any", SECONDS)
    assert connection.get_server_version().major == 16
    await connection.close()
    with pytest.raises(asyncpg.TargetServerAttributeNotMatched):
        await connect(url(name, read_only, read_only), SECONDS)
    with pytest.raises(OSError, match="Connect call failed"):
        await connect(url(name, 1, 1), SECONDS)


async def test_a_session_that_cannot_be_set_up_is_ended(
    two: tuple[str, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, port, _ = two
    monkeypatch.setitem(QUERIES, "session", "SELECT $1::text[], $2::text[], 1 / 0")
    with pytest.raises(asyncpg.DivisionByZeroError):
        await open_session(url(name, port), settings(), SECONDS)
    connection = await connect(url(name, port), SECONDS)
    while await connection.fetchval(MINE) > 1:
        await asyncio.sleep(0.01)
    await connection.close()


async def test_a_single_host_may_be_read_only(two: tuple[str, int, int]) -> None:
    name, _, read_only = two
    connection = await connect(url(name, read_only), SECONDS)
    await connection.close()


@pytest.mark.parametrize("at_once", [True, False])
async def test_of_two_hosts_that_fit_the_second_connection_is_ended(
    two: tuple[str, int, int], monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    name, port, _ = two
    connect_one, both = asyncpg.connect, asyncio.Barrier(2)

    async def connect_together(*arguments: Any, **options: Any) -> Any:
        connection = await connect_one(*arguments, **options)
        await both.wait()
        return connection

    with monkeypatch.context() as patch:
        if at_once:
            patch.setattr(asyncpg, "connect", connect_together)
        connection = await connect(url(name, port, port), SECONDS)
    while await connection.fetchval(MINE) > 1:
        await asyncio.sleep(0.01)
    await connection.close()


async def test_migrating_waits_for_a_host_that_takes_writes(two: tuple[str, int, int]) -> None:
    name, _, read_only = two
    with pytest.raises(CannotStart, match="no host of it takes writes"):
        await migrate(url(name, read_only), livemode=False, cap_satoshi=1)
    waiting = asyncio.create_task(
        migrate(url(name, read_only, read_only), livemode=False, cap_satoshi=1, wait_seconds=9)
    )
    await asyncio.sleep(0.2)
    assert not waiting.done()
    server = await connect(url(name, read_only), SECONDS)
    await server.execute("SET default_transaction_read_only = off")
    await server.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")
    await waiting
    assert await server.fetchval("SELECT cap_satoshi FROM exposure") == 1
    await server.close()
