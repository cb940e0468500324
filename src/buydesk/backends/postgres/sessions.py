"""Sessions with PostgreSQL, as the ledger needs them: on whichever host takes writes, and never cancelled.

A commit that waits for a standby is not ended by a time-out of the server's, and whoever cancels that wait makes the
server report success for what only its own disk has (PostgreSQL, "Synchronous Replication"): with a WARNING, which is
therefore taken as seriously as an error here. docs/decisions/0016 says what proves what.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import asyncpg
from asyncpg.connect_utils import SessionAttribute

from buydesk.backends.postgres.sql import QUERIES
from buydesk.settings.model import Settings

if TYPE_CHECKING:
    Connection = asyncpg.Connection[asyncpg.Record]

# Whatever may go wrong between this program and PostgreSQL; a ValueError is a DATABASE_URL that makes no sense.
FAULTS = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, ValueError)
_NEVER_PLANNED = ("enable_seqscan", "enable_bitmapscan", "enable_sort", "enable_hashjoin", "enable_mergejoin")
# Less than a check of readiness waits (ledger.py): the one after it finds the wait that it gave up.
STANDBY_SECONDS_MAX = 2.0


class Warned(Exception):
    """The server said success, and a warning: what it did may be on its own disk only."""


class StandbyAway(TimeoutError):
    """A commit waits for a standby, for so long that no other is made to wait beside it."""


class Session:
    """One connection. Whatever goes wrong with a statement, end it: the server may still be at work on that one."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._warning = ""
        connection.add_log_listener(self._note)

    def _note(self, _: object, message: asyncpg.PostgresLogMessage) -> None:
        self._warning = message.message or "a warning without words"

    async def fetch(self, query: str, *arguments: object, seconds: float) -> list[asyncpg.Record]:
        """The rows of a named query.

        Raises TimeoutError after so many seconds: the connection is cut then, where the driver's own time-out would
        send a cancel request. Raises Warned, and what asyncpg raises.
        """
        cut = asyncio.get_running_loop().call_later(seconds, self._connection.terminate)
        try:
            rows: list[asyncpg.Record] = await self._connection.fetch(QUERIES[query], *arguments)
        except Exception as error:  # of whatever kind: what a driver says whose connection is cut depends on the moment
            if cut.when() <= asyncio.get_running_loop().time():
                raise TimeoutError from error
            raise
        finally:
            cut.cancel()
        # The driver schedules the listener before it wakes whoever waits for the rows.
        if self._warning:
            raise Warned(self._warning)
        return rows

    async def reach_durable_point(self, *, seconds: float) -> None:
        """Returns once all that this server has committed so far is where it promises to have it: on its standbys.

        By a commit of its own, which waits for all before it, and which a primary that was replaced cannot get through.
        Nobody may end such a wait, and each takes one of the server's connections for as long as the standby is away:
        raises StandbyAway when one waits already, otherwise as `fetch`.
        """
        if not await self.fetch("durable_point", STANDBY_SECONDS_MAX, seconds=seconds):
            raise StandbyAway

    @property
    def is_closed(self) -> bool:
        return self._connection.is_closed()

    def end(self) -> None:
        """Cuts the connection; a driver's cancel request that was about to be sent is not."""
        self._connection.terminate()


# What a session is asked for, in so many seconds.
Ask = Callable[[Session, float], Awaitable[list[asyncpg.Record]]]


async def open_session(database_url: str, settings: Settings, timeout_seconds: float) -> Session:
    """A session with our settings; they are set by a statement, because a pooler refuses them at the start of one.

    Raises TimeoutError, and what asyncpg raises.
    """
    connection = await connect(database_url, timeout_seconds)
    try:
        given = session_settings(settings)
        names, values = list(given), list(given.values())
        await connection.execute(QUERIES["session"], names, values, timeout=timeout_seconds)
    except BaseException:
        connection.terminate()
        raise
    return Session(connection)


async def connect(database_url: str, timeout_seconds: float, *, must_write: bool = False) -> Connection:
    """A connection to the first host that fits, of those that the URL names: all are tried at once, so that a silent
    one costs nothing. Of several hosts only one that takes writes fits, unless the URL says otherwise.

    Raises what asyncpg raised of the last one, and TimeoutError, when none fits.
    """
    hosts = _hosts(database_url)
    must_write = must_write or (len(hosts) > 1 and "target_session_attrs" not in database_url)
    attributes = SessionAttribute.read_write if must_write else None
    attempts = [
        asyncio.create_task(asyncpg.connect(host, timeout=timeout_seconds, target_session_attrs=attributes))
        for host in hosts
    ]
    chosen: Connection | None = None

    def end_unless_chosen(attempt: asyncio.Task[Connection]) -> None:
        if not attempt.cancelled() and attempt.exception() is None and attempt.result() is not chosen:
            attempt.result().terminate()

    waiting = set(attempts)
    try:
        while True:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if fitting := [attempt for attempt in done if attempt.exception() is None]:
                chosen = fitting[0].result()
                return chosen
            if not waiting:
                return await done.pop()  # raises what is wrong with it
    finally:
        for each in attempts:
            each.add_done_callback(end_unless_chosen)
            each.cancel()


def _hosts(database_url: str) -> list[str]:
    """The URL once for each host that it names before its path."""
    parts = urlsplit(database_url)
    credentials, at, hosts = parts.netloc.rpartition("@")
    return [parts._replace(netloc=credentials + at + host).geturl() for host in hosts.split(",")]


def session_settings(settings: Settings) -> dict[str, str]:
    """What every session of the ledger's sets."""
    return {
        "application_name": "buydesk",
        "default_transaction_isolation": "read committed",
        "synchronous_commit": "on",
        "statement_timeout": _milliseconds(settings.statement_seconds_max),
        "lock_timeout": _milliseconds(settings.lock_seconds_max),
        "client_min_messages": "warning",
        "timezone": "UTC",
        # Every query of ours goes by an index and reads it in order. The planner must not think otherwise of tables
        # that it has no statistics of, or old ones.
        **dict.fromkeys(_NEVER_PLANNED, "off"),
        "jit": "off",
    }


def _milliseconds(seconds: float) -> str:
    return str(max(1, int(seconds * 1000)))  # 0 would mean for ever


def fetching(query: str, *arguments: object) -> Ask:
    """Asks for the rows of a named query."""

    async def ask(session: Session, seconds: float) -> list[asyncpg.Record]:
        return await session.fetch(query, *arguments, seconds=seconds)

    return ask
