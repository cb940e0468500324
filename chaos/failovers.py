"""The scenarios in which a primary is lost, with the order that it has and nobody else, or under load."""

import asyncio
import contextlib
import itertools
import os
import random
import signal
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import asyncpg

from bench.desk import until_placed
from bench.processes import PYTHON, free_base, running
from buydesk.times import parse_time
from buydesk.topology import PORTS
from chaos.buyers import Buyers, Load, Wish
from chaos.journal import ANSWERED, SENT, Answer, Journal, read
from chaos.judge import by_key, findings, read_ledger
from chaos.patroni import POLL_SECONDS, TTL_SECONDS, Cluster, Node, cluster_up
from chaos.plans import Plan, Verdict

if TYPE_CHECKING:
    Connection = asyncpg.Connection[asyncpg.Record]

# What is done to the backend, with this pid, whose commit waits for a standby; the session is somebody else's.
Hurt = Callable[["Connection", int], Coroutine[None, None, None]]

PROMOTED_SECONDS_MAX = TTL_SECONDS + 20.0
# Patroni waits for a dead primary so long; the rest is for the desk.
GAP_SECONDS_MAX = TTL_SECONDS + 10.0
WAITING_SECONDS_MAX = 10.0
PLACED_SECONDS_MAX = 60.0
QUIET_SECONDS = 3.0
FINAL_SECONDS_MAX = 45.0
BEYOND_FINAL_SECONDS = 3.0

_WAITING = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND query LIKE '%outcomes, %place_items(%'"
_IS_STORED = "SELECT EXISTS (SELECT FROM orders WHERE client_order_id = $1)"


@dataclass
class Shared:
    """What the rounds of a scenario share."""

    plan: Plan
    cluster: Cluster
    buyers: Buyers
    journal: Journal
    look_up_url: str
    chance: random.Random
    verdict: Verdict = field(default_factory=Verdict)
    counts: Counter[str] = field(default_factory=Counter)

    def standbys(self, primary: Node) -> list[Node]:
        return [node for node in self.cluster.nodes if node is not primary]

    def fault(self, what: str, nodes: Sequence[Node]) -> None:
        self.journal.fault(f"{what} {', '.join(node.name for node in nodes)}")


@contextlib.asynccontextmanager
async def _desk_on(plan: Plan, cluster: Cluster, first: Node | None = None) -> AsyncIterator[int]:
    """A desk on the cluster, each service a process of its own, that has placed an order; gives its ports' offset."""
    offset = free_base(PORTS.values())
    log = plan.directory / "desk.log"
    command = ("buydesk", "up", "--separate", "--data-dir", str(plan.directory / "desk"), "--port-offset", str(offset))
    async with running((*PYTHON, *command), log, {"DATABASE_URL": cluster.url(first)}) as process:
        await until_placed(_orders_url(offset), process, log)
        yield offset


def _orders_url(offset: int) -> str:
    return f"http://127.0.0.1:{PORTS['create_buy_order'] + offset}/place_order/"


def _shared(plan: Plan, cluster: Cluster, journal: Journal, offset: int) -> Shared:
    buyers = Buyers(_orders_url(offset), journal, plan.seed)
    look_up_url = f"http://127.0.0.1:{PORTS['fetch_buy_orders'] + offset}/get_orders/"
    return Shared(plan, cluster, buyers, journal, look_up_url, random.Random(plan.seed))  # noqa: S311  # as in Buyers


async def _rounds(plan: Plan, one: Callable[[Shared], Coroutine[None, None, None]]) -> Verdict:
    """So many rounds on one cluster and one desk, each from three nodes that are well; then the judge."""
    async with cluster_up(plan.directory / "cluster") as cluster, _desk_on(plan, cluster) as offset:
        with plan.journal() as journal:
            shared = _shared(plan, cluster, journal, offset)
            for _ in range(plan.rounds):
                await one(shared)
                await cluster.until_formed()
                await shared.buyers.until_normal()
        await _judged(shared)
    return shared.verdict


async def _judged(shared: Shared) -> None:
    """Adds what the judge finds on the primary that is left."""
    primary = await shared.cluster.until_formed()
    await asyncio.sleep(QUIET_SECONDS)
    async with shared.cluster.connected(primary) as database:
        ledger = await read_ledger(database)
    events = read(shared.plan.journal_path)
    shared.verdict.wrong += findings(events, ledger)
    shared.verdict.seen |= shared.counts
    shared.verdict.seen |= Counter(f"orders {told.outcome}" for told in by_key(events).values())
    shared.verdict.seen["stored"] = ledger.last_number


