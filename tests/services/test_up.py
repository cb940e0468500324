"""`up`, `serve` and `migrate` in this process: what they start, what they say, and how they end."""

import asyncio
import contextlib
import os
import re
import runpy
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import httpx2
import psutil
import pytest
from click.testing import CliRunner
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from redis.asyncio import Redis

from buydesk import cli
from buydesk.backends.endpoints import EndpointSender
from buydesk.backends.fallback import FallbackPriceStore, FallbackRateStore, FallbackReportStore
from buydesk.backends.postgres.accounts import Account
from buydesk.backends.postgres.anchors import PostgresAnchors
from buydesk.backends.postgres.clients import PostgresKeys
from buydesk.backends.postgres.ledger import PostgresLedger
from buydesk.backends.postgres.life import PostgresLife
from buydesk.backends.postgres.refusals import PostgresRefusals
from buydesk.backends.postgres.registry import PostgresRegistry
from buydesk.backends.postgres.webhooks import PostgresWebhooks
from buydesk.backends.redis.faults import RedisCheck
from buydesk.backends.remote import RemoteAnchorStore, RemoteLedger, RemoteLife
from buydesk.backends.remote.clients import RemoteKeys
from buydesk.backends.remote.rates import RemoteRateStore
from buydesk.backends.remote.registry import RemoteRefusals, RemoteRegistry
from buydesk.backends.remote.webhooks import RemoteWebhooks
from buydesk.backends.sources import EXCHANGES
from buydesk.backends.sources.exchange import ExchangeSource
from buydesk.backends.sources.sandbox import SandboxSource
from buydesk.clients.rates import RateLimiter
from buydesk.embedded.data_dir import secret_file
from buydesk.errors import CannotStart
from buydesk.http import listeners
from buydesk.http.app import Service
from buydesk.http.listeners import bind, close
from buydesk.observability import logs
from buydesk.prices.documents import document_of
from buydesk.prices.model import FeedStatus
from buydesk.runtime import serve as serving_module
from buydesk.runtime import up as up_module
from buydesk.runtime.signals import stop_signals
from buydesk.runtime.startup_report import (
    Dependencies,
    new_session,
    sandbox_command,
    startup_report,
    wait_until_ready,
    wait_until_selling,
)
from buydesk.runtime.up import SHARED, environment, kept_secret, up
from buydesk.runtime.wiring import wire
from buydesk.settings.model import PORT_OFFSET_MAX, Settings, variable
from buydesk.settings.reading import read_settings
from buydesk.settings.secrets import KEY_PAIRS, OWNERS
from buydesk.signing_keys import public_key
from buydesk.times import format_time, utc_now
from buydesk.topology import PORTS
from tests.builders import TOKEN, settings, shared_env
from tests.databases import Databases
from tests.desks import free_offset
from tests.operators import key_for
from tests.serving import free_port, served


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The developer's own settings must not reach these desks."""
    for name in [name for name in os.environ if name.startswith("BUYDESK_")] + ["DATABASE_URL", "REDIS_URL"]:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def data_dir(open_directory: Path, request: pytest.FixtureRequest) -> Path:
    return open_directory / f"u{abs(hash(request.node.name)) % 10**6}"


@contextlib.asynccontextmanager
async def running_up(given: Settings, *, separate: bool = False) -> AsyncIterator[list[str]]:
    """`up` in this process, and what it says; ended as by a terminal."""
    said: list[str] = []
    desk = asyncio.create_task(up(given, separate=separate, say=said.append))
    try:
        async with asyncio.timeout(60):
            while not any("Try it" in each for each in said):
                if desk.done():
                    break
                await asyncio.sleep(0.02)
        if desk.done():
            await desk
        yield said
    finally:
        if not desk.done():
            os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait([desk])
    assert said[-1] == "Stopped."


async def buy(given: Settings) -> httpx2.Response:
    async with httpx2.AsyncClient() as client:
        return await client.post(given.own_url("create_buy_order") + "/place_order/?currency=eur&amount=69")


async def test_a_desk_in_one_process_and_its_next_start(data_dir: Path) -> None:
    given = Settings(data_dir=data_dir, port_offset=free_offset())
    async with running_up(given) as said:
        assert (await buy(given)).status_code == 201
    assert said[:2] == ["Making a PostgreSQL 18 database …", "Starting the services …"]
    assert re.match(r"buydesk \S+ is up after \d+\.\d s\.\n", said[2])
    for name in SHARED:
        assert secret_file(data_dir, name).stat().st_mode & 0o777 == 0o600
    async with running_up(given) as said:
        assert "1 orders are stored" in said[2]
    # An up-to-date database is not migrated again.
    assert said[:2] == ["Starting PostgreSQL 18 …", "Starting the services …"]


