"""health_check across real TCP: what it takes, what it shows, and what it says when something is missing."""

import asyncio
import contextlib
import json
import re
import threading
import uuid
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI
from msgspec.structs import replace
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from buydesk.backends.memory.prices import MemoryPriceStore
from buydesk.backends.memory.reports import MemoryReportStore
from buydesk.backends.redis.reports import RedisReportStore
from buydesk.backends.remote.reports import RemoteReportStore
from buydesk.errors import LedgerUnavailable
from buydesk.http.reports import STRANGERS_AT_ONCE_MAX, STRANGERS_PER_SECOND_MAX
from buydesk.money import Currency
from buydesk.observability import reports as health
from buydesk.observability.reporter import Reporter
from buydesk.observability.reports import Report, ReportStore
from buydesk.prices.model import FeedStatus, PriceRecord, SourceStatus
from buydesk.services import health_check
from buydesk.services.health_check import create_app
from buydesk.settings.model import Settings
from buydesk.topology import SERVICES
from tests.builders import JUMPED, NOT_QUOTED, record, without
from tests.clock import FakeClock
from tests.serving import free_port, served

EUR, GBP, USD = Currency
NOON = datetime(2026, 1, 31, 12, 0, tzinfo=UTC)
ALIVE: dict[str, object] = {"level": "info", "service": "db_proxy", "status": 200, "data": "ready"}
QUOTED = SourceStatus("kraken", "", 0, dict.fromkeys(Currency, 20_000 * 10**8), NOON)
RESTING = SourceStatus("gemini", "no answer (TimeoutError)", 3, None, None, NOON + timedelta(seconds=15))
HOURLY = Settings(report_interval_seconds=3600)


async def reachable() -> None:
    return


async def ledger_away() -> None:
    raise LedgerUnavailable("PostgreSQL cannot be reached.")


class Bench:
    """One health_check with everything it looks at, all of it fine until a test changes it."""

    def __init__(self, settings: Settings = HOURLY) -> None:
        self.clock = FakeClock(NOON)
        self.settings = settings
        self.desk: ReportStore = MemoryReportStore(settings, self.clock)
        self.store = MemoryPriceStore(settings, self.clock)
        self.ledger_check: Callable[[], Any] = reachable
        self.redis_check: Callable[[], Any] | None = reachable

    def app(self) -> FastAPI:
        # The service's own reports go elsewhere: the tests say who reported.
        own = Reporter("health_check", MemoryReportStore(self.settings), self.settings)
        return create_app(
            self.settings,
            self.desk,
            self.ledger_check,
            self.store,
            redis_check=self.redis_check,
            reporter=own,
            clock=self.clock,
        )

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[httpx2.AsyncClient]:
        async with served(self.app()) as url, httpx2.AsyncClient(base_url=url) as client:
            yield client

    @property
    def token(self) -> dict[str, str]:
        """What the desk's own services show."""
        return {"Authorization": f"Bearer {self.settings.reporting_tokens.get_secret_value()}"}

    async def all_alive(self) -> None:
        for service in SERVICES:
            await self.desk.report(Report("info", service, 200, "ready"), verified=True)
        rates = dict.fromkeys(Currency, 20_000 * 10**8)
        await self.store.publish(PriceRecord(uuid.uuid4(), NOON, NOON + timedelta(seconds=60), "sandbox", rates))
        await self.tell(QUOTED)

    async def tell(self, *sources: SourceStatus, problem: str = "", age_seconds: float = 0) -> None:
        at = self.clock.at - timedelta(seconds=age_seconds)
        await self.store.put_feed_status(FeedStatus(at, "sandbox", problem, sources))


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.fixture
async def client(bench: Bench) -> AsyncIterator[httpx2.AsyncClient]:
    async with bench.client() as client:
        yield client


@pytest.fixture(scope="module")
async def shared() -> AsyncIterator[httpx2.AsyncClient]:
    """A client of one service for all tests that need none of their own: what others reported is kept there too. It
    reports with the token, of which as many are taken as come."""
    bench = Bench()
    async with bench.client() as client:
        client.headers.update(bench.token)
        yield client


