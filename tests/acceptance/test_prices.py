"""A price that can be proved, or no order: real desks over stand-ins for the exchanges, and over a sandbox that fails.

Nothing here needs the internet. The desks' times are short, so that a price grows old while a test looks on.
"""

import re
import shlex
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from decimal import Decimal
from pathlib import Path

import httpx2
import pytest

from buydesk.settings.types import SandboxFault
from tests.desks import buydesk, desk_up, free_offset
from tests.exchanges import exchanges
from tests.price_clients import CLOSES, LONG_AGO, QUICK, Client, until
from tests.serving import free_port


@pytest.fixture
def data_dir(open_directory: Path, request: pytest.FixtureRequest) -> Path:
    return open_directory / f"p{abs(hash(request.node.name)) % 10**6}"


@pytest.fixture
async def http() -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(timeout=20) as http:
        yield http


async def test_a_live_desk_sells_with_two_exchanges_refuses_with_one_and_recovers_by_itself(
    data_dir: Path, http: httpx2.AsyncClient
) -> None:
    async with exchanges() as stand_ins, desk_up(data_dir, "--feed", "live", env=stand_ins.env | QUICK) as desk:
        client = Client(desk, http)
        assert "SANDBOX" not in desk.printed
        assert "1 BTC = 41191.91 EUR, 35330.89 GBP, 48478.88 USD" in desk.printed
        assert await client.uses(set(stand_ins))
        first = await client.buy("first")
        order = first.json()["order"]
        assert (order["exchange_rate"], order["bitcoin_amount"], order["livemode"]) == ("41191.91", "0.00167509", True)

        # One after the other leaves; with two the desk goes on.
        left = set(stand_ins)
        for name in ("kraken", "bitstamp", "coinbase"):
            await stand_ins[name].stop()
            left.remove(name)
            await until(client.uses, left)
            assert (await client.buy(f"without-{name}")).status_code == 201
            await until(client.has_level, "sources", "warning")
            assert (await client.source(name))["failures"] > 0
            assert name in await client.reports("warning")
            metrics = (await client.get("api_updater", "/metrics")).text
            assert f'buydesk_source_up{{source="{name}"}} 0.0' in metrics
        assert await client.reports("critical") == '{"data":[]}'

        # With one it does not, as soon as the last price has ended.
        await stand_ins["gemini"].stop()
        await until(client.is_refused)
        await client.assert_refused("price_stale")
        sources = await client.part("sources")
        assert (sources["ok"], sources["level"]) == (False, "critical")
        assert "only 1 of at least 2 sources agree" in sources["problem"]
        assert "only 1 of at least 2 sources agree" in await client.reports("critical")
        again = await client.buy("first")
        assert (again.status_code, again.content) == (201, first.content)
        assert again.headers["idempotent-replayed"] == "true"

        # They come back, and so does the price; nobody did anything to the desk.
        for name in ("kraken", "bitstamp", "coinbase", "gemini"):
            await stand_ins[name].start()
        await until(client.sells)
        await until(client.uses, set(stand_ins))

        # Three misbehave, each in its own way; the price is that of the other two, and the record says why.
        for misbehaving in (
            {
                "kraken": ("garbage", b'{"error":["EService:Busy"]}'),
                "gemini": ("status", 451),
                "coinbase": ("status", 429),
            },
            {"kraken": ("crossed", True), "gemini": ("factor", Decimal("1.02")), "coinbase": ("frozen_at", LONG_AGO)},
        ):
            for name, (fault, value) in misbehaving.items():
                setattr(stand_ins[name], fault, value)
            await until(client.uses, set(stand_ins) - misbehaving.keys())
            assert (await client.buy()).status_code == 201
            rejected = {each["source"]: each["reason"] for each in (await client.record())["sources"]["rejected"]}
            assert rejected.keys() == misbehaving.keys(), rejected
            stand_ins.heal()
            await until(client.uses, set(stand_ins))
            assert (await client.source("kraken"))["last_error"]
        assert (await client.part("sources"))["level"] == "ok"
        assert await client.prove_all() >= 5
        assert await desk.stop() == 0
    assert "Traceback" not in desk.printed


