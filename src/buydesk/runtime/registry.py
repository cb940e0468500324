"""A desk for its operators, in its database: whether it runs or not."""

import contextlib
import getpass
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg

from buydesk.backends.postgres.registry import OwnDesk, own_desk
from buydesk.clients.keys import parse_key_text
from buydesk.clients.model import OPERATOR, NewKey
from buydesk.clients.registry import CLIENTS_MAX, CreateClient, Limits, Operator, RevokeKey, create_key
from buydesk.clients.scopes import SCOPES
from buydesk.embedded.data_dir import default_data_dir, locked, read_private, write_private
from buydesk.embedded.postgres import CONNECT_SECONDS_MAX, EmbeddedPostgres
from buydesk.errors import CannotStart, ClientExists
from buydesk.settings.model import Settings
from buydesk.times import utc_now

_WHY_KEPT = "for whoever runs this desk; kept in its data directory"


@contextlib.asynccontextmanager
async def desk_of(settings: Settings) -> AsyncIterator[OwnDesk]:
    """The desk at DATABASE_URL, or else in the data directory; raises CannotStart."""
    async with _database_url(settings) as url, own_desk(url, operator()) as desk:
        yield desk


def operator() -> Operator:
    """Whoever runs this program, on this machine."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # an account without a name
        name = "unknown"
    return Operator(name, socket.gethostname())


async def keep_operator_key(database_url: str, file: Path) -> None:
    """Has a key for operators in the file, for its owner only: a new one, of the client OPERATOR, when there is none
    yet or the database does not take it any more. It permits everything: nobody grants more than they have. Raises
    CannotStart."""
    async with own_desk(database_url, operator()) as desk:
        kept = read_private(file)
        valid = [key for key in await desk.registry.keys(OPERATOR, CLIENTS_MAX) if key.is_valid(utc_now())]
        with contextlib.suppress(ValueError):
            if parse_key_text(kept).digest in {key.digest for key in valid}:
                return
        with contextlib.suppress(ClientExists):
            await desk.change(CreateClient(OPERATOR, Limits()), _WHY_KEPT)
        for key in valid:  # whoever lost the file, or deleted it, wants no other to be taken
            await desk.change(RevokeKey(key.id), "the file that kept it is gone")
        made = await create_key(desk.registry, NewKey(OPERATOR, sorted(SCOPES)), _WHY_KEPT, desk.by)
        write_private(file, made.text)


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
