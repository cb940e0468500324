"""`buydesk up`: a whole desk on one machine, with what it needs started along: PostgreSQL, migrations, the services.

The services run in this process, each on its own port, or (`--separate`) as a supervised process each.
"""

import asyncio
import contextlib
import importlib
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from buydesk.embedded.accounts import server_account
from buydesk.embedded.data_dir import CLUSTER, default_data_dir, locked, read_private, secret_file, write_private
from buydesk.embedded.postgres import EmbeddedPostgres
from buydesk.embedded.programs import find_redis
from buydesk.embedded.redis import EmbeddedRedis
from buydesk.embedded.supervisor import SUPERVISOR_FD_VARIABLE, Child, supervise, supervisor_pipe
from buydesk.errors import CannotStart, DeskError
from buydesk.http.listeners import bind, close
from buydesk.runtime.signals import stop_signals
from buydesk.runtime.startup_report import (
    READY_SECONDS_MAX,
    Dependencies,
    new_session,
    responds,
    startup_report,
    wait_until_ready,
    wait_until_selling,
)
from buydesk.settings.model import Settings, variable
from buydesk.settings.secrets import OWNERS, SECRET_KEYS, TOKENS, new_token
from buydesk.signing_keys import new_signing_key
from buydesk.times import utc_now
from buydesk.topology import PORTS

COMMAND = (sys.executable, "-m", "buydesk")
# What services share with each other, and is made when it is not given.
SHARED: Mapping[str, Callable[[], str]] = dict.fromkeys(TOKENS, new_token) | dict.fromkeys(SECRET_KEYS, new_signing_key)
DATABASE_SECONDS_MAX = 30.0
MIGRATE_SECONDS_MAX = 120.0
GRACE_BEYOND_DRAIN_SECONDS = 3.0

Say = Callable[[str], None]