async def test_a_desk_of_six_processes_with_a_redis(data_dir: Path) -> None:
    # A public address, and others that a desk of its own has no use for: nobody answers there.
    elsewhere = {"fetch_buy_orders_url": "http://127.0.0.1:9", "db_proxy_url": "http://127.0.0.1:9"}
    given = settings(data_dir=data_dir, port_offset=free_offset(), markup_bp="EUR:50,GBP:75", **elsewhere)
    async with running_up(given, separate=True) as said:
        placed = await buy(given)
        assert (placed.status_code, placed.json()["order"]["markup_bp"]) == (201, 50)
        assert placed.headers["location"].startswith("http://127.0.0.1:9/get_orders/")
        assert not any(secret_file(data_dir, name).exists() for name in SHARED)  # they were given
        async with httpx2.AsyncClient() as client:
            status = (await client.get(given.own_url("health_check") + "/status")).json()
    assert "127.0.0.1:9/" not in "\n".join(said)
    assert "redis-server" in "\n".join(said)
    assert set(PORTS) <= set(status["services"])


def everything_in(data_dir: Path) -> dict[Path, os.stat_result]:
    """All but the copies of public programs."""
    return {path: path.stat() for path in data_dir.rglob("*") if "programs" not in path.parts}


async def test_other_accounts_can_open_nothing_of_a_desk_s_and_its_servers_have_no_rights(data_dir: Path) -> None:
    servers = {"postgres", "redis-server"}
    async with running_up(settings(data_dir=data_dir, port_offset=free_offset()), separate=True):
        running = {each.name(): each for each in psutil.Process().children() if each.name() in servers}
        assert running.keys() == servers
        uids = {each.uids().real for each in running.values()}
        groups = [(each.gids(), (Path("/proc") / str(each.pid) / "status").read_text()) for each in running.values()]
        found = everything_in(data_dir)
    [uid] = uids
    if os.geteuid() == 0:
        assert uid != 0
        for gids, status in groups:
            assert 0 not in (gids.real, gids.effective, gids.saved)
            assert re.search(r"^Groups:\s*$", status, re.MULTILINE)
    assert data_dir / "replay.json" in found
    assert data_dir / "socket" / "redis.sock" in found
    assert {path for path, status in found.items() if status.st_mode & 0o077} == set()
    assert {path for path, status in found.items() if status.st_uid not in (os.geteuid(), uid)} == set()


