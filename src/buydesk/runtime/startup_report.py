"""The startup report of `buydesk up`: what runs where and, when no orders are taken, why and what to do."""

import asyncio
import contextlib
import shlex
import sys
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

from buydesk import __version__
from buydesk.settings.model import Settings
from buydesk.settings.types import tokens
from buydesk.times import format_time
from buydesk.topology import PORTS

READY_SECONDS_MAX = 10.0
READY_POLL_SECONDS = 0.05
SOURCES_SECONDS_MAX = 3.0

if TYPE_CHECKING:
    from aiohttp import ClientSession

Document = Mapping[str, Any]
# Given what a service says is missing: whether waiting for it has no sense any more.
ShouldStopWaiting = Callable[[Collection[str]], Awaitable[bool]]


@dataclass(frozen=True)
class Dependencies:
    """What the desk runs on, in words; `given` are the variables that name servers which are not its own."""

    database: str
    redis: str
    given: tuple[str, ...] = ()


def new_session() -> "ClientSession":
    """A client for these functions."""
    import aiohttp  # noqa: PLC0415  # imported by now, with the services; at the top it would delay PostgreSQL's start

    return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=READY_SECONDS_MAX))


async def wait_until_ready(
    session: "ClientSession", url: str, seconds_max: float, should_stop_waiting: ShouldStopWaiting | None = None
) -> str:
    """Returns "" when the service is ready, or else, in the end, what it says is missing."""
    reason = "it does not answer"
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds_max):
            while True:
                status, document = await _get(session, url + "/readyz")
                if status == HTTPStatus.OK:
                    return ""
                missing = document.get("missing", [])
                reason = "; ".join(f"{each['what']} ({each['why']})" for each in missing) or reason
                if should_stop_waiting and await should_stop_waiting([each["what"] for each in missing]):
                    return reason
                await asyncio.sleep(READY_POLL_SECONDS)
    return reason


async def wait_until_selling(session: "ClientSession", settings: Settings, since: datetime, seconds_max: float) -> str:
    """As `wait_until_ready` for orders, but no longer than until sources that were asked after `since` prove no price:
    nobody knows when they will."""

    async def should_stop_waiting(missing: Collection[str]) -> bool:
        if list(missing) != ["price"]:
            return False
        state = await _found(session, settings.own_url("api_cache_proxy") + "/sources")
        return state is not None and bool(state["problem"]) and state["at"] >= format_time(since)

    return await wait_until_ready(session, settings.own_url("create_buy_order"), seconds_max, should_stop_waiting)


async def responds(session: "ClientSession", url: str) -> bool:
    """Whether there is any answer at the address: one that says it has too much to do is one, too."""
    status, _ = await _get(session, url)
    return status is not None


async def startup_report(
    session: "ClientSession", settings: Settings, parts: Dependencies, seconds: float, missing: str
) -> str:
    """What runs where, as its services tell it: addresses, database, feed, price, room under the cap, sources that are
    not well, a call to try. `missing` is what keeps orders from being taken, "" when nothing does."""
    rows = [(name, settings.own_url(name), settings.own_url(name) + "/docs") for name in sorted(PORTS)]
    width = max(len(name) for name, _, _ in rows) + 2
    ask = partial(_found, session)
    record = await ask(settings.own_url("api_cache_proxy") + "/record")
    state = await _sources_at(session, settings, record)
    token = tokens(settings.reading_tokens)[0]
    exposure = await ask(settings.own_url("db_proxy") + "/exposure", token)
    about = _about(settings, parts, record, exposure)
    shown = "-H 'Authorization: Bearer bd_...' " if settings.access == "keys" else ""
    lines = [
        f"buydesk {__version__} is up after {seconds:.1f} s" + (f", but not ready: {missing}" if missing else "."),
        "",
        *(f"  {name:<{width}}{address:<28}{docs}" for name, address, docs in rows),
        "",
        *(f"  {name:<{width}}{text}" for name, text in about.items()),
        "",
        *_sources(settings, parts, state, width, has_price=record is not None),
        "Try it (Ctrl-C stops the desk):",
        f"  curl -X POST {shown}'{settings.own_url('create_buy_order')}/place_order/?currency=eur&amount=69'",
    ]
    return "\n".join(lines)


