"""What every service shares: the app shell, problem+json, /, /docs, /livez, /readyz and /metrics.

A service is a FastAPI app. Its own routes are called directly with a `Request` (`add_direct_route`): the handling of
requests by FastAPI and Starlette costs more than placing an order does. What FastAPI routes (typed reads, the files of
/docs) is called by ASGI. A request's head has been read (`connections.py`) when `Service.respond` is called.
"""

import asyncio
import codecs
import contextlib
import hmac
import logging
import math
import re
import time
from base64 import b64encode
from bisect import bisect_left
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import cache, partial
from hashlib import sha256
from http import HTTPStatus
from importlib.resources import files
from itertools import accumulate
from typing import Any, NamedTuple, Protocol, cast
from urllib.parse import parse_qsl, unquote, urlsplit

import msgspec
from fastapi import FastAPI, Response
from fastapi import Request as StarletteRequest
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles
from starlette.types import Message

from buydesk import __version__
from buydesk.errors import (
    DeskError,
    InternalError,
    InvalidRequest,
    LedgerUnavailable,
    MethodNotAllowed,
    NotFound,
    NotReady,
    Overloaded,
    Unauthorized,
    UnsupportedMediaType,
    WrongMode,
    problem,
)
from buydesk.observability.reporter import Reporter

PROBLEM_TYPE = "application/problem+json"
BODY_BYTES_MAX = 16 * 1024
# What a body begins with that was not written as plain UTF-8.
_BEGINNINGS = (
    (codecs.BOM_UTF8, "starts with a byte order mark"),
    (codecs.BOM_UTF16_LE, "starts with a byte order mark of UTF-16 or UTF-32"),
    (codecs.BOM_UTF16_BE, "starts with a byte order mark of UTF-16"),
    (codecs.BOM_UTF32_BE, "starts with a byte order mark of UTF-32"),
    (b"\x1f\x8b", "is compressed by gzip"),
)
# More parameters than any route has: each that is wrong would be told.
_PARAMETERS_MAX = 100
_WHOLE_NUMBER = re.compile(r"[0-9]{1,9}", re.ASCII)
CHECK_SECONDS_MAX = 3.0
# However many ask for /metrics, writing it takes a twentieth of the time: no order is answered meanwhile.
METRICS_SHARE = 1 / 20
INTERNAL_SCHEME = "internal_token"
# The `security` of an OpenAPI operation that calls `require_token`.
INTERNAL: list[dict[str, list[str]]] = [{INTERNAL_SCHEME: []}]
_EVERY_SERVICE = "every service"
_ABOUT_IDS = (
    "Every answer has an `X-Request-Id`, by which the desk's logs and reports name the request: the one that came with "
    "it, if that is 1 to 64 letters, digits, `.`, `_` or `-`, otherwise a fresh one."
)

Json = Mapping[str, object]
Responses = dict[int | str, dict[str, Any]]
Check = Callable[[], Awaitable[None]]
Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]

encode = msgspec.json.encode


