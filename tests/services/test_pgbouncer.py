"""The ledger behind a real pgbouncer: in session mode it works as without."""

import asyncio
import contextlib
import os
import shutil
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from buydesk.backends.postgres.ledger import PostgresLedger
from buydesk.backends.postgres.migrate import migrate
from buydesk.errors import OrderNotFound
from buydesk.orders.model import PageFrom, Placed, Replayed, new_order_id
from tests.builders import priced_order, settings
from tests.databases import CAP_SATOSHI, Databases
from tests.serving import free_port

PROGRAM = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")


@pytest.fixture
async def pooled(databases: Databases, open_directory: Path) -> AsyncIterator[str]:
    """The DSN of a database through a pgbouncer in session mode, which lets two sessions through."""
    if PROGRAM is None:
        pytest.skip("pgbouncer is not installed")
    dsn = await databases.new()
    name, port = urlsplit(dsn).path[1:], free_port()
    directory = open_directory / "pgbouncer"
    directory.mkdir()
    users, config = directory / "users.txt", directory / "pgbouncer.ini"
    users.write_text('"buydesk" ""\n')
    host = parse_qs(urlsplit(dsn).query)["host"][0]
    config.write_text(
        f"[databases]\n{name} = host={host} port=5432 user=buydesk\n"
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\nauth_type = trust\n"
        f"auth_file = {users}\npool_mode = session\ndefault_pool_size = 5\n"
    )
    for path in (directory, users, config):
        path.chmod(0o755)
    command = [PROGRAM, *(("-u", _owner(host)) if os.geteuid() == 0 else ()), str(config)]
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.DEVNULL)
    try:
        async with asyncio.timeout(10):
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                    break
                await asyncio.sleep(0.02)
        yield f"postgresql://buydesk@127.0.0.1:{port}/{name}?sslmode=disable"
    finally:
        process.terminate()
        await process.wait()
        shutil.rmtree(directory)


def _owner(directory: str) -> str:
    return Path(directory).owner()


async def test_in_session_mode_everything_works(pooled: str) -> None:
    await migrate(pooled, livemode=False, cap_satoshi=CAP_SATOSHI)
    ledger = PostgresLedger(pooled, settings(), livemode=False)
    items = [priced_order(100, "a"), priced_order(200)]
    try:
        await ledger.check()
        assert [type(outcome) for outcome in await ledger.place(items, 5)] == [Placed] * 2
        assert [type(outcome) for outcome in await ledger.place(items, 5)] == [Replayed] * 2
        assert (await ledger.page(None, PageFrom(0), 9)).total == 2
        with pytest.raises(OrderNotFound):
            await ledger.order(new_order_id(), None)
    finally:
        await ledger.close()
