"""OrderLife in PostgreSQL, beside the orders."""

import logging
from collections.abc import Mapping, Sequence

import asyncpg

from buydesk.backends.postgres.faults import raise_unless_of_an_item, unknown_outcome
from buydesk.backends.postgres.ledger import PostgresLedger
from buydesk.backends.postgres.rows import order_of
from buydesk.backends.postgres.sessions import FAULTS, Session, Warned
from buydesk.errors import DeskError, InternalError, LedgerUnavailable, OrderNotFound, OutcomeUnknown, Overloaded
from buydesk.orders.life import LOOKED_AT_MAX, AcceptedOrders, Closing, Event, OrderLife, conflict
from buydesk.orders.model import NUMBER_MAX, Order

logger = logging.getLogger("buydesk.services.db_proxy")


class PostgresLife(OrderLife):
    """Uses the ledger's sessions; whoever made the ledger closes it."""

    def __init__(self, ledger: PostgresLedger) -> None:
        self._ledger = ledger

    async def close_orders(self, closings: Sequence[Closing]) -> Sequence[Order | DeskError]:
        """See OrderLife."""
        if not closings:
            return []
        try:
            return await self._close(closings)
        except OutcomeUnknown as lost:
            # A kept session that was dead, most likely: once more, which is harmless.
            try:
                return await self._close(closings)
            except (LedgerUnavailable, Overloaded) as error:
                raise lost from error

    async def _close(self, closings: Sequence[Closing]) -> list[Order | DeskError]:
        said: asyncpg.Record | None = None

        async def ask(session: Session, seconds: float) -> list[asyncpg.Record]:
            nonlocal said
            ids, statuses, texts = zip(*((each.order_id, each.status, each.text) for each in closings), strict=True)
            [said] = await session.fetch("close_orders", ids, statuses, texts, seconds=seconds)
            try:
                numbers = [number for number in said["numbers"] if number is not None]
                rows = await session.fetch("closed_orders", numbers, seconds=seconds)
                if said["has_standbys"] and "closed" not in said["outcomes"]:
                    # As for a batch of repeats: what was found may be of this server only.
                    await session.reach_durable_point(seconds=seconds)
            except Exception as error:
                raise unknown_outcome(error) from error  # it is committed already
            return rows

        try:
            rows = await self._ledger.ask_once(ask)
        except asyncpg.PostgresError as error:
            raise_unless_of_an_item(error)
            logger.exception("%d orders cannot be settled or cancelled", len(closings))
            detail = "The orders cannot be settled or cancelled; they certainly were not. It has been logged."
            raise InternalError(detail, server_said=str(error.args[0])) from error
        except (*FAULTS, Warned) as error:
            raise unknown_outcome(error) from error
        assert said is not None  # noqa: S101  # otherwise something was raised
        orders = {row["number"]: order_of(row) for row in rows}
        results = zip(closings, said["outcomes"], said["numbers"], strict=True)
        return [_result_of(closing, kind, orders.get(number)) for closing, kind, number in results]

    async def accepted(self, after: int, limit: int) -> AcceptedOrders:
        """See OrderLife."""
        after = min(after, NUMBER_MAX - LOOKED_AT_MAX)
        rows = await self._ledger.fetch("accepted_after", after, LOOKED_AT_MAX, limit)
        # They come in this order already, but SQL does not promise it.
        orders = sorted((order_of(row) for row in rows if row["number"] is not None), key=lambda order: order.number)
        looked_at = min(after + LOOKED_AT_MAX, rows[0]["total"])
        return AcceptedOrders(orders, orders[-1].number if len(orders) == limit else max(after, looked_at))

    async def events(self, client: str | None, after: int, limit: int) -> Sequence[Event]:
        """See OrderLife."""
        bounds = min(after, NUMBER_MAX - limit), limit
        if client is None:
            rows = await self._ledger.fetch("events_after", *bounds)
        else:
            rows = await self._ledger.fetch("client_events_after", client, *bounds)
        events = [Event(row["sequence"], order_of(row)) for row in rows]
        return sorted(events, key=lambda event: event.sequence)

    async def close(self) -> None:
        """Nothing here is its own."""

    async def last_events(self, clients: Sequence[str]) -> Mapping[str | None, int]:
        """See OrderLife."""
        rows = await self._ledger.fetch("last_events", clients)
        return dict.fromkeys(clients, 0) | {row["client"]: row["sequence"] for row in rows}


def _result_of(closing: Closing, kind: str, order: Order | None) -> Order | DeskError:
    if order is None:
        return OrderNotFound(f"No order has the id {closing.order_id}.")
    return conflict(order) if kind == "conflict" else order
