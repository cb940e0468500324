"""The front passes connections on to whichever host of a service takes them. Hosts here are loopback addresses."""

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import pytest

from buydesk.errors import CannotStart
from buydesk.local import front as front_module
from buydesk.local.front import Front, front, lookup
from buydesk.settings import PORTS, Settings
from tests.desks import free_offset

SECONDS_MAX = 10
Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass
class Hosts:
    """Hosts of one service that answer each line with their own address and the line, and how often names were asked
    for."""

    port: int
    servers: dict[str, asyncio.Server] = field(default_factory=dict)
    connected: list[str] = field(default_factory=list)
    writers: list[asyncio.StreamWriter] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    lookups: int = 0

    async def start(self, host: str) -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.connected.append(host)
            self.writers.append(writer)
            with contextlib.suppress(OSError):
                while line := await reader.readline():
                    if line == b"say nothing\n":
                        continue
                    writer.write(host.encode() + b" " + line)
                    if line == b"end\n":
                        break
                await writer.drain()
            writer.close()

        self.servers[host] = await asyncio.start_server(answer, host, self.port)

    async def stop(self, host: str) -> None:
        self.servers.pop(host).close()

    async def lookup(self, host: str, port: int) -> list[str]:
        assert (host, port) == ("db_proxy", self.port)
        self.lookups += 1
        return self.names


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@pytest.fixture
async def hosts(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Hosts]:
    monkeypatch.setattr(front_module, "LOOKUP_SECONDS", 0.0)
    hosts = Hosts(free_port(), names=["127.0.0.1", "127.0.0.2", "127.0.0.3"])
    yield hosts
    for host in list(hosts.servers):
        await hosts.stop(host)
    for writer in hosts.writers:
        writer.close()


@asynccontextmanager
async def fronted(hosts: Hosts, **settings: object) -> AsyncIterator[tuple[Front, Callable[[], Awaitable[Stream]]]]:
    """A front of the hosts, and how to connect to it."""
    the_front = Front("db_proxy", hosts.port, Settings(**settings), hosts.lookup)  # type: ignore[arg-type]
    server = await asyncio.start_server(the_front.accept, "127.0.0.1", 0)
    async with AsyncExitStack() as stack:

        async def connect() -> Stream:
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            stack.callback(writer.close)
            return reader, writer

        async with asyncio.timeout(SECONDS_MAX):
            yield the_front, connect
        server.close()
        await the_front.drain()


async def say(stream: Stream, line: bytes) -> bytes:
    """The answer; nothing when the connection is cut."""
    reader, writer = stream
    writer.write(line)
    with contextlib.suppress(ConnectionResetError):
        return await reader.readline()
    return b""


async def test_connections_go_to_one_host_after_the_other_and_stay_there(hosts: Hosts) -> None:
    for host in hosts.names:
        await hosts.start(host)
    async with fronted(hosts) as (_, connect):
        streams = [await connect() for _ in range(6)]
        answers = [await say(stream, b"hello\n") for stream in streams]
        assert sorted(answers) == sorted(2 * [host.encode() + b" hello\n" for host in hosts.names])
        assert [await say(stream, b"hello\n") for stream in streams] == answers


async def test_a_host_that_is_gone_is_passed_over(hosts: Hosts) -> None:
    await hosts.start("127.0.0.2")
    async with fronted(hosts) as (_, connect):
        for _ in range(4):
            assert await say(await connect(), b"hello\n") == b"127.0.0.2 hello\n"


async def test_a_new_host_is_found(hosts: Hosts) -> None:
    hosts.names = ["127.0.0.1"]
    await hosts.start("127.0.0.1")
    async with fronted(hosts) as (_, connect):
        await say(await connect(), b"hello\n")
        hosts.names = ["127.0.0.2"]
        await hosts.start("127.0.0.2")
        assert await say(await connect(), b"hello\n") == b"127.0.0.2 hello\n"


async def test_names_are_asked_for_now_and_then_and_when_nobody_answers(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front_module, "LOOKUP_SECONDS", 3600.0)
    hosts.names = ["127.0.0.1"]
    await hosts.start("127.0.0.1")
    async with fronted(hosts) as (_, connect):
        for _ in range(3):
            await say(await connect(), b"hello\n")
        assert hosts.lookups == 1
        await hosts.stop("127.0.0.1")
        assert await say(await connect(), b"hello\n") == b""
        await hosts.start("127.0.0.1")
        assert await say(await connect(), b"hello\n") == b"127.0.0.1 hello\n"
        assert hosts.lookups == 2


