"""The protocol: HTTP/1.1 as llhttp reads it (by httptools), one request of a connection at a time.

What lies behind a request waits until that one is answered, all but a few KiB of it unparsed: no answer can stand in
another's place.
"""

import asyncio
import contextlib
import logging
from collections import deque
from dataclasses import dataclass, field
from http import HTTPStatus

import httptools

from buydesk.errors import DeskError, HeadersTooLarge, InvalidHttp, Overloaded, PayloadTooLarge, RequestTimeout
from buydesk.hosts import Address
from buydesk.http.connections import Connections
from buydesk.http.requests import Headers, Request, read_headers
from buydesk.http.responses import StreamedResponse, problem_response, serialize
from buydesk.observability import request_ids

# The request line and all headers together; the same again for what stands between the parts of a body.
HEAD_BYTES_MAX = 64 * 1024
HEADERS_MAX = 100
# How many bytes are parsed at a time: of the requests that lie behind one, only those that fit are parsed with it.
SLICE_BYTES = 4096
# How much is taken from the client of a body that nobody reads, or of what lies behind a request.
UNREAD_BYTES_MAX = 64 * 1024
# How long what still comes after a last answer is thrown away: an immediate close would cut off the answer itself.
LINGER_SECONDS = 1.0
# How often it is looked whether the client of a stream has read on.
STREAM_PAUSE_SECONDS = 0.1

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Incoming:
    """A request that is being read, and its body."""

    _connection: "Connection"
    method: str = ""
    target: bytes = b""
    version: str = ""
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytearray = field(default_factory=bytearray)
    keep_alive: bool = False
    is_complete: bool = False
    _arrived: "asyncio.Future[None] | None" = None
    _error: DeskError | None = None

    @property
    def is_awaited(self) -> bool:
        """Whether somebody waits for more of the body."""
        return self._arrived is not None and not self._arrived.done()

    def notify(self, error: DeskError | None = None) -> None:
        """Whoever waits for the body: there is more, or no more comes for this error."""
        self._error = self._error or error
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(None)

    async def read(self, headers: Headers, bytes_max: int, seconds_max: float) -> bytes:
        """The body; raises PayloadTooLarge, RequestTimeout and, for one that breaks off, InvalidHttp."""
        if not self.is_complete:
            # The parser has read it as 64 bits; before those may stand more zeros than Python takes for a number.
            if int((headers.get("content-length") or "0")[-20:]) > bytes_max:
                raise _too_large(bytes_max)
            if (headers.get("expect") or "").lower() == "100-continue" and self.version == "1.1":
                self._connection.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            try:
                async with asyncio.timeout(seconds_max):
                    await self._rest(bytes_max)
            except TimeoutError as error:
                raise RequestTimeout(f"The request was not complete within {seconds_max:g} s.") from error
        if len(self.body) > bytes_max:
            raise _too_large(bytes_max)
        return bytes(self.body)

    async def _rest(self, bytes_max: int) -> None:
        while not self.is_complete and len(self.body) <= bytes_max:
            if self._error is not None:
                raise self._error
            self._arrived = asyncio.get_running_loop().create_future()
            self._connection.read_on()
            await self._arrived


