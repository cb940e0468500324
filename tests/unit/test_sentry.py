"""Sentry: what an event holds and what it never holds, how many there are, and what is said without the package."""

import contextlib
import importlib.util
import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from buydesk import __version__
from buydesk.cli import main
from buydesk.errors import CannotStart
from buydesk.observability import request_ids, sentry
from buydesk.observability.sentry import SentryHandler, error_reporting, require_sentry, scrub_event, scrubbed
from tests.builders import settings, shared_env
from tests.clock import FakeClock

DSN = "http://key@127.0.0.1:9/42"
DB_PROXY = "buydesk.services.db_proxy"


class Client:
    """Keeps the events that it is to send."""

    def __init__(self) -> None:
        self.options = sentry._client(settings(), settings(sentry_dsn=DSN).sentry_dsn).options  # type: ignore[arg-type]
        self.events: list[dict[str, Any]] = []
        self.breaks = False

    def capture_event(self, event: dict[str, Any]) -> None:
        if self.breaks:
            raise ZeroDivisionError("a fault of its own")
        self.events.append(event)


@contextlib.contextmanager
def logger(name: str, handler: logging.Handler) -> Iterator[logging.Logger]:
    found = logging.Logger(name)
    found.addHandler(handler)
    yield found


@pytest.fixture
def client() -> Client:
    return Client()


def handler(client: Client, *services: str, **given: Any) -> SentryHandler:
    return SentryHandler(client, services or ("db_proxy",), **given)  # type: ignore[arg-type]


async def test_an_error_becomes_an_event_that_says_whose_it_is(client: Client) -> None:
    request_ids.begin("r-1")
    with logger(DB_PROXY, handler(client)) as log:
        try:
            raise OSError("away")
        except OSError:
            log.exception("order %s cannot be stored", "01-ab")
        log.critical("the end")
        log.error("odd", exc_info=(None, None, None))
    first, second, third = client.events
    assert (first["level"], second["level"], third["level"]) == ("error", "fatal", "error")
    assert first["logentry"] == {"message": "order 01-ab cannot be stored"}
    assert first["tags"] == {"service": "db_proxy", "request_id": "r-1"}
    [exception] = first["exception"]["values"]
    assert (exception["type"], exception["value"]) == ("OSError", "away")
    assert all("vars" not in frame for frame in exception["stacktrace"]["frames"])
    assert "exception" not in second
    assert "exception" not in third


def test_warnings_are_no_events(client: Client) -> None:
    with logger(DB_PROXY, handler(client)) as log:
        log.warning("late")
    assert client.events == []


@pytest.mark.parametrize("name", ["sentry_sdk.errors", "urllib3.connectionpool"])
def test_what_sending_says_is_not_sent(client: Client, name: str) -> None:
    with logger(name, handler(client)) as log:
        log.error("the receiver is away")
    assert client.events == []


@pytest.mark.parametrize(
    ("services", "name", "service"),
    [
        (["db_proxy"], "asyncio", "db_proxy"),
        (["db_proxy", "fetch_buy_orders"], "asyncio", "buydesk"),
        (["db_proxy", "fetch_buy_orders"], "buydesk.services.fetch_buy_orders.pages", "fetch_buy_orders"),
    ],
)
def test_an_event_names_the_service_as_well_as_it_is_known(
    client: Client, services: list[str], name: str, service: str
) -> None:
    with logger(name, handler(client, *services)) as log:
        log.error("odd")
    assert client.events[0]["tags"]["service"] == service


def test_of_other_libraries_lines_only_their_own_words_are_told(client: Client) -> None:
    for name in ("asyncio", DB_PROXY):
        with logger(name, handler(client)) as log:
            log.error("lost: ValueError('69.00')")
    assert [each["logentry"]["message"] for each in client.events] == [
        "lost: ValueError([…])",
        "lost: ValueError('69.00')",
    ]


def test_a_storm_of_errors_is_limited_by_the_minute_and_says_what_it_left_out(client: Client) -> None:
    clock = FakeClock()
    with logger(DB_PROXY, handler(client, clock=clock)) as log:
        for _ in range(sentry.EVENTS_PER_MINUTE_MAX + 5):
            log.error("odd")
        assert len(client.events) == sentry.EVENTS_PER_MINUTE_MAX
        clock.seconds += 59.9
        log.error("odd")
        clock.seconds += 0.1
        log.error("odd")
        log.error("odd")
    assert [each.get("extra") for each in client.events[-3:]] == [None, {"events_left_out_before": 6}, None]


