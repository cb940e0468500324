"""Thousands of connections that send requests and what chance made of them. RAW_INPUTS says how many, RAW_SEED which;
without a seed each run has its own, which is printed."""

import asyncio
import contextlib
import os
import random
import re
import sys
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from itertools import count
from zlib import crc32

import psutil
import pytest

from buydesk.http.requests import Request
from tests.logged import logged
from tests.raw import Echo, RawResponse, echo_of, raw, settings

INPUTS = int(os.environ.get("RAW_INPUTS", "2000"))
SEED = int(os.environ.get("RAW_SEED", random.randrange(2**32)))  # noqa: S311
AT_ONCE = 100
LINUX = sys.platform == "linux"
# What the process may grow by, whatever the number of inputs.
GROWTH_BYTES_MAX = 64 * 2**20
STATUSES = {100, 200, 400, 403, 404, 405, 408, 413, 414, 431}
MARK = re.compile(r"n([0-9]{9})([0-9a-f]{8})z")

LINES = (
    b"POST /echo HTTP/1.1|GET /echo HTTP/1.1|POST /echo?a=1 HTTP/1.1|POST http://desk/echo HTTP/1.1|PUT /echo HTTP/1.1|"
    b"GET /nowhere HTTP/1.1|POST /echo HTTP/1.0|OPTIONS * HTTP/1.1|CONNECT desk:80 HTTP/1.1|GET /readyz HTTP/1.1"
).split(b"|")
FIELDS = (
    b"Connection: close|Connection: Upgrade|Connection: keep-alive|Upgrade: h2c|Upgrade: websocket|TE: trailers|"
    b"Expect: 100-continue|Trailer: X-Id|Origin: null|Content-Type: application/json|Content-Length: 0|"
    b"Content-Length: 5|Transfer-Encoding: chunked|Transfer-Encoding: identity|Authorization: Bearer x|Host: desk|"
    b"Host: evil.example|X: y\r\n z|X: \xff|" + b"a:b\r\n" * 99 + b"a:b"
).split(b"|")
# What mutations put in.
SCRAPS = (
    b"\r\n|\n|\r|\r\n\r\n| |\t|\x00|\x0b|\x7f|\xff|:|,|;|0|0x|0\r\n\r\n|+|-1|chunked|Transfer-Encoding: chunked\r\n|"
    b"Content-Length: 3\r\n|HTTP/1.1|ffffffffffffffff|18446744073709551616|\r\nGET /echo |"
    b"Upgrade: h2c\r\n| HTTP/1.0|%00|*"
).split(b"|")


def marks_in(text: str) -> set[str]:
    """Those that were made, and not mutated."""
    return {found[0] for found in MARK.finditer(text) if f"{crc32(found[1].encode()):08x}" == found[2]}


class Inputs:
    """Makes inputs, each with a mark that no other has."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)  # noqa: S311
        self._number = count()

    def mark(self) -> str:
        number = f"{next(self._number):09}"
        return f"n{number}{crc32(number.encode()):08x}z"

    def address(self) -> str:
        """For one connection only, so that its port is nobody else's as soon as it has ended (Linux has them all)."""
        number = next(self._number)
        return f"127.{1 + (number >> 16) % 250}.{number >> 8 & 255}.{number & 255}" if LINUX else "127.0.0.1"

    def input(self, mark: str) -> list[bytes]:
        """The segments of one."""
        chance = self._random
        sent = b"".join(self._request(mark) for _ in range(chance.choice((1, 1, 1, 2, 3))))
        for _ in range(chance.choice((0, 1, 1, 1, 2, 3, 8))):
            sent = self._mutated(sent)
        cuts = sorted(chance.randrange(len(sent) + 1) for _ in range(chance.choice((0, 0, 0, 1, 2))))
        return [sent[start:end] for start, end in zip([0, *cuts], [*cuts, len(sent)], strict=True)]

    def _request(self, mark: str) -> bytes:
        chance = self._random
        body = mark.encode() * chance.choice((1, 1, 2, 40))
        fields = [b"Host: desk", b"X-Id: " + mark.encode()]
        fields += chance.choices(FIELDS, k=chance.choice((0, 0, 1, 2, 4)))
        framing = chance.randrange(4)
        if framing == 0:
            fields.append(b"Content-Length: %d" % len(body))
        elif framing == 1:
            fields.append(b"Transfer-Encoding: chunked")
            size = chance.randrange(1, len(body) + 1)
            parts = [body[at : at + size] for at in range(0, len(body), size)]
            extension = chance.choice((b"", b"", b";a=b", b' ;a="b"'))
            body = b"".join(b"%x%s\r\n%s\r\n" % (len(part), extension, part) for part in parts) + b"0\r\n"
            body += chance.choice((b"", b"", b"X-Id: trailer\r\n")) + b"\r\n"
        elif framing == 2:
            body = b""
        chance.shuffle(fields)
        return b"\r\n".join([chance.choice(LINES), *fields, b"", body])

    def _mutated(self, sent: bytes) -> bytes:
        chance = self._random
        at = chance.randrange(len(sent) + 1)
        end = min(len(sent), at + chance.choice((1, 1, 2, 8, 50)))
        scrap = chance.choice(SCRAPS)
        return [
            sent[:at] + scrap + sent[at:],
            sent[:at] + scrap + sent[end:],
            sent[:at] + sent[end:],
            sent[:at] + sent[at:end] * 2 + sent[end:],
            sent[:at] + bytes([chance.randrange(256)]) + sent[at + 1 :],
            sent[:at] + sent[at:end].swapcase() + sent[end:],
            sent[:at],
        ][chance.randrange(7)] or b"\r\n"


