"""What every service shares: the app shell, problem+json, /, /docs, /livez, /readyz and /metrics.

A service is a FastAPI app. Its hot routes are plain Starlette routes (`add_hot_route`), documented in the same OpenAPI
document: FastAPI's own request handling costs more than placing an order does.
"""

import asyncio
import hmac
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from typing import Any, cast

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.openapi.utils import get_openapi
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from buydesk import __version__
from buydesk.errors import (
    DeskError,
    InternalError,
    InvalidRequest,
    LedgerUnavailable,
    MethodNotAllowed,
    NotFound,
    NotReady,
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
CHECK_SECONDS_MAX = 3.0
_EVERY_SERVICE = "every service"

Json = Mapping[str, object]
Check = Callable[[], Awaitable[None]]
Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]
Endpoint = Callable[[Request], Awaitable[Response]]

encode = msgspec.json.encode


class FastJSON(JSONResponse):
    """JSON by msgspec: compact UTF-8, members in the order given."""

    def render(self, content: object) -> bytes:
        return encode(content)


@dataclass(frozen=True, slots=True)
class Instruments:
    """What every service counts, for Prometheus. One registry a service, also when several run in one process."""

    registry: CollectorRegistry
    requests: Counter
    seconds: Histogram


def service_app(
    service: str, summary: str, checks: Mapping[str, Check], reporter: Reporter, lifespan: Lifespan
) -> FastAPI:
    """The shell of a service. `checks` are what /readyz asks: each raises a DeskError when its part is missing.

    The reporter runs around the service's own lifespan and tells the health desk the same as /readyz.
    """

    @asynccontextmanager
    async def reporting(app: FastAPI) -> AsyncIterator[None]:
        async with reporter.running(partial(missing_parts, checks)), lifespan(app):
            yield

    app = FastAPI(
        title=f"buydesk {service}",
        summary=summary,
        version=__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=reporting,
        default_response_class=FastJSON,
    )
    registry = CollectorRegistry()
    app.state.service = service
    app.state.hot_operations = {}
    app.state.hot_paths = {}
    app.state.instruments = Instruments(
        registry,
        Counter("buydesk_http_requests", "Answers given.", ["service", "method", "path", "status"], registry=registry),
        Histogram("buydesk_http_seconds", "Time until the answer.", ["service", "path"], registry=registry),
    )
    Gauge("buydesk_reports_dropped", "Health reports that were given up.", registry=registry).set_function(
        lambda: reporter.dropped
    )
    for kind, handler in _HANDLERS.items():
        app.add_exception_handler(kind, handler)
    _add_common_routes(app, service, checks)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]  # FastAPI's documented way to extend it
    app.add_middleware(Shell, app=app)
    return app


def add_hot_route(app: FastAPI, path: str, method: str, endpoint: Endpoint, operation: Json) -> None:
    """A plain Starlette route, documented by an OpenAPI operation object."""
    app.router.routes.append(Route(path, endpoint, methods=[method], include_in_schema=False))
    app.state.hot_paths[endpoint] = path
    app.state.hot_operations.setdefault(path, {})[method.lower()] = operation


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


def problems(*kinds: type[DeskError]) -> dict[int | str, dict[str, Any]]:
    """The `responses` of an OpenAPI operation for these errors, each with an example."""
    if LedgerUnavailable in kinds and WrongMode not in kinds:
        kinds = (*kinds, WrongMode)  # whoever needs the ledger may find the other mode's
    responses: dict[int | str, dict[str, Any]] = {}
    for kind in kinds:
        response = responses.setdefault(
            str(kind.status),
            {"description": kind.title, "content": {PROBLEM_TYPE: {"schema": _PROBLEM_SCHEMA, "examples": {}}}},
        )
        response["content"][PROBLEM_TYPE]["examples"][kind.code] = {
            "value": problem(kind(kind.title, **kind.example_facts), "/")
        }
    return responses


def answer(description: str, example: object, status: int = 200) -> dict[int | str, dict[str, Any]]:
    """The `responses` of an OpenAPI operation for success, with an example."""
    return {str(status): {"description": description, "content": {"application/json": {"example": example}}}}


async def read_body(request: Request, bytes_max: int = BODY_BYTES_MAX) -> bytes:
    """The body, read no further than allowed; raises PayloadTooLarge."""
    too_large = PayloadTooLarge(f"The body may have {bytes_max} bytes at the most.", bytes_max=bytes_max)
    length = request.headers.get("content-length")
    if length is not None and length.isdecimal() and int(length[:20]) > bytes_max:
        raise too_large
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > bytes_max:
            raise too_large
    return body


