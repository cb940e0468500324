"""create_buy_order: takes clients' orders, prices them, has them placed, and answers once they are on disk. Gives
quotes."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial

from fastapi import Response

from buydesk.errors import DeskError, InvalidRequest, Paused, PriceMoved, PriceStale, RateLimited
from buydesk.http.app import Check, Service, service_app
from buydesk.http.orders import PLACE_ORDER, created, outcome_for, placeable, read_order, refusal
from buydesk.http.quotes import QUOTE, quoted, read_asked
from buydesk.http.requests import Request
from buydesk.observability.reporter import Reporter
from buydesk.orders.batching import OrderBatcher
from buydesk.orders.model import NewOrder, OrderLedger, Placeable, Refused
from buydesk.orders.pricing import price_order
from buydesk.orders.quotes import OrderQuote
from buydesk.orders.quoting import Quoting
from buydesk.orders.waiting import PendingOrder
from buydesk.prices.cache import FIRST_PRICE_SECONDS_MAX, PriceCache
from buydesk.prices.model import PriceRecord, PriceStore
from buydesk.settings.model import Settings
from buydesk.times import utc_now

NAME = "create_buy_order"


def create_app(settings: Settings, ledger: OrderLedger, store: PriceStore, reporter: Reporter) -> Service:
    """The service over a ledger and a price store."""
    prices = PriceCache(store, settings, logging.getLogger(f"buydesk.services.{NAME}"))
    quoting = Quoting(ledger, prices, settings)
    queue = OrderBatcher(ledger, settings, NAME, pipelined=True)
    seconds_max = settings.order_seconds_max
    storable_for = timedelta(seconds=seconds_max + settings.clock_skew_seconds_max)
    orders_url = f"{settings.url('fetch_buy_orders')}/get_orders/"

    @asynccontextmanager
    async def lifespan() -> AsyncIterator[None]:
        # A client that comes while the desk starts rather waits than is refused because there is no price yet.
        await prices.wait_for_first(FIRST_PRICE_SECONDS_MAX)
        refreshing = asyncio.create_task(prices.refresh_forever())
        async with queue:
            yield
        refreshing.cancel()

    async def place_order(request: Request) -> Response:
        """The order of a request, placed: 201, or what refused it as a problem."""
        order, guard = await read_order(request, quoting.read)
        if order.client_order_id is None and order.quote is None and settings.idempotency_keys_required:
            raise InvalidRequest.of("Idempotency-Key", "is missing, and this desk takes no order without one")
        give_up_at = time.monotonic() + seconds_max
        markup_bp = request.caller.markup_bp(order.currency, settings.markup_bp_of(order.currency))
        price = prices.price(order.currency) if order.quote is None else order.quote
        deadline = utc_now() + storable_for
        [waiting] = queue.put([price_order(order, price, deadline, markup_bp, guard)], give_up_at)
        outcome = await waiting.outcome
        if (
            isinstance(outcome, Refused)
            and _expired_on_the_way(waiting, outcome.problem, price)
            and (newer := prices.price(order.currency)) != price
        ):
            [waiting] = queue.put([price_order(order, newer, deadline, markup_bp, guard)], give_up_at)
            outcome = await waiting.outcome
        outcome = outcome_for(request.caller, waiting.item, outcome, livemode=settings.price_feed == "live")
        if isinstance(outcome, Refused):
            raise refusal(outcome.problem, request.caller)
        if isinstance(outcome, Placeable):
            return placeable(outcome.order)
        return created(outcome.order, orders_url, is_replay=outcome.order.id != order.id, status=_status(order))

    async def replay(request: Request, over: RateLimited) -> Response:
        """What an order beyond the caller's rate is answered with: the order that is stored with its key or quote, or
        `over`."""
        try:
            order, _ = await read_order(request, quoting.read)
            if order.client_order_id is None and order.quote is None:
                raise over
            app.access.count(request, "lookups")
        except DeskError:  # what else is wrong is told when its turn has come
            raise over from None
        # Whether it is a repeat the ledger sees before it looks at what the order has instead of a price.
        refused = price_order(order, over, utc_now() + storable_for)
        [waiting] = queue.put([refused], time.monotonic() + seconds_max)
        outcome = await waiting.outcome
        if isinstance(outcome, Refused):
            raise over if isinstance(outcome.problem, RateLimited | Paused) else outcome.problem
        return created(outcome.order, orders_url, is_replay=True, status=_status(order))

    checks: dict[str, Check] = {"ledger": partial(_check_ledger, ledger, seconds_max), "price": prices.check}
    app = service_app(NAME, "Place buy orders: POST /place_order/", checks, reporter, lifespan)
    app.add_direct_route(
        "/place_order/", "POST", place_order, PLACE_ORDER, needs="orders:create", counted="orders", beyond=replay
    )
    _add_quotes(app, quoting, settings)
    return app


async def _check_ledger(ledger: OrderLedger, seconds_max: float) -> None:
    await ledger.check()
    await ledger.place([], seconds_max)  # nothing, but with the token that placing takes


def _add_quotes(app: Service, quoting: Quoting, settings: Settings) -> None:
    async def quote(request: Request) -> Response:
        """The quote that a request asks for: 201, or what stands in its way as a problem."""
        asked = await read_asked(request, request.caller.client_quote_seconds_max or settings.quote_seconds_max)
        markup_bp = request.caller.markup_bp(asked.currency, settings.markup_bp_of(asked.currency))
        return quoted(await quoting.give(asked, markup_bp))

    # As a look-up: who asks for a quote before each order may place as many as others.
    app.add_direct_route("/quotes/", "POST", quote, QUOTE, needs="quotes:create", counted="lookups")


def _status(order: NewOrder) -> int:
    """Of the answer with an order that is stored."""
    return 200 if order.dry_run else 201


def _expired_on_the_way(waiting: PendingOrder, problem: DeskError, price: PriceRecord | OrderQuote | DeskError) -> bool:
    """Whether the price has expired, and the order may be priced again: not after a lost answer. The ledger says so of
    a price that it was sent; it was sent none where a guard had refused that already."""
    if waiting.resent or not isinstance(price, PriceRecord):
        return False
    return isinstance(problem, PriceStale) or (isinstance(problem, PriceMoved) and price.expires_at <= utc_now())