async def test_with_no_redis_to_be_found_the_owners_keep_it_in_memory(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(up_module, "find_redis", lambda _: None)
    given = settings(data_dir=data_dir, port_offset=free_offset())
    async with running_up(given, separate=True) as said:
        assert (await buy(given)).status_code == 201
    assert "kept in memory" in "\n".join(said)


async def test_servers_elsewhere_are_used_and_none_started(
    data_dir: Path, databases: Databases, redis_url: str
) -> None:
    given = settings(
        data_dir=data_dir, port_offset=free_offset(), database_url=await databases.new(), redis_url=redis_url
    )
    async with running_up(given) as said:
        assert (await buy(given)).status_code == 201
    table = next(each for each in said if "Try it" in each)
    assert "at DATABASE_URL" in table
    assert "at REDIS_URL" in table
    assert "PostgreSQL" not in "".join(said[:1])


@pytest.mark.parametrize("separate", [False, True], ids=["one", "seven"])
async def test_prices_far_from_the_last_ones_sell_nothing_after_a_restart_either(
    data_dir: Path, databases: Databases, redis_url: str, separate: bool
) -> None:
    dsn = await databases.new()
    given = settings(data_dir=data_dir, port_offset=free_offset(), database_url=dsn, redis_url=redis_url)
    async with running_up(given, separate=separate):
        assert (await buy(given)).status_code == 201
        ledger = await asyncpg.connect(dsn)
        kept = await ledger.fetch("SELECT currency FROM price_anchors ORDER BY currency")
    assert [each["currency"] for each in kept] == ["EUR", "GBP", "USD"]
    # The feed's first prices after the restart are a third of the last ones.
    await ledger.execute("UPDATE price_anchors SET rate_e8 = 3 * rate_e8, as_of = as_of - interval '1 hour'")
    await ledger.close()
    async with Redis.from_url(redis_url) as board:
        await board.flushdb()  # as one that lost what it had
    async with running_up(given, separate=separate) as said:
        refused = await buy(given)
    assert (refused.status_code, refused.json()["code"]) == (503, "price_unsettled")
    assert "is more than 20 % from the last price, " in refused.json()["currencies"]["EUR"]
    assert 1 <= int(refused.headers["retry-after"]) <= 16
    assert "until an operator confirms it" in "".join(said)


def at_closed_ports() -> dict[str, str]:
    """Exchanges that cannot be reached."""
    url = f"http://127.0.0.1:{free_port()}"
    return {f"{exchange.name}_url": url for exchange in EXCHANGES}


async def test_a_live_desk_that_reaches_no_exchange_says_which_and_how_to_run_the_sandbox(
    data_dir: Path, databases: Databases
) -> None:
    dsn = await databases.new(livemode=True)
    live = settings(
        data_dir=data_dir,
        port_offset=free_offset(),
        price_feed="live",
        access="open",
        database_url=dsn,
        **at_closed_ports(),
    )
    started = time.monotonic()
    async with running_up(live) as said:
        seconds = time.monotonic() - started
        assert (await buy(live)).json()["code"] == "price_unavailable"
    told = next(each for each in said if "Try it" in each)
    assert seconds < 10
    assert re.match(r"buydesk \S+ is up after \d+\.\d s, but not ready: price \(.+\)\n", told)
    assert "LIVE prices" in told
    assert "none: no orders are taken until there is one" in told
    assert "\nNo orders are taken: there is no price (" in told
    for exchange in EXCHANGES:
        assert re.search(rf"^  {exchange.name} +.*ClientConnectorError", told, re.MULTILINE), told
    assert f"\n  {sandbox_command(live, ['DATABASE_URL'])}\n" in told


@pytest.mark.parametrize("separate", [False, True], ids=["one process", "seven processes"])
async def test_a_sandbox_whose_sources_disagree_says_so_and_takes_no_orders(data_dir: Path, separate: bool) -> None:
    given = settings(data_dir=data_dir, port_offset=free_offset(), sandbox_fault="disagree")
    async with running_up(given, separate=separate) as said:
        assert (await buy(given)).json()["code"] == "price_unavailable"
    told = next(each for each in said if "Try it" in each)
    assert "SANDBOX: recorded prices, no real orders, with the fault disagree" in told
    assert "\nNo orders are taken: there is no price (" in told
    assert "--feed sandbox" not in told


async def test_a_desk_that_sells_with_a_source_down_says_which_one(data_dir: Path) -> None:
    given = settings(data_dir=data_dir, port_offset=free_offset(), sandbox_fault="source-down")
    async with running_up(given) as said:
        assert (await buy(given)).status_code == 201
    told = next(each for each in said if "Try it" in each)
    assert re.search(r"\nNot all price sources are well:\n  sandbox-1 +\S.*\n\nTry it", told), told


async def test_stopped_while_it_starts_it_ends_what_it_started(data_dir: Path) -> None:
    said: list[str] = []
    desk = asyncio.create_task(
        up(settings(data_dir=data_dir, port_offset=free_offset()), separate=False, say=said.append)
    )
    while not said:
        await asyncio.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)
    await desk
    assert said[-1] == "Stopped."
    assert not (data_dir / "postgres" / "postmaster.pid").exists()


async def test_the_other_mode_s_database_is_refused(data_dir: Path, databases: Databases) -> None:
    given = settings(
        data_dir=data_dir,
        port_offset=free_offset(),
        database_url=await databases.new(),
        price_feed="live",
        access="open",
    )
    with pytest.raises(CannotStart, match="this database holds sandbox orders"):
        async with running_up(given):
            pass


