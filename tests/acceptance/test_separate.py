"""`buydesk up --separate`: seven real processes. Any of them may be killed at any time; nothing accepted is lost."""

import asyncio
import itertools
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import psutil
import pytest

from buydesk.topology import PORTS
from tests.desks import Running, desk_up

BACK_SECONDS_MAX = 40
# The desk heals faster than in real life, so that the test need not wait: nothing else is changed.
ENV = {"BUYDESK_FEED_INTERVAL_SECONDS": "2"}


@pytest.fixture(scope="module")
async def desk(open_directory: Path) -> AsyncIterator[Running]:
    async with desk_up(open_directory / "separate", "--separate", env=ENV) as running:
        yield running


def process_of(desk: Running, service: str) -> psutil.Process:
    """The service's process; raises ValueError while there is none."""
    [found] = [child for child in psutil.Process(desk.process.pid).children() if runs(child, service)]
    return found


def runs(process: psutil.Process, service: str) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and process.cmdline()[-2:] == ["serve", service]
    except psutil.NoSuchProcess:  # it ended while it was looked at
        return False


async def until(desk: Running, service: str, path: str, status: int = 200) -> httpx2.Response:
    """The answer, once it has this status."""
    async with desk.client(service) as client, asyncio.timeout(BACK_SECONDS_MAX):
        while True:
            try:
                answer = await client.get(path)
                if answer.status_code == status:
                    return answer
            except httpx2.TransportError:
                pass
            await asyncio.sleep(0.05)


async def buy(desk: Running, key: str) -> httpx2.Response | None:
    """One order, as a careful client places it; None when the edge itself is away."""
    async with desk.client("create_buy_order") as client:
        try:
            return await client.post(f"/place_order/?currency=eur&amount=1&client_order_id={key}")
        except httpx2.TransportError:
            return None


async def test_every_service_is_a_process_of_its_own(desk: Running) -> None:
    pids = {process_of(desk, service).pid for service in PORTS}
    assert len(pids) == len(PORTS)
    # Each leads its own process group: the terminal's Ctrl-C reaches only the supervisor.
    assert {os.getpgid(pid) for pid in pids} == pids
    for service in PORTS:
        environ = process_of(desk, service).environ()
        assert ("DATABASE_URL" in environ) == (service == "db_proxy")
        assert ("BUYDESK_PRICE_SIGNING_KEY" in environ) == (service == "api_updater")
        assert ("BUYDESK_QUOTE_SIGNING_KEY" in environ) == (service == "create_buy_order")
        assert environ["BUYDESK_REPORTING_TOKENS"] not in " ".join(process_of(desk, service).cmdline())
    assert (await buy(desk, "first")).status_code == 201  # type: ignore[union-attr]


async def test_a_quote_is_given_and_executed_once_across_processes(desk: Running) -> None:
    async with desk.client("create_buy_order") as client:
        asked = await client.post("/quotes/", json={"currency": "EUR", "bitcoin_amount": "0.001"})
        assert asked.status_code == 201, asked.text
        quote = asked.json()
        answers = await asyncio.gather(
            *(client.post("/place_order/", json={"quote": quote["quote"]}) for _ in range(10))
        )
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.content for answer in answers}) == 1
    order = answers[0].json()["order"]
    assert (order["quote_id"], order["bitcoin_amount"]) == (quote["id"], quote["bitcoin_amount"])
    async with desk.client("fetch_buy_orders") as client:
        found = (await client.get(f"/prices/{quote['price_id']}")).json()
    assert found["rates"]["EUR"] == quote["market_rate"]


# What the others honestly say while the service is dead: (service to ask, path, status, code).
SAID = {
    "create_buy_order": None,
    "fetch_buy_orders": None,
    "process_buy_orders": None,
    "db_proxy": ("fetch_buy_orders", "/get_orders/", 503, "ledger_unavailable"),
    "api_cache_proxy": ("create_buy_order", "/livez", 200, None),
    "api_updater": ("api_cache_proxy", "/record", 200, None),
    "health_check": ("create_buy_order", "/readyz", 200, None),
}


