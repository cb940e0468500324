"""Batches, not hops: orders that arrive while a batch is under way form the next batch. No timers.

create_buy_order sends its batches to the ledger (db_proxy, when that runs elsewhere), db_proxy sends its own to
PostgreSQL: both by `OrderBatcher`. One batch is under way at a time. A batch whose outcome is unknown is sent again,
the same items with the same ids and prices, until their time is up. Which answer proves what is in
docs/decisions/0016, and here in `_send_until_known` and `_resolve`.

A ledger that is too slow for its orders gets no more of them than it can answer: an order that has waited so long that
its outcome might not be known in time is refused instead of sent, and a batch is no larger than the ledger settles in
half of the time that it may take.

A batch is a request with an id of its own, which travels on with it (docs/decisions/0013). Where an order's answer is
lost, or the ledger has a fault with it, what is logged names the order, its request and its batch.
"""

import asyncio
import logging
import time
from collections.abc import Iterable, Sequence
from datetime import timedelta

from buydesk.errors import DeskError, InternalError, LedgerUnavailable, OutcomeUnknown, Overloaded, WrongMode
from buydesk.observability import request_ids
from buydesk.orders.model import OrderLedger, Outcome, PricedOrder, Refused
from buydesk.orders.waiting import PendingOrder, WaitingOrders
from buydesk.settings.model import Settings
from buydesk.times import format_time

# A pipelined batch is no smaller than this: each batch has a cost of its own, whatever is in it.
SMALL_BATCH = 32
_LATE_CHECK_SECONDS = 0.25
_DOWN = (LedgerUnavailable, WrongMode)


