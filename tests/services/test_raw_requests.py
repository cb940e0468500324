"""Requests written by hand, as no client library or as only some of them write them: each is one request or none."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator

import pytest

from tests.logged import logged
from tests.raw import Echo, echo_of, raw, settings

ORDER = b'{"currency":"USD","amount":600}'
NEXT = b"GET /echo HTTP/1.1\r\nHost: desk\r\nX-Id: next\r\n\r\n"
HOSTED = b"Host: desk\r\nX-Id: first\r\n"
POST = b"POST /echo HTTP/1.1\r\n" + HOSTED
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
# What some parser took, or might take, for a request of its own.
HIDDEN = b"POST /echo HTTP/1.1\r\nHost: desk\r\nX-Id: hidden\r\nContent-Length: 0\r\n\r\n"
OWN_HOST = b"Host: 127.0.0.1:8001\r\n"

# The bytes of each client's JSON POST with its default settings, as they were recorded (.NET's: as documented).
CLIENTS = {
    "java.net.http": b"POST /order HTTP/1.1\r\nConnection: Upgrade, HTTP2-Settings\r\nContent-Length: 31\r\n"
    + OWN_HOST
    + b"HTTP2-Settings: AAEAAEAAAAIAAAAAAAMAAAAAAAQBAAAAAAUAAEAAAAYABgAA\r\nUpgrade: h2c\r\n"
    b"User-Agent: Java-http-client/17.0.15\r\nContent-Type: application/json\r\n\r\n" + ORDER,
    "curl --http2": b"POST /order HTTP/1.1\r\n" + OWN_HOST + b"User-Agent: curl/7.88.1\r\nAccept: */*\r\n"
    b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n"
    b"Content-Type: application/json\r\nContent-Length: 31\r\n\r\n" + ORDER,
    ".NET PostAsJsonAsync": b"POST /order HTTP/1.1\r\n" + OWN_HOST + b"Transfer-Encoding: chunked\r\n"
    b"Content-Type: application/json; charset=utf-8\r\n\r\n1F\r\n" + ORDER + b"\r\n0\r\n\r\n",
    ".NET StringContent": b"POST /order HTTP/1.1\r\n" + OWN_HOST + b"Content-Type: application/json; charset=utf-8\r\n"
    b"Content-Length: 31\r\n\r\n" + ORDER,
    ".NET HttpWebRequest": b"POST /order HTTP/1.1\r\nContent-Type: application/json\r\n"
    + OWN_HOST
    + b"Content-Length: 31\r\nExpect: 100-continue\r\nConnection: Keep-Alive\r\n\r\n"
    + ORDER,
    "Node fetch": b"POST /order HTTP/1.1\r\nhost: 127.0.0.1:8001\r\nconnection: keep-alive\r\n"
    b"content-type: application/json\r\naccept: */*\r\naccept-language: *\r\nsec-fetch-mode: cors\r\n"
    b"user-agent: node\r\naccept-encoding: gzip, deflate\r\ncontent-length: 31\r\n\r\n" + ORDER,
    "Node http": b"POST /order HTTP/1.1\r\nContent-Type: application/json\r\n"
    + OWN_HOST
    + b"Connection: keep-alive\r\nTransfer-Encoding: chunked\r\n\r\n1f\r\n"
    + ORDER
    + b"\r\n0\r\n\r\n",
    "httpx": b"POST /order HTTP/1.1\r\n" + OWN_HOST + b"Accept: */*\r\nAccept-Encoding: gzip, deflate, br\r\n"
    b"Connection: keep-alive\r\nUser-Agent: python-httpx/0.28.1\r\nContent-Length: 31\r\n"
    b"Content-Type: application/json\r\n\r\n" + ORDER,
    "aiohttp": b"POST /order HTTP/1.1\r\n" + OWN_HOST + b"Accept: */*\r\nAccept-Encoding: gzip, deflate, br\r\n"
    b"User-Agent: Python/3.11 aiohttp/3.14.5\r\nContent-Length: 31\r\nContent-Type: application/json\r\n\r\n" + ORDER,
    "requests": b"POST /order HTTP/1.1\r\n" + OWN_HOST + b"User-Agent: python-requests/2.34.2\r\n"
    b"Accept-Encoding: gzip, deflate, br\r\nAccept: */*\r\nConnection: keep-alive\r\nContent-Length: 31\r\n"
    b"Content-Type: application/json\r\n\r\n" + ORDER,
}


@pytest.fixture(scope="module")
async def running_echo() -> AsyncIterator[Echo]:
    async with echo_of(settings(hosts=["desk.example"]), Echo()) as echo:
        yield echo


@pytest.fixture
def echo(running_echo: Echo) -> Iterator[Echo]:
    """Nothing that a client sends is logged as our fault."""
    running_echo.reached.clear()
    with logged("") as lines:
        yield running_echo
    assert [line for line in lines if line["level"] not in ("INFO", "DEBUG")] == []


async def exchange(echo: Echo, *segments: bytes) -> tuple[list[tuple[int, str | None]], bool]:
    """The status and the code or id of each answer to these segments, and whether the request that follows them on the
    connection was answered, as itself."""
    async with raw(echo.port) as line, asyncio.timeout(20):
        with contextlib.suppress(ConnectionError):
            await line.send(*segments, NEXT)
        answers = await line.answers(last=b'"next"')
    kept = bool(answers) and b'"next"' in answers[-1].body
    if kept:
        assert (answers.pop().json, echo.reached.pop()) == ({"id": "next", "body": ""}, ("next", b""))
    final = [each for each in answers if each.status != 100]
    return [(each.status, each.json["id"] if each.status == 200 else each.code) for each in final], kept


@pytest.mark.parametrize("sent", CLIENTS.values(), ids=CLIENTS)
async def test_every_client_places_one_order_however_its_bytes_arrive(echo: Echo, sent: bytes) -> None:
    head = sent.index(b"\r\n\r\n") + 4
    for cut in (0, head - 2, head, head + 1, len(sent) - 1):
        assert await exchange(echo, *filter(None, (sent[:cut], sent[cut:]))) == ([(200, None)], True)
        assert echo.reached == [(None, ORDER)]
        echo.reached.clear()


UPGRADES = [
    b"Connection: Upgrade\r\nUpgrade: h2c\r\n",
    b"Upgrade: h2c\r\n",
    b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n",
    b"Connection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    b"Sec-WebSocket-Version: 13\r\n",
    b"Upgrade: websocket\r\n",
    b"Connection: keep-alive, Upgrade\r\nUpgrade: TLS/1.0, anything\r\n",
    b"Connection: Upgrade\r\nUpgrade:\r\n",
    b"Connection: Upgrade\r\n",
]


@pytest.mark.parametrize("upgrade", UPGRADES)
async def test_a_request_that_offers_an_upgrade_is_one_request_with_its_body(echo: Echo, upgrade: bytes) -> None:
    whole = POST + upgrade + b"Content-Length: %d\r\n\r\n" % len(HIDDEN) + HIDDEN
    chunked = POST + upgrade + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(HIDDEN) + HIDDEN + b"\r\n0\r\n\r\n"
    head = len(whole) - len(HIDDEN)
    for segments in ([whole], [whole[:head], whole[head:]], [whole[: head + 1], whole[head + 1 :]], [chunked]):
        assert await exchange(echo, *segments) == ([(200, "first")], True)
        assert echo.reached == [("first", HIDDEN)]
        echo.reached.clear()
    assert await exchange(echo, whole + whole + chunked) == ([(200, "first")] * 3, True)
    assert echo.reached == [("first", HIDDEN)] * 3


async def test_an_upgrade_offered_is_one_request_wherever_its_bytes_are_cut(echo: Echo) -> None:
    sent = POST + UPGRADES[2] + b"Content-Length: %d\r\n\r\n" % len(HIDDEN) + HIDDEN
    async with raw(echo.port) as line, asyncio.timeout(60):
        for cut in range(1, len(sent)):
            await line.send(sent[:cut], sent[cut:])
            assert (await line.answer()).json["id"] == "first"
    assert echo.reached == [("first", HIDDEN)] * (len(sent) - 1)


@pytest.mark.parametrize("upgrade", UPGRADES)
async def test_a_get_that_offers_an_upgrade_is_answered_as_any(echo: Echo, upgrade: bytes) -> None:
    assert await exchange(echo, b"GET /echo HTTP/1.1\r\n" + HOSTED + upgrade + b"\r\n") == ([(200, "first")], True)


def chunked(*parts: bytes) -> list[bytes]:
    return [CHUNKED + part for part in parts]


def sized(*lengths: bytes) -> list[bytes]:
    return [POST + b"Content-Length: " + length + b"\r\n\r\nhi" for length in lengths]


def coded(*codings: bytes) -> list[bytes]:
    return [POST + b"Transfer-Encoding: " + coding + b"\r\n\r\n2\r\nhi\r\n0\r\n\r\n" for coding in codings]


def fields(*lines: bytes) -> list[bytes]:
    return [b"GET /echo HTTP/1.1\r\n" + HOSTED + line + b"\r\n\r\n" for line in lines]


def first_lines(*lines: bytes) -> list[bytes]:
    return [line + b"\r\n" + HOSTED + b"\r\n" for line in lines]


@pytest.mark.parametrize(
    "sent",
    [
        *sized(b"2", b"02", b"\t2 ", b"2" + b" " * 40, b"0" * 5000 + b"2", b"2\r\nContent_Length: 9"),
        *coded(b"chunked", b"Chunked", b"\tchunked ", b"chunked\r\nTE: trailers"),
        *chunked(b"2\r\nhi\r\n0\r\n\r\n", b"1\r\nh\r\n01\r\ni\r\n000\r\n\r\n"),
        *chunked(b"2;a=b\r\nhi\r\n0;c\r\n\r\n", b"2;" + b"x" * 9000 + b"\r\nhi\r\n0\r\n\r\n"),
        b"\r\n\n\r\n" + POST + b"Content-Length: 2\r\n\r\nhi",
        POST.replace(b"/echo", b"http://desk/echo") + b"Content-Length: 2\r\n\r\nhi",
        POST.replace(b"/echo", b"HTTP://other/echo") + b"Content-Length: 2\r\n\r\nhi",
        POST.replace(b"/echo", b"/ec%68o/?a=1#b") + b"Content-Length: 2\r\n\r\nhi",
        POST.replace(b"POST", b"GET") + b"Content-Length: 2\r\n\r\nhi",
        POST + b"Content-Length: 2\r\nExpect: 100-continue\r\n\r\nhi",
        POST + b"Content-Length: 2\r\nExpect: a-miracle\r\n\r\nhi",
        POST + b"Content-Length: 2\r\nX: \xff\r\nTransfer_Encoding: chunked\r\n\r\nhi",
    ],
)
async def test_what_can_be_read_in_one_way_only_is_one_request(echo: Echo, sent: bytes) -> None:
    assert await exchange(echo, sent) == ([(200, "first")], True)
    assert echo.reached == [("first", b"hi")]


@pytest.mark.parametrize(
    "sent",
    [
        POST + b"Content-Length: 2\r\nConnection: close\r\n\r\nhi",
        POST.replace(b"1.1", b"1.0") + b"Content-Length: 2\r\n\r\nhi",
    ],
)
async def test_after_a_last_request_nothing_is_read(echo: Echo, sent: bytes) -> None:
    assert await exchange(echo, sent) == ([(200, "first")], False)
    assert echo.reached == [("first", b"hi")]


@pytest.mark.parametrize(
    "sent",
    [
        *sized(b"", b"+2", b"-2", b"0x2", b"2.0", b"2,2", b"2, 2", b"2 2", b"2_0", b"\x0b2", b"2;", b"\xb2", b"two"),
        *sized(b"2\r\nContent-Length: 2"),
        *coded(b"identity, chunked", b",chunked"),
        *chunked(b"2 \r\nhi\r\n0\t\r\n\r\n"),
        (POST + b"Content-Length: 2\r\n\r\n").replace(b"\r\n", b"\n") + b"hi",
        *[
            each.replace(b"Transfer", b"Content-Length: 9\r\nTransfer")
            for each in coded(b"chunked", b"identity, chunked")
        ],
        *[each.replace(b"\r\n\r\n2", b"\r\nContent-Length: 9\r\n\r\n2") for each in coded(b"chunked")],
        b"get /echo HTTP/1.1\r\n" + HOSTED + b"\r\n",
        b"GET /\xc3\xa9 HTTP/1.1\r\n" + HOSTED + b"\r\n",
        b"GET desk:80 HTTP/1.1\r\n" + HOSTED + b"\r\n",
        b"GET echo HTTP/1.1\r\n" + HOSTED + b"\r\n",
        b"CONNECT desk:80 HTTP/1.1\r\n" + HOSTED + b"\r\n",
        b"CONNECT desk:80 HTTP/1.1\r\n" + HOSTED + b"Content-Length: %d\r\n\r\n" % len(HIDDEN) + HIDDEN,
        b"CONNECT /echo HTTP/1.1\r\n" + HOSTED + b"\r\n",
        b"GET http://user@desk/echo HTTP/1.1\r\n" + HOSTED + b"\r\n",
        *sized(b"99999999999999999999", b"2\r\nContent-Length: 3", b"2\x00", b"\r\n 2", b"2\rX: y"),
        *coded(b"", b"xchunked", b"x", b"chunked,", b"chunked, identity", b"\x0bchunked", b"chunked\x0b", b'"chunked"'),
        *coded(b"chunked;q=1", b"\xa0chunked", b"chunked\x00", b"chunked\r\nTransfer-Encoding: identity", b"gzip"),
        *[each.replace(b"Transfer", b"Content-Length: 9\r\nTransfer") for each in coded(b"xchunked", b"chunked, gzip")],
        *[each.replace(b"Encoding:", b"Encoding :") for each in coded(b"chunked")],
        *[each.replace(b"1.1", b"1.0", 1) for each in coded(b"chunked")],
        *fields(
            b"X", b": y", b"X : y", b"X\x00: y", b"X: \x00", b"X: y\rz", b"X: \x7f", b"X(: y", b"\xff: y", b" X: y"
        ),
        *fields(b"X: y\r\n z", b"X: y\r\n\tz", b"\rX: y"),
        *first_lines(b"GET /echo", b"GET /echo HTTP/0.9", b"GET /echo HTTP/1.2", b"GET /echo HTTP/2.0", b"nonsense"),
        *first_lines(b"GET /echo http/1.1", b"GET\t/echo HTTP/1.1"),
        *first_lines(b"GET /echo HTTP/1.1 ", b"GET /ec ho HTTP/1.1", b"GET /echo\x00 HTTP/1.1", b"GET /\xff HTTP/1.1"),
        *first_lines(b"G@T /echo HTTP/1.1", b" GET /echo HTTP/1.1", b"GET \\echo HTTP/1.1"),
        *first_lines(b"PRI * HTTP/2.0", b"\x00GET /echo HTTP/1.1", b"\xef\xbb\xbfGET /echo HTTP/1.1"),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
)
async def test_what_the_server_cannot_read_reaches_nobody_and_ends_the_connection(echo: Echo, sent: bytes) -> None:
    assert await exchange(echo, sent) == ([(400, "invalid_http")], False)
    assert echo.reached == []


@pytest.mark.parametrize(
    "sent",
    [
        *chunked(
            b"+2\r\nhi\r\n0\r\n\r\n", b"-2\r\nhi\r\n0\r\n\r\n", b"0x2\r\nhi\r\n0\r\n\r\n", b" 2\r\nhi\r\n0\r\n\r\n"
        ),
        *chunked(b"\r\n2\r\nhi\r\n0\r\n\r\n", b"g\r\nhi\r\n0\r\n\r\n", b"fffffffffffffffff\r\nhi\r\n0\r\n\r\n"),
        *chunked(
            b"10000000000000002\r\nhi\r\n0\r\n\r\n",
            b"2\nhi\n0\n\n",
            b"2;a\nhi\r\n0\r\n\r\n",
            b"2;a\rb\r\nhi\r\n0\r\n\r\n",
        ),
        *chunked(
            b"2\r\nhi0\r\n\r\n", b"2\r\nhixx0\r\n\r\n", b"2\r\nhi\n0\r\n\r\n", b"2\r\nhi\r\n\r\n", b"2\r\nhi\r\n0\r\n"
        ),
        *chunked(b"2\r\nhi\r\n0\r\nno trailer\r\n\r\n"),
    ],
)
async def test_chunks_that_break_the_rules_are_no_body_however_much_of_one_was_there(echo: Echo, sent: bytes) -> None:
    assert await exchange(echo, sent) == ([(400, "invalid_http")], False)
    assert echo.reached == []


@pytest.mark.parametrize(
    "sent",
    [
        *chunked(b"2;" + b"x" * 140_000 + b"\r\nhi\r\n0\r\n\r\n"),
        *chunked(
            b"2\r\nhi\r\n0\r\n" + b"X: y\r\n" * 20_000 + b"\r\n", b"2\r\nhi\r\n0\r\nX: " + b"y" * 140_000 + b"\r\n\r\n"
        ),
    ],
)
async def test_what_is_said_beside_chunks_is_bounded(echo: Echo, sent: bytes) -> None:
    answers, kept = await exchange(echo, sent)
    assert (answers, kept) in (
        ([(431, "headers_too_large")], False),
        ([], False),
    )  # cut while more comes, it may not be heard
    assert echo.reached == []


@pytest.mark.parametrize("name", [b"Authorization", b"Idempotency-Key", b"X-Id", b"Host", b"Connection", b"Expect"])
@pytest.mark.parametrize("cut", [0, 30, 40, 50])
async def test_trailers_never_count_wherever_they_are_cut(echo: Echo, name: bytes, cut: int) -> None:
    sent = CHUNKED + b"2\r\nhi\r\n0\r\n" + name + b": hidden\r\n\r\n"
    segments = (sent[: len(sent) - cut], sent[len(sent) - cut :]) if cut else (sent,)
    assert await exchange(echo, *segments) == ([(200, "first")], True)
    assert echo.reached == [("first", b"hi")]


@pytest.mark.parametrize("sent", [CHUNKED, CHUNKED + b"2\r\nhi\r\n", CHUNKED + b"2\r\nhi\r\n0\r\n", *sized(b"3")])
async def test_a_body_whose_client_went_before_its_end_is_none(echo: Echo, sent: bytes) -> None:
    async with raw(echo.port) as line:
        await line.send(sent)
        await asyncio.sleep(0.02)
    assert await exchange(echo, *sized(b"2")) == ([(200, "first")], True)
    assert echo.reached == [("first", b"hi")]


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (b"OPTIONS * HTTP/1.1\r\n" + HOSTED, 404, "not_found"),
        (b"GET * HTTP/1.1\r\n" + HOSTED, 404, "not_found"),
        (b"OPTIONS /echo HTTP/1.1\r\n" + HOSTED, 405, "method_not_allowed"),
        (b"TRACE /echo HTTP/1.1\r\n" + HOSTED, 405, "method_not_allowed"),
        (b"M-SEARCH /echo HTTP/1.1\r\n" + HOSTED, 405, "method_not_allowed"),
        (b"GET //echo HTTP/1.1\r\n" + HOSTED, 404, "not_found"),
        (b"GET /x/../echo HTTP/1.1\r\n" + HOSTED, 404, "not_found"),
        (b"GET /%00 HTTP/1.1\r\n" + HOSTED, 404, "not_found"),
        (b"GET /%ff%zz% HTTP/1.1\r\n" + HOSTED, 404, "not_found"),
    ],
)
async def test_what_is_not_for_a_desk_is_refused_and_the_connection_stays_one_of_requests(
    echo: Echo, sent: bytes, status: int, code: str
) -> None:
    with_body = sent + b"Content-Length: %d\r\n\r\n" % len(HIDDEN) + HIDDEN
    assert await exchange(echo, sent + b"\r\n") == ([(status, code)], True)
    assert await exchange(echo, with_body) == ([(status, code)], True)
    assert echo.reached == []


@pytest.mark.parametrize("target", [b"http://[::1/", b"http://[x]/"])
async def test_a_url_without_a_host_that_could_be_one_is_refused(echo: Echo, target: bytes) -> None:
    sent = b"GET " + target + b" HTTP/1.1\r\n" + HOSTED + b"\r\n"
    assert await exchange(echo, sent) == ([(400, "invalid_http")], False)


async def test_only_a_client_that_knows_how_is_told_to_go_on(echo: Echo) -> None:
    async with raw(echo.port) as line, asyncio.timeout(20):
        await line.send(POST.replace(b"1.1", b"1.0") + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n", b"hi")
        assert (await line.answer()).json == {"id": "first", "body": "hi"}


async def test_the_preface_of_http_2_begins_nothing(echo: Echo) -> None:
    answers, kept = await exchange(echo, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0")
    assert (answers in ([], [(400, "invalid_http")]), kept, echo.reached) == (True, False, [])


@pytest.mark.parametrize("target", [b"http://desk", b"http://desk:80?a=1", b"https://desk/"])
async def test_a_whole_url_may_be_asked_for_and_its_path_may_be_empty(echo: Echo, target: bytes) -> None:
    async with raw(echo.port) as line, asyncio.timeout(20):
        await line.send(b"GET " + target + b" HTTP/1.1\r\nHost: desk\r\n\r\n")
        assert (await line.answer()).json["service"] == "db_proxy"


@pytest.mark.parametrize("target", [b"/echo", b"/nowhere"])
async def test_a_client_that_waits_to_be_told_to_go_on_is_told_or_refused(echo: Echo, target: bytes) -> None:
    async with raw(echo.port) as line, asyncio.timeout(20):
        await line.send(POST.replace(b"/echo", target) + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n")
        if target == b"/nowhere":
            assert [each.status for each in await line.answers()] == [404]
            return
        assert (await line.answer()).status == 100
        await line.send(b"hi")
        assert (await line.answer()).json == {"id": "first", "body": "hi"}


async def test_head_has_the_headers_of_get_and_no_body(echo: Echo) -> None:
    async with raw(echo.port) as line, asyncio.timeout(20):
        await line.send(b"HEAD /livez HTTP/1.1\r\nHost: desk\r\n\r\n" + NEXT)
        assert (await line.answer("HEAD")).headers["content-length"] == "18"
        assert (await line.answer()).json["id"] == "next"


async def test_requests_sent_at_once_are_answered_one_by_one_and_in_their_order(echo: Echo) -> None:
    echo.called.clear()
    slow = b"POST /slow HTTP/1.1\r\nHost: desk\r\nX-Id: %d\r\nContent-Length: 1\r\n\r\n%d"
    async with raw(echo.port) as line, asyncio.timeout(20):
        await line.send(b"".join(slow % (each, each) for each in range(9)) + NEXT)
        await echo.called.wait()
        async with raw(echo.port) as other:
            await other.send(NEXT)
            await other.answer()
        assert echo.reached == [("next", b"")]
        echo.go_on.set()
        answered = [(await line.answer()).json for _ in range(9)]
    echo.go_on.clear()
    assert answered == [{"id": str(each), "body": str(each)} for each in range(9)]


async def test_two_ids_that_are_none_do_not_reach_the_answer(echo: Echo) -> None:
    async with raw(echo.port) as line, asyncio.timeout(20):
        await line.send(b"GET /echo HTTP/1.1\r\nHost: desk\r\nX-Request-Id: good\r\nX-Request-Id: b a d\r\n\r\n")
        answer = await line.answer()
    assert answer.headers["x-request-id"] not in ("good", "b a d")
    assert json.loads(answer.body)["id"] is None
