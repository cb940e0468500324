"""What every service shares: the app shell, problem+json, /, /docs, /livez, /readyz and /metrics.

A service is a FastAPI app. Its hot routes (`add_hot_route`) are documented in the same OpenAPI document, but called by
the outermost layer itself, or at once by the server (`protocol.py`): the request handling of FastAPI and Starlette
costs more than placing an order does.
"""

import asyncio
import hmac
import logging
import time
from bisect import bisect_left
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from http import HTTPStatus
from importlib.resources import files
from itertools import accumulate
from typing import Any, NamedTuple, cast
from urllib.parse import parse_qsl

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.openapi.utils import get_openapi
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.staticfiles import StaticFiles
from starlette.types import Message, Receive, Scope, Send

from buydesk import __version__, request_ids
from buydesk.errors import (
    DeskError,
    InternalError,
    InvalidRequest,
    LedgerUnavailable,
    MethodNotAllowed,
    NotFound,
    NotReady,
    Overloaded,
    PayloadTooLarge,
    RequestTimeout,
    Unauthorized,
    UnsupportedMediaType,
    WrongMode,
    problem,
)
from buydesk.reporting import Reporter

PROBLEM_TYPE = "application/problem+json"
BODY_BYTES_MAX = 16 * 1024
# Where a server that has a request's whole body already puts it into the scope.
WHOLE_BODY = "buydesk.body"
CHECK_SECONDS_MAX = 3.0
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
Endpoint = Callable[[Request], Awaitable[Response]]

encode = msgspec.json.encode


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


class HotRoute(NamedTuple):
    """A route that is called without the request handling of FastAPI and Starlette; `path` is the documented one."""

    method: str
    path: str
    endpoint: Endpoint


class Service(FastAPI):
    """A service's app: the outermost layer, which knows hot routes, takes a documented path with and without its
    trailing slash, gives each request its id, and counts what is answered."""

    def __init__(self, name: str, summary: str, lifespan: Lifespan) -> None:
        super().__init__(
            title=f"buydesk {name}",
            summary=summary,
            version=__version__,
            docs_url=None,
            redoc_url=None,
            redirect_slashes=False,
            lifespan=lifespan,
            default_response_class=FastJSON,
        )
        self.name = name
        # One registry a service, also when several run in one process.
        self.registry = registry = CollectorRegistry()
        self.operations: dict[str, dict[str, Json]] = {}  # by path and method: what FastAPI does not document itself
        self.hot: dict[tuple[str, str], HotRoute] = {}  # by method and path, with and without its trailing slash
        self._log = logging.getLogger(f"buydesk.services.{name}")
        self._paths: dict[object, str] = {}
        self._bare_paths: dict[str, str] = {}
        self._traffic = Traffic(name)
        registry.register(self._traffic)

    def add_hot_route(self, path: str, method: str, endpoint: Endpoint, operation: Json) -> None:
        """A documented route that costs little. Its path has no parameters, and its answer is no stream."""
        self.add_documented_route(path, method, endpoint, operation)
        hot = HotRoute(method, path, endpoint)
        self.hot |= {(method, path): hot, (method, path.rstrip("/")): hot}

    def add_documented_route(self, path: str, method: str, endpoint: Endpoint, operation: Json) -> None:
        """A plain Starlette route, documented by an OpenAPI operation object."""
        self.router.routes.append(Route(path, endpoint, methods=[method], include_in_schema=False))
        self.operations.setdefault(path, {})[method.lower()] = operation
        self._paths[endpoint] = path

    def allow(self, endpoint: object) -> str:
        """The methods that the endpoint's path takes, its other endpoints' too, as the header names them; "" for a path
        that is not documented here."""
        methods = {method.upper() for method in self.operations.get(self._paths.get(endpoint, ""), ())}
        return ", ".join(sorted(methods | {"HEAD"} if "GET" in methods else methods))

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document, with the hot routes in it."""
        if self.openapi_schema is None:
            self.openapi_schema = _openapi(self)
        return self.openapi_schema

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI. What is hot comes here only when the server does not know of hot routes, or the request is unusual."""
        if scope["type"] != "http":
            await super().__call__(scope, receive, send)
            return
        request_id = request_ids.begin(request_ids.given_in(scope["headers"]))
        status = 500

        async def noting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (request_ids.HEADER, request_id)]
            await send(message)

        scope["path"] = self._documented(scope["path"])
        hot = self.hot.get((scope["method"], scope["path"]))
        if hot is not None:
            response = await self.answer(hot, Request(scope, receive))
            await response(scope, receive, noting_send)
            return
        started = time.perf_counter()
        try:
            await super().__call__(scope, receive, noting_send)
        finally:
            # The route's pattern, never the path itself: clients must not be able to make new series.
            path = getattr(scope.get("route"), "path", None) or self._paths.get(scope.get("endpoint"), "(none)")
            self._traffic.count(scope["method"], path, status, time.perf_counter() - started)

    async def answer(self, hot: HotRoute, request: Request) -> Response:
        """The answer of a hot route, whatever happens; counted. The request's id is begun before and added after."""
        started = time.perf_counter()
        try:
            response = await hot.endpoint(request)
        except DeskError as error:
            response = problem_response(error, hot.path)
        except ClientDisconnect as error:
            response = await _on_client_gone(request, error)
        except Exception as error:
            self._log.exception("%s %s failed", hot.method, hot.path)
            response = await _on_unexpected(request, error)
        self._traffic.count(hot.method, hot.path, response.status_code, time.perf_counter() - started)
        return response

    def _documented(self, path: str) -> str:
        """The path as it is documented, whether or not it came with a slash at its end."""
        if not self._bare_paths:
            paths = [route.path for route in self.router.routes if isinstance(route, Route)]
            self._bare_paths = {known.rstrip("/"): known for known in paths}
        bare = path.rstrip("/")
        return self._bare_paths.get(bare, bare or "/")