class Headers:
    """A request's headers: names in lower case, values in Latin-1, without the blanks around them."""

    __slots__ = ("_more", "_values")

    def __init__(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        self._values: dict[str, str] = {}
        self._more: dict[str, list[str]] = {}  # of those that came more than once: all
        for raw_name, raw_value in headers:
            name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1").strip(" \t")
            if name in self._values:
                self._more.setdefault(name, [self._values[name]]).append(value)
            else:
                self._values[name] = value

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def get(self, name: str) -> str | None:
        """The first value of a name in lower case."""
        return self._values.get(name)

    def get_all(self, name: str) -> list[str]:
        """All values of a name in lower case."""
        return self._more.get(name) or [self._values[name]] if name in self._values else []

    def items(self) -> Iterator[tuple[str, str]]:
        """Every name with every value of it."""
        return ((name, value) for name in self._values for value in self.get_all(name))


class Incoming(Protocol):
    """What the server has read of a request: its first line, and the body as it comes."""

    method: str
    target: bytes
    version: str

    async def read(self, headers: Headers, bytes_max: int, seconds_max: float) -> bytes: ...


class Request:
    """One request, of which the server has read the head.

    `path` is decoded, `query` is not; `authority` is the host of a request that names it in its first line; `parameter`
    is what stands in the place of the route's one path parameter. The body has to come within `seconds_max`.
    """

    __slots__ = ("_incoming", "_seconds_max", "authority", "headers", "method", "parameter", "path", "query", "version")

    def __init__(self, incoming: Incoming, headers: Headers, seconds_max: float) -> None:
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
        self._incoming = incoming
        self._seconds_max = seconds_max

    async def body(self, bytes_max: int = BODY_BYTES_MAX) -> bytes:
        """The body; raises PayloadTooLarge, RequestTimeout and, for one that breaks off, InvalidHttp."""
        return await self._incoming.read(self.headers, bytes_max, self._seconds_max)


Endpoint = Callable[[Request], Awaitable[Response]]


class Answer(Response):
    """An answer whose headers are bytes already: made in a quarter of the time that a Response takes."""

    def __init__(self, body: bytes, status: int = 200, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
        self.body = body
        self.status_code = status
        self.background = None
        self.raw_headers = list(headers)
        if status != HTTPStatus.NOT_MODIFIED:
            self.raw_headers += [(b"content-length", b"%d" % len(body)), (b"content-type", b"application/json")]


class FastJSON(JSONResponse):
    """JSON by msgspec: compact UTF-8, members in the order given."""

    def render(self, content: object) -> bytes:
        return encode(content)


class Traffic(Collector):
    """Counts what one service answers, for Prometheus. In plain numbers: everything runs in one thread, and the locks
    of prometheus_client's own counters cost each request as much as reading its JSON."""

    _SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

    def __init__(self, service: str) -> None:
        self._service = service
        self._answers: dict[tuple[str, str, int], int] = {}  # by method, path and status
        self._seconds: dict[str, list[float]] = {}  # by path: how many within each bound, beyond all, and the sum

    def count(self, method: str, path: str, status: int, seconds: float) -> None:
        """Counts one answer, given after so many seconds."""
        answered = method, path, status
        self._answers[answered] = self._answers.get(answered, 0) + 1
        buckets = self._seconds.get(path)
        if buckets is None:
            buckets = self._seconds[path] = [0.0] * (len(self._SECONDS) + 2)
        buckets[bisect_left(self._SECONDS, seconds)] += 1
        buckets[-1] += seconds

    def collect(self) -> Iterator[Metric]:
        """What prometheus_client asks for at every scrape."""
        answers = CounterMetricFamily(
            "buydesk_http_requests", "Answers given.", labels=["service", "method", "path", "status"]
        )
        for (method, path, status), count in self._answers.items():
            answers.add_metric([self._service, method, path, str(status)], count)
        yield answers
        seconds = HistogramMetricFamily("buydesk_http_seconds", "Time until the answer.", labels=["service", "path"])
        bounds = [*map(str, self._SECONDS), "+Inf"]
        for path, (*counts, total) in self._seconds.items():
            seconds.add_metric([self._service, path], list(zip(bounds, accumulate(counts), strict=True)), total)
        yield seconds


class Route(NamedTuple):
    """A route that is called directly; `path` is the documented one. One with a path parameter has it at the end,
    before `suffix`."""

    method: str
    path: str
    endpoint: Endpoint
    suffix: str = ""


class Service(FastAPI):
    """A service's app: its direct routes and, for all others, FastAPI. A documented path is taken with and without its
    trailing slash; what is answered is counted."""

    def __init__(self, name: str, summary: str) -> None:
        super().__init__(
            title=f"buydesk {name}",
            summary=summary,
            version=__version__,
            docs_url=None,
            redoc_url=None,
            openapi_url=None,
            redirect_slashes=False,
            default_response_class=FastJSON,
        )
        self.name = name
        self.running: Callable[[], AbstractAsyncContextManager[None]] = contextlib.nullcontext  # entered while it runs
        self.checks: dict[str, Check] = {}  # what /readyz asks, each by the name of what is missing when it raises
        # One registry a service, also when several run in one process.
        self.registry = registry = CollectorRegistry()
        self.operations: dict[str, dict[str, Json]] = {}  # by path and method: what FastAPI does not document itself
        self._direct: dict[tuple[str, str], Route] = {}  # by method and path, with and without its trailing slash
        self._with_parameter: dict[tuple[str, str], Route] = {}  # by method and what stands before the parameter
        self._log = logging.getLogger(f"buydesk.services.{name}")
        self._traffic = Traffic(name)
        registry.register(self._traffic)

    def add_direct_route(self, path: str, method: str, endpoint: Endpoint, operation: Json | None) -> None:
        """A route, documented by its OpenAPI operation object. Its path may end in one parameter: `/orders/{id}`."""
        if operation is not None:
            self.operations.setdefault(path, {})[method.lower()] = operation
        before, brace, after = path.partition("{")
        if brace:
            route = Route(method, path, endpoint, after.partition("}")[2])
            self._with_parameter[method, before] = route
        else:
            route = Route(method, path, endpoint)
            self._direct |= {(method, path): route, (method, path.rstrip("/")): route}

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document, with the direct routes in it."""
        return _openapi(self)

    async def respond(self, request: Request, admit: Callable[[Request], None]) -> Response:
        """The answer to a request, whatever happens; counted. `admit` raises what refuses it before anything else."""
        started = time.perf_counter()
        path = ""
        try:
            admit(request)
            route = self._direct.get((request.method, request.path)) or self._find(request)
            if route is None:
                asgi_path, path = self._known(request)
                response = await self._by_asgi(request, asgi_path)
            else:
                path = route.path
                response = await route.endpoint(request)
        except DeskError as error:
            response = problem_response(error, path or request.path)
        except Exception:
            self._log.exception("%s %s failed", request.method, path)
            response = problem_response(_accident(), path or request.path)
        # The route's pattern, never the path itself: clients must not be able to make new series.
        counted = (request.method, path) if path else ("(any)", "(none)")
        self._traffic.count(*counted, response.status_code, time.perf_counter() - started)
        return response

    def _find(self, request: Request) -> Route | None:
        """The direct route of a request that is not written as the table has it; None if there is none."""
        bare = request.path.rstrip("/")
        method = "GET" if request.method == "HEAD" else request.method
        before, _, parameter = bare.rpartition("/")
        route = self._direct.get((method, bare)) or self._with_parameter.get((method, before + "/"))
        if route is None or not parameter.endswith(route.suffix):
            return None
        request.parameter = parameter.removesuffix(route.suffix)
        return route

    async def _by_asgi(self, request: Request, path: str) -> Response:
        """What FastAPI's route at the path answers, as one body; raises what `body` raises."""
        scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "scheme": "http",
            "method": "GET" if request.method == "HEAD" else request.method,
            "path": path,
            "query_string": request.query.encode("latin-1"),
            "root_path": "",
            "headers": [(name.encode("latin-1"), value.encode("latin-1")) for name, value in request.headers.items()],
        }
        response = Response()
        given = [await request.body()]
        body = bytearray()

        async def receive() -> Message:
            if given:
                return {"type": "http.request", "body": given.pop(), "more_body": False}
            # Asked while a file is sent, whether the client has gone: nobody hears of that.
            return await asyncio.Future()

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                response.status_code, response.raw_headers = message["status"], list(message["headers"])
            body.extend(message.get("body", b""))

        await self(scope, receive, send)
        response.body = bytes(body)
        return response

    def _known(self, request: Request) -> tuple[str, str]:
        """The path as FastAPI's route takes it, and the route's pattern; raises NotFound and MethodNotAllowed, which
        know of the direct routes too."""
        path = pattern = request.path
        bare = path.rstrip("/")
        before, _, parameter = bare.rpartition("/")
        methods = {method for method, known in self._direct if known == bare}
        methods |= {
            method
            for (method, known), route in self._with_parameter.items()
            if known == before + "/" and parameter.endswith(route.suffix)
        }
        for route in self.routes:
            for each in (bare, bare + "/"):
                if isinstance(route, APIRoute) and route.path_regex.match(each):
                    methods |= route.methods or set()
                    path, pattern = each, route.path
                elif isinstance(route, Mount) and route.path == before:
                    methods |= {"GET"}
                    pattern = route.path
        if not methods:
            raise NotFound("There is nothing at this path; /docs lists what there is.")
        if "GET" in methods:
            methods.add("HEAD")
        if request.method not in methods:
            allow = ", ".join(sorted(methods))
            raise MethodNotAllowed(f"This path does not take {request.method[:20]}; it takes {allow}.", allow=allow)
        return path, pattern


def service_app(
    name: str, summary: str, checks: Mapping[str, Check], reporter: Reporter, lifespan: Lifespan
) -> Service:
    """The shell of a service. `checks` are what /readyz asks: each raises a DeskError when its part is missing.

    The reporter runs around the service's own lifespan and tells the health desk the same as /readyz.
    """

    app = Service(name, summary)
    app.checks |= checks

    @asynccontextmanager
    async def running() -> AsyncIterator[None]:
        async with reporter.running(partial(missing_parts, app.checks, for_operators=True)), lifespan(app):
            yield

    app.running = running
    Gauge("buydesk_reports_dropped", "Health reports that were given up.", registry=app.registry).set_function(
        lambda: reporter.dropped
    )
    for kind, handler in _HANDLERS.items():
        app.add_exception_handler(kind, handler)
    _add_common_routes(app)
    return app


def problem_response(error: DeskError, instance: str) -> Response:
    """The error as application/problem+json, with the headers that go with it."""
    headers = {}
    if error.retry_after_seconds is not None:
        headers["Retry-After"] = str(error.retry_after_seconds)
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, MethodNotAllowed):
        headers["Allow"] = str(error.facts["allow"])
    return Response(encode(problem(error, instance)), error.status, headers, PROBLEM_TYPE)


