"""db_proxy: the only service that talks to PostgreSQL. Places batches for create_buy_order, keeps what api_updater
judges prices by, and reads for the others."""

import contextlib
import logging
import math
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime, timedelta

import msgspec
from fastapi import Response
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from buydesk.clients.model import KeyStore
from buydesk.clients.registry import Registry, ShownKey
from buydesk.errors import ClockSkewed, DeskError, ExposureCapExceeded, InvalidRequest, Overloaded, PriceUnavailable
from buydesk.events.model import WebhookStore
from buydesk.http.anchors import add_anchor_routes
from buydesk.http.app import Service, service_app
from buydesk.http.clients import add_key_routes
from buydesk.http.examples import EXAMPLE_ORDER, EXAMPLE_PRICED_ORDER
from buydesk.http.ledger import (
    EXPOSURE,
    KEEP_PRICE,
    LIST,
    ORDER,
    ORDER_BY_KEY,
    PAGE,
    PRICE,
    read_client,
    read_key,
    read_list,
    read_page,
)
from buydesk.http.life import ACCEPTED, CLOSE, EVENTS, LAST_EVENTS, LIST_BYTES_MAX, read_accepted, read_after
from buydesk.http.members import decode_body, read_query, whole_number
from buydesk.http.openapi import operation
from buydesk.http.pages import id_of
from buydesk.http.prices import RECORD_BYTES_MAX, wrong_members_named
from buydesk.http.registry import add_registry_routes
from buydesk.http.requests import Request, require_json, require_token
from buydesk.http.responses import MsgspecResponse
from buydesk.http.webhook_store import add_webhook_store_routes
from buydesk.observability.reporter import Reporter
from buydesk.orders.batching import OrderBatcher
from buydesk.orders.documents import (
    exposure_document,
    outcome_document,
    page_document,
    priced_order_documents,
    priced_order_from,
    stored_document,
)
from buydesk.orders.life import OrderLife
from buydesk.orders.life_documents import (
    accepted_document,
    clients_from,
    closings_from,
    event_documents,
    last_events_document,
    result_document,
)
from buydesk.orders.model import Exposure, OrderLedger, Outcome, Placed, PricedOrder, Refused
from buydesk.orders.paging import PageReader
from buydesk.orders.pricing import price_order
from buydesk.orders.quotes import OrderQuote, quote_reader
from buydesk.orders.refusals import RefusalRecorder
from buydesk.orders.representations import order_document
from buydesk.prices.anchors import AnchorStore
from buydesk.prices.documents import record_document, record_from
from buydesk.prices.model import RETRY_AFTER_SECONDS, PriceRecord
from buydesk.prices.verification import require_proven
from buydesk.reading import WrongMember
from buydesk.settings.model import Settings
from buydesk.settings.types import tokens
from buydesk.times import utc_now

logger = logging.getLogger(__name__)

NAME = "db_proxy"
ITEMS_MAX = 1000
ADD_BYTES_MAX = 4 * 1024 * 1024
SENDER_WAITS_SHARE = 0.75
# For so long after an order whose price this desk would not have published /readyz says so, unless another one's was
# taken: for so long, a price's life, that shows that senders agree with this service on keys and limits.
REFUSAL_SHOWN_SECONDS = 15.0
PROVEN_SHOWN_SECONDS = 60.0


class ExposureSeen(Collector):
    """The exposure as the last check of readiness saw it, for Prometheus: a scrape asks the database nothing."""

    def __init__(self, ledger: OrderLedger) -> None:
        self._ledger = ledger
        self._seen: Exposure | None = None

    async def check(self) -> None:
        """Raises LedgerUnavailable when orders cannot be stored."""
        await self._ledger.check()
        with contextlib.suppress(Overloaded):  # by readers: orders can be stored all the same
            self._seen = await self._ledger.exposure(None)

    def collect(self) -> Iterator[Metric]:
        """What prometheus_client asks for at every scrape; nothing before the first check."""
        if self._seen is not None:
            yield GaugeMetricFamily("buydesk_exposure_used_satoshi", "Sold in all.", self._seen.used_satoshi)
            yield GaugeMetricFamily("buydesk_exposure_cap_satoshi", "May be sold in all.", self._seen.cap_satoshi or 0)


class PriceProofs:
    """Whether senders' prices are proven here, as far as the last orders show it. With other keys or tighter limits
    than theirs this service would refuse each of their orders, whatever the ledger can do."""

    def __init__(self) -> None:
        self._refusal: PriceUnavailable | None = None
        self._refused_at = self._proven_at = -math.inf

    def note_proven(self) -> None:
        """Takes note of an order whose price this desk may have published."""
        self._proven_at = time.monotonic()

    def note_refusal(self, refusal: PriceUnavailable) -> None:
        """Takes note of one whose price it would not have published; the first of many is logged."""
        before, self._refused_at = self._refused_at, time.monotonic()
        if self._refused_at - before > REFUSAL_SHOWN_SECONDS:
            logger.warning("orders are refused: %s", refusal.detail)
        self._refusal = refusal

    async def check(self) -> None:
        """Raises PriceUnavailable when orders were refused for their prices lately, and no price was taken: one sender
        that is wrong must not make the service unready for the others."""
        now = time.monotonic()
        is_proven = now - self._proven_at <= PROVEN_SHOWN_SECONDS
        if self._refusal is not None and now - self._refused_at <= REFUSAL_SHOWN_SECONDS and not is_proven:
            raise self._refusal


