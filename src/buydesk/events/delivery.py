"""Delivery of events to clients' endpoints: at least once, each endpoint's in order and one at a time.

The ledger says which events there are, and an endpoint's cursor which of them it has got. Replicas share endpoints by
leases, each for a turn that is short: so one that is slow, or one with many events, has others wait for a moment only,
and one that fails waits by itself. docs/decisions/0029 says more.
"""

import asyncio
import contextlib
import logging
import random
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from buydesk.errors import DeskError, WebhookBusy
from buydesk.events.documents import EventDocument, client_event, message_of
from buydesk.events.model import TEST_TYPE, Delivery, Disabled, Outcome, Totals, Turn, Webhook, WebhookStore
from buydesk.events.signing import WebhookKeys
from buydesk.orders.life import OrderLife
from buydesk.times import CLOCK, Clock, parse_time

logger = logging.getLogger("buydesk.services.process_buy_orders")

# After these times an event that failed is sent again (Standard Webhooks 1.0, "Deliverability and reliability"): ten
# attempts in some three days. Then the endpoint is disabled.
RETRY_SECONDS = (5, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400)
# Up to this share more, so that endpoints that failed together do not come back together.
JITTER = 0.2
RETRY_AFTER_SECONDS_MAX = 86_400
# How often it is asked whether there are new events, where there are endpoints, and whose turn it is in any case.
LOOK_SECONDS = 0.25
LOOK_AT_ALL_SECONDS = 2.0
LEASE_SECONDS = 10.0
RENEW_SECONDS = 3.0
# Endpoints that one replica asks at a time: most wait for somebody else's answer.
TURNS_AT_ONCE_MAX = 100
# A turn ends after this time, or with the events that were there; what was delivered is stored at least once a second.
TURN_SECONDS = 5.0
REPORT_SECONDS = 1.0
REPORT_PAUSE_SECONDS = 0.5
EVENTS_AT_ONCE = 50
# Of all the connections to the ledger this many are for deliveries: buyers and readers come first.
LEDGER_CALLS_AT_ONCE = 2
# Orders come first: in a process that has other things to do as well, so that its loop takes longer than this to come
# round, a turn waits between two events for so many times as long as that took.
BUSY_SECONDS = 0.0005
YIELDED_TIMES = 20
YIELDED_SECONDS_MAX = 0.5
# What is being delivered when the service has ended otherwise may be finished in this time.
END_SECONDS = 2.0

_GONE = 410
_WAIT_STATUSES = (429, 503)


class Answer(NamedTuple):
    """What came of a message: `status` is the endpoint's, if it gave one, and so is `retry_after_seconds`."""

    outcome: Outcome
    status: int | None = None
    retry_after_seconds: int | None = None


