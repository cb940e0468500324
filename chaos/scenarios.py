"""The scenarios: each hurts a desk of its own in one way, round after round, and says what it saw."""

import asyncio
import contextlib
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path

import asyncpg
import psutil

from bench.desk import Desk, desk_up
from bench.processes import PYTHON, clean_environment, free_base
from buydesk.embedded.postgres import processes_on
from buydesk.topology import PORTS
from chaos.buyers import Buyers, Load
from chaos.clocks import step, stepped_desk
from chaos.failovers import FAILOVERS
from chaos.journal import Journal, read
from chaos.judge import by_key, findings, read_ledger
from chaos.plans import Plan, Verdict
from chaos.webhooks import webhooks

UP_SECONDS_MAX = 60.0
QUIET_SECONDS = 3.0
STEPS = (11, -11, 60, -60, 3600, -3600)  # s
STEP_SECONDS_MAX = 30.0
SPARED = 0.2  # of the processes that are killed together
# A database of 220 orders a second, however they are batched; a statement that is cancelled has cost its time.
SLOW = """
CREATE FUNCTION take_long() RETURNS trigger LANGUAGE plpgsql AS
$$BEGIN PERFORM pg_sleep((SELECT count(*) FROM written) / 220.0); RETURN NULL; END$$;
CREATE TRIGGER slow AFTER INSERT ON orders REFERENCING NEW TABLE AS written
FOR EACH STATEMENT EXECUTE FUNCTION take_long();
"""


async def _judged(desk: Desk, plan: Plan, verdict: Verdict) -> int:
    """Adds what the judge finds; returns how many orders are stored."""
    await asyncio.sleep(QUIET_SECONDS)
    async with desk.database() as database:
        ledger = await read_ledger(database)
    verdict.wrong += findings(read(plan.journal_path), ledger)
    return ledger.last_number


async def overload(plan: Plan, *arguments: str, retries: int = 0) -> Verdict:
    """An open load of 300 orders a second for a minute on a database that stores 220."""
    verdict = Verdict()
    async with desk_up(plan.directory / "desk", *arguments) as desk:
        async with desk.database() as database:
            await database.execute(SLOW)
            before = await database.fetchval("SELECT last_number FROM exposure")
        with plan.journal() as journal:
            buyers = Buyers(desk.orders_url, journal, plan.seed)
            await buyers.buy(Load(300, 60, retries))
            outcomes = dict(buyers.outcomes)
            verdict.seen["recovered after s"] = round(await buyers.until_normal(), 1)
        stored = await _judged(desk, plan, verdict) - before
    placed = outcomes.get("placed", 0)
    verdict.seen |= {"stored": stored, "placed": placed, "stored per second": round(stored / 60), **outcomes}
    if placed < 0.9 * stored:
        verdict.wrong.append(f"of {stored} orders stored only {placed} were answered 201")
    for unknown in ("outcome_unknown", "no_answer"):
        if outcomes.get(unknown):
            verdict.wrong.append(f"{outcomes[unknown]} orders ended as {unknown}")
    if float(str(verdict.seen["recovered after s"])) > 10:
        verdict.wrong.append("it was not back to normal within 10 s of the load's end")
    return verdict


async def overload_with_retries(plan: Plan) -> Verdict:
    """The same with clients that send again at once, twice."""
    return await overload(plan, retries=2)


async def overload_separate(plan: Plan) -> Verdict:
    """The same with each service in a process of its own."""
    return await overload(plan, "--separate")


async def hang(plan: Plan) -> Verdict:
    """Each service in turn is stopped (SIGSTOP) under load, and has to be replaced."""
    verdict = Verdict()
    async with desk_up(plan.directory / "desk", "--separate") as desk:
        with plan.journal() as journal:
            buyers = Buyers(desk.orders_url, journal, plan.seed)
            for service in [*PORTS] * plan.rounds:
                buying = asyncio.create_task(buyers.buy(Load(40, 14)))
                await asyncio.sleep(1)
                seconds = await _replaced_after(desk, service, journal)
                verdict.seen[f"{service} replaced after s"] = round(seconds, 1)
                if seconds > 10:
                    verdict.wrong.append(f"{service} was replaced after {seconds:.1f} s")
                await buying
        verdict.seen |= buyers.outcomes
        verdict.seen["stored"] = await _judged(desk, plan, verdict)
    return verdict


