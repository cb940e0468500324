"""`buydesk price`: what an operator asks of a desk and confirms, in its database."""

import asyncio
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest
from click.testing import CliRunner, Result

from buydesk import cli
from buydesk.times import format_time, utc_now
from tests.databases import Databases, run

CONFIRM = ["price", "confirm", "eur", "--from", "15000", "--to", "16000", "--why", "it's the news"]
SHOW = ["price", "show"]


@dataclass
class Desk:
    dsn: str

    async def run(self, arguments: list[str], **env: str) -> Result:
        # A thread of its own: the command makes a loop of its own.
        return await asyncio.to_thread(CliRunner().invoke, cli.main, arguments, env={"DATABASE_URL": self.dsn} | env)

    async def confirmed(self) -> list[tuple[Any, ...]]:
        connection = await asyncpg.connect(self.dsn)
        rows = await connection.fetch("SELECT currency, low_e8, high_e8, why, expires_at FROM price_confirmations")
        await connection.close()
        return [tuple(row) for row in rows]


@pytest.fixture
async def desk(databases: Databases) -> Desk:
    return Desk(await databases.new())


async def test_price_is_confirmed_for_a_quarter_of_an_hour_and_what_was_confirmed_is_told(desk: Desk) -> None:
    result = await desk.run(CONFIRM)
    [(*kept, ends_at)] = await desk.confirmed()
    assert kept == ["EUR", 15_000 * 10**8, 16_000 * 10**8, "it's the news"]
    assert timedelta(minutes=14) < ends_at - utc_now() <= timedelta(minutes=15)
    assert result.output == f"Confirmed: EUR 15000.00 to 16000.00 until {format_time(ends_at)} (it's the news)\n"
    assert result.exit_code == 0
    told = (await desk.run(["audit"])).output
    assert "price confirmed EUR (it's the news)" in told


async def test_price_is_confirmed_for_as_long_as_asked(desk: Desk) -> None:
    assert (await desk.run([*CONFIRM, "--minutes", "2"])).exit_code == 0
    [(*_, ends_at)] = await desk.confirmed()
    assert timedelta(minutes=1) < ends_at - utc_now() <= timedelta(minutes=2)


async def test_last_prices_and_what_is_confirmed_are_shown(desk: Desk) -> None:
    anchors = "INSERT INTO price_anchors (currency, rate_e8, as_of) VALUES ($1, $2, $3)"
    noon = datetime(2026, 1, 31, 12, tzinfo=UTC)
    await run(desk.dsn, anchors, "USD", 20_000 * 10**8, noon)
    await run(desk.dsn, anchors, "EUR", 4119191 * 10**6, noon + timedelta(seconds=1))
    await desk.run([*CONFIRM, "--why", "why not"])
    [(*_, ends_at)] = await desk.confirmed()
    assert (await desk.run(SHOW)).output.splitlines() == [
        "EUR 41191.91, the price of 2026-01-31T12:00:01.000000Z",
        "USD 20000.00, the price of 2026-01-31T12:00:00.000000Z",
        f"Confirmed: EUR 15000.00 to 16000.00 until {format_time(ends_at)} (why not)",
    ]


async def test_desk_that_has_no_last_price_says_so(desk: Desk) -> None:
    assert (await desk.run(SHOW)).output == "There is no last price yet.\n"


def assert_one_line(result: Result, said: str) -> None:
    assert result.exit_code == 2
    assert result.output == f"buydesk: {said}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([*CONFIRM[:2], "CHF", *CONFIRM[3:]], "CURRENCY must be one of EUR, GBP, USD"),
        ([*CONFIRM, "--from", "x"], "--from must be plain decimal text with at most 8 places, such as 0.00167509"),
        ([*CONFIRM, "--to", "0.5"], "--to must be an exchange rate between 1 and 10000000000"),
        ([*CONFIRM, "--to", "14999.99"], "to: must not be less than from"),
        ([*CONFIRM, "--why", ""], "why: must be 1 to 500 printable characters on one line"),
        ([*CONFIRM, "--minutes", "16"], "minutes: must be a whole number from 1 to 15"),
    ],
)
async def test_what_cannot_be_confirmed_is_refused_in_one_line(desk: Desk, arguments: list[str], said: str) -> None:
    assert_one_line(await desk.run(arguments), said)
    assert await desk.confirmed() == []
