"""Reports over HTTP: how one is read from a request, which are asked for, and how both are documented."""

import json
import re
from collections.abc import Mapping
from typing import cast

from buydesk.errors import (
    InvalidRequest,
    PayloadTooLarge,
    RateLimited,
    ReportsUnavailable,
    Unauthorized,
    UnsupportedMediaType,
)
from buydesk.http.examples import EXAMPLE_STATUS
from buydesk.http.openapi import error_responses, response_example
from buydesk.http.requests import require_utf8
from buydesk.observability import reports as health
from buydesk.observability.reports import Level, Report
from buydesk.prices.documents import feed_status_document
from buydesk.topology import SERVICES

REPORTS_LIMIT = 100
REPORTS_LIMIT_MAX = 1000
# Of all who report without the token together. One more costs this process up to 0.5 ms and Redis 9 KB, a refusal 6 us;
# and what a flood does not fill, an honest stranger's report stays in for longer.
STRANGERS_PER_SECOND_MAX = 10
STRANGERS_AT_ONCE_MAX = 100
_MEMBERS = ("level", "service", "status", "data")
_ALIASES: dict[Level, str] = {"warning": "warn"}
_SERVICE_NAME = re.compile(r"[!-~]{1,64}")
_STATUS = re.compile(r"[0-9]{1,3}")
_LIMIT = re.compile(r"[0-9]{1,4}")


def parse_report(body: bytes) -> Report:
    """The report that a JSON body is; raises InvalidRequest naming every member that is wrong."""
    require_utf8(body)
    try:
        # Objects as tuples of pairs: a repeated member shows, and no array looks like an object.
        pairs = json.loads(body, object_pairs_hook=tuple)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest.of("body", "must be JSON") from error
    if not isinstance(pairs, tuple):
        raise InvalidRequest.of("body", "must be a JSON object")
    names = [cast("str", name) for name, _ in pairs]
    members: dict[str, object] = dict(pairs)
    reasons = [(_shown(name), "is not a member of a report") for name in members if name not in _MEMBERS]
    reasons += [(name, "is given more than once") for name in _MEMBERS if names.count(name) > 1]
    reasons += [(name, "is missing") for name in _MEMBERS if name not in members]
    level = _level(members.get("level"))
    service = _service(members.get("service"))
    status = _status(members.get("status"))
    data = members.get("data")
    wrong = (
        ("level", f"must be one of {', '.join(health.LEVELS)}", level is None),
        ("service", "must be text of 1 to 64 visible ASCII characters", service is None),
        ("status", "must be a whole number from 0 to 999", status is None),
        ("data", "must be Unicode text", not isinstance(data, str) or not _is_unicode(data)),
        (
            "data",
            f"must not be longer than {health.DATA_CHARS_MAX} characters",
            isinstance(data, str) and len(data) > health.DATA_CHARS_MAX,
        ),
    )
    reasons += [(name, reason) for name, reason, is_wrong in wrong if is_wrong and name in members]
    if reasons:
        raise InvalidRequest.of_all(reasons)
    return Report(cast("Level", level), cast("str", service), cast("int", status), cast("str", data))


def parse_filter(parameters: Mapping[str, str]) -> tuple[str | None, Level | None, int]:
    service, level = _service(parameters.get("service")), _level(parameters.get("level"))
    limit_text = parameters.get("limit", str(REPORTS_LIMIT))
    limit = int(limit_text) if _LIMIT.fullmatch(limit_text) else 0
    wrong = (
        ("service", "must be 1 to 64 visible ASCII characters", "service" in parameters and service is None),
        ("level", f"must be one of {', '.join(health.LEVELS)}", "level" in parameters and level is None),
        ("limit", f"must be a whole number from 1 to {REPORTS_LIMIT_MAX}", not 1 <= limit <= REPORTS_LIMIT_MAX),
    )
    reasons = [(name, reason) for name, reason, is_wrong in wrong if is_wrong]
    if reasons:
        raise InvalidRequest.of_all(reasons)
    return service, level, limit


def _level(value: object) -> Level | None:
    """The level, written in any letter case; `warn` is `warning`, as in many programs' logs."""
    name = value.lower() if isinstance(value, str) else ""
    return next((level for level in health.LEVELS if name in (level, _ALIASES.get(level))), None)


def _service(value: object) -> str | None:
    return value if isinstance(value, str) and _SERVICE_NAME.fullmatch(value) else None


