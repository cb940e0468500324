"""The edge of every server: what a connection may send before a service hears of it.

uvicorn's own protocol takes headers of any size, waits for a request for ever, and refuses in plain text with a warning
in the log. Here each of these is limited and answered as a problem, like every other error of the desk; and a refusal
is never sent where the answer to an earlier request on the connection belongs.
"""

import asyncio
import logging
from typing import Any

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from buydesk.errors import DeskError, HeadersTooLarge, InvalidHttp, Overloaded, RequestTimeout
from buydesk.settings import Settings
from buydesk.web import problem_response

# The request line and all headers together; the same again for what comes after the headers and is no body.
HEAD_BYTES_MAX = 64 * 1024
# After a refusal what still comes is thrown away for so long: a close at once would cut off the refusal itself.
LINGER_SECONDS = 1.0

# At debug only: a client's fault is no report of ours.
_log = logging.getLogger(__name__)


class DeskConfig(uvicorn.Config):
    """uvicorn's configuration of one server, and the desk's limits of it; times in seconds."""

    def __init__(self, app: Any, settings: Settings, **uvicorns: Any) -> None:
        super().__init__(app, http=DeskProtocol, ws="none", log_config=None, access_log=False, **uvicorns)
        self.request_seconds_max = settings.request_seconds_max
        self.connections_max = settings.connections_max


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
        self._seconds_max = config.request_seconds_max
        self._connections_max = config.connections_max
        self._timer: asyncio.TimerHandle | None = None
        self._waiting_since: float | None = None  # for the rest of a request
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
        self._unset_keepalive_if_required()
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
        super().on_message_begin()
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
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._held_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._held_bytes = 0
        self._waiting_since = None
        self._has_begun = False
        super().on_message_complete()
        self.cycle.more_body = False  # uvicorn leaves it when the answer came before the end of the body

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    def _wait(self) -> None:
        self._waiting_since = self.loop.time()
        if self._timer is None:
            self._timer = self.loop.call_later(self._seconds_max, self._look)

    def _look(self) -> None:
        """Ends the connection if the request that is waited for is late; otherwise looks again when it would be."""
        self._timer = None
        if self._waiting_since is None:
            return
        now = self.loop.time()
        if self.flow.read_paused:  # it is we who do not read
            self._waiting_since = now
        left = self._waiting_since + self._seconds_max - now
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
        instance = self.scope.get("path", "/") if self._has_begun else "/"
        response = problem_response(error, instance)
        headers = [*self.server_state.default_headers, *response.raw_headers, (b"connection", b"close")]
        lines = [b"%b: %b\r\n" % each for each in headers]
        return b"".join([STATUS_LINE[error.status], *lines, b"\r\n", bytes(response.body)])

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _headers_too_large() -> HeadersTooLarge:
    return HeadersTooLarge(f"Headers may have {HEAD_BYTES_MAX} bytes at the most.", bytes_max=HEAD_BYTES_MAX)
