"""OrderLedger in PostgreSQL: the one place where orders are stored. One call of one function places a batch."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncIterator, Sequence

import asyncpg

from buydesk.backends.postgres.faults import (
    is_definite,
    not_storable,
    raise_unless_of_an_item,
    unavailable,
    unknown_outcome,
)
from buydesk.backends.postgres.prices import QuoteProofs, keeping, stored_record
from buydesk.backends.postgres.rows import judged, order_of, outcome_of, place_arguments
from buydesk.backends.postgres.sessions import FAULTS, Ask, Session, StandbyAway, Warned, fetching, open_session
from buydesk.backends.postgres.sql import REVISION
from buydesk.backends.postgres.storing import StoringMonitor
from buydesk.errors import LedgerUnavailable, OrderNotFound, OutcomeUnknown, Overloaded, WrongMode
from buydesk.limits import SLICE_ITEMS, Bulkhead, SharedCheck
from buydesk.observability.clock_skew import ClockMonitor
from buydesk.orders.model import (
    Anchor,
    Exposure,
    Order,
    Outcome,
    Page,
    PageAfter,
    PageBefore,
    PageFrom,
    PricedOrder,
    Refused,
)
from buydesk.orders.refusals import RefusalRecorder
from buydesk.prices.model import PriceRecord
from buydesk.settings.model import Settings
from buydesk.times import utc_now

logger = logging.getLogger("buydesk.services.db_proxy")

# Less than a check of readiness may take (http.app): its reason is to be told, not that there was no answer.
CHECK_SECONDS_MAX = 2.5
# The query of each kind of page, of the desk; a client's has another one, with "client_" before its name.
_PAGES = {PageFrom: "page_from", PageBefore: "page_before", PageAfter: "page_after"}


class PostgresLedger:
    """See OrderLedger. Connections are made when they are needed, so a service can start before its database."""

    # A second call would only wait for the row that the first has locked.
    batches_at_once = 1
    refusals: RefusalRecorder | None = None  # by which they are put on record

    def __init__(
        self, database_url: str, settings: Settings, livemode: bool, clocks: ClockMonitor | None = None
    ) -> None:
        self._database_url = database_url
        self._clocks = clocks or ClockMonitor("this process", settings.clock_skew_seconds_max)
        self._settings = settings
        self._livemode = livemode
        # Until PostgreSQL has ended the statement by itself, and said so.
        self.place_seconds = min(settings.statement_seconds_max, settings.order_seconds_max / 4)
        # Orders have a connection of their own: readers must not hold them up.
        self._write_session: Session | None = None
        self._write_lock = asyncio.Lock()
        self._storing = StoringMonitor()
        self._quotes = QuoteProofs(settings.clock_skew_seconds_max)
        self._reading: set[Session] = set()  # all that read, the idle ones among them
        self._idle: list[Session] = []
        self._is_closed = False
        # As many places as connections: no kind of read waits behind another, and checks wait for nobody.
        readers = settings.database_connections_max - 3
        waiting = settings.reads_waiting_max, settings.read_wait_seconds_max
        self.key_look_ups = Bulkhead(1, *waiting)  # or a key would be honoured as long as readers take all places
        self._large_pages = Bulkhead(max(1, readers // 3), *waiting)
        self._short_reads = Bulkhead(readers - max(1, readers // 3), *waiting)
        self._shared_check = SharedCheck(self._check_in_time)

    async def place(self, items: Sequence[PricedOrder], timeout_seconds: float) -> Sequence[Outcome]:
        """See OrderLedger."""
        if not items:
            return []
        try:
            outcomes = await self._place_holding_lock(items, timeout_seconds)
        except (LedgerUnavailable, Overloaded, OutcomeUnknown) as error:
            self._storing.note_failure(error)
            raise
        self._storing.note_outcomes(outcomes)
        if self.refusals is not None:
            self.refusals.note(items, outcomes)
        return outcomes

    async def _place_holding_lock(self, items: Sequence[PricedOrder], timeout_seconds: float) -> Sequence[Outcome]:
        give_up_at = time.monotonic() + timeout_seconds
        seconds = min(timeout_seconds, self._settings.connect_seconds_max)
        async with self._hold_write_lock(seconds):
            if self._write_session is None or self._write_session.is_closed:
                self._write_session = await self._connect(seconds)
            try:
                return await self._place_or_split(self._write_session, items, give_up_at)
            except BaseException as error:
                # Cancelled, cut, confused or led to a server that can only be read: the next call starts afresh.
                self._write_session.end()
                if isinstance(error, OutcomeUnknown):
                    self._drop_idle()
                raise

    @contextlib.asynccontextmanager
    async def _hold_write_lock(self, timeout_seconds: float) -> AsyncIterator[None]:
        """One batch at a time; raises LedgerUnavailable when that takes too long."""
        if self._write_lock.locked():
            try:
                async with asyncio.timeout(timeout_seconds):
                    await self._write_lock.acquire()
            except TimeoutError as error:
                raise unavailable(error) from error
        else:
            await self._write_lock.acquire()  # at once
        try:
            yield
        finally:
            self._write_lock.release()

    async def _place_or_split(
        self, session: Session, items: Sequence[PricedOrder], give_up_at: float
    ) -> Sequence[Outcome]:
        """One outcome each. A batch that was rolled back because of one of its items is placed in halves, and these in
        halves again (9 times for 500 items), so that only that item is refused. Raises only when it stored nothing for
        certain, or OutcomeUnknown."""
        if give_up_at <= time.monotonic():
            raise Overloaded("The database took too long.", retry_after_seconds=1)
        try:
            return await self._place(session, items, give_up_at)
        except asyncpg.PostgresError as error:
            raise_unless_of_an_item(error)
            if len(items) == 1:
                logger.exception("order %s cannot be stored", items[0].order.id)
                return [Refused(not_storable(error))]
        outcomes: list[Outcome] = []
        middle = len(items) // 2
        for half in (items[:middle], items[middle:]):
            try:
                outcomes += await self._place_or_split(session, half, give_up_at)
            except (LedgerUnavailable, Overloaded) as error:
                outcomes += [Refused(error)] * len(half)  # the other half may well be stored
        return outcomes

    async def _place(self, session: Session, items: Sequence[PricedOrder], give_up_at: float) -> Sequence[Outcome]:
        """One call of the function, in a transaction of its own; raises asyncpg.PostgresError or OutcomeUnknown."""
        try:
            items = await self._quotes.proven(session, items, give_up_at - time.monotonic())
            arguments = place_arguments(items, self._clock_window())
            [row] = await session.fetch("place_items", *arguments, seconds=give_up_at - time.monotonic())
        except asyncpg.PostgresError:
            raise
        except Exception as error:
            # A time-out, a lost connection, a warning or a driver in an unexpected state: the function may have run to
            # its end.
            raise unknown_outcome(error) from error
        results = judged(row)
        try:
            repeated = [each.number for each in results if each.kind == "repeat" and each.number is not None]
            stored = await self._repeated(session, repeated, give_up_at - time.monotonic())
            if row["has_standbys"] and "placed" not in row["outcomes"]:
                # Nothing was written and no standby waited for: what was found, or not, may be of this server only.
                await session.reach_durable_point(seconds=give_up_at - time.monotonic())
        except Exception as error:
            raise unknown_outcome(error) from error  # whatever goes wrong here, the batch is committed already
        return [outcome_of(item, each, row, stored) for item, each in zip(items, results, strict=True)]

    def _clock_window(self) -> tuple[float, float]:
        """The Unix times between which the ledger's clock has to be while a statement sent now runs."""
        now, skew_seconds = utc_now().timestamp(), self._settings.clock_skew_seconds_max
        return now - skew_seconds, now + skew_seconds + self._settings.statement_seconds_max

    async def _repeated(self, session: Session, numbers: Sequence[int], seconds: float) -> dict[int, Order]:
        """The stored orders that a batch repeats, as they were placed."""
        if not numbers:
            return {}
        rows = await session.fetch("orders_by_number", numbers, seconds=seconds)
        return {row["number"]: order_of(row) for row in rows}

    async def keep_price(self, record: PriceRecord) -> None:
        """See OrderLedger."""
        async with self._short_reads:
            await self._ask(keeping(record))

    async def page(self, client: str | None, anchor: Anchor, page_size: int) -> Page:
        """See OrderLedger."""
        places = self._large_pages if page_size > SLICE_ITEMS else self._short_reads
        query, number = _PAGES[type(anchor)], anchor.start if isinstance(anchor, PageFrom) else anchor.number
        if client is None:
            rows = await self.fetch(query, number, page_size, places=places)
        else:
            rows = await self.fetch(f"client_{query}", client, number, page_size, places=places)
        orders = [order_of(row) for row in rows if row["number"] is not None]
        # Most come in this order already, but SQL does not promise it. The desk's numbers order a client's too.
        orders.sort(key=lambda order: order.number, reverse=True)
        return Page(orders, rows[0]["total"] if isinstance(anchor, PageFrom) else None)

    async def order(self, order_id: uuid.UUID, client: str | None) -> Order:
        """See OrderLedger."""
        return await self._look_up(f"No order has the id {order_id}.", "order_by_id", order_id, client)

    async def order_by_key(self, client: str, client_order_id: str) -> Order:
        """See OrderLedger."""
        detail = "No order has this client_order_id."
        return await self._look_up(detail, "order_by_key", client, client_order_id)

    async def _look_up(self, not_found: str, query: str, *arguments: object) -> Order:
        """The order that a query finds; raises OrderNotFound only after waiting for what is being stored. Either way
        the standbys have all that was seen."""

        async def find(session: Session, seconds: float) -> list[asyncpg.Record]:
            rows = await session.fetch(query, *arguments, seconds=seconds)
            if rows and rows[0]["number"] is None:
                await session.fetch("all_placed", seconds=seconds)
                rows = await session.fetch(query, *arguments, seconds=seconds)
            if rows and rows[0]["has_standbys"]:
                await session.reach_durable_point(seconds=seconds)
            return rows

        async with self._short_reads:
            rows = await self._ask(find)
        if not rows or rows[0]["number"] is None:
            raise OrderNotFound(not_found)
        return order_of(rows[0])

    async def exposure(self, client: str | None) -> Exposure:
        """See OrderLedger."""
        rows = await (self.fetch("exposure") if client is None else self.fetch("client_exposure", client))
        if not rows:
            return Exposure(None, 0, 0)
        return Exposure(rows[0]["cap_satoshi"], rows[0]["used_satoshi"], rows[0]["last_number"])

    async def price_record(self, price_id: uuid.UUID) -> PriceRecord:
        """See OrderLedger."""
        return stored_record(await self.fetch("price_record", price_id), price_id)

    async def check(self) -> None:
        """See OrderLedger."""
        await self._shared_check()

    async def _check_in_time(self) -> None:
        try:
            async with asyncio.timeout(CHECK_SECONDS_MAX):
                await self._check()
        except TimeoutError as error:
            raise unavailable(error) from error

    async def _check(self) -> None:
        """The check itself; a newer database than this program is fine, so that both can be upgraded one by one."""

        async def ask(session: Session, seconds: float) -> list[asyncpg.Record]:
            asked_at = self._clocks.moment()
            rows = await session.fetch("revision", seconds=seconds)
            if rows:
                self._clocks.hear("PostgreSQL", rows[0]["moment"], asked_at)
            if rows and rows[0]["has_standbys"] and not rows[0]["is_read_only"]:
                await session.reach_durable_point(seconds=seconds)
            return rows

        rows = await self._ask(ask)
        revision = rows[0]["version_num"] if rows else "none"
        if not rows or revision < REVISION:
            detail = f"The database is at revision {revision}, not {REVISION}: run `buydesk migrate`."
            raise LedgerUnavailable(detail, retry_after_seconds=5)
        if rows[0]["is_read_only"]:
            self._drop_idle()  # a session may be read-only for as long as it lives, and the database not
            raise LedgerUnavailable("The database is read-only now.", retry_after_seconds=1)
        self._clocks.require_agreement_with("PostgreSQL")
        await self._check_storing()
        unknown_keys = await self._ask(fetching("unknown_price_keys", self._settings.accepted_price_keys))
        if unknown_keys:
            keys = ", ".join(row["key"] for row in unknown_keys)
            detail = f"The database does not know keys that prices are signed with ({keys}): run `buydesk migrate`."
            raise LedgerUnavailable(detail, retry_after_seconds=5)

    async def _check_storing(self) -> None:
        """Raises LedgerUnavailable when an order would not be stored, as far as that can be known without storing one:
        an empty batch takes all locks, and its commit reaches the disk."""
        if not self._storing.is_shown and self._write_lock.locked():
            async with self._hold_write_lock(CHECK_SECONDS_MAX):  # a batch is under way, and will show it
                pass
        self._storing.require_no_failure()
        if not self._storing.is_shown:
            await self._ask(fetching("place_nothing"))
            self._storing.note_checked()
        self._storing.require_progress()

    async def fetch(self, query: str, *arguments: object, places: Bulkhead | None = None) -> list[asyncpg.Record]:
        """The rows of a named query, short unless `places` says otherwise, after waiting for a turn.

        For queries that may run twice: one whose answer was lost is asked again. Raises Overloaded, LedgerUnavailable.
        """
        async with places or self._short_reads:
            return await self._ask(fetching(query, *arguments))

    async def ask_once(self, ask: Ask) -> list[asyncpg.Record]:
        """What a session is asked for, once, after waiting for a turn: for what writes.

        Raises Overloaded or LedgerUnavailable, when it was not asked, and what asyncpg raises and Warned, when it was.
        """
        async with self._short_reads:
            return await self._ask_once(ask)

    async def close(self) -> None:
        """Closes all sessions; what is under way is cut off."""
        self._is_closed = True
        if self._write_session is not None:
            self._write_session.end()
        for session in self._reading:
            session.end()

    async def _ask(self, ask: Ask) -> list[asyncpg.Record]:
        """What a session is asked for; once more when a kept one turns out to be dead. Raises LedgerUnavailable."""
        try:
            try:
                return await self._ask_once(ask)
            except asyncpg.InternalClientError as error:
                if isinstance(error, asyncpg.ProtocolError):
                    raise
                return await self._ask_once(ask)  # the driver was about to find out
            except asyncpg.PostgresError as error:
                if is_definite(error):
                    raise
                return await self._ask_once(ask)
        except (*FAULTS, Warned) as error:
            raise unavailable(error) from error

    async def _ask_once(self, ask: Ask) -> list[asyncpg.Record]:
        session = await self._reader()
        try:
            rows = await ask(session, self._settings.remote_seconds_max)
        except StandbyAway:
            self._idle.append(session)  # it has answered
            raise
        except BaseException as error:  # as above
            self._reading.discard(session)
            session.end()
            if not isinstance(error, asyncpg.PostgresError) or not is_definite(error):
                self._drop_idle()
            raise
        self._idle.append(session)
        return rows

    async def _reader(self) -> Session:
        while self._idle:
            session = self._idle.pop()
            if not session.is_closed:
                return session
            self._reading.discard(session)
        session = await self._connect(self._settings.connect_seconds_max)
        self._reading.add(session)
        return session

    def _drop_idle(self) -> None:
        """Where one session fell silent, those that idle beside it are likely to be as dead."""
        self._reading.difference_update(self._idle)
        while self._idle:
            self._idle.pop().end()

    async def _connect(self, timeout_seconds: float) -> Session:
        """A new session; raises LedgerUnavailable, WrongMode."""
        try:
            session = await open_session(self._database_url, self._settings, timeout_seconds)
            try:
                await self._require_mode(session)
                if self._is_closed:  # meanwhile or before
                    raise LedgerUnavailable("The ledger is closed.", retry_after_seconds=1)
            except BaseException:
                session.end()
                raise
        except FAULTS as error:
            raise unavailable(error) from error
        return session

    async def _require_mode(self, session: Session) -> None:
        """Asked of every new session: the other mode's database must not even be read."""
        rows = await session.fetch("livemode", seconds=self._settings.connect_seconds_max)
        if not rows:
            raise LedgerUnavailable("The database has no exposure row: run `buydesk migrate`.", retry_after_seconds=1)
        if rows[0]["livemode"] != self._livemode:
            has = "live" if rows[0]["livemode"] else "sandbox"
            detail = f"This database holds {has} orders: start with PRICE_FEED={has}, or use another one."
            raise WrongMode(detail, retry_after_seconds=5)
