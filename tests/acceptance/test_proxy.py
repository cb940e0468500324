"""Production's Caddyfile in a real caddy on loopback: what gets in, what is passed on, and whose answer comes back."""

import asyncio
import contextlib
import http.client
import http.server
import json
import re
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx2
import pytest

from buydesk.http.requests import BODY_BYTES_MAX
from tests import problems
from tests.attackers import UPGRADES, play, stored
from tests.caddies import CADDYFILE, DOMAIN, caddy
from tests.desks import Running, command, desk_up

REACHED = [
    *("/place_order", "/place_order/?amount=1", "/get_orders/", "/get_orders/x", "/exposure", "/prices/x"),
    *("/events", "/events/?after=1", "/quotes", "/quotes/", "/webhooks", "/webhooks/x/test"),
]
NOT_REACHED = [
    *("/", "/docs", "/metrics", "/readyz", "/add/", "/place_order/x", "/quotes/x", "/prices/..%2fmetrics"),
    *("/events/last", "/orders/", "/orders/settle", "/keys/0000000000", "/get/"),
]
SCOPES = "orders:create,orders:read,events:read"
# Most are caddy's own answers.
assert_problem = partial(problems.assert_problem, is_by_desk=False)


class Echo(http.server.BaseHTTPRequestHandler):
    """Stands in for the services: its answer is the request's headers, and then as many bytes as the path says."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(dict(self.headers)).encode())
        with contextlib.suppress(ConnectionError):
            self.wfile.write(b" " * int(self.path.partition("bytes=")[2] or 0))

    def log_message(self, *_: object) -> None: ...


@contextmanager
def proxy(directory: Path, caddyfile: str = CADDYFILE) -> Iterator[httpx2.Client]:
    """A client of a caddy before Echo."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Echo) as echo:
        threading.Thread(target=echo.serve_forever).start()
        try:
            with caddy(directory, lambda _: echo.server_port, caddyfile) as port:
                url, headers = f"http://127.0.0.1:{port}", {"Host": DOMAIN}
                with httpx2.Client(base_url=url, headers=headers, timeout=10) as client:
                    yield client
        finally:
            echo.shutdown()


@dataclass
class Proxied:
    """A real desk, and the port of the caddy before it."""

    desk: Running
    port: int
    keys: tuple[str, str]

    def client(self, **headers: str) -> httpx2.AsyncClient:
        every = {"Host": DOMAIN, "Authorization": f"Bearer {self.keys[0]}", **headers}
        return httpx2.AsyncClient(base_url=f"http://127.0.0.1:{self.port}", headers=every, timeout=20)

    async def orders(self) -> list[tuple[str, str, str]]:
        """Key, currency and amount of each order that is stored."""
        async with self.desk.client("fetch_buy_orders") as client:
            client.headers["Authorization"] = f"Bearer {self.keys[0]}"
            return await stored(client)


@pytest.fixture(scope="module")
async def proxied(open_directory: Path) -> AsyncIterator[Proxied]:
    data_dir = open_directory / "desk-of-caddy"
    async with desk_up(data_dir) as desk:
        keys = [await command("keys", "create", "anonymous", "--scopes", SCOPES, data_dir=data_dir) for _ in range(2)]
    async with desk_up(data_dir, env={"BUYDESK_ACCESS": "keys", "BUYDESK_CLIENT_RATE_PER_MINUTE": "1000000"}) as desk:
        with caddy(open_directory / "caddy", lambda port: port + desk.offset) as port:
            yield Proxied(desk, port, (keys[0], keys[1]))


