"""What every WebhookStore does, beside its ledger: the model, PostgreSQL of both versions, and db_proxy across TCP."""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import asyncpg
import pytest
from msgspec.structs import replace

from buydesk.backends.memory.reports import MemoryReportStore
from buydesk.backends.postgres.anchors import PostgresAnchors
from buydesk.backends.postgres.ledger import PostgresLedger
from buydesk.backends.postgres.life import PostgresLife
from buydesk.backends.postgres.webhooks import PostgresWebhooks
from buydesk.backends.remote.webhooks import RemoteWebhooks
from buydesk.errors import (
    ClientNotFound,
    InvalidRequest,
    LedgerUnavailable,
    OutcomeUnknown,
    TooManyWebhooks,
    WebhookNotFound,
)
from buydesk.events.model import (
    DELIVERIES_KEPT,
    EVENT_TYPES,
    OVERLAP_SECONDS,
    SECRETS_MAX,
    WEBHOOKS_MAX,
    ChangeWebhook,
    CreateWebhook,
    DeleteWebhook,
    Delivery,
    Rewind,
    RotateSecret,
    Turn,
    Webhook,
    WebhookStore,
)
from buydesk.observability.reporter import Reporter
from buydesk.orders.life import Closing, OrderLife
from buydesk.orders.model import Order, OrderLedger, Placed
from buydesk.orders.refusals import RefusalRecorder
from buydesk.services import db_proxy
from buydesk.times import utc_now
from tests.builders import new_order, priced_order, record, settings
from tests.clock import FakeClock
from tests.databases import Databases, as_db_proxy, run
from tests.model_keys import ModelKeys
from tests.model_ledger import ModelLedger
from tests.model_registry import ModelRefusals, ModelRegistry
from tests.model_webhooks import ModelWebhooks
from tests.serving import served

KEY, OTHER_KEY = "1111111111111111", "2222222222222222"
LEASE, OTHER_LEASE = uuid.uuid4(), uuid.uuid4()
PRICE = record(1000 * 10**8, ttl=3600)


@dataclass
class Desk:
    store: WebhookStore
    ledger: OrderLedger
    life: OrderLife
    dsn: str | None
    clock: FakeClock

    async def place(self, orders: int = 1, client: str = "other") -> list[Order]:
        items = [priced_order(order=replace(new_order(100), client=client), price=PRICE) for _ in range(orders)]
        outcomes = await self.ledger.place(items, 5)
        return [each.order for each in outcomes if isinstance(each, Placed)]

    async def hook(self, client: str = "other", **given: Any) -> Webhook:
        members = {"url": "https://a.example/x?token=1", "events": EVENT_TYPES, "description": "d", "key": KEY} | given
        return await self.store.change(CreateWebhook(client, uuid.uuid4(), **members))

    async def take(self, lease: uuid.UUID = LEASE, limit: int = 10, *keys: str) -> list[uuid.UUID]:
        return [each.id for each in await self.store.take(lease, keys or (KEY,), limit, 10)]

    async def pass_time(self, seconds: float) -> None:
        """Moves the moments that are stored into the past, which is the same."""
        if self.dsn is None:
            self.clock.seconds += seconds
            return
        await run(
            self.dsn,
            "UPDATE webhooks SET due_at = due_at - $1::interval, leased_until = leased_until - $1, secrets = ("
            " SELECT jsonb_agg(s || jsonb_build_object('ends_at', (s ->> 'ends_at')::timestamptz - $1) ORDER BY n)"
            " FROM jsonb_array_elements(secrets) WITH ORDINALITY AS e (s, n))",
            timedelta(seconds=seconds),
        )


def delivery(sequence: int | None = 1, **given: Any) -> Delivery:
    made = Delivery(f"{uuid.uuid4()}.placed", "order.placed", sequence, utc_now(), 1, "delivered", 200, 12)
    return replace(made, **given)


def turn(hook: Webhook, delivered: int, *deliveries: Delivery, **given: Any) -> Turn:
    told = Turn(hook.id, delivered, 0, 0, None, keep=False, deliveries=list(deliveries))
    return replace(told, **given)


