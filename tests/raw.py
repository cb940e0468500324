"""Connections to a service, written to byte by byte, and a service that says what of it arrived."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Response

from buydesk.backends.memory.reports import MemoryReportStore
from buydesk.http import app as web
from buydesk.http.requests import Request, require_json
from buydesk.http.responses import JSONBytesResponse, MsgspecResponse
from buydesk.observability.reporter import Reporter
from buydesk.settings.model import Settings
from tests.serving import served

AnyEcho = TypeVar("AnyEcho", bound="Echo")
LARGE_BYTES = 8_000_000
# A segment of its own for what was sent before: the server reads it while this passes, nearly always.
SEGMENT_SECONDS = 0.002


def settings(**given: Any) -> Settings:
    return Settings(report_interval_seconds=3600, **given)


@dataclass(frozen=True)
class RawResponse:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The problem's code; "" for what the server refuses by itself."""
        if self.body:
            assert self.headers["content-type"] == "application/problem+json", self
            assert self.json["status"] == self.status
            assert "x-request-id" in self.headers
            return str(self.json["code"])
        assert self.headers["content-length"] == "0"
        return ""


class Raw:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        # What the server calls this end.
        self.client = "{}:{}".format(*writer.get_extra_info("sockname"))

    async def send(self, *segments: bytes) -> None:
        for place, segment in enumerate(segments):
            if place:
                await asyncio.sleep(SEGMENT_SECONDS)
            self._writer.write(segment)
            await self._writer.drain()

    async def answer(self, method: str = "GET") -> RawResponse:
        """The next one; raises IncompleteReadError when the connection ends instead."""
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        status_line, *lines = head.removesuffix("\r\n\r\n").split("\r\n")
        version, status, _ = status_line.split(" ", 2)
        assert version in ("HTTP/1.1", "HTTP/1.0"), status_line
        headers = dict(line.lower().split(": ", 1) for line in lines)
        size = 0 if method == "HEAD" or status == "100" else int(headers["content-length"])
        return RawResponse(int(status), headers, await self._reader.readexactly(size))

    async def answers(self, last: bytes = b"") -> list[RawResponse]:
        """All until the connection ends, or up to that which has this in its body."""
        found: list[RawResponse] = []
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while not (last and found and last in found[-1].body):
                found.append(await self.answer())
        return found

    async def rest(self) -> bytes:
        """All that comes until the connection ends."""
        with contextlib.suppress(ConnectionError):
            return await self._reader.read()
        return b""

    def send_no_more(self) -> None:
        """And read on."""
        self._writer.write_eof()

    def abort(self) -> None:
        """Gone without a word."""
        own = self._writer.get_extra_info("socket")
        with contextlib.suppress(OSError):
            own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self._writer.transport.abort()


@asynccontextmanager
async def raw(port: int, address: str = "127.0.0.1", receive_bytes: int = 0) -> AsyncIterator[Raw]:
    """A connection from this address, which holds no more than so many bytes that nobody reads."""
    own = socket.socket()
    if receive_bytes:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    own.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    own.setblocking(False)
    own.bind((address, 0))
    try:
        await asyncio.get_running_loop().sock_connect(own, ("127.0.0.1", port))
    except BaseException:
        own.close()
        raise
    line = Raw(*await asyncio.open_connection(sock=own, limit=2**20))
    try:
        yield line
    finally:
        line.abort()


class Echo:
    """A service that keeps what reached it, and answers with it. What /slow answers waits for a test."""

    def __init__(self) -> None:
        self.port = 0
        self.reached: list[tuple[str | None, bytes]] = []  # the id and the body of each request
        self.called = asyncio.Event()
        self.go_on = asyncio.Event()
        self.answering: asyncio.Task[Any] | None = None  # what answers /slow

    def app(self, of: Settings) -> web.Service:
        @asynccontextmanager
        async def lifespan() -> AsyncIterator[None]:
            yield

        app = web.service_app("db_proxy", "A bench.", {}, Reporter("db_proxy", MemoryReportStore(of), of), lifespan)
        for path, methods, endpoint in (
            ("/echo", ("GET", "POST"), self._echo),
            ("/order", ("POST",), self._order),
            ("/slow", ("POST",), self._slow),
            ("/large", ("POST",), self._large),
            ("/much", ("POST",), self._much),
            ("/broken", ("POST",), self._broken),
        ):
            for method in methods:
                app.add_direct_route(path, method, endpoint, {"responses": {}})
        return app

    def keep(self, request: Request, body: bytes) -> None:
        self.reached.append((request.headers.get("x-id"), body))

    async def _echo(self, request: Request) -> Response:
        body = await request.body()
        self.keep(request, body)
        return MsgspecResponse({"id": request.headers.get("x-id"), "body": body.decode("latin-1")})

    async def _order(self, request: Request) -> Response:
        require_json(request)
        return await self._echo(request)

    async def _slow(self, request: Request) -> Response:
        self.answering = asyncio.current_task()
        self.called.set()
        await self.go_on.wait()
        return await self._echo(request)

    async def _much(self, request: Request) -> Response:
        return MsgspecResponse({"bytes": len(await request.body(LARGE_BYTES))})

    async def _large(self, _: Request) -> Response:
        self.called.set()
        return JSONBytesResponse(b"x" * LARGE_BYTES)

    async def _broken(self, _: Request) -> Response:
        raise ZeroDivisionError("nobody expects this")


@asynccontextmanager
async def echo_of(of: Settings, echo: AnyEcho) -> AsyncIterator[AnyEcho]:
    """The service, served."""
    async with served(echo.app(of), settings=of) as url:
        echo.port = int(url.rpartition(":")[2])
        try:
            yield echo
        finally:
            echo.go_on.set()
