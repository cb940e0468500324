"""The promise, kept by real processes: two create_buy_order and two db_proxy at once over one PostgreSQL."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import asyncpg
import httpx2
import pytest

from buydesk.money import format_btc
from tests.builders import shared_env
from tests.databases import CAP_SATOSHI, Databases
from tests.desks import Running, buydesk, free_offset

TENTH_SATOSHI = 10_000_000
CLIENTS = 64
COPIES = 200


@dataclass
class Doubled:
    """A desk in which the edge and the ledger's service run twice."""

    dsn: str
    edges: tuple[Running, Running]
    reader: Running
    store: Running

    @contextlib.asynccontextmanager
    async def clients(self) -> AsyncIterator[tuple[httpx2.AsyncClient, httpx2.AsyncClient]]:
        limits = httpx2.Limits(max_connections=COPIES)
        first, second = (
            httpx2.AsyncClient(base_url=edge.url("create_buy_order"), limits=limits, timeout=30) for edge in self.edges
        )
        async with first, second:
            yield first, second

    async def read(self, service: str, path: str) -> Any:
        of = self.store if service == "api_cache_proxy" else self.reader
        async with of.client(service) as client:
            return (await client.get(path)).json()


async def ready(running: Running, service: str) -> None:
    async with running.client(service) as client, asyncio.timeout(60):
        while True:
            with contextlib.suppress(httpx2.TransportError):
                if (await client.get("/readyz")).status_code == 200:
                    return
            assert running.process.returncode is None, running.printed
            await asyncio.sleep(0.05)


@pytest.fixture(scope="module")
async def desk(databases: Databases) -> AsyncIterator[Doubled]:
    dsn = await databases.new()
    offsets = [free_offset(), free_offset()]
    first, second = (shared_env() | {"BUYDESK_PORT_OFFSET": str(offset)} for offset in offsets)
    # The second edge has its own db_proxy; the price and the reports come from the first one's neighbours.
    for name, port in (("API_CACHE_PROXY", 8002), ("HEALTH_CHECK", 8050)):
        second[f"BUYDESK_{name}_URL"] = f"http://127.0.0.1:{port + offsets[0]}"
    async with contextlib.AsyncExitStack() as stack:

        async def serve(service: str, env: dict[str, str], offset: int) -> Running:
            process = buydesk("serve", service, env=env, offset=offset)
            return await stack.enter_async_context(process)

        database = {"DATABASE_URL": dsn}
        store = await serve("api_cache_proxy", first, offsets[0])
        every = [
            (await serve("health_check", first, offsets[0]), "health_check"),
            (await serve("api_updater", first, offsets[0]), "api_updater"),
            (await serve("db_proxy", first | database, offsets[0]), "db_proxy"),
            (await serve("db_proxy", second | database, offsets[1]), "db_proxy"),
            (await serve("fetch_buy_orders", first, offsets[0]), "fetch_buy_orders"),
        ]
        edges = (
            await serve("create_buy_order", first, offsets[0]),
            await serve("create_buy_order", second, offsets[1]),
        )
        for running, service in [*every, (edges[0], "create_buy_order"), (edges[1], "create_buy_order")]:
            await ready(running, service)
        yield Doubled(dsn, edges, every[-1][0], store)


async def test_200_copies_of_one_request_through_two_edges_are_one_order(desk: Doubled) -> None:
    before = await desk.read("fetch_buy_orders", "/exposure")
    async with desk.clients() as edges:

        async def send(number: int) -> httpx2.Response:
            body = {"currency": "EUR", "amount": "69.00", "client_order_id": "one-and-only"}
            return await edges[number % 2].post("/place_order/", json=body)

        answers = await asyncio.gather(*map(send, range(COPIES)))
    assert [answer.status_code for answer in answers] == [201] * COPIES
    assert len({answer.content for answer in answers}) == 1
    assert sum("idempotent-replayed" not in answer.headers for answer in answers) == 1
    after = await desk.read("fetch_buy_orders", "/exposure")
    assert after["orders"] == before["orders"] + 1


async def test_64_clients_race_for_the_last_half_bitcoin_and_five_tenths_are_sold(desk: Doubled) -> None:
    connection = await asyncpg.connect(desk.dsn)
    try:
        used = CAP_SATOSHI - 5 * TENTH_SATOSHI
        stored = await connection.fetchval("SELECT sum(satoshi) FROM orders")
        # As if the desk had sold all but half a bitcoin before; what it sold in this test's time is counted below.
        await connection.execute("UPDATE exposure SET placed_satoshi = $1", used)
        record = await desk.read("api_cache_proxy", "/record")
        # The price may move a little while they race: just under a tenth each, so that five fit and six do not.
        cents = int(float(record["rates"]["EUR"]) * 10) - 1
        async with desk.clients() as edges:

            async def send(number: int) -> httpx2.Response:
                body = {"currency": "EUR", "amount": f"{cents // 100}.{cents % 100:02}"}
                return await edges[number % 2].post("/place_order/", json=body)

            answers = await asyncio.gather(*map(send, range(CLIENTS)))
        placed = [answer.json()["order"] for answer in answers if answer.status_code == 201]
        refused = [answer.json()["code"] for answer in answers if answer.status_code != 201]
        assert len(placed) == 5
        assert refused == ["exposure_cap_exceeded"] * (CLIENTS - 5)
        sold = sum(int(order["bitcoin_amount"].replace(".", "")) for order in placed)
        exposure = await desk.read("fetch_buy_orders", "/exposure")
        assert exposure["used"] == format_btc(used + sold)
        assert await connection.fetchval("SELECT sum(satoshi) FROM orders") == stored + sold
        numbers = [row["number"] for row in await connection.fetch("SELECT number FROM orders ORDER BY number")]
        assert numbers == list(range(1, exposure["orders"] + 1))
    finally:
        await connection.close()