async def failover_cancelled(plan: Plan) -> Verdict:
    """A commit waits for frozen standbys, is cancelled, and lost with its primary."""

    async def cancel(server: "Connection", pid: int) -> None:
        await server.execute("SELECT pg_cancel_backend($1)", pid)

    return await _lost_orders(plan, "pg_cancel_backend", cancel)


async def failover_terminated(plan: Plan) -> Verdict:
    """The same when the session whose commit waits is ended."""

    async def terminate(server: "Connection", pid: int) -> None:
        await server.execute("SELECT pg_terminate_backend($1)", pid)

    return await _lost_orders(plan, "pg_terminate_backend", terminate)


async def failover_killed(plan: Plan) -> Verdict:
    """The same when the process whose commit waits is killed, as for want of memory."""

    async def kill(_: "Connection", pid: int) -> None:
        os.kill(pid, signal.SIGKILL)

    return await _lost_orders(plan, "SIGKILL of a backend", kill)


async def _lost_orders(plan: Plan, what: str, hurt: Hurt) -> Verdict:
    async def one(shared: Shared) -> None:
        await _lost_order(shared, what, hurt)

    return await _rounds(plan, one)


async def _lost_order(shared: Shared, what: str, hurt: Hurt) -> None:
    """An order that only the primary has; the primary dies for good, and the order is sent again with its key."""
    primary = await shared.cluster.until_formed()
    standbys = shared.standbys(primary)
    shared.fault("frozen:", standbys)
    for node in standbys:
        node.freeze()
    # It would notice that its standbys are away, agree that nobody may take over, and nothing would be lost.
    primary.freeze_patroni()
    wish = shared.buyers.wish()
    async with shared.cluster.connected(primary) as server:
        sending = asyncio.create_task(shared.buyers.send(wish))
        try:
            pid = await _waiting(server)
        except TimeoutError:
            shared.counts[f"never waited, answer {_in_a_word(await sending)}"] += 1
            return
        shared.journal.fault(what)
        await hurt(server, pid)
    await asyncio.wait([sending], timeout=shared.chance.uniform(0.5, 10))  # a wrong 201 would come now
    shared.fault("killed:", (primary, *standbys))
    for node in (primary, *standbys):
        node.kill()  # what is on its way to a frozen standby is lost with it
    for node in standbys:
        node.start()
    shared.counts[f"first answer {_in_a_word(await sending)}"] += 1
    successor = await _successor(shared, primary)
    async with shared.cluster.connected(successor) as server:
        shared.counts["orders lost with a primary"] += not await server.fetchval(_IS_STORED, wish.key)
    await _send_again(shared, wish)


async def _successor(shared: Shared, primary: Node) -> Node:
    """Who takes over; when nobody dares to, the old primary is started again."""
    try:
        return await shared.cluster.primary(PROMOTED_SECONDS_MAX)
    except TimeoutError:
        shared.counts["nobody was promoted"] += 1
        primary.start()
        return await shared.cluster.primary()


async def _waiting(server: "Connection") -> int:
    """The backend that places an order and waits for a standby, once there is one."""
    async with asyncio.timeout(WAITING_SECONDS_MAX):
        while True:
            pid = await server.fetchval(_WAITING)
            if pid is not None:
                return int(pid)
            await asyncio.sleep(POLL_SECONDS / 10)


async def _send_again(shared: Shared, wish: Wish) -> None:
    """As a client that wants its order: until it is placed, whichever answers it gets before."""
    started = time.monotonic()
    while time.monotonic() - started < PLACED_SECONDS_MAX:
        if (await shared.buyers.send(wish)).status == 201:
            return
        await asyncio.sleep(POLL_SECONDS)
    shared.verdict.wrong.append(f"{wish.key}: sent again and again, it was not placed for {PLACED_SECONDS_MAX:g} s")


def _in_a_word(answer: Answer) -> str:
    return "201" if answer.status == 201 else str((answer.document or {}).get("code", "none"))


async def failover_404(plan: Plan) -> Verdict:
    """An order waits for frozen standbys beyond its final_after; nobody may be told that it is nowhere."""
    return await _rounds(plan, _looked_up)


