"""Registry in PostgreSQL: for db_proxy, beside the orders, and for whoever owns the database."""

from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import NamedTuple, Protocol

import asyncpg
import msgspec

from buydesk.backends.postgres.anchors import PostgresAnchors
from buydesk.backends.postgres.clients import stored_key
from buydesk.backends.postgres.ledger import PostgresLedger
from buydesk.backends.postgres.sessions import FAULTS, connect
from buydesk.backends.postgres.sql import QUERIES
from buydesk.backends.postgres.writing import write
from buydesk.clients.audit import Act
from buydesk.clients.model import StoredKey
from buydesk.clients.registry import (
    AnyChange,
    Client,
    CreateClient,
    Desk,
    LimitClient,
    Operator,
    Registry,
    RevokeKey,
    RotateKey,
    SetCap,
    ShownKey,
)
from buydesk.errors import (
    CannotStart,
    CapBelowUsed,
    ClientExists,
    ClientNotFound,
    DeskError,
    InsufficientScope,
    InvalidRequest,
    KeyEnded,
    KeyNotFound,
    KeyRefused,
)
from buydesk.money import MARKUP_BP_MAX
from buydesk.settings.types import QUOTE_SECONDS_MAX, QUOTE_SECONDS_MIN

CONNECT_SECONDS_MAX = 5.0
# What an act locks, every order waits for; and what nobody waits for any more is not to be done later.
_OWN_SETTINGS = ("statement_timeout = '5s'", "lock_timeout = '2s'", "client_connection_check_interval = '1s'")


class _Fetch(Protocol):
    def __call__(self, query: str, /, *arguments: object) -> Awaitable[list[asyncpg.Record]]: ...


class PostgresRegistry(Registry[ShownKey | Operator]):
    """Reads by `fetch` and writes by `write`, named queries both. An Operator may do everything that the database lets
    it. Whoever made the sessions closes them."""

    def __init__(self, fetch: _Fetch, write: _Fetch) -> None:
        self._fetch = fetch
        self._write = write

    async def change(self, change: AnyChange, why: str, by: ShownKey | Operator) -> object:
        called, given = change.__struct_config__.tag, msgspec.json.encode(change).decode()
        try:
            if isinstance(by, Operator):
                rows = await self._write("act", by.name, by.address, why, called, given)
            else:
                rows = await self._write("act_by_key", by.text, by.address, why, called, given)
        except asyncpg.PostgresError as error:
            if (problem := _problem(error, change)) is None:
                raise
            raise problem from error
        said = rows[0]["said"]
        return None if said is None else msgspec.json.decode(said)

    async def desk(self) -> Desk:
        [row] = await self._fetch("desk")
        return Desk(**row)

    async def clients(self, after: str, limit: int) -> Sequence[Client]:
        return list(map(_client, await self._fetch("clients", after, limit)))

    async def client(self, name: str) -> Client:
        rows = await self._fetch("client", name)
        if not rows:
            raise ClientNotFound(f"There is no client {name}.")
        return _client(rows[0])

    async def keys(self, client: str | None, limit: int) -> Sequence[StoredKey]:
        return [stored_key(row) for row in reversed(await self._fetch("keys", client, limit))]

    async def acts(self, after: int, limit: int) -> Sequence[Act]:
        return [Act(**row) for row in await self._fetch("acts", after, limit)]

    async def close(self) -> None:
        """Nothing here is its own."""


def _client(row: asyncpg.Record) -> Client:
    by_currency = {name: msgspec.json.decode(row[name]) for name in ("daily_cents_max", "markup_bp")}
    return Client(**dict(row) | by_currency)


def registry_beside(ledger: PostgresLedger) -> PostgresRegistry:
    """The registry that db_proxy has, over the ledger's sessions."""
    return PostgresRegistry(ledger.fetch, partial(write, ledger))


