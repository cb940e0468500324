"""What every service shares, over real TCP, on a service that does nothing else."""

import asyncio
import gzip
import json
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Annotated

import httpx2
import pytest
from fastapi import FastAPI, Query, Response
from prometheus_client.parser import text_string_to_metric_families

from buydesk import __version__
from buydesk.backends.memory.reports import MemoryReportStore
from buydesk.errors import (
    DeskError,
    ExposureCapExceeded,
    InvalidRequest,
    LedgerUnavailable,
    MethodNotAllowed,
    NotReady,
    OutcomeUnknown,
    Overloaded,
    PayloadTooLarge,
    PriceStale,
    Unauthorized,
    WrongMode,
)
from buydesk.http import app as web
from buydesk.http.openapi import INTERNAL, Json, error_responses, response_example
from buydesk.http.requests import BODY_BYTES_MAX, Request, require_json, require_token, require_utf8, single_parameters
from buydesk.http.responses import MsgspecResponse, problem_response
from buydesk.observability.reporter import Reporter
from buydesk.observability.reports import StoredReport
from buydesk.settings.model import Settings
from tests.problems import assert_problem
from tests.serving import served

SETTINGS = Settings(report_interval_seconds=3600)
COMMON_PATHS = ["/", "/livez", "/readyz", "/metrics", "/docs", "/openapi.json"]
TOKEN = "sesame"


class Bench:
    """A service with one route of each kind; its checks are what a test makes them."""

    def __init__(self) -> None:
        self.desk = MemoryReportStore(SETTINGS)
        self.entered: list[str] = []
        self.checks: dict[str, web.Check] = {}

    def app(self) -> FastAPI:
        @asynccontextmanager
        async def lifespan() -> AsyncIterator[None]:
            self.entered.append("in")
            yield
            self.entered.append("out")

        reporter = Reporter("db_proxy", self.desk, SETTINGS)
        app = web.service_app("db_proxy", "A bench.", {}, reporter, lifespan)
        app.checks = self.checks
        for path, method, endpoint in (
            ("/body/", "POST", _body),
            ("/parameters", "GET", _parameters),
            ("/refused", "GET", _refused),
            ("/broken", "GET", _broken),
        ):
            app.add_direct_route(path, method, endpoint, _operation(path))
        app.add_direct_route("/guarded", "GET", _guarded, {**_operation("/guarded"), "security": INTERNAL})
        app.add_direct_route("/orders/{id}", "GET", _echo_id, _operation("/orders/{id}"))

        @app.get("/typed/")
        async def typed(number: Annotated[int, Query(ge=1)]) -> Mapping[str, int]:
            return {"number": number}

        @app.get("/typed/broken")
        async def typed_broken() -> None:
            raise ZeroDivisionError("an accident")

        @app.post("/typed/")
        async def typed_body(body: dict[str, int]) -> Mapping[str, int]:
            return body

        return app


def _operation(path: str) -> Json:
    return {"summary": path, "responses": response_example("Fine.", {"ok": True}) | error_responses(PriceStale)}


async def _body(request: Request) -> Response:
    require_json(request)
    return MsgspecResponse({"bytes": len(await request.body())})


async def _guarded(request: Request) -> Response:
    require_token(request, ("another", TOKEN))
    return MsgspecResponse({"ok": True})


async def _parameters(request: Request) -> Response:
    return MsgspecResponse(single_parameters(request, ("start", "page_size")))


async def _refused(_: Request) -> Response:
    raise ExposureCapExceeded("Too much.", retry_after_seconds=7, available="0.5")


async def _broken(_: Request) -> Response:
    raise ZeroDivisionError("an accident")


async def _echo_id(request: Request) -> Response:
    return MsgspecResponse({"id": request.parameter})


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.fixture(scope="module")
async def client() -> AsyncIterator[httpx2.AsyncClient]:
    """One service for all tests that leave nothing behind."""
    async with served(Bench().app()) as url, httpx2.AsyncClient(base_url=url) as client:
        yield client


@pytest.fixture
async def bench_client(bench: Bench) -> AsyncIterator[httpx2.AsyncClient]:
    async with served(bench.app()) as url, httpx2.AsyncClient(base_url=url) as client:
        yield client


@pytest.mark.parametrize("path", [*COMMON_PATHS, "/parameters", "/typed/?number=1", "/orders/7"])
async def test_a_path_answers_with_and_without_its_trailing_slash(client: httpx2.AsyncClient, path: str) -> None:
    bare, _, query = path.partition("?")
    bare = bare.rstrip("/")
    for spelling in {bare or "/", bare + "/", bare + "//"}:
        answer = await client.get(f"{client.base_url}".rstrip("/") + f"{spelling}?{query}")
        assert answer.status_code == 200, spelling


