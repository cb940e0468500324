"""What goes wrong with PostgreSQL, on a real server, and what a client, /readyz, /status and the log say of it.

Operators read the same in docs/operating.md, and this test reads it there.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg
import httpx2
import psutil
import pytest

from buydesk.backends.postgres.ledger import PostgresLedger
from buydesk.backends.postgres.migrate import migrate
from buydesk.backends.postgres.sql import REVISION
from buydesk.embedded.data_dir import locked
from buydesk.embedded.postgres import EmbeddedPostgres
from buydesk.errors import LedgerUnavailable
from buydesk.orders.model import PageFrom, Placed
from buydesk.prices.documents import record_document
from buydesk.runtime.wiring import wire
from buydesk.services import create_buy_order
from tests.builders import TOKEN, priced_order, record, settings
from tests.databases import CAP_SATOSHI, DB_PROXY, as_db_proxy
from tests.serving import served

if TYPE_CHECKING:
    Connection = asyncpg.Connection[asyncpg.Record]

SERVICES = ("create_buy_order", "db_proxy", "api_cache_proxy", "health_check")
DATABASE = "buydesk"


@dataclass
class Server:
    """A server of the test's own, which may be hurt."""

    postgres: EmbeddedPostgres
    directory: Path

    @property
    def dsn(self) -> str:
        return self.postgres.dsn_of(DATABASE)

    async def run(self, *statements: str, database: str = DATABASE) -> None:
        """As its owner, who waits for no standby."""
        given = {"synchronous_commit": "local", "default_transaction_read_only": "off"}
        connection = await asyncpg.connect(self.postgres.dsn_of(database), server_settings=given)
        for statement in statements:
            await connection.execute(statement)
        await connection.close()

    async def hang_up(self) -> None:
        """Ends the desk's sessions: what is wrong with a new one shows."""
        sessions = f"pg_stat_activity WHERE usename = '{DB_PROXY.name}'"
        await self.run(f"SELECT pg_terminate_backend(pid) FROM {sessions}", database="postgres")  # noqa: S608

    def processes(self) -> list[psutil.Process]:
        assert self.postgres.pid is not None
        postmaster = psutil.Process(self.postgres.pid)
        return [postmaster, *postmaster.children()]


@pytest.fixture(scope="module")
async def server(open_directory: Path) -> AsyncIterator[Server]:
    with locked(open_directory / "hurt") as directory:
        postgres = EmbeddedPostgres(directory)
        await postgres.prepare()
        await postgres.start()
        server = Server(postgres, directory)
        keys = settings().accepted_price_keys
        await migrate(server.dsn, livemode=False, cap_satoshi=CAP_SATOSHI, price_keys=keys, account=DB_PROXY)
        yield server
        await postgres.stop()


@dataclass
class Desk:
    """The services, called as clients and operators do."""

    urls: dict[str, str]
    client: httpx2.AsyncClient

    async def buy(self) -> str:
        """What an order is answered: "201", or the code of the problem."""
        answer = await self.client.post(f"{self.urls['create_buy_order']}/place_order/?currency=EUR&amount=1")
        return "201" if answer.status_code == 201 else str(answer.json()["code"])

    async def missing(self) -> str:
        """Why /readyz of db_proxy is not ready, "" when it is."""
        document = (await self.client.get(f"{self.urls['db_proxy']}/readyz")).json()
        return "; ".join(each["why"] for each in document.get("missing", ()) if each["what"] == "database")

    async def database(self) -> str:
        """What /status says is wrong with the database, "" when nothing is."""
        part = (await self.client.get(f"{self.urls['health_check']}/status")).json()["database"]
        return "" if part["ok"] else str(part["detail"])

    async def reported(self) -> str:
        """All that was reported as wrong."""
        kept = (await self.client.get(f"{self.urls['health_check']}/reports?limit=500")).json()["data"]
        return "\n".join(each["data"] for each in kept if each["level"] != "info")


@pytest.fixture
async def desk(server: Server, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Desk]:
    monkeypatch.setattr(create_buy_order, "FIRST_PRICE_SECONDS_MAX", 0.01)  # it is published later
    fast: dict[str, Any] = {
        "order_seconds_max": 2,
        "statement_seconds_max": 0.5,
        "lock_seconds_max": 0.15,
        "connect_seconds_max": 0.5,
        "remote_seconds_max": 0.5,
        "report_interval_seconds": 0.3,
        "report_retry_seconds": 0.05,
    }
    given = settings(database_url=as_db_proxy(server.dsn), price_ttl_seconds=3600, **fast)
    wired = wire(given, SERVICES)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(wired.close)
        urls = {name: await stack.enter_async_context(served(app, settings=given)) for name, app in wired.apps.items()}
        client = await stack.enter_async_context(httpx2.AsyncClient(timeout=20))
        shown = {"Authorization": f"Bearer {TOKEN}"}
        published = record_document(record(ttl=3600))
        (await client.post(f"{urls['api_cache_proxy']}/add/", json=published, headers=shown)).raise_for_status()
        desk = Desk(urls, client)
        async with asyncio.timeout(10):
            while await desk.buy() != "201" or await desk.missing():
                await asyncio.sleep(0.05)
        yield desk


