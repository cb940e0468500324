"""What every service shares: the app shell, problem+json, /, /docs, /livez, /readyz and /metrics.

A service is a FastAPI app. Its own routes are called directly with a `Request` (`add_direct_route`): the handling of
requests by FastAPI and Starlette costs more than placing an order does. What FastAPI routes (typed reads, the files of
/docs) is called by ASGI. A request's head has been read (`connections.py`) when `Service.respond` is called.
"""

import asyncio
import contextlib
import logging
import math
import time
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import cache, partial
from hashlib import sha256
from http import HTTPStatus
from importlib.resources import files
from typing import Any, NamedTuple

from fastapi import FastAPI, Response
from fastapi import Request as StarletteRequest
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.routing import APIRoute
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles
from starlette.types import Message

from buydesk import __version__
from buydesk.clients.cache import KeyCache
from buydesk.clients.model import Caller
from buydesk.clients.rates import RateKind, RateLimiter
from buydesk.clients.scopes import Scope
from buydesk.errors import DeskError, InternalError, InvalidRequest, MethodNotAllowed, NotFound, NotReady, RateLimited
from buydesk.http.access import Access
from buydesk.http.openapi import EVERY_SERVICE, Json, needing, openapi_document, operation
from buydesk.http.requests import Request
from buydesk.http.responses import JSONBytesResponse, MsgspecResponse, encode, keep_private, problem_response, tell_rate
from buydesk.observability.metrics import RefusedCallers, Traffic
from buydesk.observability.reporter import Reporter

CHECK_SECONDS_MAX = 3.0
# However many ask for /metrics, writing it takes a twentieth of the time: no order is answered meanwhile.
METRICS_SHARE = 1 / 20

Check = Callable[[], Awaitable[None]]
Lifespan = Callable[[], AbstractAsyncContextManager[None]]


Endpoint = Callable[[Request], Awaitable[Response]]
# What a request is counted as, where that depends on what it asks for.
Counted = RateKind | Callable[[Request], RateKind]


class Route(NamedTuple):
    """A route that is called directly; `path` is the documented one. One with a path parameter has it at the end,
    before `suffix`, or before the last segment. It is for callers with the scope that it `needs`, if it needs one, and
    limited to so many a minute where it is `counted`. Beyond its limit `beyond` answers, if there is one, with the
    refusal or something else."""

    path: str
    endpoint: Endpoint
    suffix: str = ""
    needs: Scope | None = None
    counted: Counted | None = None
    beyond: Callable[[Request, RateLimited], Awaitable[Response]] | None = None


