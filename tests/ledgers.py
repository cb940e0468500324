"""Ledgers to test with: a model that is plainly right, real ones on fresh databases, and things to place."""

import itertools
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import asyncpg
import msgspec

from buydesk.backends.postgres.accounts import Account
from buydesk.backends.postgres.migrate import migrate
from buydesk.embedded.postgres import USER
from buydesk.errors import (
    ClockSkewed,
    DeskError,
    ExposureCapExceeded,
    IdempotencyKeyReused,
    OrderNotFound,
    PriceNotFound,
)
from buydesk.money import SATOSHI_PER_BTC, Currency, satoshi_for
from buydesk.orders.model import (
    ANONYMOUS,
    Anchor,
    Exposure,
    NewOrder,
    Order,
    Outcome,
    Page,
    PageAfter,
    PageBefore,
    Placed,
    PricedOrder,
    Refused,
    Replayed,
    is_repeat,
    new_order_id,
    order_document,
)
from buydesk.orders.pricing import price_order
from buydesk.prices.model import SOURCES, PriceRecord, Quote, Rule, stale
from buydesk.prices.signing import Signer
from buydesk.settings.model import TOKENS, Settings, variable
from buydesk.signing_keys import KEY_BYTES, to_text
from buydesk.times import utc_now

if TYPE_CHECKING:
    from tests.conftest import PostgresServers

CAP_SATOSHI = 100 * SATOSHI_PER_BTC
# The Unix times between which a ledger's clock may be.
ANY_TIME = (0.0, 2.0**32)
DB_PROXY = Account("db_proxy_of_tests", "secret-of-tests")
SIGNING_KEY = to_text(bytes(range(KEY_BYTES)))
TOKEN = "test-token"
_signer = Signer(SIGNING_KEY)
_names = itertools.count()


def shared_env() -> dict[str, str]:
    """What services of one desk share, as variables."""
    given = settings()
    tokens = {variable(name): TOKEN for name in TOKENS}
    return tokens | {variable("price_signing_key"): SIGNING_KEY, variable("price_keys"): given.accepted_price_keys[0]}


def settings(**given: Any) -> Settings:
    return Settings(**{"price_signing_key": SIGNING_KEY, **dict.fromkeys(TOKENS, TOKEN), **given})


def signed(unsigned: PriceRecord) -> PriceRecord:
    """The record, signed with the key of `settings`."""
    return _signer.sign(unsigned)


def record(rate_e8: int = 20_000 * 10**8, *, age: float = 0, ttl: float = 60, **rates: int) -> PriceRecord:
    """A price record observed `age` seconds ago; one bitcoin costs the same in every currency unless told."""
    as_of = utc_now() - timedelta(seconds=age)
    rates_e8 = {currency: rates.get(currency.value, rate_e8) for currency in Currency}
    return signed(
        PriceRecord(
            uuid.uuid4(),
            as_of,
            as_of + timedelta(seconds=ttl),
            "sandbox",
            rates_e8,
            tuple(
                Quote(source, currency, rate, rate, as_of)
                for currency, rate in rates_e8.items()
                for source in SOURCES["sandbox"][:2]
            ),
            rule=Rule(quote_age_seconds_max=30, spread_bp_max=1000, deviation_bp_max=100, sources_min=2),
            decided_at=as_of,
        )
    )


def new_order(cents: int = 6900, key: str | None = None, currency: Currency = Currency.EUR) -> NewOrder:
    return NewOrder(new_order_id(), ANONYMOUS, key, currency, cents)


def priced_order(
    cents: int = 6900,
    key: str | None = None,
    *,
    price: PriceRecord | DeskError | None = None,
    order: NewOrder | None = None,
    seconds: float = 20,
) -> PricedOrder:
    deadline = utc_now() + timedelta(seconds=seconds)
    return price_order(order or new_order(cents, key), price or record(), deadline)


def shown(order: Order) -> dict[str, Any]:
    """The order as its clients read it."""
    document: dict[str, Any] = msgspec.to_builtins(order_document(order))
    return document


