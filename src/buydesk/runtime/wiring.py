"""Wiring: the only place that knows both services and backends.

One rule makes one process or eight: if the service that owns a port runs in this process, its own backend is used;
otherwise that service is called by HTTP. Nothing else branches.
"""

import asyncio
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from pydantic import SecretStr

from buydesk.backends.endpoints import EndpointSender, allows_loopback
from buydesk.backends.fallback import FallbackPriceStore, FallbackRateStore, FallbackReportStore
from buydesk.backends.memory.prices import MemoryPriceStore
from buydesk.backends.memory.reports import MemoryReportStore
from buydesk.backends.postgres.anchors import PostgresAnchors
from buydesk.backends.postgres.clients import PostgresKeys
from buydesk.backends.postgres.ledger import PostgresLedger
from buydesk.backends.postgres.life import PostgresLife
from buydesk.backends.postgres.refusals import PostgresRefusals
from buydesk.backends.postgres.registry import registry_beside
from buydesk.backends.postgres.webhooks import PostgresWebhooks
from buydesk.backends.remote import RemoteAnchorStore, RemoteLedger, RemoteLife, RemotePriceStore
from buydesk.backends.remote.clients import RemoteKeys
from buydesk.backends.remote.rates import RemoteRateStore
from buydesk.backends.remote.registry import RemoteRefusals, RemoteRegistry
from buydesk.backends.remote.reports import RemoteReportStore
from buydesk.backends.remote.webhooks import RemoteWebhooks
from buydesk.backends.sources import exchanges
from buydesk.backends.sources.sandbox import sandbox_sources
from buydesk.clients.cache import KeyCache
from buydesk.clients.model import KeyStore
from buydesk.clients.rates import RateLimiter, RateStore
from buydesk.clients.registry import Registry, ShownKey
from buydesk.errors import CannotStart, DeskError, WrongMode
from buydesk.events.delivery import Deliverer
from buydesk.events.model import WebhookStore
from buydesk.events.signing import WebhookKeys
from buydesk.http.app import Check, Service
from buydesk.http.webhooks import Webhooks
from buydesk.observability.clock_skew import ClockMonitor
from buydesk.observability.reporter import Reporter, ReportHandler
from buydesk.observability.reports import ReportStore
from buydesk.orders.life import OrderLife
from buydesk.orders.model import OrderLedger
from buydesk.orders.refusals import RefusalReads, RefusalRecorder
from buydesk.prices.anchors import AnchorStore
from buydesk.prices.model import PriceSource, PriceStore
from buydesk.services import (
    api_cache_proxy,
    api_updater,
    create_buy_order,
    db_proxy,
    fetch_buy_orders,
    health_check,
    operate_desk,
    process_buy_orders,
)
from buydesk.settings.model import Settings, variable
from buydesk.settings.types import tokens
from buydesk.topology import SERVICES

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from buydesk.backends.redis.faults import RedisCheck


# How long health_check waits for what time it is elsewhere: much less than a check may take.
_CLOCKS_ASKED_SECONDS = 1.0


class Closeable(Protocol):
    """What holds connections."""

    async def close(self) -> None: ...


class _Ledger(NamedTuple):
    """The ledger, and what is kept in it beside orders."""

    orders: OrderLedger
    life: OrderLife
    anchors: AnchorStore
    keys: KeyStore
    registry: Registry[ShownKey]
    refusals: RefusalReads
    webhooks: WebhookStore


@dataclass(frozen=True)
class WiredServices:
    """The apps of the services that run in this process, and what has to be closed after them, in this order."""

    apps: dict[str, Service]
    reporters: dict[str, Reporter]
    backends: tuple[Closeable, ...]
    ledger: OrderLedger
    require_keys: Check | None  # raises CannotStart when callers would need a key and there is none

    def report_handler(self) -> logging.Handler:
        """Makes reports of what any service of this process logs as wrong."""
        # What no service's own logger says (a database server that died, say) is most likely about the ledger.
        default = "db_proxy" if "db_proxy" in self.reporters else next(iter(self.reporters))
        return ReportHandler(self.reporters, default)

    async def check_mode(self) -> None:
        """Raises CannotStart, everything closed, when this process would write into the other mode's database, or no
        caller could call it."""
        try:
            await self.ledger.check()
            if self.require_keys is not None:
                await self.require_keys()
        except (WrongMode, CannotStart) as error:
            await self.close()
            raise CannotStart(str(error)) from error
        except Exception as error:
            # Not there yet, or not ready: the service starts all the same, and says so at /readyz.
            why = error.for_operators if isinstance(error, DeskError) else type(error).__name__
            logging.getLogger("buydesk").info("the ledger is not ready: %s", why)

    async def close(self) -> None:
        """Closes every connection."""
        for backend in self.backends:
            await backend.close()


