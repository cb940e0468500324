"""What a connection may send, byte by byte, before a service hears of it."""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from fastapi import FastAPI, Request, Response
from starlette.responses import StreamingResponse

from buydesk import protocol, web
from buydesk.backends.memory_health import MemoryHealthDesk
from buydesk.reporting import Reporter
from buydesk.server import HEAD_BYTES_MAX
from buydesk.settings import Settings
from tests.serving import served

LARGE = 8_000_000
PATIENT = Settings(report_interval_seconds=3600)
HASTY = Settings(report_interval_seconds=3600, request_seconds_max=0.1)
GET = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST /body HTTP/1.1\r\nHost: x\r\n"


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: Any


class Line:
    """One connection, written to and read by hand."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def send(self, *parts: bytes) -> None:
        for part in parts:
            self._writer.write(part)
            await self._writer.drain()

    async def answer(self) -> Answer:
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode()
        status_line, *lines = head.rstrip().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        body = await self._reader.readexactly(int(headers["content-length"]))
        return Answer(int(status_line.split()[1]), headers, json.loads(body))

    async def problem(self) -> Answer:
        """The last answer of the connection, which is a problem."""
        answer = await self.answer()
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.headers["connection"] == "close"
        assert answer.body["status"] == answer.status
        await self.end()
        return answer

    async def until(self, end: bytes) -> bytes:
        return await self._reader.readuntil(end)

    async def exactly(self, size: int) -> bytes:
        return await self._reader.readexactly(size)

    def abort(self) -> None:
        """Gone, without a word."""
        self._writer.transport.abort()

    async def rest(self) -> bytes:
        """All that comes until the connection ends."""
        return await self._reader.read()

    async def end(self) -> None:
        """Nothing more comes."""
        assert await self.rest() == b""

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(ConnectionError):  # the server may have been first
            await self._writer.wait_closed()


class Bench:
    """A service whose answers wait until a test lets them go."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.called = asyncio.Event()
        self.go_on = asyncio.Event()
        self.port = 0
        self.lines: list[Line] = []

    def app(self) -> FastAPI:
        @asynccontextmanager
        async def lifespan(_: FastAPI) -> AsyncIterator[None]:
            yield

        async def body(request: Request) -> Response:
            return web.FastJSON({"bytes": len(await web.read_body(request))})

        async def slow(_: Request) -> Response:
            self.called.set()
            await self.go_on.wait()
            return web.FastJSON({"slow": True})

        async def part(_: Request) -> Response:
            async def chunks() -> AsyncIterator[bytes]:
                yield b"begun"
                self.called.set()
                await self.go_on.wait()

            return StreamingResponse(chunks())

        reporter = Reporter("db_proxy", MemoryHealthDesk(PATIENT), PATIENT)
        app = web.service_app("db_proxy", "A bench.", {}, reporter, lifespan)

        async def large(_: Request) -> Response:
            return web.Answer(msgspec.json.encode("x" * LARGE))

        for path, endpoint in (("/body", body), ("/slow", slow), ("/large", large)):
            app.add_direct_route(path, "POST", endpoint, {"responses": {}})
        app.add_direct_route("/part", "POST", part, {"responses": {}})
        return app

    async def line(self) -> Line:
        self.lines.append(Line(*await asyncio.open_connection("127.0.0.1", self.port)))
        return self.lines[-1]


@asynccontextmanager
async def bench_of(settings: Settings, **uvicorns: Any) -> AsyncIterator[Bench]:
    bench = Bench(settings)
    async with served(bench.app(), settings=settings, **uvicorns) as url, asyncio.timeout(20):
        bench.port = int(url.rpartition(":")[2])
        yield bench
        bench.go_on.set()
        for line in bench.lines:
            await line.close()