class ByClient(Echo):
    """Keeps what reached it by the connection that it came on."""

    def __init__(self) -> None:
        super().__init__()
        self.by_client: defaultdict[str, list[tuple[str | None, str]]] = defaultdict(list)

    def keep(self, request: Request, body: bytes) -> None:
        # No service asks for it.
        client = request._incoming._connection._transport.get_extra_info("peername")
        self.by_client["{}:{}".format(*client)].append((request.headers.get("x-id"), body.decode("latin-1")))


@pytest.fixture(scope="module")
async def echo() -> AsyncIterator[ByClient]:
    # What waits for more of an input does so for this long.
    async with echo_of(settings(idle_seconds_max=3, request_seconds_max=1), ByClient()) as echo:
        yield echo


async def exchange(echo: ByClient, inputs: Inputs) -> list[int]:
    """Sends one input and, on the same connection and on a fresh one, a request that must be answered as itself; the
    statuses of the answers."""
    mark, probe = inputs.mark(), inputs.mark()
    segments = inputs.input(mark)
    well_formed = f"POST /echo HTTP/1.1\r\nHost: desk\r\nX-Id: {probe}\r\nContent-Length: 19\r\n\r\n{probe}".encode()
    async with raw(echo.port, inputs.address()) as line, asyncio.timeout(60):
        with contextlib.suppress(ConnectionError):  # the server ends what it cannot read
            await line.send(*segments)
        async with raw(echo.port) as other:
            await other.send(well_formed)
            answer = await other.answer()
        assert (answer.status, answer.json) == (200, {"id": probe, "body": probe})
        assert echo.by_client.pop(other.client) == [(probe, probe)]
        with contextlib.suppress(ConnectionError):
            await line.send(well_formed)
        answers = await line.answers(last=b'"id":"%s","body":"%s"' % (probe.encode(), probe.encode()))
    reached = echo.by_client.pop(line.client, [])
    check(b"".join(segments) + well_formed, answers, reached)
    assert {found for each in reached for text in each for found in marks_in(text or "")} <= {mark, probe}
    return [each.status for each in answers]


def check(sent: bytes, answers: list[RawResponse], reached: list[tuple[str | None, str]]) -> None:
    """Each answer is the one to its request, and there are no more requests than were sent."""
    assert {each.status for each in answers} <= STATUSES
    echoed = [each.json for each in answers if each.status == 200 and b'"body"' in each.body]
    # An answer may be cut off by the end of a connection that goes on with nonsense.
    assert [(each["id"], each["body"]) for each in echoed] == reached[: len(echoed)]
    assert len(reached) <= len(re.findall(rb"HTTP/1\.[01]", sent))


@pytest.mark.timeout(120 + INPUTS / 50)
async def test_whatever_is_sent_every_answer_is_that_to_its_request(echo: ByClient) -> None:
    """The server lives, nothing is logged as wrong, and memory stays bounded."""
    print(f"RAW_SEED={SEED}")  # noqa: T201  # which pytest shows when the test fails
    inputs = Inputs(SEED)
    statuses: Counter[int] = Counter()
    remaining = iter(range(INPUTS))
    sizes = []

    async def send() -> None:
        for number in remaining:
            statuses.update(await exchange(echo, inputs))
            if number % (INPUTS // 4 or 1) == 0:
                sizes.append(psutil.Process().memory_info().rss)

    with logged("") as lines:
        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(send())
    sizes.append(psutil.Process().memory_info().rss)
    assert [line for line in lines if line["level"] not in ("INFO", "DEBUG")] == []
    assert {200, 400, 404, 405} <= set(statuses)  # it is no generator of nonsense only, nor of good requests only
    assert sizes[-1] - min(sizes[1:]) < GROWTH_BYTES_MAX
