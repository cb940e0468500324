"""Clocks that are set under load, in processes of their own: `make chaos ARGS=clocks` does more of it."""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest

from chaos.buyers import Buyers
from chaos.clocks import LIBRARY, SteppedDesk, libfaketime, step, stepped_desk
from chaos.journal import Journal, read
from chaos.judge import by_key, findings, read_ledger


@pytest.fixture(scope="module")
async def desk(open_directory: Path, redis_program: Path) -> AsyncIterator[SteppedDesk]:
    if libfaketime() is None:
        missing = f"no {LIBRARY} in /usr/lib (Debian's package is faketime)"
        if "CI" in os.environ:
            pytest.fail(missing)
        pytest.skip(missing)
    directory = open_directory / "clocks"
    directory.mkdir(mode=0o755)
    async with stepped_desk(directory) as running:
        yield running


@pytest.mark.parametrize(
    ("service", "seconds"),
    [("create_buy_order", 11), ("db_proxy", -11), ("api_updater", 60), ("api_cache_proxy", -3600)],
)
async def test_clock_that_is_off_is_named_and_nothing_refused_is_stored(
    desk: SteppedDesk, service: str, seconds: int, tmp_path: Path
) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path, seed=1) as journal:
        buyers = Buyers(desk.orders_url, journal, seed=seconds)
        assert await step(desk, service, seconds, buyers, journal, seconds_max=30) == []
    told = [each.outcome for each in by_key(read(path)).values()]
    assert "placed" in told
    if service in ("create_buy_order", "db_proxy"):
        assert "clock_skewed" in told
    await asyncio.sleep(0.5)
    database = await asyncpg.connect(desk.dsn)
    ledger = await read_ledger(database)
    await database.close()
    assert list(findings(read(path), ledger)) == []