def problems(*kinds: type[DeskError]) -> Responses:
    """The `responses` of an OpenAPI operation for these errors, each with an example."""
    if LedgerUnavailable in kinds and WrongMode not in kinds:
        kinds = (*kinds, WrongMode)  # whoever needs the ledger may find the other mode's
    responses: Responses = {}
    for kind in kinds:
        response = responses.setdefault(
            str(kind.status),
            {"description": kind.title, "content": {PROBLEM_TYPE: {"schema": _PROBLEM_SCHEMA, "examples": {}}}},
        )
        response["content"][PROBLEM_TYPE]["examples"][kind.code] = {
            "value": problem(kind(kind.title, **kind.example_facts), "/")
        }
    return responses


def answer(description: str, example: object, status: int = 200) -> Responses:
    """The `responses` of an OpenAPI operation for success, with an example."""
    example = msgspec.to_builtins(example)
    return {str(status): {"description": description, "content": {"application/json": {"example": example}}}}


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
    for mark, told in _BEGINNINGS:
        if body.startswith(mark):
            raise InvalidRequest.of("body", f"{told}; send plain UTF-8")
    if 0 in body[:2]:
        raise InvalidRequest.of("body", "is in UTF-16 or UTF-32; send plain UTF-8")


def require_token(request: Request | StarletteRequest, tokens: tuple[str, ...]) -> None:
    """Raises Unauthorized unless the request shows one of the tokens."""
    shown = (request.headers.get("authorization") or "").encode()
    if True not in [hmac.compare_digest(shown, f"Bearer {token}".encode()) for token in tokens]:  # always asks all
        raise Unauthorized("This path is for the desk's own services: show the token for it.")


