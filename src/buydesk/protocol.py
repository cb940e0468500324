"""The edge of every server: what a connection may send before a service hears of it.

uvicorn's own protocol takes headers of any size, waits for a request for ever, and refuses in plain text with a warning
in the log. Here each of these is limited and answered as a problem, like every other error of the desk; and a refusal
is never sent where the answer to an earlier request on the connection belongs.
"""

import asyncio
import logging
from functools import cached_property
from typing import Any

import httptools
import uvicorn
from starlette.requests import Request
from starlette.responses import Response
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from buydesk import request_ids
from buydesk.errors import DeskError, HeadersTooLarge, InvalidHttp, Overloaded, RequestTimeout
from buydesk.settings import Settings
from buydesk.web import BODY_BYTES_MAX, WHOLE_BODY, HotRoute, Service, problem_response

# The request line and all headers together; the same again for what comes after the headers and is no body.
HEAD_BYTES_MAX = 64 * 1024
# After a refusal what still comes is thrown away for so long: a close at once would cut off the refusal itself.
LINGER_SECONDS = 1.0
_GIVEN_ID = "buydesk.request_id"  # in the scope of a request for a hot route

# At debug only: a client's fault is no report of ours.
_log = logging.getLogger(__name__)


class DeskConfig(uvicorn.Config):
    """uvicorn's configuration of one server, and the desk's limits of it; times in seconds."""

    def __init__(self, app: Service, settings: Settings, **uvicorns: Any) -> None:
        # What a proxy says of its client is not asked for: nothing here depends on a client's address.
        uvicorns |= {"log_config": None, "access_log": False, "proxy_headers": False}
        super().__init__(app, http=DeskProtocol, ws="none", **uvicorns)
        self.service = app
        self.request_seconds_max = settings.request_seconds_max
        self.connections_max = settings.connections_max

    @cached_property
    def hot(self) -> dict[tuple[bytes, bytes], HotRoute]:
        """The service's hot routes by method and path, as they stand in a request."""
        return {(method.encode(), path.encode()): hot for (method, path), hot in self.service.hot.items()}