# Reporting.


@pytest.mark.parametrize("path", ["/report", "/report/"])
async def test_report_of_anybody_is_taken_and_kept(client: httpx2.AsyncClient, path: str) -> None:
    answer = await client.post(path, json=ALIVE)
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})
    kept = (await client.get("/reports")).json()
    assert kept == {"data": [{**ALIVE, "verified": False, "arrived_at": "2026-01-31T12:00:00.000000Z"}]}


async def test_report_with_the_token_is_verified(bench: Bench, client: httpx2.AsyncClient) -> None:
    answer = await client.post("/report", json=ALIVE, headers=bench.token)
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})
    kept = (await client.get("/reports")).json()
    assert kept == {"data": [{**ALIVE, "verified": True, "arrived_at": "2026-01-31T12:00:00.000000Z"}]}


async def test_report_cannot_say_itself_that_it_is_verified(shared: httpx2.AsyncClient) -> None:
    errors = [{"member": "verified", "reason": "is not a member of a report"}]
    await assert_refused(shared, json.dumps({**ALIVE, "verified": True}), errors)


@pytest.mark.parametrize("scheme", ["Bearer", "bearer {token}", "Basic {token}", "{token}", "", "Bearer {token}x"])
async def test_report_with_a_wrong_token_is_refused_and_not_taken_as_a_stranger_s(
    bench: Bench, client: httpx2.AsyncClient, scheme: str
) -> None:
    shown = scheme.format(token=bench.settings.reporting_tokens.get_secret_value())
    answer = await client.post("/report", json=ALIVE, headers={"Authorization": shown})
    assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")
    assert answer.headers["www-authenticate"] == "Bearer"
    assert (await client.get("/reports")).json() == {"data": []}


async def test_flood_of_strangers_is_taken_at_a_bounded_rate_and_holds_up_no_service(
    bench: Bench, client: httpx2.AsyncClient
) -> None:
    answers = [await client.post("/report", json=ALIVE) for _ in range(STRANGERS_AT_ONCE_MAX)]
    assert {answer.status_code for answer in answers} == {200}
    for body in (json.dumps(ALIVE), "no report"):
        refused = await client.post("/report", content=body, headers={"Content-Type": "application/json"})
        assert (refused.status_code, refused.json()["code"]) == (429, "rate_limited")
        assert refused.headers["retry-after"] == "1"
    assert (await client.post("/report", json=ALIVE, headers=bench.token)).status_code == 200
    bench.clock.seconds += 1
    answers = [await client.post("/report", json=ALIVE) for _ in range(STRANGERS_PER_SECOND_MAX + 1)]
    assert [answer.status_code for answer in answers[-2:]] == [200, 429]


async def test_nothing_that_cannot_be_seen_comes_out_of_reports_or_status(
    bench: Bench, client: httpx2.AsyncClient
) -> None:
    data = "line\n\ttab \x00\x7f\x9b31m\u202e\u2066\u200b\ufeff\u2028\u2029\U000e0001"
    await client.post("/report", json={**ALIVE, "service": "a-stranger", "data": data})
    await bench.desk.report(Report("error", "db_proxy", 500, f"No such key: {data}"), verified=True)
    written_out = "line\n\ttab " + r"\x00\x7f\x9b31m\u202e\u2066\u200b\ufeff\u2028\u2029\U000e0001"
    reports = await client.get("/reports")
    assert [kept["data"] for kept in reports.json()["data"]] == [f"No such key: {written_out}", written_out]
    status = await client.get("/status")
    assert status.json()["services"]["a-stranger"]["last_report"]["data"] == written_out
    for answer in (reports, status):
        assert answer.text.isprintable()


