"""Attackers and buyers who share the connections that a proxy keeps to the desk: whose answer does a buyer get?

An attacker has a key, and sends requests of which one that reads them wrongly makes two; none of them is an order. A
buyer compares each answer with what he sent, and at the end the ledger holds the buyers' orders, each once.
"""

import asyncio
import contextlib
import itertools
import re
from collections.abc import Awaitable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import httpx2

HOST = "desk.example.org"
# Whoever takes one of these for granted stops reading the request as HTTP/1.1.
UPGRADES = (
    "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAAAAMAAAAAAAQBAAAAAAUAAEAA",
    "Connection: keep-alive, upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    "Connection: Upgrade\r\nUpgrade: TLS/1.0",
    "Connection: Upgrade\r\nUpgrade: whatever",
    "Upgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAAAAMAAAAAAAQBAAAAAAUAAEAA",
    "Connection: Upgrade",
)
# A proxy sends on so much at a time: what comes later reaches the desk in a segment of its own.
_SEGMENT_BYTES = 4096
_PAUSE_SECONDS = 0.02
_ANSWER_SECONDS_MAX = 0.5
_TRIES_MAX = 20
# The desk or the proxy says that it has no answer: the same request again, with the same key.
_NO_ANSWER = (502, 503, 504)


class Attack(NamedTuple):
    """What is sent, in parts with a pause between them."""

    name: str
    parts: tuple[bytes, ...]


def attacks(key: str, number: int) -> Iterator[Attack]:
    """Every form with every smuggled request."""
    order = (
        f"POST /place_order/?currency=usd&amount=666 HTTP/1.1\r\nHost: {HOST}\r\nIdempotency-Key: smuggled-{number}\r\n"
    )
    page = f"GET /get_orders/?page_size=1 HTTP/1.1\r\nHost: {HOST}\r\n"
    # The last two wait for what the next client sends, and give him their answer.
    for what, smuggled in (
        ("order", order + "\r\n"),
        ("half order", order + "X-Next: "),
        ("half read", page + "X-Next: "),
    ):
        for name, parts in itertools.chain(_upgrades(smuggled.encode()), _framings(smuggled.encode())):
            yield Attack(f"{name}: {what}", tuple(part.replace(b"KEY", key.encode()) for part in parts))


def _upgrades(smuggled: bytes) -> Iterator[tuple[str, tuple[bytes, ...]]]:
    blank = b"\r\n" * _SEGMENT_BYTES
    for method, upgrade in itertools.product(("POST", "GET", "CONNECT"), UPGRADES):
        told = upgrade.replace("\r\n", ", ")[:40]
        head = _head(method, upgrade, f"Content-Length: {len(smuggled)}")
        yield f"{method}, {told}", (head + smuggled,)
        yield f"{method}, {told}, body later", (head, smuggled)
        long = _head(method, upgrade, f"Content-Length: {len(blank) + len(smuggled)}")
        yield f"{method}, {told}, in segments", (long + blank, smuggled)
        chunks = b"%x\r\n%b\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(blank), blank, len(smuggled), smuggled)
        yield f"{method}, {told}, in chunks", (_head(method, upgrade, "Transfer-Encoding: chunked") + chunks,)
    yield "CONNECT to a host", (_head("CONNECT", target=f"{HOST}:80") + smuggled,)


def _framings(smuggled: bytes) -> Iterator[tuple[str, tuple[bytes, ...]]]:
    length = f"Content-Length: {len(smuggled) + 5}"
    for encoding in (
        "Transfer-Encoding: chunked",
        "Transfer-Encoding: xchunked",
        "Transfer-Encoding: chunked, identity",
        "Transfer-Encoding: identity\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding : chunked",
        "Transfer-Encoding:\x0bchunked",
        "Transfer-Encoding:\r\n chunked",
        "X: x\nTransfer-Encoding: chunked",
    ):
        yield f"a length and {encoding!r}", (_head("POST", encoding, length) + b"0\r\n\r\n" + smuggled,)
    for lengths in (
        f"Content-Length: 0\r\n{length}",
        f"{length}\r\nContent-Length: 0",
        f"Content-Length: 0, {len(smuggled)}",
        f"Content-Length: +{len(smuggled)}",
        f"Content-Length : {len(smuggled)}",
        f"X: x\nContent-Length: {len(smuggled)}",
        f"Content-Length:\r\n {len(smuggled)}",
        f"Expect: 100-continue\r\nContent-Length: {len(smuggled)}",
        f"Expect: 200-ok\r\nContent-Length: {len(smuggled)}",
        f"Connection: Content-Length\r\nContent-Length: {len(smuggled)}",
        f"Connection: Transfer-Encoding\r\nContent-Length: {len(smuggled)}",
    ):
        yield repr(lengths), (_head("POST", lengths) + smuggled,)
    chunked = _head("POST", "Transfer-Encoding: chunked", "TE: trailers", "Trailer: Idempotency-Key")
    yield "a trailer", (chunked + b"0\r\nContent-Length: 5\r\nIdempotency-Key: k\r\n\r\n" + smuggled,)
    yield "a chunk's extension with a bare LF", (chunked + b"5;a\nhello\r\n0\r\n\r\n" + smuggled,)
    yield "a chunk without its end", (chunked + b"5\r\nhello0\r\n\r\n" + smuggled,)
    yield "a chunk of 2^64 bytes", (chunked + b"10000000000000005\r\nhello\r\n0\r\n\r\n" + smuggled,)
    yield "HTTP/1.0 that is kept", (_head("POST", "Connection: keep-alive", version="1.0") + smuggled,)