@pytest.fixture(params=["refuses", "is silent"])
def nowhere(request: pytest.FixtureRequest) -> Iterator[str]:
    """An address where nobody answers: it refuses connections, or takes them and says nothing, as some firewalls do."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1] if request.param == "is silent" else free_port()
        yield f"http://127.0.0.1:{port}"


async def test_a_live_desk_that_reaches_no_exchange_says_so_in_time_and_how_to_run_the_sandbox(
    data_dir: Path, http: httpx2.AsyncClient, nowhere: str
) -> None:
    names = ("bitfinex", "bitstamp", "coinbase", "gemini", "kraken")
    env = {f"BUYDESK_{name.upper()}_URL": nowhere for name in names}
    env |= {"PRICE_FEED": "live", "BUYDESK_ACCESS": "open"}
    offset = free_offset()
    arguments = ("up", "--data-dir", str(data_dir), "--port-offset", str(offset))
    async with buydesk(*arguments, offset=offset, env=env) as desk:
        await desk.until_printed("Starting the services")
        await desk.until_printed("Try it", 10)
        assert "No orders are taken" in desk.printed
        for name in names:
            assert re.search(rf"^  {name} +.*no answer", desk.printed, re.MULTILINE), desk.printed
        await Client(desk, http).assert_refused("price_unavailable")
        [command] = [line.strip() for line in desk.lines if "--feed sandbox" in line]
        assert await desk.stop() == 0
    # The command is taken as it is printed, in the same environment.
    program = f"{shlex.join([sys.executable, '-m', 'buydesk'])} "
    assert command.startswith(program)
    async with buydesk(*shlex.split(command.removeprefix(program)), offset=offset, env=env) as desk:
        await desk.until_printed("Try it")
        assert (await Client(desk, http).buy()).status_code == 201
        assert await desk.stop() == 0


@pytest.mark.parametrize(
    ("fault", "detail"),
    [
        ("source-down", "gives no answer"),
        ("outlier", "is more than 1 % from those that agree"),
        ("garbage", "is no price of a bitcoin"),
    ],
)
async def test_one_source_that_misbehaves_is_set_aside_and_orders_go_on(
    data_dir: Path, http: httpx2.AsyncClient, fault: SandboxFault, detail: str
) -> None:
    async with desk_up(data_dir, "--sandbox-fault", fault, "--replay-speed", "0", env=QUICK) as desk:
        client = Client(desk, http)
        assert f"with the fault {fault}" in desk.printed
        assert re.search(rf"^  sandbox-1 +.*{detail}", desk.printed, re.MULTILINE), desk.printed
        for currency, close in CLOSES.items():
            order = (await client.buy(currency=currency.lower())).json()["order"]
            # The median of four is between the two in the middle: the close, and 0.03 % above it.
            assert Decimal(close) <= Decimal(order["exchange_rate"]) <= Decimal(close) * Decimal("1.0003")
        record = await client.record()
        assert await client.uses({"sandbox-2", "sandbox-3", "sandbox-4", "sandbox-5"})
        assert {each["source"] for each in record["sources"]["rejected"]} == {"sandbox-1"}
        assert any(detail in each["reason"] for each in record["sources"]["rejected"])
        sources = await client.part("sources")
        assert (sources["ok"], sources["level"], sources["problem"]) == (True, "warning", "")
        assert detail in (await client.source("sandbox-1"))["detail"]
        assert "sandbox-1" in await client.reports("warning")
        assert await client.prove_all() == 3


async def test_sources_that_disagree_are_no_price_and_repeats_are_still_answered(
    data_dir: Path, http: httpx2.AsyncClient
) -> None:
    env = QUICK | {"BUYDESK_PRICE_TTL_SECONDS": "60"}  # as long as the desk takes to start again, at least
    async with desk_up(data_dir, env=env) as desk:
        first = await Client(desk, http).buy("key")
        assert first.status_code == 201
    async with desk_up(data_dir, "--sandbox-fault", "disagree", env=env) as desk:
        client = Client(desk, http)
        assert "No orders are taken: there is no price (" in desk.printed
        await client.assert_refused("price_unsettled")  # they contradict the price of before the start
        again = await client.buy("key")
        assert (again.status_code, again.content) == (201, first.content)
        sources = await client.part("sources")
        assert (sources["ok"], sources["level"]) == (False, "critical")
        assert {"sandbox-1", "sandbox-5"} <= {each["source"] for each in sources["sources"] if each["detail"]}
        assert "only 1 of at least 2 sources agree" in await client.reports("critical")
        assert await client.prove_all() == 1


async def test_clocks_that_stand_still_end_in_a_price_that_is_too_old(data_dir: Path, http: httpx2.AsyncClient) -> None:
    # It has to be up, and an order be placed, before the first quotes are too old.
    slower = QUICK | {"BUYDESK_QUOTE_AGE_SECONDS_MAX": "4", "BUYDESK_PRICE_TTL_SECONDS": "8"}
    async with desk_up(data_dir, "--sandbox-fault", "stale", env=slower) as desk:
        client = Client(desk, http)
        first = await client.buy("key")
        assert first.status_code == 201, first.text
        await until(client.is_refused)
        await client.assert_refused("price_stale")
        assert (await client.buy()).json()["as_of"] == first.json()["order"]["price_as_of"]
        assert (await client.buy("key")).content == first.content
        sources = await client.part("sources")
        assert {each["detail"] for each in sources["sources"]} == {"EUR, GBP, USD: is older than 4 s"}
        assert "sources agree" in await client.reports("critical")
        assert await client.prove_all() >= 1
