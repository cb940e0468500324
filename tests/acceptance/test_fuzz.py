"""`make fuzz`, shortly: the services do what their OpenAPI documents say, and one that does not is found out."""

import asyncio
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from buydesk.errors import InvalidRequest, Overloaded, PriceStale
from buydesk.http.openapi import INTERNAL, INTERNAL_SCHEME, Responses, error_responses
from buydesk.http.responses import problem_response
from buydesk.topology import PORTS
from fuzz.documents import faults
from fuzz.rounds import Services, fuzz
from tests.desks import environment
from tests.serving import served

ROOT = Path(__file__).parents[2]
SECONDS_MAX = 100
REFUSED = error_responses(InvalidRequest)


async def test_every_service_answers_as_its_document_says() -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "fuzz", "--calls", "1", "--seed", "1"),
        cwd=ROOT,
        env=environment(),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(SECONDS_MAX):
            told, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()
    printed = told.decode()
    assert process.returncode == 0, printed
    assert re.search(r"\n[0-9]{4,} calls, 0 failures, seed 1\n$", printed), printed
    for service in PORTS:
        ready = "200: [0-9]+  405: [0-9]+"
        if service == "db_proxy":  # which is not ready once it has got nothing but prices that are made up
            ready = f"({ready}|(200: [0-9]+  )?405: [0-9]+  503: [0-9]+)"
        assert re.search(rf"\n{service}: GET /readyz +{ready}\n", printed), printed
    assert re.search(r"create_buy_order: POST /place_order/ .* 201: [0-9]+ .* 422: [0-9]+", printed), printed
    assert re.search(r"db_proxy: POST /add/ +200: [0-9]+ +401: [0-9]+ .* 422: [0-9]+", printed), printed


def operation(error_responses: Responses | None = None, **further: Any) -> dict[str, Any]:
    """A documented operation with a whole number in its query."""
    parameter = {"name": "number", "in": "query", "required": True, "schema": {"type": "integer"}}
    schema = {"type": "object", "required": ["number"], "properties": {"number": {"type": "integer"}}}
    success = {"200": {"description": "Yes", "content": {"application/json": {"schema": schema}}}}
    return {"parameters": [parameter], "responses": success | REFUSED | (error_responses or {}), **further}


PATHS = {
    "/right": {"get": operation()},
    "/falls": {"get": operation()},
    "/waits": {"get": operation(error_responses(Overloaded))},
    "/expires": {"get": operation(error_responses(PriceStale))},
    "/moves": {"get": operation()},
    "/shouts": {"get": operation()},
    "/omits": {"get": operation()},
    "/takes": {"get": operation()},
    "/refuses": {"get": operation()},
    "/listens": {"get": operation()},
    "/trusts": {"get": operation(security=INTERNAL)},
    "/shows": {"get": operation(description=1)},
}


def lying() -> FastAPI:
    """A service of which each path but one breaks its document in one way."""
    liar = FastAPI(openapi_url=None)
    document = {
        "openapi": "3.1.0",
        "info": {"title": "liar", "version": "1"},
        "paths": PATHS,
        "components": {"securitySchemes": {INTERNAL_SCHEME: {"type": "http", "scheme": "bearer"}}},
    }

    @liar.get("/openapi.json")
    async def openapi() -> Response:
        return JSONResponse(document)

    @liar.api_route("/{path}", methods=["GET", "PUT", "POST", "DELETE", "OPTIONS", "PATCH", "TRACE", "QUERY"])
    async def lie(path: str, request: Request) -> Response:
        if request.method != "GET" and path != "listens":
            return JSONResponse({}, 405, {"Allow": "GET"})
        numbers = request.query_params.getlist("number")
        is_good = len(numbers) == 1 and re.fullmatch("-?[0-9]+", numbers[0], re.ASCII)
        if (not is_good and path != "takes") or path == "refuses":
            return problem_response(InvalidRequest.of("number", "is wrong"), "/")
        right = {"number": 1}
        return {
            "falls": Response("Oops", 500),
            "waits": problem_response(Overloaded("Later."), "/"),
            "expires": problem_response(PriceStale("Later."), "/"),
            "moves": JSONResponse(right, 202),
            "shouts": Response("ONE", media_type="text/plain"),
            "omits": JSONResponse({}),
        }.get(path, JSONResponse(right))

    return liar


async def test_a_service_that_breaks_its_document_is_found_out() -> None:
    async with served(lying()) as url:
        services = Services({"liar": url}, {"liar": ["secret"]})
        found = await asyncio.to_thread(fuzz, services, calls=1, seed=1, seconds_max=SECONDS_MAX)
    told = sorted(found.failures)
    assert not [each for each in told if "/right" in each]
    assert [each for each in told if "/expires" in each] == ["liar: GET /expires: never succeeded"]
    for expected in (
        'liar: is not valid OpenAPI: 1 is not of type "string"',
        "liar: GET /falls: Server error",
        "liar: GET /waits: Server error",
        "liar: GET /moves: Undocumented status code",
        "liar: GET /shouts: Undocumented Content-Type",
        "liar: GET /omits: Response violates schema",
        "liar: GET /takes: Schema-violating request accepted",
        "liar: GET /refuses: Schema-valid request rejected",
        "liar: GET /refuses: never succeeded",
        "liar: GET /listens: ",
        "liar: GET /trusts: API accepts requests without authentication",
    ):
        assert [each for each in told if each.startswith(expected)], (expected, "\n".join(told))


async def test_a_run_whose_time_is_over_too_early_fails() -> None:
    async with served(lying()) as url:
        services = Services({"liar": url}, {"liar": ["secret"]})
        found = await asyncio.to_thread(fuzz, services, calls=1_000_000, seed=1, seconds_max=0)
    assert found.failures["not all calls were made"] == f"The time was over after {found.made} of 1000000."


@pytest.mark.parametrize(
    ("schema", "beside", "told"),
    [
        ({"type": "integer"}, {"example": "x"}, '"x" is not of type "integer"'),
        ({"type": "integer", "default": 1.5}, {}, '1.5 is not of type "integer"'),
        ({"minimum": 2, "examples": [2, 1]}, {}, "1 is less than the minimum of 2"),
        ({"format": "uuid"}, {"examples": {"bad": {"value": "y"}}}, '"y" is not a "uuid"'),
        ({"$ref": "#/components/schemas/Word"}, {"example": 3}, '3 is not of type "string"'),
    ],
)
@pytest.mark.parametrize("place", ["parameter", "body", "response"])
def test_an_example_that_does_not_fit_its_schema_is_a_fault(
    place: str, schema: dict[str, Any], beside: dict[str, Any], told: str
) -> None:
    shown = {"schema": schema} | beside
    content = {"content": {"application/json": shown}}
    node: dict[str, Any] = {"responses": {"200": {"description": "Yes"} | (content if place == "response" else {})}}
    if place == "parameter":
        node["parameters"] = [{"name": "a", "in": "query"} | shown]
    if place == "body":
        node["requestBody"] = content
    document = {
        "openapi": "3.1.0",
        "info": {"title": "liar", "version": "1"},
        "paths": {"/": {"post": node}},
        "components": {"schemas": {"Word": {"type": "string"}}},
    }
    [fault] = faults(document)
    assert f"the example does not fit its schema: {told}" in fault