@pytest.mark.parametrize(
    ("member", "given", "kept"),
    [
        ("level", "WARNING", "warning"),
        ("level", "Critical", "critical"),
        ("level", "warn", "warning"),
        ("level", "Warn", "warning"),
        ("status", "503", 503),
        ("status", "007", 7),
        ("status", 0, 0),
        ("status", 999, 999),
        ("status", 200.0, 200),
        ("service", "x" * 64, "x" * 64),
        ("service", "somebody/else's-service!", "somebody/else's-service!"),
        ("data", "", ""),
        ("data", "\x00 ₿ \n", "\\x00 ₿ \n"),
        ("data", "₿" * 2000, "₿" * 2000),
    ],
)
async def test_report_is_kept_as_it_is_meant(
    shared: httpx2.AsyncClient, member: str, given: object, kept: object
) -> None:
    assert (await shared.post("/report", json={**ALIVE, member: given})).status_code == 200
    assert (await shared.get("/reports")).json()["data"][0][member] == kept


LEVELS = "must be one of debug, info, warning, error, critical"
NAME = "must be text of 1 to 64 visible ASCII characters"
STATUS = "must be a whole number from 0 to 999"


@pytest.mark.parametrize(
    ("member", "given", "reason"),
    [
        ("level", "fatal", LEVELS),
        ("level", "", LEVELS),
        ("level", "warn ", LEVELS),
        ("level", 5, LEVELS),
        ("level", None, LEVELS),
        ("service", "", NAME),
        ("service", "x" * 65, NAME),
        ("service", "db proxy", NAME),
        ("service", "db_proxy\n", NAME),
        ("service", "größe", NAME),
        ("service", 5, NAME),
        ("status", -1, STATUS),
        ("status", 1000, STATUS),
        ("status", 200.5, STATUS),
        ("status", 1e300, STATUS),
        ("status", True, STATUS),
        ("status", 10**4000, STATUS),
        ("status", None, STATUS),
        ("status", "", STATUS),
        ("status", "1000", STATUS),
        ("status", "-1", STATUS),
        ("status", "٢٠٠", STATUS),
        ("status", [200], STATUS),
        ("data", None, "must be Unicode text"),
        ("data", {"a": 1}, "must be Unicode text"),
        ("data", "half \ud800", "must be Unicode text"),
        ("data", "x" * 2001, "must not be longer than 2000 characters"),
        ("further", 1, "is not a member of a report"),
    ],
)
async def test_wrong_member_is_named_with_its_reason(
    shared: httpx2.AsyncClient, member: str, given: object, reason: str
) -> None:
    await assert_refused(shared, json.dumps({**ALIVE, member: given}), [{"member": member, "reason": reason}])


async def assert_refused(client: httpx2.AsyncClient, body: str | bytes, errors: list[dict[str, str]]) -> None:
    before = (await client.get("/reports?limit=1000")).json()
    answer = await client.post("/report", content=body, headers={"Content-Type": "application/json"})
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert (answer.status_code, problem["code"], problem["errors"]) == (422, "invalid_request", errors)
    assert (await client.get("/reports?limit=1000")).json() == before


@pytest.mark.parametrize("member", ["level", "service", "status", "data"])
async def test_missing_member_is_named(shared: httpx2.AsyncClient, member: str) -> None:
    without = {name: value for name, value in ALIVE.items() if name != member}
    await assert_refused(shared, json.dumps(without), [{"member": member, "reason": "is missing"}])


async def test_every_wrong_member_is_named_at_once(shared: httpx2.AsyncClient) -> None:
    await assert_refused(
        shared,
        '{"level": "loud", "service": "a", "status": 1000, "\\ud800": 1}',
        [
            {"member": "?", "reason": "is not a member of a report"},
            {"member": "level", "reason": LEVELS},
            {"member": "status", "reason": STATUS},
            {"member": "data", "reason": "is missing"},
        ],
    )