def service_app(
    name: str, summary: str, checks: Mapping[str, Check], reporter: Reporter, lifespan: Lifespan
) -> Service:
    """The shell of a service. `checks` are what /readyz asks: each raises a DeskError when its part is missing.

    The reporter runs around the service's own lifespan and tells the health desk the same as /readyz.
    """

    @asynccontextmanager
    async def reporting(app: FastAPI) -> AsyncIterator[None]:
        async with reporter.running(partial(missing_parts, checks)), lifespan(app):
            yield

    app = Service(name, summary, reporting)
    Gauge("buydesk_reports_dropped", "Health reports that were given up.", registry=app.registry).set_function(
        lambda: reporter.dropped
    )
    for kind, handler in _HANDLERS.items():
        app.add_exception_handler(kind, handler)
    _add_common_routes(app, checks)
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


async def read_body(request: Request, bytes_max: int = BODY_BYTES_MAX) -> bytes:
    """The body, read no further than allowed; raises PayloadTooLarge."""
    whole: bytes | None = request.scope.get(WHOLE_BODY)
    if whole is not None and len(whole) <= bytes_max:
        return whole
    length = header(request, b"content-length")
    bytes_read = int(length[:20]) if length is not None and length.isdigit() else 0
    body = b""
    is_whole = False
    while not is_whole and bytes_read <= bytes_max:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        body += message.get("body", b"")
        bytes_read = len(body)
        is_whole = not message.get("more_body", False)
    if bytes_read > bytes_max:
        raise PayloadTooLarge(f"The body may have {bytes_max} bytes at the most.", bytes_max=bytes_max)
    return body


def header(request: Request, name: bytes) -> bytes | None:
    """The first header of this name, which is in lower case."""
    for each, value in request.scope["headers"]:
        if each == name:
            return bytes(value)
    return None


def require_json(request: Request) -> None:
    """Raises UnsupportedMediaType unless the body says that it is JSON."""
    said = header(request, b"content-type") or b""
    if said == b"application/json":
        return
    media_type = said.decode("latin-1").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise UnsupportedMediaType(f"The content type must be application/json, not {media_type[:100] or 'missing'}.")


def require_token(request: Request, token: str) -> None:
    """Raises Unauthorized unless the request shows the internal token."""
    shown = request.headers.get("authorization", "")
    if not hmac.compare_digest(shown.encode(), f"Bearer {token}".encode()):
        raise Unauthorized("This path is for the desk's own services: show the internal token.")


def single_parameters(request: Request, known: Collection[str]) -> dict[str, str]:
    """The query parameters; raises InvalidRequest naming each that is unknown or given twice."""
    reasons: list[tuple[str, str]] = []
    found: dict[str, str] = {}
    for name, value in parse_qsl(request.scope["query_string"].decode("latin-1"), keep_blank_values=True):
        if name not in known:
            reasons.append((name[:100], f"is not a parameter here; these are: {', '.join(known)}"))
        elif name in found:
            reasons.append((name, "is given more than once"))
        found[name] = value
    if reasons:
        raise InvalidRequest.of_all(list(dict.fromkeys(reasons)))
    return found


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