Act = Callable[[Server], Awaitable[None]]


def running(*statements: str, database: str = DATABASE) -> Act:
    async def run(server: Server) -> None:
        await server.run(*statements, database=database)
        await server.hang_up()

    return run


def renaming(one: str, other: str) -> Act:
    async def rename(server: Server) -> None:
        while True:
            await server.hang_up()
            with contextlib.suppress(asyncpg.ObjectInUseError):  # somebody was quicker
                return await server.run(f"ALTER DATABASE {one} RENAME TO {other}", database="postgres")

    return rename


async def freeze(server: Server) -> None:
    for each in server.processes():
        each.suspend()


async def thaw(server: Server) -> None:
    for each in server.processes():
        each.resume()


async def shut_down(server: Server) -> None:
    """As `pg_ctl stop --mode=smart` does: it waits for those who are there, and lets nobody in."""
    connection = await asyncpg.connect(server.postgres.dsn_of("postgres"))
    assert server.postgres.pid is not None
    ends = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = $1"
    os.kill(server.postgres.pid, signal.SIGTERM)
    await connection.fetch(ends, DB_PROXY.name)
    _waited_for.append(connection)


async def start_again(server: Server) -> None:
    await _waited_for.pop().close()
    await server.postgres.stop()
    await server.postgres.start()


_waited_for: list[Connection] = []


async def lock_out(server: Server) -> None:
    """The account's password is another one from now on, and asked for."""
    hba = server.directory / "postgres" / "pg_hba.conf"
    hba.write_text(f"local all {DB_PROXY.name} scram-sha-256\n{hba.read_text()}")
    await server.run(f"ALTER ROLE {DB_PROXY.name} PASSWORD 'another'", "SELECT pg_reload_conf()")
    await asyncio.sleep(0.1)
    await server.hang_up()


async def let_in(server: Server) -> None:
    hba = server.directory / "postgres" / "pg_hba.conf"
    hba.write_text(hba.read_text().partition("\n")[2])
    await server.run("SELECT pg_reload_conf()")


def holding(lock: str) -> Act:
    async def hold(server: Server) -> None:
        connection = await asyncpg.connect(server.dsn)
        await connection.execute(f"BEGIN; {lock}")
        _waited_for.append(connection)

    return hold


async def let_go(server: Server) -> None:
    await _waited_for.pop().close()


def trigger(body: str) -> Act:
    return running(
        f"CREATE FUNCTION hurt() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN {body}; RETURN NULL; END$$",
        "CREATE TRIGGER hurt AFTER INSERT ON orders FOR EACH ROW EXECUTE FUNCTION hurt()",
    )


without_trigger = running("DROP FUNCTION hurt CASCADE")


async def kill_a_backend(server: Server) -> None:
    """As the system does when memory is short: the server restarts all its sessions."""
    [pid] = [
        each.pid
        for each in server.processes()
        if DB_PROXY.name in " ".join(each.cmdline()) and "idle" in " ".join(each.cmdline())
    ][:1]
    os.kill(pid, signal.SIGKILL)
    await asyncio.sleep(0.1)
    async with asyncio.timeout(20):
        while True:
            with contextlib.suppress(asyncpg.PostgresError, OSError):
                return await server.run("SELECT 1")
            await asyncio.sleep(0.05)


async def nothing(_: Server) -> None: ...


