"""Trust inside a desk of seven processes: whoever gets at Redis, or holds one secret, makes no price."""

import asyncio
import time
from collections.abc import AsyncIterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace
from redis.asyncio import Redis

from buydesk.backends.redis.prices import kinds
from buydesk.embedded.data_dir import secret_file
from buydesk.orders.documents import priced_order_documents
from buydesk.prices.documents import record_document
from buydesk.prices.model import PriceRecord
from buydesk.settings.model import Settings
from buydesk.times import EPOCH
from tests.builders import new_order, priced_order, record
from tests.desks import Running, desk_up

# Two euros a bitcoin, and quotes that prove it: by a key that is not the desk's, and by none.
FORGED = [record(2 * 10**8), replace(record(2 * 10**8), signature=None)]


@pytest.fixture(scope="module")
def data_dir(open_directory: Path) -> Path:
    return open_directory / "trust"


@pytest.fixture(scope="module")
async def desk(data_dir: Path, redis_program: Path) -> AsyncIterator[Running]:
    async with desk_up(data_dir, "--separate") as running:
        yield running


async def buy(desk: Running) -> Any:
    async with desk.client("create_buy_order") as client:
        return (await client.post("/place_order/?currency=EUR&amount=69")).json()


async def overwrite(data_dir: Path, forged: PriceRecord) -> None:
    """Writes the record where the current price is in Redis, dated now, as api_cache_proxy would."""
    key = next(iter(kinds(Settings())))
    fields: dict[str | bytes, str | float | bytes] = {
        "id": str(forged.id),
        "as_of": (forged.as_of - EPOCH).total_seconds() * 1_000_000,
        "document": msgspec.json.encode(record_document(forged)),
    }
    async with Redis(unix_socket_path=str(data_dir / "socket" / "redis.sock")) as redis:
        assert await redis.exists(key)
        await redis.hset(key, mapping=fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("forged", FORGED, ids=["another key", "unsigned"])
async def test_record_that_is_written_into_redis_sells_nothing(
    desk: Running, data_dir: Path, forged: PriceRecord
) -> None:
    real = Decimal((await buy(desk))["order"]["exchange_rate"])
    until = time.monotonic() + 3  # create_buy_order looks every second
    while time.monotonic() < until:
        await overwrite(data_dir, forged)
        bought = await buy(desk)
        assert abs(Decimal(bought["order"]["exchange_rate"]) / real - 1) < Decimal("0.1"), bought
        await asyncio.sleep(0.1)
    async with desk.client("api_cache_proxy") as client:
        assert (await client.get("/record")).json()["id"] != str(forged.id)


@pytest.mark.parametrize("forged", FORGED, ids=["another key", "unsigned"])
async def test_who_may_publish_may_not_make_a_price(desk: Running, data_dir: Path, forged: PriceRecord) -> None:
    headers = {"Authorization": f"Bearer {secret_file(data_dir, 'publishing_tokens').read_text()}"}
    async with desk.client("api_cache_proxy") as client:
        refused = await client.post("/add/", json=record_document(forged), headers=headers)
        current = (await client.get("/record")).json()
        repeated = await client.post("/add/?ttl=1", json=current, headers=headers)
        await asyncio.sleep(1.1)
        kept = (await client.get("/record")).json()
    assert (refused.status_code, refused.json()["code"]) == (422, "invalid_request")
    assert "signed" in refused.json()["detail"]
    assert repeated.status_code in (200, 409)
    assert kept["expires_at"] >= current["expires_at"], "a published record never changes"


@pytest.mark.parametrize("forged", FORGED, ids=["another key", "unsigned"])
async def test_who_may_place_may_not_make_a_price(desk: Running, data_dir: Path, forged: PriceRecord) -> None:
    headers = {"Authorization": f"Bearer {secret_file(data_dir, 'placing_tokens').read_text()}"}
    [document] = priced_order_documents([priced_order(order=new_order(6900), price=forged)])
    async with desk.client("db_proxy") as client:
        content = msgspec.json.encode(document)
        answer = await client.post("/add/", content=content, headers=headers | {"Content-Type": "application/json"})
    told = answer.json()
    assert (told["outcome"], told["problem"]["code"]) == ("refused", "price_unavailable")
    assert "signed" in told["problem"]["detail"]