async def test_repeated_member_is_named(shared: httpx2.AsyncClient) -> None:
    told = [{"member": "service", "reason": "is given more than once"}]
    await assert_refused(shared, json.dumps(ALIVE)[:-1] + ', "service": "b"}', told)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "is not JSON: Expecting value"),
        (b"{", "is not JSON: Expecting property name"),
        (b"level=info", "is not JSON: Expecting value"),
        (b"\xff", "is not JSON: 'utf-8' codec can't decode"),
        (b'{"status": NaN}', "is not JSON: NaN is no JSON number"),
        (b"[" * 16_000, ("is nested too deeply", "is not JSON: Expecting value")),  # as deep as Python reads it
    ],
    ids=["empty", "broken", "form", "latin-1", "nan", "deep"],
)
async def test_body_that_is_no_json_is_refused(
    shared: httpx2.AsyncClient, body: bytes, reason: str | tuple[str, ...]
) -> None:
    answer = await shared.post("/report", content=body, headers={"Content-Type": "application/json"})
    [error] = answer.json()["errors"]
    assert (answer.status_code, error["member"]) == (422, "body")
    assert error["reason"].startswith(reason)


async def test_a_body_that_is_no_plain_utf_8_is_told_what_it_is(shared: httpx2.AsyncClient) -> None:
    told = [{"member": "body", "reason": "is in UTF-16 or UTF-32; send plain UTF-8"}]
    await assert_refused(shared, json.dumps(ALIVE).encode("utf-16-le"), told)


@pytest.mark.parametrize(("method", "path"), [("POST", "/report"), ("GET", "/status"), ("GET", "/reports")])
async def test_unknown_parameters_are_refused(shared: httpx2.AsyncClient, method: str, path: str) -> None:
    content = json.dumps(ALIVE) if method == "POST" else None
    headers = {"Content-Type": "application/json"}
    response = await shared.request(method, f"{path}?x=1", content=content, headers=headers)
    assert response.status_code == 422
    assert [each["member"] for each in response.json()["errors"]] == ["x"]


@pytest.mark.parametrize("body", ["[]", "null", "5", '"text"', json.dumps([ALIVE])])
async def test_body_that_is_no_object_is_refused(shared: httpx2.AsyncClient, body: str) -> None:
    await assert_refused(shared, body, [{"member": "body", "reason": "must be a JSON object"}])


async def test_body_over_the_limit_is_refused(shared: httpx2.AsyncClient) -> None:
    answer = await shared.post("/report", json={**ALIVE, "data": "x" * 16 * 1024})
    assert (answer.status_code, answer.json()["code"]) == (413, "payload_too_large")


async def test_body_that_does_not_say_it_is_json_is_refused(shared: httpx2.AsyncClient) -> None:
    answer = await shared.post("/report", data={"level": "info"})
    assert (answer.status_code, answer.json()["code"]) == (415, "unsupported_media_type")


# Reading reports.


async def test_reports_are_shown_newest_first_filtered_and_limited(client: httpx2.AsyncClient) -> None:
    for number, level in enumerate(("error", "info", "error")):
        await client.post("/report", json={**ALIVE, "level": level, "data": str(number)})
    await client.post("/report", json={**ALIVE, "level": "error", "service": "api_updater", "data": "3"})

    async def shown(query: str) -> list[str]:
        return [report["data"] for report in (await client.get(f"/reports{query}")).json()["data"]]

    assert await shown("") == ["3", "2", "1", "0"]
    assert await shown("?limit=2") == ["3", "2"]
    assert await shown("?level=ERROR&service=db_proxy&limit=1000") == ["2", "0"]
    assert await shown("?service=nobody") == []
    await client.post("/report", json={**ALIVE, "level": "warning", "data": "4"})
    assert await shown("?level=warn") == await shown("?level=Warning") == ["4"]


async def test_a_hundred_reports_are_shown_by_default(bench: Bench, client: httpx2.AsyncClient) -> None:
    for number in range(101):
        await bench.desk.report(Report("info", "db_proxy", 200, str(number)), verified=True)
    assert len((await client.get("/reports")).json()["data"]) == 100