@pytest.fixture
async def bench(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    monkeypatch.setattr(protocol, "LINGER_SECONDS", 0.01)
    async with bench_of(PATIENT) as bench:
        yield bench


@pytest.fixture
async def hasty(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    monkeypatch.setattr(protocol, "LINGER_SECONDS", 0.01)
    async with bench_of(HASTY) as bench:
        yield bench


# What one read of a socket brings (256 KiB at the most) may be over the limit once the body has begun.
@pytest.mark.parametrize(
    "parts",
    [
        [b"GET /" + b"x" * HEAD_BYTES_MAX + b" HTTP/1.1\r\n\r\n"],
        [b"GET /livez HTTP/1.1\r\nX: " + b"x" * HEAD_BYTES_MAX],
        [b"GET /livez HTTP/1.1\r\n", *[b"X: " + b"x" * 8000 + b"\r\n"] * 9],
        [POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n", b"0\r\n", *[b"X: " + b"x" * 8000 + b"\r\n"] * 60],
        [GET[:-2] + b"X: " + b"x" * HEAD_BYTES_MAX + b"\r\n\r\n" + GET],
    ],
    ids=["a path", "a header never finished", "many headers", "trailers", "all at once"],
)
async def test_headers_are_read_up_to_their_limit(bench: Bench, parts: list[bytes]) -> None:
    line = await bench.line()
    await line.send(*parts)
    answer = await line.problem()
    assert (answer.status, answer.body["code"], answer.body["bytes_max"]) == (431, "headers_too_large", HEAD_BYTES_MAX)


async def test_headers_within_their_limit_are_taken_with_whatever_comes_behind(bench: Bench) -> None:
    body = b"x" * web.BODY_BYTES_MAX
    padding = b"X: " + b"x" * (HEAD_BYTES_MAX - 1000) + b"\r\n"
    line = await bench.line()
    headers = b"Content-Length: %d\r\n\r\n" % len(body)
    for _ in range(3):
        await line.send(POST + padding + headers + body)
        assert (await line.answer()).body == {"bytes": len(body)}


@pytest.mark.parametrize(
    "sent",
    [
        b"nonsense\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
        b"CONNECT x:y:z HTTP/1.1\r\nHost: x\r\n\r\n",
        POST + b"Content-Length: x\r\n\r\n",
        POST + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ],
)
async def test_what_is_no_http_is_answered_as_a_problem_and_is_no_fault_of_ours(
    bench: Bench, sent: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    line = await bench.line()
    await line.send(sent)
    answer = await line.problem()
    assert (answer.status, answer.body["code"], answer.body["instance"]) == (400, "invalid_http", "/")
    assert [each for each in caplog.records if each.levelno > logging.INFO] == []


async def test_a_body_that_breaks_the_rules_is_refused_while_the_service_reads_it(bench: Bench) -> None:
    line = await bench.line()
    await line.send(POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n")
    await line.send(b"zz\r\n", b"what comes later is not read")
    answer = await line.problem()
    assert (answer.status, answer.body["code"], answer.body["instance"]) == (400, "invalid_http", "/body")


async def test_a_body_that_breaks_the_rules_after_the_answer_only_ends_the_connection(bench: Bench) -> None:
    line = await bench.line()
    await line.send(b"POST /nowhere HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
    assert (await line.answer()).status == 404
    await line.send(b"zz\r\n")
    await line.end()


async def test_a_request_after_one_that_was_answered_before_its_end_is_refused_by_itself(bench: Bench) -> None:
    line = await bench.line()
    await line.send(b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\n")
    assert (await line.answer()).status == 404
    await line.send(b"x" + GET)
    assert (await line.answer()).status == 200
    await line.send(b"nonsense\r\n\r\n")
    assert (await line.problem()).body["code"] == "invalid_http"


async def test_an_upgrade_that_is_not_made_is_no_fault_of_ours(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    line = await bench.line()
    await line.send(b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
    assert (await line.answer()).status == 200
    assert [each for each in caplog.records if each.levelno > logging.INFO] == []


@pytest.mark.parametrize("then", [b"nonsense\r\n\r\n", GET + b"nonsense\r\n\r\n"])
async def test_a_refusal_never_stands_where_the_answer_to_an_earlier_request_belongs(bench: Bench, then: bytes) -> None:
    line = await bench.line()
    await line.send(b"POST /slow HTTP/1.1\r\nHost: x\r\n\r\n")
    await bench.called.wait()
    await line.send(then)
    await (await bench.line()).send(GET)
    bench.go_on.set()
    answer = await line.answer()
    assert (answer.status, answer.body) == (200, {"slow": True})
    await line.end()


@pytest.mark.parametrize(
    "sent", [b"G", GET[:-2], POST + b"Content-Length: 9\r\n\r\n", POST + b"Content-Length: 9\r\n\r\n{"]
)
async def test_a_request_that_is_not_complete_in_time_is_refused(
    hasty: Bench, sent: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    line = await hasty.line()
    await line.send(sent)
    answer = await line.problem()
    assert (answer.status, answer.body["code"]) == (408, "request_timeout")
    assert [each for each in caplog.records if each.levelno > logging.INFO] == []


@pytest.mark.parametrize("sent", [b"", b"\r\n"])
async def test_a_connection_without_a_request_is_closed_without_a_word(hasty: Bench, sent: bytes) -> None:
    line = await hasty.line()
    await line.send(sent)
    await line.end()


async def test_a_late_body_cuts_an_answer_that_has_begun(hasty: Bench) -> None:
    line = await hasty.line()
    await line.send(b"POST /part HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n")
    assert (await line.rest()).endswith(b"5\r\nbegun\r\n")


async def test_only_the_request_must_be_in_time_and_not_its_answer(hasty: Bench) -> None:
    line, other = await hasty.line(), await hasty.line()
    await line.send(b"POST /slow HTTP/1.1\r\nHost: x\r\n\r\n" + POST + b"Content-Length: 1\r\n\r\n")
    await other.end()  # which was late
    await line.send(b"x")
    await (await hasty.line()).end()
    hasty.go_on.set()
    assert (await line.answer()).body == {"slow": True}
    assert (await line.answer()).body == {"bytes": 1}


async def test_a_kept_connection_may_rest_for_longer_than_a_request_may_take(hasty: Bench) -> None:
    line = await hasty.line()
    await line.send(GET)
    assert (await line.answer()).status == 200
    await (await hasty.line()).end()  # which rested before any request
    await line.send(GET)
    assert (await line.answer()).status == 200
    await line.send(GET[:9])
    assert (await line.problem()).status == 408


async def test_the_time_of_a_request_begins_with_it(hasty: Bench) -> None:
    line = await hasty.line()
    await line.send(GET)
    assert (await line.answer()).status == 200
    started = asyncio.get_running_loop().time()
    await line.send(GET[:9])
    assert (await line.problem()).status == 408
    assert asyncio.get_running_loop().time() - started >= HASTY.request_seconds_max


async def test_connections_beyond_their_number_are_refused_until_one_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(protocol, "LINGER_SECONDS", 0.01)
    async with bench_of(Settings(report_interval_seconds=3600, connections_max=2)) as bench:
        lines = [await bench.line() for _ in range(2)]
        for line in lines:
            await line.send(GET)
            assert (await line.answer()).status == 200
        beyond = await bench.line()
        await beyond.send(GET)
        answer = await beyond.problem()
        assert (answer.status, answer.body["code"], answer.headers["retry-after"]) == (503, "overloaded", "1")
        await lines[0].close()
        status = 503
        while status != 200:
            line = await bench.line()
            await line.send(GET)
            status = (await line.answer()).status
            await line.close()


@pytest.mark.parametrize(
    "sent",
    [
        POST + b"Content-Length: 2\r\n\r\n{}",
        POST.replace(b"/body", b"/body/") + b"Content-Length: 2\r\n\r\n{}",
        POST.replace(b"/body", b"/%62ody") + b"Content-Length: 2\r\n\r\n{}",
        POST.replace(b"/body", b"/body?a=1") + b"Content-Length: 2\r\n\r\n{}",
        POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        POST + b"Connection: close\r\nContent-Length: 2\r\n\r\n{}",
        POST.replace(b"1.1", b"1.0") + b"Content-Length: 2\r\n\r\n{}",
    ],
)
async def test_a_hot_route_answers_alike_however_it_is_asked(bench: Bench, sent: bytes) -> None:
    line = await bench.line()
    await line.send(sent)
    answer = await line.answer()
    assert (answer.status, answer.body, answer.headers["content-type"]) == (200, {"bytes": 2}, "application/json")
    if b"close" in sent or b"1.0" in sent:
        assert answer.headers["connection"] == "close"
        await line.end()


async def test_a_hot_route_tells_a_client_that_asks_to_go_on(bench: Bench) -> None:
    line = await bench.line()
    await line.send(POST + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n")
    assert await line.until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    await line.send(b"{}")
    assert (await line.answer()).body == {"bytes": 2}


async def test_a_hot_route_reads_no_body_that_is_too_large(bench: Bench) -> None:
    line = await bench.line()
    await line.send(POST + b"Content-Length: %d\r\n\r\n" % (web.BODY_BYTES_MAX + 1))
    answer = await line.answer()
    assert (answer.status, answer.body["code"]) == (413, "payload_too_large")


async def test_requests_sent_at_once_are_answered_in_their_order(bench: Bench) -> None:
    line = await bench.line()
    await line.send(b"POST /slow HTTP/1.1\r\nHost: x\r\n\r\n" + POST + b"Content-Length: 1\r\n\r\nx" + GET)
    await bench.called.wait()
    bench.go_on.set()
    assert [(await line.answer()).body for _ in range(3)] == [{"slow": True}, {"bytes": 1}, {"status": "alive"}]


async def test_head_of_a_hot_route_has_no_body(bench: Bench) -> None:
    line = await bench.line()
    await line.send(GET.replace(b"GET", b"HEAD"))
    assert b"content-length: 18\r\n" in await line.until(b"\r\n\r\n")
    await line.send(GET)
    assert (await line.answer()).body == {"status": "alive"}


async def test_a_client_that_goes_before_its_answer_is_no_fault_of_ours(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    line = await bench.line()
    await line.send(b"POST /slow HTTP/1.1\r\nHost: x\r\n\r\n")
    await bench.called.wait()
    await line.close()
    other = await bench.line()
    await other.send(GET)
    assert (await other.answer()).status == 200
    bench.go_on.set()
    await other.send(GET)
    assert (await other.answer()).status == 200
    assert [each for each in caplog.records if each.levelno > logging.INFO] == []


async def test_a_client_that_does_not_read_gets_its_answers_when_it_does(bench: Bench) -> None:
    line = await bench.line()
    large = b"POST /large HTTP/1.1\r\nHost: x\r\n\r\n"
    await line.send(large)
    await line.until(b"\r\n\r\n")  # the first answer is on its way, and fills every buffer
    await line.send(large + GET)
    await asyncio.sleep(0.05)
    assert len(await line.exactly(LARGE + 2)) == LARGE + 2
    assert len((await line.answer()).body) == LARGE
    assert (await line.answer()).body == {"status": "alive"}


async def test_a_client_that_never_reads_and_goes_is_forgotten(bench: Bench) -> None:
    line = await bench.line()
    large = b"POST /large HTTP/1.1\r\nHost: x\r\n\r\n"
    await line.send(large)
    await line.until(b"\r\n\r\n")
    await line.send(large)
    await asyncio.sleep(0.05)
    line.abort()
    other = await bench.line()
    await other.send(GET)
    assert (await other.answer()).status == 200


async def test_a_connection_at_rest_is_closed_in_time() -> None:
    async with bench_of(PATIENT, timeout_keep_alive=0.05) as bench:
        line, busy = await bench.line(), await bench.line()
        await busy.send(GET)
        assert (await busy.answer()).status == 200
        await busy.send(b"POST /slow HTTP/1.1\r\nHost: x\r\n\r\n")
        await line.send(GET)
        assert (await line.answer()).status == 200
        await line.end()
        bench.go_on.set()
        assert (await busy.answer()).body == {"slow": True}
        await busy.end()


class Recorder(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self.closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written.append(bytes(data))

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize(
    ("method", "parts", "written"),
    [
        ("GET", [b"head", b"body", b"more"], [b"headbody", b"more"]),
        ("GET", [b"head"], [b"head"]),
        ("HEAD", [b"head"], [b"head"]),
        ("GET", [], []),
    ],
)
def test_an_answer_is_written_at_once(method: str, parts: list[bytes], written: list[bytes]) -> None:
    recorder = Recorder()
    cycle: Any = SimpleNamespace(transport=recorder, response_started=False, scope={"method": method})
    transport = protocol.OneWrite(cycle)
    transport.write(b"100 Continue")
    cycle.response_started = True
    for part in parts:
        transport.write(part)
    assert not transport.is_closing()
    transport.close()
    assert transport.is_closing()
    assert recorder.written == [b"100 Continue", *written]
