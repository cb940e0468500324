"""Secrets: no piece of a password is printed, logged, reported or answered, whatever stands in it and wherever."""

import asyncio
import contextlib
import io
import logging
import os
from collections.abc import Awaitable, Callable, Iterator

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, example, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from buydesk import cli
from buydesk.backends.redis.faults import RedisCheck
from buydesk.backends.remote import RemoteLedger
from buydesk.clients.rates import Lot
from buydesk.errors import CannotStart, DeskError, OutcomeUnknown
from buydesk.observability import logs
from buydesk.observability.reporter import _described
from buydesk.observability.sentry import error_reporting
from buydesk.runtime.wiring import WiredServices, wire
from buydesk.settings.model import Settings, variable
from buydesk.settings.reading import read_settings
from buydesk.topology import SERVICES
from tests.builders import priced_order, settings, shared_env
from tests.serving import free_port

SECRET = "hunter2"
SERVER_URLS = ("database_url", "db_proxy_database_url", "redis_url")
HTTP_URLS = [variable(each) for each in Settings.model_fields if each.endswith("_url") and each not in SERVER_URLS]
URLS = {
    "DATABASE_URL": [
        "postgresql://u:{}@127.0.0.1:9/db",
        "postgres://u:{}@/db?host=/nowhere",
        "postgresql:///db?host=127.0.0.1&port=9&password={}",
        "postgresql://u@127.0.0.1:9/db?sslmode=require&sslpassword={}",
    ],
    "BUYDESK_DB_PROXY_DATABASE_URL": ["postgresql://u:{}@127.0.0.1:9/db", "postgresql://{}:p@127.0.0.1:9/db"],
    "REDIS_URL": [
        "redis://:{}@127.0.0.1:9/0",
        "rediss://u:{}@127.0.0.1:9",
        "unix:///nowhere?db=0&password={}",
        "redis://127.0.0.1:9/0?password={}",
    ],
    "SENTRY_DSN": ["http://{}@127.0.0.1:9/1", "http://key:{}@127.0.0.1:9/1"],
    **{name: ["http://u:{}@127.0.0.1:9", "http://{}@127.0.0.1:9/x"] for name in HTTP_URLS},
}
COMMANDS = [["up"], ["migrate"], *(["serve", service] for service in SERVICES)]

# Mostly what ends a part of an address.
parts = st.text(st.sampled_from(3 * "@:/?#[" + "]%&=+,;'\"\\|<^ \t\né／aZ019-._~"), max_size=4)  # noqa: RUF001  # NFKC makes a / of it
passwords = st.builds("{}{}{}".format, parts, st.just(SECRET), parts)


@contextlib.contextmanager
def logged() -> Iterator[io.StringIO]:
    """All that is logged meanwhile, down to debug and with tracebacks, as on a terminal and elsewhere."""
    root, written = logging.getLogger(), io.StringIO()
    before = root.level, root.handlers
    root.handlers = [logging.StreamHandler(written), logging.StreamHandler(written)]
    root.handlers[0].setFormatter(logs._JsonLines())
    root.handlers[1].setFormatter(logs._Text())
    root.setLevel(logging.DEBUG)
    try:
        yield written
    finally:
        root.level, root.handlers = before[0], before[1]


async def ask(wired: WiredServices, answers: list[str]) -> None:
    """Calls everything that is elsewhere, and keeps what clients, reports and the log are told of it."""
    calls: list[Callable[[], Awaitable[object]]] = [wired.check_mode, wired.ledger.check]
    calls += [lambda: wired.ledger.exposure(None), lambda: wired.ledger.place([priced_order()], 1)]
    checks = [each for each in wired.backends if isinstance(each, RedisCheck)]
    rates, store, desk = [each for each in wired.backends if each not in checks][-3:]
    calls += [getattr(store, "latest"), getattr(desk, "last_of_each"), *checks]  # noqa: B009
    calls.append(lambda: getattr(rates, "take")([Lot("orders:client:shop", 60, 1)]))  # noqa: B009
    for call in calls:
        try:
            await call()
        except Exception as error:
            logging.getLogger("buydesk").exception("failed")
            answers.append(_described(error))
            answers.append(error.detail if isinstance(error, DeskError) else "")