def _status(value: object) -> int | None:
    """The status, a number or digits in text. To JSON, 200.0 is the same number as 200."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | str):
        return None
    # A number is not written out before it is known to be short: that of a very long one fails.
    text = value if isinstance(value, str) else str(value) if 0 <= value <= 999 else ""
    return int(text) if _STATUS.fullmatch(text) else None


def _is_unicode(text: str) -> bool:
    """False for a lone surrogate: JSON can escape one, but no answer could carry it."""
    return not any("\ud800" <= char <= "\udfff" for char in text)


def _shown(name: str) -> str:
    return name[:100].encode("utf-8", "replace").decode()


def _parameter(name: str, schema: Mapping[str, object], description: str) -> dict[str, object]:
    return {"name": name, "in": "query", "description": description, "schema": schema}


_AT = "2026-01-31T09:05:00.000000Z"
_SOURCES_EXAMPLE = {"ok": True, **feed_status_document(EXAMPLE_STATUS), "level": "warning"}
_EXAMPLE = {"level": "info", "service": "db_proxy", "status": 200, "data": "ready"}
_KEPT_EXAMPLE = {**_EXAMPLE, "verified": True, "arrived_at": _AT}
_LEVEL_SCHEMA = {
    "type": "string",
    "enum": [*health.LEVELS, *_ALIASES.values()],
    "description": "Any letter case; `warn` is `warning`.",
}
_SERVICE_SCHEMA = {"type": "string", "pattern": "^[!-~]{1,64}$"}
POST_REPORT = {
    "summary": "Report something",
    "description": "Anybody may. With `Authorization: Bearer <reporting token>`, as the desk's own services do, it is "
    f"kept as `verified`. All others are kept apart, the last {health.STRANGERS_KEPT_MAX} of them, change the state of "
    f"no service of the desk, and are taken {STRANGERS_PER_SECOND_MAX} a second, {STRANGERS_AT_ONCE_MAX} at once. What "
    "cannot be seen in `data`, but for blanks, tabs and ends of lines, is kept written out, as `\\u202e`.",
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": list(_MEMBERS),
                    "additionalProperties": False,
                    "properties": {
                        "level": _LEVEL_SCHEMA,
                        "service": _SERVICE_SCHEMA,
                        "status": {
                            "oneOf": [
                                {"type": "integer", "minimum": 0, "maximum": 999},
                                {"type": "string", "pattern": "^[0-9]{1,3}$"},
                            ]
                        },
                        "data": {"type": "string", "maxLength": health.DATA_CHARS_MAX},
                    },
                },
                "example": _EXAMPLE,
            }
        },
    },
    "responses": response_example("Kept", {"status": "ok"})
    | error_responses(
        InvalidRequest, PayloadTooLarge, UnsupportedMediaType, Unauthorized, RateLimited, ReportsUnavailable
    ),
}
GET_REPORTS = {
    "summary": "What was reported, newest first",
    "parameters": [
        _parameter("service", _SERVICE_SCHEMA, "Only of this service."),
        _parameter("level", _LEVEL_SCHEMA, "Only of this level."),
        _parameter(
            "limit",
            {"type": "integer", "minimum": 1, "maximum": REPORTS_LIMIT_MAX, "default": REPORTS_LIMIT},
            "At most this many.",
        ),
    ],
    "responses": response_example("The newest reports", {"data": [_KEPT_EXAMPLE]})
    | error_responses(InvalidRequest, ReportsUnavailable),
}
GET_STATUS = {
    "summary": "How the desk is",
    "description": "Always answers 200: `status` is `ok` when every part is and all six services are `alive`, "
    "otherwise `degraded`. A part that is not `ok` says why. A service is `unknown` while nothing was heard of it "
    "since the reports were lost, or while they cannot be read; only `verified` reports tell its state. Of names that "
    "are not the desk's the last reports are shown too, and change no `status`. Of the `sources` one that is down is a "
    "`warning`; "
    "when they prove no price it is `critical`, and `problem` says why.",
    "responses": response_example(
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
            },
            "sources": _SOURCES_EXAMPLE,
            "host": {
                "ok": True,
                "cpu_percent": 12.5,
                "cpus": 2,
                "load": [0.31, 0.22, 0.18],
                "memory": {"total": 8_323_604_480, "available": 5_811_998_720, "percent": 30.2},
                "disk": {"total": 53_687_091_200, "free": 41_204_572_160, "percent": 23.3},
            },
        },
    )
    | error_responses(InvalidRequest),
}
