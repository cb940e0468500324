"""`make load`: users that a real desk passes, and that find out one which does not keep its promises."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI, Request, Response

from load.__main__ import LOCUSTFILE, command
from tests.desks import Running, desk_up, environment, free_offset
from tests.serving import served

SECONDS_MAX = 60
SHORT = ("--users", "14", "--spawn-rate", "14", "--run-time", "5s", "--burst-seconds", "1")


@pytest.fixture(scope="module")
async def desk(open_directory: Path) -> AsyncIterator[Running]:
    async with desk_up(open_directory / "load") as running:
        yield running


async def load(*options: str) -> tuple[int, str]:
    """The exit code, and what was printed."""
    line = command([*SHORT, *options])
    process = await asyncio.create_subprocess_exec(
        *line,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=environment(),
        cwd=LOCUSTFILE.parents[1],
    )
    try:
        async with asyncio.timeout(SECONDS_MAX):
            printed, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return process.returncode, printed.decode()


async def test_a_desk_that_keeps_its_promises_passes(desk: Running) -> None:
    code, printed = await load("--port-offset", str(desk.offset))
    assert (code, " 0 broken promises, 0 other failures" in printed) == (0, True), printed
    for sent in ("with key", "same key again", "no key", "burst", "burst, one key", "hung up, answer lost"):
        assert f"/place_order/ ({sent})" in printed
    for read in ("/get_orders/ (next)", "/get_orders/ (newer)", "/exposure", "/record"):
        assert read in printed


def lying(desk: Running) -> FastAPI:
    """A desk in front of the desk, which breaks one promise of each kind."""
    liar = FastAPI()
    services = {"place_order": "create_buy_order", "get_orders": "fetch_buy_orders", "exposure": "fetch_buy_orders"}
    client = httpx2.AsyncClient(timeout=20)

    @liar.api_route("/{path:path}", methods=["GET", "POST"])
    async def lie(path: str, request: Request) -> Response:
        service = services.get(path.split("/", maxsplit=1)[0], "api_cache_proxy")
        sent = {name: value for name, value in request.headers.items() if name not in ("host", "accept-encoding")}
        answer = await client.request(
            request.method,
            f"{desk.url(service)}/{path}",
            params=request.url.query.encode(),
            headers=sent,
            content=await request.body(),
        )
        body = lied(path, answer) if answer.status_code in (200, 201) else answer.content
        kept = {name: answer.headers[name] for name in ("idempotent-replayed", "date") if name in answer.headers}
        return Response(body, answer.status_code, kept, media_type="application/json")

    return liar


def lied(path: str, answer: httpx2.Response) -> bytes:
    document: Any = answer.json()
    if path.startswith("place_order") and "idempotent-replayed" in answer.headers:
        document["data"] += "!"
    elif path.startswith("get_orders") and "page" in document:
        document["data"].reverse()
    elif path == "exposure":
        document["used"] = "100.00000001"
    elif path == "record":
        document["expires_at"] = "2023-03-09T00:01:00Z"
    return json.dumps(document).encode()


async def test_a_desk_that_breaks_its_promises_fails(desk: Running) -> None:
    async with served(lying(desk)) as url:
        every = ("create-buy-order", "fetch-buy-orders", "api-cache-proxy")
        code, printed = await load(*(word for service in every for word in (f"--{service}", url)))
    assert code == 1, printed
    assert " 0 broken promises" not in printed
    for broken in (
        "BROKEN PROMISE: a repeated request got other bytes than the first time",
        "BROKEN PROMISE: the page after number ",
        "BROKEN PROMISE: 100.00000001 BTC are sold and the cap is 100.00000000",
        "BROKEN PROMISE: a price that was good until 2023-03-09 ",
    ):
        assert broken in printed, printed


async def test_a_desk_that_is_not_there_fails() -> None:
    code, printed = await load("--port-offset", str(free_offset()), "--run-time", "2s", "PriceReader")
    assert code == 1, printed
    assert " 0 broken promises" in printed
    assert "no answer (ConnectionRefusedError)" in printed


async def test_the_page_is_on_this_machine_only_unless_told() -> None:
    assert command(["--ui", "--users", "5"]) == [
        *(sys.executable, "-m", "locust", "--locustfile", str(LOCUSTFILE)),
        *("--web-host", "127.0.0.1", "--web-port", "8089", "--users", "5"),
    ]
