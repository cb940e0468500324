"""The judge: holds what clients were told against what the ledger has, once nothing is under way any more."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from chaos.journal import ANSWERED, LOOKED_UP, SENT, Event

if TYPE_CHECKING:
    import asyncpg

# After these an order may be stored: no answer, a fault, a proxy's answer for a service that gave none.
UNKNOWN = {"outcome_unknown", "internal_error", "no_answer"}

_ORDERS = """
SELECT o.number, o.id::text, o.client_order_id AS key, o.currency, o.amount_cents, o.satoshi,
       coalesce(o.quoted_at, o.created_at) < (p.document::json ->> 'expires_at')::timestamptz
           AND o.created_at < coalesce(o.quote_expires_at, 'infinity') AS price_was_valid,
       o.market_rate_e8 = (p.document::json -> 'rates' ->> o.currency)::numeric * 1e8
           AND o.market_rate_e8::numeric * (10000 + o.markup_bp)
               BETWEEN (o.rate_e8 - 1)::numeric * 10000 + 1 AND o.rate_e8::numeric * 10000 AS rate_follows
FROM orders o JOIN price_records p ON p.id = o.price_id ORDER BY o.number
"""


@dataclass(frozen=True)
class Stored:
    """An order as the ledger has it."""

    number: int
    id: str
    key: str | None
    currency: str
    amount_cents: int
    satoshi: int
    price_was_valid: bool = True
    rate_follows: bool = True


@dataclass(frozen=True)
class Ledger:
    """All that the ledger has."""

    orders: Sequence[Stored]
    used_satoshi: int
    cap_satoshi: int
    last_number: int


@dataclass
class Told:
    """All that clients were told of the orders with one key."""

    sent: int = 0
    placed: list[Mapping[str, Any]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    unknown: int = 0
    final_404: int = 0

    @property
    def is_refused(self) -> bool:
        """Whether every single sending was answered, and refused."""
        return len(self.refused) == self.sent

    @property
    def outcome(self) -> str:
        """In one word, for a table."""
        return "placed" if self.placed else self.refused[-1] if self.is_refused else "unknown"


async def read_ledger(database: "asyncpg.Connection[asyncpg.Record]") -> Ledger:
    """The ledger of a desk that is at rest."""
    async with database.transaction(isolation="repeatable_read", readonly=True):
        orders = [Stored(**row) for row in await database.fetch(_ORDERS, timeout=60)]
        row = await database.fetchrow("SELECT used_satoshi, cap_satoshi, last_number FROM exposure")
    assert row is not None  # noqa: S101  # the exposure row is always there
    return Ledger(orders, **row)


def by_key(events: Sequence[Event]) -> dict[str, Told]:
    """What was told, by the orders' keys."""
    told: dict[str, Told] = {}
    for event in events:
        if event["what"] == SENT:
            told.setdefault(event["key"], Told()).sent += 1
        elif event["what"] == ANSWERED:
            _note(told[event["key"]], event)
        elif event["what"] == LOOKED_UP and event["is_final"] and event["status"] == 404:
            told[event["key"]].final_404 += 1
    return told


def _note(told: Told, event: Event) -> None:
    document = event["document"] or {}
    code = document.get("code", "no_answer")
    if event["status"] == 201:
        told.placed.append(document["order"])
    elif code in UNKNOWN:
        told.unknown += 1
    else:
        told.refused.append(code)


def findings(events: Sequence[Event], ledger: Ledger) -> Iterator[str]:
    """What was told and is not so, or is and must not be, a line each; nothing when all promises were kept."""
    stored: dict[str, Stored] = {}
    for order in ledger.orders:
        if order.key in stored:
            yield f"{order.key}: stored twice, as {stored[order.key].number} and {order.number}"
        if order.key is not None:
            stored[order.key] = order
        if not order.price_was_valid:
            yield f"order {order.number} was placed at a price that had ended"
        if not order.rate_follows:
            yield f"order {order.number} was placed at another rate than the market's and its markup"
    for key, told in by_key(events).items():
        yield from _of_key(key, told, stored.get(key))
    numbers = [order.number for order in ledger.orders]
    if numbers != list(range(1, ledger.last_number + 1)):
        yield f"the numbers of {len(numbers)} orders have gaps up to {ledger.last_number}"
    total = sum(order.satoshi for order in ledger.orders)
    if total != ledger.used_satoshi:
        yield f"the orders add up to {total} satoshi, and the ledger says {ledger.used_satoshi}"
    if total > ledger.cap_satoshi:
        yield f"{total} satoshi were sold over the cap of {ledger.cap_satoshi}"


def _of_key(key: str, told: Told, order: Stored | None) -> Iterator[str]:
    if order is None:
        if told.placed:
            yield f"{key}: answered 201 and is not stored"
        return
    if told.is_refused:
        yield f"{key}: refused ({', '.join(sorted(set(told.refused)))}) and is stored as {order.number}"
    if told.final_404:
        yield f"{key}: a look-up that was final said 404, and it is stored as {order.number}"
    for answer in told.placed:
        shown = (answer["id"], answer["number"], answer["currency"], round(float(answer["amount"]) * 100))
        if shown != (order.id, order.number, order.currency, order.amount_cents):
            yield f"{key}: answered as {shown}, and is stored as order {order.number}, {order.id}"
