"""Orders that wait for a batch: clients take turns, so that none waits behind all that another one has sent.

The turns are those of round robin; when there is no more room, whoever has the most waiting gives some up ("longest
queue drop", as in fair queueing: RFC 8290, section 4.1.2, drops from the flow with the largest backlog).
"""

import asyncio
import heapq
from collections import OrderedDict, deque
from collections.abc import Sequence

import msgspec

from buydesk.orders.model import Outcome, PricedOrder

_EVERYBODY = ""


class PendingOrder(msgspec.Struct, eq=False):
    """An order on its way to the ledger. `give_up_at` is monotonic time; `resent` says that an answer was lost;
    `request` is the id of the one that brought it."""

    item: PricedOrder
    give_up_at: float
    outcome: asyncio.Future[Outcome]
    request: str | None
    resent: bool = False

    def resolve(self, outcome: Outcome) -> None:
        """Hands over the outcome, unless whoever waited is gone: that must not affect the rest of the batch."""
        if not self.outcome.done():
            self.outcome.set_result(outcome)


class WaitingOrders:
    """The `count` orders that were not sent yet: of their clients in turn, or, not `fair`, in the order they came.

    A client's turn is one order; a client that has none waiting comes last when it is back. Adding and taking an order
    cost the same however many orders and clients wait.
    """

    def __init__(self, *, fair: bool) -> None:
        self.count = 0
        self._fair = fair
        self._queues = _Queues()
        # How many each client has, negative, as a heap: it is made when it is asked for and holds until orders are
        # taken, that is for a batch. An entry that no longer fits its client is passed over.
        self._most_first: list[tuple[int, str]] | None = None

    def add(self, orders: Sequence[PendingOrder]) -> None:
        """Has the orders wait, behind those of the same client."""
        self.count += len(orders)
        if not self._fair:
            self._queues[_EVERYBODY].extend(orders)
            return
        for each in orders:
            self._queues[each.item.order.client].append(each)
        if self._most_first is not None:
            for client in {each.item.order.client for each in orders}:
                heapq.heappush(self._most_first, (-len(self._queues[client]), client))

    def take(self, orders_max: int) -> list[PendingOrder]:
        """Takes out the orders that are next, at most so many."""
        self._most_first = None
        queues = self._queues
        taken: list[PendingOrder] = []
        while len(queues) > 1 and len(taken) < orders_max:
            client, queue = queues.popitem(last=False)
            taken.append(queue.popleft())
            if queue:
                queues[client] = queue
        if queues and (left := orders_max - len(taken)) > 0:  # the rest is of one client
            [queue] = queues.values()
            if left < len(queue):
                taken += [queue.popleft() for _ in range(left)]
            else:
                taken += queue
                queues.clear()
        self.count -= len(taken)
        return taken

    def take_late(self, answered_at: float) -> list[PendingOrder]:
        """Takes out the orders that are to be given up before `answered_at`; who is next stays so."""
        late = [each for queue in self._queues.values() for each in queue if each.give_up_at < answered_at]
        if late:
            self._most_first = None
            queues, self._queues = self._queues, _Queues()
            for client, queue in queues.items():
                if kept := [each for each in queue if each.give_up_at >= answered_at]:
                    self._queues[client].extend(kept)
            self.count -= len(late)
        return late

    def make_room(self, client: str) -> PendingOrder | None:
        """Takes out the order that gives way to one more of this client: the newest of the client with the most.

        None when nobody would have more than this client then: between equals who came first stays, or they would
        push each other out by turns. For when orders wait; costs a look at every client, once between two batches.
        """
        if not self._fair:
            return None
        if self._most_first is None:
            self._most_first = [(-len(queue), each) for each, queue in self._queues.items()]
            heapq.heapify(self._most_first)
        while -self._most_first[0][0] != len(self._queues[self._most_first[0][1]]):
            heapq.heappop(self._most_first)
        negative, longest = self._most_first[0]
        own = len(self._queues[client]) if client in self._queues else 0
        if own + 1 >= -negative:
            return None
        heapq.heapreplace(self._most_first, (negative + 1, longest))
        self.count -= 1
        return self._queues[longest].pop()  # never its last: it has two at least


class _Queues(OrderedDict[str, deque[PendingOrder]]):
    """Each client's orders, oldest first, by client: who is next comes first. Nobody stays here without an order."""

    def __missing__(self, client: str) -> deque[PendingOrder]:
        queue: deque[PendingOrder] = deque()
        self[client] = queue
        return queue