def _head(method: str, *headers: str, target: str = "/place_order/", version: str = "1.1") -> bytes:
    every = (f"Host: {HOST}", "Authorization: Bearer KEY", "Content-Type: application/json", *headers)
    return "\r\n".join((f"{method} {target} HTTP/{version}", *every, "", "")).encode("latin-1")


@dataclass
class Outcome:
    """What came of it. `wrong` names each answer that was not the one to what was sent."""

    placed: dict[str, tuple[str, str]] = field(default_factory=dict)  # by key: currency and amount
    answers: int = 0
    without_answer: int = 0
    attacks: int = 0
    wrong: list[str] = field(default_factory=list)


async def play(port: int, keys: tuple[str, str], seconds: float, *, buyers: int = 8, attackers: int = 2) -> Outcome:
    """Buyers with the first key and attackers with the second one at the proxy's port, for so long."""
    outcome = Outcome()
    enough = asyncio.Event()
    numbers = itertools.count(1)
    async with asyncio.TaskGroup() as group:
        for each in range(attackers):
            group.create_task(_attack(port, keys[1], each, enough, outcome))
        for _ in range(buyers):
            group.create_task(_buy(port, keys[0], numbers, enough, outcome))
        await asyncio.sleep(seconds)
        enough.set()
    return outcome


async def _buy(port: int, key: str, numbers: Iterator[int], enough: asyncio.Event, outcome: Outcome) -> None:
    headers = {"Host": HOST, "Authorization": f"Bearer {key}"}
    async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=20) as client:
        while not enough.is_set():
            number = next(numbers)
            cents = 1 + number // 3 % 5000  # not so much that the cap is reached
            order = {"currency": ("EUR", "GBP", "USD")[number % 3], "amount": f"{cents // 100}.{cents % 100:02}"}
            own = {"Idempotency-Key": f"buyer-{number}", "X-Request-Id": f"buyer-{number}"}
            for _ in range(_TRIES_MAX):
                if number % 2:
                    sending = client.post("/place_order/", headers=own, params=order)
                else:
                    sending = client.post("/place_order/", headers=own, json=order)
                if await _is_placed(sending, number, order, outcome):
                    outcome.placed[f"buyer-{number}"] = (order["currency"], order["amount"])
                    break


async def _is_placed(sending: Awaitable[httpx2.Response], number: int, order: dict[str, str], outcome: Outcome) -> bool:
    """Whether the answer says that this order was placed. Counts it."""
    outcome.answers += 1
    try:
        answer = await sending
    except httpx2.TransportError:
        outcome.without_answer += 1
        return False
    if answer.status_code in _NO_ANSWER:
        outcome.without_answer += 1
        return False
    with contextlib.suppress(ValueError, KeyError, TypeError):
        told = answer.json()["order"]
        if (
            answer.status_code == 201
            and (told["client_order_id"], told["currency"], told["amount"])
            == (f"buyer-{number}", order["currency"], order["amount"])
            and answer.headers["X-Request-Id"] == f"buyer-{number}"
        ):
            return True
    outcome.wrong.append(f"buyer-{number}: {answer.status_code} {answer.text[:200]}")
    return False


async def _attack(port: int, key: str, attacker: int, enough: asyncio.Event, outcome: Outcome) -> None:
    """One attack after the other over one connection, as long as it is kept; each attacker from another one on."""
    for number in itertools.count(attacker, 2):
        each_kind = list(attacks(key, number))
        start = attacker * len(each_kind) // 2
        left = iter(each_kind[start:] + each_kind[:start])
        is_left = True
        while is_left:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            with contextlib.suppress(ConnectionError):
                is_left = await _attack_over(reader, writer, left, enough, outcome)
            writer.close()
        if enough.is_set():
            return


async def _attack_over(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    left: Iterator[Attack],
    enough: asyncio.Event,
    outcome: Outcome,
) -> bool:
    """Whether attacks are left when the connection is of no more use."""
    for attack in left:
        if enough.is_set():
            return False
        outcome.attacks += 1
        for part in attack.parts:
            writer.write(part)
            await asyncio.sleep(_PAUSE_SECONDS)
        got = b""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_ANSWER_SECONDS_MAX):
                while not re.search(rb"HTTP/1\.1 (?!100)", got):
                    more = await reader.read(65536)
                    if not more:
                        break
                    got += more
        # None of these is an order or may be read, so nothing was to be had.
        if re.search(rb"HTTP/1\.1 (2..|101)", got) or b"buyer-" in got:
            outcome.wrong.append(f"attacker, {attack.name}: {got[:300]!r}")
        if not got or re.search(rb"(?i)\r\nconnection: close\r\n", got) or reader.at_eof():
            return True
    return False


async def stored(reader: httpx2.AsyncClient) -> list[tuple[str, str, str]]:
    """Key, currency and amount of each order, as fetch_buy_orders tells."""
    orders: list[tuple[str, str, str]] = []
    following: dict[str, str] | None = {"href": "/get_orders/?page_size=1000"}
    while following is not None:
        page = (await reader.get(following["href"])).json()
        orders += [(each["client_order_id"] or "", each["currency"], each["amount"]) for each in page["data"]]
        following = page["_links"].get("next")
    return orders