def _add_common_routes(app: Service, checks: Mapping[str, Check]) -> None:
    identity = {"service": app.name, "version": __version__, "docs": "/docs", "status": "/readyz"}

    async def about(_: Request) -> Response:
        return FastJSON(identity)

    async def live(_: Request) -> Response:
        return FastJSON({"status": "alive"})

    async def ready(_: Request) -> Response:
        missing = await missing_parts(checks)
        if missing:
            names = ", ".join(each["what"] for each in missing)
            raise NotReady(f"Missing: {names}.", retry_after_seconds=1, missing=missing)
        return FastJSON({"status": "ready"})

    async def metrics(_: Request) -> Response:
        return Response(generate_latest(app.registry), media_type=CONTENT_TYPE_LATEST)

    async def docs(_: Request) -> Response:
        return get_swagger_ui_html(
            openapi_url="/openapi.json",
            title=app.title,
            swagger_js_url="/docs-files/swagger-ui-bundle.js",
            swagger_css_url="/docs-files/swagger-ui.css",
            swagger_favicon_url="/docs-files/favicon-32x32.png",
        )

    app.add_hot_route("/", "GET", about, _operation("Which service and version this is", identity))
    app.add_hot_route("/livez", "GET", live, _operation("Is the process alive (touches nothing)", {"status": "alive"}))
    app.add_hot_route(
        "/readyz",
        "GET",
        ready,
        _operation("Can the service do its work", {"status": "ready"}, problems(NotReady)),
    )
    metrics_answer = {"200": {"description": "Prometheus text", "content": {"text/plain": {}}}}
    app.add_hot_route(
        "/metrics", "GET", metrics, {"tags": [_EVERY_SERVICE], "summary": "Metrics", "responses": metrics_answer}
    )
    app.get("/docs", include_in_schema=False)(docs)
    app.mount("/docs-files", StaticFiles(directory=str(files("buydesk") / "swagger")), name="docs-files")


def _operation(summary: str, example: object, further: Mapping[int | str, Any] | None = None) -> Json:
    return {"tags": [_EVERY_SERVICE], "summary": summary, "responses": answer("OK", example) | dict(further or {})}


async def missing_parts(checks: Mapping[str, Check]) -> list[dict[str, str]]:
    """What is missing and why, as {"what", "why"}: all checks asked at once, each for CHECK_SECONDS_MAX at the most."""
    failures = await asyncio.gather(*map(_failure_of, checks.values()))
    return [{"what": what, "why": why} for what, why in zip(checks, failures, strict=True) if why is not None]


async def _failure_of(check: Check) -> str | None:
    try:
        async with asyncio.timeout(CHECK_SECONDS_MAX):
            await check()
    except DeskError as error:
        return error.detail
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
    for path, hot in app.operations.items():
        document.setdefault("paths", {}).setdefault(path, {}).update(hot)
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


async def _on_desk_error(request: Request, error: Exception) -> Response:
    return problem_response(cast("DeskError", error), request.url.path)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    found = cast("RequestValidationError", error).errors()
    reasons = [(str(each["loc"][-1]), str(each["msg"])) for each in found]
    return problem_response(InvalidRequest.of_all(reasons), request.url.path)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """The framework's own refusals: an unknown path, a method that the path does not take, a body beyond reading."""
    refusal = cast("HTTPException", error)
    if refusal.status_code == 400:
        return problem_response(InvalidRequest.of("body", "cannot be read"), request.url.path)
    if refusal.status_code == MethodNotAllowed.status:
        allow = cast("Service", request.app).allow(request.scope.get("endpoint"))
        allow = allow or (refusal.headers or {}).get("Allow", "GET, HEAD")  # files of /docs name none
        detail = f"This path does not take {request.method}; it takes {allow}."
        return problem_response(MethodNotAllowed(detail, allow=allow), request.url.path)
    return problem_response(NotFound("There is nothing at this path; /docs lists what there is."), request.url.path)


async def _on_client_gone(request: Request, _: Exception) -> Response:
    # Nobody reads this answer: the client has gone, or the protocol has answered for us that it is late. But a client
    # that does not finish its own request is no fault of ours to be logged.
    return problem_response(RequestTimeout("The connection ended before the body."), request.url.path)


async def _on_unexpected(request: Request, _: Exception) -> Response:
    # Starlette raises the exception again after this answer, and uvicorn logs it with its traceback.
    return problem_response(InternalError("It has been logged; nothing is known about the outcome."), request.url.path)


_HANDLERS: dict[type[Exception], Callable[[Request, Exception], Awaitable[Response]]] = {
    DeskError: _on_desk_error,
    RequestValidationError: _on_validation_error,
    HTTPException: _on_http_exception,
    ClientDisconnect: _on_client_gone,
    Exception: _on_unexpected,
}
