"""Running services: several servers in one loop, on ports bound before, stopped in order."""

import asyncio
import contextlib
import gc
import logging
import math
import socket
from collections.abc import AsyncIterator, Iterator, Mapping

import uvicorn

from buydesk.errors import CannotStart
from buydesk.local.children import watch_supervisor
from buydesk.local.ports import allow_connections, bind, close
from buydesk.local.signals import stop_signals
from buydesk.protocol import DeskConfig
from buydesk.sentry import told
from buydesk.settings import PORTS, Settings
from buydesk.web import Service
from buydesk.wiring import Wired, wire

# Longer than the services' own pools keep a connection, so that a pooled one is seldom cut in mid-air.
KEEP_ALIVE_SECONDS = 75
# So many new objects beyond those that went make the garbage collector look; Python's own number is 700.
GARBAGE_OBJECTS = 20_000


class Server(uvicorn.Server):
    """A uvicorn server that leaves signals to its desk: several of them share one process."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Captures none."""
        yield


@contextlib.asynccontextmanager
async def running(
    apps: Mapping[str, Service], listeners: Mapping[str, socket.socket], settings: Settings
) -> AsyncIterator[None]:
    """While entered, the apps are served. Leaving drains them one after the other, each for a bounded time."""
    allow_connections()
    servers: dict[str, tuple[Server, asyncio.Task[None]]] = {}
    try:
        for name in PORTS:
            if name in apps:
                servers[name] = await _start(apps[name], listeners[name], settings)
        with _collector_spared():
            yield
    finally:
        for name in reversed(PORTS):
            if name in servers:
                server, serving = servers[name]
                server.should_exit = True
                await serving
        close(listeners.values())


@contextlib.contextmanager
def _collector_spared() -> Iterator[None]:
    """What is there once the services run stays for good: the garbage collector need not look at it again and again,
    nor after every few hundred new objects. Measured: a tenth of an order's time."""
    thresholds = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(GARBAGE_OBJECTS, *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()


async def serve(settings: Settings, service: str) -> None:
    """One service in this process, until a signal or the end of its supervisor; raises CannotStart."""
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stop_signals())
        if settings.supervisor_fd is not None:
            stack.callback(watch_supervisor(settings.supervisor_fd, stop.set))
        listeners = bind(settings, [service])
        stack.callback(close, listeners.values())
        wired = wire(settings, [service])
        if service == "db_proxy":
            await wired.check_mode()
        async with served(wired, listeners, settings):
            await stop.wait()


@contextlib.asynccontextmanager
async def served(wired: Wired, listeners: Mapping[str, socket.socket], settings: Settings) -> AsyncIterator[None]:
    """While entered, what is wired runs, and what it logs as wrong is reported."""
    async with told(settings, wired.apps):
        handler = wired.report_handler()
        logging.getLogger().addHandler(handler)
        try:
            async with running(wired.apps, listeners, settings):
                yield
        finally:
            logging.getLogger().removeHandler(handler)
            await wired.close()


async def _start(app: Service, listener: socket.socket, settings: Settings) -> tuple[Server, asyncio.Task[None]]:
    config = DeskConfig(
        app,
        settings,
        lifespan="on",
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=math.ceil(settings.drain_seconds_max),
    )
    server = Server(config)
    serving = asyncio.create_task(_serve(server, listener, app.title))
    while not server.started and not serving.done():  # noqa: ASYNC110  # uvicorn has no event for it
        await asyncio.sleep(0.001)
    if serving.done():
        serving.result()
    return server, serving


async def _serve(server: Server, listener: socket.socket, title: str) -> None:
    try:
        await server.serve(sockets=[listener])
    except SystemExit as error:
        # uvicorn would end the whole process, with all the other services and servers in it.
        raise CannotStart(f"{title} did not start: see the log above") from error
