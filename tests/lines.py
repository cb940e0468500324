"""Lines to servers that can be cut, for tests of lost requests and lost answers."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Literal

Fault = Literal["before", "after"]


class Line:
    """A relay to a server. `fault` strikes once, at the next bytes of a client: "before" drops them and cuts, "after"
    lets them through and cuts as soon as the server answers. `instead`, if given, is what the client gets for that
    answer, and nothing is cut. `refusing` cuts whoever calls."""

    def __init__(self, server: Path | int) -> None:
        self._server = server
        self._writers: set[asyncio.StreamWriter] = set()
        self.fault: Fault | None = None
        self.instead: bytes | None = None
        self.refusing = False
        self.calls = 0
        self.struck = asyncio.Event()

    async def relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serves one client until either end closes."""
        self.calls += 1
        self._writers.add(writer)
        if self.refusing:
            self._cut(writer)
            return
        if isinstance(self._server, Path):
            there, upstream = await asyncio.open_unix_connection(self._server)
        else:
            there, upstream = await asyncio.open_connection("127.0.0.1", self._server)
        self._writers.add(upstream)
        striking = asyncio.Event()
        await asyncio.gather(
            self._requests(reader, upstream, writer, striking), self._answers(there, writer, upstream, striking)
        )

    async def _requests(
        self,
        reader: asyncio.StreamReader,
        upstream: asyncio.StreamWriter,
        writer: asyncio.StreamWriter,
        striking: asyncio.Event,
    ) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                fault, self.fault = self.fault, None
                if fault is not None:
                    self.struck.set()
                if fault == "before":
                    break
                if fault == "after" or self.instead is not None:
                    striking.set()
                upstream.write(data)
        self._cut(upstream, writer)

    async def _answers(
        self,
        there: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        upstream: asyncio.StreamWriter,
        striking: asyncio.Event,
    ) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await there.read(65536):
                if striking.is_set():
                    if self.instead is None:
                        break
                    data, self.instead = self.instead, None
                    striking.clear()
                writer.write(data)
        self._cut(upstream, writer)

    def _cut(self, *writers: asyncio.StreamWriter) -> None:
        for writer in writers:
            writer.transport.abort()
            self._writers.discard(writer)

    def cut_all(self) -> None:
        """Cuts every connection there is."""
        self._cut(*self._writers)


@contextlib.asynccontextmanager
async def line_to_postgres(dsn: str, directory: Path) -> AsyncIterator[tuple[str, Line]]:
    """A DSN that leads to the server of `dsn` through a line; `directory` is for the line's socket."""
    socket_dir = dsn.split("?host=")[1].split("&", maxsplit=1)[0]
    line = Line(Path(socket_dir) / ".s.PGSQL.5432")
    server = await asyncio.start_unix_server(line.relay, directory / ".s.PGSQL.5432")
    yield dsn.replace(f"host={socket_dir}", f"host={directory}"), line
    server.close()
    line.cut_all()
    await server.wait_closed()


@contextlib.asynccontextmanager
async def line_to_url(url: str) -> AsyncIterator[tuple[str, Line]]:
    """A URL that leads to the service at `url` through a line."""
    line = Line(int(url.rpartition(":")[2]))
    server = await asyncio.start_server(line.relay, "127.0.0.1", 0)
    yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", line
    server.close()
    line.cut_all()
    await server.wait_closed()