def single_parameters(request: Request | StarletteRequest, known: Collection[str]) -> dict[str, str]:
    """The query parameters; raises InvalidRequest naming each that is unknown or given twice."""
    reasons: list[tuple[str, str]] = []
    found: dict[str, str] = {}
    query = request.query if isinstance(request, Request) else request.url.query
    if query.count("&") >= _PARAMETERS_MAX:
        raise InvalidRequest.of("query", f"may have {_PARAMETERS_MAX} parameters at the most")
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in known:
            reasons.append((name[:100], f"is not a parameter here; these are: {', '.join(known)}"))
        elif name in found:
            reasons.append((name, "is given more than once"))
        found[name] = value
    if reasons:
        raise InvalidRequest.of_all(list(dict.fromkeys(reasons)))
    return found


def whole_number(parameters: Mapping[str, str], name: str, maximum: int) -> int | None:
    """The parameter, None when it is not there; raises InvalidRequest unless it is a number from 1 to `maximum`."""
    text = parameters.get(name)
    if text is None:
        return None
    if not _WHOLE_NUMBER.fullmatch(text) or not 1 <= int(text) <= maximum:
        raise InvalidRequest.of(name, f"must be a whole number from 1 to {maximum}")
    return int(text)


def number_parameter(name: str, description: str, maximum: int, default: int | None = None) -> dict[str, object]:
    """An OpenAPI query parameter that is a whole number from 1 to its maximum."""
    schema = {"type": "integer", "minimum": 1, "maximum": maximum} | ({"default": default} if default else {})
    return {"name": name, "in": "query", "description": description, "schema": schema}