def require_json(request: Request) -> None:
    """Raises UnsupportedMediaType unless the body says that it is JSON."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise UnsupportedMediaType(f"The content type must be application/json, not {media_type[:100] or 'missing'}.")


def require_token(request: Request, token: str) -> None:
    """Raises Unauthorized unless the request shows the internal token."""
    shown = request.headers.get("authorization", "")
    if not hmac.compare_digest(shown.encode(), f"Bearer {token}".encode()):
        raise Unauthorized("This path is for the desk's own services: show the internal token.")


def single_parameters(request: Request, known: Sequence[str]) -> dict[str, str]:
    """The query parameters; raises InvalidRequest naming each that is unknown or given twice."""
    reasons: list[tuple[str, str]] = []
    found: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name not in known:
            reasons.append((name[:100], f"is not a parameter here; these are: {', '.join(known)}"))
        elif name in found:
            reasons.append((name, "is given more than once"))
        found[name] = value
    if reasons:
        raise InvalidRequest.of_all(list(dict.fromkeys(reasons)))
    return found


class Shell:
    """The outermost layer: paths with and without their trailing slash, and the count of requests."""

    def __init__(self, inner: ASGIApp, app: FastAPI) -> None:
        self._inner = inner
        self._service: str = app.state.service
        self._instruments: Instruments = app.state.instruments
        self._router = app.router
        self._hot_paths: Mapping[object, str] = app.state.hot_paths
        self._documented: dict[str, str] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._inner(scope, receive, send)
            return
        scope["path"] = self._canonical(scope["path"])
        started = time.perf_counter()
        status = 500

        async def counting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._inner(scope, receive, counting_send)
        finally:
            # The route's pattern, never the path itself: clients must not be able to make new series.
            path = getattr(scope.get("route"), "path", None) or self._hot_paths.get(scope.get("endpoint"), "(none)")
            self._instruments.requests.labels(self._service, scope["method"], path, status).inc()
            self._instruments.seconds.labels(self._service, path).observe(time.perf_counter() - started)

    def _canonical(self, path: str) -> str:
        """The path as it is documented, whether or not it came with a slash at its end."""
        if not self._documented:
            paths = [route.path for route in self._router.routes if isinstance(route, Route)]
            self._documented = {known.rstrip("/"): known for known in paths}
        bare = path.rstrip("/")
        return self._documented.get(bare, bare or "/")


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


def _add_common_routes(app: FastAPI, service: str, checks: Mapping[str, Check]) -> None:
    identity = {"service": service, "version": __version__, "docs": "/docs", "status": "/readyz"}

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
        return Response(generate_latest(app.state.instruments.registry), media_type=CONTENT_TYPE_LATEST)

    async def docs(_: Request) -> Response:
        return get_swagger_ui_html(
            openapi_url="/openapi.json",
            title=app.title,
            swagger_js_url="/docs-files/swagger-ui-bundle.js",
            swagger_css_url="/docs-files/swagger-ui.css",
            swagger_favicon_url="/docs-files/favicon-32x32.png",
        )

    add_hot_route(app, "/", "GET", about, _operation("Which service and version this is", identity))
    add_hot_route(app, "/livez", "GET", live, _operation("Is the process alive (touches nothing)", {"status": "alive"}))
    add_hot_route(
        app,
        "/readyz",
        "GET",
        ready,
        _operation("Can the service do its work", {"status": "ready"}, problems(NotReady)),
    )
    metrics_answer = {"200": {"description": "Prometheus text", "content": {"text/plain": {}}}}
    add_hot_route(
        app, "/metrics", "GET", metrics, {"tags": [_EVERY_SERVICE], "summary": "Metrics", "responses": metrics_answer}
    )
    app.state.hot_paths[docs] = "/docs"
    app.router.routes.append(Route("/docs", docs, include_in_schema=False))
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


def _openapi(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title, version=app.version, summary=app.summary, routes=app.routes, openapi_version="3.1.0"
        )
        for path, operations in app.state.hot_operations.items():
            document.setdefault("paths", {}).setdefault(path, {}).update(operations)
        operations = [operation for path in document["paths"].values() for operation in path.values()]
        for operation in operations:
            operation.setdefault("responses", {}).update(problems(InternalError))
        # Swagger shows the groups in this order: first what the service is there for.
        groups = {tag for operation in operations for tag in operation.get("tags", [])} - {_EVERY_SERVICE}
        document["tags"] = [{"name": name} for name in (*sorted(groups, reverse=True), _EVERY_SERVICE)]
        app.openapi_schema = document
    return app.openapi_schema


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
        allow = (refusal.headers or {}).get("Allow", "GET, HEAD")  # files of /docs name none
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
