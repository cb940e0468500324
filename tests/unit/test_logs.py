"""Logs: what a line holds on a terminal and elsewhere, and that no password is in it."""

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator
from datetime import datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buydesk.clients.keys import new_key
from buydesk.observability import logs
from buydesk.times import utc_now


class Stdout(io.StringIO):
    """What a process writes, on a terminal or not."""

    def __init__(self, *, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


@contextlib.contextmanager
def configured(level: str = "INFO", *, json: bool | None = None, terminal: bool = False) -> Iterator[Stdout]:
    """What is logged within; leaves the session's logging as it was, pytest's own handlers included."""
    root, written = logging.getLogger(), Stdout(terminal=terminal)
    before = root.level, root.handlers
    root.handlers = []  # `configure` closes those it finds
    try:
        with contextlib.redirect_stdout(written):
            logs.configure(level, json)
        yield written
    finally:
        logging.captureWarnings(False)
        root.setLevel(before[0])
        root.handlers = before[1]


def is_recent(text: object) -> bool:
    return (
        isinstance(text, str) and text.endswith("Z") and utc_now() - datetime.fromisoformat(text) < timedelta(minutes=1)
    )


def test_line_is_json_where_stdout_is_no_terminal() -> None:
    with configured() as stdout:
        logging.getLogger("buydesk.services.db_proxy").warning("The %s is late", "pool", extra={"seconds": 3})
    line = json.loads(stdout.getvalue())
    assert is_recent(line.pop("time"))
    assert line == {
        "level": "WARNING",
        "logger": "buydesk.services.db_proxy",
        "message": "The pool is late",
        "seconds": 3,
    }


def log_failure(text: str) -> None:
    try:
        raise ValueError(text)
    except ValueError:
        logging.getLogger("buydesk").exception("Failed")


def test_json_line_has_the_exception() -> None:
    with configured() as stdout:
        log_failure("no such thing\nat all")
    lines = stdout.getvalue().splitlines()
    assert len(lines) == 1
    assert json.loads(lines[0])["exception"].endswith("ValueError: no such thing\nat all")


def test_line_is_text_on_a_terminal() -> None:
    with configured(terminal=True) as stdout:
        logging.getLogger("buydesk").info("Ready at %s", "8001")
    moment, rest = stdout.getvalue().split(" ", 1)
    assert is_recent(moment)
    assert rest == "INFO     buydesk: Ready at 8001\n"


def test_line_on_a_terminal_is_one_line_and_steers_nothing() -> None:
    with configured(terminal=True) as stdout:
        logging.getLogger("buydesk").info("a\nb\x1b[31m\ud800₿")
    assert stdout.getvalue().endswith("buydesk: a\\nb\\x1b[31m\\ud800₿\n")
    assert stdout.getvalue().count("\n") == 1


def test_text_has_the_traceback_below_the_line() -> None:
    with configured(terminal=True) as stdout:
        log_failure("no such thing")
    lines = stdout.getvalue().splitlines()
    assert lines[0].endswith("ERROR    buydesk: Failed")
    assert lines[-1] == "ValueError: no such thing"


@pytest.mark.parametrize("as_json", [True, False])
def test_shape_can_be_asked_for_whatever_stdout_is(as_json: bool) -> None:
    with configured(json=as_json, terminal=as_json) as stdout:
        logging.getLogger("buydesk").info("Ready")
    assert stdout.getvalue().startswith("{") is as_json


def test_nothing_below_the_level_is_logged() -> None:
    with configured("WARNING") as stdout:
        logging.getLogger("buydesk").info("Ready")
    assert stdout.getvalue() == ""


def test_warnings_of_python_are_logged() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with configured() as stdout:
            warnings.warn("getting old", FutureWarning, stacklevel=1)
    assert json.loads(stdout.getvalue())["logger"] == "py.warnings"


def test_configuring_twice_logs_once() -> None:
    with configured() as stdout, contextlib.redirect_stdout(stdout):
        logs.configure("INFO")
        logging.getLogger("buydesk").info("Ready")
    assert len(stdout.getvalue().splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("at postgresql://desk:s3cret@db:5432/desk now", "at postgresql://desk:***@db:5432/desk now"),
        ("redis://:s3cret@cache:6379/0", "redis://:***@cache:6379/0"),
        ("redis://:s3@cr:et@cache/0", "redis://:***@cache/0"),
        ("redis://:my@pass:s3cret/x@cache:6379/0", "redis://:***@cache:6379/0"),
        ("REDISS://us@er:s3/cr?e#t@cache, me@home", "REDISS://us@er:***@cache, me@home"),
        ("postgresql://u:s3cret/@[::1]:5432/x", "postgresql://u:***@[::1]:5432/x"),
        ("postgresql://u@db:5432/x?host=a", "postgresql://u@db:5432/x?host=a"),
        ("postgresql://u@db/x?sslpassword=s3cret", "postgresql://u@db/x?sslpassword=***"),
        ('("postgres://u:s3cret@a/x", "redis://:s3cret@b")', '("postgres://u:***@a/x", "redis://:***@b")'),
        ("unix:///run/redis.sock?db=0&password=s3cret&x=1", "unix:///run/redis.sock?db=0&password=***&x=1"),
        ("http://127.0.0.1:8050/report", "http://127.0.0.1:8050/report"),
        ("http://127.0.0.1:8050/mail/me@home", "http://127.0.0.1:8050/mail/me@home"),
        ("EUR:69.00 by me@home", "EUR:69.00 by me@home"),
        ("bd_test_0dq4VmB9xK, bd_live_0dq4VmB9xKs3cret.", "bd_test_0dq4VmB9xK, bd_live_0dq4VmB9xK***."),
    ],
)
def test_passwords_in_urls_are_masked_and_nothing_else(text: str, shown: str) -> None:
    assert logs.redacted(text) == shown


@pytest.mark.parametrize("livemode", [True, False])
def test_of_a_client_s_key_nothing_but_its_id_is_shown(livemode: bool) -> None:
    key = new_key(livemode=livemode)
    shown = logs.redacted(f"Authorization: Bearer {key.text}\n")
    assert shown == f"Authorization: Bearer {key.text[:8]}{key.id}***\n"


@pytest.mark.parametrize("as_json", [True, False])
def test_no_line_shows_a_password(as_json: bool) -> None:
    url = "redis://:s3cret@cache:6379"
    with configured(json=as_json) as stdout:
        log_failure(f"no way to {url}")
        logging.getLogger("buydesk").error("%s failed", url, extra={"urls": [url]})
    assert "no way to redis://:***@cache" in stdout.getvalue()
    assert "redis://:***@cache:6379 failed" in stdout.getvalue()
    assert "s3cret" not in stdout.getvalue()


@given(
    st.sampled_from(["x", "redis", "postgresql"]),
    st.text(alphabet=st.sampled_from('ab:/@?&="\\\n password') | st.characters()),
    st.text(),
)
def test_masking_never_breaks_a_json_line(scheme: str, message: str, name: str) -> None:
    record = logging.LogRecord(
        "buydesk", logging.INFO, __file__, 1, "%s", (f"{scheme}://{message}@?password={name}",), None
    )
    line = logs._JsonLines().format(record)
    assert "\n" not in line
    assert json.loads(line)["logger"] == "buydesk"