def spoken(port: int, *parts: bytes) -> bytes:
    """What comes, until the connection ends, when these parts are sent."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        got = b""
        with contextlib.suppress(ConnectionError):
            for part in parts:
                connection.sendall(part)
            while more := connection.recv(65536):
                got += more
        return got


def head(first_line: str, *headers: str) -> bytes:
    return "\r\n".join((first_line, f"Host: {DOMAIN}", *headers, "", "")).encode()


def test_only_what_clients_call_is_reached_and_their_key_goes_with_it(tmp_path: Path) -> None:
    with proxy(tmp_path) as client:
        shown = {"Authorization": "Bearer bd_live_x", "Idempotency-Key": "k"}
        for path in REACHED:
            answer = client.get(path, headers=shown)
            assert answer.status_code == 200
            assert shown.items() <= answer.json().items()
        for path in NOT_REACHED:
            assert_problem(client.get(path, headers=shown), 404, "not_found")


async def test_the_desk_tells_who_calls_by_its_key(proxied: Proxied) -> None:
    async with proxied.client() as client:
        for path in ("/get_orders/", "/exposure", "/events"):
            assert (await client.get(path)).status_code == 200
            for shown in ("", "Bearer", f"Bearer {proxied.keys[0][:-1]}", f"Basic {proxied.keys[0]}"):
                refused = await client.get(path, headers={"Authorization": shown})
                problems.assert_problem(refused, 401, "unauthorized")
                assert refused.headers["www-authenticate"] == "Bearer"
        async with client.stream("GET", "/events", headers={"Accept": "text/event-stream"}) as stream:
            placed = asyncio.create_task(client.post("/place_order/?currency=eur&amount=1"))
            async for line in stream.aiter_lines():
                if line.startswith("id: "):
                    break
            assert (await placed).status_code == 201


def test_the_desk_hears_neither_what_concerns_the_connection_nor_what_a_client_says_of_its_address(
    tmp_path: Path,
) -> None:
    sent = {
        "Connection": "Upgrade, HTTP2-Settings, X-Named",
        "Upgrade": "h2c",
        "HTTP2-Settings": "AAMA",
        "X-Named": "1",
        "Keep-Alive": "3",
        "TE": "trailers",
        "Trailer": "Idempotency-Key",
        "Proxy-Connection": "keep-alive",
        "Proxy-Authorization": "Basic x",
        "Expect": "100-continue",
        "X-Forwarded-For": "9.9.9.9, 10.0.0.1",
        "X-Request-Id": "mine",
    }
    with proxy(tmp_path) as client:
        for upgrade in (sent, sent | {"Connection": "X-Named"}):
            heard = client.get("/exposure", headers=upgrade).json()
            del heard["User-Agent"], heard["Accept"], heard["Accept-Encoding"]
            assert heard == {
                "Host": DOMAIN,
                "X-Forwarded-For": "127.0.0.1",
                "X-Forwarded-Host": DOMAIN,
                "X-Forwarded-Proto": "http",
                "X-Request-Id": "mine",
            }


def test_who_is_slow_with_a_head_a_body_or_an_answer_and_who_idles_is_cut(tmp_path: Path) -> None:
    waits = re.search(r"timeouts {[^}]*}", CADDYFILE)
    assert waits is not None
    short = CADDYFILE.replace(waits[0], re.sub(r"\d+s", "300ms", waits[0]))
    with proxy(tmp_path, caddyfile=short) as client:
        port = client.base_url.port
        assert port is not None
        assert spoken(port, b"GET / HTTP/1.1\r\nHost:") == b""  # a head without its end
        assert spoken(port, head("GET /exposure HTTP/1.1")).startswith(b"HTTP/1.1 200 ")  # idles afterwards
        spoken(port, head("GET /exposure HTTP/1.1", "Content-Length: 5"), b"ab")  # a body without its end
        with socket.create_connection(("127.0.0.1", port), timeout=20) as slow:
            slow.sendall(head("GET /exposure?bytes=30000000 HTTP/1.1", "Connection: close"))
            threading.Event().wait(1)
            got = 0
            with contextlib.suppress(ConnectionError):
                while more := slow.recv(1 << 20):
                    got += len(more)
            assert got < 30_000_000


async def test_a_head_or_a_body_that_is_too_large_is_refused(proxied: Proxied) -> None:
    async with proxied.client(**{"Content-Type": "application/json"}) as client:

        async def in_chunks(size: int) -> AsyncIterator[bytes]:
            yield b" " * size

        assert_problem(await client.post("/place_order/", content=b" " * BODY_BYTES_MAX), 422, "invalid_request")
        by_the_desk, by_caddy = (BODY_BYTES_MAX + 1, 99_999), (100_001, 2_000_000)
        for size in by_the_desk + by_caddy:
            answer = await client.post("/place_order/", content=b" " * size)
            assert assert_problem(answer, 413, "payload_too_large")["bytes_max"] == BODY_BYTES_MAX
        for size in by_the_desk:
            assert_problem(await client.post("/place_order/", content=in_chunks(size)), 413, "payload_too_large")
        for size in by_caddy:  # which refusal it is depends on caddy's version
            assert (await client.post("/place_order/", content=in_chunks(size))).status_code in (413, 502)
        assert (await client.get("/exposure", headers={"X-Long": "x" * 30_000})).status_code == 431
        assert (await client.get("/exposure")).status_code == 200


async def test_a_desk_behind_the_proxy_takes_orders_by_its_domain_and_no_connect(proxied: Proxied) -> None:
    async with proxied.client(Origin="http://elsewhere.example") as client:
        answer = await client.post("/place_order/", params={"currency": "eur", "amount": "69"})
        assert answer.status_code == 201
        assert_problem(await client.request("CONNECT", "/place_order/"), 405, "method_not_allowed")
        assert_problem(await client.put("/place_order/"), 405, "method_not_allowed")


async def test_an_order_that_asks_for_another_protocol_is_placed_once(proxied: Proxied) -> None:
    before = await proxied.orders()
    expected = []
    for number, upgrade in enumerate(UPGRADES):
        for kind, padding in (("whole", 0), ("late", 0), ("long", 5000)):
            key = f"upgrade-{number}-{kind}"
            body = b'{"currency":"EUR",' + b" " * padding + b'"amount":"1.23","client_order_id":"%b"}' % key.encode()
            asked = head(
                *("POST /place_order/ HTTP/1.1", f"Authorization: Bearer {proxied.keys[0]}", upgrade),
                *("Content-Type: application/json", f"Content-Length: {len(body)}"),
            )
            parts = (asked + body,) if kind == "whole" else (asked, body[: padding + 9], body[padding + 9 :])
            status, answer = await asyncio.to_thread(answered, proxied.port, parts)
            assert status == 201, answer
            assert json.loads(answer)["order"]["client_order_id"] == key
            expected.append((key, "EUR", "1.23"))
    assert sorted(await proxied.orders()) == sorted(before + expected)


def answered(port: int, parts: tuple[bytes, ...]) -> tuple[int, bytes]:
    """Status and body of the answer to what is sent in parts, each of them in a segment of its own."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for part in parts:
            connection.sendall(part)
            threading.Event().wait(0.02)
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        return answer.status, answer.read()


async def test_every_buyer_gets_his_own_answer_beside_attackers(proxied: Proxied) -> None:
    before = await proxied.orders()
    outcome = await play(proxied.port, proxied.keys, seconds=5)
    assert outcome.wrong == []
    assert outcome.attacks > 20
    assert outcome.answers > 100
    placed = [(key, *order) for key, order in outcome.placed.items()]
    assert sorted(await proxied.orders()) == sorted(before + placed)
