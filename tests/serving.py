"""Serves an app in this process on a real port, so that its lines are measured and its bytes cross real TCP."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import uvicorn
from fastapi import FastAPI

from buydesk.http.app import Service
from buydesk.http.server import serving
from buydesk.settings.model import Settings


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class QuickServer(uvicorn.Server):
    """Stops when it is told to, instead of looking every tenth of a second whether it should."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.told_to_stop = asyncio.Event()

    async def main_loop(self) -> None:
        await self.told_to_stop.wait()


@contextlib.asynccontextmanager
async def served(app: FastAPI, port: int | None = None, settings: Settings | None = None) -> AsyncIterator[str]:
    """The base URL of the app while it runs; leaving ends it as a SIGTERM would."""
    listener = socket.create_server(("127.0.0.1", port or 0), backlog=2048)
    port = listener.getsockname()[1]
    async with contextlib.AsyncExitStack() as stack:
        if isinstance(app, Service):
            await stack.enter_async_context(serving(app, listener, settings or Settings()))
        else:  # not the desk's: somebody whom it asks
            await stack.enter_async_context(_by_uvicorn(app, listener))
        yield f"http://127.0.0.1:{port}"


@contextlib.asynccontextmanager
async def _by_uvicorn(app: FastAPI, listener: socket.socket) -> AsyncIterator[None]:
    # asyncio's own loop does this only for sockets it made; without it each answer waits 40 ms for the client's ACK.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=5)
    server = QuickServer(config)
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment]
    running = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started:
        if running.done():
            break
        await asyncio.sleep(0.005)
    try:
        yield
    finally:
        server.told_to_stop.set()
        await running
        listener.close()
