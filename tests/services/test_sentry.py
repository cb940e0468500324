"""Sentry over real HTTP: what arrives at a receiver of our own, and a desk whose receiver is away."""

import asyncio
import contextlib
import json
import logging
import secrets
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest
from aiohttp import web as aiohttp_web

from buydesk import __version__
from buydesk.backends.remote import RemoteLedger
from buydesk.errors import CannotStart
from buydesk.http.listeners import bind
from buydesk.observability import sentry
from buydesk.runtime.serve import run_wired
from buydesk.runtime.wiring import wire
from buydesk.settings.model import Settings
from tests.builders import settings
from tests.desks import free_offset

# Made anew, so that no line of source, which events quote, has them.
TOKEN, PASSWORD, KEY = secrets.token_hex(16), secrets.token_hex(8), secrets.token_hex(8)
AMOUNT = str(secrets.randbelow(10**8))
BODY = f"amount={AMOUNT}&client_order_id={KEY}"


class Receiver:
    """Takes envelopes as Sentry does, and keeps the events of them; `raw` is all that came."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.kinds: set[str] = set()
        self.raw = b""

    def app(self) -> aiohttp_web.Application:
        app = aiohttp_web.Application()
        app.router.add_post("/api/42/envelope/", self._take)
        return app

    async def _take(self, request: aiohttp_web.Request) -> aiohttp_web.Response:
        body = await request.read()
        self.raw += body + str(request.headers).encode()
        _, *items = body.decode().splitlines()
        for head, payload in zip(items[::2], items[1::2], strict=True):
            self.kinds.add(json.loads(head)["type"])
            self.events.append(json.loads(payload))
        return aiohttp_web.json_response({"id": "0"})

    async def until(self, events: int) -> None:
        async with asyncio.timeout(20):
            while len(self.events) < events:
                await asyncio.sleep(0.005)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
async def receiver() -> AsyncIterator[tuple[Receiver, str]]:
    """A receiver and its DSN."""
    kept = Receiver()
    runner = aiohttp_web.AppRunner(kept.app())
    await runner.setup()
    listener = socket.create_server(("127.0.0.1", 0))
    await aiohttp_web.SockSite(runner, listener).start()
    yield kept, f"http://{secrets.token_hex(16)}@127.0.0.1:{listener.getsockname()[1]}/42"
    await runner.cleanup()


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading the exposure is an accident, whose text and variables are full of what is nobody's business."""

    async def accident(_: RemoteLedger, __: str | None) -> None:
        amount, body = AMOUNT, BODY
        try:
            raise ValueError(f"{body!r}: bad amount {amount} of postgresql://desk:{PASSWORD}@db/desk\nDETAIL: {KEY}")
        except ValueError as error:
            raise ZeroDivisionError(f"bearer {TOKEN} divides by zero") from error

    monkeypatch.setattr(RemoteLedger, "exposure", accident)


def configured(dsn: str | None, **given: Any) -> Settings:
    nobody = "http://127.0.0.1:9"
    return settings(
        **{"reporting_tokens": TOKEN, "sentry_dsn": dsn, "port_offset": free_offset(), "db_proxy_url": nobody} | given
    )


@contextlib.asynccontextmanager
async def desk(configured: Settings, *services: str) -> AsyncIterator[httpx2.AsyncClient]:
    """These services as `buydesk serve` and `buydesk up` run them, and a client of fetch_buy_orders."""
    listeners = bind(configured, services)
    async with (
        run_wired(wire(configured, services), listeners, configured),
        httpx2.AsyncClient(base_url=configured.own_url("fetch_buy_orders")) as client,
    ):
        yield client