async def use(given: Settings, answers: list[str]) -> None:
    for services in (SERVICES, ["create_buy_order", "api_updater"]):  # each backend, and each service from elsewhere
        wired = wire(given, services)
        async with error_reporting(given, wired.apps):
            await ask(wired, answers)
        await wired.close()


@pytest.mark.parametrize("name", URLS)
@examples(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(number=st.integers(0, 3), password=passwords, command=st.sampled_from(COMMANDS))
@example(number=0, password="my@pass:hunter2/x", command=["serve", "health_check"])
@example(number=2, password="&hunter2", command=["up"])
def test_no_piece_of_a_password_in_any_address_is_shown(
    name: str, number: int, password: str, command: list[str]
) -> None:
    url = URLS[name][number % len(URLS[name])]
    answers: list[str] = []

    async def run(given: Settings, *_: object, **__: object) -> None:
        await use(given, answers)

    env: dict[str, str | None] = {
        "DATABASE_URL": "postgresql://127.0.0.1:9/db",
        **shared_env(),
        "BUYDESK_CONNECT_SECONDS_MAX": "0.5",
        name: url.format(password),
    }
    without: dict[str, str | None] = {each: None for each in os.environ if each.startswith("BUYDESK_")}
    with pytest.MonkeyPatch.context() as patch, logged() as log:
        patch.setattr("buydesk.runtime.up.up", run)
        patch.setattr("buydesk.runtime.serve.serve", run)
        patch.setattr(logs, "configure", lambda *_: None)
        result = CliRunner().invoke(cli.main, command, env=without | env)
    assert isinstance(result.exception, SystemExit | None), result.exception
    assert result.exit_code in (0, 2)
    shown = result.output + log.getvalue() + "\n".join(answers)
    assert SECRET not in shown
    if name in HTTP_URLS:
        assert f"{name}: must be an address without a user or a password" in result.output


def test_an_address_with_a_password_that_is_encoded_is_used() -> None:
    """What is tried above gets as far as the servers, when it can."""
    env = {"DATABASE_URL": "postgresql://u:hunter2%40%2F:'\"@127.0.0.1:9/db", "BUYDESK_CONNECT_SECONDS_MAX": "0.5"}
    answers: list[str] = []
    with pytest.MonkeyPatch.context() as patch, logged() as log:
        for name, value in env.items():
            patch.setenv(name, value)
        asyncio.run(use(read_settings(), answers))
    assert "PostgreSQL cannot be used (ConnectionRefusedError)." in answers
    assert "Traceback" in log.getvalue()
    assert SECRET not in log.getvalue()


@pytest.mark.parametrize("url", ["redis://h:77777", "redis://h?hunter2=1", "rediss://h?ssl_cert_reqs=hunter2"])
def test_a_redis_that_can_never_be_asked_is_found_at_the_start(url: str) -> None:
    with pytest.raises(CannotStart) as refused:
        wire(settings(redis_url=url), ["health_check"])
    assert str(refused.value) == (
        "REDIS_URL: must have a port of at most 65535, and after a ? only options that redis-py has"
    )


async def test_clients_do_not_read_where_a_service_is(caplog: pytest.LogCaptureFixture) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    ledger = RemoteLedger(address, settings(remote_seconds_max=0.3))
    with caplog.at_level(logging.DEBUG, "buydesk"):
        for call in (ledger.exposure(None), ledger.check(), ledger.place([priced_order()], 1)):
            with pytest.raises(DeskError) as raised:
                await call
            assert not isinstance(raised.value, OutcomeUnknown)
            assert raised.value.detail == "db_proxy gave no answer (ClientConnectorError)."
    await ledger.close()
    assert [(each.levelname, address in each.message) for each in caplog.records] == [("DEBUG", True)] * 3