_PROBLEM_SCHEMA = {
    "type": "object",
    "required": ["type", "title", "status", "detail", "instance", "code"],
    "properties": {
        "type": {"type": "string", "format": "uri"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "instance": {"type": "string"},
        "code": {"type": "string", "description": "Stable; branch on this."},
    },
}


def _add_common_routes(app: Service) -> None:
    exposition = Kept(lambda: generate_latest(app.registry), METRICS_SHARE)
    document = cache(lambda: encode(app.openapi()))
    page = _docs_page(app.title)
    identity = {"service": app.name, "version": __version__, "docs": "/docs", "status": "/readyz"}

    async def about(_: Request) -> Response:
        return FastJSON(identity)

    alive = {"status": "alive"}

    async def live(_: Request) -> Response:
        return FastJSON(alive)

    async def ready(_: Request) -> Response:
        missing = await missing_parts(app.checks)
        if missing:
            names = ", ".join(each["what"] for each in missing)
            raise NotReady(f"Missing: {names}.", retry_after_seconds=1, missing=missing)
        return FastJSON({"status": "ready"})

    async def metrics(_: Request) -> Response:
        return Response(exposition(), media_type=CONTENT_TYPE_LATEST)

    async def openapi(_: Request) -> Response:
        return Answer(document())

    async def docs(_: Request) -> Response:
        return page

    app.add_direct_route("/", "GET", about, _operation("Which service and version this is", identity))
    app.add_direct_route(
        "/livez", "GET", live, _operation("Is the process alive (touches nothing)", {"status": "alive"})
    )
    app.add_direct_route(
        "/readyz",
        "GET",
        ready,
        _operation("Can the service do its work", {"status": "ready"}, problems(NotReady)),
    )
    metrics_answer = {"200": {"description": "Prometheus text", "content": {"text/plain": {}}}}
    app.add_direct_route(
        "/metrics", "GET", metrics, {"tags": [_EVERY_SERVICE], "summary": "Metrics", "responses": metrics_answer}
    )
    app.add_direct_route("/openapi.json", "GET", openapi, None)
    app.add_direct_route("/docs", "GET", docs, None)
    app.mount("/docs-files", StaticFiles(directory=str(files("buydesk.http") / "swagger")), name="docs-files")


class Kept:
    """What is made when it is asked for, and kept for so long that making it takes no more than `share` of the time."""

    def __init__(self, make: Callable[[], bytes], share: float) -> None:
        self._make = make
        self._share = share
        self._kept_until = -math.inf
        self._kept = b""

    def __call__(self) -> bytes:
        started = time.monotonic()
        if started >= self._kept_until:
            self._kept = self._make()
            self._kept_until = started + (time.monotonic() - started) / self._share
        return self._kept


def _docs_page(title: str) -> Response:
    """Swagger's page. Browsers run its own scripts only, the one that is written into it included, and show it in no
    other page."""
    page = get_swagger_ui_html(
        openapi_url="/openapi.json",
        title=title,
        swagger_js_url="/docs-files/swagger-ui-bundle.js",
        swagger_css_url="/docs-files/swagger-ui.css",
        swagger_favicon_url="/docs-files/favicon-32x32.png",
    )
    script = bytes(page.body).rpartition(b"<script>")[2].partition(b"</script>")[0]
    digest = b64encode(sha256(script).digest()).decode()
    page.headers["Content-Security-Policy"] = (
        f"default-src 'none'; script-src 'self' 'sha256-{digest}'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data:; connect-src 'self'; frame-ancestors 'none'"
    )
    return page


def _operation(summary: str, example: object, further: Mapping[int | str, Any] | None = None) -> Json:
    return {"tags": [_EVERY_SERVICE], "summary": summary, "responses": answer("OK", example) | dict(further or {})}


async def missing_parts(checks: Mapping[str, Check], *, for_operators: bool = False) -> list[dict[str, str]]:
    """What is missing and why, as {"what", "why"}: all checks asked at once, each for CHECK_SECONDS_MAX at the most.
    Operators also read in what words a server said so."""
    failures = await asyncio.gather(*(_failure_of(check, for_operators) for check in checks.values()))
    return [{"what": what, "why": why} for what, why in zip(checks, failures, strict=True) if why is not None]


async def _failure_of(check: Check, for_operators: bool) -> str | None:
    try:
        async with asyncio.timeout(CHECK_SECONDS_MAX):
            await check()
    except DeskError as error:
        return error.for_operators if for_operators else error.detail
    except TimeoutError:
        return f"No answer within {CHECK_SECONDS_MAX:g} s."
    return None


def _openapi(app: Service) -> dict[str, Any]:
    document = get_openapi(
        title=app.title,
        version=app.version,
        summary=app.summary,
        description=_ABOUT_IDS,
        routes=app.routes,
        openapi_version="3.1.0",
    )
    for path, direct in app.operations.items():
        document.setdefault("paths", {}).setdefault(path, {}).update(direct)
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    for operation in operations:
        operation["responses"] = _joined(operation["responses"], problems(InternalError, Overloaded))
    if any("security" in operation for operation in operations):
        schemes = document.setdefault("components", {}).setdefault("securitySchemes", {})
        schemes[INTERNAL_SCHEME] = {"type": "http", "scheme": "bearer"}
    # Swagger shows the groups in this order: first what the service is there for.
    groups = {tag for operation in operations for tag in operation.get("tags", [])} - {_EVERY_SERVICE}
    document["tags"] = [{"name": name} for name in (*sorted(groups, reverse=True), _EVERY_SERVICE)]
    return document


def _joined(responses: Responses, further: Responses) -> Responses:
    """The responses of an OpenAPI operation, with further examples for those that are there already."""
    joined = further | responses
    for status in responses.keys() & further.keys():
        examples = [each["content"][PROBLEM_TYPE]["examples"] for each in (responses[status], further[status])]
        content = {"schema": _PROBLEM_SCHEMA, "examples": examples[0] | examples[1]}
        joined[status] = responses[status] | {"content": {PROBLEM_TYPE: content}}
    return joined


def _accident() -> InternalError:
    return InternalError("It has been logged; nothing is known about the outcome.")


async def _on_desk_error(request: StarletteRequest, error: Exception) -> Response:
    return problem_response(cast("DeskError", error), request.url.path)


async def _on_validation_error(request: StarletteRequest, error: Exception) -> Response:
    found = cast("RequestValidationError", error).errors()
    reasons = [(str(each["loc"][-1]), str(each["msg"])) for each in found]
    return problem_response(InvalidRequest.of_all(reasons), request.url.path)


async def _on_http_exception(request: StarletteRequest, error: Exception) -> Response:
    """The framework's own refusals: a body beyond reading, a file of /docs that there is not."""
    if cast("HTTPException", error).status_code == HTTPStatus.BAD_REQUEST:
        return problem_response(InvalidRequest.of("body", "cannot be read"), request.url.path)
    return problem_response(NotFound("There is nothing at this path; /docs lists what there is."), request.url.path)


_HANDLERS: dict[type[Exception], Callable[[StarletteRequest, Exception], Awaitable[Response]]] = {
    DeskError: _on_desk_error,
    RequestValidationError: _on_validation_error,
    HTTPException: _on_http_exception,
}