@pytest.mark.parametrize(
    ("query", "members"),
    [
        ("limit=0", ["limit"]),
        ("limit=1001", ["limit"]),
        ("limit=-1", ["limit"]),
        ("limit=x", ["limit"]),
        ("limit=" + "9" * 30, ["limit"]),
        ("limit=%D9%A1", ["limit"]),
        ("level=loud", ["level"]),
        ("level=", ["level"]),
        ("service=", ["service"]),
        ("service=a%20b", ["service"]),
        ("page=1", ["page"]),
        ("limit=1&limit=2", ["limit"]),
        ("service=&level=loud&limit=0", ["service", "level", "limit"]),
    ],
)
async def test_wrong_filter_is_named(shared: httpx2.AsyncClient, query: str, members: list[str]) -> None:
    answer = await shared.get(f"/reports?{query}")
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
    assert [error["member"] for error in answer.json()["errors"]] == members


# The status.


async def test_desk_of_which_all_is_fine_is_ok(bench: Bench, client: httpx2.AsyncClient) -> None:
    await bench.all_alive()
    bench.clock.at += timedelta(seconds=4.5)
    answer = await client.get("/status")
    status = answer.json()
    assert (answer.status_code, status["status"], status["at"]) == (200, "ok", "2026-01-31T12:00:04.500000Z")
    assert list(status["services"]) == list(SERVICES)
    assert status["services"]["db_proxy"] == {
        "state": "alive",
        "last_report": {**ALIVE, "verified": True, "arrived_at": "2026-01-31T12:00:00.000000Z"},
    }
    assert status["reports"] == {"ok": True}
    assert status["database"] == {"ok": True, "detail": "reachable"}
    assert status["redis"] == {"ok": True, "detail": "reachable"}
    assert status["price"] == {
        "ok": True,
        "age_seconds": 4.5,
        "as_of": "2026-01-31T12:00:00.000000Z",
        "expires_at": "2026-01-31T12:01:00.000000Z",
        "missing": {},
    }


async def test_status_tells_how_the_host_is(shared: httpx2.AsyncClient) -> None:
    host = (await shared.get("/status")).json()["host"]
    assert host["ok"] is True
    assert 0 <= host["cpu_percent"] <= 100
    assert host["cpus"] >= 1
    assert len(host["load"]) == 3
    assert 0 < host["memory"]["available"] <= host["memory"]["total"]
    assert 0 < host["memory"]["percent"] < 100
    assert 0 < host["disk"]["free"] <= host["disk"]["total"]
    assert 0 < host["disk"]["percent"] <= 100


async def test_status_tells_alive_late_and_dead(bench: Bench, client: httpx2.AsyncClient) -> None:
    hour = timedelta(hours=1)
    for service, age in (("db_proxy", 5 * hour), ("api_updater", 2 * hour), ("fetch_buy_orders", hour)):
        bench.clock.at = NOON - age
        await bench.desk.report(Report("info", service, 200, "ready"), verified=True)
    bench.clock.at = NOON
    await bench.desk.report(Report("info", "api_cache_proxy", 200, health.STOPPED), verified=True)
    await bench.desk.report(Report("info", "a-stranger", 200, "hello"), verified=True)
    status = (await client.get("/status")).json()
    assert status["status"] == "degraded"
    assert {name: service["state"] for name, service in status["services"].items()} == {
        "create_buy_order": "unknown",
        "api_cache_proxy": "dead",
        "api_updater": "late",
        "db_proxy": "dead",
        "fetch_buy_orders": "alive",
        "process_buy_orders": "unknown",
        "operate_desk": "unknown",
        "health_check": "unknown",
        "a-stranger": "alive",
    }
    assert status["services"]["create_buy_order"]["last_report"] is None


async def test_desk_of_which_a_service_misses_something_is_degraded(bench: Bench, client: httpx2.AsyncClient) -> None:
    await bench.all_alive()
    for level, status, overall in (("warning", 503, "degraded"), ("warning", 400, "ok"), ("error", 500, "degraded")):
        await bench.desk.report(Report(level, "db_proxy", status, "Missing: database"), verified=True)  # type: ignore[arg-type]
        answer = (await client.get("/status")).json()
        assert (answer["status"], answer["services"]["db_proxy"]["state"]) == (overall, "alive")
    await bench.desk.report(Report("info", "db_proxy", 200, "ready"), verified=True)
    assert (await client.get("/status")).json()["status"] == "ok"


