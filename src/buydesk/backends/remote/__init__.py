"""The ports over HTTP: each calls the service that owns the part, and raises the errors that service answered with.

Reads that get no answer raise the port's "unavailable" error. Placing tells apart what was certainly not stored from
what may have been.
"""

import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, TypeVar

import aiohttp
import msgspec

from buydesk.errors import (
    DeskError,
    InternalError,
    InvalidRequest,
    LedgerUnavailable,
    MethodNotAllowed,
    NotFound,
    NotReady,
    OutcomeUnknown,
    Overloaded,
    PayloadTooLarge,
    PriceStoreUnavailable,
    PriceUnsettled,
    Unauthorized,
    UnsupportedMediaType,
    rebuild,
)
from buydesk.limits import Bulkhead, SharedCheck
from buydesk.money import Currency
from buydesk.observability import request_ids
from buydesk.observability.clock_skew import ClockMonitor
from buydesk.orders.documents import exposure_from, order_from, outcome_from, page_from, priced_order_documents
from buydesk.orders.life import AcceptedOrders, Closing, Event, OrderLife
from buydesk.orders.life_documents import accepted_from, closing_documents, events_from, last_events_from, result_from
from buydesk.orders.model import (
    Anchor,
    Exposure,
    Order,
    OrderLedger,
    Outcome,
    Page,
    PageBefore,
    PageFrom,
    PricedOrder,
    Refused,
)
from buydesk.prices.anchor_documents import anchors_document, anchors_from
from buydesk.prices.anchors import Anchor as PriceAnchor
from buydesk.prices.anchors import AnchorStore, Confirmation
from buydesk.prices.documents import document_of, feed_status_from, point_from, record_document, record_from
from buydesk.prices.model import FeedStatus, PricePoint, PriceRecord, PriceStore
from buydesk.reading import read
from buydesk.settings.model import Settings
from buydesk.settings.types import tokens

T = TypeVar("T")

_log = logging.getLogger(__name__)
# Connections that reads leave to orders, reports and checks.
_KEPT_FREE = 4
_NEVER_SENT = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError, aiohttp.InvalidURL)
# Between our own services these are faults of the desk (another token, another version), not the client's.
_MISUNDERSTOOD = (Unauthorized, NotFound, MethodNotAllowed)
_CUT = (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, aiohttp.ClientPayloadError)
# Nothing came, or what reading the answer of another program raises.
_NO_ANSWER = (
    *(aiohttp.ClientError, TimeoutError),
    *(ValueError, LookupError, TypeError, AttributeError, RecursionError),
)