def wire(settings: Settings, services: Collection[str] = SERVICES) -> WiredServices:
    """The named services, wired to each other or to where the others are; raises CannotStart for a missing setting."""
    clocks = ClockMonitor(", ".join(services) if len(services) == 1 else "the desk", settings.clock_skew_seconds_max)
    kept = _ledger(settings, clocks, is_own="db_proxy" in services)
    ledger, keys = kept.orders, kept.keys
    cache = KeyCache(keys, settings)
    store = _store(settings, clocks, is_own="api_cache_proxy" in services)
    rate_store = _rate_store(settings, clocks, is_own="api_cache_proxy" in services)
    limiter = RateLimiter(rate_store, settings)
    report_store = _report_store(settings, clocks, is_own="health_check" in services)
    sources = _sources(settings, clocks) if "api_updater" in services else []
    redis_check = _redis_check(settings, clocks) if "health_check" in services else None
    senders = [EndpointSender(settings)] if "process_buy_orders" in services else []
    reporters = {name: Reporter(name, report_store, settings) for name in SERVICES if name in services}

    def app(name: str) -> Service:
        made = makers[name](reporters[name])
        made.keys, made.rates = cache, limiter
        made.checks["clock"] = ask_and_check if name == "health_check" else clocks.check
        return made

    async def ask_and_check() -> None:
        """health_check asks others for nothing else by itself, and would not hear what time it is. One that does not
        answer must not keep health_check's own answer back."""
        asked = (asyncio.wait_for(each.check(), _CLOCKS_ASKED_SECONDS) for each in (ledger, store))
        await asyncio.gather(*asked, return_exceptions=True)
        await clocks.check()

    makers: dict[str, Callable[[Reporter], Service]] = {
        "create_buy_order": lambda reporter: create_buy_order.create_app(settings, ledger, store, reporter),
        "fetch_buy_orders": lambda reporter: fetch_buy_orders.create_app(settings, ledger, reporter, kept.refusals),
        "process_buy_orders": lambda reporter: process_buy_orders.create_app(
            settings, kept.life, ledger.check, reporter, _webhooks(settings, kept, senders[0])
        ),
        "operate_desk": lambda reporter: operate_desk.create_app(kept.registry, kept.refusals, ledger.check, reporter),
        "db_proxy": lambda reporter: _db_proxy(settings, kept, reporter),
        "api_cache_proxy": lambda reporter: api_cache_proxy.create_app(settings, store, rate_store, reporter),
        "api_updater": lambda reporter: api_updater.create_app(
            settings, sources, store, reporter, anchors=kept.anchors
        ),
        "health_check": lambda reporter: health_check.create_app(
            settings, report_store, ledger.check, store, redis_check=redis_check, reporter=reporter
        ),
    }
    checks = [] if redis_check is None else [redis_check]
    ours: tuple[Closeable, ...] = (*kept, *senders, limiter, rate_store, store, report_store)
    backends = (*sources, *ours, *checks)
    require_keys = keys.require_any if settings.access == "keys" and isinstance(keys, PostgresKeys) else None
    return WiredServices({name: app(name) for name in reporters}, reporters, backends, ledger, require_keys)


def _db_proxy(settings: Settings, kept: _Ledger, reporter: Reporter) -> Service:
    assert isinstance(kept.orders, PostgresLedger)  # noqa: S101  # whose process has db_proxy has its own
    assert kept.orders.refusals is not None  # noqa: S101  # `_ledger` has given it
    return db_proxy.create_app(
        settings,
        kept.orders,
        kept.life,
        kept.anchors,
        reporter,
        keys=kept.keys,
        registry=kept.registry,
        refusals=kept.orders.refusals,
        webhooks=kept.webhooks,
    )


def _webhooks(settings: Settings, kept: _Ledger, sender: EndpointSender) -> Webhooks:
    keys = WebhookKeys(tokens(settings.webhook_keys))
    deliverer = Deliverer(kept.webhooks, kept.life, sender, keys)
    return Webhooks(kept.webhooks, kept.life, keys, deliverer, allows_loopback(settings))


