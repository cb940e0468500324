"""api_cache_proxy: the price, for the other services and for clients, and counts of requests for the other services.
The only service that uses the stores of both."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import timedelta

from fastapi import Response

from buydesk.clients.rates import RateStore
from buydesk.errors import DeskError, NotFound, PriceStale, PriceUnavailable, PriceUnsettled
from buydesk.http.app import Service, service_app
from buydesk.http.members import read_query
from buydesk.http.prices import (
    GET_CURRENTPRICE,
    GET_CURRENTPRICE_OF,
    GET_HISTORY,
    GET_RECORD,
    GET_SOURCES,
    MINUTES,
    POINTS,
    POST_RECORD,
    POST_SOURCES,
    RECORD_BYTES_MAX,
    TTL,
    parse_record,
    parse_state,
)
from buydesk.http.rates import add_rate_routes
from buydesk.http.requests import Request, require_json, require_token
from buydesk.http.responses import MsgspecResponse
from buydesk.limits import in_slices
from buydesk.money import Currency
from buydesk.observability.reporter import Reporter
from buydesk.prices.coindesk import CODES, currentprice, currentprice_of, require_rates
from buydesk.prices.documents import document_of, record_document
from buydesk.prices.model import PriceRecord, PriceStore, seconds_to_next_tick
from buydesk.settings.model import Settings
from buydesk.settings.types import tokens
from buydesk.times import CLOCK, Clock

STATE_BYTES_MAX = 64 * 1024
# Nothing on the way may keep a price for longer than it is valid; browsers may read it from any page, as CoinDesk's.
_PRICE_HEADERS = {"Cache-Control": "no-store", "Access-Control-Allow-Origin": "*"}


def create_app(
    settings: Settings, store: PriceStore, rates: RateStore, reporter: Reporter, clock: Clock = CLOCK
) -> Service:
    """The service over prices and counts of requests. Its caller closes their stores."""

    app = service_app("api_cache_proxy", "The price of a bitcoin", {"prices": store.check}, reporter)
    accepted = tokens(settings.publishing_tokens)

    async def history(request: Request) -> Response:
        found = await store.history(**read_query(request, MINUTES, POINTS))
        return MsgspecResponse({"data": await in_slices(document_of, found)}, headers=_PRICE_HEADERS)

    async def sources(request: Request) -> Response:
        read_query(request)
        return MsgspecResponse(document_of(await store.feed_status()), headers=_PRICE_HEADERS)

    async def add(request: Request) -> Response:
        require_token(request, accepted)
        require_json(request)
        ttl_seconds = read_query(request, TTL)["ttl"]
        new = parse_record(await request.body(RECORD_BYTES_MAX), settings, clock.now())
        if ttl_seconds is not None:
            new = new.shortened(timedelta(seconds=ttl_seconds), clock.now())
        return MsgspecResponse(record_document(await store.publish(new)))

    async def put_sources(request: Request) -> Response:
        require_token(request, accepted)
        require_json(request)
        read_query(request)
        state = parse_state(await request.body(STATE_BYTES_MAX), settings, clock.now())
        await store.put_feed_status(state)
        return MsgspecResponse(document_of(state))

    _add_prices(app, store, settings, clock)
    app.add_direct_route("/history", "GET", history, GET_HISTORY)
    app.add_direct_route("/add/", "POST", add, POST_RECORD)
    app.add_direct_route("/sources/", "GET", sources, GET_SOURCES)
    app.add_direct_route("/sources/", "POST", put_sources, POST_SOURCES)
    add_rate_routes(app, rates, settings)
    return app


def _add_prices(app: Service, store: PriceStore, settings: Settings, clock: Clock) -> None:
    @asynccontextmanager
    async def latest_price() -> AsyncIterator[PriceRecord]:
        """The current record. Whoever is refused for the lack of a price is asked to come back after the next tick."""
        try:
            yield await store.latest()
        except (PriceUnavailable, PriceStale, PriceUnsettled) as problem:
            with suppress(DeskError):  # the sources have no status yet, or it cannot be asked for
                ticked_at = (await store.feed_status()).at
                interval_seconds = settings.feed_interval_seconds
                problem.retry_after_seconds = seconds_to_next_tick(ticked_at, interval_seconds, clock.now())
            raise

    async def record(_: Request) -> Response:
        async with latest_price() as latest:
            document = record_document(latest)
            if not latest.rates_e8:  # the other services learn of it by the record
                problem = latest.unsettled_problem(latest.unsettled)
                problem.facts["record"] = document
                raise problem
            if latest.rates_e8.keys() >= CODES:
                document |= currentprice(latest)
            return MsgspecResponse(document, headers=_PRICE_HEADERS)

    async def coindesk(_: Request) -> Response:
        async with latest_price() as latest:
            require_rates(latest)
            return MsgspecResponse(currentprice(latest), headers=_PRICE_HEADERS)

    async def coindesk_of(request: Request) -> Response:
        code = request.parameter.upper()
        if code not in CODES:
            raise NotFound(f"There are prices in {', '.join(sorted(CODES))} only.")
        async with latest_price() as latest:
            require_rates(latest, (Currency.USD, Currency(code)))
            return MsgspecResponse(currentprice_of(latest, Currency(code)), headers=_PRICE_HEADERS)

    app.add_direct_route("/record", "GET", record, GET_RECORD)
    app.add_direct_route("/v1/bpi/currentprice.json", "GET", coindesk, GET_CURRENTPRICE)
    app.add_direct_route("/v1/bpi/currentprice/{code}.json", "GET", coindesk_of, GET_CURRENTPRICE_OF)