class OrderBatcher:
    """The bounded queue in front of a ledger. Every order put in gets one outcome, in time.

    `pipelined` is for the edge, whose clients each wait for their own order: of a long queue it sends one half, so that
    answers are written and new orders read while the ledger has the other. If it sent all, it and the ledger would take
    turns, each idle while the other works. And there clients take turns. What an edge has sent is fair already, and
    settles in its order.
    """

    def __init__(self, ledger: OrderLedger, settings: Settings, service: str, *, pipelined: bool = False) -> None:
        self._pipelined = pipelined
        self._ledger = ledger
        self._settings = settings
        self._log = logging.getLogger(f"buydesk.services.{service}")
        # The most that a working ledger needs. A connection gone silent must not cost an order all of its time.
        self._sending_seconds = settings.connect_seconds_max + settings.statement_seconds_max
        self._batch_max = settings.batch_orders_max  # fewer while the ledger is slow
        self._waiting_max = settings.orders_waiting_max
        self._queue = WaitingOrders(fair=pipelined)
        self._arrived = asyncio.Event()
        self._closing = False
        self._workers: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> "OrderBatcher":
        self._workers = [asyncio.create_task(self._work()) for _ in range(self._ledger.batches_at_once)]
        self._refusing_late = asyncio.create_task(self._refuse_late())
        return self

    async def __aexit__(self, *_: object) -> None:
        """Finishes what was accepted; takes no more."""
        self._closing = True
        self._arrived.set()
        await asyncio.gather(*self._workers)
        self._refusing_late.cancel()

    @property
    def waiting(self) -> int:
        """How many orders wait for the next batch."""
        return self._queue.count

    def put(self, items: Sequence[PricedOrder], give_up_at: float) -> list[PendingOrder]:
        """Queues the items together, in this order, to be answered by `give_up_at` (monotonic time).

        Raises Overloaded when they do not fit or the queue is closing: then none of them was queued. One order of a
        client fits in place of the newest one of whoever has more waiting.
        """
        if self._closing:
            raise Overloaded("The service is stopping.", retry_after_seconds=1)
        if self._queue.count + len(items) > self._waiting_max and not self._made_room(items):
            raise Overloaded(f"{self._queue.count} orders are waiting already.", retry_after_seconds=1)
        loop, request = asyncio.get_running_loop(), request_ids.current()
        added = [PendingOrder(item, give_up_at, loop.create_future(), request) for item in items]
        self._queue.add(added)
        self._arrived.set()
        return added

    def _made_room(self, items: Sequence[PricedOrder]) -> bool:
        """Whether there is room for the one order now, by refusing another client's."""
        given_up = self._queue.make_room(items[0].order.client) if len(items) == 1 else None
        if given_up is None:
            return False
        given_up.resolve(
            Refused(Overloaded("The queue is full, and this client has the most orders in it.", retry_after_seconds=1))
        )
        return True

    async def _work(self) -> None:
        while True:
            await self._arrived.wait()
            if not self._closing:  # then it stays set: every worker has to hear of it
                self._arrived.clear()
            while batch := self._next_batch():
                # A batch of one order goes under the id of its request: then one id leads over all hops.
                request_ids.begin(batch[0].request if len(batch) == 1 else None)
                try:
                    await self._send_until_known(batch)
                except Exception:
                    failed = [each for each in batch if not each.outcome.done()]
                    self._log.exception(
                        "a batch of %d orders failed unexpectedly", len(batch), extra={"orders": _named(failed)}
                    )
                    self._refuse_unknown(failed)
            if self._closing:
                return

    def _adapt_batch_size(self, orders: int, seconds: float) -> None:
        """Adapts the size of the next batches to the ledger, which took `seconds` for this many orders."""
        seconds_max = self._ledger.place_seconds / 2
        if seconds > seconds_max:
            self._batch_max = max(1, int(orders * seconds_max / seconds))
        elif orders >= self._batch_max:
            self._batch_max = min(2 * self._batch_max, self._settings.batch_orders_max)

    async def _send_until_known(self, batch: Sequence[PendingOrder]) -> None:
        """Sends the batch until each of its orders has an outcome, or no time left."""
        left = list(batch)
        while left := self._still_in_time(left):
            sent_at = time.monotonic()
            seconds = min(min(each.give_up_at for each in left) - sent_at, self._sending_seconds)
            why = "the ledger gave no reason"
            try:
                outcomes = await self._ledger.place([each.item for each in left], seconds)
            except DeskError as error:
                outcomes = [Refused(error)] * len(left)
                why = error.for_operators
            self._adapt_batch_size(len(left), time.monotonic() - sent_at)
            sent = zip(left, outcomes, strict=True)
            if left := [each for each, outcome in sent if not self._resolve(each, outcome)]:
                self._mark_unknown(left, why)
                self._refuse_waiting_if_down(outcomes)
                await asyncio.sleep(self._settings.resend_pause_seconds)

    def _resolve(self, each: PendingOrder, outcome: Outcome) -> bool:
        """Gives the order its outcome, unless this proves none: False then."""
        if isinstance(outcome, Refused):
            problem = outcome.problem
            # That it was not stored this time proves nothing of an earlier sending, unless the ledger looked for that;
            # of a dry run there is nothing to prove.
            is_proof = outcome.by_ledger or each.item.order.dry_run
            if isinstance(problem, OutcomeUnknown) or (each.resent and not is_proof):
                return False
            if isinstance(problem, InternalError):
                # The line of the request, which knows nothing of batches, so that both can be found from either.
                known = {"request_id": each.request, "batch": request_ids.current()}
                self._log.warning("order %s met a fault: %s", each.item.order.id, problem.detail, extra=known)
        each.resolve(outcome)
        return True

    def _mark_unknown(self, orders: Sequence[PendingOrder], why: str) -> None:
        """The outcome of these orders is unknown; the log names each of them once, when it becomes so."""
        names = _named(each for each in orders if not each.resent)
        extra = {"orders": names} if names else None
        self._log.warning("outcome of %d orders unknown, sending them again: %s", len(orders), why, extra=extra)
        for each in orders:
            each.resent = True

    def _still_in_time(self, sent: Iterable[PendingOrder]) -> list[PendingOrder]:
        """The orders whose time is not up; the others get their outcome, whatever became of what was sent."""
        now = time.monotonic()
        still = [each for each in sent if each.give_up_at > now]
        self._refuse_unknown(each for each in sent if each.give_up_at <= now)
        return still

    def _refuse_waiting_if_down(self, outcomes: Sequence[Outcome]) -> None:
        """Orders that were never sent do not wait behind those that are sent again to a ledger that says it is down: of
        all that it was sent, and not of one order."""
        if all(isinstance(each, Refused) and isinstance(each.problem, _DOWN) for each in outcomes):
            for each in self._queue.take(self._queue.count):
                each.resolve(outcomes[0])

    def _refuse_unknown(self, lost: Iterable[PendingOrder]) -> None:
        for each in lost:
            each.resolve(Refused(outcome_unknown(each.item, self._settings)))

    def _next_batch(self) -> list[PendingOrder]:
        orders = self._queue.count
        if self._pipelined and orders > SMALL_BATCH:
            orders = max(SMALL_BATCH, orders // 2)
        orders = min(orders, self._batch_max)
        batch: list[PendingOrder] = []
        answered_at = time.monotonic() + self._ledger.place_seconds
        while self._queue.count and len(batch) < orders:
            taken = self._queue.take(orders - len(batch))
            if late := [each for each in taken if each.give_up_at < answered_at]:
                _refuse_as_late(late)
                taken = [each for each in taken if each.give_up_at >= answered_at]
            batch += taken
        return batch

    async def _refuse_late(self) -> None:
        """Refuses orders that have waited too long, while they wait."""
        while True:
            await asyncio.sleep(_LATE_CHECK_SECONDS)
            _refuse_as_late(self._queue.take_late(time.monotonic() + self._ledger.place_seconds))


def _refuse_as_late(late: Iterable[PendingOrder]) -> None:
    """Refuses orders that have waited too long to be sent; they never were."""
    for each in late:
        each.resolve(Refused(Overloaded("The order waited too long.", retry_after_seconds=1)))


def _named(orders: Iterable[PendingOrder]) -> dict[str, str | None]:
    """The orders' ids, each with the id of the request that brought it: for the log."""
    return {str(each.item.order.id): each.request for each in orders}


def outcome_unknown(item: PricedOrder, settings: Settings) -> OutcomeUnknown | LedgerUnavailable:
    """The answer when it could not be learnt whether the order is stored; a dry run is not, certainly.

    The ledger takes it no more after its deadline, by its own clock. That may be behind db_proxy's by the allowed skew,
    and db_proxy's behind ours: twice the skew. A statement that began before ends within its time-out. After
    `final_after` a look-up of the id or key is final.
    """
    if item.order.dry_run:
        detail = "The ledger did not say in time what would become of the order."
        return LedgerUnavailable(detail, retry_after_seconds=1)
    beyond_seconds = 2 * settings.clock_skew_seconds_max + settings.statement_seconds_max
    final_after = item.deadline + timedelta(seconds=beyond_seconds)
    return OutcomeUnknown(
        "The order may or may not be stored: send it again, by the same key or quote, or look it up after final_after.",
        retry_after_seconds=1,
        order_id=str(item.order.id),
        final_after=format_time(final_after),
    )
