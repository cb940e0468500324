"""The order of things: which desks run, and what is measured in turn against what.

What is compared is measured in turn, round after round, so that a busy minute of the machine hits both.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench import baselines, load
from bench.desk import Desk, desk_up, require_durable
from bench.processes import BenchFailed
from bench.proof import prove, settled
from bench.results import Results
from bench.standby import standby_of, waiting
from bench.stored import store

CONNECTIONS = 64
CLIENTS = 64  # with keys
RATE = 2000  # orders/s at which latency is measured
REPLAYED_MAX = 50_000
NEAR_MAX = 1000
PAGE_SIZE = 10
# Near and far pages take so little that a breath of the machine's would decide: they are measured in many short turns.
PAGE_TURNS = 5
SEPARATE_CONNECTIONS = (32, 64, 128, 256)
_PGBENCH = ("pgbench", "pgbench_statement")
_ONE_PROCESS = (
    *_PGBENCH,
    "plain",
    "echo",
    "orders_64",
    "orders_256",
    "orders_1000",
    "orders_keys",
    "quotes",
    "orders_webhook",
    "replays",
    "latency",
)
NAMES = ("start", *_ONE_PROCESS, "growth", "page", "pages", "separate", "standby")

Step = Callable[[], Awaitable[None]]


@dataclass(frozen=True)
class Plan:
    """How long and how often. wrk takes whole seconds."""

    rounds: int
    warmup_seconds: int
    seconds: int
    sweep_seconds: int
    page_seconds: int
    stored: int
    pgbench_clients: tuple[int, ...]


FULL = Plan(3, 2, 6, 3, 1, 5_000_000, (1, 2, 4, 8, 16, 32))
QUICK = Plan(1, 1, 1, 1, 1, 20_000, (1, 2))


class Bench:
    """One run of everything, or of what is in `only`."""

    def __init__(
        self, plan: Plan, directory: Path, results: Results, only: frozenset[str], say: Callable[[str], None]
    ) -> None:
        self._plan = plan
        self._directory = directory
        self._results = results
        self._only = only
        self._say = say
        self._keys: list[str] = []  # of the last orders at 64 connections

    async def run(self) -> None:
        """Raises BenchFailed when something is wrong with an answer or with what is stored."""
        if self._wants("start"):
            await self._start()
        if self._wants(*_ONE_PROCESS):
            await self._one_process()
        if self._wants("growth", "page", "pages"):
            await self._many_stored()
        if self._wants("separate"):
            await self._separate()
        if self._wants("standby"):
            await self._standby()

    def _wants(self, *names: str) -> bool:
        return not self._only or not self._only.isdisjoint(names)

    async def _in_turn(self, steps: Mapping[str, Step]) -> None:
        """Each of the steps that are wanted, then each again. The last word of a name may say which of several."""
        wanted = {name: step for name, step in steps.items() if self._wants(name)}
        for number in range(self._plan.rounds):
            if wanted:
                self._say(f" round {number + 1} of {self._plan.rounds}")
            for step in wanted.values():
                await step()

    def _found(self, name: str, value: float, unit: str, note: str = "") -> None:
        self._results.add(name, value)
        digits = 0 if value >= 100 else 2
        self._say(f"  {name:<20}{value:>12,.{digits}f} {unit}{note}")

    async def _start(self) -> None:
        self._say("Starting desks, from nothing and again")
        for number in range(self._plan.rounds):
            data_dir = self._directory / f"start{number}"
            for name in ("start_fresh", "start_again"):
                async with desk_up(data_dir) as desk:
                    self._found(name, desk.started_seconds, "s")

    async def _one_process(self) -> None:
        self._say("One process")
        async with contextlib.AsyncExitStack() as stack:
            desk = await stack.enter_async_context(desk_up(self._directory / "one"))
            await self._tell(desk)
            pgbench = baselines.Pgbench(desk)
            await pgbench.prepare()
            echo_url = await stack.enter_async_context(baselines.echo(self._directory))
            plain_url = await stack.enter_async_context(baselines.plain(desk, self._directory))
            clients = await self._best_clients(pgbench) if self._wants(*_PGBENCH) else ()
            shown = await desk.client_keys(CLIENTS) if self._wants("orders_keys") else ()
            await self._in_turn(
                {
                    "pgbench": partial(self._pgbench, pgbench, "pgbench", clients),
                    "pgbench_statement": partial(
                        self._pgbench, pgbench, "pgbench_statement", clients, "pgbench_statement.sql"
                    ),
                    "echo": partial(self._other_orders, "echo", echo_url),
                    "orders_64": partial(self._orders, "orders_64", desk, CONNECTIONS),
                    "plain": partial(self._other_orders, "plain", plain_url),
                    "replays": partial(self._replays, desk),
                    "orders_256": partial(self._orders, "orders_256", desk, 256),
                    "orders_1000": partial(self._orders, "orders_1000", desk, 1000),
                    "orders_keys": partial(self._orders_by_keys, desk, shown),
                    "quotes": partial(self._quotes, desk),
                    "orders_webhook": partial(self._orders_with_webhook, desk, echo_url),
                }
            )
            if self._wants("latency"):
                self._say(f"Latency at {RATE:,} orders/s")
            await self._in_turn({"latency": partial(self._latencies, desk, echo_url, pgbench)})
            self._results.add("memory", desk.python_peak_bytes() / 1e6)

    async def _many_stored(self) -> None:
        self._say(f"{self._plan.stored:,} stored orders")
        async with contextlib.AsyncExitStack() as stack:
            full = await stack.enter_async_context(desk_up(self._directory / "stored"))
            async with full.database() as database:
                await store(database, self._plan.stored, self._say)
            empty = await stack.enter_async_context(desk_up(self._directory / "none"))
            echo_url = await stack.enter_async_context(baselines.echo(self._directory))
            far = self._plan.stored * 4 // 5
            last = self._plan.stored - PAGE_SIZE
            await self._in_turn({"page": partial(self._page_times, full, far, last)})
            shown = await full.anonymous_key()
            await self._in_turn({"pages": partial(self._pages, full, last, echo_url, shown)})
            if self._wants("growth"):
                for desk in (empty, full):
                    await self._new_orders(desk, CONNECTIONS, self._plan.warmup_seconds * 2)
            await self._in_turn({"growth": partial(self._growth, empty, full)})

    async def _separate(self) -> None:
        self._say("Separate services")
        async with desk_up(self._directory / "separate", "--separate") as desk:
            await self._tell(desk)
            pgbench = baselines.Pgbench(desk)
            await pgbench.prepare()
            clients = self._results.facts.get("pgbench_clients") or await self._best_clients(pgbench)

            async def each() -> None:
                await self._pgbench(pgbench, "separate_pgbench", clients)
                for connections in SEPARATE_CONNECTIONS:
                    await self._orders(f"separate_{connections}", desk, connections)

            await self._in_turn({"separate": each})

    async def _standby(self) -> None:
        self._say("Commits that wait for a standby on this machine")
        async with desk_up(self._directory / "primary") as desk, standby_of(desk, self._directory):

            async def each() -> None:
                await self._orders("standby_none", desk, CONNECTIONS)
                async with waiting(desk):
                    await self._orders("standby_sync", desk, CONNECTIONS)

            await self._in_turn({"standby": each})

    async def _tell(self, desk: Desk) -> None:
        """What the figures stand on."""
        durable = await require_durable(desk)
        async with desk.database() as database:
            version = await database.fetchval("SHOW server_version")
        self._results.facts |= {"durable": durable, "postgresql": version, "rate": RATE, "stored": self._plan.stored}
        self._say(f"  PostgreSQL {version}: " + ", ".join(f"{name} {value}" for name, value in durable.items()))

    async def _best_clients(self, pgbench: baselines.Pgbench) -> tuple[int, ...]:
        """The two numbers of clients with which pgbench does best, each tried once."""
        tried = {
            clients: await pgbench.per_second(clients, self._plan.sweep_seconds)
            for clients in self._plan.pgbench_clients
        }
        self._say("  pgbench, clients: orders/s  " + ", ".join(f"{n}: {tps:,.0f}" for n, tps in tried.items()))
        best = tuple(sorted(tried, key=lambda clients: -tried[clients])[:2])
        self._results.facts |= {"pgbench_sweep": {str(n): tps for n, tps in tried.items()}, "pgbench_clients": best}
        return best

    async def _pgbench(
        self, pgbench: baselines.Pgbench, name: str, clients: tuple[int, ...], script: str = "pgbench_order.sql"
    ) -> None:
        for count in clients:
            per_second = await pgbench.per_second(count, self._plan.seconds, script)
            self._found(f"{name}_{count}", per_second, "orders/s")

    async def _other_orders(self, name: str, url: str) -> None:
        """Orders at something that is not the desk, at 64 connections."""
        await load.orders(url, CONNECTIONS, self._plan.warmup_seconds, self._directory)
        run = await load.orders(url, CONNECTIONS, self._plan.seconds, self._directory)
        if run.errors:
            raise BenchFailed(f"{name}: {run.wrong}")
        self._found(name, run.per_second, "orders/s")

    async def _orders(self, name: str, desk: Desk, connections: int, shown: Sequence[str] = ()) -> None:
        """New orders, proved; errors fail the bench unless they have a measure of their own."""
        await self._new_orders(desk, connections, self._plan.warmup_seconds, shown)
        spent = desk.cpu_seconds()
        run = await self._new_orders(desk, connections, self._plan.seconds, shown)
        spent = {part: seconds - spent.get(part, 0.0) for part, seconds in desk.cpu_seconds().items()}
        self._results.add_cpu(name, spent | {"wrk": run.load_cpu_seconds}, run.answers)
        if name in ("orders_256", "orders_1000"):
            self._results.add(name.replace("orders", "errors"), run.errors)
        elif run.errors:
            raise BenchFailed(f"{name}: {run.wrong}")
        if name == "orders_64":
            self._keys = run.keys[:REPLAYED_MAX]
        cpu = sum(seconds for part, seconds in spent.items()) / run.answers * 1e6
        self._found(name, run.per_second, "orders/s", f"   {cpu:,.0f} µs CPU an order")

    async def _orders_by_keys(self, desk: Desk, shown: Sequence[str]) -> None:
        for connections in (CONNECTIONS, 1000):
            await self._orders(f"orders_keys_{connections}", desk, connections, shown)

    async def _quotes(self, desk: Desk) -> None:
        """Quotes, and then the orders by them, proved."""
        url = desk.url("create_buy_order") + "/quotes/"
        tokens: list[str] = []
        for seconds in (self._plan.warmup_seconds, self._plan.seconds):
            run = await load.quotes(url, CONNECTIONS, seconds, self._directory)
            tokens += run.keys
            if run.errors:
                raise BenchFailed(f"quotes: {run.wrong}")
        self._found("quotes", run.per_second, "quotes/s")
        async with desk.database() as database:
            before = await settled(database)
            seconds = max(1, self._plan.seconds // 2)  # they must not run out
            run = await load.orders_by_quote(desk.orders_url, CONNECTIONS, seconds, tokens, self._directory)
            if run.errors:
                raise BenchFailed(f"orders by quote: {run.wrong}")
            self._results.add_proof(await prove(database, before, run.keys, CONNECTIONS, are_quotes=True))
        self._found("orders_quotes", run.per_second, "orders/s")

    async def _orders_with_webhook(self, desk: Desk, echo_url: str) -> None:
        """Orders whose events are delivered meanwhile, and deliveries when no orders come any more."""
        async with desk.webhook(echo_url.replace("/place_order/", "/events")) as delivered:
            await self._orders("orders_webhook", desk, CONNECTIONS)
            before, started = await delivered(), time.monotonic()
            await asyncio.sleep(self._plan.seconds)
            count, seconds = await delivered() - before, time.monotonic() - started
            self._found("deliveries", count / seconds, "events/s")

    async def _new_orders(self, desk: Desk, connections: int, seconds: int, shown: Sequence[str] = ()) -> load.Run:
        """A run of orders and its proof."""
        async with desk.database() as database:
            before = await settled(database)
            run = await load.orders(desk.orders_url, connections, seconds, self._directory, shown)
            # A request whose answer wrk calls wrong may be stored as well.
            proof = await prove(database, before, run.keys, connections + run.errors)
        self._results.add_proof(proof)
        return run

    async def _replays(self, desk: Desk) -> None:
        """Repeats of the last orders, all answered as such, and none placed again."""
        if not self._keys:
            self._keys = (await self._new_orders(desk, CONNECTIONS, self._plan.seconds)).keys[:REPLAYED_MAX]
        async with desk.database() as database:
            before = await settled(database)
            for seconds in (self._plan.warmup_seconds, self._plan.seconds):
                run = await load.replays(desk.orders_url, CONNECTIONS, seconds, self._keys, self._directory)
                if run.errors or await settled(database) != before:
                    raise BenchFailed(f"replays: {run.wrong}, or orders were added")
        self._results.replays_proved += run.answers
        self._found("replays", run.per_second, "orders/s")

    async def _latencies(self, desk: Desk, echo_url: str, pgbench: baselines.Pgbench) -> None:
        times = (self._plan.warmup_seconds, self._plan.seconds + 2 * (self._plan.rounds > 1))
        async with desk.database() as database:
            before = await settled(database)
            found = await load.latency(desk.orders_url, RATE, *times, self._directory)
            self._results.add_proof(await prove(database, before, found.keys, 0))
        for name, latency in (("", found), ("echo_", await load.latency(echo_url, RATE, *times, self._directory))):
            self._found(f"{name}latency_p50", latency.p50_ms, "ms")
            self._found(f"{name}latency_p90", latency.p90_ms, "ms")
            self._found(f"{name}latency_p99", latency.p99_ms, "ms")
            self._found(f"{name}latency_max", latency.max_ms, "ms")
        for name, milliseconds in zip(("p50", "p99"), await pgbench.bare_latency(RATE, times[1]), strict=True):
            self._found(f"bare_latency_{name}", milliseconds, "ms")

    async def _page_times(self, desk: Desk, far: int, last: int) -> None:
        """One reader; the pages a reader by `start` gets are never cached."""
        url = desk.url("fetch_buy_orders") + "/get_orders/"
        for name, lowest, highest in (("page_near", 0, NEAR_MAX - 1), ("page_far", far, last)) * PAGE_TURNS:
            run = await load.pages(url, 1, self._plan.page_seconds, lowest, highest)
            if run.errors:
                raise BenchFailed(f"{name}: {run.wrong}")
            self._found(name, 1000 / run.per_second, "ms")

    async def _pages(self, desk: Desk, last: int, echo_url: str, *shown: str) -> None:
        url = desk.url("fetch_buy_orders") + "/get_orders/"
        for name, keys in (("pages", ()), ("pages_keys", shown)):
            for seconds in (self._plan.warmup_seconds, self._plan.seconds):
                run = await load.pages(url, CONNECTIONS, seconds, 0, last, *keys)
                if run.errors:
                    raise BenchFailed(f"{name}: {run.wrong}")
            self._found(name, run.per_second, "pages/s")
        await self._other_orders("pages_echo", echo_url)

    async def _growth(self, empty: Desk, full: Desk) -> None:
        await self._orders("growth_none", empty, CONNECTIONS)
        await self._orders("growth_stored", full, CONNECTIONS)
