"""The recipe for a currency in CONTRIBUTING.md, walked: a desk with orders gets the Swiss franc, and loses nothing."""

import gzip
import re
import shutil
from pathlib import Path

import pytest

from tests.desks import desk_up

ROOT = Path(__file__).parents[2]
RECIPE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("### A currency")[2].partition("\n##")[0]
MONEY = "money.py"
POSTGRES = Path("backends/postgres")
SERIES = Path("backends/sources/data/btc_minutes_2023-03-09_17.txt.gz")
MIGRATION = """\
from buydesk.backends.postgres.sql_files import upgrade_by

revision, down_revision = "9999", "{before}"
upgrade = upgrade_by(__file__)
"""
CHECKED = """\
ALTER TABLE orders DROP CONSTRAINT orders_currency_check,
    ADD CONSTRAINT orders_currency_check CHECK (currency IN ('CHF', 'EUR', 'GBP', 'USD'));
"""


def package_with_francs(directory: Path) -> Path:
    """A copy of the package, changed where the recipe says."""
    package = directory / "buydesk"
    shutil.copytree(ROOT / "src" / "buydesk", package, ignore=shutil.ignore_patterns("__pycache__"))
    money = (package / MONEY).read_text()
    assert money.count('    EUR = "EUR"\n') == 1
    (package / MONEY).write_text(money.replace('    EUR = "EUR"\n', '    CHF = "CHF"\n    EUR = "EUR"\n'))
    versions = package / POSTGRES / "migrations" / "versions"
    newest = max(path.name.partition("_")[0] for path in versions.glob("*.py"))
    (versions / "9999_francs.py").write_text(MIGRATION.format(before=newest))
    (versions / "9999_francs.sql").write_text(CHECKED)
    series = gzip.decompress((package / SERIES).read_bytes()).decode()
    [euros] = re.findall(r"^EUR (.*)$", series, re.MULTILINE)
    (package / SERIES).write_bytes(gzip.compress(f"{series.rstrip()}\nCHF {euros}\n".encode()))
    return package


def test_recipe_names_every_file_that_is_changed_here() -> None:
    for file in (MONEY, "migrations/versions/", "schema.sql", SERIES.parent.as_posix()):
        assert file in RECIPE


@pytest.mark.timeout(180)
async def test_desk_with_orders_gets_a_currency_and_loses_nothing(open_directory: Path, tmp_path: Path) -> None:
    data_dir, still = open_directory / "francs", {"BUYDESK_REPLAY_SPEED": "0"}
    async with desk_up(data_dir, env=still) as desk:
        async with desk.client("create_buy_order") as client:
            first = await client.post("/place_order/?currency=eur&amount=69", headers={"Idempotency-Key": "k"})
            refused = await client.post("/place_order/?currency=chf&amount=69")
        assert (first.status_code, refused.status_code) == (201, 422)
        async with desk.client("fetch_buy_orders") as client:
            price = await client.get(f"/prices/{first.json()['order']['price_id']}")
        assert sorted(price.json()["rates"]) == ["EUR", "GBP", "USD"]
    package_with_francs(tmp_path)
    async with desk_up(data_dir, env=still | {"PYTHONPATH": str(tmp_path)}) as desk:
        async with desk.client("create_buy_order") as client:
            again = await client.post("/place_order/?currency=eur&amount=69", headers={"Idempotency-Key": "k"})
            francs = await client.post("/place_order/?currency=chf&amount=69")
        assert again.content == first.content
        assert francs.status_code == 201, francs.text
        async with desk.client("fetch_buy_orders") as client:
            assert (await client.get(f"/prices/{first.json()['order']['price_id']}")).content == price.content
            new_price = await client.get(f"/prices/{francs.json()['order']['price_id']}")
            listed = await client.get("/get_orders/")
        assert sorted(new_price.json()["rates"]) == ["CHF", "EUR", "GBP", "USD"]
        assert [order["currency"] for order in listed.json()["data"]] == ["CHF", "EUR"]
        async with desk.client("api_cache_proxy") as client:
            history = await client.get("/history?minutes=1440")
        assert history.status_code == 200