@pytest.mark.usefixtures("broken")
async def test_an_unexpected_exception_arrives_with_its_request_and_without_secrets(
    receiver: tuple[Receiver, str],
) -> None:
    kept, dsn = receiver
    async with desk(configured(dsn), "fetch_buy_orders") as client:
        answer = await client.request("GET", "/exposure", content=BODY, headers={"X-Request-Id": "mine-1"})
        assert answer.status_code == 500
        await kept.until(1)
    [event] = kept.events
    assert kept.kinds == {"event"}
    assert event["tags"] == {"service": "fetch_buy_orders", "request_id": "mine-1"}
    assert (event["release"], event["environment"], event["level"]) == (f"buydesk@{__version__}", "sandbox", "error")
    cause, accident = event["exception"]["values"]
    assert (cause["type"], accident["type"]) == ("ValueError", "ZeroDivisionError")
    assert accident["value"] == "bearer *** divides by zero"
    assert cause["value"] == "[…]: bad amount […] of postgresql://desk:***@db/desk"
    assert accident["stacktrace"]["frames"][-1]["function"] == "accident"
    error_reporting = kept.raw.decode()
    for secret in (TOKEN, PASSWORD, KEY, AMOUNT, BODY):
        assert secret not in error_reporting
    assert not {"request", "user", "breadcrumbs", "modules"} & event.keys()


async def test_what_any_part_logs_as_an_error_arrives_as_long_as_the_desk_runs(receiver: tuple[Receiver, str]) -> None:
    kept, dsn = receiver
    handlers = list(logging.getLogger().handlers)
    async with desk(configured(dsn), "fetch_buy_orders", "health_check"):
        logging.getLogger("buydesk.services.health_check").error("The status could not be determined.")
        logging.getLogger("asyncio").error("odd")
    logging.getLogger("buydesk").error("after the end")
    assert [(each["tags"], each["logentry"]["message"]) for each in kept.events] == [
        ({"service": "health_check"}, "The status could not be determined."),
        ({"service": "buydesk"}, "odd"),
    ]
    assert logging.getLogger().handlers == handlers


async def test_a_desk_that_fails_as_a_whole_says_so_but_not_that_it_cannot_start(
    receiver: tuple[Receiver, str],
) -> None:
    kept, dsn = receiver
    for error in (CannotStart("the port is taken"), ZeroDivisionError("an accident")):
        with pytest.raises(type(error)):
            async with sentry.error_reporting(configured(dsn), ["fetch_buy_orders"]):
                raise error
    [event] = kept.events
    assert (event["level"], event["exception"]["values"][0]["type"]) == ("fatal", "ZeroDivisionError")


@pytest.mark.usefixtures("broken")
async def test_without_a_dsn_nothing_is_told(receiver: tuple[Receiver, str]) -> None:
    kept, _ = receiver
    async with desk(configured(None), "fetch_buy_orders") as client:
        assert (await client.get("/exposure")).status_code == 500
    assert kept.raw == b""


@contextlib.asynccontextmanager
async def black_hole() -> AsyncIterator[str]:
    """The DSN of a receiver that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://key@127.0.0.1:{listener.getsockname()[1]}/42"


@contextlib.asynccontextmanager
async def nobody() -> AsyncIterator[str]:
    """The DSN of a receiver that is not there."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        yield f"http://key@127.0.0.1:{probe.getsockname()[1]}/42"


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize("away", [black_hole, nobody])
async def test_a_receiver_that_is_away_harms_nobody_and_is_no_report(
    away: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sentry, "STOP_SECONDS_MAX", 0.1)
    errors = 3 * sentry.EVENTS_WAITING_MAX
    async with away() as dsn, asyncio.timeout(60):
        async with desk(configured(dsn), "fetch_buy_orders") as client:
            for _ in range(errors):
                assert (await client.get("/exposure")).status_code == 500
            assert (await client.get("/livez")).status_code == 200
            stopping = time.monotonic()
        # Far from the half minute that sentry_sdk waits for an answer.
        assert time.monotonic() - stopping < 10
    assert {each.name for each in caplog.records} == {"buydesk.services.fetch_buy_orders"}
    assert len(caplog.records) == errors
