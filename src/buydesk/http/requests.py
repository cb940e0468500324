"""Requests: what a service reads of one. Whatever is not as it has to be raises an error that names the member."""

import codecs
import hmac
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, unquote, urlsplit

from fastapi import Request as StarletteRequest
from multidict import MultiDict

from buydesk.clients.model import Caller
from buydesk.clients.rates import Rate
from buydesk.errors import InvalidRequest, Unauthorized, UnsupportedMediaType
from buydesk.hosts import Address, caller_address

if TYPE_CHECKING:
    from buydesk.http.protocol import Incoming

Headers = MultiDict[str]

BODY_BYTES_MAX = 16 * 1024
# What a body begins with that was not written as plain UTF-8.
_BEGINNINGS = (
    (codecs.BOM_UTF8, "starts with a byte order mark"),
    (codecs.BOM_UTF16_LE, "starts with a byte order mark of UTF-16 or UTF-32"),
    (codecs.BOM_UTF16_BE, "starts with a byte order mark of UTF-16"),
    (codecs.BOM_UTF32_BE, "starts with a byte order mark of UTF-32"),
    (b"\x1f\x8b", "is compressed by gzip"),
)
# More parameters than any route has: each that is wrong would be named.
_PARAMETERS_MAX = 100


def read_headers(raw: Iterable[tuple[bytes, bytes]]) -> Headers:
    """Names in lower case, values in Latin-1, without the blanks around them."""
    return MultiDict((name.decode("latin-1").lower(), value.decode("latin-1").strip(" \t")) for name, value in raw)


class Request:
    """One request, of which the server has read the head.

    `path` is decoded, `query` is not; `authority` is the host of a request that names it in its first line; `parameter`
    is what stands in the place of the route's one path parameter; `caller` is who calls, on a route that needs a scope,
    and `rate` how it stands there, where that is limited. The body has to come within `seconds_max`.
    """

    caller: Caller

    __slots__ = (
        "_incoming",
        "_is_of_proxy",
        "_peer",
        "_seconds_max",
        "authority",
        "caller",
        "headers",
        "method",
        "parameter",
        "path",
        "query",
        "rate",
        "version",
    )

    def __init__(
        self, incoming: "Incoming", headers: Headers, seconds_max: float, *, peer: Address | None, is_of_proxy: bool
    ) -> None:
        target = incoming.target.decode("latin-1")
        self.authority = ""
        if not target.startswith("/"):
            try:
                self.authority, path, query = urlsplit(target)[1:4]
            except ValueError:  # no host that could be admitted
                self.authority, path, query = target, "/", ""
            target = f"{path or '/'}?{query}" if self.authority else target
        path, _, self.query = target.partition("?")
        self.path = unquote(path) if "%" in path else path
        self.method = incoming.method
        self.version = incoming.version
        self.headers = headers
        self.parameter = ""
        self.rate: Rate | None = None
        self._incoming = incoming
        self._seconds_max = seconds_max
        self._peer = peer
        self._is_of_proxy = is_of_proxy

    @property
    def address(self) -> Address | None:
        """Where the request comes from: the peer or, if that is a proxy of BUYDESK_PROXIES, the last address that it
        says was before it (X-Forwarded-For); None when it says none."""
        if not self._is_of_proxy:
            return self._peer
        said = self.headers.getall("x-forwarded-for", [""])[-1].rpartition(",")[2].strip()
        try:
            return caller_address(said)
        except ValueError:
            return None

    async def body(self, bytes_max: int = BODY_BYTES_MAX) -> bytes:
        """The body; raises PayloadTooLarge, RequestTimeout and, for one that breaks off, InvalidHttp."""
        return await self._incoming.read(self.headers, bytes_max, self._seconds_max)


def require_json(request: Request) -> None:
    """Raises UnsupportedMediaType unless the body says that it is JSON, and not compressed."""
    if "content-encoding" in request.headers:
        coding = (request.headers.get("content-encoding") or "").strip().lower()
        if coding != "identity":
            raise UnsupportedMediaType(f"Content-Encoding {coding[:100]} is not taken here; send the body plain.")
    said = request.headers.get("content-type") or ""
    if said == "application/json":
        return
    media_type = said.partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise UnsupportedMediaType(f"The content type must be application/json, not {media_type[:100] or 'missing'}.")


def require_utf8(body: bytes) -> None:
    """Raises InvalidRequest, in words that help, for what begins as no JSON in UTF-8 does."""
    if body[:2].isascii() and 0 not in body[:2]:  # as every JSON object in UTF-8, and hardly anything else
        return
    for mark, text in _BEGINNINGS:
        if body.startswith(mark):
            raise InvalidRequest.of("body", f"{text}; send plain UTF-8")
    if 0 in body[:2]:
        raise InvalidRequest.of("body", "is in UTF-16 or UTF-32; send plain UTF-8")


def require_token(
    request: Request | StarletteRequest,
    tokens: tuple[str, ...],
    detail: str = "This path is for the desk's own services: show the token for it.",
) -> None:
    """Raises Unauthorized, with the detail, unless the request shows one of the tokens."""
    shown = (request.headers.get("authorization") or "").encode()
    if True not in [hmac.compare_digest(shown, f"Bearer {token}".encode()) for token in tokens]:  # always asks all
        raise Unauthorized(detail)


def single_parameters(request: Request | StarletteRequest, known: Collection[str]) -> dict[str, str]:
    """The query parameters; raises InvalidRequest naming each that is unknown or given twice."""
    reasons: list[tuple[str, str]] = []
    found: dict[str, str] = {}
    query = request.query if isinstance(request, Request) else request.url.query
    if query.count("&") >= _PARAMETERS_MAX:
        raise InvalidRequest.of("query", f"may have at most {_PARAMETERS_MAX} parameters")
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in known:
            reasons.append((name[:100], f"is not a parameter here; these are: {', '.join(known)}"))
        elif name in found:
            reasons.append((name, "is given more than once"))
        found[name] = value
    if reasons:
        raise InvalidRequest.of_all(list(dict.fromkeys(reasons)))
    return found
