"""Webhooks while what delivers them is killed: each endpoint gets every event, in order, as the sequences prove.

Retries would take days: the moments at which they are due are moved into the past, faster than the clock goes.
"""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import signal
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import aiohttp
import psutil
from aiohttp import web

from bench.desk import Desk, desk_up
from buydesk.embedded.data_dir import secret_file
from buydesk.embedded.postgres import processes_on
from chaos.journal import Journal
from chaos.plans import Plan, Verdict

ORDERS_PER_ROUND = 1000
PLACED_AT_ONCE = 20
SLOW_SECONDS = 0.005
# An endpoint that fails half the time takes messages for so long, and then refuses so many: chance alone would have it
# fail ten times in a row now and then, and be disabled as it ought to be.
UP_SECONDS = 1.0
REFUSED_IN_A_ROW = 3
DEAD_SECONDS = 3600  # by the clock that retries go by here
STEP_SECONDS = 0.05
MINUTES_A_SECOND = 60
BETWEEN_KILLS_SECONDS = 6.0
ALL_DELIVERED_SECONDS_MAX = 1800.0  # after all was placed and settled
VICTIMS = ("process_buy_orders", "db_proxy", "postgres")


@dataclass
class Receiver:
    """An endpoint: `is_up` says whether it answers 204 or 500. `taken` are the sequences that it took, as they came."""

    name: str
    is_up: Callable[[], bool]
    pause_seconds: float = 0.0
    secret: str = ""
    taken: list[int] = field(default_factory=list)
    refused: int = 0
    wrong: list[str] = field(default_factory=list)
    documents: dict[int, Any] = field(default_factory=dict)
    at_once: int = 0

    async def handle(self, request: web.Request) -> web.Response:
        body = await request.read()
        self.at_once += 1
        if self.at_once > 1:
            self.wrong.append(f"{self.name} was sent two messages at once")
        try:
            await asyncio.sleep(self.pause_seconds)
            if not self.is_up():
                self.refused += 1
                return web.Response(status=500)
            self._take(request.headers, body)
            return web.Response(status=204)
        finally:
            self.at_once -= 1

    def _take(self, headers: Mapping[str, str], body: bytes) -> None:
        """Verifies as Standard Webhooks 1.0 says, and keeps the event."""
        key = base64.b64decode(self.secret.removeprefix("whsec_"))
        signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
        expected = "v1," + base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()
        if headers["webhook-signature"] != expected:
            self.wrong.append(f"{self.name} got a signature that is none")
        event = json.loads(body)["data"]
        if event["sequence"] > max(self.taken, default=0) + 1:
            self.wrong.append(f"{self.name} got {event['sequence']} after {max(self.taken, default=0)}")
        if self.documents.setdefault(event["sequence"], event) != event:
            self.wrong.append(f"{self.name} got two events with the number {event['sequence']}")
        self.taken.append(event["sequence"])


class Half:
    """Whether the endpoint that fails half the time is up."""

    def __init__(self) -> None:
        self._up_until: float | None = None  # none until it is asked again
        self._refused = 0

    def __call__(self) -> bool:
        if self._up_until is None:
            self._up_until = time.monotonic() + UP_SECONDS
        if time.monotonic() < self._up_until:
            return True
        self._refused += 1
        if self._refused == REFUSED_IN_A_ROW:
            self._refused, self._up_until = 0, None
        return False


@dataclass
class Clock:
    """The clock that retries go by."""

    seconds: float = 0.0

    async def run(self, desk: Desk) -> None:
        """Moves it on and, with it, the moments at which endpoints are due."""
        step = timedelta(seconds=STEP_SECONDS * 60 * MINUTES_A_SECOND)
        while True:
            with contextlib.suppress(Exception):  # of any kind: a driver's whose server is killed
                async with desk.database() as database:
                    while True:
                        await database.execute(
                            "UPDATE webhooks SET due_at = due_at - $1::interval WHERE due_at > clock_timestamp()", step
                        )
                        self.seconds += step.total_seconds()
                        await asyncio.sleep(STEP_SECONDS)
            await asyncio.sleep(STEP_SECONDS)