@contextlib.asynccontextmanager
async def opened(kind: str, databases: Databases) -> AsyncIterator[Desk]:
    clock = FakeClock(utc_now())
    if kind == "model":
        model = ModelLedger()
        yield Desk(ModelWebhooks(model, clock), model, model, None, clock)
        return
    dsn = await databases.new(16 if kind == "postgres16" else 18)
    ledger = PostgresLedger(as_db_proxy(dsn), settings(price_ttl_seconds=3600), livemode=False)
    life, store = PostgresLife(ledger), PostgresWebhooks(ledger)
    if kind == "remote":
        reporter = Reporter("db_proxy", MemoryReportStore(settings()), settings())
        app = db_proxy.create_app(
            settings(),
            ledger,
            life,
            PostgresAnchors(ledger),
            reporter,
            keys=ModelKeys(),
            registry=ModelRegistry(),
            refusals=RefusalRecorder(ModelRefusals()),
            webhooks=store,
        )
        async with served(app) as url:
            remote = RemoteWebhooks(url, settings())
            yield Desk(remote, ledger, life, dsn, clock)
            await remote.close()
    else:
        yield Desk(store, ledger, life, dsn, clock)
        await store.close()
    await ledger.close()


@pytest.fixture(params=["model", "postgres18", "postgres16", "remote"])
async def desk(request: pytest.FixtureRequest, databases: Databases) -> AsyncIterator[Desk]:
    async with opened(request.param, databases) as running:
        yield running


async def test_endpoint_begins_with_what_happens_after_it_was_made(desk: Desk) -> None:
    await desk.place(3)
    hook = await desk.hook()
    assert (hook.client, hook.url, list(hook.events)) == ("other", "https://a.example/x?token=1", list(EVENT_TYPES))
    assert (hook.delivered, hook.failures, hook.disabled) == (3, 0, None)
    assert [(each.version, each.key, each.ends_at) for each in hook.secrets] == [(1, KEY, None)]
    assert await desk.store.webhook("other", hook.id) == hook
    assert list(await desk.store.webhooks("other")) == [hook]
    assert await desk.take() == []
    await desk.place(1)
    assert await desk.take() == [hook.id]


async def test_endpoint_of_another_client_does_not_exist(desk: Desk) -> None:
    hook = await desk.hook()
    assert list(await desk.store.webhooks("third")) == []
    await desk.store.note_delivery(hook.id, delivery())
    assert list(await desk.store.deliveries("third", hook.id, 100, 10)) == []
    for change in (
        ChangeWebhook("third", hook.id, url="https://evil.example"),
        RotateSecret("third", hook.id, KEY),
        Rewind("third", hook.id, 0),
        DeleteWebhook("third", hook.id),
        DeleteWebhook("other", uuid.uuid4()),
    ):
        with pytest.raises(WebhookNotFound):
            await desk.store.change(change)
    with pytest.raises(WebhookNotFound):
        await desk.store.webhook("third", hook.id)
    assert await desk.store.webhook("other", hook.id) == hook


async def test_client_has_so_many_endpoints_and_no_more_also_when_many_are_made_at_once(desk: Desk) -> None:
    made = await asyncio.gather(*(desk.hook() for _ in range(WEBHOOKS_MAX + 5)), return_exceptions=True)
    assert [type(each) for each in made if not isinstance(each, Webhook)] == [TooManyWebhooks] * 5
    await desk.hook("third")
    hooks = await desk.store.webhooks("other")
    assert len(hooks) == WEBHOOKS_MAX
    deleted = await desk.store.change(DeleteWebhook("other", hooks[0].id))
    assert deleted == hooks[0]
    await desk.hook()
    with pytest.raises(ClientNotFound):
        await desk.hook("nobody")


async def test_what_is_given_is_changed_and_the_rest_stays(desk: Desk) -> None:
    hook = await desk.hook()
    changed = await desk.store.change(ChangeWebhook("other", hook.id, description="new"))
    assert changed == replace(hook, description="new")
    changed = await desk.store.change(ChangeWebhook("other", hook.id, events=["order.settled"], enabled=False))
    due = changed.due_at
    assert changed == replace(hook, description="new", events=["order.settled"], disabled="client", due_at=due)
    changed = await desk.store.change(ChangeWebhook("other", hook.id, url="https://b.example", enabled=True))
    assert (changed.url, changed.disabled) == ("https://b.example", None)
    assert await desk.store.webhook("other", hook.id) == changed


