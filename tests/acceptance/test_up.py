"""`buydesk up` as its users run it: one process, real PostgreSQL, real signals."""

import asyncio
import signal
import socket
from pathlib import Path

import pytest

from buydesk.topology import PORTS
from tests.builders import shared_env
from tests.desks import buydesk, desk_up, free_offset


@pytest.fixture
def data_dir(open_directory: Path, request: pytest.FixtureRequest) -> Path:
    return open_directory / f"d{abs(hash(request.node.name)) % 10**6}"


async def test_a_desk_from_nothing_takes_orders_and_has_them_after_a_restart(data_dir: Path) -> None:
    async with desk_up(data_dir) as desk:
        for service in PORTS:
            assert desk.url(service) in desk.printed
        assert "SANDBOX" in desk.printed
        assert "100.00000000 of 100.00000000 BTC" in desk.printed
        async with desk.client("create_buy_order") as client:
            first = await client.post("/place_order/?currency=eur&amount=69", headers={"Idempotency-Key": "k"})
        assert first.status_code == 201
        assert await desk.stop(signal.SIGINT) == 0
    async with desk_up(data_dir) as desk:
        assert "1 orders are stored" in desk.printed
        async with desk.client("create_buy_order") as client:
            again = await client.post("/place_order/?currency=eur&amount=69", headers={"Idempotency-Key": "k"})
            assert again.content == first.content
        async with desk.client("health_check") as client:
            status = (await client.get("/status")).json()
            assert {status["services"][name]["state"] for name in PORTS} == {"alive"}
            assert status["database"]["ok"]
            assert status["price"]["ok"]
        assert await desk.stop() == 0
        assert desk.lines[-1] == "Stopped."
    assert "Traceback" not in desk.printed


async def test_every_service_serves_what_every_service_serves(data_dir: Path) -> None:
    async with desk_up(data_dir) as desk:
        for service in PORTS:
            async with desk.client(service) as client:
                about = (await client.get("/")).json()
                assert about["service"] == service
                assert (await client.get("/livez")).json() == {"status": "alive"}
                assert (await client.get("/readyz/")).json() == {"status": "ready"}
                assert "swagger-ui-bundle.js" in (await client.get("/docs")).text
                assert (await client.get("/docs-files/swagger-ui-bundle.js")).status_code == 200
                assert (await client.get("/openapi.json")).json()["openapi"].startswith("3.1")
                assert "buydesk_http_requests_total" in (await client.get("/metrics")).text
                assert (await client.get("/no-such-path")).json()["code"] == "not_found"


async def test_stopping_finishes_what_was_accepted(data_dir: Path) -> None:
    async with desk_up(data_dir) as desk:
        async with desk.client("create_buy_order") as client:

            async def buy(number: int) -> int:
                answer = await client.post(f"/place_order/?currency=eur&amount=1&client_order_id=k{number}")
                return answer.status_code

            buying = [asyncio.create_task(buy(number)) for number in range(60)]
            await asyncio.wait(buying, return_when=asyncio.FIRST_COMPLETED)
            assert await desk.stop() == 0
            done = await asyncio.gather(*buying, return_exceptions=True)
        placed = [number for number, status in enumerate(done) if status == 201]
    async with desk_up(data_dir) as desk, desk.client("fetch_buy_orders") as client:
        orders = (await client.get("/get_orders/?page_size=1000")).json()["data"]
        stored = {order["client_order_id"] for order in orders}
        # Every 201 is stored; what was cut off may be.
        assert {f"k{number}" for number in placed} <= stored
        assert placed


async def test_killed_without_warning_the_next_start_has_every_order(data_dir: Path) -> None:
    async with desk_up(data_dir) as desk:
        async with desk.client("create_buy_order") as client:
            assert (await client.post("/place_order/?currency=eur&amount=69")).status_code == 201
        assert await desk.stop(signal.SIGKILL) == -signal.SIGKILL
    async with desk_up(data_dir) as desk:
        assert "1 orders are stored" in desk.printed


async def test_two_desks_run_side_by_side_and_one_directory_takes_one(data_dir: Path) -> None:
    other = data_dir.with_name(data_dir.name + "b")
    async with desk_up(data_dir) as desk, desk_up(other) as second:
        assert desk.offset != second.offset
        offset = str(free_offset())
        async with buydesk("up", "--data-dir", str(data_dir), "--port-offset", offset) as third:
            assert await third.process.wait() == 2
        assert "another desk is running" in third.printed
        assert len(third.lines) == 1


async def refusal(*arguments: str, **env: str) -> str:
    """The one line with which a command refuses to start."""
    async with buydesk(*arguments, env=env) as refused:
        async with asyncio.timeout(30):
            assert await refused.process.wait() == 2, refused.printed
    last = refused.lines[-1]
    assert last.startswith("buydesk: ")
    assert "Traceback" not in refused.printed
    return last


