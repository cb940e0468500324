"""Reports over HTTP: how one is read from a request, which are asked for, and how both are documented."""

import re

from buydesk.errors import InvalidRequest, RateLimited, ReportsUnavailable, Unauthorized
from buydesk.http.examples import EXAMPLE_STATUS
from buydesk.http.members import Member, body_schema, json_members, read_members, unknown, whole_number
from buydesk.http.openapi import operation
from buydesk.observability import reports as health
from buydesk.observability.reports import Level, Report
from buydesk.prices.documents import document_of
from buydesk.reading import Number, is_text
from buydesk.topology import SERVICES

# Of all who report without the token together. One more costs this process up to 0.5 ms and Redis 9 KB, a refusal 6 us;
# and what a flood does not fill, an honest stranger's report stays in for longer.
STRANGERS_PER_SECOND_MAX = 10
STRANGERS_AT_ONCE_MAX = 100
_ALIASES: dict[str, Level] = {level: level for level in health.LEVELS} | {"warn": "warning"}
_SERVICE_NAME = re.compile(r"[!-~]{1,64}")
_STATUS = re.compile(r"[0-9]{1,3}")


def _level(value: object) -> Level:
    level = _ALIASES.get(value.lower()) if is_text(value) else None
    if level is None:
        raise ValueError(f"must be one of {', '.join(health.LEVELS)}")
    return level


def _service(value: object) -> str:
    if not is_text(value) or not _SERVICE_NAME.fullmatch(value):
        raise ValueError("must be text of 1 to 64 visible ASCII characters")
    return value


def _status(value: object) -> int:
    """The status, a number or digits in text. To JSON, 200.0 is the same number as 200."""
    text = re.sub(r"\.0+$", "", value) if isinstance(value, Number) else value
    if not isinstance(text, str) or not _STATUS.fullmatch(text):
        raise ValueError("must be a whole number from 0 to 999")
    return int(text)


def _data(value: object) -> str:
    # JSON can escape a lone surrogate, but no answer could carry it.
    if not is_text(value) or any("\ud800" <= char <= "\udfff" for char in value):
        raise ValueError("must be Unicode text")
    if len(value) > health.DATA_CHARS_MAX:
        raise ValueError(f"must not be longer than {health.DATA_CHARS_MAX} characters")
    return value


_LEVEL = Member(
    "level",
    _level,
    {"type": "string", "enum": list(_ALIASES), "description": "Any letter case; `warn` is `warning`."},
    is_required=True,
)
_SERVICE = Member("service", _service, {"type": "string", "pattern": "^[!-~]{1,64}$"}, is_required=True)
_STATUS_SCHEMA = {
    "oneOf": [{"type": "integer", "minimum": 0, "maximum": 999}, {"type": "string", "pattern": "^[0-9]{1,3}$"}]
}
REPORT_MEMBERS = (
    _LEVEL,
    _SERVICE,
    Member("status", _status, _STATUS_SCHEMA, is_required=True),
    Member("data", _data, {"type": "string", "maxLength": health.DATA_CHARS_MAX}, is_required=True),
)
FILTER = (
    _SERVICE._replace(description="Only of this service.", is_required=False),
    _LEVEL._replace(description="Only of this level.", is_required=False),
    whole_number("limit", "At most this many.", 1000, default=100),
)


def parse_report(body: bytes) -> Report:
    """The report that a JSON body is; raises InvalidRequest naming every member that is wrong."""
    given = json_members(body)
    reasons = unknown(given, REPORT_MEMBERS, "a report")
    found = read_members(given, REPORT_MEMBERS, reasons)
    if reasons:
        raise InvalidRequest.of_all(reasons)
    return Report(**found)


_AT = "2026-01-31T09:05:00.000000Z"
_EXAMPLE = {"level": "info", "service": "db_proxy", "status": 200, "data": "ready"}
_KEPT_EXAMPLE = {**_EXAMPLE, "verified": True, "arrived_at": _AT}
POST_REPORT = operation(
    "Report something",
    ("Kept", {"status": "ok"}),
    errors=(Unauthorized, RateLimited, ReportsUnavailable),
    description="Anybody may. With `Authorization: Bearer <reporting token>`, as the desk's own services do, it is "
    f"kept as `verified`. All others are kept apart, the last {health.STRANGERS_KEPT_MAX} of them, change the state of "
    f"no service of the desk, and are taken {STRANGERS_PER_SECOND_MAX} a second, {STRANGERS_AT_ONCE_MAX} at once. What "
    "cannot be seen in `data`, but for blanks, tabs and ends of lines, is kept written out, as `\\u202e`.",
    body={"schema": body_schema(REPORT_MEMBERS), "example": _EXAMPLE},
)
GET_REPORTS = operation(
    "What was reported, newest first",
    ("The newest reports", {"data": [_KEPT_EXAMPLE]}),
    errors=(InvalidRequest, ReportsUnavailable),
    query=FILTER,
)
GET_STATUS = operation(
    "How the desk is",
    (
        "How every part is",
        {
            "status": "ok",
            "at": _AT,
            "services": {
                name: {"state": "alive", "last_report": _KEPT_EXAMPLE | {"service": name}} for name in SERVICES
            },
            "reports": {"ok": True},
            "database": {"ok": True, "detail": "reachable"},
            "redis": {"ok": True, "detail": "not configured, kept in memory"},
            "price": {
                "ok": True,
                "age_seconds": 4.2,
                "as_of": "2026-01-31T09:04:55.800000Z",
                "expires_at": "2026-01-31T09:05:55.800000Z",
                "missing": {},
            },
            "sources": {"ok": True, **document_of(EXAMPLE_STATUS), "level": "warning"},
            "host": {
                "ok": True,
                "cpu_percent": 12.5,
                "cpus": 2,
                "load": [0.31, 0.22, 0.18],
                "memory": {"total": 8_323_604_480, "available": 5_811_998_720, "percent": 30.2},
                "disk": {"total": 53_687_091_200, "free": 41_204_572_160, "percent": 23.3},
            },
        },
    ),
    errors=(InvalidRequest,),
    description="Always answers 200: `status` is `ok` when every part is and all eight services are `alive`, "
    "otherwise `degraded`. A part that is not `ok` says why. A service is `unknown` while nothing was heard of it "
    "since the reports were lost, or while they cannot be read; only `verified` reports tell its state. Of names that "
    "are not the desk's the last reports are shown too, and change no `status`. Of the `sources` one that is down is a "
    "`warning`; when they prove no price it is `critical`, and `problem` says why. The `price` is `ok` while there is "
    "one in some currency; `missing` says, by currency, why there is none in another.",
)
