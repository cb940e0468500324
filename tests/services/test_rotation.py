"""Rotation: while services go, one by one, from an old secret to a new one, each understands all others."""

import contextlib
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from buydesk.backends.memory.prices import MemoryPriceStore
from buydesk.backends.memory.rates import MemoryRateStore
from buydesk.backends.memory.reports import MemoryReportStore
from buydesk.backends.remote import RemoteLedger, RemoteLife, RemotePriceStore
from buydesk.backends.remote.rates import RemoteRateStore
from buydesk.backends.remote.registry import RemoteRegistry
from buydesk.backends.remote.reports import RemoteReportStore
from buydesk.clients.rates import Lot
from buydesk.clients.registry import Pause, ShownKey
from buydesk.errors import DeskError, LedgerUnavailable, PriceStoreUnavailable, RatesUnavailable, ReportsUnavailable
from buydesk.money import Currency
from buydesk.observability.reporter import Reporter
from buydesk.observability.reports import Report
from buydesk.orders.life import Closing
from buydesk.orders.model import Placed, new_order_id
from buydesk.orders.refusals import RefusalRecorder
from buydesk.prices.cache import PriceCache
from buydesk.prices.signing import Signer
from buydesk.prices.verification import require_proven
from buydesk.reading import WrongMember
from buydesk.services import api_cache_proxy, db_proxy, health_check
from buydesk.settings.model import Settings
from buydesk.settings.secrets import TOKENS
from buydesk.signing_keys import KEY_BYTES, new_signing_key, public_key, to_text
from buydesk.times import utc_now
from tests.builders import priced_order, record, settings
from tests.model_anchors import ModelAnchors
from tests.model_keys import ModelKeys
from tests.model_ledger import ModelLedger
from tests.model_registry import ModelRefusals, ModelRegistry
from tests.model_webhooks import ModelWebhooks
from tests.serving import served

# What a setting says in turn. Services are between one stage and the next at any time.
STAGES = ("old", "old,new", "new,old", "new")
LOT = Lot("orders:client:shop", 60, 1)
NEIGHBOURS = [(one, other) for one in range(4) for other in range(4) if abs(one - other) <= 1]


def with_tokens(stage: str) -> Settings:
    return settings(**dict.fromkeys(TOKENS, stage))


@dataclass
class Clients:
    """Who calls the services."""

    ledger: RemoteLedger
    life: RemoteLife
    store: RemotePriceStore
    desk: RemoteReportStore
    rates: RemoteRateStore
    registry: RemoteRegistry


@contextlib.asynccontextmanager
async def clients_of(theirs: Settings, ours: Settings) -> AsyncIterator[Clients]:
    """The callers, with settings of theirs, of services with ours."""
    store, desk = MemoryPriceStore(ours), MemoryReportStore(ours)

    def reporter(name: str) -> Reporter:
        return Reporter(name, desk, ours)

    async def ready() -> None: ...

    apps = (
        db_proxy.create_app(
            ours,
            ModelLedger(),
            ModelLedger(),
            ModelAnchors(),
            reporter("db_proxy"),
            keys=ModelKeys(),
            registry=ModelRegistry(),
            refusals=RefusalRecorder(ModelRefusals()),
            webhooks=ModelWebhooks(),
        ),
        api_cache_proxy.create_app(ours, store, MemoryRateStore(), reporter("api_cache_proxy")),
        health_check.create_app(ours, desk, ready, store, redis_check=None, reporter=reporter("health_check")),
    )
    async with contextlib.AsyncExitStack() as stack:
        urls = [await stack.enter_async_context(served(app, settings=ours)) for app in apps]
        clients = Clients(
            RemoteLedger(urls[0], theirs),
            RemoteLife(urls[0], theirs),
            RemotePriceStore(urls[1], theirs),
            RemoteReportStore(urls[2], theirs),
            RemoteRateStore(urls[1], theirs),
            RemoteRegistry(urls[0], theirs),
        )
        for client in vars(clients).values():
            stack.push_async_callback(client.close)
        yield clients


