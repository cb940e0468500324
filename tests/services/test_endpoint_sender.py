"""The way out to clients' endpoints over real TCP: where it leads, whatever a name server says, and what it takes of
answers."""

import asyncio
import contextlib
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from buydesk.backends import endpoints
from buydesk.backends.endpoints import ANSWER_BYTES_MAX, EndpointSender, allows_loopback
from buydesk.events.delivery import Answer
from tests.builders import settings
from tests.endpoints import Endpoint, endpoint
from tests.logged import logged
from tests.serving import free_port
from tests.unit.test_way_out import NAME, PASSWORD, Proxy, certified

HEADERS = {"webhook-id": "x.placed", "webhook-timestamp": "1", "webhook-signature": "v1,x"}
ELSEWHERE = "127.0.0.2"


class Names:
    """A name server that answers each look-up with the next of these lists of addresses, and the last one for ever."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    def __call__(self, host: str, port: int, **_: Any) -> list[tuple[Any, ...]]:
        self.asked.append(host)
        found = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if not found:
            raise socket.gaierror(socket.EAI_NONAME, "there is no such name")
        return [
            (
                *(socket.AF_INET6 if ":" in each else socket.AF_INET, socket.SOCK_STREAM, 6, ""),
                (each, port, 0, 0) if ":" in each else (each, port),
            )
            for each in found
        ]


@contextlib.asynccontextmanager
async def sender(*answers: Sequence[str], **given: Any) -> AsyncIterator[EndpointSender]:
    """The way out of a sandbox on loopback or, with `given`, of another desk; names are looked up here."""
    made = EndpointSender(settings(**given), look_up=Names(*answers) if answers else socket.getaddrinfo)
    try:
        yield made
    finally:
        await made.close()


BEYOND = {"host": "0.0.0.0", "access": "open"}  # noqa: S104


async def post(out: EndpointSender, url: str, client: str = "other") -> Answer:
    return await out.send(client, url, HEADERS, b'{"a":1}')


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "no_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
async def at() -> AsyncIterator[Endpoint]:
    async with endpoint() as running:
        yield running


@pytest.mark.parametrize(
    ("given", "allowed"), [({}, True), ({"host": "localhost"}, True), (BEYOND, False), ({"price_feed": "live"}, False)]
)
def test_this_machine_is_asked_by_a_sandbox_that_nobody_else_reaches(given: Any, allowed: bool) -> None:
    assert allows_loopback(settings(**given)) is allowed


async def test_message_is_posted_with_its_headers(at: Endpoint) -> None:
    async with sender() as out:
        assert await post(out, at.url) == Answer("delivered", 204)
    [message] = at.got
    assert (message.body, message.headers | HEADERS) == (b'{"a":1}', message.headers)
    assert message.headers["user-agent"].startswith("buydesk/")


@pytest.mark.parametrize(
    "found",
    [["127.0.0.1"], ["::1"], ["::ffff:127.0.0.1"], ["0.0.0.0"], ["10.0.0.1", "127.0.0.1", "fe80::1"]],  # noqa: S104
)
async def test_name_that_leads_within_is_not_asked(at: Endpoint, found: list[str]) -> None:
    async with sender(found, **BEYOND) as out:
        with logged() as lines:
            assert await post(out, f"https://shop.example:{at.port}/hook?token=hunter2") == Answer("unreachable")
    assert at.got == []
    told = " ".join(each["message"] for each in lines)
    assert "which is not of the public internet" in told
    assert "hunter2" not in told


async def test_sandbox_asks_only_this_machine_of_those_within(at: Endpoint) -> None:
    async with sender(["10.0.0.1"]) as out:
        assert await post(out, "https://shop.example/") == Answer("unreachable")
        assert await post(out, at.url.replace("127.0.0.1", "localhost")) == Answer("unreachable")


@pytest.mark.parametrize("address", ["127.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "localhost", "2130706433", "127.1"])
async def test_address_in_the_url_itself_is_looked_at_too(at: Endpoint, address: str) -> None:
    async with sender(["127.0.0.1"], **BEYOND) as out:
        for scheme in ("http", "https"):
            assert await post(out, f"{scheme}://{address}:{at.port}/") == Answer("unreachable")
    assert at.got == []


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
async def test_address_that_got_past_the_look_at_its_url_is_not_connected_to(
    at: Endpoint, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """aiohttp looks up names only: what stands in a URL reaches the connection without."""
    monkeypatch.setattr(endpoints, "parse_url", lambda url, **_: url)
    host = f"[{address}]" if ":" in address else address
    async with sender(**BEYOND) as out:
        assert await post(out, f"http://{host}:{at.port}/") == Answer("unreachable")
    assert at.got == []


async def test_name_that_changes_its_mind_leads_nowhere_within(at: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """DNS rebinding: an address that is taken for public first, and then this machine's."""
    monkeypatch.setattr(endpoints, "parse_url", lambda url, **_: url)
    monkeypatch.setattr(endpoints, "may_be_asked", lambda address, **_: str(address) == ELSEWHERE)
    async with endpoint() as outside:
        listener = socket.create_server((ELSEWHERE, at.port))

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b'{"a":1}')
            outside.got.append(None)  # type: ignore[arg-type]
            writer.write(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(answer, sock=listener)
        async with sender([ELSEWHERE], ["127.0.0.1"], ["127.0.0.1", ELSEWHERE], ["127.0.0.1"]) as out:
            url = f"http://shop.example:{at.port}/"
            answers = [(await post(out, url)).outcome for _ in range(4)]
        assert answers == ["delivered", "unreachable", "delivered", "unreachable"]
        assert (len(outside.got), at.got) == (2, [])
        server.close()
        await server.wait_closed()


async def test_name_that_nobody_knows_is_not_reached() -> None:
    async with sender([]) as out:
        assert await post(out, "https://nobody.example/") == Answer("unreachable")


async def test_name_server_that_is_silent_holds_up_its_own_names_only(at: Endpoint) -> None:
    def look_up(host: str, port: int, **_: Any) -> list[tuple[Any, ...]]:
        if host == "slow.example":
            time.sleep(1)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    out = EndpointSender(settings(), look_up=look_up)
    out.seconds_max = 0.3
    slow = [asyncio.create_task(post(out, "https://slow.example/", f"c{each}")) for each in range(20)]
    await asyncio.sleep(0.05)
    started = time.monotonic()
    assert await post(out, at.url.replace("127.0.0.1", "localhost")) == Answer("delivered", 204)
    assert time.monotonic() - started < 0.25
    assert {(await each).outcome for each in slow} == {"timed_out"}
    await out.close()


async def test_names_that_hang_are_those_of_so_many_look_ups_of_a_client_also_after_their_messages(
    at: Endpoint,
) -> None:
    hanging, going_on = 0, threading.Event()

    def look_up(host: str, port: int, **_: Any) -> list[tuple[Any, ...]]:
        nonlocal hanging
        if host != "localhost":
            hanging += 1
            going_on.wait(10)
            raise socket.gaierror(socket.EAI_AGAIN, "no answer")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    out = EndpointSender(settings(), look_up=look_up)
    url = at.url.replace("127.0.0.1", "localhost")
    out.seconds_max = 0.3
    for _ in range(2):
        answers = await asyncio.gather(*(post(out, f"https://h{each}.example/") for each in range(30)))
        assert set(answers) == {Answer("timed_out")}
        assert hanging == endpoints.LOOK_UPS_OF_A_CLIENT_MAX
        assert await post(out, url, "third") == Answer("delivered", 204)
    out.seconds_max = 5
    waiting = asyncio.create_task(post(out, url))
    await asyncio.sleep(0.1)
    going_on.set()
    assert await waiting == Answer("delivered", 204)
    await out.close()


async def test_look_up_that_waits_for_a_thread_ends_with_the_sender(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(endpoints, "LOOK_UPS_AT_ONCE_MAX", 1)
    going_on, asked = threading.Event(), list[str]()

    def look_up(host: str, *_: Any, **__: Any) -> list[tuple[Any, ...]]:
        asked.append(host)
        going_on.wait(10)
        return []

    out = EndpointSender(settings(), look_up=look_up)
    out.seconds_max = 0.2
    answers = await asyncio.gather(*(post(out, f"https://{name}.example/") for name in ("one", "two")))
    assert set(answers) == {Answer("timed_out")}
    await out.close()
    going_on.set()
    await asyncio.sleep(0.1)
    assert len(asked) == 1
    assert caplog.records == []


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirect_is_not_followed(at: Endpoint, status: int) -> None:
    async def respond(request: web.Request) -> web.StreamResponse:
        return web.Response(status=status, headers={"Location": str(request.url.with_path("/elsewhere"))})

    at.respond = respond
    async with sender() as out:
        assert await post(out, at.url) == Answer("rejected", status)
    assert len(at.got) == 1


async def test_certificate_that_nobody_vouches_for_is_refused(tmp_path: Path) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*certified(tmp_path))
    async with endpoint(ssl_context=context) as at, sender() as out:
        assert await post(out, f"https://localhost:{at.port}/") == Answer("tls_failed")
        assert at.got == []


async def test_certificate_of_another_name_is_refused_and_its_own_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate, key = certified(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    async with endpoint(ssl_context=context) as at, sender(["127.0.0.1"]) as out:
        assert await post(out, f"https://{NAME}:{at.port}/") == Answer("delivered", 204)
        assert await post(out, f"https://other.example:{at.port}/") == Answer("tls_failed")
    assert [message.headers["host"] for message in at.got] == [f"{NAME}:{at.port}"]


async def test_server_without_tls_or_http_is_not_reached(at: Endpoint) -> None:
    async def babble(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example ESMTP\r\n" * 10)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(babble, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with sender() as out:
        assert (await post(out, f"https://127.0.0.1:{at.port}/")).outcome in ("tls_failed", "unreachable")
        assert await post(out, f"http://127.0.0.1:{port}/") == Answer("unreachable")
        assert await post(out, f"http://127.0.0.1:{free_port()}/") == Answer("unreachable")
    server.close()
    await server.wait_closed()


async def test_answer_without_end_is_cut(at: Endpoint) -> None:
    sent = 0

    async def flood(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        response = web.StreamResponse()
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            while True:
                await response.write(b"x" * 65536)
                sent += 65536
        return response

    at.respond = flood
    async with sender() as out:
        started = time.monotonic()
        assert await post(out, at.url) == Answer("delivered", 200)
        assert time.monotonic() - started < 1
        await asyncio.sleep(0.1)
    assert sent < 32 * 1024 * 1024
    assert ANSWER_BYTES_MAX < 65536


async def test_answer_whose_body_drips_counts_by_its_status(at: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "DRAIN_SECONDS_MAX", 0.1)

    async def drip(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            for _ in range(100):
                await response.write(b"x")
                await asyncio.sleep(0.05)
        return response

    at.respond = drip
    async with sender() as out:
        started = time.monotonic()
        assert await post(out, at.url) == Answer("delivered", 200)
        assert time.monotonic() - started < 1


async def test_endpoint_that_does_not_answer_in_time_is_given_up(at: Endpoint) -> None:
    async def hang(_: web.Request) -> web.StreamResponse:
        await asyncio.sleep(3600)
        raise AssertionError("unreachable")

    at.respond = hang
    async with sender() as out:
        out.seconds_max = 0.2
        assert await post(out, at.url) == Answer("timed_out")


async def test_head_without_end_is_refused() -> None:
    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            writer.write(b"HTTP/1.1 200 OK\r\n")
            for number in range(100_000):
                writer.write(b"x-%d: %b\r\n" % (number, b"y" * 1000))
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(endless, "127.0.0.1", 0)
    async with sender() as out:
        assert await post(out, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/") == Answer("unreachable")
    server.close()
    await server.wait_closed()


async def test_connection_is_kept_and_one_that_was_given_up_is_made_anew() -> None:
    connections = 0

    async def twice(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        with contextlib.suppress(asyncio.IncompleteReadError):  # the last one ends with the sender
            for _ in range(2):
                await reader.readuntil(b'{"a":1}')
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
                await writer.drain()
            await reader.readuntil(b'{"a":1}')
        writer.transport.abort()

    server = await asyncio.start_server(twice, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
    async with sender() as out:
        assert [await post(out, url) for _ in range(4)] == [Answer("delivered", 200)] * 4
    assert connections == 2
    server.close()
    await server.wait_closed()


async def test_cookies_are_not_kept(at: Endpoint) -> None:
    async def respond(_: web.Request) -> web.StreamResponse:
        response = web.Response()
        response.set_cookie("a", "b")
        return response

    at.respond = respond
    async with sender() as out:
        for _ in range(2):
            await post(out, at.url)
    assert [each.headers.get("cookie") for each in at.got] == [None, None]


async def test_proxy_that_the_environment_names_is_asked_and_looks_names_up_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate, key = certified(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    async with endpoint(ssl_context=context) as at:
        proxy = Proxy(at.port)
        async with proxy.running(), sender([], **BEYOND) as out:
            monkeypatch.setenv("HTTPS_PROXY", f"http://desk:{PASSWORD}@127.0.0.1:{proxy.port}")
            assert await post(out, f"https://{NAME}/hook") == Answer("delivered", 204)
            for within in ("127.0.0.1", "[::1]", "localhost", "10.0.0.1", "metadata.google.internal", "2130706433"):
                assert await post(out, f"https://{within}/") == Answer("unreachable")
        monkeypatch.setenv("HTTPS_PROXY", "socks5://127.0.0.1:1080")
        async with sender([], **BEYOND) as out:
            assert await post(out, f"https://{NAME}/hook") == Answer("unreachable")
        assert proxy.asked == [f"CONNECT {NAME}:443 HTTP/1.1"]
    assert len(at.got) == 1


@contextlib.asynccontextmanager
async def flooding(part: bytes, head: bytes = b"") -> AsyncIterator[tuple[str, list[int]]]:
    """An endpoint, by its URL, that answers with the head and then this part for ever; what it could send."""
    sent: list[int] = []

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sent.append(0)
        with contextlib.suppress(ConnectionError):
            await reader.readuntil(b'{"a":1}')
            writer.write(head)
            while True:
                writer.write(part)
                await writer.drain()
                sent[-1] += len(part)
        writer.close()

    server = await asyncio.start_server(flood, "127.0.0.1", 0)
    yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/", sent
    server.close()
    await server.wait_closed()


async def test_interim_answers_without_end_are_cut() -> None:
    async with flooding(b"HTTP/1.1 102 Processing\r\n\r\n" * 100) as (url, sent), sender() as out:
        started = time.monotonic()
        assert await post(out, url) == Answer("unreachable")
        assert time.monotonic() - started < 2
        await asyncio.sleep(0.1)
    assert len(sent) == 1  # the message is not sent again
    assert sent[0] < 32 * 1024 * 1024  # what the sockets between hold


async def test_every_connection_is_one_that_bounds_what_it_takes() -> None:
    """aiohttp makes connections by a private attribute of its connector: this fails if a version does so otherwise."""
    async with (
        flooding(b"x" * 1000, b"HTTP/1.1 200 OK\r\n\r\n") as (url, _),
        sender() as out,
        out._pool(is_proxied=False).post(url, data=b'{"a":1}') as response,
    ):
        connection = response.connection
        assert connection is not None
        assert isinstance(connection.protocol, endpoints._BoundedHandler)
        taken = 0
        with contextlib.suppress(aiohttp.ClientError):
            while part := await response.content.readany():
                taken += len(part)
    assert taken <= endpoints.RECEIVED_BYTES_MAX


async def test_bound_of_an_answer_is_of_each_and_not_of_all_over_a_connection(at: Endpoint) -> None:
    async def respond(_: web.Request) -> web.StreamResponse:
        return web.Response(body=b"x" * ANSWER_BYTES_MAX)

    at.respond = respond
    async with sender() as out:
        answers = [await post(out, at.url) for _ in range(2 * endpoints.RECEIVED_BYTES_MAX // ANSWER_BYTES_MAX)]
    assert answers == [Answer("delivered", 200)] * len(answers)