def create_app(
    settings: Settings,
    ledger: OrderLedger,
    life: OrderLife,
    anchors: AnchorStore,
    reporter: Reporter,
    *,
    keys: KeyStore,
    registry: Registry[ShownKey],
    refusals: RefusalRecorder,
    webhooks: WebhookStore,
) -> Service:
    """The service over a ledger, what becomes of its orders, and what is kept in it beside them. Its caller closes
    them."""
    queue = OrderBatcher(ledger, settings, NAME)

    @asynccontextmanager
    async def lifespan() -> AsyncIterator[None]:
        async with refusals.running(), queue:
            yield

    exposure, proofs = ExposureSeen(ledger), PriceProofs()
    checks = {"database": exposure.check, "prices": proofs.check}
    app = service_app(NAME, "The ledger, over HTTP", checks, reporter, lifespan)
    app.registry.register(exposure)
    app.registry.register(refusals)
    may_place = tokens(settings.placing_tokens)
    most_ms = int(settings.order_seconds_max * 1000)  # so long a client waits, and no sender longer
    answer_within_ms = whole_number("answer_within_ms", "", most_ms, default=most_ms)

    async def add(request: Request) -> Response:
        """Settles one item or a list of items: one result each, in the same order."""
        require_token(request, may_place)
        require_json(request)
        sender_waits_ms = read_query(request, answer_within_ms)["answer_within_ms"]
        give_up_at = time.monotonic() + sender_waits_ms / 1000 * SENDER_WAITS_SHARE
        document = await _document(request)
        items = document if isinstance(document, list) else [document]
        outcomes = await _place_list(queue, items, give_up_at, settings, proofs)
        answers = list(map(outcome_document, outcomes))
        return MsgspecResponse(answers if isinstance(document, list) else answers[0])

    app.add_direct_route("/add/", "POST", add, _ADD_OPERATION)
    _add_reads(app, ledger, settings)
    _add_life(app, life, settings)
    add_anchor_routes(app, anchors, settings)
    add_key_routes(app, keys, settings)
    add_registry_routes(app, registry, refusals.store, settings)
    add_webhook_store_routes(app, webhooks, settings)
    return app


async def _document(request: Request) -> object:
    document = decode_body(await request.body(ADD_BYTES_MAX))
    if not isinstance(document, list | dict):
        raise InvalidRequest.of("body", "must be an item or a list of items")
    if isinstance(document, list) and len(document) > ITEMS_MAX:
        raise InvalidRequest.of("body", f"may have at most {ITEMS_MAX} items")
    return document


async def _place_list(
    queue: OrderBatcher, documents: Sequence[object], give_up_at: float, settings: Settings, proofs: PriceProofs
) -> list[Outcome]:
    """One outcome for each document; what is no priced order is refused before the others go to the ledger together."""
    records: dict[uuid.UUID, PriceRecord] = {}
    quote_of = quote_reader(settings)
    # Found so by this service's clock and settings, which prove nothing of an item that was sent before.
    unproven: set[object] = set()
    read: list[PricedOrder | Refused] = []
    now = utc_now()
    for document in documents:
        try:
            item = priced_order_from(document, records, quote_of)
            _require_plausible_deadline(item, settings, now)
            if why := _unproven(item.price, settings, now):
                # A repeat is answered all the same.
                unproven.add(why)
                proofs.note_refusal(why)
                item = price_order(item.order, why, item.deadline)
            elif isinstance(item.price, PriceRecord):
                proofs.note_proven()
            read.append(item)
        except (InvalidRequest, ClockSkewed) as error:
            read.append(Refused(error))
    waiting = queue.put([each for each in read if isinstance(each, PricedOrder)], give_up_at)
    outcomes = iter([await each.outcome for each in waiting])
    settled = [each if isinstance(each, Refused) else next(outcomes) for each in read]
    return [
        Refused(each.problem) if isinstance(each, Refused) and each.problem in unproven else each for each in settled
    ]


def _require_plausible_deadline(item: PricedOrder, settings: Settings, now: datetime) -> None:
    """Raises ClockSkewed for a deadline that no edge of this desk gives whose clock agrees with ours."""
    seconds_max = settings.order_seconds_max + 2 * settings.clock_skew_seconds_max
    if item.deadline > now + timedelta(seconds=seconds_max):
        ahead = (item.deadline - now).total_seconds() - settings.order_seconds_max
        detail = f"The clocks differ: by db_proxy's clock this order comes from {ahead:.0f} s ahead, or less."
        raise ClockSkewed(detail, retry_after_seconds=RETRY_AFTER_SECONDS)