async def test_a_service_says_who_it_is(client: httpx2.AsyncClient) -> None:
    about = (await client.get("/")).json()
    assert (about["service"], about["version"]) == ("db_proxy", __version__)
    for path in (about["docs"], about["status"]):
        assert (await client.get(path)).status_code == 200


async def test_the_docs_need_nothing_from_elsewhere(client: httpx2.AsyncClient) -> None:
    page = (await client.get("/docs")).text
    files = [part.split('"')[0] for part in page.split('src="')[1:] + page.split('href="')[1:]]
    assert len(files) == 3
    for file in files:
        assert file.startswith("/docs-files/")
        assert (await client.get(file)).status_code == 200


async def test_openapi_shows_every_route_with_its_examples(client: httpx2.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    assert document == (await client.get("/openapi.json")).json()
    assert document["info"]["version"] == __version__
    documented = {"/", "/livez", "/readyz", "/metrics", "/body/", "/parameters", "/orders/{id}", "/typed/"}
    assert documented <= set(document["paths"])
    responses = document["paths"]["/body/"]["post"]["responses"]
    assert responses["200"]["content"]["application/json"]["example"] == {"ok": True}
    example = responses["503"]["content"]["application/problem+json"]["examples"]["price_stale"]["value"]
    assert example["code"] == "price_stale"
    assert set(document["paths"]["/readyz"]["get"]["responses"]) == {"200", "500", "503"}


async def test_every_operation_documents_an_accident_and_an_overload(client: httpx2.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    for item in document["paths"].values():
        for operation in item.values():
            shown = {
                status: set(operation["responses"][status]["content"]["application/problem+json"]["examples"])
                for status in ("500", "503")
            }
            assert shown["500"] == {"internal_error"}
            assert "overloaded" in shown["503"]
    assert (
        "not_ready"
        in document["paths"]["/readyz"]["get"]["responses"]["503"]["content"]["application/problem+json"]["examples"]
    )


async def test_an_operation_that_needs_the_token_says_so(client: httpx2.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    assert document["components"]["securitySchemes"] == {"internal_token": {"type": "http", "scheme": "bearer"}}
    assert document["paths"]["/guarded"]["get"]["security"] == [{"internal_token": []}]
    assert "security" not in document["paths"]["/parameters"]["get"]


def test_problems_of_one_status_share_a_response() -> None:
    responses = error_responses(LedgerUnavailable, Overloaded, Unauthorized)
    assert set(responses) == {"503", "401"}
    assert set(responses["503"]["content"]["application/problem+json"]["examples"]) == {
        "ledger_unavailable",
        "overloaded",
        "wrong_mode",
    }


@pytest.mark.parametrize(
    ("kind", "facts"),
    [
        (InvalidRequest, {"errors"}),
        (ExposureCapExceeded, {"cap", "used", "available"}),
        (OutcomeUnknown, {"order_id", "final_after"}),
        (PriceStale, {"as_of", "expires_at"}),
        (NotReady, {"missing"}),
        (PayloadTooLarge, {"bytes_max"}),
        (MethodNotAllowed, {"allow"}),
        (Overloaded, set()),
    ],
)
def test_the_example_of_a_problem_has_its_facts(kind: type[DeskError], facts: set[str]) -> None:
    [response] = error_responses(kind).values()
    example = response["content"]["application/problem+json"]["examples"][kind.code]["value"]
    assert example.keys() - {"type", "title", "status", "detail", "instance", "code"} == facts


def test_whoever_needs_the_ledger_may_find_the_other_mode() -> None:
    for kinds in ([LedgerUnavailable], [LedgerUnavailable, WrongMode]):
        [response] = error_responses(*kinds).values()
        assert set(response["content"]["application/problem+json"]["examples"]) == {"ledger_unavailable", "wrong_mode"}


async def test_ready_means_that_every_check_passes(bench: Bench, bench_client: httpx2.AsyncClient) -> None:
    async def fine() -> None:
        return

    async def down() -> None:
        raise LedgerUnavailable("PostgreSQL is away.")

    bench.checks["price"] = fine
    assert (await bench_client.get("/readyz")).json() == {"status": "ready"}
    bench.checks["ledger"] = down
    answer = await bench_client.get("/readyz")
    assert assert_problem(answer, 503, "not_ready")["missing"] == [{"what": "ledger", "why": "PostgreSQL is away."}]
    assert answer.headers["retry-after"] == "1"
    assert (await bench_client.get("/livez")).json() == {"status": "alive"}


async def test_a_check_that_hangs_counts_as_missing(
    bench: Bench, bench_client: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hang() -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(web, "CHECK_SECONDS_MAX", 0.01)
    bench.checks["ledger"] = hang
    missing = assert_problem(await bench_client.get("/readyz"), 503, "not_ready")["missing"]
    assert missing == [{"what": "ledger", "why": "No answer within 0.01 s."}]


async def test_metrics_count_by_the_pattern_of_the_path(bench_client: httpx2.AsyncClient) -> None:
    for path in (
        "/orders/1",
        "/orders/2",
        "/typed/?number=1",
        "/typed?number=0",
        "/typed/broken",
        "/nowhere/1",
        "/nowhere/2",
    ):
        await bench_client.get(path)
    text = (await bench_client.get("/metrics")).text
    counted = {
        (sample.labels["path"], sample.labels["status"]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "buydesk_http_requests_total"
    }
    assert counted == {
        ("/orders/{id}", "200"): 2,
        ("/typed/", "200"): 1,
        ("/typed/", "422"): 1,
        ("/typed/broken", "500"): 1,
        ("(none)", "404"): 2,
    }
    assert 'buydesk_http_seconds_count{path="/orders/{id}",service="db_proxy"} 2.0' in text
    assert "buydesk_reports_dropped 0.0" in text


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("GET", "/docs-files/nothing.js", 404, "not_found"),
        ("GET", "/docs-files/../web.py", 404, "not_found"),
        ("GET", "/%ff%fe", 404, "not_found"),
        ("DELETE", "/livez", 405, "method_not_allowed"),
        ("GET", "/body/", 405, "method_not_allowed"),
        ("PATCH", "/typed/", 405, "method_not_allowed"),
        ("POST", "/docs-files/swagger-ui.css", 405, "method_not_allowed"),
        ("GET", "/typed/?number=x", 422, "invalid_request"),
        ("GET", "/typed/", 422, "invalid_request"),
        ("GET", "/refused", 409, "exposure_cap_exceeded"),
    ],
)
async def test_every_refusal_is_a_problem_document(
    client: httpx2.AsyncClient, method: str, path: str, status: int, code: str
) -> None:
    answer = await client.request(method, path)
    problem = assert_problem(answer, status, code)
    assert problem["instance"].startswith("/")
    assert ("allow" in answer.headers) is (status == 405)


async def test_facts_and_the_time_to_wait_travel_with_the_problem(client: httpx2.AsyncClient) -> None:
    answer = await client.get("/refused")
    assert answer.headers["retry-after"] == "7"
    assert answer.json()["available"] == "0.5"


def test_allow_names_what_the_path_takes() -> None:
    answer = problem_response(MethodNotAllowed("No.", allow="GET, HEAD"), "/x")
    assert answer.headers["allow"] == "GET, HEAD"
    assert json.loads(bytes(answer.body))["instance"] == "/x"


async def test_an_accident_is_answered_without_its_details_and_logged(
    client: httpx2.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    answer = await client.get("/broken")
    assert_problem(answer, 500, "internal_error")
    assert "accident" not in answer.text
    assert "ZeroDivisionError: an accident" in caplog.text


async def test_a_body_is_read_up_to_its_limit(client: httpx2.AsyncClient) -> None:
    headers = {"content-type": "application/json; charset=utf-8"}
    limit = BODY_BYTES_MAX
    answer = await client.post("/body", content=b"x" * limit, headers=headers)
    assert answer.json() == {"bytes": limit}
    answer = await client.post("/body", content=b"x" * (limit + 1), headers=headers)
    assert assert_problem(answer, 413, "payload_too_large")["bytes_max"] == limit


async def test_a_body_that_does_not_say_its_length_is_read_up_to_the_same_limit(client: httpx2.AsyncClient) -> None:
    async def chunks(count: int) -> AsyncIterator[bytes]:
        for _ in range(count):
            yield b"x" * 1024

    headers = {"content-type": "application/json"}
    answer = await client.post("/body/", content=chunks(16), headers=headers)
    assert answer.json() == {"bytes": BODY_BYTES_MAX}
    assert_problem(await client.post("/body/", content=chunks(17), headers=headers), 413, "payload_too_large")


@pytest.mark.parametrize("content_type", [None, "", "text/plain", "application/xml", "application/json2", "json"])
async def test_a_body_that_is_not_json_by_its_type_is_refused(
    client: httpx2.AsyncClient, content_type: str | None
) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    assert_problem(await client.post("/body/", content=b"{}", headers=headers), 415, "unsupported_media_type")


@pytest.mark.parametrize("coding", ["gzip", "br", "Deflate", "gzip, gzip"])
async def test_a_body_with_a_content_encoding_is_refused_by_its_name(client: httpx2.AsyncClient, coding: str) -> None:
    headers = {"content-type": "application/json", "content-encoding": coding}
    problem = assert_problem(await client.post("/body/", content=b"{}", headers=headers), 415, "unsupported_media_type")
    assert problem["detail"] == f"Content-Encoding {coding.lower()} is not taken here; send the body plain."


async def test_the_content_encoding_identity_is_none(client: httpx2.AsyncClient) -> None:
    headers = {"content-type": "application/json", "content-encoding": "identity"}
    assert (await client.post("/body/", content=b"{}", headers=headers)).json() == {"bytes": 2}


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"\xef\xbb\xbf{}", "starts with a byte order mark"),
        ("{}".encode("utf-16"), "starts with a byte order mark of UTF-16 or UTF-32"),
        (b"\xfe\xff\0{", "starts with a byte order mark of UTF-16"),
        (b"\0\0\xfe\xff\0\0\0{", "starts with a byte order mark of UTF-32"),
        ("{}".encode("utf-16-le"), "is in UTF-16 or UTF-32"),
        ("{}".encode("utf-32-be"), "is in UTF-16 or UTF-32"),
        (gzip.compress(b"{}", mtime=0), "is compressed by gzip"),
    ],
)
def test_what_is_not_plain_utf_8_is_named(body: bytes, told: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^body: {told}; send plain UTF-8$"):
        require_utf8(body)


@pytest.mark.parametrize("body", [b"", b"{", b"{}", b" []", b'"\xc3\xa9"', b"\xe9t\xe9"])
def test_what_may_be_utf_8_is_left_to_the_reader(body: bytes) -> None:
    require_utf8(body)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"a": "x"}', b'{"a": "\xff"}', b"[" * 10_000])
async def test_a_typed_body_that_cannot_be_read_is_an_invalid_request(client: httpx2.AsyncClient, body: bytes) -> None:
    answer = await client.post("/typed/", content=body, headers={"content-type": "application/json"})
    assert assert_problem(answer, 422, "invalid_request")["errors"]


async def test_a_client_that_breaks_off_its_body_is_no_fault_of_ours(
    bench_client: httpx2.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    _, writer = await asyncio.open_connection(bench_client.base_url.host, bench_client.base_url.port)
    writer.write(b"POST /body/ HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
    writer.write(b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n")
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    while '"/body/"' not in (await bench_client.get("/metrics")).text:
        pass
    assert caplog.records == []


@pytest.mark.parametrize(
    ("shown", "status"),
    [
        (None, 401),
        ("", 401),
        (TOKEN, 401),
        (f"Basic {TOKEN}", 401),
        (f"Bearer {TOKEN}x", 401),
        ("Bearer \xfc", 401),
        (f"Bearer {TOKEN}", 200),
        ("Bearer another", 200),
        (f"Bearer another,{TOKEN}", 401),
    ],
)
async def test_internal_paths_need_the_token(client: httpx2.AsyncClient, shown: str | None, status: int) -> None:
    headers = {} if shown is None else {"authorization": shown.encode("latin-1")}
    answer = await client.get("/guarded", headers=headers)  # type: ignore[arg-type]  # bytes are taken too
    assert answer.status_code == status
    if status == 401:
        assert_problem(answer, 401, "unauthorized")
        assert answer.headers["www-authenticate"] == "Bearer"


async def test_parameters_are_taken_once_each(client: httpx2.AsyncClient) -> None:
    answer = await client.get("/parameters?start=0&page_size=3")
    assert answer.json() == {"start": "0", "page_size": "3"}


@pytest.mark.parametrize(
    ("query", "members"),
    [
        ("start=0&start=1&start=2", ["start"]),
        ("strat=0", ["strat"]),
        ("start=0&x=1&x=2&page_size=1&page_size=1", ["x", "page_size"]),
        ("=", [""]),
        ("a" * 1000 + "=1", ["a" * 100]),
    ],
)
async def test_a_parameter_unknown_or_repeated_is_named(
    client: httpx2.AsyncClient, query: str, members: list[str]
) -> None:
    problem = assert_problem(await client.get(f"/parameters?{query}"), 422, "invalid_request")
    assert [each["member"] for each in problem["errors"]] == members


async def test_a_flood_of_unknown_parameters_gets_a_short_answer(client: httpx2.AsyncClient) -> None:
    answer = await client.get("/parameters?" + "&".join(f"p{number}=" for number in range(5000)))
    assert_problem(answer, 422, "invalid_request")
    assert len(answer.content) < 10_000
    assert answer.json()["detail"] == "query: may have at most 100 parameters"
    answer = await client.get("/parameters?" + "&".join(f"p{number}=" for number in range(100)))
    assert len(assert_problem(answer, 422, "invalid_request")["errors"]) == 20


async def test_a_service_reports_around_its_own_life(bench: Bench) -> None:
    def said(kept: list[StoredReport]) -> list[str]:
        return [each.report.data for each in reversed(kept)]

    async with served(bench.app()):
        assert bench.entered == ["in"]
    assert bench.entered == ["in", "out"]
    assert said(list(await bench.desk.reports("db_proxy", None, 10))) == ["started", "stopped"]