async def test_rotated_secret_signs_for_a_day_beside_the_new_one(desk: Desk) -> None:
    hook = await desk.hook()
    hook = await desk.store.change(RotateSecret("other", hook.id, OTHER_KEY))
    assert [(each.version, each.key) for each in hook.secrets] == [(2, OTHER_KEY), (1, KEY)]
    ends_at = hook.secrets[1].ends_at
    assert ends_at is not None
    assert abs((ends_at - desk.clock.at).total_seconds() - OVERLAP_SECONDS) < 60
    assert hook.secrets[0].ends_at is None
    for _ in range(SECRETS_MAX):
        hook = await desk.store.change(RotateSecret("other", hook.id, KEY))
    assert [each.version for each in hook.secrets] == [6, 5, 4, 3]
    await desk.pass_time(OVERLAP_SECONDS + 60)
    hook = await desk.store.change(RotateSecret("other", hook.id, KEY))
    assert [each.version for each in hook.secrets] == [7, 6]


async def test_endpoint_is_one_replica_s_until_it_reports_or_its_lease_ends(desk: Desk) -> None:
    hook = await desk.hook()
    await desk.place(2)
    both = await asyncio.gather(desk.take(LEASE), desk.take(OTHER_LEASE))
    assert sorted(map(len, both)) == [0, 1]
    holder, other = (LEASE, OTHER_LEASE) if both[0] else (OTHER_LEASE, LEASE)
    assert not await desk.store.report(other, turn(hook, 2), 10)
    assert await desk.store.report(holder, turn(hook, 1, keep=True), 10)
    assert await desk.take(other) == []
    assert await desk.store.renew({hook.id: holder}, 10) == {hook.id}
    assert await desk.store.renew({hook.id: other}, 10) == set()
    assert await desk.store.report(holder, turn(hook, 1), 10)
    assert await desk.take(other) == [hook.id]
    await desk.pass_time(11)
    assert await desk.store.renew({hook.id: other}, 10) == set()
    assert await desk.take(holder) == [hook.id]
    assert not await desk.store.report(other, turn(hook, 2), 10)
    assert (await desk.store.webhook("other", hook.id)).delivered == 1
    assert await desk.store.report(holder, turn(hook, 2), 10)
    assert await desk.take(holder) == []


async def test_leases_are_renewed_one_by_one_and_those_that_are_not_named_end(desk: Desk) -> None:
    hook, orphan = await desk.hook(), await desk.hook()
    await desk.place(1)
    assert set(await desk.take()) == {hook.id, orphan.id}
    await desk.pass_time(6)
    assert await desk.store.renew({hook.id: LEASE, uuid.uuid4(): LEASE}, 10) == {hook.id}
    assert await desk.store.renew({hook.id: OTHER_LEASE}, 10) == set()
    assert await desk.store.renew({}, 10) == set()
    await desk.pass_time(6)
    assert await desk.take(OTHER_LEASE) == [orphan.id]


async def test_failed_event_is_due_again_when_its_time_has_come(desk: Desk) -> None:
    hook = await desk.hook()
    await desk.place(1)
    await desk.take()
    assert await desk.store.report(LEASE, turn(hook, 0, failures=1, due_seconds=300), 10)
    assert (await desk.store.webhook("other", hook.id)).failures == 1
    assert await desk.take() == []
    await desk.pass_time(299)
    assert await desk.take() == []
    await desk.pass_time(2)
    assert await desk.take() == [hook.id]


@pytest.mark.parametrize("why", ["gone", "failing"])
async def test_disabled_endpoint_is_not_taken_and_goes_on_where_it_was(desk: Desk, why: Any) -> None:
    hook = await desk.hook()
    await desk.place(3)
    await desk.take()
    assert await desk.store.report(LEASE, turn(hook, 1, failures=10, due_seconds=86400, disabled=why), 10)
    assert (await desk.store.webhook("other", hook.id)).disabled == why
    assert await desk.take() == []
    enabled = await desk.store.change(ChangeWebhook("other", hook.id, enabled=True))
    assert (enabled.disabled, enabled.delivered, enabled.failures) == (None, 1, 0)
    assert await desk.take() == [hook.id]