class Service(FastAPI):
    """A service's app: its direct routes and, for all others, FastAPI. A documented path is taken with and without its
    trailing slash; what is answered is counted. `access`, which whoever serves it gives, says who calls."""

    access: Access

    def __init__(self, name: str, summary: str) -> None:
        super().__init__(
            title=f"buydesk {name}",
            summary=summary,
            version=__version__,
            docs_url=None,
            redoc_url=None,
            openapi_url=None,
            redirect_slashes=False,
            default_response_class=MsgspecResponse,
        )
        self.name = name
        self.running: Lifespan = contextlib.nullcontext  # entered while it runs
        self.stopping = asyncio.Event()  # what waits for something to happen ends then
        self.keys: KeyCache | None = None  # by which callers are known, and
        self.tokens: dict[str, Caller] = {}  # by which the desk's own are, where they call it as callers do
        self.rates: RateLimiter | None = None  # by which callers are limited
        self.checks: dict[str, Check] = {}  # what /readyz asks, each by the name of what is missing when it raises
        # One registry a service, also when several run in one process.
        self.registry = registry = CollectorRegistry()
        self.operations: dict[str, dict[str, Json]] = {}  # by path and method: what FastAPI does not document itself
        # By the path without its trailing slash, or what stands before its parameter ({}, if something stands behind
        # it); then by method.
        self._direct: dict[str, dict[str, Route]] = {}
        self._log = logging.getLogger(f"buydesk.services.{name}")
        self._traffic = Traffic(name)
        self.refused = RefusedCallers(name)
        registry.register(self._traffic)
        registry.register(self.refused)

    def add_direct_route(
        self,
        path: str,
        method: str,
        endpoint: Endpoint,
        operation: Json | None,
        *,
        needs: Scope | None = None,
        counted: Counted | None = None,
        beyond: Callable[[Request, RateLimited], Awaitable[Response]] | None = None,
    ) -> None:
        """A route, documented by its OpenAPI operation object. Its path may end in one parameter, `/orders/{id}`, or
        have it before the last segment: `/orders/{id}/settle`. With `needs`, a request has its `caller`; only such
        routes can be `counted`."""
        if operation is not None and needs is not None:
            operation = needing(operation, needs)
        if operation is not None:
            self.operations.setdefault(path, {})[method.lower()] = operation
        before, brace, after = path.partition("{")
        suffix = after.partition("}")[2]
        if suffix.startswith("/"):
            before, suffix = f"{before}{{}}{suffix}", ""
        routes = self._direct.setdefault(before if brace else path.rstrip("/"), {})
        routes[method] = Route(path, endpoint, suffix, needs, counted, beyond)

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document, with the direct routes in it."""
        return openapi_document(self, self.operations)

    async def respond(self, request: Request, admit: Callable[[Request], None]) -> Response:
        """The answer to a request, whatever happens; counted. `admit` raises what refuses it before anything else."""
        started = time.perf_counter()
        path, needs = "", None
        try:
            admit(request)
            routes, parameter = self._at(request.path)
            route = routes.get("GET" if request.method == "HEAD" else request.method)
            if route is None:
                asgi_path, path = self._known(request, routes)
                response = await self._by_asgi(request, asgi_path)
            else:
                path = route.path
                request.parameter = parameter.removesuffix(route.suffix)
                needs = route.needs
                if needs is not None:
                    request.caller = await self.access.caller(request, needs)
                response = await self._within_rate(request, route)
        except DeskError as error:
            if isinstance(error, RateLimited) and needs is not None:
                self.refused.count("rate")
                request.rate = None  # the problem tells it
            response = problem_response(error, path or request.path)
        except Exception:
            self._log.exception("%s %s failed", request.method, path)
            unexpected = InternalError("It has been logged; nothing is known about the outcome.")
            response = problem_response(unexpected, path or request.path)
        if needs is not None:
            keep_private(response)
            if request.rate is not None:
                tell_rate(response, request.rate)
        # The route's pattern, never the path itself: clients must not be able to make new series.
        counted = (request.method, path) if path else ("(any)", "(none)")
        self._traffic.count(*counted, response.status_code, time.perf_counter() - started)
        return response

    async def _within_rate(self, request: Request, route: Route) -> Response:
        """What the route answers; raises RateLimited, and what its endpoint raises."""
        if route.counted is not None:
            kind = route.counted if isinstance(route.counted, str) else route.counted(request)
            try:
                self.access.count(request, kind)
            except RateLimited as over:
                if route.beyond is None:
                    raise
                return await route.beyond(request, over)
        return await route.endpoint(request)

    def _at(self, path: str) -> tuple[Mapping[str, Route], str]:
        """The direct routes at the path by their methods, and what stands in the place of their parameter."""
        bare = path.rstrip("/")
        if routes := self._direct.get(bare):
            return routes, ""
        before, _, parameter = bare.rpartition("/")
        above, _, inner = before.rpartition("/")
        if routes := self._direct.get(f"{above}/{{}}/{parameter}"):
            return routes, inner
        routes = self._direct.get(before + "/", {})
        return {method: each for method, each in routes.items() if parameter.endswith(each.suffix)}, parameter

    async def _by_asgi(self, request: Request, path: str) -> Response:
        """What FastAPI's route at the path answers, as one body; raises what the route and `body` raise, InvalidRequest
        and NotFound."""
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

        try:
            await self(scope, receive, send)
        except RequestValidationError as error:
            raise InvalidRequest.of_all(
                [(str(each["loc"][-1]), str(each["msg"])) for each in error.errors()]
            ) from error
        except HTTPException as error:  # a body beyond reading, a file of /docs that there is not
            if error.status_code == HTTPStatus.BAD_REQUEST:
                raise InvalidRequest.of("body", "cannot be read") from error
            raise _nothing_there() from error
        response.body = bytes(body)
        return response

    def _known(self, request: Request, direct: Collection[str]) -> tuple[str, str]:
        """The path as FastAPI's route takes it, and the route's pattern; raises NotFound and MethodNotAllowed, which
        know of the methods of direct routes too."""
        path = pattern = request.path
        bare = path.rstrip("/")
        before = bare.rpartition("/")[0]
        methods = set(direct)
        for route in self.routes:
            for each in (bare, bare + "/"):
                if isinstance(route, APIRoute) and route.path_regex.match(each):
                    methods |= route.methods or set()
                    path, pattern = each, route.path
                elif isinstance(route, Mount) and route.path == before:
                    methods |= {"GET"}
                    pattern = route.path
        if not methods:
            raise _nothing_there()
        if "GET" in methods:
            methods.add("HEAD")
        if request.method not in methods:
            allow = ", ".join(sorted(methods))
            raise MethodNotAllowed(f"This path does not take {request.method[:20]}; it takes {allow}.", allow=allow)
        return path, pattern


def service_app(
    name: str,
    summary: str,
    checks: Mapping[str, Check],
    reporter: Reporter,
    lifespan: Lifespan = contextlib.nullcontext,
) -> Service:
    """The shell of a service. `checks` are what /readyz asks: each raises a DeskError when its part is missing.

    The reporter runs around the service's own lifespan and tells the health desk the same as /readyz.
    """

    app = Service(name, summary)
    app.checks |= checks

    @asynccontextmanager
    async def running() -> AsyncIterator[None]:
        async with reporter.running(partial(failed_checks, app.checks, for_operators=True)), lifespan():
            yield

    app.running = running
    Gauge("buydesk_reports_dropped", "Health reports that were given up.", registry=app.registry).set_function(
        lambda: reporter.dropped
    )
    for refusal in (RequestValidationError, HTTPException):
        app.add_exception_handler(refusal, _pass_on)
    _add_common_routes(app)
    return app


def _add_common_routes(app: Service) -> None:
    exposition = Throttled(lambda: generate_latest(app.registry), METRICS_SHARE)
    document = cache(lambda: encode(app.openapi()))
    identity = {"service": app.name, "version": __version__, "docs": "/docs", "status": "/readyz"}
    alive, is_ready = {"status": "alive"}, {"status": "ready"}

    def add(path: str, endpoint: Endpoint, summary: str, example: object, *errors: type[DeskError]) -> None:
        described = operation(summary, ("OK", example), errors=errors, tag=EVERY_SERVICE)
        app.add_direct_route(path, "GET", endpoint, described)

    def always(response: Response) -> Endpoint:
        async def respond(_: Request) -> Response:
            return response

        return respond

    async def ready(_: Request) -> Response:
        missing = await failed_checks(app.checks)
        if missing:
            names = ", ".join(each["what"] for each in missing)
            raise NotReady(f"Missing: {names}.", retry_after_seconds=1, missing=missing)
        return MsgspecResponse(is_ready)

    async def metrics(_: Request) -> Response:
        return Response(exposition(), media_type=CONTENT_TYPE_LATEST)

    async def openapi(_: Request) -> Response:
        return JSONBytesResponse(document())

    add("/", always(MsgspecResponse(identity)), "Which service and version this is", identity)
    add("/livez", always(MsgspecResponse(alive)), "Is the process alive (touches nothing)", alive)
    add("/readyz", ready, "Can the service do its work", is_ready, NotReady)
    metrics_answer = {"200": {"description": "Prometheus text", "content": {"text/plain": {}}}}
    app.add_direct_route(
        "/metrics", "GET", metrics, {"tags": [EVERY_SERVICE], "summary": "Metrics", "responses": metrics_answer}
    )
    app.add_direct_route("/openapi.json", "GET", openapi, None)
    app.add_direct_route("/docs", "GET", always(_docs_page(app.title)), None)
    app.mount("/docs-files", StaticFiles(directory=str(files("buydesk.http") / "swagger")), name="docs-files")


class Throttled:
    """Makes something when asked, and keeps it long enough that making it takes no more than `share` of the time."""

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


async def failed_checks(checks: Mapping[str, Check], *, for_operators: bool = False) -> list[dict[str, str]]:
    """What is missing and why, as {"what", "why"}: all checks asked at once, each for at most CHECK_SECONDS_MAX.
    Operators also read in what words a server said so."""
    failures = await asyncio.gather(*(_run_check(check, for_operators) for check in checks.values()))
    return [{"what": what, "why": why} for what, why in zip(checks, failures, strict=True) if why is not None]


async def _run_check(check: Check, for_operators: bool) -> str | None:
    try:
        async with asyncio.timeout(CHECK_SECONDS_MAX):
            await check()
    except DeskError as error:
        return error.for_operators if for_operators else error.detail
    except TimeoutError:
        return f"No answer within {CHECK_SECONDS_MAX:g} s."
    return None


async def _pass_on(_: StarletteRequest, error: Exception) -> Response:
    """FastAPI's own refusals are made problems where all errors are, in `respond`."""
    raise error


def _nothing_there() -> NotFound:
    return NotFound("There is nothing at this path; /docs lists what there is.")