class Sender(Protocol):
    """The way out to endpoints."""

    async def send(self, client: str, url: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """Posts a message of the client's; raises nothing, whatever the endpoint does, and takes no longer than it
        may."""
        ...

    async def close(self) -> None: ...


@dataclass(eq=False)
class _Turn:
    """A turn of an endpoint that this replica holds by a lease until `valid_until`, on the monotonic clock."""

    hook: Webhook
    lease: uuid.UUID
    valid_until: float
    delivered: int
    failures: int
    attempts: list[Delivery] = field(default_factory=list)
    due_seconds: float = 0.0
    disabled: Disabled | None = None
    is_lost: bool = False


class DeliveryMetrics(Collector):
    """Counts deliveries, for Prometheus, and says how endpoints were when it was last looked."""

    _SECONDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0, 600.0, 3600.0, 86_400.0)

    def __init__(self) -> None:
        self.totals = Totals(0, 0, 0, 0)
        self._outcomes: Counter[str] = Counter()
        self._lags: Counter[float] = Counter()
        self._lag_sum = 0.0

    def count(self, outcome: Outcome) -> None:
        """Counts an attempt."""
        self._outcomes[outcome] += 1

    def note_lag(self, seconds: float) -> None:
        """Takes note of how long after it happened an event was delivered."""
        self._lags[next((bound for bound in self._SECONDS if seconds <= bound), float("inf"))] += 1
        self._lag_sum += seconds

    def collect(self) -> Iterator[Metric]:
        """What prometheus_client asks for at every scrape."""
        deliveries = CounterMetricFamily(
            "buydesk_webhook_deliveries", "Attempts to deliver an event, by what came of them.", labels=["outcome"]
        )
        for outcome, count in self._outcomes.items():
            deliveries.add_metric([outcome], count)
        yield deliveries
        total, buckets = 0, []
        for bound in (*self._SECONDS, float("inf")):
            total += self._lags[bound]
            buckets.append(("+Inf" if bound == float("inf") else str(bound), float(total)))
        lag = HistogramMetricFamily("buydesk_webhook_lag_seconds", "From an event until it was delivered.")
        lag.add_metric([], buckets, self._lag_sum)
        yield lag
        for name, value, about in (
            ("enabled", self.totals.enabled, "Endpoints that are enabled."),
            ("failing", self.totals.failing, "Of these, those that are being retried."),
            ("without_key", self.totals.without_key, "Of these, those whose secret is of a key that is not here."),
        ):
            yield GaugeMetricFamily(f"buydesk_webhooks_{name}", about, value)
        about = "Events that endpoints which do not fail have not got yet."
        yield GaugeMetricFamily("buydesk_webhook_events_waiting", about, self.totals.waiting)


