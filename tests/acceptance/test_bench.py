"""`make bench` works: a quick run measures everything and proves it, and a wrong ledger would not pass."""

import asyncio
import json
import os
import shutil
import sys
import xml.etree.ElementTree as ET
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest

from bench import report
from bench.processes import BenchFailed
from bench.proof import Proof, prove
from bench.results import MEASURES, TARGETS, Results
from tests.databases import Databases, fill

ROOT = Path(__file__).parents[2]
QUICK_SECONDS_MAX = 400


async def bench(*arguments: str, **env: str) -> tuple[int | None, str]:
    """The exit code of the command behind `make bench`, and all that it prints."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench", *arguments),
        cwd=ROOT,
        env={**os.environ, **env},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(QUICK_SECONDS_MAX):
            printed, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()
    return process.returncode, printed.decode()


@pytest.fixture
def wrk() -> None:
    """Only where it is missing is the bench itself not tested, and never in CI."""
    if shutil.which("wrk") is None:
        missing = "no wrk on the PATH"
        if "CI" in os.environ:
            pytest.fail(missing)
        pytest.skip(missing)


@pytest.mark.usefixtures("wrk")
@pytest.mark.timeout(QUICK_SECONDS_MAX + 20)
async def test_a_quick_run_measures_everything_and_proves_it(tmp_path: Path) -> None:
    code, printed = await bench("--quick", "--json", str(tmp_path / "quick.json"))
    assert code == 0, printed
    assert "QUICK" in printed
    found = json.loads((tmp_path / "quick.json").read_text())
    assert found["quick"] is True
    assert found["durable"] == {"fsync": "on", "full_page_writes": "on", "synchronous_commit": "on"}
    assert found["medians"].keys() == MEASURES.keys()
    assert all(value > 0 for name, value in found["medians"].items() if not name.startswith("errors_"))
    assert [target["title"] for target in found["targets"]] == [target.title for target in TARGETS]
    assert all(target["held"] is not None for target in found["targets"])
    proofs = found["proofs"]
    assert proofs["orders_answered_and_found_once"] > found["medians"]["orders_64"]
    assert proofs["replays_that_added_nothing"] > 0
    assert {"desk", "postgres", "wrk"} <= found["cpu_us_per_order"]["orders_64"].keys()
    assert {"create_buy_order", "db_proxy", "postgres"} <= found["cpu_us_per_order"]["separate_64"].keys()
    assert found["machine"]["sync_p50_ms"] > 0
    assert str(tmp_path) not in json.dumps(found)
    bars = ET.parse(tmp_path / "quick.svg").getroot().iter("{http://www.w3.org/2000/svg}rect")  # noqa: S314  # our own
    assert len(list(bars)) == 5


async def test_without_wrk_it_says_what_to_install(tmp_path: Path) -> None:
    code, printed = await bench("--quick", PATH=str(tmp_path))
    assert code == 2
    assert printed.splitlines() == ["bench: wrk is not on the PATH, and makes the load: apt install wrk"]


async def test_only_a_full_run_can_be_kept() -> None:
    code, printed = await bench("--quick", "--keep")
    assert code == 2
    assert "--quick" in printed


KEYS = ["filled-1", "filled-2", "filled-3"]


@pytest.fixture
async def ledger(databases: Databases) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    """Three orders like those of the bench, with KEYS."""
    dsn = await databases.new()
    await fill(dsn, len(KEYS))
    connection = await asyncpg.connect(dsn)
    await connection.execute("SET session_replication_role = replica; UPDATE orders SET amount_cents = 5")
    yield connection
    await connection.close()


async def test_orders_that_are_all_there_are_proved(ledger: "asyncpg.Connection[asyncpg.Record]") -> None:
    assert await prove(ledger, 0, KEYS, 0) == Proof(3, 0)
    assert await prove(ledger, 0, KEYS[:2], 1) == Proof(2, 1)


@pytest.mark.parametrize(
    ("mischief", "before", "keys", "said"),
    [
        ("SELECT 1", 0, [*KEYS[:2], "lost"], "3 keys were answered with 201, 3 different, and 2 are there"),
        ("SELECT 1", 0, [*KEYS, KEYS[0]], "4 keys were answered with 201, 3 different"),
        ("SELECT 1", 1, KEYS, "2 orders were placed and 3 answered"),
        ("SELECT 1", 0, KEYS[:1], "3 orders were placed and 1 answered"),
        ("UPDATE orders SET amount_cents = 6 WHERE number = 2", 0, KEYS, "and 2 are there"),
        ("UPDATE exposure SET placed_satoshi = placed_satoshi - 1", 0, KEYS, "does not add up"),
        ("UPDATE exposure SET last_number = 4", 0, KEYS, "does not add up"),
        ("UPDATE orders SET number = 4 WHERE number = 3", 0, KEYS, "does not add up"),
    ],
)
async def test_a_ledger_that_is_not_what_was_answered_is_found_out(
    ledger: "asyncpg.Connection[asyncpg.Record]", mischief: str, before: int, keys: list[str], said: str
) -> None:
    await ledger.execute(mischief)
    with pytest.raises(BenchFailed, match=said):
        await prove(ledger, before, keys, 1)


def found(**values: list[float]) -> Results:
    return Results(is_quick=False, samples=values)


def test_targets_are_ratios_of_medians_and_of_the_best_of_several() -> None:
    results = found(orders_64=[900, 5100, 5000], pgbench_1=[1000, 10, 1000], pgbench_2=[900, 900, 4000], echo=[12_600])
    [held, missed] = [target for target in TARGETS if target.over in ("orders", "orders_64")]
    assert (results.ratio(held), results.held(held)) == (5.0, True)
    assert results.held(missed) is False
    assert results.missed() == [missed]
    assert "(1 clients)" in report.text_table(results)


def test_an_aim_may_be_missed_and_errors_may_not() -> None:
    assert found(memory=[1000]).missed() == []
    [target] = found(errors_256=[0.0, 0.0, 1.0]).missed()
    assert target.over == "errors_256"


def test_what_is_kept_replaces_the_results_and_nothing_else(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    (tmp_path / "benchmarks.md").write_text(page, encoding="utf-8")
    results = found(orders_64=[9000], pgbench=[1000])
    for _ in range(2):
        report.keep(results, tmp_path)
    kept = (tmp_path / "benchmarks.md").read_text(encoding="utf-8")
    best = "one process, best of 64 to 1,000 connections (64 connections)"
    assert f"| {best} | 9,000 orders/s | 9.00 (one process ÷ pgbench) | ≥ 5 | yes |" in kept
    assert kept.partition("<!--")[0] == page.partition("<!--")[0]
    assert kept.rpartition("-->")[2] == page.rpartition("-->")[2]
    assert json.loads((tmp_path / "benchmarks.json").read_text())["samples"] == results.samples