class Dead:
    """Whether the endpoint that is dead for an hour, from when it is asked first, is up."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._since: float | None = None

    def __call__(self) -> bool:
        if self._since is None:
            self._since = self._clock.seconds
        return self._clock.seconds - self._since > DEAD_SECONDS


async def webhooks(plan: Plan) -> Verdict:
    """Endpoints that are slow, fail or are dead for an hour get all events, while what delivers is killed in turn."""
    return await deliver_all(plan, plan.rounds * ORDERS_PER_ROUND)


async def deliver_all(plan: Plan, orders: int) -> Verdict:
    """The same with so many orders, each of which is placed and settled."""
    verdict, clock = Verdict(), Clock()
    receivers = [Receiver("slow", lambda: True, SLOW_SECONDS), Receiver("half", Half()), Receiver("dead", Dead(clock))]
    async with desk_up(plan.directory / "desk", "--separate") as desk, aiohttp.ClientSession() as session:
        with plan.journal() as journal:
            async with _served(receivers) as urls:
                hooks = [await _created(desk, session, each, url) for each, url in zip(receivers, urls, strict=True)]
                running = [asyncio.create_task(clock.run(desk)), asyncio.create_task(_kill_in_turn(desk, journal))]
                started = time.monotonic()
                await _trade(desk, session, orders)
                last = await _all_delivered(desk, session, hooks, verdict)
                verdict.seen["seconds"] = round(time.monotonic() - started)
                for task in running:
                    task.cancel()
                await asyncio.gather(*running, return_exceptions=True)
                listed = await _events(desk, session, hooks[0]["delivered_up_to"], last)
        kills = sum("SIGKILL" in line for line in plan.journal_path.read_text().splitlines())
    verdict.seen |= {"events": len(listed), "kills": kills}
    for receiver in receivers:
        verdict.wrong += receiver.wrong
        verdict.seen[f"{receiver.name}: taken, refused"] = f"{len(receiver.taken)}, {receiver.refused}"
        if receiver.documents != listed:
            missing = sorted(listed.keys() - receiver.documents.keys())[:5]
            verdict.wrong.append(f"{receiver.name} has not got what was told, {missing} among others")
        if receiver.name != "slow" and not receiver.refused:
            verdict.wrong.append(f"{receiver.name} never failed")
    return verdict


@contextlib.asynccontextmanager
async def _served(receivers: list[Receiver]) -> AsyncIterator[list[str]]:
    app = web.Application()
    for each in receivers:
        app.router.add_post(f"/{each.name}", each.handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    port = runner.addresses[0][1]
    try:
        yield [f"http://127.0.0.1:{port}/{each.name}" for each in receivers]
    finally:
        await runner.cleanup()


async def _created(desk: Desk, session: aiohttp.ClientSession, receiver: Receiver, url: str) -> Any:
    await _asked(session, "GET", f"{desk.url('process_buy_orders')}/readyz")
    async with session.post(f"{desk.url('process_buy_orders')}/webhooks", json={"url": url}) as response:
        hook = await response.json()
        receiver.secret = hook["secret"]
        receiver.taken.append(hook["delivered_up_to"])
        return hook


async def _asked(session: aiohttp.ClientSession, method: str, url: str, **what: Any) -> Any:
    """What a service answers, once it does: everything here may be asked twice."""
    while True:
        with contextlib.suppress(aiohttp.ClientError, TimeoutError, ValueError):
            async with session.request(method, url, timeout=aiohttp.ClientTimeout(total=15), **what) as response:
                if response.status < 500:
                    response.raise_for_status()
                    return await response.json()
        await asyncio.sleep(0.2)


async def _trade(desk: Desk, session: aiohttp.ClientSession, orders: int) -> None:
    """Places and settles orders."""
    token = secret_file(desk.data_dir, "processing_tokens").read_text().strip()
    numbers = iter(range(orders))

    async def buyer() -> None:
        for number in numbers:
            key = {"Idempotency-Key": f"webhooks-{number}"}
            body = {"currency": "EUR", "amount": "0.05"}
            placed = await _asked(session, "POST", desk.orders_url, json=body, headers=key)
            settle = f"{desk.url('process_buy_orders')}/orders/{placed['order']['id']}/settle"
            await _asked(session, "POST", settle, json={}, headers={"Authorization": f"Bearer {token}"})

    await asyncio.gather(*(buyer() for _ in range(PLACED_AT_ONCE)))


async def _all_delivered(desk: Desk, session: aiohttp.ClientSession, hooks: list[Any], verdict: Verdict) -> int:
    """Waits until every endpoint has got all; the number of the last event."""
    base, started = desk.url("process_buy_orders"), time.monotonic()
    async with desk.database() as database:
        last: int = await database.fetchval("SELECT last_number + last_closing FROM clients WHERE name = 'anonymous'")
    while time.monotonic() - started < ALL_DELIVERED_SECONDS_MAX:
        found = [await _asked(session, "GET", f"{base}/webhooks/{each['id']}") for each in hooks]
        if disabled := [each["url"] for each in found if not each["enabled"]]:
            verdict.wrong.append(f"disabled: {disabled}")
            return last
        if all(each["delivered_up_to"] == last for each in found):
            return last
        await asyncio.sleep(0.5)
    verdict.wrong.append(f"not delivered: {[each['delivered_up_to'] for each in found]} of {last}")
    return last


async def _events(desk: Desk, session: aiohttp.ClientSession, after: int, last: int) -> dict[int, Any]:
    """The events as the list has them, by their numbers."""
    told: dict[int, Any] = {}
    while after < last:
        page = await _asked(session, "GET", f"{desk.url('process_buy_orders')}/events?after={after}&limit=1000")
        told |= {each["sequence"]: each for each in page["data"]}
        after = page["next_after"]
    return told


async def _kill_in_turn(desk: Desk, journal: Journal) -> None:
    while True:
        for victim in VICTIMS:
            await asyncio.sleep(BETWEEN_KILLS_SECONDS)
            found = (
                processes_on(desk.data_dir / "postgres") if victim == "postgres" else desk.processes().get(victim, [])
            )
            journal.fault(f"SIGKILL of {victim}: {len(found)} processes")
            for each in found:
                with contextlib.suppress(psutil.Error):
                    each.send_signal(signal.SIGKILL)