def _problem(error: asyncpg.PostgresError, change: AnyChange) -> DeskError | None:
    """What the database refused because of what it was given; None for anything else."""
    match error:
        case asyncpg.NoDataFoundError():
            if isinstance(change, RotateKey | RevokeKey):
                return KeyNotFound(f"There is no key {change.id}.")
            return ClientNotFound(f"There is no client {getattr(change, 'client', '')}.")
        case asyncpg.ObjectNotInPrerequisiteStateError(sqlstate="55000"):  # not a lock that is not available
            return KeyEnded("The key has ended: create one.")
        case asyncpg.NumericValueOutOfRangeError() if isinstance(change, SetCap | CreateClient | LimitClient):
            return InvalidRequest.of("cap", _CAP_MAX)
        case asyncpg.DataError():
            return InvalidRequest.of("change", "has a value that the ledger cannot take")
        case asyncpg.UniqueViolationError(constraint_name="clients_pkey"):
            return ClientExists("There is a client of this name already.")
        case asyncpg.CheckViolationError(constraint_name=constraint) if constraint in _BELOW_USED:
            return CapBelowUsed(_BELOW_USED[constraint])
        case asyncpg.CheckViolationError(constraint_name=constraint):
            return InvalidRequest.of(*_BROKEN.get(constraint or "", ("change", f"is against the rule {constraint}")))
        case asyncpg.IntegrityConstraintViolationError(constraint_name=constraint):
            return InvalidRequest.of("change", f"is against the rule {constraint}")
    return _unpermitted(error)


def _unpermitted(error: asyncpg.PostgresError) -> DeskError | None:
    if error.sqlstate == "BD401":
        return KeyRefused("The key that was shown is none, or none any more.")
    if error.sqlstate == "BD403":
        return InsufficientScope(
            "The key does not permit this: nobody grants more than they have.", scope=error.args[0]
        )
    return None


_CAP_MAX = "must be at most 21,000,000 BTC"
_BELOW_USED = {
    "client_used_within_cap": "The client has bought more than its cap would be.",
    "used_within_cap": "More is sold already than the cap would be.",
}
_BROKEN = {
    "clients_name_check": ("client", "must have 1 to 32 characters: a to z, 0 to 9 and, but for the first, -"),
    "markups_markup_bp_check": ("markup_bp", f"must be from 0 to {MARKUP_BP_MAX}"),
    "clients_quote_seconds_max_check": (
        "quote_seconds_max",
        f"must be from {QUOTE_SECONDS_MIN} to {QUOTE_SECONDS_MAX}",
    ),
    "clients_order_satoshi_max_check": ("largest_order", "must be more than 0"),
    "keys_expires_at_check": ("expires_at", "must be before the year 9999"),
    "exposure_cap_satoshi_check": ("cap", _CAP_MAX),
    "clients_cap_satoshi_check": ("cap", _CAP_MAX),
}


class OwnDesk(NamedTuple):
    """A desk for the owner of its database, and who that is."""

    registry: PostgresRegistry
    anchors: PostgresAnchors
    by: Operator

    async def change(self, change: AnyChange, why: str) -> object:
        """See Registry."""
        return await self.registry.change(change, why, self.by)


class _OwnConnection:
    def __init__(self, connection: "asyncpg.Connection[asyncpg.Record]") -> None:
        self._connection = connection

    async def fetch(self, query: str, *arguments: object) -> list[asyncpg.Record]:
        rows: list[asyncpg.Record] = await self._connection.fetch(QUERIES[query], *arguments)
        return rows


@asynccontextmanager
async def own_desk(database_url: str, by: Operator) -> AsyncIterator[OwnDesk]:
    """The desk of a database, for its owner; raises CannotStart when it cannot be used, and for what it refuses."""
    try:
        connection = await connect(database_url, CONNECT_SECONDS_MAX, must_write=True)
    except FAULTS as error:
        raise CannotStart(f"cannot use the database ({type(error).__name__}): check it and its server") from error
    own = _OwnConnection(connection)
    try:
        for setting in _OWN_SETTINGS:
            await connection.execute(f"SET {setting}")
        yield OwnDesk(PostgresRegistry(own.fetch, own.fetch), PostgresAnchors(own), by)
    except DeskError as error:
        raise CannotStart(error.detail) from error
    except (asyncpg.UndefinedFunctionError, asyncpg.UndefinedTableError, asyncpg.UndefinedColumnError) as error:
        raise CannotStart("the database is of an older version: run `buydesk migrate`") from error
    except asyncpg.InsufficientPrivilegeError as error:
        raise CannotStart("the account in DATABASE_URL may not do this: use that of the database's owner") from error
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError) as error:
        connection.terminate()  # what a driver makes of a connection that was cut depends on the moment
        said = f"the database failed meanwhile ({type(error).__name__}): `buydesk audit` shows whether it was done"
        raise CannotStart(said) from error
    finally:
        await connection.close(timeout=CONNECT_SECONDS_MAX)