class Deliverer:
    """Delivers to endpoints as long as it is `running`; `retry_seconds` are for tests."""

    def __init__(
        self,
        store: WebhookStore,
        life: OrderLife,
        sender: Sender,
        keys: WebhookKeys,
        *,
        retry_seconds: Sequence[float] = RETRY_SECONDS,
        clock: Clock = CLOCK,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.metrics = DeliveryMetrics()
        self._store = store
        self._life = life
        self._sender = sender
        self._keys = keys
        self._retry_seconds = retry_seconds
        self._clock = clock
        self._chance = chance
        self._turns: dict[uuid.UUID, tuple[_Turn, asyncio.Task[None]]] = {}
        self._sending: set[uuid.UUID] = set()  # endpoints, beside their turns
        self._ledger_calls = asyncio.Semaphore(LEDGER_CALLS_AT_ONCE)
        self._stopping = asyncio.Event()
        self._is_wanted = asyncio.Event()  # a look at once
        self._last_event = -1
        self._looked_at_all = float("-inf")

    @asynccontextmanager
    async def running(self, stopping: asyncio.Event | None = None) -> AsyncIterator[None]:
        """While entered, it delivers. From `stopping` on, or leaving, it begins nothing new; leaving gives what is
        under way a moment to end."""
        self._stopping = stopping or self._stopping
        loops = [asyncio.create_task(self._look_forever()), asyncio.create_task(self._renew_forever())]
        try:
            yield
        finally:
            self._stopping.set()
            for task in loops:
                task.cancel()
            await asyncio.gather(*loops, return_exceptions=True)
            if turns := [task for _, task in self._turns.values()]:
                await asyncio.wait(turns, timeout=END_SECONDS)
            for task in turns:
                task.cancel()
            await asyncio.gather(*turns, return_exceptions=True)

    async def send(self, hook: Webhook, document: EventDocument | None, message: str, body: bytes) -> Delivery:
        """Sends one message to an endpoint, beside its turns, and notes the attempt: an event, or a test. Raises
        WebhookBusy while another such one is under way: whoever waits for a silent endpoint holds what others need."""
        if hook.id in self._sending:
            raise WebhookBusy("Another message that was asked for is on its way to this webhook: wait for its answer.")
        self._sending.add(hook.id)
        try:
            delivery, _ = await self._attempt(hook, document, message, body, attempt=1)
        finally:
            self._sending.remove(hook.id)
        await self._store.note_delivery(hook.id, delivery)
        return delivery

    async def _look_forever(self) -> None:
        failed = False
        while True:
            try:
                await self._look()
                failed = False
            except DeskError as error:
                if not failed:
                    logger.info("webhooks wait for the ledger: %s", error.for_operators)
                failed = True
            except Exception:
                logger.exception("webhooks cannot be looked at")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_AT_ALL_SECONDS if failed else LOOK_SECONDS):
                    await self._is_wanted.wait()
            self._is_wanted.clear()

    async def _look(self) -> None:
        """Takes up the endpoints whose turn it is, when something may have come for one."""
        if len(self._turns) >= TURNS_AT_ONCE_MAX or self._stopping.is_set():
            return
        now = time.monotonic()
        is_due = now - self._looked_at_all >= LOOK_AT_ALL_SECONDS
        if not is_due and not self.metrics.totals.enabled:
            return
        if not is_due:
            # One row of the ledger says whether anything happened at all.
            async with self._ledger_calls:
                last = (await self._life.last_events([]))[None]
            if last == self._last_event:
                return
            self._last_event = last
        free = TURNS_AT_ONCE_MAX - len(self._turns)
        async with self._ledger_calls:
            if is_due:
                self.metrics.totals = await self._store.totals(self._keys.fingerprints)
                self._looked_at_all = now
            asked_at, lease = time.monotonic(), uuid.uuid4()
            hooks = await self._store.take(lease, self._keys.fingerprints, free, LEASE_SECONDS)
        for hook in hooks:
            if hook.id in self._turns:  # whose lease ended here unnoticed: that turn ends, and this lease by itself
                self._turns[hook.id][0].is_lost = True
                continue
            turn = _Turn(hook, lease, asked_at + LEASE_SECONDS, hook.delivered, hook.failures)
            task = asyncio.create_task(self._run(turn))
            self._turns[hook.id] = turn, task

    async def _renew_forever(self) -> None:
        while True:
            await asyncio.sleep(RENEW_SECONDS)
            # Only of turns that go on: a lease without one has to end by itself.
            turns = [turn for turn, _ in self._turns.values() if not turn.is_lost]
            if not turns:
                continue
            asked_at = time.monotonic()
            try:
                held = await self._store.renew({turn.hook.id: turn.lease for turn in turns}, LEASE_SECONDS)
            except DeskError as error:
                logger.info("leases of webhooks cannot be renewed: %s", error.for_operators)
                continue
            except Exception:
                logger.exception("leases of webhooks cannot be renewed")
                continue
            for turn in turns:
                turn.is_lost = turn.is_lost or turn.hook.id not in held
                turn.valid_until = asked_at + LEASE_SECONDS

    async def _run(self, turn: _Turn) -> None:
        """A turn, to its end; nobody hears of what goes wrong but the log."""
        has_more = False
        try:
            has_more = await self._deliver(turn)
        except DeskError as error:
            # Its lease ends by itself; what was delivered and not stored is delivered again.
            logger.info("a turn of the webhook %s broke off: %s", turn.hook.id, error.for_operators)
        except Exception:
            logger.exception("a turn of the webhook %s failed", turn.hook.id)
        finally:
            if has_more or len(self._turns) >= TURNS_AT_ONCE_MAX:
                self._is_wanted.set()
            del self._turns[turn.hook.id]
            # While it lasted a look may have passed over this endpoint for being leased.
            self._last_event = -1

    async def _deliver(self, turn: _Turn) -> bool:
        """Delivers for a turn, and stores what came of it. Whether there is more to deliver at once."""
        reported_at = time.monotonic()
        ends_at = reported_at + TURN_SECONDS
        while True:
            async with self._ledger_calls:
                events = await self._life.events(turn.hook.client, turn.delivered, EVENTS_AT_ONCE)
            for left, event in enumerate(events, 1 - len(events)):
                await self._let_others_go_first()
                if not await self._advance(turn, client_event(event)):
                    await self._report(turn, keep=False)
                    return False
                now = time.monotonic()
                is_over = now >= ends_at or self._stopping.is_set()
                has_all = left == 0 and len(events) < EVENTS_AT_ONCE
                if is_over or left == 0 or now - reported_at >= REPORT_SECONDS:
                    reported_at = now
                    if not await self._report(turn, keep=not (is_over or has_all)) or is_over or has_all:
                        return is_over and not has_all
            if not events:
                await self._report(turn, keep=False)
                return False

    async def _let_others_go_first(self) -> None:
        started = time.monotonic()
        await asyncio.sleep(0)
        if (seconds := time.monotonic() - started) > BUSY_SECONDS:
            await asyncio.sleep(min(YIELDED_TIMES * seconds, YIELDED_SECONDS_MAX))

    async def _advance(self, turn: _Turn, document: EventDocument) -> bool:
        """Delivers an event, if the endpoint wants it; whether the next one may follow."""
        if document.type not in turn.hook.events:
            turn.delivered, turn.failures = document.sequence, 0
            return True
        if turn.is_lost or time.monotonic() >= turn.valid_until:
            return False
        body = message_of(document)
        delivery, answer = await self._attempt(turn.hook, document, document.id, body, attempt=turn.failures + 1)
        turn.attempts.append(delivery)
        if answer.outcome == "delivered":
            turn.delivered, turn.failures = document.sequence, 0
            self.metrics.note_lag(max((self._clock.now() - parse_time(document.created_at)).total_seconds(), 0.0))
            return True
        self._put_off(turn, answer)
        return False

    def _put_off(self, turn: _Turn, answer: Answer) -> None:
        """Says when an event that failed is due again, or that the endpoint is not asked any more."""
        turn.failures += 1
        if answer.status == _GONE:
            turn.disabled = "gone"
        elif turn.failures > len(self._retry_seconds):
            turn.disabled = "failing"
        if turn.disabled is not None:
            logger.info("the webhook %s of %s is disabled: %s", turn.hook.id, turn.hook.client, turn.disabled)
            return
        seconds = float(self._retry_seconds[turn.failures - 1])
        if answer.status in _WAIT_STATUSES and answer.retry_after_seconds is not None:
            seconds = max(seconds, min(answer.retry_after_seconds, RETRY_AFTER_SECONDS_MAX))
        turn.due_seconds = seconds * (1 + JITTER * self._chance())

    async def _attempt(
        self, hook: Webhook, document: EventDocument | None, message: str, body: bytes, *, attempt: int
    ) -> tuple[Delivery, Answer]:
        at, started = self._clock.now(), time.monotonic()
        headers = self._keys.headers(hook.id, hook.secrets, message, at, body)
        answer = await self._sender.send(hook.client, hook.url, headers, body)
        self.metrics.count(answer.outcome)
        milliseconds = round((time.monotonic() - started) * 1000)
        kind, sequence = (TEST_TYPE, None) if document is None else (document.type, document.sequence)
        delivery = Delivery(message, kind, sequence, at, attempt, answer.outcome, answer.status, milliseconds)
        return delivery, answer

    async def _report(self, turn: _Turn, *, keep: bool) -> bool:
        """Stores what came of a turn so far, whether the endpoint is still this replica's; tries again for as long as
        it certainly is. Raises what the store raises then."""
        told = Turn(
            *(turn.hook.id, turn.delivered, turn.failures, turn.due_seconds, turn.disabled), keep, turn.attempts
        )
        while not turn.is_lost:
            try:
                async with self._ledger_calls:
                    turn.is_lost = not await self._store.report(turn.lease, told, LEASE_SECONDS)
            except DeskError:
                if time.monotonic() + REPORT_PAUSE_SECONDS >= turn.valid_until:
                    raise
                await self._clock.sleep(REPORT_PAUSE_SECONDS)
            else:
                turn.attempts = []
                return not turn.is_lost
        return False