async def up(settings: Settings, *, separate: bool, say: Say) -> None:
    """Runs the desk until SIGINT or SIGTERM, telling by `say` what it does; raises CannotStart."""
    async with contextlib.AsyncExitStack() as stack:
        stop = stack.enter_context(stop_signals())
        stopped = asyncio.create_task(stop.wait())
        stack.push_async_callback(_cancelled, stopped)
        starting = asyncio.create_task(_start(settings, stack, separate=separate, say=say))
        await asyncio.wait([starting, stopped], return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            say(starting.result())
            await stopped
        else:
            await _cancelled(starting)
        say("Stopping: finishing what was accepted …")
    say("Stopped.")


async def _start(settings: Settings, stack: contextlib.AsyncExitStack, *, separate: bool, say: Say) -> str:
    """Starts everything, to be ended by the stack in the reverse order; returns the table of what runs."""
    started, started_at = time.monotonic(), utc_now()
    given = tuple(variable(name) for name in ("database_url", "redis_url") if getattr(settings, name) is not None)
    data_dir = stack.enter_context(
        locked(settings.data_dir or default_data_dir(settings.port_offset, is_live=settings.price_feed == "live"))
    )
    # The services of this desk ask each other; only to clients an order may be shown at another address.
    own_urls = {f"{name}_url": settings.own_url(name) for name in ("api_cache_proxy", "db_proxy", "health_check")}
    # They are given its access explicitly.
    settings = settings.model_copy(update={"data_dir": data_dir, "access": settings.access, **own_urls})
    made = {
        name: SecretStr(kept_secret(secret_file(data_dir, name), new))
        for name, new in SHARED.items()
        if name not in settings.model_fields_set
    }
    settings = settings.model_copy(update=made)
    accepted = {"price_keys": settings.accepted_price_keys, "quote_keys": settings.accepted_quote_keys}
    settings = settings.model_copy(update=accepted)
    listeners = bind(settings, PORTS)
    stack.callback(close, listeners.values())
    # FastAPI and the like take half a second to import, in which PostgreSQL can start.
    importing = asyncio.create_task(asyncio.to_thread(importlib.import_module, "buydesk.runtime.serve"))
    stack.push_async_callback(asyncio.wait, [importing])
    settings, database = await _start_postgres(settings, data_dir, stack, say)
    settings, redis = await _start_redis(settings, data_dir, stack, separate=separate, say=say)
    await importing
    await _migrate(settings, say)
    if variable("database_url") not in given:
        await _keep_operator_key(settings, data_dir)
    say("Starting the services …")
    if separate:
        close(listeners.values())
        await _start_separately(settings, stack)
    else:
        from buydesk.runtime.serve import run_wired  # noqa: PLC0415  # imported by now
        from buydesk.runtime.wiring import wire  # noqa: PLC0415  # as above

        await stack.enter_async_context(run_wired(wire(settings), listeners, settings))
    async with new_session() as session:
        # A desk without a price is up all the same: it lists orders, answers repeats and says why it sells nothing.
        missing = await wait_until_selling(session, settings, started_at, READY_SECONDS_MAX)
        return await startup_report(
            session, settings, Dependencies(database, redis, given), time.monotonic() - started, missing
        )


def kept_secret(path: Path, new: Callable[[], str]) -> str:
    """The secret in the file; a `new` one when there is no such file yet, which then is for its owner only."""
    if kept := read_private(path):
        return kept
    made = new()
    write_private(path, made)
    return made


async def _start_postgres(
    settings: Settings, data_dir: Path, stack: contextlib.AsyncExitStack, say: Say
) -> tuple[Settings, str]:
    """PostgreSQL, unless a setting says where one is; returns the settings with its address, and what to call it."""
    if settings.database_url is not None:
        return settings, "at DATABASE_URL"
    postgres = EmbeddedPostgres(data_dir)
    settings = settings.model_copy(update={"database_url": SecretStr(postgres.dsn)})
    is_new = postgres.is_new
    say("Making a PostgreSQL 18 database …" if is_new else "Starting PostgreSQL 18 …")
    # Migrating takes longer to load than to do: for a new database it is loaded while the server starts.
    migrating = asyncio.create_task(_run_migrate(settings, DATABASE_SECONDS_MAX) if is_new else asyncio.sleep(0))
    stack.push_async_callback(_cancelled, migrating)
    await _keep_running(postgres, stack)
    await migrating
    return settings, f"PostgreSQL 18, embedded, in {data_dir}"


async def _start_redis(
    settings: Settings, data_dir: Path, stack: contextlib.AsyncExitStack, *, separate: bool, say: Say
) -> tuple[Settings, str]:
    """A Redis for separate services, where there is one; one process shares its memory and needs none."""
    if settings.redis_url is not None:
        return settings, "at REDIS_URL"
    program = find_redis(server_account(data_dir / CLUSTER)) if separate else None
    if program is None:
        return settings, "none: prices and reports are kept in memory"
    say(f"Starting {program} …")
    redis = EmbeddedRedis(data_dir, program)
    await _keep_running(redis, stack)
    return settings.model_copy(update={"redis_url": SecretStr(redis.url)}), f"{program}, embedded"


async def _keep_running(child: Child, stack: contextlib.AsyncExitStack) -> None:
    """Starts it; from now on it is started again when it dies, until the stack ends it."""
    await child.start()
    stack.push_async_callback(child.stop)
    watching = asyncio.create_task(supervise(child))
    stack.push_async_callback(_cancelled, watching)


async def _cancelled(task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _migrate(settings: Settings, say: Say) -> None:
    """Brings the database up to date where it is not. Raises CannotStart when callers would need a key and there is
    none."""
    from buydesk.backends.postgres.clients import PostgresKeys  # noqa: PLC0415  # imported by now, with the services
    from buydesk.backends.postgres.ledger import PostgresLedger  # noqa: PLC0415

    assert settings.database_url is not None  # noqa: S101  # given or found by now
    url = settings.database_url.get_secret_value()
    ledger = PostgresLedger(url, settings, livemode=settings.price_feed == "live")
    try:
        try:
            await ledger.check()
        except DeskError:
            say("Migrating the database …")
            await _run_migrate(settings, wait_seconds=0)
        if settings.access == "keys":
            await PostgresKeys(ledger).require_any()
    finally:
        await ledger.close()


async def _keep_operator_key(settings: Settings, data_dir: Path) -> None:
    """Has a key for operators in the data directory, by whose database it is taken."""
    from buydesk.runtime.registry import keep_operator_key  # noqa: PLC0415  # imported by now, with the services

    assert settings.database_url is not None  # noqa: S101  # the embedded one's
    await keep_operator_key(settings.database_url.get_secret_value(), secret_file(data_dir, "operator_key"))


async def _run_migrate(settings: Settings, wait_seconds: float) -> None:
    """Migrates in a process of its own, so that what it loads does not stay in memory; waits so long for a database."""
    process = await asyncio.create_subprocess_exec(
        *(*COMMAND, "migrate", "--wait", f"{wait_seconds:g}"),
        env=environment(settings, "db_proxy"),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(MIGRATE_SECONDS_MAX):
            _, said = await process.communicate()
    except TimeoutError as error:
        raise CannotStart(f"migrating took longer than {MIGRATE_SECONDS_MAX:g} s: see `buydesk migrate`") from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        # Of another last line, as of a traceback, nobody here knows what it shows.
        found = re.search(r"^buydesk: (.+)\s*\Z", said.decode(errors="replace"), re.MULTILINE)
        raise CannotStart(found[1] if found else "migrating failed: `buydesk migrate` says more")


async def _start_separately(settings: Settings, stack: contextlib.AsyncExitStack) -> None:
    """Each service as a process of its own, started again when it dies; ended in the reverse order."""
    pipe_fd = stack.enter_context(supervisor_pipe())
    session = await stack.enter_async_context(new_session())
    waited_seconds = 0.0
    for service in PORTS:
        is_alive = partial(responds, session, settings.own_url(service) + "/livez")
        child = Child(
            service,
            [*COMMAND, "serve", service],
            env=environment(settings, service) | {SUPERVISOR_FD_VARIABLE: str(pipe_fd)},
            is_ready=is_alive,
            is_alive=is_alive,
            pass_fds=[pipe_fd],
            grace_seconds=settings.drain_seconds_max + GRACE_BEYOND_DRAIN_SECONDS,
        )
        await _keep_running(child, stack)
        if service != "create_buy_order":  # its price may take a tick to come
            since = time.monotonic()
            await wait_until_ready(session, settings.own_url(service), READY_SECONDS_MAX - waited_seconds)
            waited_seconds += time.monotonic() - since


def environment(settings: Settings, service: str) -> dict[str, str]:
    """The environment of a child that runs the service: every setting that differs from its default, by its name."""
    env = {name: value for name, value in os.environ.items() if name not in map(variable, OWNERS)}
    for field in settings.model_fields_set:
        value = getattr(settings, field)
        if value is not None and service in OWNERS.get(field, (service,)):
            env[variable(field)] = _text(value)
    return env


def _text(value: object) -> str:
    """The value of a setting as a variable has it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if isinstance(value, Mapping):
        return ",".join(f"{name}:{each}" for name, each in value.items())
    return value.get_secret_value() if isinstance(value, SecretStr) else str(value)