async def test_a_migration_that_takes_too_long_is_ended(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(up_module, "MIGRATE_SECONDS_MAX", 0.01)
    with pytest.raises(CannotStart, match="migrating took longer"):
        async with running_up(settings(data_dir=data_dir, port_offset=free_offset())):
            pass


async def test_a_migration_that_fails_in_a_way_of_its_own_shows_nothing(
    data_dir: Path, databases: Databases, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = settings(data_dir=data_dir, port_offset=free_offset(), database_url="postgresql://127.0.0.1:9/x")
    monkeypatch.setattr(up_module, "COMMAND", (sys.executable, "-c", "raise ValueError('hunter2')"))
    with pytest.raises(CannotStart, match=r"^migrating failed: `buydesk migrate` says more$"):
        async with running_up(given):
            pass


@pytest.mark.parametrize("name", SHARED)
def test_a_secret_is_made_once(name: str, tmp_path: Path) -> None:
    path = tmp_path / "secret"
    made = kept_secret(path, SHARED[name])
    assert len(made) >= 32
    path.chmod(0o644)
    assert kept_secret(path, SHARED[name]) == made
    assert getattr(settings(**{name: made}), name).get_secret_value() == made
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_secret_that_was_lost_in_a_crash_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.touch()
    path.with_suffix(".unfinished").write_text("half of o")
    assert kept_secret(path, lambda: "new") == "new"
    assert [each.read_text() for each in tmp_path.iterdir()] == ["new"]


def test_a_child_gets_every_setting_given_and_no_secret_that_is_not_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://inherited")
    given = settings(database_url="postgresql://x", redis_url="redis://x", port_offset=7, data_dir=None)
    edge = environment(given, "create_buy_order")
    assert (edge["BUYDESK_PORT_OFFSET"], edge["BUYDESK_PLACING_TOKENS"]) == ("7", TOKEN)
    children = {service: environment(given, service) for service in PORTS}
    known = {service: {field for field in OWNERS if variable(field) in env} for service, env in children.items()}
    assert known == {
        "create_buy_order": {"quote_signing_key", "counting_tokens", "placing_tokens", "reporting_tokens"},
        "fetch_buy_orders": {"counting_tokens", "reading_tokens", "reporting_tokens"},
        "process_buy_orders": {"counting_tokens", "processing_tokens", "reporting_tokens", "webhook_keys"},
        "operate_desk": {"counting_tokens", "operating_tokens", "reporting_tokens"},
        "db_proxy": {
            "counting_tokens",
            "database_url",
            "operating_tokens",
            "placing_tokens",
            "processing_tokens",
            "publishing_tokens",
            "reading_tokens",
            "reporting_tokens",
        },
        "api_cache_proxy": {"redis_url", "counting_tokens", "publishing_tokens", "reporting_tokens"},
        "api_updater": {"price_signing_key", "publishing_tokens", "reporting_tokens"},
        "health_check": {"redis_url", "reporting_tokens"},
    }
    assert not {"DATABASE_URL", "REDIS_URL", "BUYDESK_DATA_DIR"} & set(edge)
    assert environment(given, "db_proxy")["DATABASE_URL"] == "postgresql://x"
    assert "REDIS_URL" not in environment(given, "db_proxy")
    assert environment(given, "health_check")["REDIS_URL"] == "redis://x"


@pytest.mark.parametrize("service", PORTS)
async def test_serve_runs_one_service_until_a_signal(service: str, databases: Databases) -> None:
    given = settings(database_url=await databases.new(), port_offset=free_offset())
    serving = asyncio.create_task(serving_module.serve(given, service))
    async with httpx2.AsyncClient() as client, asyncio.timeout(20):
        while True:
            try:
                assert (await client.get(given.own_url(service) + "/livez")).status_code == 200
                break
            except httpx2.TransportError:
                await asyncio.sleep(0.02)
        with contextlib.suppress(httpx2.TransportError):
            assert (await client.get(given.own_url(service) + "/readyz")).status_code in (200, 503)
    os.kill(os.getpid(), signal.SIGTERM)
    await serving


async def test_serve_ends_when_its_supervisor_is_gone() -> None:
    reader, writer = os.pipe()
    given = settings(port_offset=free_offset(), supervisor_fd=reader)
    serving = asyncio.create_task(serving_module.serve(given, "fetch_buy_orders"))
    await asyncio.sleep(0.2)
    assert not serving.done()
    os.close(writer)
    await serving
    os.close(reader)


async def test_db_proxy_starts_before_its_database_but_not_in_the_other_mode_s(databases: Databases) -> None:
    away = settings(database_url="postgresql://u@127.0.0.1:1/x", port_offset=free_offset())
    wired = wire(away, ["db_proxy"])
    await wired.check_mode()
    await wired.close()
    other = settings(database_url=await databases.new(), port_offset=free_offset(), price_feed="live")
    with pytest.raises(CannotStart, match="sandbox orders"):
        await serving_module.serve(other, "db_proxy")


async def test_a_desk_that_nobody_could_call_does_not_start(data_dir: Path, databases: Databases) -> None:
    dsn = await databases.new()
    given = settings(database_url=dsn, port_offset=free_offset(), access="keys", data_dir=data_dir)
    with pytest.raises(CannotStart, match="there is no key"):
        await serving_module.serve(given, "db_proxy")
    with pytest.raises(CannotStart, match="there is no key"):
        await up(given, separate=False, say=print)
    await key_for(dsn, "anonymous", "orders:read")
    wired = wire(given, ["db_proxy"])
    await wired.check_mode()
    await wired.close()


async def test_an_app_that_does_not_start_is_said_to_be_so(monkeypatch: pytest.MonkeyPatch) -> None:
    given = settings(port_offset=free_offset())
    wired = wire(given, ["fetch_buy_orders"])

    @contextlib.asynccontextmanager
    async def broken() -> AsyncIterator[None]:
        if wired.apps:
            raise RuntimeError("broken")
        yield

    monkeypatch.setattr(wired.apps["fetch_buy_orders"], "running", broken)
    listeners = bind(given, ["fetch_buy_orders"])
    with pytest.raises(CannotStart, match="fetch_buy_orders did not start"):
        async with serving_module.serve_apps(wired.apps, listeners, given):
            pass
    await wired.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_every_signal_that_asks_a_desk_to_end_stops_it(number: signal.Signals) -> None:
    with stop_signals() as stop:
        os.kill(os.getpid(), number)
        async with asyncio.timeout(5):
            await stop.wait()


async def test_less_than_a_second_to_drain_is_not_none() -> None:
    given = settings(port_offset=free_offset(), order_seconds_max=0.5, drain_seconds_max=0.9)
    entered, released = asyncio.Event(), asyncio.Event()
    app = Service("db_proxy", "slow")

    @app.get("/slow")
    async def slow() -> str:
        entered.set()
        await released.wait()
        return "done"

    async with httpx2.AsyncClient() as client:
        async with serving_module.serve_apps({"db_proxy": app}, bind(given, ["db_proxy"]), given):
            asking = asyncio.create_task(client.get(given.own_url("db_proxy") + "/slow"))
            await entered.wait()
            asyncio.get_running_loop().call_later(0.2, released.set)
        assert (await asking).json() == "done"


async def test_a_second_ctrl_c_ends_at_once() -> None:
    raised: list[int] = []
    with stop_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        await stop.wait()
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0.01)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(signal, "signal", lambda *_: None)
            patch.setattr(signal, "raise_signal", raised.append)
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(0.01)
    assert raised == [signal.SIGINT]


def test_one_busy_port_leaves_none_bound() -> None:
    given = settings(port_offset=free_offset())
    with (
        socket.create_server(("127.0.0.1", given.port("db_proxy"))),
        pytest.raises(CannotStart, match=r"db_proxy cannot listen on 127.0.0.1 port \d+ .*--port-offset"),
    ):
        bind(given, PORTS)
    close(bind(given, PORTS).values())


def suggestion(given: Settings) -> int | None:
    """The offset that is named to somebody whose port is busy."""
    with contextlib.ExitStack() as busy:
        with contextlib.suppress(OSError):  # then another program has it
            busy.enter_context(socket.create_server((given.host, given.port("fetch_buy_orders"))))
        with pytest.raises(CannotStart, match=r": free it, or shift all ports with --port-offset \(.*\)") as refused:
            bind(given, ["fetch_buy_orders"])
    _, _, offset = str(refused.value).partition("; all are free at ")
    return int(offset) if offset else None


def test_a_busy_port_s_message_names_an_offset_at_which_all_ports_are_free() -> None:
    given = settings(port_offset=free_offset())
    suggested = suggestion(given)
    assert suggested is not None
    assert suggested > given.port_offset
    with socket.create_server((given.host, PORTS["api_updater"] + suggested)):
        another = suggestion(given)
    assert another is not None
    assert another > suggested
    close(bind(given.model_copy(update={"port_offset": suggested}), PORTS).values())


def test_past_the_highest_offset_the_lower_ones_are_looked_at() -> None:
    suggested = suggestion(settings(port_offset=PORT_OFFSET_MAX))
    assert suggested is not None
    assert suggested < PORT_OFFSET_MAX
    assert max(PORTS.values()) - min(PORTS.values()) < listeners.OFFSET_STEP


def test_when_there_is_no_free_offset_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listeners, "PORT_OFFSET_MAX", 0)
    given = settings(port_offset=free_offset())
    monkeypatch.setattr(listeners, "OFFSET_STEP", given.port_offset + 1)  # leaves offset 0
    with socket.socket() as busy:
        busy.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):  # then another program has it
            busy.bind((given.host, PORTS["db_proxy"]))
            busy.listen()
        assert suggestion(given) is None