async def test_stranger_that_speaks_as_a_service_changes_nothing_of_it(
    bench: Bench, client: httpx2.AsyncClient
) -> None:
    async def said(data: str) -> Any:
        for service in SERVICES:
            await client.post("/report", json={**ALIVE, "service": service, "data": data})
        status = (await client.get("/status")).json()
        return status["status"], status["services"]

    _, services = await said("ready")
    assert services == {name: {"state": "unknown", "last_report": None} for name in SERVICES}
    await bench.all_alive()
    bench.clock.at += timedelta(seconds=1)
    overall, services = await said(health.STOPPED)
    assert overall == "ok"
    assert {service["state"] for service in services.values()} == {"alive"}
    assert {service["last_report"]["data"] for service in services.values()} == {"ready"}
    assert {kept["data"] for kept in (await client.get("/reports?limit=6")).json()["data"]} == {health.STOPPED}


@pytest.mark.parametrize("verified", [True, False])
async def test_stranger_that_fell_silent_degrades_nothing(
    bench: Bench, client: httpx2.AsyncClient, verified: bool
) -> None:
    await bench.desk.report(Report("info", "a-stranger", 200, health.STOPPED), verified=verified)
    await bench.all_alive()
    status = (await client.get("/status")).json()
    assert (status["status"], status["services"]["a-stranger"]["state"]) == ("ok", "dead")


async def test_replica_that_goes_on_keeps_a_service_alive_of_which_another_stopped(
    bench: Bench, client: httpx2.AsyncClient
) -> None:
    await bench.all_alive()
    await client.post("/report", json={**ALIVE, "data": health.STOPPED}, headers=bench.token)
    assert (await client.get("/status")).json()["services"]["db_proxy"]["state"] == "dead"
    await client.post("/report", json=ALIVE, headers=bench.token)
    assert (await client.get("/status")).json()["status"] == "ok"


async def test_redis_that_is_not_configured_is_no_fault() -> None:
    bench = Bench()
    bench.redis_check = None
    await bench.all_alive()
    async with bench.client() as client:
        status = (await client.get("/status")).json()
    assert status["redis"] == {"ok": True, "detail": "not configured, kept in memory"}
    assert status["status"] == "ok"


async def test_price_that_is_missing_or_stale_is_told_by_its_code(bench: Bench, client: httpx2.AsyncClient) -> None:
    price = (await client.get("/status")).json()["price"]
    assert (price["ok"], price["code"]) == (False, "price_unavailable")
    await bench.all_alive()
    bench.clock.at += timedelta(seconds=61)
    status = (await client.get("/status")).json()
    assert (status["price"]["ok"], status["price"]["code"]) == (False, "price_stale")
    assert status["price"]["as_of"] == "2026-01-31T12:00:00.000000Z"
    assert status["status"] == "degraded"


async def test_price_tells_which_currencies_are_missing_and_is_ok_while_there_is_one(
    bench: Bench, client: httpx2.AsyncClient
) -> None:
    await bench.all_alive()
    whole = replace(record(), as_of=NOON, expires_at=NOON + timedelta(seconds=60))
    for number, (missing, unsettled) in enumerate((([GBP], []), ([GBP], [USD]), ([GBP], [EUR, USD]))):
        moment = NOON + timedelta(seconds=number)
        partial = without(whole, missing=missing, unsettled=unsettled)
        await bench.store.publish(replace(partial, id=uuid.uuid4(), as_of=moment, decided_at=moment))
        status = (await client.get("/status")).json()
        is_ok = EUR not in unsettled
        assert status["price"]["ok"] is is_ok
        assert status["price"]["missing"] == {"GBP": NOT_QUOTED} | {each.value: JUMPED for each in unsettled}
        assert status["price"]["expires_at"] == "2026-01-31T12:01:00.000000Z"
        assert status["status"] == ("ok" if is_ok else "degraded")