@pytest.mark.parametrize("given", [{"enabled": False}, {"url": "https://b.example"}, {"events": ["order.settled"]}])
async def test_turn_that_is_under_way_when_its_endpoint_is_changed_does_not_count(desk: Desk, given: Any) -> None:
    hook = await desk.hook()
    await desk.place(2)
    await desk.take()
    await desk.store.change(ChangeWebhook("other", hook.id, **given))
    assert await desk.store.renew({hook.id: LEASE}, 10) == set()
    assert not await desk.store.report(LEASE, turn(hook, 2), 10)
    assert await desk.take() == []  # until what may be under way has ended
    await desk.pass_time(11)
    assert await desk.take() == ([] if given == {"enabled": False} else [hook.id])


async def test_turn_that_is_under_way_when_a_secret_is_rotated_does_not_count(desk: Desk) -> None:
    """It would go on to sign with the secret of before alone."""
    hook = await desk.hook()
    await desk.place(2)
    await desk.take()
    await desk.store.change(RotateSecret("other", hook.id, KEY))
    assert await desk.store.renew({hook.id: LEASE}, 10) == set()
    assert not await desk.store.report(LEASE, turn(hook, 2), 10)
    await desk.pass_time(11)
    assert await desk.take() == [hook.id]


@pytest.mark.parametrize("given", [{"enabled": True}, {"url": "https://b.example"}, {"events": ["order.settled"]}])
async def test_endpoint_that_failed_is_due_at_once_when_it_is_changed(desk: Desk, given: Any) -> None:
    hook = await desk.hook()
    await desk.place(1)
    await desk.take()
    assert await desk.store.report(LEASE, turn(hook, 0, failures=3, due_seconds=300), 10)
    changed = await desk.store.change(ChangeWebhook("other", hook.id, **given))
    assert changed.failures == 0
    assert await desk.take() == [hook.id]


async def test_endpoint_that_is_rewound_gets_events_again_and_none_is_skipped(desk: Desk) -> None:
    hook = await desk.hook()
    await desk.place(3)
    await desk.take()
    assert await desk.store.report(LEASE, turn(hook, 3), 10)
    assert (await desk.store.change(Rewind("other", hook.id, 5))).delivered == 3
    assert await desk.take() == []
    assert (await desk.store.change(Rewind("other", hook.id, 1))).delivered == 1
    assert await desk.take() == [hook.id]


async def test_who_has_waited_longest_is_next_and_only_whose_secret_can_be_derived(desk: Desk) -> None:
    first, second = await desk.hook(), await desk.hook("third")
    strange = await desk.hook(key=OTHER_KEY)
    await desk.place(5)
    await desk.place(5, "third")
    assert await desk.take(LEASE, 1) == [first.id]
    assert await desk.store.report(LEASE, turn(first, 1), 10)
    assert await desk.take(LEASE, 1) == [second.id]
    assert await desk.take(LEASE, 1) == [first.id]
    assert await desk.take(LEASE, 1) == []
    assert await desk.take(LEASE, 1, OTHER_KEY) == [strange.id]


async def test_totals_are_of_endpoints_that_are_enabled(desk: Desk) -> None:
    failing, waiting = await desk.hook(), await desk.hook()
    await desk.hook(key=OTHER_KEY)
    disabled = await desk.hook()
    await desk.store.change(ChangeWebhook("other", disabled.id, enabled=False))
    await desk.place(4)
    assert failing.id in await desk.take()
    assert await desk.store.report(LEASE, turn(failing, 1, failures=2, due_seconds=60), 10)
    assert await desk.store.report(LEASE, turn(waiting, 1), 10)
    totals = await desk.store.totals([KEY])
    assert (totals.enabled, totals.failing, totals.without_key, totals.waiting) == (3, 1, 1, 3 + 4)


