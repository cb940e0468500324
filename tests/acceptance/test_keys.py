"""A desk that takes keys: made by the commands while it is down and while it runs, and what callers with them get."""

import asyncio
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest

from tests.desks import buydesk, command, free_offset
from tests.problems import assert_problem

KEYS = {"BUYDESK_ACCESS": "keys"}
SCOPES = "orders:create,orders:read,events:read"


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture
async def http() -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(timeout=20) as client:
        yield client


async def test_a_desk_with_keys_from_its_first_start_to_a_key_that_is_revoked(
    open_directory: Path, http: httpx2.AsyncClient
) -> None:
    data_dir, offset = open_directory / "keyed", free_offset()
    up = ("up", "--data-dir", str(data_dir), "--port-offset", str(offset))
    async with buydesk(*up, offset=offset, env=KEYS) as desk:
        await desk.until_printed("there is no key. Make one (buydesk keys create --help)")
        assert await desk.process.wait() == 2
    # The desk is down: its database is started for the command.
    former = await command("keys", "create", "anonymous", "--scopes", SCOPES, data_dir=data_dir)
    canaries = [former]
    async with buydesk(*up, "--separate", offset=offset, env=KEYS) as desk:
        await desk.until_printed("Try it", 60)
        assert "keys: callers show one" in desk.printed
        assert re.search(r"cap +100\.00000000 of 100\.00000000 BTC can still be sold", desk.printed)
        place = f"{desk.url('create_buy_order')}/place_order/?currency=eur&amount=69"
        orders, exposure = f"{desk.url('fetch_buy_orders')}/get_orders/", f"{desk.url('fetch_buy_orders')}/exposure"
        assert_problem(await http.post(place), 401, "unauthorized")
        # It runs: the command finds its database.
        await command("clients", "create", "shop", "--cap", "0.01", "--why", "a shop", data_dir=data_dir)
        shop = await command("keys", "create", "shop", "--scopes", SCOPES, data_dir=data_dir)
        canaries.append(shop)
        for key, number in ((former, 1), (shop, 1), (former, 2), (shop, 2)):
            placed = await http.post(place, headers=bearer(key))
            assert placed.status_code == 201, placed.text
            assert placed.json()["order"]["number"] == number
            assert (await http.get(orders, headers=bearer(key))).json()["page"]["total"] == number
        capped = await http.post(place, headers=bearer(shop))
        assert assert_problem(capped, 409, "client_cap_exceeded")["cap"] == "0.01000000"
        assert (await http.get(exposure, headers=bearer(shop))).json()["cap"] == "0.01000000"
        assert (await http.get(exposure, headers=bearer(former))).json()["cap"] is None
        events = (await http.get(f"{desk.url('process_buy_orders')}/events", headers=bearer(shop))).json()["data"]
        assert [event["sequence"] for event in events] == [1, 2]
        assert all("client" not in event["order"] for event in events)
        key_id = shop[8:18]
        await command("keys", "revoke", key_id, "--why", "lost", data_dir=data_dir)
        revoked_at = time.monotonic()
        while (await http.get(orders, headers=bearer(shop))).status_code == 200:
            assert time.monotonic() < revoked_at + 10
            await asyncio.sleep(0.1)
        assert_problem(await http.post(place, headers=bearer(shop)), 401, "unauthorized")
        assert (await http.post(place, headers=bearer(former))).status_code == 201
        assert key_id in await command("audit", data_dir=data_dir)
        metrics = (await http.get(f"{desk.url('create_buy_order')}/metrics")).text
        reports = (await http.get(f"{desk.url('health_check')}/reports?limit=1000")).text
        assert await desk.stop() == 0
    written = [path.read_bytes() for path in data_dir.rglob("*.log")]
    for canary in canaries:
        for told in (desk.printed.encode(), metrics.encode(), reports.encode(), *written):
            assert canary[18:-6].encode() not in told