async def test_sources_that_all_are_fine_are_told_one_by_one(bench: Bench, client: httpx2.AsyncClient) -> None:
    await bench.all_alive()
    status = (await client.get("/status")).json()
    assert status["sources"] == {
        "ok": True,
        "level": "ok",
        "problem": "",
        "at": "2026-01-31T12:00:00.000000Z",
        "feed": "sandbox",
        "sources": [
            {
                "source": "kraken",
                "detail": "",
                "failures": 0,
                "mids": {"EUR": "20000.00", "GBP": "20000.00", "USD": "20000.00"},
                "quoted_at": "2026-01-31T12:00:00.000000Z",
                "resting_until": None,
                "last_error": "",
                "failed_at": None,
            }
        ],
    }


async def test_one_source_down_is_a_warning_and_the_desk_is_fine(bench: Bench, client: httpx2.AsyncClient) -> None:
    await bench.all_alive()
    await bench.tell(QUOTED, RESTING)
    status = (await client.get("/status")).json()
    assert (status["status"], status["sources"]["ok"], status["sources"]["level"]) == ("ok", True, "warning")
    assert status["sources"]["sources"][1] == {
        "source": "gemini",
        "detail": "no answer (TimeoutError)",
        "failures": 3,
        "mids": None,
        "quoted_at": None,
        "resting_until": "2026-01-31T12:00:15.000000Z",
        "last_error": "",
        "failed_at": None,
    }


async def test_sources_that_prove_no_price_are_critical_while_the_last_one_is_still_valid(
    bench: Bench, client: httpx2.AsyncClient
) -> None:
    await bench.all_alive()
    await bench.tell(QUOTED, RESTING, problem="EUR: only 1 of at least 2 sources agree")
    status = (await client.get("/status")).json()
    assert (status["status"], status["price"]["ok"]) == ("degraded", True)
    sources = status["sources"]
    assert (sources["ok"], sources["level"]) == (False, "critical")
    assert sources["problem"] == "EUR: only 1 of at least 2 sources agree"


@pytest.mark.parametrize("age_seconds", [49.1, -49.1])  # later: the clock was set back
async def test_sources_that_nobody_asked_for_three_intervals_are_critical(
    bench: Bench, client: httpx2.AsyncClient, age_seconds: float
) -> None:
    await bench.tell(QUOTED, age_seconds=age_seconds)
    sources = (await client.get("/status")).json()["sources"]
    assert (sources["ok"], sources["level"]) == (False, "critical")
    assert re.fullmatch(r"The sources were last asked at \S+Z: is api_updater running\?", sources["problem"])
    await bench.tell(QUOTED, age_seconds=49)
    assert (await client.get("/status")).json()["sources"]["ok"]


async def test_sources_that_nobody_told_of_are_not_ok(client: httpx2.AsyncClient) -> None:
    sources = (await client.get("/status")).json()["sources"]
    assert (sources["ok"], sources["level"], sources["code"]) == (False, "critical", "price_unavailable")