def test_what_cannot_be_told_fails_nobody(client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    client.breaks = True
    with logger(DB_PROXY, handler(client)) as log:
        log.error("%d", "three")
        log.error("odd")
    assert capsys.readouterr().err.count("Logging error") == 2


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("division by zero", "division by zero"),
        ("invalid literal for int() with base 10: '69x'", "invalid literal for int() with base […]: […]"),
        ('no such key: "order-7"', "no such key: […]"),
        (r"'a \' b' and 'c'", "[…] and […]"),
        ("an order of 69.00 EUR, 1,000.5e-3 or 0.00167509", "an order of […] EUR, […] or […]"),
        ("'never ended order-7", "[…]"),
        ('"trailing \\', "[…]"),
        (
            "duplicate key value\nDETAIL:  Key (client, client_order_id)=(anonymous, order-x) already exists.",
            "duplicate key value",
        ),
        ("", ""),
    ],
)
def test_an_exception_s_text_is_told_without_what_it_quotes(text: str, shown: str) -> None:
    assert scrubbed(text) == shown


@given(st.text(), st.text(alphabet=st.sampled_from("'\"\\ a9\n"), max_size=2000))
def test_no_quoted_key_and_no_digit_gets_through(key: str, noise: str) -> None:
    for text in (f"the key {key!r} is bad", noise, "\\" * 1000, "'" + "\\" * 2000):
        assert not any(char.isdigit() for char in scrubbed(text))
    assert "zebra" not in scrubbed(f"the key {'zebra' + key!r} is bad")


def test_an_event_shows_no_password_and_no_secret_of_the_desk_wherever_they_stand() -> None:
    event: Any = {
        "logentry": {"message": "no way to postgresql://u:hunter2@db/desk with sesame-sesame"},
        "tags": {"a": "sesame-sesame"},
        "extra": {"list": ["x sesame-sesame x", 5], "tuple": ("sesame-sesame",)},
        "exception": {"values": [{"type": "KeyError", "value": "sesame-sesame"}, {"type": "Bare", "value": None}]},
    }
    shown = str(scrub_event(event, ["sesame-sesame"]))
    assert "sesame" not in shown
    assert "hunter2" not in shown
    assert "postgresql://u:***@db/desk with ***" in shown
    assert scrub_event({"level": "error"}, ["sesame-sesame"]) == {"level": "error"}


def test_short_settings_are_not_taken_for_secrets() -> None:
    configured = settings(placing_tokens="err", sentry_dsn=DSN)
    assert configured.sentry_dsn is not None
    client = sentry._client(configured, configured.sentry_dsn)
    assert client.options["before_send"]({"level": "error"}, {}) == {"level": "error"}
    assert client.options["release"] == f"buydesk@{__version__}"
    assert client.options["environment"] == "sandbox"


@pytest.fixture
def without_package(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *args: None if name == "sentry_sdk" else found(name, *args)
    )
    monkeypatch.setitem(sys.modules, "sentry_sdk", None)


@pytest.mark.usefixtures("without_package")
async def test_without_the_package_a_desk_that_asks_for_sentry_says_so_and_others_run() -> None:
    require_sentry(settings())
    async with error_reporting(settings(), ["db_proxy"]):
        pass
    with pytest.raises(CannotStart, match=r"SENTRY_DSN.*buydesk\[sentry\]"):
        async with error_reporting(settings(sentry_dsn=DSN), ["db_proxy"]):
            pass


@pytest.mark.usefixtures("without_package")
@pytest.mark.parametrize("command", [["serve", "db_proxy"], ["up"]])
def test_the_command_says_in_one_line_what_to_install(command: list[str]) -> None:
    ended = CliRunner().invoke(main, command, env={"SENTRY_DSN": DSN, **shared_env()})
    assert ended.exit_code == 2
    assert ended.output.splitlines() == [
        "buydesk: SENTRY_DSN is set, but sentry-sdk is not installed: install buydesk[sentry], or unset SENTRY_DSN"
    ]