async def _replaced_after(desk: Desk, service: str, journal: Journal) -> float:
    [victim] = desk.processes()[service]
    journal.fault(f"SIGSTOP {service}")
    victim.send_signal(signal.SIGSTOP)
    started = time.monotonic()
    while time.monotonic() - started < 60:
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection("127.0.0.1", PORTS[service] + desk.offset)
            writer.write(b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    if await reader.read(12) == b"HTTP/1.1 200":
                        writer.close()
                        return time.monotonic() - started
            writer.close()
        await asyncio.sleep(0.1)
    victim.send_signal(signal.SIGCONT)
    return time.monotonic() - started


async def restarts(plan: Plan) -> Verdict:
    """Everything is killed at once, in any order, some left to die by themselves, and started in the same directory."""
    return await _restarts(plan, ())


async def restarts_without_init(plan: Plan) -> Verdict:
    """The same as process 1 of a container without an init: pids come again, and nobody reaps."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        sys.exit("restarts_without_init needs root and unshare")
    return await _restarts(plan, ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child"))


async def _restarts(plan: Plan, within: tuple[str, ...]) -> Verdict:
    verdict = Verdict()
    chance = random.Random(plan.seed)  # noqa: S311  # chance that can be had again
    data_dir, offset = plan.directory / "desk", free_base(PORTS.values())
    command = (*within, *PYTHON, "buydesk", "up", "--data-dir", str(data_dir), "--port-offset", str(offset))
    started_after: list[float] = []
    with plan.journal() as journal:
        for number in range(plan.rounds + 1):
            arguments = ("--separate",) if chance.random() < 0.5 else ()
            log = (plan.directory / f"up-{number}.log").open("wb")
            process = await asyncio.create_subprocess_exec(
                *command, *arguments, stdout=log, stderr=log, start_new_session=True, env=clean_environment()
            )
            buyers = Buyers(f"http://127.0.0.1:{PORTS['create_buy_order'] + offset}/place_order/", journal, number)
            seconds = await _first_placed(buyers, process)
            if seconds is None:
                how = "separate processes" if arguments else "one process"
                verdict.wrong.append(f"start {number}, {how}, took no order: see {log.name}")
            else:
                started_after.append(seconds)
            if number < plan.rounds:
                buying = asyncio.create_task(buyers.buy(Load(100, 1)))
                await asyncio.sleep(chance.uniform(0.1, 0.9))
                await _kill_all(psutil.Process(process.pid), data_dir, journal, chance)
                await buying
            else:
                desk = Desk(data_dir, offset, psutil.Process(process.pid), 0, is_separate=bool(arguments))
                verdict.seen["stored"] = await _judged(desk, plan, verdict)
                await _kill_all(desk.process, data_dir, journal)
            await process.wait()
            log.close()
    verdict.seen |= {
        "starts": plan.rounds,
        "came up": len(started_after) - 1,
        "slowest start s": round(max(started_after, default=0), 1),
    }
    return verdict


async def _first_placed(buyers: Buyers, process: asyncio.subprocess.Process) -> float | None:
    started = time.monotonic()
    while time.monotonic() - started < UP_SECONDS_MAX and process.returncode is None:
        if (await buyers.buy_one()).status == 201:
            return time.monotonic() - started
        await asyncio.sleep(0.05)
    return None


async def _kill_all(
    desk: psutil.Process, data_dir: Path, journal: Journal, chance: random.Random | None = None
) -> None:
    """Kills the desk and everything of it; by chance in any order, and some are left to notice by themselves."""
    found = [desk, *desk.children(recursive=True)]
    found += [each for each in processes_on(data_dir / "postgres") if each not in found]
    spared: set[int] = set()
    if chance is not None:
        chance.shuffle(found)
        spared = {each.pid for each in found if each != desk and chance.random() < SPARED}
    journal.fault(f"SIGKILL of {len(found) - len(spared)} processes, {len(spared)} spared")
    for each in found:
        if each.pid not in spared:
            with contextlib.suppress(psutil.Error):
                each.send_signal(signal.SIGKILL)


async def clocks(plan: Plan) -> Verdict:
    """Each service's clock is set 11 s, a minute and an hour ahead and behind, and has to be named, under load."""
    verdict = Verdict()
    async with stepped_desk(plan.directory) as desk:
        with plan.journal() as journal:
            buyers = Buyers(desk.orders_url, journal, plan.seed)
            for service in [*PORTS] * plan.rounds:
                for seconds in STEPS:
                    verdict.wrong += await step(desk, service, seconds, buyers, journal, seconds_max=STEP_SECONDS_MAX)
        await asyncio.sleep(QUIET_SECONDS)
        database = await asyncpg.connect(desk.dsn)
        ledger = await read_ledger(database)
        await database.close()
    told = by_key(read(plan.journal_path))
    verdict.seen |= Counter(each.outcome for each in told.values())
    verdict.seen["stored"] = ledger.last_number
    verdict.wrong += findings(read(plan.journal_path), ledger)
    return verdict


SCENARIOS: dict[str, tuple[Callable[[Plan], Coroutine[None, None, Verdict]], int]] = {
    "overload": (overload, 1),
    "overload_with_retries": (overload_with_retries, 1),
    "overload_separate": (overload_separate, 1),
    "hang": (hang, 1),
    "clocks": (clocks, 1),
    "restarts": (restarts, 50),
    "restarts_without_init": (restarts_without_init, 50),
    "webhooks": (webhooks, 50),
    **{name: (scenario, 10) for name, scenario in FAILOVERS.items()},
}


def named() -> Iterator[str]:
    """A line for each scenario: its name, how many rounds it has, what it does."""
    for name, (scenario, rounds) in SCENARIOS.items():
        summary = (scenario.__doc__ or "").strip().splitlines()[0]
        yield f"  {name:<24}{rounds:>3}  {summary}"
