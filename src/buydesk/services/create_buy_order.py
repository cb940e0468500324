"""create_buy_order: takes clients' orders, prices them, has them placed, and answers once they are on disk."""

import asyncio
import json
import logging
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Any

import msgspec
from fastapi import FastAPI, Response

from buydesk.errors import (
    DeskError,
    ExposureCapExceeded,
    IdempotencyKeyReused,
    InvalidRequest,
    LedgerUnavailable,
    OutcomeUnknown,
    Overloaded,
    PayloadTooLarge,
    PriceStale,
    PriceStoreUnavailable,
    PriceUnavailable,
    RequestTimeout,
    UnsupportedMediaType,
)
from buydesk.http import app as web
from buydesk.http.openapi import answer, problems
from buydesk.http.requests import Request, require_json, require_utf8, single_parameters
from buydesk.http.responses import Answer, encode
from buydesk.money import Currency, parse_amount, parse_currency
from buydesk.observability.reporter import Reporter
from buydesk.orders.batching import OrderBatcher, PendingOrder
from buydesk.orders.documents import EXAMPLE_ORDER
from buydesk.orders.model import (
    ANONYMOUS,
    KEY_CHARS_MAX,
    NewOrder,
    Order,
    OrderDocument,
    OrderLedger,
    Placement,
    Refused,
    new_order_id,
    order_document,
    parse_key,
)
from buydesk.orders.verification import require_proven
from buydesk.prices.model import RETRY_AFTER_SECONDS, NotARecord, PriceRecord, PriceStore, stale
from buydesk.settings import Settings
from buydesk.times import format_time, utc_now

NAME = "create_buy_order"
FIRST_PRICE_SECONDS_MAX = 5.0
_FIRST_PRICE_PAUSE_SECONDS = 0.05
_MEMBERS = dict.fromkeys(("currency", "amount", "client_order_id")).keys()
# However it is spelt, and whatever stands around it.
_MEANT_AS_KEY = re.compile(r"in?demp|clientorderid")

logger = logging.getLogger(f"buydesk.services.{NAME}")