async def test_without_any_host_the_connection_is_cut(hosts: Hosts, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    async with fronted(hosts) as (_, connect):
        assert await say(await connect(), b"hello\n") == b""
    assert "a connection for db_proxy was cut: 127.0.0." in caplog.text


async def test_what_was_asked_before_the_client_ended_is_answered(hosts: Hosts) -> None:
    await hosts.start("127.0.0.1")
    async with fronted(hosts) as (_, connect):
        reader, writer = await connect()
        writer.write(b"hello\n")
        writer.write_eof()
        assert await reader.read() == b"127.0.0.1 hello\n"


async def test_the_end_of_the_service_is_the_end_of_the_connection(hosts: Hosts) -> None:
    await hosts.start("127.0.0.1")
    async with fronted(hosts) as (_, connect):
        reader, writer = await connect()
        writer.write(b"end\n")
        assert await reader.read() == b"127.0.0.1 end\n"


async def test_a_client_that_is_cut_costs_the_service_its_connection_too(hosts: Hosts) -> None:
    await hosts.start("127.0.0.1")
    async with fronted(hosts) as (_, connect):
        stream = await connect()
        await say(stream, b"hello\n")
        sock = stream[1].transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # its end is a reset
        stream[1].transport.abort()
        [writer] = hosts.writers
        while not writer.is_closing():
            await asyncio.sleep(0.01)


async def test_more_connections_than_allowed_are_cut(hosts: Hosts) -> None:
    await hosts.start("127.0.0.1")
    async with fronted(hosts, connections_max=1) as (_, connect):
        first = await connect()
        await say(first, b"hello\n")
        assert await say(await connect(), b"hello\n") == b""
        assert await say(first, b"hello\n") == b"127.0.0.1 hello\n"


async def test_draining_waits_for_answers_and_for_nothing_else(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_module, "QUIET_SECONDS", 0.0)
    await hosts.start("127.0.0.1")
    async with fronted(hosts, drain_seconds_max=SECONDS_MAX) as (the_front, connect):
        idle, busy = await connect(), await connect()
        await say(idle, b"hello\n")
        busy[1].write(b"say nothing\n")
        while len(hosts.connected) < 2:
            await asyncio.sleep(0.01)
        draining = asyncio.create_task(the_front.drain())
        await asyncio.sleep(0.1)
        assert not draining.done()
        assert await say(busy, b"hello\n") == b"127.0.0.1 hello\n"
        await draining
        assert [await each[0].read() for each in (idle, busy)] == [b"", b""]


async def test_draining_ends_in_time_whatever_is_under_way(hosts: Hosts) -> None:
    await hosts.start("127.0.0.1")
    settings = {"order_seconds_max": 0.05, "drain_seconds_max": 0.1}
    async with fronted(hosts, **settings) as (the_front, connect):
        reader, writer = await connect()
        writer.write(b"say nothing\n")
        while not hosts.connected:
            await asyncio.sleep(0.01)
        started = time.monotonic()
        await the_front.drain()
        assert time.monotonic() - started >= 0.1
        assert await reader.read() == b""


async def test_a_name_stands_for_addresses() -> None:
    assert await lookup("127.0.0.1", 80) == {"127.0.0.1"}
    with pytest.raises(socket.gaierror):
        await lookup("no-such-host.invalid", 80)


async def test_a_front_listens_until_a_signal() -> None:
    settings = Settings(port_offset=free_offset())
    running = asyncio.create_task(front(settings, ["db_proxy"]))
    port = PORTS["db_proxy"] + settings.port_offset
    async with asyncio.timeout(SECONDS_MAX):
        while True:
            with contextlib.suppress(ConnectionRefusedError):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                break
            await asyncio.sleep(0.01)
        writer.close()
        os.kill(os.getpid(), signal.SIGTERM)
        await running


async def test_a_front_whose_port_is_taken_does_not_start() -> None:
    settings = Settings(port_offset=free_offset())
    with (
        socket.create_server(("127.0.0.1", settings.port("db_proxy"))),
        pytest.raises(CannotStart, match="db_proxy cannot listen"),
    ):
        await front(settings, ["db_proxy"])
