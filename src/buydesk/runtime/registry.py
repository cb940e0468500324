"""Clients and keys of a desk for its operators, in its database: whether the desk runs or not."""

import contextlib
import getpass
import socket
from collections.abc import AsyncIterator

import asyncpg

from buydesk.backends.postgres.registry import Operator, Registry, registry_at
from buydesk.embedded.data_dir import default_data_dir, locked
from buydesk.embedded.postgres import CONNECT_SECONDS_MAX, EmbeddedPostgres
from buydesk.errors import CannotStart
from buydesk.settings.model import Settings


@contextlib.asynccontextmanager
async def registry_of(settings: Settings) -> AsyncIterator[Registry]:
    """The registry of the desk at DATABASE_URL, or else in the data directory; raises CannotStart."""
    operator = Operator(_user(), socket.gethostname())
    async with _database_url(settings) as url, registry_at(url, operator) as registry:
        yield registry


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # an account without a name
        return "unknown"


@contextlib.asynccontextmanager
async def _database_url(settings: Settings) -> AsyncIterator[str]:
    """Where the database is; the server in the data directory is started for this, unless it runs."""
    if settings.database_url is not None:
        yield settings.database_url.get_secret_value()
        return
    data_dir = settings.data_dir or default_data_dir(settings.port_offset, is_live=settings.price_feed == "live")
    postgres = EmbeddedPostgres(data_dir)
    if postgres.is_new:
        raise CannotStart(f"no desk has been started in {data_dir.resolve()}: use its --data-dir, or set DATABASE_URL")
    try:
        await (await asyncpg.connect(postgres.dsn, timeout=CONNECT_SECONDS_MAX)).close()
    except asyncpg.PostgresError:  # it is there, and will say so again
        pass
    except OSError:  # nobody listens
        with locked(data_dir):
            await postgres.start()
            try:
                yield postgres.dsn
            finally:
                await postgres.stop()
        return
    yield postgres.dsn