class PriceCache:
    """The price this service sells at: looked up every second, its validity counted down on a monotonic clock.

    Once a record is at hand, nothing makes it valid for longer: not a wall clock that steps back, and not the store.
    """

    def __init__(
        self,
        store: PriceStore,
        settings: Settings,
        now: Callable[[], datetime] = utc_now,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._settings = settings
        self._now = now
        self._monotonic = monotonic
        self._record: PriceRecord | None = None
        self._usable_until = 0.0
        self._problem: DeskError = PriceUnavailable("No price has been looked up yet.", retry_after_seconds=1)

    def current(self) -> PriceRecord | DeskError:
        """The record to price with now or, when there is none, why."""
        if self._record is None:
            return self._problem
        if self._monotonic() < self._usable_until:
            return self._record
        return stale(self._record.as_of, self._record.expires_at)

    async def refresh(self) -> None:
        """Fetches the record once. What is at hand stays so until its own end, unless the store says that this came."""
        started = self._monotonic()
        try:
            record = await self._store.latest()
        except DeskError as error:
            self._problem = _as_price_problem(error)
            if isinstance(error, PriceStale) and self._has_seen(error.facts.get("as_of")):
                self._usable_until = started
            return
        now = self._now()
        try:
            require_proven(record, self._settings, now)
        except NotARecord as error:
            detail = f"The price store holds what is no price of this desk: {error}."
            self._problem = PriceUnavailable(detail, retry_after_seconds=RETRY_AFTER_SECONDS)
            return
        usable_until = started + (record.expires_at - now).total_seconds()
        if self._record is not None and self._record.id == record.id:
            usable_until = min(usable_until, self._usable_until)
        self._record, self._usable_until = record, usable_until

    def _has_seen(self, as_of: object) -> bool:
        """Whether a record that was observed then is the one at hand, or a later one."""
        return self._record is not None and str(as_of) >= format_time(self._record.as_of)

    async def wait_for_first(self, seconds_max: float) -> None:
        """Returns once a price is at hand or the store says that the sources prove none, or after so many seconds."""
        give_up_at = self._monotonic() + seconds_max
        await self.refresh()
        while isinstance(self.current(), DeskError) and self._monotonic() < give_up_at:
            try:
                if (await self._store.feed_status()).problem:
                    return
            except DeskError:  # there is no status yet
                pass
            await asyncio.sleep(_FIRST_PRICE_PAUSE_SECONDS)
            await self.refresh()

    async def refresh_forever(self) -> None:
        """Refreshes for as long as the service runs."""
        while True:
            try:
                await self.refresh()
            except Exception:  # a fault of one look must not end all later ones: orders would stop for good
                logger.exception("the price could not be looked up")
            await asyncio.sleep(self._settings.price_refresh_seconds)

    async def check(self) -> None:
        """Raises what stands in the way of pricing an order now."""
        price = self.current()
        if isinstance(price, DeskError):
            raise price


def create_app(settings: Settings, ledger: OrderLedger, store: PriceStore, reporter: Reporter) -> web.Service:
    """The service over a ledger and a price store."""
    price = PriceCache(store, settings)
    queue = OrderBatcher(ledger, settings, NAME, pipelined=True)
    seconds_max = settings.order_seconds_max
    storable_for = timedelta(seconds=seconds_max + settings.clock_skew_seconds_max)
    orders_url = f"{settings.url('fetch_buy_orders')}/get_orders/"

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        # A client that comes while the desk starts had better wait for it than be refused for want of a price.
        await price.wait_for_first(FIRST_PRICE_SECONDS_MAX)
        refreshing = asyncio.create_task(price.refresh_forever())
        async with queue:
            yield
        refreshing.cancel()

    async def place_order(request: Request) -> Response:
        """The order of a request, placed: 201, or what refused it as a problem."""
        order = await read_order(request)
        if order.client_order_id is None and settings.idempotency_keys_required:
            raise InvalidRequest.of("Idempotency-Key", "is missing, and this desk takes no order without one")
        give_up_at = time.monotonic() + seconds_max
        placement = Placement(order, price.current(), utc_now() + storable_for)
        [waiting] = queue.put([placement], give_up_at)
        outcome = await waiting.outcome
        if isinstance(outcome, Refused) and _expired_on_the_way(waiting, outcome.problem, placement):
            again = msgspec.structs.replace(placement, price=price.current())
            if again.price != placement.price:
                [waiting] = queue.put([again], give_up_at)
                outcome = await waiting.outcome
        if isinstance(outcome, Refused):
            raise outcome.problem
        return created(outcome.order, orders_url, is_replay=outcome.order.id != order.id)

    app = web.service_app(
        NAME,
        "Place buy orders: POST /place_order/",
        {"ledger": ledger.check, "price": price.check},
        reporter,
        lifespan,
    )
    app.add_direct_route("/place_order/", "POST", place_order, _OPERATION)
    return app


async def read_order(request: Request) -> NewOrder:
    """The order a request asks for, from its query or from its JSON body, under a fresh id.

    Raises PayloadTooLarge, UnsupportedMediaType and InvalidRequest, which names every member that is wrong.
    """
    body = await request.body()
    if request.query:
        if body:
            raise InvalidRequest.of("body", "must be empty when the order is in the query")
        members: dict[str, object] = dict(single_parameters(request, _MEMBERS))
    else:
        if body or "content-type" in request.headers:
            require_json(request)
        members = _members(body)
    reasons: list[tuple[str, str]] = []
    currency = _read(members, "currency", _currency, reasons)
    amount_cents = _read(members, "amount", _amount_cents, reasons)
    key = _read(members, "client_order_id", _key, reasons) if members.get("client_order_id") is not None else None
    header_key = _header_key(request, reasons)
    wrong_names = misspelt_keys(request.headers)
    reasons += [(name, "is not read: the header for a key is Idempotency-Key") for name in wrong_names]
    if key is not None and header_key is not None and key != header_key and not reasons:
        reasons.append(("client_order_id", "differs from the Idempotency-Key header"))
    if not members.keys() <= _MEMBERS:
        reasons += [(name, "is not a member of an order") for name in members if name not in _MEMBERS]
    if reasons:
        raise InvalidRequest.of_all(reasons)
    return NewOrder(new_order_id(), ANONYMOUS, key if key is not None else header_key, currency, amount_cents)


def _read(
    members: Mapping[str, object], member: str, reader: Callable[[object], Any], reasons: list[tuple[str, str]]
) -> Any:
    """The member through its reader, or one more reason."""
    try:
        if member not in members:
            raise ValueError("is missing")
        return reader(members[member])
    except ValueError as error:
        reasons.append((member, str(error)))


class _Number(str):
    """A JSON number, kept as it was written: it must never pass through a float."""

    __slots__ = ()


def _distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise InvalidRequest.of_all([(name, "is given more than once") for name in counts if counts[name] > 1])
    return members


def _no_number(name: str) -> object:
    raise InvalidRequest.of("body", f"is not JSON: {name} is no JSON number")


_JSON = json.JSONDecoder(object_pairs_hook=_distinct, parse_float=_Number, parse_int=_Number, parse_constant=_no_number)


def _members(body: bytes) -> dict[str, object]:
    if not body:
        raise InvalidRequest.of("body", 'is empty; send {"currency": "EUR", "amount": "69.00"} or use the query')

    require_utf8(body)
    try:
        document = _JSON.decode(body.decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InvalidRequest.of("body", f"is not JSON: {error}"[:200]) from error
    except RecursionError as error:
        raise InvalidRequest.of("body", "is nested too deeply") from error
    if not isinstance(document, dict):
        raise InvalidRequest.of("body", "must be a JSON object")
    return document


def _currency(value: object) -> Currency:
    return parse_currency(value if isinstance(value, str) else "")


def _amount_cents(value: object) -> int:
    if not isinstance(value, str):
        raise ValueError("must be a number, or a number as text")
    return parse_amount(value)


def _key(value: object) -> str:
    if not isinstance(value, str) or isinstance(value, _Number):
        raise ValueError("must be text")
    return parse_key(value)


def _header_key(request: Request, reasons: list[tuple[str, str]]) -> str | None:
    """The Idempotency-Key header, bare or as the quoted string of RFC 8941, in which \\ stands before " and \\."""
    if "idempotency-key" not in request.headers:
        return None
    values = request.headers.get_all("idempotency-key")
    text = values[0]
    if len(text) > 1 and text[0] == text[-1] == '"':
        text = re.sub(r'\\(["\\])', r"\1", text[1:-1])
    try:
        if len(values) > 1:
            raise ValueError("is given more than once")
        return parse_key(text)
    except ValueError as error:
        reasons.append(("Idempotency-Key", str(error)))
        return None


def misspelt_keys(headers: Iterable[str]) -> list[str]:
    """Those of the names, in lower case, that are meant to be a key's header and are not: unread, they would let a
    request that is sent again buy again."""
    return [
        name
        for name in headers
        if ("dem" in name or "order" in name)  # most have neither, which is quicker to see
        and name != "idempotency-key"
        and _MEANT_AS_KEY.search(name.replace("-", "").replace("_", ""))
    ]


def _expired_on_the_way(waiting: PendingOrder, problem: DeskError, placement: Placement) -> bool:
    """Whether the ledger refused the price for its age, and the order may be priced anew: not after a lost answer."""
    return isinstance(problem, PriceStale) and isinstance(placement.price, PriceRecord) and not waiting.resent


def _as_price_problem(error: DeskError) -> DeskError:
    if isinstance(error, PriceStoreUnavailable):
        return PriceUnavailable(error.detail, retry_after_seconds=error.retry_after_seconds)
    return error


class PlacedDocument(msgspec.Struct, frozen=True, gc=False):
    """The body of a 201."""

    data: str
    order: OrderDocument


def created(order: Order, orders_url: str, *, is_replay: bool) -> Response:
    """The 201 of an order, which can be read below `orders_url`."""
    shown = order_document(order)
    headers = [(b"location", f"{orders_url}{order.id}".encode())]
    if is_replay:
        headers.append((b"idempotent-replayed", b"true"))
    return Answer(encode(PlacedDocument(f"Order was placed for {shown.currency}:{shown.amount}", shown)), 201, headers)


_EXAMPLE = PlacedDocument("Order was placed for EUR:69.00", order_document(EXAMPLE_ORDER))
_KEY_SCHEMA = {"type": "string", "pattern": f"^[!-~]{{1,{KEY_CHARS_MAX}}}$"}
_AMOUNT = "0 < amount < 1,000,000,000, a whole number of cents."
_AMOUNT_TEXT_SCHEMA = {
    "type": "string",
    "pattern": r"^([1-9][0-9]{0,8}(\.[0-9]{1,2})?|0\.(0[1-9]|[1-9][0-9]?))$",
    "description": f"{_AMOUNT} Any other JSON number of this value in at most 32 characters will do too.",
    "examples": ["69.00"],
}
_AMOUNT_SCHEMA = {
    "description": _AMOUNT,
    "oneOf": [
        {"type": "number", "minimum": 0.01, "exclusiveMaximum": 1_000_000_000, "multipleOf": 0.01},
        _AMOUNT_TEXT_SCHEMA,
    ],
    "examples": ["69.00"],
}
_CURRENCY_SCHEMA = {
    "type": "string",
    "pattern": "^([Ee][Uu][Rr]|[Gg][Bb]P|g[Bb]p|Gbp|[Uu][Ss][Dd])$",
    "description": "EUR, GBP or USD, in any letter case; but `GBp`, which means pence elsewhere, is refused.",
    "examples": ["EUR"],
}
_OPERATION = {
    "tags": ["orders"],
    "summary": "Place a buy order",
    "description": "By query or by JSON body. With a key (header or `client_order_id`) it may be sent again without "
    "harm: the same request gives the same answer, and is placed once.",
    "parameters": [
        {"name": "currency", "in": "query", "schema": _CURRENCY_SCHEMA},
        {"name": "amount", "in": "query", "schema": _AMOUNT_TEXT_SCHEMA, "example": "69"},
        {"name": "client_order_id", "in": "query", "schema": _KEY_SCHEMA},
        {"name": "Idempotency-Key", "in": "header", "schema": _KEY_SCHEMA},
    ],
    "requestBody": {
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["currency", "amount"],
                    "additionalProperties": False,
                    "properties": {
                        "currency": _CURRENCY_SCHEMA,
                        "amount": _AMOUNT_SCHEMA,
                        "client_order_id": _KEY_SCHEMA | {"type": ["string", "null"]},
                    },
                },
                "example": {"currency": "USD", "amount": 600},
            }
        }
    },
    "responses": answer("The order is stored, on disk.", _EXAMPLE, 201)
    | problems(
        InvalidRequest,
        IdempotencyKeyReused,
        PayloadTooLarge,
        UnsupportedMediaType,
        RequestTimeout,
        ExposureCapExceeded,
        PriceUnavailable,
        PriceStale,
        LedgerUnavailable,
        Overloaded,
        OutcomeUnknown,
    ),
}