async def test_parts_that_fail_spoil_no_other_part(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def hangs() -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(health_check, "CHECK_SECONDS_MAX", 0.05)
    bench = Bench(Settings(report_interval_seconds=3600, data_dir=tmp_path / "gone"))
    bench.ledger_check, bench.redis_check = ledger_away, hangs
    await bench.all_alive()
    async with bench.client() as client:
        answer = await client.get("/status")
    status = answer.json()
    assert (answer.status_code, status["status"]) == (200, "degraded")
    assert status["database"] == {"ok": False, "code": "ledger_unavailable", "detail": "PostgreSQL cannot be reached."}
    assert status["redis"] == {"ok": False, "detail": "No answer within 0.05 s."}
    assert status["host"] == {"ok": False, "detail": "Could not be determined (FileNotFoundError)."}
    assert status["price"]["ok"] is True
    assert {service["state"] for service in status["services"].values()} == {"alive"}
    assert [record.message for record in caplog.records] == ["The status of host could not be determined."]


async def test_without_the_reports_the_states_are_unknown_and_everything_else_is_told(bench: Bench) -> None:
    await bench.all_alive()
    client_of_nothing: Redis = Redis(port=free_port(), retry=Retry(NoBackoff(), 0))
    bench.desk = RedisReportStore(client_of_nothing, bench.settings)
    async with bench.client() as client:
        status = (await client.get("/status")).json()
        assert (status["status"], status["reports"]["code"]) == ("degraded", "health_unavailable")
        assert status["services"] == {name: {"state": "unknown", "last_report": None} for name in SERVICES}
        assert status["database"]["ok"] is True
        for answer in (await client.post("/report", json=ALIVE), await client.get("/reports")):
            assert (answer.status_code, answer.json()["code"]) == (503, "health_unavailable")
            assert answer.headers["retry-after"] == "1"
        ready = await client.get("/readyz")
        assert (ready.status_code, ready.json()["missing"][0]["what"]) == (503, "reports")
    await bench.desk.close()


# The shell around it.


async def test_every_operation_is_documented_with_examples(client: httpx2.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    expected = {
        ("/report", "post"): {"200", "401", "413", "415", "422", "429"},
        ("/reports", "get"): {"200", "422"},
        ("/status", "get"): {"200", "422"},
    }
    for (path, method), statuses in expected.items():
        responses = document["paths"][path][method]["responses"]
        assert set(responses) == statuses | {"500", "503"}
        for response in responses.values():
            assert all("example" in content or content["examples"] for content in response["content"].values())


async def test_documented_status_has_the_members_of_a_real_one(bench: Bench, client: httpx2.AsyncClient) -> None:
    def shape(value: object) -> object:
        if isinstance(value, list):
            return [shape(member) for member in value]
        return {name: shape(member) for name, member in value.items()} if isinstance(value, dict) else None

    await bench.all_alive()
    await bench.tell(QUOTED, RESTING)
    document = (await client.get("/openapi.json")).json()
    example = document["paths"]["/status"]["get"]["responses"]["200"]["content"]["application/json"]["example"]
    assert shape(example) == shape((await client.get("/status")).json())


async def test_service_reports_itself_while_it_runs() -> None:
    settings = Settings(report_interval_seconds=0.001)
    desk = MemoryReportStore(settings)
    reporter = Reporter("health_check", desk, settings)
    store = MemoryPriceStore(settings)
    app = create_app(settings, desk, reachable, store, redis_check=None, reporter=reporter)
    async with served(app) as url, httpx2.AsyncClient(base_url=url) as client, asyncio.timeout(10):
        while "ready" not in (reported := (await client.get("/reports?limit=1000")).text):
            pass
        assert "started" in reported
        assert "buydesk_reports_dropped 0.0" in (await client.get("/metrics")).text
    kept = await desk.reports(None, None, 1000)
    assert kept[0].report.data == health.STOPPED
    assert all(each.verified for each in kept)


async def test_health_check_that_comes_up_again_gets_what_was_reported_meanwhile() -> None:
    bench, port = Bench(), free_port()
    settings = bench.settings.model_copy(update={"report_retry_seconds": 0.01})
    remote = RemoteReportStore(f"http://127.0.0.1:{port}", settings)
    reporter = Reporter("db_proxy", remote, settings)

    async def nothing_missing() -> list[dict[str, str]]:
        return []

    async with reporter.running(nothing_missing), asyncio.timeout(10):
        reporter.report("error", 500, "while away, in a thread")
        threading.Thread(target=reporter.report, args=("warning", 400, "half a character: \ud800")).start()
        while reporter.failures < 2:  # what is awaited is another object's state
            await asyncio.sleep(0.001)
        async with served(bench.app(), port):
            while len(kept := await bench.desk.reports(None, None, 10)) < 3:  # the same
                await asyncio.sleep(0.001)
    assert [each.report.data for each in kept][::-1][:3] == [
        "started",
        "while away, in a thread",
        r"half a character: \ud800",
    ]
    assert all(each.verified for each in kept)
    await remote.close()
