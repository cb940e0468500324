"""What holds for every connection: limits, an end in time, and that a client's faults are never the desk's."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Callable

import psutil
import pytest

from buydesk.http import connections, protocol
from buydesk.http.protocol import HEAD_BYTES_MAX, UNREAD_BYTES_MAX, Connection
from buydesk.http.server import serving
from buydesk.runtime.serve import serve_apps
from buydesk.runtime.startup_report import new_session, responds
from buydesk.settings.model import Settings
from tests.logged import logged
from tests.raw import LARGE_BYTES, Echo, RawResponse, echo_of, raw, settings

GET = b"GET /echo HTTP/1.1\r\nHost: desk\r\nX-Id: got\r\n\r\n"
POST = b"POST /echo HTTP/1.1\r\nHost: desk\r\nX-Id: posted\r\n"
SLOW = b"POST /slow HTTP/1.1\r\nHost: desk\r\nX-Id: slow\r\n"
LARGE = b"POST /large HTTP/1.1\r\nHost: desk\r\n\r\n"
BROKEN = b"POST /broken HTTP/1.1\r\nHost: desk\r\nX-Request-Id: told\r\n\r\n"


@pytest.fixture
async def echo() -> AsyncIterator[Echo]:
    """Nothing that a client does here is logged as a fault."""
    with logged("") as lines:
        async with echo_of(settings(), Echo()) as echo, asyncio.timeout(60):
            yield echo
    assert [line for line in lines if line["level"] not in ("INFO", "DEBUG")] == []


async def asked(port: int, sent: bytes = GET, address: str = "127.0.0.1") -> RawResponse:
    """The answer on a connection of its own."""
    async with raw(port, address) as line:
        await line.send(sent)
        return await line.answer()


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0.005)


def open_to(port: int) -> int:
    """How many connections the service has."""
    found = psutil.Process().net_connections("tcp")
    return len([each for each in found if each.laddr[1] == port and each.status == psutil.CONN_ESTABLISHED])


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (GET[:-2] + b"a:b\r\n" * 98 + b"\r\n", 200),
        (GET[:-2] + b"a:b\r\n" * 99 + b"\r\n", 431),
        (GET[:-2] + b"a:b\r\n" * 12_600 + b"\r\n", 431),
        (GET[:-2] + b"a: " + b"b" * (HEAD_BYTES_MAX - 1000) + b"\r\n\r\n", 200),
        (GET[:-2] + b"a: " + b"b" * 2 * HEAD_BYTES_MAX + b"\r\n\r\n", 431),
        (GET.replace(b"/echo", b"/echo?" + b"x" * 60_000), 200),
        (GET.replace(b"/echo", b"/echo?" + b"x" * 2 * HEAD_BYTES_MAX), 431),
    ],
)
async def test_a_head_is_read_up_to_its_limits(echo: Echo, sent: bytes, status: int) -> None:
    async with raw(echo.port) as line:
        with contextlib.suppress(ConnectionError):
            await line.send(sent)
        answers = await line.answers(last=b'"got"')
    # A refusal is cut off, now and then, by what is still on its way.
    assert [each.status for each in answers] in ([status], [] if status != 200 else [200])
    assert all(each.status == 200 or each.code == "headers_too_large" for each in answers)
    assert echo.reached == [("got", b"")] * (status == 200)


async def test_a_refusal_of_a_body_is_heard_after_all_of_it_was_sent(echo: Echo) -> None:
    size = 1_000_000
    for framing in (b"Content-Length: %d\r\n\r\n" % size, b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % size):
        async with raw(echo.port) as line:
            await line.send(POST + framing + b"x" * size + b"\r\n0\r\n\r\n" * (b"chunked" in framing) + GET)
            [refused] = await line.answers()
            assert (refused.status, refused.code) == (413, "payload_too_large")
    assert echo.reached == []


async def test_of_a_body_without_an_end_no_more_is_read_than_is_bearable(echo: Echo) -> None:
    for framing in (b"Content-Length: 99999999999\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\nffffffff\r\n"):
        async with raw(echo.port) as line:
            with contextlib.suppress(ConnectionError):
                await line.send(POST + framing)
                while True:
                    await line.send(b"x" * 65_536)
    assert (await asked(echo.port)).status == 200
    assert echo.reached == [("got", b"")]


async def test_of_a_body_that_nobody_reads_little_is_taken(echo: Echo) -> None:
    async with raw(echo.port) as line:
        await line.send(SLOW + b"Content-Length: 99999999\r\n\r\n")
        await echo.called.wait()
        sending = asyncio.create_task(line.send(b"x" * 99_999_999))
        await asyncio.wait([sending], timeout=0.5)
        assert not sending.done()
        sending.cancel()
        echo.go_on.set()
        assert (await line.answer()).code == "payload_too_large"


@pytest.mark.parametrize("size", [UNREAD_BYTES_MAX - 1, UNREAD_BYTES_MAX + 1, 300_000, LARGE_BYTES])
async def test_after_a_body_of_any_size_the_next_request_is_read(echo: Echo, size: int) -> None:
    much = b"POST /much HTTP/1.1\r\nHost: desk\r\nContent-Length: %d\r\n\r\n" % size
    async with raw(echo.port) as line:
        for _ in range(2):
            await line.send(much + b"x" * size)
            assert (await line.answer()).json == {"bytes": size}
        await line.send(GET)
        assert (await line.answer()).json["id"] == "got"


async def test_a_body_in_any_number_of_parts_is_read_whole(echo: Echo) -> None:
    body = bytes(range(65, 91)) * 600
    parts = b"".join(b"1\r\n%c\r\n" % byte for byte in body)
    assert (await asked(echo.port, POST + b"Transfer-Encoding: chunked\r\n\r\n" + parts + b"0\r\n\r\n")).status == 200
    assert echo.reached == [("posted", body)]


async def test_a_request_that_comes_while_another_is_answered_waits_for_its_turn(echo: Echo) -> None:
    async with raw(echo.port) as line:
        await line.send(SLOW + b"\r\n")
        await echo.called.wait()
        await line.send(GET[:9], GET[9:])
        await asked(echo.port)
        assert echo.reached == [("got", b"")]  # that of the other connection
        echo.go_on.set()
        assert [(await line.answer()).json["id"] for _ in range(2)] == ["slow", "got"]


async def test_a_request_behind_another_is_read_to_its_end_however_it_is_cut(echo: Echo) -> None:
    body = b"x" * 5000
    behind = POST + b"Content-Length: %d\r\n\r\n" % len(body) + body
    for cut in (0, 9, len(behind) - len(body), len(behind) - len(body) + 50, len(behind) - 1):
        async with raw(echo.port) as line:
            await line.send(*filter(None, (GET + behind[:cut], behind[cut:])))
            assert [(await line.answer()).json["id"] for _ in range(2)] == ["got", "posted"]
    echo.called.clear()
    for cut in (9, len(behind) - len(body) + 50):
        async with raw(echo.port) as line:
            await line.send(SLOW + b"\r\n" + behind[:cut])
            await echo.called.wait()
            await line.send(behind[cut:], GET)
            await asked(echo.port)
            echo.go_on.set()
            assert [(await line.answer()).json["id"] for _ in range(3)] == ["slow", "posted", "got"]
            echo.go_on.clear()
            echo.called.clear()


async def test_the_time_of_a_head_runs_only_while_its_client_can_do_something(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "CHECK_SECONDS", 0.01)
    async with echo_of(settings(request_seconds_max=0.1), Echo()) as echo, raw(echo.port) as line, asyncio.timeout(20):
        await line.send(SLOW + b"\r\n" + GET[:9])
        await echo.called.wait()
        await line.send(GET[9:])
        await asyncio.sleep(0.5)
        echo.go_on.set()
        assert [(await line.answer()).json["id"] for _ in range(2)] == ["slow", "got"]


async def test_blank_lines_are_no_request_that_keeps_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "CHECK_SECONDS", 0.01)
    async with echo_of(settings(idle_seconds_max=0.3), Echo()) as echo, raw(echo.port) as line, asyncio.timeout(20):
        with contextlib.suppress(ConnectionError):
            while True:
                await line.send(b"\r\n")
                await asyncio.sleep(0.05)
        assert open_to(echo.port) == 0


async def test_whoever_sends_no_more_still_gets_every_answer(echo: Echo) -> None:
    async with raw(echo.port) as line:
        await line.send(SLOW + b"\r\n" + GET)
        await echo.called.wait()
        await line.send(GET)
        line.send_no_more()
        await asked(echo.port)
        echo.go_on.set()
        assert [each.json["id"] for each in await line.answers()] == ["slow", "got", "got"]
    for half in (b"", b"GET /e", POST + b"Content-Length: 9\r\n\r\nx"):
        async with raw(echo.port) as line:
            await line.send(GET + half)
            line.send_no_more()
            assert [each.status for each in await line.answers()] == [200] + [400] * half.startswith(b"POST")


async def test_one_look_that_fails_does_not_end_the_time_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "CHECK_SECONDS", 0.01)
    look = connections.Connections.close_late
    failed: list[bool] = []

    def fails_once(self: connections.Connections) -> None:
        if not failed:
            failed.append(True)
            raise ZeroDivisionError("an accident")
        look(self)

    monkeypatch.setattr(connections.Connections, "close_late", fails_once)
    with logged("buydesk.http.connections") as lines:
        async with echo_of(settings(request_seconds_max=0.1), Echo()) as echo, raw(echo.port) as line:
            await line.send(b"G")
            assert (await line.answer()).status == 408
    assert [each["level"] for each in lines] == ["ERROR"]


async def test_a_fault_of_the_answering_itself_ends_the_connection_and_is_logged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(protocol, "serialize", None)
    with logged("buydesk.http.protocol") as lines:
        async with echo_of(settings(), Echo()) as echo, raw(echo.port) as line, asyncio.timeout(20):
            await line.send(GET)
            assert await line.rest() == b""
    assert [each["level"] for each in lines] == ["ERROR"]


async def test_a_client_that_has_gone_before_it_is_known_is_none() -> None:
    class Gone(asyncio.Transport):
        aborted = False

        def get_extra_info(self, name: str, default: object = None) -> object:
            return default

        def abort(self) -> None:
            self.aborted = True

    of, transport = settings(), Gone()
    known = connections.Connections(of, Echo().app(of).respond)  # type: ignore[arg-type]  # never called
    connection = Connection(known)
    connection.connection_made(transport)
    connection.data_received(GET)
    connection.connection_lost(None)
    assert (transport.aborted, known.open) == (True, set())


async def test_of_what_lies_behind_a_request_little_is_taken_until_it_is_answered(echo: Echo) -> None:
    async with raw(echo.port) as line:
        await line.send(SLOW + b"\r\n")
        await echo.called.wait()
        sending = asyncio.create_task(line.send(GET * 400_000))
        await asyncio.wait([sending], timeout=0.5)
        assert not sending.done()
        sending.cancel()
        echo.go_on.set()
        assert (await line.answer()).json["id"] == "slow"
        for _ in range(5000):
            assert (await line.answer()).json["id"] == "got"


async def test_a_connection_that_is_closing_may_be_read_and_written_without_harm() -> None:
    of = settings()
    echo = Echo()
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    async with serving(echo.app(of), listener, of) as connections, asyncio.timeout(20), raw(port) as line:
        await line.send(GET)
        assert (await line.answer()).status == 200
        [connection] = connections.open
        connection.abort()
        connection.read_on()
        connection.write(b"nobody reads it")
        assert await line.rest() == b""


@pytest.mark.parametrize(
    ("sent", "statuses"),
    [(b"", []), (b"\r\n", []), (GET, [200]), (b"G", [408]), (GET[:-2], [408]), (GET + b"G", [200, 408])],
)
async def test_a_head_that_does_not_come_in_time_ends_its_connection(
    sent: bytes, statuses: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "CHECK_SECONDS", 0.01)
    hasty = settings(idle_seconds_max=0.1, request_seconds_max=0.1)
    async with echo_of(hasty, Echo()) as echo, raw(echo.port) as line, asyncio.timeout(20):
        await line.send(sent)
        assert [each.status for each in await line.answers()] == statuses


@pytest.mark.parametrize("framing", [b"Content-Length: 9\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n9\r\n"])
@pytest.mark.parametrize("begun", [b"", b"x"])
async def test_a_body_that_does_not_come_in_time_is_refused(framing: bytes, begun: bytes) -> None:
    async with echo_of(settings(request_seconds_max=0.1), Echo()) as echo, raw(echo.port) as line, asyncio.timeout(20):
        await line.send(POST + framing + begun)
        [answer] = await line.answers()
        assert (answer.status, answer.code) == (408, "request_timeout")
        assert echo.reached == []


async def test_only_the_request_must_be_in_time_and_not_its_answer() -> None:
    async with (
        echo_of(settings(request_seconds_max=0.1, idle_seconds_max=0.1), Echo()) as echo,
        asyncio.timeout(20),
        raw(echo.port) as slow,
        raw(echo.port) as late,
    ):
        await slow.send(SLOW + b"Content-Length: 1\r\n\r\nx")
        await late.send(POST + b"Content-Length: 1\r\n\r\n")
        assert (await late.answer()).status == 408
        echo.go_on.set()
        assert (await slow.answer()).json == {"id": "slow", "body": "x"}


async def test_who_takes_nothing_of_an_answer_is_cut_and_who_takes_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "CHECK_SECONDS", 0.05)
    async with (
        echo_of(settings(write_seconds_max=0.5), Echo()) as echo,
        asyncio.timeout(60),
        raw(echo.port, receive_bytes=4096) as line,
        raw(echo.port) as reader,
    ):
        await line.send(LARGE * 9)
        await reader.send(LARGE * 9)
        for _ in range(9):
            assert len((await reader.answer()).body) == LARGE_BYTES
        await until(lambda: open_to(echo.port) == 1)
        await reader.send(GET)
        assert (await reader.answer()).json["id"] == "got"


async def test_connections_beyond_their_number_are_refused_until_one_is_closed() -> None:
    async with (
        echo_of(settings(connections_max=2), Echo()) as echo,
        asyncio.timeout(20),
        raw(echo.port) as first,
        raw(echo.port) as second,
    ):
        for line in (first, second):
            await line.send(GET)
            assert (await line.answer()).status == 200
        refused = await asked(echo.port)
        assert (refused.status, refused.code, refused.headers["retry-after"]) == (503, "overloaded", "1")
        await first.send(GET)  # whoever is in goes on
        assert (await first.answer()).status == 200
        first.abort()
        await until(lambda: open_to(echo.port) == 1)
        assert (await asked(echo.port)).status == 200


@contextlib.asynccontextmanager
async def limited(per_address: int, **given: object) -> AsyncIterator[Echo]:
    """A service as `buydesk` runs it, with so many connections for each address."""
    of = settings(connections_per_address_max=per_address, **given)
    echo = Echo()
    listener = socket.create_server(("127.0.0.1", 0))
    echo.port = listener.getsockname()[1]
    async with serve_apps({"db_proxy": echo.app(of)}, {"db_proxy": listener}, of), asyncio.timeout(60):
        yield echo
        echo.go_on.set()


async def test_an_address_with_too_many_connections_gets_no_more_and_others_do() -> None:
    async with limited(20) as echo, contextlib.AsyncExitStack() as stack:
        lines = [await stack.enter_async_context(raw(echo.port, "127.0.0.2")) for _ in range(20)]
        for line in lines:
            await line.send(GET)
            assert (await line.answer()).status == 200
        refused = await asked(echo.port, address="127.0.0.2")
        assert (refused.status, refused.code) == (503, "overloaded")
        others = [await stack.enter_async_context(raw(echo.port, f"127.0.0.{n}")) for n in (3, 4) for _ in range(15)]
        for line in (*lines, *others):
            await line.send(GET)
            assert (await line.answer()).status == 200
        lines[0].abort()
        await until(lambda: open_to(echo.port) == 19 + 30)
        assert (await asked(echo.port, address="127.0.0.2")).status == 200


async def test_a_service_that_takes_no_more_connections_counts_as_alive() -> None:
    """Or whoever opens many of them could get it killed by its supervisor."""
    async with limited(1) as echo, raw(echo.port), new_session() as session:
        url = f"http://127.0.0.1:{echo.port}/livez"
        assert await responds(session, url)
    async with new_session() as session:
        assert not await responds(session, url)


async def test_a_proxy_has_as_many_connections_as_its_clients_need() -> None:
    async with limited(5, access="proxy", proxies=["127.0.0.2"]) as echo, contextlib.AsyncExitStack() as stack:
        for line in [await stack.enter_async_context(raw(echo.port, "127.0.0.2")) for _ in range(40)]:
            await line.send(GET)
            assert (await line.answer()).status == 200


@pytest.mark.parametrize("sent", [GET * 3, GET.replace(b"/echo", b"/readyz") * 3, LARGE * 3, GET + b"nonsense\r\n\r\n"])
async def test_a_client_that_asks_and_goes_is_no_fault_of_ours(echo: Echo, sent: bytes) -> None:
    for _ in range(30):
        async with raw(echo.port) as line:
            await line.send(sent)
    assert (await asked(echo.port)).status == 200


@pytest.mark.parametrize(
    "sent",
    [
        POST + b"Content-Length: 9\r\n\r\nx",
        POST + b"Transfer-Encoding: chunked\r\n\r\n9\r\nx",
        POST,
        b"POST /nowhere HTTP",
    ],
)
async def test_a_client_that_goes_while_it_asks_is_no_fault_of_ours_and_asks_nothing(echo: Echo, sent: bytes) -> None:
    for _ in range(30):
        async with raw(echo.port) as line:
            await line.send(sent, b"")
    await until(lambda: open_to(echo.port) == 0)
    assert (await asked(echo.port)).status == 200
    assert echo.reached == [("got", b"")]


async def test_what_a_client_asked_for_is_done_even_if_it_goes_before_the_answer(echo: Echo) -> None:
    async with raw(echo.port) as line:
        await line.send(SLOW + b"Content-Length: 1\r\n\r\nx")
        await echo.called.wait()
    await until(lambda: open_to(echo.port) == 0)
    echo.go_on.set()
    await until(lambda: echo.reached == [("slow", b"x")])
    assert (await asked(echo.port)).status == 200


async def test_a_client_that_goes_while_an_answer_is_written_is_no_fault_of_ours(echo: Echo) -> None:
    for _ in range(5):
        async with raw(echo.port, receive_bytes=4096) as line:
            await line.send(LARGE * 3)
            await echo.called.wait()
    assert (await asked(echo.port)).status == 200


async def test_an_accident_is_a_problem_with_the_requests_id_and_one_error() -> None:
    async with echo_of(settings(), Echo()) as echo, asyncio.timeout(20):
        with logged("") as lines:
            answer = await asked(echo.port, BROKEN)
        assert (answer.status, answer.code, answer.headers["x-request-id"]) == (500, "internal_error", "told")
        assert [(line["level"], line["request_id"]) for line in lines if line["level"] == "ERROR"] == [
            ("ERROR", "told")
        ]
        assert (await asked(echo.port)).status == 200


async def test_every_answer_tells_browsers_to_make_nothing_else_of_it(echo: Echo) -> None:
    for sent in (GET, GET.replace(b"/echo", b"/docs"), GET.replace(b"/echo", b"/nowhere")):
        headers = (await asked(echo.port, sent)).headers
        assert (headers["x-content-type-options"], headers["x-frame-options"]) == ("nosniff", "deny")
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "server" not in headers
        assert headers["date"].endswith("gmt")


class Stopping:
    """A service that a test stops by itself."""

    def __init__(self, of: Settings) -> None:
        self.echo = Echo()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.echo.port = self._listener.getsockname()[1]
        self._serving = serving(self.echo.app(of), self._listener, of)

    async def start(self) -> Echo:
        await self._serving.__aenter__()
        return self.echo

    async def stop(self) -> None:
        await self._serving.__aexit__(None, None, None)


async def test_stopping_answers_what_is_under_way_and_takes_nothing_more() -> None:
    stopping = Stopping(settings())
    echo = await stopping.start()
    async with raw(echo.port) as line, asyncio.timeout(20):
        await line.send(SLOW + b"Content-Length: 1\r\n\r\nx")
        await echo.called.wait()
        ending = asyncio.create_task(stopping.stop())
        refused = False
        while not refused:
            try:
                async with raw(echo.port):
                    await asyncio.sleep(0.01)
            except ConnectionResetError:  # it stood in the queue of the socket that was closed
                continue
            except ConnectionRefusedError:
                refused = True
        assert not ending.done()
        echo.go_on.set()
        answer = await line.answer()
        assert (answer.json, answer.headers["connection"]) == ({"id": "slow", "body": "x"}, "close")
        await ending
    socket.create_server(("127.0.0.1", echo.port)).close()


async def test_stopping_reads_the_body_of_what_it_answers() -> None:
    stopping = Stopping(settings())
    echo = await stopping.start()
    async with raw(echo.port) as line, asyncio.timeout(20):
        await line.send(POST + b"Content-Length: 5\r\n\r\n")
        assert (await asked(echo.port)).status == 200
        ending = asyncio.create_task(stopping.stop())
        await asyncio.sleep(0.05)
        await line.send(b"abcde")
        assert (await line.answer()).json == {"id": "posted", "body": "abcde"}
        await ending


async def test_stopping_begins_nothing_more_for_a_client_that_takes_its_answer_late() -> None:
    stopping = Stopping(settings())
    echo = await stopping.start()
    async with raw(echo.port, receive_bytes=4096) as line, asyncio.timeout(20):
        await line.send(LARGE)
        await echo.called.wait()
        for _ in range(3):
            await line.send(POST + b"Content-Length: 1\r\n\r\nx")
            assert (await asked(echo.port)).status == 200
        ending = asyncio.create_task(stopping.stop())
        assert len((await line.answer()).body) == LARGE_BYTES
        assert await line.rest() == b""
        await ending
    assert echo.reached == [("got", b"")] * 3


async def test_stopping_waits_for_what_a_client_asked_for_that_has_gone() -> None:
    stopping = Stopping(settings())
    echo = await stopping.start()
    async with raw(echo.port) as line, asyncio.timeout(20):
        await line.send(SLOW + b"\r\n")
        await echo.called.wait()
    await until(lambda: open_to(echo.port) == 0)
    ending = asyncio.create_task(stopping.stop())
    await asyncio.sleep(0.05)
    assert not ending.done()
    echo.go_on.set()
    await ending
    assert echo.reached == [("slow", b"")]


async def test_stopping_waits_for_no_client_that_rests_or_is_slow_to_ask_or_to_read() -> None:
    stopping = Stopping(settings(drain_seconds_max=60, order_seconds_max=50))
    echo = await stopping.start()
    async with contextlib.AsyncExitStack() as stack, asyncio.timeout(20):
        for sent in (b"", b"GET /ech", GET, LARGE * 3):
            line = await stack.enter_async_context(raw(echo.port, receive_bytes=4096))
            await line.send(sent)
        assert (await asked(echo.port)).status == 200
        await echo.called.wait()
        await stopping.stop()
        assert open_to(echo.port) == 0
    socket.create_server(("127.0.0.1", echo.port)).close()


async def test_a_client_that_goes_with_half_a_body_as_the_desk_stops_is_no_fault_of_ours() -> None:
    with logged("") as lines:
        for _ in range(20):
            stopping = Stopping(settings())
            echo = await stopping.start()
            async with contextlib.AsyncExitStack() as stack, asyncio.timeout(20):
                for path in (b"/echo", b"/nowhere"):
                    line = await stack.enter_async_context(raw(echo.port))
                    await line.send(POST.replace(b"/echo", path) + b"Content-Length: 9\r\n\r\nx")
                assert (await asked(echo.port)).status == 200
                ending = asyncio.create_task(stopping.stop())
                await asyncio.sleep(0)
                await stack.aclose()
                await ending
    assert [line for line in lines if line["level"] not in ("INFO", "DEBUG")] == []


async def test_stopping_waits_for_no_answer_longer_than_it_may() -> None:
    stopping = Stopping(settings(drain_seconds_max=0.2, order_seconds_max=0.1))
    echo = await stopping.start()
    async with raw(echo.port) as line, asyncio.timeout(20):
        await line.send(SLOW + b"\r\n")
        await echo.called.wait()
        await stopping.stop()
        assert await line.rest() == b""
    socket.create_server(("127.0.0.1", echo.port)).close()
    echo.go_on.set()
    await until(lambda: echo.reached == [("slow", b"")])


async def test_a_process_that_ends_before_an_answer_does_is_no_fault_of_the_request() -> None:
    stopping = Stopping(settings(drain_seconds_max=0.2, order_seconds_max=0.1))
    echo = await stopping.start()
    with logged("") as lines:
        async with raw(echo.port) as line, asyncio.timeout(20):
            await line.send(SLOW + b"\r\n")
            await echo.called.wait()
            await stopping.stop()
            assert echo.answering is not None
            echo.answering.cancel()  # as the end of the loop does
            await asyncio.wait([echo.answering])
            assert (await line.rest(), echo.reached) == (b"", [])
    assert [line for line in lines if line["level"] not in ("INFO", "DEBUG")] == []


OWN = b"127.0.0.1:8001"


def posted(host: bytes, origin: bytes | None, method: bytes = b"POST", http: bytes = b"1.1") -> bytes:
    said = b"" if origin is None else b"Origin: " + origin + b"\r\n"
    return method + b" /echo HTTP/" + http + b"\r\nHost: " + host + b"\r\n" + said + b"\r\n"


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        *[
            (posted(host, None), None)
            for host in (
                OWN,
                b"localhost",
                b"LOCALHOST.:80",
                b"buydesk:8001",
                b"db_proxy",
                b"[::1]:8001",
                b"10.1.2.3",
                b"x:",
            )
        ],
        *[(posted(host, None), None) for host in (b"desk.example", b"DESK.example.:8001")],
        (posted(OWN, b"http://" + OWN), None),
        (posted(b"Desk.Example", b"http://desk.example:80"), None),
        (posted(b"desk.example:443", b"https://desk.example"), None),
        (posted(b"[::1]:8001", b"http://[::1]:8001"), None),
        *[
            (posted(host, None, method), "foreign_origin")
            for host in (b"evil.example", b"evil.example:8001", b"desk.example.evil.example", b"127.0.0.1.evil.example")
            for method in (b"GET", b"HEAD", b"POST")
        ],
        (posted(b"1.2.3", None), "foreign_origin"),
        (posted(b"...", None), "foreign_origin"),
        *[
            (posted(OWN, origin), "foreign_origin")
            for origin in (
                b"http://evil.example",
                b"null",
                b"",
                b"\xff",
                b"http://127.0.0.1:8002",
                b"http://127.0.0.1",
                b"http://localhost:8001",
                b"ftp://" + OWN,
                b"http://" + OWN + b"/",
                b"http://a@" + OWN,
                b"http://" + OWN + b", http://evil.example",
                b"http://127.0.0.1:port",
            )
        ],
        (posted(OWN, b"http://evil.example", b"GET"), None),
        (posted(OWN, b"null", b"HEAD"), None),
        (posted(OWN, None).replace(b"/echo", b"http://evil.example/echo"), "foreign_origin"),
        (posted(b"evil.example", None).replace(b"/echo", b"http://desk.example/echo"), None),
        (posted(OWN, None, http=b"1.0"), None),
        (posted(b"evil.example", None, http=b"1.0"), "foreign_origin"),
        (b"POST /echo HTTP/1.0\r\n\r\n", None),
        (b"POST /echo HTTP/1.1\r\n\r\n", "invalid_http"),
        (b"POST /echo HTTP/1.0\r\nHost: x\r\nHost: x\r\n\r\n", "invalid_http"),
        *[
            (posted(host, None), "invalid_http")
            for host in (
                b"",
                b"x\r\nHost: x",
                b"x\r\nHost: y",
                b"a@x",
                b"x/y",
                b"x:y",
                b"x:999999",
                b"x, y",
                b"[::1",
                b"[zz]",
                b"\xff",
            )
        ],
    ],
)
async def test_an_open_desk_is_for_its_own_pages_and_for_programs(sent: bytes, code: str | None) -> None:
    async with echo_of(settings(hosts=["desk.example"]), Echo()) as echo, raw(echo.port) as line, asyncio.timeout(20):
        await line.send(sent)
        answer = await line.answer(sent.partition(b" ")[0].decode())
        status = {None: 200, "foreign_origin": 403, "invalid_http": 400}[code]
        assert answer.status == status
        assert code is None or sent.startswith(b"HEAD") or answer.code == code
        assert len(echo.reached) == (code is None)


async def test_behind_a_proxy_hosts_and_origins_are_the_proxys_affair() -> None:
    async with echo_of(settings(access="proxy"), Echo()) as echo, asyncio.timeout(20):
        assert (await asked(echo.port, posted(b"evil.example", b"http://other.example"))).status == 200
        assert (await asked(echo.port, posted(b"a@b", None))).status == 400


async def test_a_form_of_another_site_places_nothing(echo: Echo) -> None:
    form = b"Content-Type: application/x-www-form-urlencoded\r\nContent-Length: 26\r\n\r\ncurrency=eur&amount=69.000"
    refused = await asked(echo.port, posted(OWN, b"http://evil.example")[:-2] + form)
    assert (refused.status, refused.code, echo.reached) == (403, "foreign_origin", [])
    assert json.loads(refused.body)["detail"]