@dataclass(repr=False)  # pytest shows fixtures to itself, and this one grows
class ModelLedger:
    """OrderLedger as one would explain it: items one by one, nothing at once, nothing fast."""

    cap_satoshi: int = CAP_SATOSHI
    batches_at_once: int = 1
    place_seconds: float = 0.001
    stored: list[Order] = field(default_factory=list)
    records: dict[uuid.UUID, PriceRecord] = field(default_factory=dict)
    now: Callable[[], datetime] = utc_now

    async def place(self, items: Sequence[PricedOrder], timeout_seconds: float) -> Sequence[Outcome]:
        return [self._place(item) for item in items]

    def _place(self, item: PricedOrder) -> Outcome:
        new = item.order
        for order in self.stored:
            same_key = new.client_order_id is not None and order.client_order_id == new.client_order_id
            if order.id == new.id or (same_key and order.client == new.client):
                return (
                    Replayed(order)
                    if is_repeat(new, order)
                    else Refused(IdempotencyKeyReused("reused"), by_ledger=True)
                )
        if item.deadline <= self.now():
            return Refused(ClockSkewed("late"))
        if isinstance(item.price, DeskError):
            return Refused(item.price, by_ledger=True)
        if item.price.expires_at <= self.now():
            return Refused(stale(item.price.as_of, item.price.expires_at), by_ledger=True)
        rate_e8 = item.price.rates_e8[new.currency]
        satoshi = satoshi_for(new.amount_cents, rate_e8)
        exposure = Exposure(self.cap_satoshi, sum(order.satoshi for order in self.stored), len(self.stored))
        if satoshi > exposure.cap_satoshi - exposure.used_satoshi:
            return Refused(ExposureCapExceeded("full", **exposure.facts()), by_ledger=True)
        order = Order(
            len(self.stored) + 1,
            new.id,
            self.now(),
            new.client,
            new.client_order_id,
            new.currency,
            new.amount_cents,
            rate_e8,
            satoshi,
            item.price.id,
            item.price.as_of,
            False,
        )
        self.stored.append(order)
        self.records[item.price.id] = item.price
        return Placed(order)

    async def page(self, anchor: Anchor, page_size: int) -> Page:
        newest_first = self.stored[::-1]
        match anchor:
            case PageBefore(number):
                return Page([order for order in newest_first if order.number < number][:page_size], None)
            case PageAfter(number):
                above = [order for order in self.stored if order.number > number][:page_size]
                return Page(above[::-1], None)
            case _:
                return Page(newest_first[anchor.start : anchor.start + page_size], len(self.stored))

    async def order(self, order_id: uuid.UUID) -> Order:
        return self._only([order for order in self.stored if order.id == order_id])

    async def order_by_key(self, client: str, client_order_id: str) -> Order:
        key = (client, client_order_id)
        return self._only([order for order in self.stored if (order.client, order.client_order_id) == key])

    @staticmethod
    def _only(found: list[Order]) -> Order:
        if not found:
            raise OrderNotFound("none")
        return found[0]

    async def exposure(self) -> Exposure:
        return Exposure(self.cap_satoshi, sum(order.satoshi for order in self.stored), len(self.stored))

    async def price_record(self, price_id: uuid.UUID) -> PriceRecord:
        if price_id not in self.records:
            raise PriceNotFound("none")
        return self.records[price_id]

    async def check(self) -> None:
        pass

    async def close(self) -> None:
        pass


def as_db_proxy(dsn: str) -> str:
    """The same database for the account that may place and read only."""
    scheme, _, rest = dsn.partition(f"{USER}@")
    assert rest
    return f"{scheme}{DB_PROXY.name}:{DB_PROXY.password}@{rest}"


class Databases:
    """Fresh, migrated databases, copied from a template of each server."""

    def __init__(self, servers: "PostgresServers") -> None:
        self._servers = servers
        self._templates: set[tuple[int, bool]] = set()

    async def new(self, version: Any = 18, *, livemode: bool = False) -> str:
        """The DSN of a database of its own."""
        server = await self._servers.server(version)
        maintenance = await asyncpg.connect(server.dsn_of("postgres"))
        try:
            template = "template_live" if livemode else "template_ledger"
            if (version, livemode) not in self._templates:
                await maintenance.execute(f"CREATE DATABASE {template}")
                keys = settings().accepted_price_keys
                url = server.dsn_of(template)
                await migrate(url, livemode=livemode, cap_satoshi=CAP_SATOSHI, price_keys=keys, account=DB_PROXY)
                self._templates.add((version, livemode))
            name = f"ledger_{next(_names)}"
            await maintenance.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        finally:
            await maintenance.close()
        return server.dsn_of(name)


async def fill(dsn: str, orders: int) -> None:
    """Stores many orders of 0.20 EUR, 1000 satoshi each, in a new database; PostgreSQL has no statistics of them."""
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute(
            f"""
            ALTER TABLE orders SET (autovacuum_enabled = off);
            SET session_replication_role = replica; -- 200,000 foreign keys take their time
            INSERT INTO price_records (id, as_of, expires_at, document)
            VALUES ('00000000-0000-4000-8000-000000000000', now(), now(), '{{}}');
            INSERT INTO orders (number, amount_cents, rate_e8, satoshi, created_at, price_as_of, id, price_id,
                                representation, currency, client, client_order_id)
            SELECT n, 20, 2000000000000, 1000, now(), now(), gen_random_uuid(), p.id,
                   1, 'EUR', 'anonymous', 'filled-' || n
            FROM generate_series(1, {orders}) AS n, price_records p;
            UPDATE exposure SET used_satoshi = {orders}::bigint * 1000, last_number = {orders};
            """  # noqa: S608
        )
    finally:
        await connection.close()


def at(*moment: int) -> datetime:
    return datetime(*moment, tzinfo=UTC)  # type: ignore[arg-type,misc]
