"""Responses: JSON by msgspec, errors as problem+json (RFC 9457)."""

import time
from collections.abc import AsyncGenerator, Sequence
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus

import msgspec
from fastapi import Response
from starlette.responses import JSONResponse

from buydesk.clients.rates import Rate, rate_of
from buydesk.errors import DeskError, InsufficientScope, MethodNotAllowed, RateLimited, Unauthorized, problem

PROBLEM_TYPE = "application/problem+json"
encode = msgspec.json.encode


class JSONBytesResponse(Response):
    """An answer whose headers are bytes already: made in a quarter of the time that a Response takes."""

    def __init__(self, body: bytes, status: int = 200, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
        self.body = body
        self.status_code = status
        self.background = None
        self.raw_headers = list(headers)
        if status != HTTPStatus.NOT_MODIFIED:
            self.raw_headers += [(b"content-length", b"%d" % len(body)), (b"content-type", b"application/json")]


class StreamedResponse(Response):
    """An answer that comes in parts and ends with its connection; nobody knows beforehand how long it is."""

    def __init__(self, parts: AsyncGenerator[bytes], media_type: str) -> None:
        self.parts = parts
        self.body = b""
        self.status_code = 200
        self.background = None
        self.media_type = media_type
        self.raw_headers = [(b"content-type", media_type.encode()), (b"cache-control", b"no-store")]


class MsgspecResponse(JSONResponse):
    """JSON by msgspec: compact UTF-8, members in the order given."""

    def render(self, content: object) -> bytes:
        return encode(content)


_PRIVATE = ((b"cache-control", b"private, no-cache"), (b"vary", b"Authorization"))


def keep_private(response: Response) -> None:
    """Adds what keeps an answer to one caller, a refusal too, from being kept for another, unless it says so itself."""
    said = [name for name, _ in response.raw_headers]
    response.raw_headers += [(name, value) for name, value in _PRIVATE if name not in said]


def tell_rate(response: Response, rate: Rate) -> None:
    """Adds how the caller stands (draft-ietf-httpapi-ratelimit-headers-11): its quota for 60 s, what is left of it, and
    in how many seconds that is more."""
    kind = rate.kind.encode()
    response.raw_headers += [
        (b"ratelimit-policy", b'"%b";q=%d;w=60' % (kind, rate.per_minute)),
        (b"ratelimit", b'"%b";r=%d;t=%d' % (kind, rate.left, rate.seconds)),
    ]


def problem_response(error: DeskError, instance: str) -> Response:
    """The error as application/problem+json, with the headers that go with it."""
    headers = {}
    if error.retry_after_seconds is not None:
        headers["Retry-After"] = str(error.retry_after_seconds)
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, InsufficientScope):
        headers["WWW-Authenticate"] = f'Bearer error="{error.code}", scope="{error.facts["scope"]}"'
    if isinstance(error, MethodNotAllowed):
        headers["Allow"] = str(error.facts["allow"])
    response = Response(encode(problem(error, instance)), error.status, headers, PROBLEM_TYPE)
    if isinstance(error, RateLimited) and (rate := rate_of(error)) is not None:
        tell_rate(response, rate)
    return response


_STATUS_LINES = {each.value: f"HTTP/1.1 {each.value} {each.phrase}\r\n".encode() for each in HTTPStatus}
# On every answer, and on every one that is no page: a page says itself what it needs.
_EVERY_ANSWER = b"x-content-type-options: nosniff\r\nx-frame-options: DENY\r\n"
_NO_PAGE = b"content-security-policy: default-src 'none'; frame-ancestors 'none'\r\n"


@lru_cache(maxsize=1)
def _date_line(second: int) -> bytes:
    """The time as a header tells it, written once a second."""
    return f"date: {formatdate(second, usegmt=True)}\r\n".encode()


def serialize(response: Response, request_id: str, *, is_last: bool, is_head: bool = False) -> bytes:
    """The bytes of a whole answer, whose headers are our own."""
    lines = [b"%b: %b\r\n" % each for each in response.raw_headers]
    if response.media_type != "text/html":
        lines.append(_NO_PAGE)
    if is_last:
        lines.append(b"connection: close\r\n")
    body = b"" if is_head else response.body
    end = b"x-request-id: %b\r\n\r\n" % request_id.encode()
    return b"".join(
        (_STATUS_LINES[response.status_code], _date_line(int(time.time())), *lines, _EVERY_ANSWER, end, body)
    )