async def _looked_up(shared: Shared) -> None:
    primary = await shared.cluster.until_formed()
    standbys = shared.standbys(primary)
    shared.fault("frozen:", standbys)
    for node in standbys:
        node.freeze()
    wish = shared.buyers.wish()
    answer = await shared.buyers.send(wish)
    shared.counts[f"first answer {_in_a_word(answer)}"] += 1
    told = (answer.document or {}).get("final_after")
    final_after = parse_time(told) if told else datetime.now(UTC) + timedelta(seconds=FINAL_SECONDS_MAX)
    while datetime.now(UTC) < final_after + timedelta(seconds=BEYOND_FINAL_SECONDS):
        await _look_up(shared, wish, final_after)
        await asyncio.sleep(0.5)
    shared.fault("thawed:", standbys)
    for node in standbys:
        node.thaw()
    started = time.monotonic()
    while time.monotonic() - started < PLACED_SECONDS_MAX:
        if (await _look_up(shared, wish, final_after)).status in (200, 404):
            return
    shared.verdict.wrong.append(f"{wish.key}: with its standbys back, it was not found out what became of it")


async def _look_up(shared: Shared, wish: Wish, final_after: datetime) -> Answer:
    is_final = datetime.now(UTC) > final_after
    answer = await shared.buyers.look_up(shared.look_up_url, wish, is_final=is_final)
    shared.counts[f"looked up, {'final' if is_final else 'too early'}: {answer.status}"] += 1
    return answer


async def failover(plan: Plan) -> Verdict:
    """The primary's server and its Patroni are killed under 60 orders a second."""

    async def one(shared: Shared) -> None:
        primary = await shared.cluster.until_formed()
        started = time.monotonic()
        buying = asyncio.create_task(shared.buyers.buy(Load(60, 35, retries=15, pause_seconds=3)))
        await asyncio.sleep(shared.chance.uniform(2, 4))
        _note(shared, "placed after ms, median", _median_ms(shared.plan, started))
        shared.fault("killed:", [primary])
        primary.kill()
        await buying
        _note_gap(shared, "s without a 201", started, time.monotonic())

    return await _rounds(plan, one)


async def failover_frozen(plan: Plan) -> Verdict:
    """The primary's whole machine, the first host of DATABASE_URL, stands still under load, and goes on later."""
    verdict = Verdict()
    counts: Counter[str] = Counter()
    async with cluster_up(plan.directory / "cluster") as cluster:
        with plan.journal() as journal:
            for number in range(plan.rounds):
                primary = await cluster.until_formed()
                async with _desk_on(plan, cluster, primary) as offset:
                    one = Plan(plan.directory, plan.seed + number, 1)
                    shared = _shared(one, cluster, journal, offset)
                    shared.verdict, shared.counts = verdict, counts
                    await _frozen(shared, primary)
        await _judged(shared)
    return verdict


async def _frozen(shared: Shared, primary: Node) -> None:
    started = time.monotonic()
    buying = asyncio.create_task(shared.buyers.buy(Load(20, 50, retries=15, pause_seconds=3)))
    await asyncio.sleep(shared.chance.uniform(2, 4))
    shared.fault("frozen, and its etcd:", [primary])
    primary.freeze(whole=True)
    await asyncio.sleep(36)
    shared.fault("thawed:", [primary])
    primary.thaw()
    thawed = time.monotonic()
    await buying
    _note_gap(shared, "s without a 201, frozen", started, thawed)
    _note_gap(shared, "s without a 201, thawed", thawed, time.monotonic())


def _note_gap(shared: Shared, what: str, started: float, ended: float) -> None:
    """The longest time without a 201 between two moments."""
    events = read(shared.plan.journal_path)
    placed = [event["t"] for event in events if event["what"] == ANSWERED and event["status"] == 201]
    moments = [started, *(moment for moment in placed if started < moment < ended), ended]
    longest = max(after - before for before, after in itertools.pairwise(moments))
    _note(shared, what, longest)
    if longest > GAP_SECONDS_MAX:
        shared.verdict.wrong.append(f"for {longest:.1f} s no order was placed")


def _note(shared: Shared, what: str, value: float) -> None:
    """A number for each round."""
    seen = shared.verdict.seen
    seen[what] = f"{seen.get(what, '')} {value:.1f}".lstrip()


def _median_ms(plan: Plan, started: float) -> float:
    """From sending to the 201, of those orders that got one since."""
    events = [event for event in read(plan.journal_path) if event["t"] >= started]
    sent = {event["key"]: event["t"] for event in events if event["what"] == SENT}
    placed = [event for event in events if event["what"] == ANSWERED and event["status"] == 201]
    return float(statistics.median(event["t"] - sent[event["key"]] for event in placed) * 1000)


FAILOVERS: dict[str, Callable[[Plan], Coroutine[None, None, Verdict]]] = {
    "failover": failover,
    "failover_frozen": failover_frozen,
    "failover_cancelled": failover_cancelled,
    "failover_terminated": failover_terminated,
    "failover_killed": failover_killed,
    "failover_404": failover_404,
}