async def test_a_busy_port_is_one_line_that_says_how_to_mend_it(data_dir: Path) -> None:
    offset = free_offset()
    with socket.create_server(("127.0.0.1", PORTS["db_proxy"] + offset)):
        line = await refusal("up", "--data-dir", str(data_dir), "--port-offset", str(offset))
    assert f"port {PORTS['db_proxy'] + offset}" in line
    assert "--port-offset" in line


async def test_a_directory_that_cannot_be_made_is_one_line(open_directory: Path) -> None:
    in_the_way = open_directory / "file"
    in_the_way.touch()
    offset = str(free_offset())
    assert "--data-dir" in await refusal("up", "--data-dir", str(in_the_way / "data"), "--port-offset", offset)


async def test_the_other_mode_s_database_is_refused(data_dir: Path) -> None:
    async with desk_up(data_dir):
        pass
    arguments = ("up", "--data-dir", str(data_dir), "--port-offset", str(free_offset()), "--feed", "live")
    line = await refusal(*arguments)
    assert "holds sandbox orders" in line


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"BUYDESK_NO_SUCH": "1"}, "BUYDESK_NO_SUCH"),
        ({"BUYDESK_FEED_INTERVAL_SECONDS": "soon"}, "BUYDESK_FEED_INTERVAL_SECONDS"),
        ({"PRICE_FEED": "guess"}, "PRICE_FEED"),
        ({"DATABASE_URL": "postgresql://u:secret@127.0.0.1:1/x"}, "check DATABASE_URL"),
        ({"DATABASE_URL": "u:secret@127.0.0.1:1/x"}, "DATABASE_URL: must start with postgresql://"),
        ({"BUYDESK_PLACING_TOKENS": "secret\n"}, "BUYDESK_PLACING_TOKENS"),
        ({"BUYDESK_PRICE_SIGNING_KEY": "secret"}, "BUYDESK_PRICE_SIGNING_KEY: must be 32 bytes as base64url"),
        (
            {"REDIS_URL": "redis://:my@pass:secret/x@127.0.0.1:1/0"},
            "must be an address such as redis://HOST:PORT/NAME, with USER:PASSWORD@ before",
        ),
        ({"BUYDESK_DB_PROXY_URL": "http://u:secret@127.0.0.1:1"}, "BUYDESK_DB_PROXY_URL: must be an address without"),
        (
            {"BUYDESK_SANDBOX_FAULT": "stale", "PRICE_FEED": "live"},
            "BUYDESK_SANDBOX_FAULT (stale) needs PRICE_FEED=sandbox",
        ),
        ({"BUYDESK_DRAIN_SECONDS_MAX": "5"}, "BUYDESK_DRAIN_SECONDS_MAX (5) must be more"),
    ],
)
async def test_a_bad_setting_is_named_and_no_secret_shown(data_dir: Path, env: dict[str, str], said: str) -> None:
    line = await refusal("up", "--data-dir", str(data_dir), "--port-offset", str(free_offset()), **env)
    assert said in line
    assert "secret" not in line


async def test_a_desk_whose_terminal_closes_stops_in_order(data_dir: Path) -> None:
    async with desk_up(data_dir) as desk:
        assert await desk.stop(signal.SIGHUP) == 0
        assert desk.lines[-1] == "Stopped."


async def test_serve_needs_its_secrets_and_db_proxy_its_database() -> None:
    assert "BUYDESK_PLACING_TOKENS" in await refusal("serve", "db_proxy")
    assert "DATABASE_URL" in await refusal("serve", "db_proxy", **shared_env())
    assert "DATABASE_URL" in await refusal("migrate")


async def test_stopped_while_it_starts_it_leaves_nothing_running(data_dir: Path) -> None:
    arguments = ("up", "--data-dir", str(data_dir), "--port-offset", str(free_offset()))
    async with buydesk(*arguments) as desk:
        await desk.until_printed("PostgreSQL 18")
        await asyncio.sleep(0.3)
        assert await desk.stop() == 0
    assert "Traceback" not in desk.printed
    assert not (data_dir / "postgres" / "postmaster.pid").exists()


@pytest.mark.parametrize("how", [[], ["--separate"]], ids=["one process", "seven processes"])
async def test_price_is_confirmed_on_the_machine_of_the_desk_without_a_token_by_hand(
    data_dir: Path, how: list[str]
) -> None:
    async with desk_up(data_dir, *how) as desk:
        which = ("--data-dir", str(data_dir), "--port-offset", str(desk.offset))
        rates = ("--from", "15000", "--to", "16000", "--why", "seen elsewhere")
        async with buydesk("price", "confirm", "EUR", *rates, *which) as confirming:
            assert await confirming.process.wait() == 0
        assert confirming.printed.startswith("Confirmed: EUR 15000.00 to 16000.00 until ")
        async with buydesk("price", "show", *which) as showing:
            assert await showing.process.wait() == 0
        assert showing.lines[-1] == confirming.printed
        async with buydesk("price", "show", "--data-dir", str(data_dir.parent / "none")) as elsewhere:
            assert await elsewhere.process.wait() == 2
        assert elsewhere.printed.startswith("buydesk: no desk has been started in ")