def reaches(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=5).close()
    except OSError:
        return False
    return True


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return socket.has_dualstack_ipv6()


# A machine without IPv6 has fewer cases; a case that is skipped would make no gate.
IPV6: dict[str, set[str]] = {"::": {"127.0.0.1", "::1"}, "0::0": {"127.0.0.1", "::1"}, "::1": {"::1"}}
IPV4: dict[str, set[str]] = {"127.0.0.1": {"127.0.0.1"}, "0.0.0.0": {"127.0.0.1"}}  # noqa: S104


@pytest.mark.parametrize(("host", "answering"), (IPV4 | (IPV6 if has_ipv6() else {})).items())
def test_a_desk_answers_at_the_addresses_that_its_host_stands_for(host: str, answering: set[str]) -> None:
    given = settings(host=host, port_offset=free_offset())
    port = given.port("db_proxy")
    listeners = bind(given, ["db_proxy"])
    try:
        assert {address for address in ("127.0.0.1", "::1") if reaches(address, port)} == answering
        own = urlsplit(given.own_url("db_proxy"))
        assert reaches(str(own.hostname), port)
    finally:
        close(listeners.values())


@pytest.mark.parametrize("host", ["0.0.0.0", *(["::"] if has_ipv6() else [])])  # noqa: S104
def test_a_port_that_is_busy_at_one_address_is_busy_at_all(host: str) -> None:
    given = settings(host=host, port_offset=free_offset())
    with (
        socket.create_server(("127.0.0.1", given.port("db_proxy"))),
        pytest.raises(CannotStart, match=r"port \d+ \(Address already in use\): free it"),
    ):
        bind(given, ["db_proxy"])