@pytest.mark.parametrize("service", SAID)
async def test_killed_it_comes_back_and_no_accepted_order_is_lost(desk: Running, service: str) -> None:
    accepted: list[str] = []
    refused: set[str] = set()
    stop = asyncio.Event()

    async def buyer(name: int) -> None:
        for number in itertools.count():
            if stop.is_set():
                return
            key = f"{service}-{name}-{number}"
            answer = await buy(desk, key)
            if answer is None:
                refused.add("no connection")
            elif answer.status_code == 201:
                accepted.append(key)
            else:
                refused.add(answer.json()["code"])
            await asyncio.sleep(0.01)

    buying = [asyncio.create_task(buyer(name)) for name in range(4)]
    await asyncio.sleep(0.3)
    victim = process_of(desk, service)
    victim.send_signal(signal.SIGKILL)
    if said := SAID[service]:
        answer = await until(desk, *said[:3])
        assert said[3] is None or answer.json()["code"] == said[3]
    async with asyncio.timeout(BACK_SECONDS_MAX):
        while True:
            try:
                if process_of(desk, service).pid != victim.pid:
                    break
            except ValueError:
                pass
            await asyncio.sleep(0.05)
    await until(desk, service, "/readyz")
    await until(desk, "create_buy_order", "/readyz")
    accepted_then = len(accepted)
    async with asyncio.timeout(BACK_SECONDS_MAX):
        while len(accepted) < accepted_then + 8:
            await asyncio.sleep(0.05)
    stop.set()
    await asyncio.gather(*buying)
    assert refused <= {"no connection", "ledger_unavailable", "outcome_unknown", "price_unavailable", "price_stale"}
    if service in ("health_check", "fetch_buy_orders", "api_updater"):
        assert not refused
    async with desk.client("fetch_buy_orders") as client:
        for key in accepted:
            found = await client.get("/get_orders/", params={"client_order_id": key})
            assert found.json()["client_order_id"] == key
    assert f"{service} ended (signal SIGKILL)" in desk.printed


@pytest.mark.parametrize("service", ["create_buy_order", "redis"])
async def test_what_hangs_is_replaced(desk: Running, service: str) -> None:
    if service == "redis":
        [victim] = [each for each in psutil.Process(desk.process.pid).children() if "redis" in each.name()]
    else:
        victim = process_of(desk, service)
    victim.send_signal(signal.SIGSTOP)
    async with asyncio.timeout(10):
        while victim.is_running() and victim.status() != psutil.STATUS_ZOMBIE:
            await asyncio.sleep(0.05)
        await until(desk, "create_buy_order", "/readyz")
    assert f"{service} hangs, killing it" in desk.printed
    answer = await buy(desk, f"after {service} hung".replace(" ", "-"))
    assert answer is not None
    assert answer.status_code == 201


async def test_the_database_killed_comes_back_and_no_accepted_order_is_lost(desk: Running) -> None:
    assert (await buy(desk, "before")).status_code == 201  # type: ignore[union-attr]
    [postmaster] = [
        child
        for child in psutil.Process(desk.process.pid).children()
        if child.name() == "postgres" and child.status() != psutil.STATUS_ZOMBIE
    ]
    postmaster.send_signal(signal.SIGKILL)
    async with asyncio.timeout(BACK_SECONDS_MAX):
        while True:
            answer = await buy(desk, "after")
            assert answer is not None
            if answer.status_code == 201:
                break
            assert answer.json()["code"] in ("ledger_unavailable", "outcome_unknown")
            await asyncio.sleep(0.05)
    async with desk.client("fetch_buy_orders") as client:
        for key in ("before", "after"):
            assert (await client.get("/get_orders/", params={"client_order_id": key})).status_code == 200


async def test_status_tells_the_dead_from_the_living(desk: Running) -> None:
    async with asyncio.timeout(BACK_SECONDS_MAX):
        while True:  # the test before killed the database, and a failure counts for a second
            status = (await until(desk, "health_check", "/status")).json()
            assert set(PORTS) <= set(status["services"])
            if status["database"]["ok"]:
                break
            await asyncio.sleep(0.05)


async def test_killed_itself_the_supervisor_s_children_end_also_what_is_stopped(open_directory: Path) -> None:
    async with desk_up(open_directory / "orphans", "--separate") as desk:
        children = [process_of(desk, service) for service in PORTS]
        children[-1].suspend()
        desk.process.kill()
        gone, alive = await asyncio.to_thread(psutil.wait_procs, children, 20)
        assert not alive
        assert len(gone) == len(PORTS)
    # The next start takes over what is left: PostgreSQL and Redis.
    async with desk_up(open_directory / "orphans", "--separate") as desk:
        assert (await buy(desk, "k")).status_code == 201  # type: ignore[union-attr]
        assert await desk.stop() == 0
    assert "Traceback" not in desk.printed