def _unproven(
    price: PriceRecord | OrderQuote | DeskError, settings: Settings, now: datetime
) -> PriceUnavailable | None:
    """The problem with a price that this desk would never have published."""
    if isinstance(price, PriceRecord):
        try:
            require_proven(price, settings, now)
        except WrongMember as error:
            detail = f"The ledger does not take this price record: {error}."
            return PriceUnavailable(detail, retry_after_seconds=RETRY_AFTER_SECONDS)
    return None


def _add_reads(app: Service, ledger: OrderLedger, settings: Settings) -> None:
    pages = PageReader(ledger, settings)
    may_read, may_place = tokens(settings.reading_tokens), tokens(settings.placing_tokens)

    async def get(request: Request) -> Response:
        anchor, page_size = read_list(request)
        _, documents = await pages.read(request.caller.client, anchor, page_size, order_document)
        return MsgspecResponse(documents)

    async def page(request: Request) -> Response:
        require_token(request, may_read)
        return MsgspecResponse(page_document(*await pages.read(*read_page(request), stored_document)))

    async def order(request: Request) -> Response:
        require_token(request, may_read)
        client = read_client(request)
        return MsgspecResponse(stored_document(await ledger.order(id_of(request, "order_id"), client)))

    async def order_by_key(request: Request) -> Response:
        require_token(request, may_read)
        return MsgspecResponse(stored_document(await ledger.order_by_key(*read_key(request))))

    async def exposure(request: Request) -> Response:
        require_token(request, may_read)
        return MsgspecResponse(exposure_document(await ledger.exposure(read_client(request))))

    async def keep_price(request: Request) -> Response:
        require_token(request, may_place)
        require_json(request)
        price_id = id_of(request, "price_id")
        with wrong_members_named():
            record = record_from(decode_body(await request.body(RECORD_BYTES_MAX)))
        if record.id != price_id:
            raise InvalidRequest.of("id", "is not that of the path")
        if why := _unproven(record, settings, utc_now()):
            raise why
        await ledger.keep_price(record)
        return MsgspecResponse({"id": record.id})

    async def price(request: Request) -> Response:
        require_token(request, may_read)
        read_query(request)
        return MsgspecResponse(record_document(await ledger.price_record(id_of(request, "price_id"))))

    app.add_direct_route("/get/", "GET", get, LIST, needs="orders:read", counted="reads")
    app.add_direct_route("/page", "GET", page, PAGE)
    app.add_direct_route("/order", "GET", order_by_key, ORDER_BY_KEY)
    app.add_direct_route("/order/{order_id}", "GET", order, ORDER)
    app.add_direct_route("/exposure", "GET", exposure, EXPOSURE)
    app.add_direct_route("/price/{price_id}", "GET", price, PRICE)
    app.add_direct_route("/price/{price_id}", "PUT", keep_price, KEEP_PRICE)


def _add_life(app: Service, life: OrderLife, settings: Settings) -> None:
    may_process = tokens(settings.processing_tokens)

    async def close(request: Request) -> Response:
        require_token(request, may_process)
        require_json(request)
        with wrong_members_named():
            closings = closings_from(decode_body(await request.body()))
        return MsgspecResponse([result_document(each) for each in await life.close_orders(closings)])

    async def accepted(request: Request) -> Response:
        require_token(request, may_process)
        return MsgspecResponse(accepted_document(await life.accepted(*read_accepted(request))))

    async def events(request: Request) -> Response:
        require_token(request, may_process)
        return MsgspecResponse(event_documents(await life.events(*read_after(request))))

    async def last_events(request: Request) -> Response:
        require_token(request, may_process)
        require_json(request)
        with wrong_members_named():
            clients = clients_from(decode_body(await request.body(LIST_BYTES_MAX)))
        return MsgspecResponse(last_events_document(await life.last_events(clients)))

    app.add_direct_route("/closings", "POST", close, CLOSE)
    app.add_direct_route("/accepted", "GET", accepted, ACCEPTED)
    app.add_direct_route("/events", "GET", events, EVENTS)
    app.add_direct_route("/events/last", "POST", last_events, LAST_EVENTS)


_REFUSED = Refused(ExposureCapExceeded("Only 0.00100000 BTC can still be sold."))
_ADD_OPERATION = operation(
    "Settle one item or a list of items",
    ("One result each", [outcome_document(outcome) for outcome in (Placed(EXAMPLE_ORDER), _REFUSED)]),
    errors=(Overloaded,),
    description="Each item is an order with its price record (or the id of one that an earlier item brought) or with "
    "its price problem. The answer has one result each, in order: placed, replayed or refused.",
    tag="internal",
    body={
        "schema": {"type": ["object", "array"], "maxItems": ITEMS_MAX},
        "example": msgspec.to_builtins(priced_order_documents([EXAMPLE_PRICED_ORDER])),
    },
    is_internal=True,
)