@pytest.mark.parametrize(("theirs", "ours"), NEIGHBOURS)
async def test_tokens_of_neighbouring_stages_are_taken(theirs: int, ours: int) -> None:
    async with clients_of(with_tokens(STAGES[theirs]), with_tokens(STAGES[ours])) as clients:
        [placed] = await clients.ledger.place([priced_order()], 5)
        assert isinstance(placed, Placed)
        assert await clients.ledger.order(placed.order.id, None) == placed.order
        published = record()
        await clients.store.publish(published)
        assert await clients.store.latest() == published
        await clients.desk.report(Report("info", "db_proxy", 200, "here"), verified=True)
        assert [each.verified for each in await clients.desk.reports("db_proxy", None, 1)] == [True]
        assert [count.taken for count in await clients.rates.take([LOT])] == [1]
        assert [each.name for each in await clients.registry.clients("", 10)] == ["anonymous"]


@pytest.mark.parametrize(("theirs", "ours"), [("old", "new"), ("old,new", "new")])
async def test_token_that_was_withdrawn_is_none(theirs: str, ours: str) -> None:
    async with clients_of(with_tokens(theirs), with_tokens(ours)) as clients:
        with pytest.raises(LedgerUnavailable, match="unauthorized"):
            await clients.ledger.place([priced_order()], 5)
        with pytest.raises(LedgerUnavailable, match="unauthorized"):
            await clients.ledger.exposure(None)
        with pytest.raises(LedgerUnavailable, match="unauthorized"):
            await clients.life.events(None, 0, 1)
        with pytest.raises(LedgerUnavailable, match="unauthorized"):
            await clients.life.close_orders([Closing(new_order_id(), "settled", None)])
        with pytest.raises(PriceStoreUnavailable, match="unauthorized"):
            await clients.store.publish(record())
        with pytest.raises(RatesUnavailable, match="unauthorized"):
            await clients.rates.take([LOT])
        with pytest.raises(LedgerUnavailable, match="unauthorized"):
            await clients.registry.change(Pause(), "why not", ShownKey("x", "here"))
        with pytest.raises(ReportsUnavailable, match="unauthorized"):
            await clients.desk.report(Report("info", "db_proxy", 200, "here"), verified=True)


@pytest.mark.parametrize("known", TOKENS)
async def test_token_for_one_purpose_is_none_for_another(known: str) -> None:
    """Who has one secret can do what it is for, and nothing else."""
    thief = with_tokens("guessed").model_copy(update={known: with_tokens("right").placing_tokens})
    done: set[str] = set()
    async with clients_of(thief, with_tokens("right")) as clients:
        for purpose, attempt in {
            "placing_tokens": clients.ledger.place([priced_order()], 5),
            "reading_tokens": clients.ledger.exposure(None),
            "processing_tokens": clients.life.close_orders([Closing(new_order_id(), "settled", None)]),
            "publishing_tokens": clients.store.publish(record()),
            "counting_tokens": clients.rates.take([LOT]),
            "operating_tokens": clients.registry.desk(),
            "reporting_tokens": clients.desk.report(Report("info", "db_proxy", 200, "here"), verified=True),
        }.items():
            with contextlib.suppress(DeskError):
                await attempt
                done.add(purpose)
    assert done == {known}


OLD, NEW = (to_text(bytes([number] * KEY_BYTES)) for number in (1, 2))
KEYS = {"old": public_key(OLD), "new": public_key(NEW)}


def with_keys(stage: str) -> Settings:
    return settings(price_signing_key=new_signing_key()).model_copy(
        update={"price_keys": tuple(KEYS[each] for each in stage.split(","))}
    )


@pytest.mark.parametrize(
    ("signing_key", "stage", "is_taken"),
    [
        (OLD, "old", True),
        (OLD, "old,new", True),
        (NEW, "old,new", True),
        (NEW, "new", True),
        (NEW, "old", False),
        (OLD, "new", False),
    ],
)
async def test_price_is_taken_while_its_key_is_accepted(signing_key: str, stage: str, is_taken: bool) -> None:
    ours, price = with_keys(stage), Signer(signing_key).sign(record())
    store = MemoryPriceStore(ours)
    await store.publish(price)
    at_hand = PriceCache(store, ours, logging.getLogger("tests"))
    await at_hand.refresh()
    assert (at_hand.price(Currency.EUR) == price) is is_taken
    if is_taken:
        require_proven(price, ours, utc_now())
    else:
        with pytest.raises(WrongMember, match="which this desk does not accept"):
            require_proven(price, ours, utc_now())