class RemoteService:
    """Pooled keep-alive HTTP to one service; `clocks` hear what time it is there.

    Clients read what went wrong: the service is named there, and where it is stands in the log, at debug.
    """

    service: ClassVar[str]
    # What it means when no answer of the service's own comes back.
    unavailable: ClassVar[type[DeskError]]
    # The settings whose first token is shown, by method.
    tokens: ClassVar[Mapping[str, str]]

    def __init__(self, url: str, settings: Settings, clocks: ClockMonitor | None = None) -> None:
        self._url = url
        self._settings = settings
        self._clocks = clocks or ClockMonitor("this process", settings.clock_skew_seconds_max)
        self._session: aiohttp.ClientSession | None = None
        self._bulkhead = Bulkhead(
            settings.remote_connections_max - _KEPT_FREE, settings.reads_waiting_max, settings.read_wait_seconds_max
        )
        self._shared_check = SharedCheck(self._check)

    def session(self) -> aiohttp.ClientSession:
        """The pool; made at the first call, because it belongs to the running loop."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=self._settings.remote_connections_max),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"Content-Type": "application/json"},
                auto_decompress=False,
            )
        return self._session

    async def call(
        self,
        path: str,
        *,
        body: object = None,
        method: str = "POST",
        timeout_seconds: float,
        shows_token: bool = True,
        **query: str | int,
    ) -> Any:
        """The JSON of a 200, by GET if there is no body; raises the error that a problem document names.

        Raises aiohttp.ClientError or TimeoutError when there is no answer and ValueError when it is not one of ours.
        """
        method, data = ("GET", None) if body is None else (method, msgspec.json.encode(body))
        headers = {}
        if shows_token and (token := self.token(method)) is not None:
            headers["Authorization"] = f"Bearer {token}"
        if (request_id := request_ids.current()) is not None:
            headers[request_ids.NAME] = request_id
        timeout = aiohttp.ClientTimeout(total=timeout_seconds, sock_connect=self._settings.connect_seconds_max)
        asked_at = self._clocks.moment()
        async with self.session().request(
            method, self._url + path, data=data, params=query, headers=headers, timeout=timeout, allow_redirects=False
        ) as response:
            self._clocks.hear_date(self.service, response.headers.get("Date"), asked_at)
            document = msgspec.json.decode(await response.read())
            if response.status == 200:
                return document
            if not isinstance(document, dict) or "code" not in document:
                raise ValueError(f"{self.service} answered {response.status} and no problem document")
            retry_after = response.headers.get("Retry-After", "")
            error = rebuild(document, int(retry_after) if retry_after.isdecimal() else None)
            raise self._misunderstood(error) if isinstance(error, _MISUNDERSTOOD) else error

    def token(self, method: str) -> str | None:
        """What is shown with a call by this method."""
        return tokens(getattr(self._settings, self.tokens[method]))[0] if method in self.tokens else None

    def _misunderstood(self, error: DeskError) -> DeskError:
        return self.unavailable(f"{self.service} answered {error.code}: {error.detail}", retry_after_seconds=1)

    async def read(self, shape: Callable[[Any], T], path: str, **asked: Any) -> T:
        """As `ask`, of a read; raises Overloaded when too many wait for a connection."""
        async with self._bulkhead:
            return await self.ask(shape, path, **asked)

    async def ask(self, shape: Callable[[Any], T], path: str, **asked: Any) -> T:
        """What `shape` makes of the answer to a `call` that may be repeated without harm: it is, on a fresh connection,
        when a kept one turns out to be cut."""
        call = partial(self.call, path, timeout_seconds=self._settings.remote_seconds_max, **asked)
        try:
            try:
                document = await call()
            except _CUT:
                document = await call()
            return shape(document)
        except _NO_ANSWER as error:
            raise self._without_answer(error, self.unavailable) from error

    async def ask_once(self, shape: Callable[[Any], T], path: str, **asked: Any) -> T:
        """What `shape` makes of the answer to a `call` that does something; raises OutcomeUnknown without one."""
        try:
            return shape(await self.call(path, timeout_seconds=self._settings.remote_seconds_max, **asked))
        except _NEVER_SENT as error:
            raise self._without_answer(error, self.unavailable) from error
        except _NO_ANSWER as error:
            raise self._without_answer(error, OutcomeUnknown) from error

    def _without_answer(self, error: Exception, kind: type[DeskError]) -> DeskError:
        _log.debug("%s at %s gave no answer: %s", self.service, self._url, error)
        return kind(f"{self.service} gave no answer ({type(error).__name__}).", retry_after_seconds=1)

    async def check(self) -> None:
        """Raises the "unavailable" error unless the service says that it is ready."""
        await self._shared_check()

    async def _check(self) -> None:
        try:
            await self.ask(_whatever, "/readyz")
        except NotReady as error:
            raise self.unavailable(_whys(error), retry_after_seconds=1) from error
        except DeskError as error:
            raise self.unavailable(error.detail, retry_after_seconds=1) from error

    async def close(self) -> None:
        """Closes the pool."""
        if self._session is not None:
            await self._session.close()


class RemoteLedger(RemoteService, OrderLedger):
    """The ledger at db_proxy."""

    service = "db_proxy"
    unavailable = LedgerUnavailable
    tokens: ClassVar = {"GET": "reading_tokens", "POST": "placing_tokens", "PUT": "placing_tokens"}
    # While db_proxy's database has one batch, the next one is on its way.
    batches_at_once = 2

    def __init__(self, url: str, settings: Settings, clocks: ClockMonitor | None = None) -> None:
        super().__init__(url, settings, clocks)
        # Twice what db_proxy's database needs: db_proxy keeps a share for itself, and may have a batch before ours.
        self.place_seconds = 2 * min(settings.statement_seconds_max, settings.order_seconds_max / 4)

    async def place(self, items: Sequence[PricedOrder], timeout_seconds: float) -> Sequence[Outcome]:
        """Only a connection that was never made, or an error that says so, proves that nothing was stored."""
        try:
            answers = await self.call(
                "/add/",
                body=priced_order_documents(items),
                timeout_seconds=timeout_seconds,
                # db_proxy, which has a clock of its own, is told how long, not until when.
                answer_within_ms=int(timeout_seconds * 1000),
            )
            each = zip(answers, items, strict=True)
            return [self._understood(outcome_from(answer, item), item) for answer, item in each]
        except (InvalidRequest, PayloadTooLarge, UnsupportedMediaType) as error:
            raise self._misunderstood(error) from error
        except _NEVER_SENT as error:
            raise self._without_answer(error, LedgerUnavailable) from error
        except InternalError as error:
            raise OutcomeUnknown(f"{self.service}: {error.detail}") from error
        except _NO_ANSWER as error:
            raise self._without_answer(error, OutcomeUnknown) from error

    def _understood(self, outcome: Outcome, item: PricedOrder) -> Outcome:
        """The outcome; what db_proxy finds wrong with an item is the desk's fault, not its client's. What the ledger
        refuses as such came with the item; an older db_proxy may not know the problem that came, and names none."""
        if not isinstance(outcome, Refused):
            return outcome
        if outcome.by_ledger and isinstance(outcome.problem, InternalError) and isinstance(item.price, DeskError):
            return Refused(item.price, by_ledger=True)
        if isinstance(outcome.problem, InvalidRequest) and not outcome.by_ledger:
            return Refused(self._misunderstood(outcome.problem))
        return outcome

    async def keep_price(self, record: PriceRecord) -> None:
        """Asked for once more after a lost answer, which is harmless."""
        try:
            await self.read(
                lambda kept: _require_same(kept["id"], str(record.id)),
                f"/price/{record.id}",
                method="PUT",
                body=record_document(record),
            )
        except (InvalidRequest, PayloadTooLarge, UnsupportedMediaType) as error:
            raise self._misunderstood(error) from error

    async def page(self, client: str | None, anchor: Anchor, page_size: int) -> Page:
        if isinstance(anchor, PageFrom):
            query = {"start": anchor.start}
        else:
            query = {"before" if isinstance(anchor, PageBefore) else "after": anchor.number}
        return await self.read(page_from, "/page", page_size=page_size, **query, **_of(client))

    async def order(self, order_id: uuid.UUID, client: str | None) -> Order:
        return await self.read(order_from, f"/order/{order_id}", **_of(client))

    async def order_by_key(self, client: str, client_order_id: str) -> Order:
        return await self.read(order_from, "/order", client=client, client_order_id=client_order_id)

    async def exposure(self, client: str | None) -> Exposure:
        return await self.read(exposure_from, "/exposure", **_of(client))

    async def price_record(self, price_id: uuid.UUID) -> PriceRecord:
        return await self.read(record_from, f"/price/{price_id}")


class RemoteLife(RemoteService, OrderLife):
    """What becomes of orders, at db_proxy."""

    service = "db_proxy"
    unavailable = LedgerUnavailable
    tokens: ClassVar = dict.fromkeys(("GET", "POST"), "processing_tokens")

    async def close_orders(self, closings: Sequence[Closing]) -> Sequence[Order | DeskError]:
        """A lost answer is asked for once more, which is harmless."""
        if not closings:
            return []
        try:
            return await self._close(closings)
        except OutcomeUnknown as lost:
            try:
                return await self._close(closings)
            except (LedgerUnavailable, Overloaded) as error:
                raise lost from error

    async def _close(self, closings: Sequence[Closing]) -> list[Order | DeskError]:
        def results(answers: Any) -> list[Order | DeskError]:
            return [result_from(answer) for _, answer in zip(closings, answers, strict=True)]

        try:
            return await self.ask_once(results, "/closings", body=closing_documents(closings))
        except (InvalidRequest, PayloadTooLarge, UnsupportedMediaType) as error:
            raise self._misunderstood(error) from error

    async def accepted(self, after: int, limit: int) -> AcceptedOrders:
        return await self.read(accepted_from, "/accepted", after=after, limit=limit)

    async def events(self, client: str | None, after: int, limit: int) -> Sequence[Event]:
        return await self.read(events_from, "/events", after=after, limit=limit, **_of(client))

    async def last_events(self, clients: Sequence[str]) -> Mapping[str | None, int]:
        return await self.read(last_events_from, "/events/last", body={"clients": clients})


class RemoteAnchorStore(RemoteService, AnchorStore):
    """The anchors at db_proxy."""

    service = "db_proxy"
    unavailable = LedgerUnavailable
    tokens: ClassVar = dict.fromkeys(("GET", "POST", "PUT"), "publishing_tokens")

    async def anchors(self) -> Mapping[Currency, PriceAnchor]:
        return await self.read(anchors_from, "/anchors")

    async def keep_anchors(self, anchors: Mapping[Currency, PriceAnchor]) -> None:
        await self.ask(_whatever, "/anchors", body=anchors_document(anchors), method="PUT")

    async def confirmations(self) -> Sequence[Confirmation]:
        return await self.read(
            lambda document: [read(Confirmation, each) for each in document["data"]], "/confirmations"
        )


class RemotePriceStore(RemoteService, PriceStore):
    """The price store at api_cache_proxy."""

    service = "api_cache_proxy"
    unavailable = PriceStoreUnavailable
    tokens: ClassVar = {"POST": "publishing_tokens"}

    async def publish(self, record: PriceRecord) -> PriceRecord:
        """No `ttl` is sent: the record's own `expires_at` travels with it."""
        return await self.ask(record_from, "/add/", body=record_document(record))

    async def latest(self) -> PriceRecord:
        try:
            return await self.read(record_from, "/record")
        except PriceUnsettled as error:  # of a record without any price to sell at
            try:
                return record_from(error.facts.get("record"))
            except ValueError as wrong:
                raise self._without_answer(wrong, self.unavailable) from wrong

    async def history(self, minutes: int, points: int) -> Sequence[PricePoint]:
        return await self.read(
            lambda document: [point_from(each) for each in document["data"]], "/history", minutes=minutes, points=points
        )

    async def put_feed_status(self, state: FeedStatus) -> None:
        await self.ask(_whatever, "/sources/", body=document_of(state))

    async def feed_status(self) -> FeedStatus:
        return await self.read(feed_status_from, "/sources")


def _whys(error: NotReady) -> str:
    """Why the service is not ready, as its own /readyz says for each thing that it misses."""
    missing = error.facts.get("missing")
    whys = [str(each["why"]) for each in missing if "why" in each] if isinstance(missing, list) else []
    return " ".join(whys) or error.detail


def _of(client: str | None) -> dict[str, str]:
    """The query for what is a client's; of all the desk without one."""
    return {} if client is None else {"client": client}


def _require_same(said: object, expected: object) -> None:
    if said != expected:
        raise ValueError(f"must be {expected}")


def _whatever(document: object) -> object:
    return document