@pytest.mark.parametrize("host", ["999.0.0.1", "::ffff:ffff", "192.0.2.7"])
def test_an_address_that_is_not_here_is_one_line_and_no_other_port_is_proposed(host: str) -> None:
    with pytest.raises(CannotStart, match=r"cannot listen on .*: use another --host \(BUYDESK_HOST\)$"):
        bind(settings(host=host), ["db_proxy"])


async def test_wiring_takes_own_backends_for_own_ports_and_remote_ones_for_the_others(redis_url: str) -> None:
    given = settings(redis_url=redis_url, price_feed="live", database_url="postgresql://x")
    wired = wire(given, PORTS)
    kinds = [type(backend) for backend in wired.backends]
    assert kinds[:9] == [ExchangeSource] * 5 + [PostgresLedger, PostgresLife, PostgresAnchors, PostgresKeys]
    assert kinds[9:13] == [PostgresRegistry, PostgresRefusals, PostgresWebhooks, EndpointSender]
    assert kinds[13:] == [RateLimiter, FallbackRateStore, FallbackPriceStore, FallbackReportStore, RedisCheck]
    await wired.close()
    alone = wire(settings(), ["api_updater"])
    kinds = [type(backend) for backend in alone.backends]
    assert kinds[:9] == [SandboxSource] * 5 + [RemoteLedger, RemoteLife, RemoteAnchorStore, RemoteKeys]
    assert kinds[9:14] == [RemoteRegistry, RemoteRefusals, RemoteWebhooks, RateLimiter, RemoteRateStore]
    assert SandboxSource not in map(type, wire(settings(), ["health_check"]).backends)
    with pytest.raises(CannotStart, match="REDIS_URL"):
        wire(settings(redis_url="redis://x?db=nonsense&socket_timeout=nonsense"), ["health_check"])
    with pytest.raises(CannotStart, match="DATABASE_URL is missing"):
        wire(settings(), ["db_proxy"])


@pytest.fixture
def runner() -> Iterator[CliRunner]:
    configure = logs.configure
    logs.configure = lambda *_: None
    yield CliRunner()
    logs.configure = configure


def test_help_tells_commands_and_settings(runner: CliRunner) -> None:
    said = runner.invoke(cli.main, ["--help"]).output
    assert "buydesk up --separate" in said
    said = runner.invoke(cli.main, ["serve", "--help"]).output
    for name in ("DATABASE_URL", "REDIS_URL", "PRICE_FEED", "BUYDESK_PLACING_TOKENS", "BUYDESK_ORDER_SECONDS_MAX"):
        assert name in said