FAULTS: dict[str, tuple[Act, Act]] = {
    "down": (lambda server: server.postgres.stop(), lambda server: server.postgres.start()),
    "frozen": (freeze, thaw),
    "shutting down": (shut_down, start_again),
    "read-only": (
        running("ALTER DATABASE buydesk SET default_transaction_read_only = on"),
        running("ALTER DATABASE buydesk RESET default_transaction_read_only"),
    ),
    "disk full": (
        trigger(
            "RAISE EXCEPTION 'could not extend file \"base/16384/16402\": No space left on device' "
            "USING ERRCODE = '53100'"
        ),
        without_trigger,
    ),
    "too many connections": (
        running("ALTER DATABASE buydesk CONNECTION LIMIT 0"),
        running("ALTER DATABASE buydesk CONNECTION LIMIT -1"),
    ),
    "wrong password": (lock_out, let_in),
    "no such database": (renaming("buydesk", "elsewhere"), renaming("elsewhere", "buydesk")),
    "not migrated": (
        running("UPDATE alembic_version SET version_num = '0001'"),
        running(f"UPDATE alembic_version SET version_num = '{REVISION}'"),  # noqa: S608
    ),
    "tables missing": (
        running("ALTER TABLE exposure RENAME TO elsewhere"),
        running("ALTER TABLE elsewhere RENAME TO exposure"),
    ),
    "the other mode's": (
        running("UPDATE exposure SET livemode = true"),
        running("UPDATE exposure SET livemode = false"),
    ),
    "standby away": (
        running("ALTER SYSTEM SET synchronous_standby_names = 'away'", "SELECT pg_reload_conf()"),
        running("ALTER SYSTEM RESET synchronous_standby_names", "SELECT pg_reload_conf()"),
    ),
    "row locked": (holding("SELECT FROM exposure FOR UPDATE"), let_go),
    "lock held": (holding("SELECT pg_advisory_xact_lock(31644362927074919)"), let_go),
    "function missing": (
        running("ALTER FUNCTION place_items RENAME TO elsewhere"),
        running("ALTER FUNCTION elsewhere RENAME TO place_items"),
    ),
    "no order taken": (
        running("ALTER TABLE orders ADD CONSTRAINT never CHECK (number < 1) NOT VALID"),
        running("ALTER TABLE orders DROP CONSTRAINT never"),
    ),
    "slow": (trigger("PERFORM pg_sleep(5)"), without_trigger),
    "backend killed": (kill_a_backend, nothing),
}


PAGE = (Path(__file__).parents[2] / "docs" / "operating.md").read_text(encoding="utf-8")
TABLE = PAGE.partition("## PostgreSQL under faults\n")[2].partition("\n## ")[0]
# By the fault: what an order is answered, what is missing, what is logged or reported.
ROWS = re.findall(r"^\| ([^|:]+?)(?:: [^|]+)? \| (.+?) \| (.*?) \| (.*?) \|$", TABLE, re.MULTILINE)[1:]
DOCUMENTED = {fault: (re.findall(r"`(\w+)`", codes), missing, said) for fault, codes, missing, said in ROWS}


def is_documented(documented: str, seen: str) -> bool:
    """Whether that is what is documented, where an ellipsis stands for anything."""
    return re.search(re.escape(documented).replace("…", ".+"), seen) is not None


def test_the_documented_faults_are_those_that_are_tried() -> None:
    assert list(DOCUMENTED) == list(FAULTS)


@pytest.mark.parametrize("fault", FAULTS)
async def test_what_is_documented_is_what_is_said(
    server: Server, desk: Desk, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    codes, documented, said = DOCUMENTED[fault]
    begin, end = FAULTS[fault]
    await begin(server)
    try:
        first, second = await desk.buy(), await desk.buy()
        missing, database = await desk.missing(), await desk.database()
        await asyncio.sleep(0.5)
        told = f"{await desk.reported()}\n{caplog.text}"
    finally:
        await end(server)
    assert first in (*codes, "outcome_unknown")  # of a session that was cut while it was asked, nobody knows more
    assert second in codes
    assert missing == database
    assert is_documented(documented, missing) if documented else missing == ""
    assert is_documented(said, told), told
    assert caplog.text.count("orders are refused") <= 1
    async with asyncio.timeout(20):
        while await desk.buy() != "201" or await desk.missing() or await desk.database():
            await asyncio.sleep(0.02)


async def test_look_up_on_a_standby_is_not_told_to_be_final(server: Server) -> None:
    """It has what its primary has sent so far, and whether that is all it cannot know."""
    ledger = PostgresLedger(as_db_proxy(server.dsn), settings(), livemode=False)
    item = priced_order(key="on the primary")
    [placed] = await ledger.place([item], 5)
    assert isinstance(placed, Placed)
    await server.postgres.stop()
    signal_file = server.directory / "postgres" / "standby.signal"
    signal_file.touch()
    signal_file.chmod(0o644)
    await server.postgres.start()
    try:
        assert (await ledger.page(None, PageFrom(0), 1)).orders == [placed.order]
        for look_up in (ledger.order(item.order.id, None), ledger.order_by_key(item.order.client, "nowhere")):
            with pytest.raises(LedgerUnavailable):
                await look_up
    finally:
        await ledger.close()
        await server.postgres.stop()
        signal_file.unlink()
        await server.postgres.start()
