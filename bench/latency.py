"""An open-loop load: orders at a fixed rate, whatever the answers do.

Latency counts from the moment a request should have been sent. A request that finds all connections busy waits here,
and that counts: a server that stalls cannot slow down the clock it is measured by.

`python -m bench.latency URL RATE WARMUP_SECONDS SECONDS KEYS_FILE` prints JSON; every order must be answered with 201.
"""

import asyncio
import gc
import json
import select
import selectors
import statistics
import sys
import uuid
from collections import deque
from pathlib import Path
from urllib.parse import urlsplit

CONNECTIONS = 64
FINISH_SECONDS_MAX = 10.0
BODY = b'{"currency":"EUR","amount":"0.05"}'


class Load:
    """The requests that are due, the connections that are free, and what came back."""

    def __init__(self, host: str, port: int, path: str) -> None:
        self.latencies: list[tuple[float, float]] = []  # when it should have been sent; seconds until the answer
        self.keys: list[str] = []
        self.free: deque[Connection] = deque()
        self.due: deque[float] = deque()
        self.unfinished = 0
        self.failure = ""
        self._head = f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n".encode()

    def request(self, key: str) -> bytes:
        return b"%bContent-Length: %d\r\nIdempotency-Key: %b\r\n\r\n%b" % (self._head, len(BODY), key.encode(), BODY)

    def send(self) -> None:
        """Sends what is due, as far as there are free connections."""
        while self.due and self.free:
            self.free.popleft().send(self.due.popleft())


class Connection(asyncio.Protocol):
    """One request after the other."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._read = b""
        self._due = 0.0
        self._key = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101  # TCP has no other
        self._transport = transport
        self._load.free.append(self)

    def send(self, due: float) -> None:
        self._due = due
        self._key = str(uuid.uuid4())
        self._transport.write(self._load.request(self._key))

    def data_received(self, data: bytes) -> None:
        self._read += data
        head, found, body = self._read.partition(b"\r\n\r\n")
        if not found:
            return
        _, _, after = head.lower().partition(b"content-length:")
        if len(body) < int(after.split(b"\r\n", 1)[0]):
            return
        now = self._loop.time()
        load = self._load
        if not head.startswith(b"HTTP/1.1 201 "):
            load.failure = self._read.decode(errors="replace")
        load.latencies.append((self._due, now - self._due))
        load.keys.append(self._key)
        load.unfinished -= 1
        self._read = b""
        load.free.append(self)
        load.send()

    def connection_lost(self, exc: Exception | None) -> None:
        self._load.failure = self._load.failure or f"a connection was closed: {exc}"


async def run(url: str, rate: int, warmup_seconds: float, seconds: float) -> tuple[Load, list[float]]:
    """Loads; returns the latencies in seconds of what was due after the warm-up, in order of size."""
    parts = urlsplit(url)
    host, port = parts.hostname or "127.0.0.1", parts.port or 80
    load = Load(host, port, parts.path)
    loop = asyncio.get_running_loop()
    for _ in range(CONNECTIONS):
        await loop.create_connection(lambda: Connection(load), host, port)
    count = int((warmup_seconds + seconds) * rate)
    load.unfinished = count
    gc.collect()
    gc.disable()  # our own pauses are not the server's
    start = loop.time() + 0.01
    sent = asyncio.Event()
    next_number = 0

    def tick() -> None:
        nonlocal next_number
        now = loop.time()
        while next_number < count and start + next_number / rate <= now:
            load.due.append(start + next_number / rate)
            next_number += 1
        load.send()
        if next_number < count and not load.failure:
            loop.call_at(start + next_number / rate, tick)
        else:
            sent.set()

    loop.call_at(start, tick)
    await sent.wait()
    async with asyncio.timeout(FINISH_SECONDS_MAX):
        while load.unfinished and not load.failure:  # noqa: ASYNC110  # an event would cost every answer
            await asyncio.sleep(0.01)
    measured = sorted(latency for due, latency in load.latencies if due >= start + warmup_seconds)
    return load, measured


class PreciseSelector(selectors.EpollSelector):
    """epoll rounds time-outs to milliseconds, which is as long as an order takes; select does not."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is not None and timeout > 0:
            select.select([self], [], [], timeout)
            timeout = 0
        return super().select(timeout)


def main() -> int:
    url, rate, warmup_seconds, seconds, keys_file = sys.argv[1:]

    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(PreciseSelector())) as runner:
        load, measured = runner.run(run(url, int(rate), float(warmup_seconds), float(seconds)))
    if load.failure:
        print(load.failure, file=sys.stderr)
        return 1
    Path(keys_file).write_text("\n".join(load.keys))
    hundredths = statistics.quantiles(measured, n=100)
    figures = {"p50_ms": hundredths[49], "p90_ms": hundredths[89], "p99_ms": hundredths[98], "max_ms": measured[-1]}
    print(json.dumps({name: seconds * 1000 for name, seconds in figures.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