class DeskProtocol(HttpToolsProtocol):
    """One connection. Its only timer is left running over many requests, so that a quick one costs none."""

    def __init__(
        self,
        config: DeskConfig,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._service = config.service
        self._hot = config.hot
        self._seconds_max = config.request_seconds_max
        self._connections_max = config.connections_max
        self._timer: asyncio.TimerHandle | None = None
        self._waiting_since: float | None = None  # for the rest of a request
        self._idle_since: float | None = None  # the last answer
        self._has_begun = False  # the request that is waited for
        self._has_ended = False  # the connection: nothing more is read
        self._held_bytes = 0  # read, and neither a finished head nor body yet
        self._answering: RequestResponseCycle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        if len(self.connections) > self._connections_max:
            self._end(Overloaded("Too many connections are open.", retry_after_seconds=1))
        else:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._has_ended:
            return
        if self._waiting_since is None:
            self._wait()
        self._held_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            _log.debug("an upgrade was asked for and not made")
        except httptools.HttpParserError as error:
            # An error raised in a callback of the parser comes as the context of the parser's own.
            told = error.__context__
            self._end(told if isinstance(told, DeskError) else InvalidHttp("This is no valid HTTP request."))
        else:
            if self._held_bytes > HEAD_BYTES_MAX:
                self._end(_headers_too_large())

    def on_message_begin(self) -> None:
        # The scope is made later, and for a hot route it is a small one.
        self.url = b""
        self.scope = {}  # type: ignore[typeddict-item]
        self.expect_100_continue = False
        self.headers = []
        self._has_begun = True
        if self._waiting_since is None:
            self._wait()

    def on_headers_complete(self) -> None:
        # Only when more than that was read at all: counting each request's headers would cost each request.
        if self._held_bytes > HEAD_BYTES_MAX:
            head_bytes = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
            if head_bytes > HEAD_BYTES_MAX:
                raise _headers_too_large()
        self._held_bytes = 0
        hot = self._hot_route()
        if hot is None:
            self._make_scope()
            super().on_headers_complete()
        else:
            self.cycle = HotCycle(self, self._service, hot, keep_alive=self.parser.should_keep_alive())

    def on_body(self, body: bytes) -> None:
        self._held_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._held_bytes = 0
        self._waiting_since = self._idle_since = None
        self._has_begun = False
        super().on_message_complete()
        self.cycle.more_body = False  # uvicorn leaves it when the answer came before the end of the body
        if type(self.cycle) is HotCycle:
            self._answering = self.cycle
            task = self.loop.create_task(self.cycle.answer())
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    def _hot_route(self) -> HotRoute | None:
        """The hot route that the request asks for, when nothing is unusual about it and no earlier one is answered."""
        if self.cycle is not None and not self.cycle.response_complete:
            return None
        path, _, query = self.url.partition(b"?")
        hot = self._hot.get((self.parser.get_method(), path))
        if hot is None or self.expect_100_continue or self.parser.get_http_version() != "1.1":
            return None
        given_id = None
        for name, value in self.headers:
            if name not in _TELLING:
                continue
            if name == request_ids.HEADER:
                given_id = value
            elif name != b"content-length" or int(value) > BODY_BYTES_MAX:
                return None
        scope: Any = {  # all that an endpoint of ours looks at
            "type": "http",
            "method": hot.method,
            "path": hot.path,
            "query_string": query,
            "headers": self.headers,
            _GIVEN_ID: given_id,
        }
        self.scope = scope
        return hot

    def _make_scope(self) -> None:
        """What uvicorn does at the beginning of a request, with what has been read since."""
        url, headers, expects = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expects
        self.headers += headers

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answering = cycle
        cycle.transport = OneWrite(cycle)
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        # uvicorn's own makes a timer here and cancels it with the next request: for each request the cost of two.
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        else:
            self._idle_since = self.loop.time()
            if self._timer is None:
                self._timer = self.loop.call_later(self.timeout_keep_alive, self._look)

    def _wait(self) -> None:
        self._waiting_since = self.loop.time()
        if self._timer is None:
            self._timer = self.loop.call_later(self._seconds_max, self._look)

    def _look(self) -> None:
        """Ends the connection if what is waited for is late; otherwise looks again when it would be."""
        self._timer = None
        now = self.loop.time()
        if self._waiting_since is not None:
            if self.flow.read_paused:  # it is we who do not read
                self._waiting_since = now
            left = self._waiting_since + self._seconds_max - now
        elif self._idle_since is not None:
            left = self._idle_since + self.timeout_keep_alive - now
        else:  # the client waits for us
            return
        if left > 0:
            self._timer = self.loop.call_later(left, self._look)
        elif self._has_begun:
            self._end(RequestTimeout(f"The request was not complete within {self._seconds_max:g} s."))
        else:
            self._end(None)

    def _end(self, error: DeskError | None) -> None:
        """Ends the connection: with the error, if the request that is being read has no answer yet."""
        self._has_ended = True
        self._stop_timer()
        _log.debug("a connection is ended: %s", error)
        cycle = self._answering
        if cycle is not None and cycle.more_body:  # the app has this request already
            cycle.disconnected = True
            cycle.message_event.set()
            if cycle.response_started:
                error = None
        elif cycle is not None and not cycle.response_complete:
            # An earlier request: it gets its own answer, and the connection ends after that.
            cycle.keep_alive = False
            self.pipeline.clear()
            return
        if error is None:
            self.transport.close()
            return
        self.transport.write(self._problem(error))
        self.transport.write_eof()
        self._timer = self.loop.call_later(LINGER_SECONDS, self.transport.close)

    def _problem(self, error: DeskError) -> bytes:
        instance, headers = (self.scope.get("path", "/"), self.headers) if self._has_begun else ("/", [])
        request_id = request_ids.choose(request_ids.given_in(headers))
        problem = problem_response(error, instance)
        return _written(problem, self.server_state.default_headers, request_id, keep_alive=False)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class HotCycle(RequestResponseCycle):
    """A request for a hot route and its answer: uvicorn's cycle without what ASGI needs, at a third of the cost.

    It starts when the whole request is there.
    """

    def __init__(self, protocol: DeskProtocol, service: Service, hot: HotRoute, *, keep_alive: bool) -> None:
        self.scope = protocol.scope
        self.transport = protocol.transport
        self.flow = protocol.flow
        self.default_headers = protocol.server_state.default_headers
        self.on_response = protocol.on_response_complete
        self.message_event = _UNHEARD
        self.keep_alive = keep_alive
        self.body = bytearray()
        self.more_body = True
        self.disconnected = self.response_started = self.response_complete = False
        self._service = service
        self._hot = hot

    async def answer(self) -> None:
        """Asks the endpoint, and writes what it answers."""
        scope: Any = self.scope
        request_id = request_ids.begin(scope[_GIVEN_ID])
        scope[WHOLE_BODY] = bytes(self.body)
        response = await self._service.answer(self._hot, Request(scope))
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        if self.disconnected:
            return
        self.response_started = self.response_complete = True
        self.transport.write(_written(response, self.default_headers, request_id, keep_alive=self.keep_alive))
        if not self.keep_alive:
            self.transport.close()
        self.on_response()


# uvicorn tells a cycle's event of each part of the body; a hot cycle does not wait for any.
_UNHEARD = asyncio.Event()
# The headers that a hot route is told by: its request's id, and how the body is read or what comes after the answer.
_TELLING = frozenset({request_ids.HEADER, b"content-length", b"transfer-encoding", b"upgrade"})


def _written(
    response: Response, default_headers: list[tuple[bytes, bytes]], request_id: bytes, *, keep_alive: bool
) -> bytes:
    """The bytes of a whole answer, whose headers are our own."""
    lines = [b"%b: %b\r\n" % each for each in (*default_headers, *response.raw_headers)]
    if not keep_alive:
        lines.append(b"connection: close\r\n")
    return b"".join(
        (STATUS_LINE[response.status_code], *lines, b"x-request-id: ", request_id, b"\r\n\r\n", response.body)
    )


class OneWrite(asyncio.Transport):
    """The transport of one answer. Its head waits for its body: each write is a system call that wakes the client."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._transport = cycle.transport
        self._cycle = cycle
        self._head: bytes | None = None  # empty once it is written

    def write(self, data: bytes) -> None:  # type: ignore[override]  # uvicorn writes nothing else
        if self._head is None and self._cycle.response_started and self._cycle.scope["method"] != "HEAD":
            self._head = data
            return
        if self._head:
            data, self._head = self._head + data, b""
        self._transport.write(data)

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def close(self) -> None:
        if self._head:
            self.write(b"")
        self._transport.close()


def _headers_too_large() -> HeadersTooLarge:
    return HeadersTooLarge(f"Headers may have {HEAD_BYTES_MAX} bytes at the most.", bytes_max=HEAD_BYTES_MAX)
