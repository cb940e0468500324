"""Running services: several servers in one loop, on ports bound before, stopped in order."""

import contextlib
import gc
import logging
import socket
from collections.abc import AsyncIterator, Iterator, Mapping

from buydesk.embedded.supervisor import watch_supervisor
from buydesk.http.app import Service
from buydesk.http.listeners import allow_connections, bind, close
from buydesk.http.server import serving
from buydesk.observability.sentry import error_reporting
from buydesk.runtime.signals import stop_signals
from buydesk.runtime.wiring import WiredServices, wire
from buydesk.settings.model import Settings
from buydesk.topology import PORTS

# How many more objects are made than freed before the garbage collector runs; Python's own number is 700.
GARBAGE_OBJECTS = 20_000


@contextlib.asynccontextmanager
async def serve_apps(
    apps: Mapping[str, Service], listeners: Mapping[str, socket.socket], settings: Settings
) -> AsyncIterator[None]:
    """While entered, the apps are served. Leaving drains them one after the other, each for a bounded time."""
    allow_connections()
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(close, listeners.values())
        for name in PORTS:
            if name in apps:
                await stack.enter_async_context(serving(apps[name], listeners[name], settings))
        with _tuned_gc():
            yield


@contextlib.contextmanager
def _tuned_gc() -> Iterator[None]:
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
        async with run_wired(wired, listeners, settings):
            await stop.wait()


@contextlib.asynccontextmanager
async def run_wired(
    wired: WiredServices, listeners: Mapping[str, socket.socket], settings: Settings
) -> AsyncIterator[None]:
    """While entered, what is wired runs, and what it logs as wrong is reported."""
    async with error_reporting(settings, wired.apps):
        handler = wired.report_handler()
        logging.getLogger().addHandler(handler)
        try:
            async with serve_apps(wired.apps, listeners, settings):
                yield
        finally:
            logging.getLogger().removeHandler(handler)
            await wired.close()