async def test_last_attempts_are_kept_the_newest_first(desk: Desk) -> None:
    hook = await desk.hook()
    await desk.place(1)
    await desk.take()
    failed = delivery(1, outcome="timed_out", status=None, attempt=3)
    assert await desk.store.report(LEASE, turn(hook, 0, failed, delivery(1)), 10)
    test = delivery(None, type="webhook.test")
    await desk.store.note_delivery(hook.id, test)
    found = await desk.store.deliveries("other", hook.id, 2**63 - 1, 10)
    assert [each.number for each in found] == [3, 2, 1]
    assert replace(found[0], number=0) == test
    assert replace(found[2], number=0) == failed
    assert list(await desk.store.deliveries("other", hook.id, 3, 1)) == [found[1]]
    await desk.place(1)
    await desk.take()
    many = [delivery(1) for _ in range(DELIVERIES_KEPT)]
    assert await desk.store.report(LEASE, turn(hook, 1, *many), 10)
    kept = await desk.store.deliveries("other", hook.id, 2**63 - 1, DELIVERIES_KEPT)
    assert [each.number for each in kept] == list(range(DELIVERIES_KEPT + 3, 3, -1))
    await desk.store.change(DeleteWebhook("other", hook.id))
    assert list(await desk.store.deliveries("other", hook.id, 100, 10)) == []
    await desk.store.note_delivery(hook.id, test)  # whose endpoint has been deleted meanwhile


async def test_event_is_found_by_its_order_and_what_happened_to_it(desk: Desk) -> None:
    [first, second] = await desk.place(2)
    await desk.place(1, "third")
    await desk.life.close_orders([Closing(first.id, "settled", None), Closing(second.id, "cancelled", "why")])
    asked = [(first.id, "placed"), (second.id, "placed"), (first.id, "settled"), (second.id, "cancelled")]
    assert [await desk.store.sequence_of("other", *each) for each in asked] == [1, 2, 3, 4]  # type: ignore[arg-type]
    assert await desk.store.sequence_of("other", first.id, "cancelled") is None
    assert await desk.store.sequence_of("third", first.id, "placed") is None
    assert await desk.store.sequence_of("other", uuid.uuid4(), "placed") is None


async def test_db_proxy_names_what_is_wrong_with_what_it_is_asked(databases: Databases) -> None:
    async with opened("remote", databases) as desk:
        assert isinstance(desk.store, RemoteWebhooks)
        with pytest.raises(InvalidRequest, match="what: must be placed, settled or cancelled"):
            await desk.store.sequence_of("other", uuid.uuid4(), "paid")  # type: ignore[arg-type]
        with pytest.raises(InvalidRequest, match="limit: must be at most 1000"):
            await desk.take(LEASE, 1001)


async def test_no_secret_and_no_address_shows_in_what_is_printed_of_an_endpoint(desk: Desk) -> None:
    hook = await desk.hook()
    assert "token" not in f"{hook!r}{hook}"


@pytest.mark.parametrize("kind", ["postgres18", "postgres16"])
async def test_what_the_tables_do_not_take_is_refused_and_named(databases: Databases, kind: str) -> None:
    async with opened(kind, databases) as desk:
        hook = await desk.hook()
        with pytest.raises(InvalidRequest, match="webhooks_url_check"):
            await desk.store.change(ChangeWebhook("other", hook.id, url=""))
        await desk.place()
        await desk.take()
        for wrong in (turn(hook, -1), turn(hook, 1, due_seconds=1e300)):
            with pytest.raises(InvalidRequest):
                await desk.store.report(LEASE, wrong, 10)


@pytest.mark.parametrize("kind", ["postgres18", "postgres16"])
async def test_another_fault_of_the_database_is_none_of_the_client_s(databases: Databases, kind: str) -> None:
    async with opened(kind, databases) as desk:
        assert desk.dsn is not None
        await run(desk.dsn, "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN ASSERT false; END'")
        await run(desk.dsn, "CREATE TRIGGER failing BEFORE INSERT ON webhooks EXECUTE FUNCTION fail()")
        with pytest.raises(asyncpg.AssertError):
            await desk.hook()


async def test_endpoint_that_is_made_again_is_the_same(desk: Desk) -> None:
    new = CreateWebhook("other", uuid.uuid4(), "https://a.example", EVENT_TYPES, "", KEY)
    made = await desk.store.change(new)
    assert await desk.store.change(new) == made
    assert len(await desk.store.webhooks("other")) == 1


async def test_no_answer_is_unknown_where_something_was_to_be_done() -> None:
    remote = RemoteWebhooks("http://127.0.0.1:9", settings(remote_seconds_max=0.3))
    with pytest.raises(LedgerUnavailable):
        await remote.webhooks("other")
    with pytest.raises((LedgerUnavailable, OutcomeUnknown)):
        await remote.take(LEASE, [KEY], 1, 10)
    await remote.close()