def test_commands_hand_their_settings_on(runner: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[Any, ...]] = []

    async def fake_up(given: Settings, *, separate: bool, say: object) -> None:
        called.append((given.port_offset, given.replay_speed, given.sandbox_fault, separate))

    async def fake_serve(given: Settings, service: str) -> None:
        called.append((given.placing_tokens.get_secret_value(), service))

    async def fake_migrate(url: str, **given: object) -> None:
        called.append((url, given))

    monkeypatch.setattr("buydesk.runtime.up.up", fake_up)
    monkeypatch.setattr("buydesk.runtime.serve.serve", fake_serve)
    monkeypatch.setattr("buydesk.backends.postgres.migrate.migrate", fake_migrate)
    arguments = ["--port-offset", "5", "--replay-speed", "60", "--sandbox-fault", "outlier", "--separate"]
    assert runner.invoke(cli.main, ["up", *arguments]).exit_code == 0
    for name, value in shared_env().items():
        monkeypatch.setenv(name, value)
    assert runner.invoke(cli.main, ["serve", "db_proxy"]).exit_code == 0
    monkeypatch.setenv("DATABASE_URL", "postgresql://x")
    monkeypatch.setenv("BUYDESK_DB_PROXY_DATABASE_URL", "postgresql://db_proxy:p@x")
    assert runner.invoke(cli.main, ["migrate", "--cap", "0.5", "--wait", "3"]).exit_code == 0
    assert called == [
        (5, 60.0, "outlier", True),
        (TOKEN, "db_proxy"),
        (
            "postgresql://x",
            {
                "livemode": False,
                "cap_satoshi": 50_000_000,
                "price_keys": settings().accepted_price_keys,
                "account": Account("db_proxy", "p"),
                "wait_seconds": 3.0,
            },
        ),
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["serve", "db_proxy"],
            "BUYDESK_PUBLISHING_TOKENS, BUYDESK_PLACING_TOKENS, BUYDESK_READING_TOKENS, BUYDESK_PROCESSING_TOKENS, "
            "BUYDESK_OPERATING_TOKENS, BUYDESK_COUNTING_TOKENS, BUYDESK_REPORTING_TOKENS, "
            "BUYDESK_PRICE_KEYS, BUYDESK_QUOTE_KEYS are missing",
        ),
        (
            ["serve", "api_updater"],
            "BUYDESK_PUBLISHING_TOKENS, BUYDESK_REPORTING_TOKENS, BUYDESK_PRICE_SIGNING_KEY are missing",
        ),
        (
            ["serve", "create_buy_order"],
            "BUYDESK_PLACING_TOKENS, BUYDESK_COUNTING_TOKENS, BUYDESK_REPORTING_TOKENS, BUYDESK_QUOTE_SIGNING_KEY, "
            "BUYDESK_PRICE_KEYS, BUYDESK_QUOTE_KEYS are missing",
        ),
        (
            ["serve", "process_buy_orders"],
            "BUYDESK_PROCESSING_TOKENS, BUYDESK_COUNTING_TOKENS, BUYDESK_REPORTING_TOKENS, BUYDESK_WEBHOOK_KEYS are "
            "missing",
        ),
        (["serve", "health_check"], "BUYDESK_REPORTING_TOKENS is missing"),
        (["migrate"], "DATABASE_URL is missing"),
        (["up", "--port-offset", "-1"], "BUYDESK_PORT_OFFSET"),
        (["up", "--data-dir", ""], "BUYDESK_DATA_DIR: must not be empty"),
        (["up", "--host", ""], "BUYDESK_HOST: must not be empty"),
        (
            ["up", "--feed", "live", "--sandbox-fault", "stale"],
            "BUYDESK_SANDBOX_FAULT (stale) needs PRICE_FEED=sandbox",
        ),
    ],
)
def test_what_keeps_a_command_from_starting_is_one_line(runner: CliRunner, arguments: list[str], said: str) -> None:
    result = runner.invoke(cli.main, arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_cap_that_is_no_amount_is_refused(runner: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://x")
    result = runner.invoke(cli.main, ["migrate", "--cap", "a lot"])
    assert (result.exit_code, result.stderr.startswith("buydesk: --cap must be")) == (2, True)


def test_secrets_to_share_are_made_at_once(runner: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = runner.invoke(cli.main, ["secrets"]).output.splitlines()
    for line in lines:
        monkeypatch.setenv(*line.split("="))
    made = read_settings(refuse_default_secrets=True)
    assert made.model_fields_set == {*SHARED, *KEY_PAIRS.values(), "refuse_default_secrets"}
    assert made.price_keys == (public_key(made.price_signing_key.get_secret_value()),)
    assert made.quote_keys == (public_key(made.quote_signing_key.get_secret_value()),)
    assert made.quote_keys != made.price_keys
    assert len(set(lines)) == len(SHARED) + 2


def test_the_module_is_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["buydesk", "--version"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("buydesk", run_name="__main__")
    assert capsys.readouterr().out.startswith("buydesk, version ")


async def test_a_service_that_never_answers_is_waited_for_so_long_and_not_longer() -> None:
    async with new_session() as session, served(FastAPI()) as url:
        assert await wait_until_ready(session, url, 0.2) == "it does not answer"


def refusing(missing: Mapping[str, str]) -> FastAPI:
    """A service that is not ready, for these reasons."""
    app = FastAPI()
    told = [{"what": what, "why": why} for what, why in missing.items()]
    app.get("/readyz")(lambda: JSONResponse({"missing": told}, 503))
    return app


def knowing(at: datetime, problem: str) -> FastAPI:
    """A price store that was told of the sources."""
    app = FastAPI()
    state = document_of(FeedStatus(at, "live", problem, ()))
    app.get("/sources")(lambda: state)
    return app


@pytest.mark.parametrize(
    ("missing", "age_seconds", "problem", "should_stop_waiting"),
    [
        ({"price": "none"}, 0, "they disagree", True),
        ({"price": "none"}, 0, "", False),  # one is on its way
        ({"price": "none"}, 0.001, "they disagree", False),  # another run's
        ({"ledger": "starts", "price": "none"}, 0, "they disagree", False),  # the ledger may come any moment
    ],
)
async def test_waiting_for_a_price_ends_when_the_sources_prove_none(
    missing: dict[str, str], age_seconds: float, problem: str, should_stop_waiting: bool
) -> None:
    given, since = settings(port_offset=free_offset()), utc_now()
    store = knowing(since - timedelta(seconds=age_seconds), problem)
    services = {"create_buy_order": refusing(missing), "api_cache_proxy": store}
    async with contextlib.AsyncExitStack() as stack:
        session = await stack.enter_async_context(new_session())
        for name, app in services.items():
            await stack.enter_async_context(served(app, given.port(name)))
        started = time.monotonic()
        told = await wait_until_selling(session, given, since, 30 if should_stop_waiting else 0.3)
        waited_seconds = time.monotonic() - started
    assert told == "; ".join(f"{what} ({why})" for what, why in missing.items())
    assert waited_seconds < 10 if should_stop_waiting else waited_seconds >= 0.3


async def test_the_table_says_what_does_not_answer() -> None:
    given = settings(port_offset=free_offset())
    async with new_session() as session:
        said = await startup_report(session, given, Dependencies("here", "there"), 1.0, "everything")
    assert "is up after 1.0 s, but not ready: everything\n" in said
    assert "none: no orders are taken" in said
    assert "\nNo orders are taken: there is no price.\n" in said
    assert "unknown: the ledger does not answer" in said
    price_port, orders_port = given.port("api_cache_proxy"), given.port("fetch_buy_orders")
    async with new_session() as session, served(FastAPI(), price_port), served(FastAPI(), orders_port):
        with_another_there = await startup_report(session, given, Dependencies("here", "there"), 1.0, "everything")
    assert with_another_there == said


@pytest.mark.parametrize("follows", [True, False])
async def test_the_table_is_of_the_tick_that_made_the_price(monkeypatch: pytest.MonkeyPatch, *, follows: bool) -> None:
    monkeypatch.setattr("buydesk.runtime.startup_report.SOURCES_SECONDS_MAX", 0.5)
    given, now = settings(port_offset=free_offset()), utc_now()
    late = {"source": "sandbox-1", "detail": "is late"}
    states: list[dict[str, Any] | None] = [None, {"at": format_time(now - timedelta(seconds=1)), "sources": []}]
    states += [{"at": format_time(now), "sources": [late]}] if follows else []
    store = FastAPI()

    @store.get("/record")
    async def record() -> dict[str, Any]:
        return {"rates": {"EUR": "1"}, "decided_at": format_time(now), "replayed_from": "2023"}

    @store.get("/sources")
    async def sources() -> JSONResponse:
        state = states.pop(0) if len(states) > 1 else states[0]
        return JSONResponse(state or {}, 200 if state else 503)

    async with new_session() as session, served(store, given.port("api_cache_proxy")):
        said = await startup_report(session, given, Dependencies("here", "there"), 1.0, "")
    assert bool(re.search(r"Not all price sources are well:\n  sandbox-1 +is late\n", said)) == follows


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "open, no key is needed: for programs of this machine, at 127.0.0.1"),
        ({"host": "0.0.0.0", "access": "open"}, "open, no key is needed: for every machine that reaches 0.0.0.0"),  # noqa: S104
        ({"host": "::", "access": "proxy"}, "proxy: a proxy in front checks keys"),
        ({"host": "::"}, "keys: callers show one (buydesk keys create)"),
    ],
)
async def test_the_table_says_who_may_order(given: dict[str, str], said: str) -> None:
    async with new_session() as session:
        lines = await startup_report(
            session, settings(port_offset=free_offset(), **given), Dependencies("here", "there"), 1.0, ""
        )
    assert f"  access              {said}\n" in lines


def test_the_sandbox_s_command_is_exact_and_leaves_the_live_orders_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    live = settings(data_dir=Path("/with a blank/data"), price_feed="live")
    monkeypatch.setattr("sys.argv", [".venv/bin/buydesk", "up", "--feed", "live"])
    assert sandbox_command(live) == ".venv/bin/buydesk up --feed sandbox --data-dir '/with a blank/data-sandbox'"
    monkeypatch.setattr("sys.argv", ["/somewhere/buydesk/__main__.py"])
    shifted = live.model_copy(update={"port_offset": 7, "data_dir": Path("/data")})
    assert sandbox_command(shifted, ["DATABASE_URL", "REDIS_URL"]) == (
        f"env -u DATABASE_URL -u REDIS_URL {sys.executable} -m buydesk up --feed sandbox"
        " --data-dir /data-sandbox --port-offset 7"
    )


def test_settings_are_read_with_the_command_line_on_top(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUYDESK_PORT_OFFSET", "3")
    assert read_settings().port_offset == 3
    assert read_settings(port_offset=4).port_offset == 4