def _about(
    settings: Settings, parts: Dependencies, record: Document | None, exposure: Document | None
) -> dict[str, str]:
    feed = "LIVE prices"
    if settings.price_feed == "sandbox":
        feed = "SANDBOX: recorded prices, no real orders"
        feed += f", replaying {record['replayed_from']}" if record else ""
        feed += f", with the fault {settings.sandbox_fault}" if settings.sandbox_fault else ""
    price = "none: no orders are taken until there is one"
    if record is not None:
        price = "1 BTC = " + ", ".join(f"{rate} {currency}" for currency, rate in record["rates"].items())
    room = "unknown: the ledger does not answer (see the log)"
    if exposure is not None:
        room = "{available} of {cap} BTC can still be sold, {orders} orders are stored".format(**exposure)
    access = "keys: callers show one (buydesk keys create)"
    if settings.access == "proxy":
        access = "proxy: a proxy in front checks keys"
    if settings.access == "open":
        others = "every machine that reaches" if settings.is_beyond_loopback else "programs of this machine, at"
        access = f"open, no key is needed: for {others} {settings.host}"
    return {
        "access": access,
        "database": parts.database,
        "redis": parts.redis,
        "feed": feed,
        "price": price,
        "cap": room,
        "data": str(settings.data_dir),
    }


async def _sources_at(session: "ClientSession", settings: Settings, record: Document | None) -> Document | None:
    """The state of the sources, of the tick that made the record or a later one: it is stored after the price."""
    state = None
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(SOURCES_SECONDS_MAX):
            while True:
                state = await _found(session, settings.own_url("api_cache_proxy") + "/sources")
                if record is None or (state is not None and state["at"] >= record["decided_at"]):
                    return state
                await asyncio.sleep(READY_POLL_SECONDS)
    return state


def _sources(
    settings: Settings, parts: Dependencies, state: Document | None, width: int, *, has_price: bool
) -> list[str]:
    """The sources that are not well and why and, when no orders are taken for it, what to do."""
    unwell = [each for each in state["sources"] if each["detail"]] if state else []
    lines = [f"  {each['source']:<{width}}{each['detail']}" for each in unwell]
    if has_price:
        return ["Not all price sources are well:", *lines, ""] if lines else []
    problem = f" ({state['problem']})" if state and state["problem"] else ""
    lines = [f"No orders are taken: there is no price{problem}.", *lines]
    if settings.price_feed == "live":
        lines += [
            f"All are asked again every {settings.feed_interval_seconds:g} s; orders are taken once"
            f" {settings.price_sources_min} of them agree.",
            "Without the internet there is the sandbox, with recorded prices; stop this desk (Ctrl-C), then:",
            f"  {sandbox_command(settings, parts.given)}",
        ]
    return [*lines, ""]


def sandbox_command(settings: Settings, given: Collection[str] = ()) -> str:
    """The command that runs a sandbox in the place of this live desk, apart from the live orders: with a data directory
    of its own, and without the servers that the variables `given` name."""
    assert settings.data_dir is not None  # noqa: S101  # claimed by now
    program = [sys.argv[0]] if Path(sys.argv[0]).name == "buydesk" else [sys.executable, "-m", "buydesk"]
    unset = ["env", *(part for name in given for part in ("-u", name))] if given else []
    data_dir = settings.data_dir.with_name(f"{settings.data_dir.name}-sandbox")
    offset = ["--port-offset", str(settings.port_offset)] if settings.port_offset else []
    return shlex.join([*unset, *program, "up", "--feed", "sandbox", "--data-dir", str(data_dir), *offset])


async def _get(session: "ClientSession", url: str, token: str = "") -> tuple[int | None, dict[str, Any]]:
    """The status and the JSON of the answer; None and nothing when there is none."""
    import aiohttp  # noqa: PLC0415  # as in new_session

    try:
        async with session.get(url, headers={"Authorization": f"Bearer {token}"} if token else {}) as response:
            return response.status, dict(await response.json())
    except (aiohttp.ClientError, TimeoutError, ValueError):
        return None, {}


async def _found(session: "ClientSession", url: str, token: str = "") -> Document | None:
    """The JSON of a 200, None for anything else."""
    status, document = await _get(session, url, token)
    return document if status == HTTPStatus.OK else None