def _ledger(settings: Settings, clocks: ClockMonitor, *, is_own: bool) -> _Ledger:
    if not is_own:
        url = settings.url("db_proxy")
        at = (url, settings, clocks)
        life, anchors, registry = RemoteLife(*at), RemoteAnchorStore(*at), RemoteRegistry(*at)
        refused, webhooks = RemoteRefusals(*at), RemoteWebhooks(*at)
        return _Ledger(RemoteLedger(*at), life, anchors, RemoteKeys(*at), registry, refused, webhooks)
    if settings.database_url is None:
        raise CannotStart("DATABASE_URL is missing: db_proxy needs a PostgreSQL database")
    livemode = settings.price_feed == "live"
    ledger = PostgresLedger(settings.database_url.get_secret_value(), settings, livemode, clocks)
    beside = (PostgresLife(ledger), PostgresAnchors(ledger), PostgresKeys(ledger))
    refusals = PostgresRefusals(ledger)
    ledger.refusals = RefusalRecorder(refusals)
    return _Ledger(ledger, *beside, registry_beside(ledger), refusals, PostgresWebhooks(ledger))


def _store(settings: Settings, clocks: ClockMonitor, *, is_own: bool) -> PriceStore:
    if not is_own:
        return RemotePriceStore(settings.url("api_cache_proxy"), settings, clocks)
    if settings.redis_url is None:
        return MemoryPriceStore(settings)
    from buydesk.backends.redis.prices import RedisPriceStore  # noqa: PLC0415  # a tenth of a second and 10 MB

    shared = RedisPriceStore(_redis(settings.redis_url, settings), settings, clocks=clocks)
    return FallbackPriceStore(shared, MemoryPriceStore(settings))


def _rate_store(settings: Settings, clocks: ClockMonitor, *, is_own: bool) -> RateStore:
    if not is_own:
        return RemoteRateStore(settings.url("api_cache_proxy"), settings, clocks)
    from buydesk.backends.memory.rates import MemoryRateStore  # noqa: PLC0415  # half as much

    if settings.redis_url is None:
        return MemoryRateStore()
    from buydesk.backends.redis.rates import RedisRateStore  # noqa: PLC0415  # as above

    return FallbackRateStore(RedisRateStore(_redis(settings.redis_url, settings), settings), MemoryRateStore())


def _report_store(settings: Settings, clocks: ClockMonitor, *, is_own: bool) -> ReportStore:
    if not is_own:
        return RemoteReportStore(settings.url("health_check"), settings, clocks)
    if settings.redis_url is None:
        return MemoryReportStore(settings)
    from buydesk.backends.redis.reports import RedisReportStore  # noqa: PLC0415  # as above

    shared = RedisReportStore(_redis(settings.redis_url, settings), settings)
    return FallbackReportStore(shared, MemoryReportStore(settings))


def _redis_check(settings: Settings, clocks: ClockMonitor) -> "RedisCheck | None":
    if settings.redis_url is None:
        return None
    from buydesk.backends.redis import prices as redis_prices  # noqa: PLC0415  # as above
    from buydesk.backends.redis import reports as redis_health  # noqa: PLC0415
    from buydesk.backends.redis.faults import RedisCheck  # noqa: PLC0415

    kinds = redis_prices.kinds(settings) | redis_health.KINDS
    return RedisCheck(_redis(settings.redis_url, settings), kinds, settings.remote_seconds_max, clocks)


def _sources(settings: Settings, clocks: ClockMonitor) -> list[PriceSource]:
    if settings.price_feed == "live":
        return exchanges(settings, clocks)
    return sandbox_sources(settings, settings.data_dir / "replay.json" if settings.data_dir else None)


def _redis(url: SecretStr, settings: Settings) -> "Redis":
    from redis.asyncio import Redis  # noqa: PLC0415  # as above
    from redis.asyncio.retry import Retry  # noqa: PLC0415
    from redis.backoff import NoBackoff  # noqa: PLC0415

    try:
        client = Redis.from_url(
            url.get_secret_value(),
            socket_connect_timeout=settings.connect_seconds_max,
            socket_timeout=settings.remote_seconds_max,
            # One more try on a fresh connection, when a kept one turns out to be cut; no waiting.
            retry=Retry(NoBackoff(), 1),
        )
        client.connection_pool.make_connection()  # type: ignore[no-untyped-call]  # connects to nothing
    except Exception:  # of an option that it does not know, of any kind; and it may quote the URL
        detail = "must have a port of at most 65535, and after a ? only options that redis-py has"
        raise CannotStart(f"{variable('redis_url')}: {detail}") from None
    return client