class Connection(asyncio.Protocol):
    """One connection. `whose` is what it is counted by, `peer` the address at its other end."""

    def __init__(self, connections: Connections) -> None:
        self.whose: object = None
        self.peer: Address | None = None
        self.is_of_proxy = False
        self.head_since: float | None = None  # the first bytes of a request whose head is not whole
        self.idle_since: float | None = connections.clock.monotonic()  # the last answer, or none yet
        self._connections = connections
        self._transport: asyncio.Transport
        self._parser = httptools.HttpRequestParser(self)
        self._incoming: Incoming | None = None  # whose end is not read
        self._is_head_read = False
        self._held_bytes = 0  # parsed since the last whole head or part of a body
        self._waiting: deque[Incoming] = deque()
        self._answering: Incoming | None = None
        self._unparsed = b""
        self._stopped_reading = False  # what comes is not read any more
        self._is_last = False  # there is no further request after the one that is answered
        self._has_eof = False  # the client sends no more
        self._has_ended = False  # nothing is written any more
        self._is_paused = False  # the client does not read
        self._unread_since = float("inf")

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # TCP has no other
        self._transport = transport
        peer = transport.get_extra_info("peername")
        if peer is None:  # it has gone already
            self._stopped_reading = True
            self.abort()
        elif refusal := self._connections.admit(self, peer):
            self.refuse(Overloaded(refusal, retry_after_seconds=1))

    def data_received(self, data: bytes) -> None:
        if self._stopped_reading:
            return
        if not (self._unparsed or self._waiting) and self._answering in (None, self._incoming):
            self._parse(data)
            return
        self._unparsed += data
        if len(self._unparsed) > UNREAD_BYTES_MAX:
            self._transport.pause_reading()

    def eof_received(self) -> bool:
        """The client sends no more, and may still read what it has asked for."""
        self._has_eof = True
        if self._answering is not None and self._answering is self._incoming:
            self._answering.notify(_broken_off())
        return self._answering is not None or bool(self._waiting or self._unparsed)

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.forget(self)
        self._stopped_reading = self._is_last = True
        self._waiting.clear()
        self._unparsed = b""
        if self._incoming is not None:
            self._incoming.notify(_broken_off())

    def pause_writing(self) -> None:
        self._is_paused = True

    def resume_writing(self) -> None:
        self._is_paused = False
        self._next_request()

    def on_message_begin(self) -> None:
        """Called by the parser, as those below."""
        self._incoming = Incoming(self)
        self._is_head_read = False
        self.idle_since = None

    def on_url(self, url: bytes) -> None:
        self._being_read().target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_head_read:  # a trailer: of no meaning to a request
            return
        headers = self._being_read().headers
        headers.append((name, value))
        if len(headers) > HEADERS_MAX:
            raise HeadersTooLarge(f"A request may have at most {HEADERS_MAX} headers.")

    def on_headers_complete(self) -> None:
        incoming = self._being_read()
        incoming.method = self._parser.get_method().decode()
        incoming.version = self._parser.get_http_version()
        incoming.keep_alive = self._parser.should_keep_alive() and incoming.version == "1.1"
        self._is_head_read = True
        self._held_bytes = 0

    def on_body(self, body: bytes) -> None:
        incoming = self._being_read()
        self._held_bytes = 0
        incoming.body += body
        if len(incoming.body) > UNREAD_BYTES_MAX and not incoming.is_awaited:
            self._transport.pause_reading()
        incoming.notify()

    def on_message_complete(self) -> None:
        incoming = self._being_read()
        self._incoming = None
        self._held_bytes = 0
        incoming.is_complete = True
        incoming.notify()
        if len(incoming.body) > UNREAD_BYTES_MAX:
            self.read_on()
        if incoming is not self._answering:
            self._waiting.append(incoming)

    def _being_read(self) -> Incoming:
        assert self._incoming is not None  # noqa: S101  # the parser says when one begins
        return self._incoming

    def _parse(self, data: bytes) -> None:
        """Reads up to the end of a request, and has it answered; one whose body is still to come, too."""
        position = 0
        while position < len(data) and not self._waiting and not self._stopped_reading:
            part = data if len(data) <= SLICE_BYTES else data[position : position + SLICE_BYTES]
            position += len(part)
            self._held_bytes += len(part)
            try:
                self._parser.feed_data(part)
            except httptools.HttpParserUpgrade as upgrade:
                data, position = self._without_upgrade() + data[position - len(part) + upgrade.args[0] :], 0
            except httptools.HttpParserError as error:
                # An error raised in a callback of the parser comes as the context of the parser's own.
                cause = error.__context__
                self.refuse(cause if isinstance(cause, DeskError) else InvalidHttp("This is no valid HTTP request."))
            else:
                if self._held_bytes > HEAD_BYTES_MAX:
                    self.refuse(HeadersTooLarge(f"Headers may have at most {HEAD_BYTES_MAX} bytes."))
        if not self._stopped_reading:
            self._unparsed = data[position:]
            if self._incoming is not None and self._is_head_read and self._incoming is not self._answering:
                self._waiting.append(self._incoming)
        self._next_request()

    def _parse_on(self) -> None:
        """Reads what has come meanwhile."""
        data, self._unparsed = self._unparsed, b""
        self.read_on()
        self._parse(data)

    def _without_upgrade(self) -> bytes:
        """The head of the request that was read last, to be read once more: no upgrade is made (RFC 9110, section 7.8),
        but of a request that asks for one the parser reads no body."""
        incoming = self._waiting.pop()
        if incoming.method == "CONNECT":
            self.refuse(InvalidHttp("This is no proxy."))
        lines = [b"%b %b HTTP/%b\r\n" % (incoming.method.encode(), incoming.target, incoming.version.encode())]
        lines += [b"%b: %b\r\n" % each for each in incoming.headers if each[0].lower() != b"upgrade"]
        self._parser = httptools.HttpRequestParser(self)
        return b"".join((*lines, b"\r\n"))

    def _next_request(self) -> None:
        """Has the next request answered once the client has taken the answers before."""
        if self._answering is not None or self._is_paused:
            return
        if self._waiting:
            self.head_since = None
            incoming = self._answering = self._waiting.popleft()
            task = asyncio.get_running_loop().create_task(self._answer(incoming))
            self._connections.answering.add(task)
            task.add_done_callback(self._answered)
            if not incoming.is_complete:
                self._parse_on()
                if self._has_eof:
                    incoming.notify(_broken_off())
        elif self._unparsed:
            self._parse_on()
        elif self._stopped_reading or self._is_last or self._has_eof:
            self._end()
        elif self._incoming is not None:
            self.head_since = self.head_since or self._connections.clock.monotonic()
        else:
            self.head_since = None
            self.idle_since = self.idle_since or self._connections.clock.monotonic()

    async def _answer(self, incoming: Incoming) -> None:
        headers = read_headers(incoming.headers)
        given = headers.getall(request_ids.HEADER, [])
        request_id = request_ids.begin(given[-1] if given else None)  # of several the nearest proxy's
        request = Request(
            incoming, headers, self._connections.request_seconds_max, peer=self.peer, is_of_proxy=self.is_of_proxy
        )
        response = await self._connections.respond(request)
        is_stream = isinstance(response, StreamedResponse)
        if not incoming.is_complete or response.status_code == HTTPStatus.BAD_REQUEST or is_stream:
            incoming.keep_alive = False  # where the next request begins is not known, or not to be believed
        self._is_last = self._is_last or not incoming.keep_alive
        if self._is_last:
            self._stopped_reading = True
            self._waiting.clear()
            self._unparsed = b""
        is_last = self._stopped_reading and not self._waiting
        self._unread_since = float("inf")
        self.write(serialize(response, request_id, is_last=is_last, is_head=incoming.method == "HEAD"))
        if isinstance(response, StreamedResponse):
            await self._stream(response, is_head=incoming.method == "HEAD")

    async def _stream(self, response: StreamedResponse, *, is_head: bool) -> None:
        """The parts of an answer as they come, for as long as the client takes them."""
        async with contextlib.aclosing(response.parts) as parts:
            while not is_head and not self._transport.is_closing():
                if self._is_paused:
                    await asyncio.sleep(STREAM_PAUSE_SECONDS)
                elif (part := await anext(parts, None)) is not None:
                    self.write(part)
                else:
                    return

    def _answered(self, task: "asyncio.Task[None]") -> None:
        self._answering = None
        self._connections.answering.discard(task)
        if task.cancelled():  # by a process that ends
            self.abort()
        elif error := task.exception():
            _log.error("a request could not be answered", exc_info=error)
            self.abort()
        else:
            self._next_request()

    def write(self, data: bytes) -> None:
        """To the client, if it is there."""
        if not self._transport.is_closing():
            self._transport.write(data)

    def read_on(self) -> None:
        """Takes more from the client."""
        if not self._transport.is_closing():
            self._transport.resume_reading()

    def refuse(self, error: DeskError) -> None:
        """Nothing more is read. The error is the answer to the request that is being read, if none before it is still
        to be answered; otherwise the connection ends after those."""
        self._stopped_reading = True
        self.head_since = None
        self._unparsed = b""
        if self._incoming is not None and self._incoming is self._answering:
            self._incoming.notify(error)  # the answer of its own is under way
        elif self._answering is None and not self._waiting:
            target = self._incoming.target if self._incoming is not None else b"/"
            problem = problem_response(error, target.decode("latin-1").partition("?")[0])
            self.write(serialize(problem, request_ids.begin(), is_last=True))
            self._end()

    def close(self) -> None:
        """Ends it: at once, or when the request that is being answered has its answer."""
        self._is_last = True
        self._waiting.clear()
        self._unparsed = b""
        if self._answering is None:
            self._transport.close()

    def _end(self) -> None:
        """Ends it; the client has a moment to read its answer."""
        self._stopped_reading = True
        self.idle_since = self.head_since = None
        self._unparsed = b""
        if not self._transport.is_closing() and not self._has_ended:
            self._has_ended = True
            self.read_on()
            with contextlib.suppress(OSError):  # the client was quicker
                self._transport.write_eof()
            self._linger()

    def _linger(self) -> None:
        """Closes it after a moment, once the answer has left."""
        later = self._transport.close if self._transport.get_write_buffer_size() == 0 else self._linger
        asyncio.get_running_loop().call_later(LINGER_SECONDS, later)

    def abort(self) -> None:
        """Ends it at once."""
        self._transport.abort()

    def unread_since(self, now: float) -> float:
        """Since when the client has not taken an answer; in the future when it has."""
        if self._transport.get_write_buffer_size() == 0:
            self._unread_since = float("inf")
        else:
            self._unread_since = min(self._unread_since, now)
        return self._unread_since


def _broken_off() -> InvalidHttp:
    return InvalidHttp("The body ended too soon.")


def _too_large(bytes_max: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"The body may have at most {bytes_max} bytes.", bytes_max=bytes_max)
