"""Settling and cancelling against what may happen to a real PostgreSQL: what was done is done once, and lost answers
are called so."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from buydesk.backends.postgres.ledger import PostgresLedger
from buydesk.backends.postgres.life import PostgresLife
from buydesk.backends.postgres.sessions import Session
from buydesk.backends.postgres.sql import QUERIES
from buydesk.errors import InternalError, LedgerUnavailable, OutcomeUnknown, Overloaded
from buydesk.orders.life import Closing
from buydesk.orders.model import Order, Placed
from tests.builders import priced_order, settings
from tests.databases import Databases, as_db_proxy, run
from tests.lines import Line, line_to_postgres
from tests.recount import assert_adds_up


@pytest.fixture
async def dsn(databases: Databases) -> AsyncIterator[str]:
    dsn = await databases.new()
    yield dsn
    await assert_adds_up(dsn)


class Wired:
    """A ledger behind a line, with an order to close."""

    def __init__(self, ledger: PostgresLedger, line: Line, order: Order) -> None:
        self.ledger, self.line, self.order = ledger, line, order
        self.life = PostgresLife(ledger)

    async def settle(self, text: str | None = "bank-7") -> Order:
        [settled] = await self.life.close_orders([Closing(self.order.id, "settled", text)])
        assert isinstance(settled, Order)
        return settled


@pytest.fixture
async def wired(dsn: str, tmp_path: Path) -> AsyncIterator[Wired]:
    async with line_to_postgres(as_db_proxy(dsn), tmp_path) as (through, line):
        given: Any = {"lock_seconds_max": 0.3, "statement_seconds_max": 0.5, "remote_seconds_max": 2}
        ledger = PostgresLedger(through, settings(**given), livemode=False)
        [placed] = await ledger.place([priced_order()], 5)
        assert isinstance(placed, Placed)
        await ledger.exposure(None)  # a session for reads is there
        yield Wired(ledger, line, placed.order)
        await ledger.close()


@pytest.mark.parametrize("fault", ["before", "after"])
async def test_connection_that_is_cut_is_made_up_for_by_doing_it_once_more(wired: Wired, fault: Any) -> None:
    wired.line.fault = fault
    settled = await wired.settle()
    assert wired.line.struck.is_set()
    assert settled.settlement_reference == "bank-7"
    assert await wired.ledger.order(wired.order.id, None) == settled
    assert len(await wired.life.events(None, 0, 9)) == 2


async def test_answer_that_stays_lost_is_unknown_and_sending_again_tells(wired: Wired) -> None:
    wired.line.fault = "after"
    wired.line.refusing = True  # whoever connects again
    with pytest.raises(OutcomeUnknown):
        await wired.settle()
    wired.line.refusing = False
    settled = await wired.settle()
    assert await wired.ledger.order(wired.order.id, None) == settled
    assert len(await wired.life.events(None, 0, 9)) == 2


async def test_without_a_database_nothing_was_done(wired: Wired) -> None:
    wired.line.refusing = True
    wired.line.cut_all()
    await asyncio.sleep(0.05)
    with pytest.raises(LedgerUnavailable):
        await wired.settle()


async def test_row_that_somebody_holds_is_waited_for_only_so_long(wired: Wired, dsn: str) -> None:
    other = await asyncpg.connect(dsn)
    async with other.transaction():
        await other.execute("SELECT FROM exposure FOR UPDATE")
        with pytest.raises(Overloaded):
            await wired.settle()
    await other.close()
    assert (await wired.settle()).status == "settled"


async def test_warning_while_closing_proves_nothing_and_asking_again_tells(wired: Wired, dsn: str) -> None:
    """As when the wait for a standby is cancelled."""
    warn = "BEGIN RAISE WARNING 'not yet on the standby'; RETURN NULL; END"
    await run(dsn, f"CREATE FUNCTION warn() RETURNS trigger LANGUAGE plpgsql AS $${warn}$$")
    await run(dsn, "CREATE TRIGGER warned AFTER INSERT ON closings FOR EACH ROW EXECUTE FUNCTION warn()")
    settled = await wired.settle()
    assert settled == await wired.ledger.order(wired.order.id, None)
    assert len(await wired.life.events(None, 0, 9)) == 2


async def test_fault_after_the_commit_is_no_refusal(wired: Wired, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch = Session.fetch

    async def fail_to_read(self: Session, query: str, *arguments: Any, seconds: float) -> Any:
        if query == "closed_orders":
            raise asyncpg.InsufficientPrivilegeError("no")
        return await fetch(self, query, *arguments, seconds=seconds)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "fetch", fail_to_read)
        with pytest.raises(OutcomeUnknown):
            await wired.settle()
    assert (await wired.settle()).status == "settled"
    assert len(await wired.life.events(None, 0, 9)) == 2


async def test_what_the_database_refuses_to_keep_is_a_fault_and_nothing_of_it_is_done(
    wired: Wired, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(InternalError, match="they certainly were not"):
        await wired.settle("x" * 129)
    assert "1 orders cannot be settled or cancelled" in caplog.text
    assert (await wired.ledger.order(wired.order.id, None)).status == "accepted"


async def test_nothing_to_close_is_nothing_done(wired: Wired) -> None:
    assert list(await wired.life.close_orders([])) == []


async def test_repeat_is_told_only_once_standbys_have_it(wired: Wired, monkeypatch: pytest.MonkeyPatch) -> None:
    settled = await wired.settle()
    reached = []
    fetch = Session.fetch

    async def with_standbys(self: Session, query: str, *arguments: Any, seconds: float) -> Any:
        rows = await fetch(self, query, *arguments, seconds=seconds)
        if query == "durable_point":
            reached.append(query)
        return [dict(row) | {"has_standbys": True} for row in rows] if query == "close_orders" else rows

    monkeypatch.setattr(Session, "fetch", with_standbys)
    assert await wired.settle() == settled
    assert len(reached) == 1


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE orders SET satoshi = 1",
        "DELETE FROM orders",
        "TRUNCATE orders",
        "UPDATE closings SET status = 'settled'",
        "DELETE FROM closings",
        "TRUNCATE closings",
        "DELETE FROM clients",
        "TRUNCATE clients CASCADE",
        "UPDATE keys SET scopes = '{orders:create}'",
        "DELETE FROM keys",
        "TRUNCATE keys",
        "UPDATE audit SET why = ''",
        "DELETE FROM audit",
        "TRUNCATE audit",
    ],
)
async def test_what_has_happened_stays_as_it_is_whoever_writes_sql(wired: Wired, dsn: str, statement: str) -> None:
    await wired.settle()
    with pytest.raises(asyncpg.RestrictViolationError, match="what has happened stays as it is"):
        await run(dsn, statement)


async def test_order_is_closed_once_whoever_writes_sql(wired: Wired, dsn: str) -> None:
    await wired.settle()
    for values in ("(9, 1, 9, 9, 9, now(), 'anonymous', 'settled')", "(2, 9, 9, 9, 9, now(), 'anonymous', 'settled')"):
        with pytest.raises(asyncpg.UniqueViolationError):
            await run(dsn, f"INSERT INTO closings VALUES {values}")  # noqa: S608


@pytest.mark.parametrize(
    "columns",
    [
        "'accepted', NULL, NULL",
        "'settled', NULL, 'why'",
        "'cancelled', NULL, NULL",
        "'cancelled', 'bank-7', 'why'",
        "'cancelled', NULL, ''",
        "'settled', '', NULL",
    ],
)
async def test_closing_has_the_text_that_its_kind_has(wired: Wired, dsn: str, columns: str) -> None:
    with pytest.raises(asyncpg.CheckViolationError):
        await run(dsn, f"INSERT INTO closings VALUES (2, 1, 1, 1, 2, now(), 'anonymous', {columns})")  # noqa: S608


@pytest.mark.parametrize("lower", ["[5:5]=", "[1:1][1:1]={"])
async def test_no_array_gives_room_back_that_no_closing_stands_for(wired: Wired, dsn: str, lower: str) -> None:
    await run(dsn, "UPDATE exposure SET cap_counts_open = true")
    ids = f"{lower}{{{wired.order.id}}}" + ("}" if lower.endswith("{") else "")
    texts = ids.replace(str(wired.order.id), "settled")
    account = await asyncpg.connect(as_db_proxy(dsn))
    call = "SELECT outcomes FROM close_orders($1::text::uuid[], $2::text::text[], $2::text::text[])"
    with pytest.raises(asyncpg.IntegrityConstraintViolationError):
        await account.fetch(call, ids, texts)
    await account.close()
    assert (await wired.ledger.order(wired.order.id, None)).status == "accepted"


async def test_closing_goes_by_index_whatever_the_session_s_settings(wired: Wired, dsn: str) -> None:
    connection = await asyncpg.connect(dsn)
    async with connection.transaction():
        await connection.fetch(QUERIES["close_orders"], [wired.order.id], ["settled"], [None])
        for table in ("orders", "closings"):
            scans = await connection.fetchval("SELECT pg_stat_get_xact_numscans($1::text::regclass)", table)
            assert scans == 0
    await connection.close()
