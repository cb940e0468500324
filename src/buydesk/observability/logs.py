"""Logs: everything goes to stdout, as JSON lines or, on a terminal, as text; without passwords and clients' keys.

A line that is written while a request is worked on names that request's id.
"""

import logging
import re
import sys
from datetime import UTC, datetime
from typing import Any

from pythonjsonlogger.json import JsonFormatter

from buydesk.observability import request_ids
from buydesk.times import format_time

# The password of a URL ends at the last @ before the path, and at the last @ of all in the URL of a database, whose
# path has none: a password with a bare @ or / in it is hidden as a whole.
_SERVER_PASSWORD = re.compile(r"((?:redis|rediss|unix|postgres|postgresql)://[^\s:]*):\S*@", re.IGNORECASE)
_URL_PASSWORD = re.compile(r"(://[^\s/:@]*):[^\s/]*@")
# Of a client's key its id is no secret (clients/keys.py).
_KEY = re.compile(r"(bd_(?:test|live)_[0-9A-Za-z]{10})[0-9A-Za-z]+")
_QUERY_PASSWORD = re.compile(r"([?&]\w*password=)[^\s&#'\"\\]*", re.IGNORECASE)


def redacted(text: str) -> str:
    """The text with the passwords of its URLs and the secrets of clients' keys replaced by `***`."""
    for password in (_SERVER_PASSWORD, _URL_PASSWORD):
        text = password.sub(r"\1:***@", text)
    return _KEY.sub(r"\1***", _QUERY_PASSWORD.sub(r"\1***", text))


def request_id_of(record: logging.LogRecord) -> str | None:
    """The id of the request that the record is about: one that was given as `extra`, otherwise that of the task that
    logs. To be asked where it is logged, in that task."""
    given: str | None = getattr(record, "request_id", None)
    return given or request_ids.current()


def service_of(logger: str) -> str:
    """The service that a logger is named after (`buydesk.services.<service>`), "" for another one."""
    package, _, rest = logger.partition("buydesk.services.")
    return "" if package else rest.partition(".")[0]


def configure(level: str, json: bool | None = None) -> None:
    """Sends all logs of this process from `level` up to stdout; as JSON unless stdout is a terminal, or as `json` says.

    Replaces every handler of the root logger, so further ones are added afterwards.
    """
    as_json = not sys.stdout.isatty() if json is None else json
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_JsonLines() if as_json else _Text())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.captureWarnings(True)


class _JsonLines(JsonFormatter):
    """One JSON object a line: time, level, logger, message, request_id, what was given as `extra`, exception."""

    def __init__(self) -> None:
        super().__init__(
            ["asctime", "levelname", "name", "message"],
            rename_fields={"asctime": "time", "levelname": "level", "name": "logger", "exc_info": "exception"},
        )

    def add_fields(self, log_data: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]) -> None:
        super().add_fields(log_data, record, message_dict)
        if request_id := request_id_of(record):
            log_data["request_id"] = request_id

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802  # logging's name
        return _time_of(record)

    def format(self, record: logging.LogRecord) -> str:
        # Members are separated by blanks, which no password has: masking the line cannot reach from one into the next.
        return redacted(super().format(record))


class _Text(logging.Formatter):
    """One line for a person; an exception's traceback below it."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's name
        # Clients' text may be in it: it must neither break the line nor steer the terminal.
        message = escaped(record.message)
        request_id = request_id_of(record)
        about = record.name if request_id is None else f"{record.name} [{request_id}]"
        return f"{_time_of(record)} {record.levelname:<8} {about}: {message}"

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


def _time_of(record: logging.LogRecord) -> str:
    return format_time(datetime.fromtimestamp(record.created, UTC))


def escaped(text: str, but: str = "") -> str:
    """The text with every character that shows nothing of itself, or steers what shows it, written out as Python does
    (`\\x9b`, `\\u202e`), except those of `but`. A text that was written out once stays as it is."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in but else repr(char)[1:-1] for char in text)
