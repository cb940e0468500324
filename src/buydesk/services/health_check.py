"""health_check: where the services' reports arrive and are kept, and where operators read how the desk is."""

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from datetime import timedelta
from http import HTTPStatus
from typing import cast

import psutil
from fastapi import Response

from buydesk.errors import DeskError
from buydesk.http.app import CHECK_SECONDS_MAX, Service, service_app
from buydesk.http.members import read_query
from buydesk.http.reports import (
    FILTER,
    GET_REPORTS,
    GET_STATUS,
    POST_REPORT,
    STRANGERS_AT_ONCE_MAX,
    STRANGERS_PER_SECOND_MAX,
    parse_report,
)
from buydesk.http.requests import Request, require_json, require_token
from buydesk.http.responses import MsgspecResponse
from buydesk.limits import TokenBucket
from buydesk.observability.reporter import Reporter
from buydesk.observability.reports import ReportStore, StoredReport, service_state, stored_report_document
from buydesk.prices.documents import document_of
from buydesk.prices.model import PriceStore
from buydesk.settings.model import Settings
from buydesk.settings.types import tokens
from buydesk.times import CLOCK, Clock, format_time
from buydesk.topology import SERVICES

# The status of the sources is stored every interval: if it is older than this many, nobody polls them any more.
SOURCES_OLD_AFTER_INTERVALS = 3

_WRONG_TOKEN = "The token is not the one of the desk's services. Without any, you report as anybody."  # noqa: S105  # a sentence

Part = dict[str, object]
Check = Callable[[], Awaitable[None]]


_log = logging.getLogger(__name__)


def create_app(
    settings: Settings,
    report_store: ReportStore,
    ledger_check: Check,
    store: PriceStore,
    *,
    redis_check: Check | None,
    reporter: Reporter,
    clock: Clock = CLOCK,
) -> Service:
    """The service. Its caller closes the stores. `redis_check` is None where no Redis is configured."""

    psutil.cpu_percent(interval=None)  # the first call has nothing to compare with and always says 0
    summary = "How the desk is, and what its services report"
    app = service_app("health_check", summary, {"reports": report_store.check}, reporter)
    accepted = tokens(settings.reporting_tokens)
    strangers = TokenBucket(STRANGERS_PER_SECOND_MAX, STRANGERS_AT_ONCE_MAX, clock)

    async def report(request: Request) -> Response:
        verified = "authorization" in request.headers
        if verified:
            require_token(request, accepted, _WRONG_TOKEN)
        else:
            strangers.take()
        require_json(request)
        read_query(request)
        await report_store.report(parse_report(await request.body()), verified=verified)
        return MsgspecResponse({"status": "ok"})

    async def reports(request: Request) -> Response:
        found = await report_store.reports(**read_query(request, *FILTER))
        return MsgspecResponse({"data": [stored_report_document(kept) for kept in found]})

    async def status(request: Request) -> Response:
        read_query(request)
        parts = {
            "reports": _part("reports", _services(settings, report_store, clock)),
            "database": _part("database", _checked(ledger_check)),
            "redis": _part("redis", _checked(redis_check)),
            "price": _part("price", _price(store, clock)),
            "sources": _part("sources", _sources(settings, store, clock)),
            "host": _part("host", asyncio.to_thread(_host, settings)),
        }
        answers = dict(zip(parts, await asyncio.gather(*parts.values()), strict=True))
        unknown = {name: {"state": "unknown", "last_report": None} for name in SERVICES}
        answers["sources"].setdefault("level", "critical")  # what is not known may be as bad as that
        services = cast("dict[str, Part]", answers["reports"].pop("services", unknown))
        fine = all(part["ok"] for part in answers.values()) and all(_is_well(services[name]) for name in SERVICES)
        overall = {"status": "ok" if fine else "degraded", "at": format_time(clock.now())}
        return MsgspecResponse({**overall, "services": services, **answers})

    app.add_direct_route("/report", "POST", report, POST_REPORT)
    app.add_direct_route("/status", "GET", status, GET_STATUS)
    app.add_direct_route("/reports", "GET", reports, GET_REPORTS)
    return app


async def _part(name: str, asked: Awaitable[Part]) -> Part:
    """One part of the status, with "ok"; a part that fails or takes too long says why and spoils no other."""
    try:
        async with asyncio.timeout(CHECK_SECONDS_MAX):
            return {"ok": True, **await asked}
    except DeskError as error:
        return {**error.facts, "ok": False, "code": error.code, "detail": error.detail}
    except TimeoutError:
        return {"ok": False, "detail": f"No answer within {CHECK_SECONDS_MAX:g} s."}
    except Exception as error:
        _log.exception("The status of %s could not be determined.", name)
        return {"ok": False, "detail": f"Could not be determined ({type(error).__name__})."}


async def _services(settings: Settings, report_store: ReportStore, clock: Clock) -> Part:
    last: dict[str, StoredReport | None] = dict.fromkeys(SERVICES)
    last |= {kept.report.service: kept for kept in await report_store.last_of_each()}
    interval = timedelta(seconds=settings.report_interval_seconds)
    services = {
        name: {
            "state": service_state(kept, clock.now(), interval),
            "last_report": kept and stored_report_document(kept),
        }
        for name, kept in last.items()
    }
    return {"services": services}


def _is_well(service: Part) -> bool:
    """Whether a service is alive, and its last report tells of no fault of ours."""
    last = cast("dict[str, int] | None", service["last_report"])
    return service["state"] == "alive" and last is not None and last["status"] < HTTPStatus.INTERNAL_SERVER_ERROR


async def _checked(check: Check | None) -> Part:
    if check is None:
        return {"detail": "not configured, kept in memory"}
    await check()
    return {"detail": "reachable"}


async def _price(store: PriceStore, clock: Clock) -> Part:
    record = await store.latest()
    return {
        "age_seconds": round((clock.now() - record.as_of).total_seconds(), 3),
        "as_of": format_time(record.as_of),
        "expires_at": format_time(record.expires_at),
        "ok": bool(record.rates_e8),
        "missing": {**record.missing, **{each: unsettled.reason for each, unsettled in record.unsettled.items()}},
    }


async def _sources(settings: Settings, store: PriceStore, clock: Clock) -> Part:
    """How the price sources are. `level` is critical when the last tick made no price, or there was none for long."""
    state = await store.feed_status()
    problem = state.problem
    old_after_seconds = SOURCES_OLD_AFTER_INTERVALS * settings.feed_interval_seconds + settings.source_seconds_max
    # Either way: a clock that was set back since says nothing about them.
    if abs(clock.now() - state.at) > timedelta(seconds=old_after_seconds):
        problem = f"The sources were last asked at {format_time(state.at)}: is api_updater running?"
    level = "critical" if problem else "warning" if any(each.detail for each in state.sources) else "ok"
    return {**document_of(state), "ok": not problem, "level": level, "problem": problem}


def _host(settings: Settings) -> Part:
    """What the machine has left; bytes and percent. Called in a thread: asking a disk can take long."""
    memory = psutil.virtual_memory()
    disk = psutil.disk_usage(str(settings.data_dir or "/"))
    return {
        "cpu_percent": psutil.cpu_percent(interval=None),
        "cpus": psutil.cpu_count(),
        "load": [round(load, 2) for load in os.getloadavg()],
        "memory": {"total": memory.total, "available": memory.available, "percent": memory.percent},
        "disk": {"total": disk.total, "free": disk.free, "percent": disk.percent},
    }
