"""The embedded PostgreSQL: keeps what was committed, whatever ended the server or the desk before."""

import asyncio
import os
import shutil
import signal
import stat
import time
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import psutil
import pytest

from buydesk.embedded import postgres as embedded
from buydesk.embedded.accounts import Account, server_account
from buydesk.embedded.data_dir import LOG_BYTES_MAX, locked
from buydesk.embedded.postgres import STOP_SECONDS_MAX, EmbeddedPostgres, kill_orphans, processes_on
from buydesk.embedded.supervisor import Child, poll_until, supervise
from buydesk.errors import CannotStart

SECONDS_MAX = 20


@pytest.fixture(scope="module")
async def data_dir(open_directory: Path) -> AsyncIterator[Path]:
    """One cluster for the tests of this module, made and run as the product does it."""
    with locked(open_directory / "embedded") as directory:
        made = EmbeddedPostgres(directory)
        before = made.is_new
        await made.prepare()
        assert [before, made.is_new] == [True, False]
        yield directory


@pytest.fixture
async def server(data_dir: Path) -> AsyncIterator[EmbeddedPostgres]:
    """Prepared, not started; stopped at the end."""
    server = EmbeddedPostgres(data_dir)
    await server.prepare()
    yield server
    await server.stop()


@pytest.fixture
async def bystander() -> AsyncIterator[Child]:
    """Another program of PostgreSQL's account."""
    child = Child("bystander", ["sleep", "600"], account=server_account())
    await child.start()
    yield child
    await child.stop()


async def fetch(server: EmbeddedPostgres, query: str, *arguments: object) -> object:
    connection = await asyncpg.connect(server.dsn)
    try:
        return await connection.fetchval(query, *arguments)
    finally:
        await connection.close()


async def keep(server: EmbeddedPostgres, number: int) -> None:
    await fetch(server, "CREATE TABLE IF NOT EXISTS kept (number int)")
    await fetch(server, "INSERT INTO kept VALUES ($1)", number)


async def is_kept(server: EmbeddedPostgres, number: int) -> object:
    return await fetch(server, "SELECT count(*) = 1 FROM kept WHERE number = $1", number)


async def test_what_was_committed_is_there_after_a_restart(server: EmbeddedPostgres, data_dir: Path) -> None:
    await server.start()
    await keep(server, 1)
    await server.stop()
    assert server.pid is None
    assert await server.wait() == "exit code 0"
    again = EmbeddedPostgres(data_dir)
    await again.prepare()
    await again.start()
    assert await is_kept(again, 1)
    await again.stop()


@pytest.fixture
async def running(server: EmbeddedPostgres) -> EmbeddedPostgres:
    await server.start()
    return server


async def test_the_server_is_durable_and_listens_on_no_network(running: EmbeddedPostgres) -> None:
    expected = {
        "fsync": "on",
        "full_page_writes": "on",
        "synchronous_commit": "on",
        "listen_addresses": "",
        "server_encoding": "UTF8",
        "max_connections": "100",
    }
    assert {name: await fetch(running, f"SHOW {name}") for name in expected} == expected


async def test_others_cannot_enter_the_directories_of_the_server(running: EmbeddedPostgres, data_dir: Path) -> None:
    for name in ("postgres", "socket"):
        assert stat.S_IMODE((data_dir / name).stat().st_mode) == 0o700


async def test_the_server_is_not_in_the_process_group_of_the_desk(running: EmbeddedPostgres) -> None:
    assert running.pid is not None
    assert os.getpgid(running.pid) == running.pid != os.getpgid(0)


async def test_the_server_knows_nothing_of_the_environment_of_the_desk(running: EmbeddedPostgres) -> None:
    assert running.pid is not None
    assert set(psutil.Process(running.pid).environ()) <= {"PATH", "LD_LIBRARY_PATH", "LC_ALL", "TZ", "PGDATA"}


async def test_an_orphan_of_a_killed_desk_is_ended_by_the_next_start(server: EmbeddedPostgres, data_dir: Path) -> None:
    await server.start()
    await keep(server, 2)
    next_server = EmbeddedPostgres(data_dir)
    await next_server.prepare()
    await next_server.start()
    try:
        assert await server.wait() == "exit code 0"  # a clean stop
        assert await is_kept(next_server, 2)
    finally:
        await next_server.stop()


async def test_an_orphan_that_may_not_be_looked_into_is_found_by_its_command(
    server: EmbeddedPostgres, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(process: psutil.Process) -> str:
        raise psutil.AccessDenied(process.pid)

    await server.start()
    monkeypatch.setattr(psutil.Process, "cwd", denied)
    assert [process.pid for process in processes_on(data_dir / "postgres")] == [server.pid]
    assert processes_on(data_dir / "elsewhere") == []


async def test_a_stale_pid_file_does_not_block(server: EmbeddedPostgres, data_dir: Path) -> None:
    gone = Child("gone", ["true"])
    await gone.start()
    pid = gone.pid
    await gone.wait()
    write_pid_file(data_dir, pid or 1)
    await server.start()
    assert await fetch(server, "SELECT 1") == 1


async def test_a_pid_file_with_the_pid_of_another_program_neither_blocks_nor_harms_it(
    server: EmbeddedPostgres, data_dir: Path, bystander: Child
) -> None:
    assert bystander.pid is not None
    write_pid_file(data_dir, bystander.pid)
    await server.start()
    assert await fetch(server, "SELECT 1") == 1
    assert bystander.pid is not None


@pytest.mark.parametrize("has_pid_file", [True, False])
async def test_a_socket_s_lock_with_the_pid_of_another_program_neither_blocks_nor_harms_it(
    server: EmbeddedPostgres, data_dir: Path, bystander: Child, has_pid_file: bool
) -> None:
    """So it is after a power cut, or in a container, where pids come again; and a zombie has its pid for good."""
    assert bystander.pid is not None
    if has_pid_file:
        write_pid_file(data_dir, bystander.pid)
    lock = data_dir / "socket" / ".s.PGSQL.5432.lock"
    lock.write_text(f"{bystander.pid}\n{data_dir / 'postgres'}\n1700000000\n5432\n{data_dir / 'socket'}\n")
    owner = lock.parent.stat()
    os.chown(lock, owner.st_uid, owner.st_gid)
    await server.start()
    assert await fetch(server, "SELECT 1") == 1
    assert bystander.pid is not None


async def test_after_the_server_and_all_its_backends_were_killed_it_starts_again_unreaped(
    server: EmbeddedPostgres, data_dir: Path
) -> None:
    """Nobody has asked for its exit code yet: to PostgreSQL the pid in its lock files is of a process that runs."""
    await server.start()
    await keep(server, 7)
    for process in processes_on(data_dir / "postgres"):
        process.kill()
    await poll_until(lambda: not processes_on(data_dir / "postgres"), SECONDS_MAX)
    next_server = EmbeddedPostgres(data_dir)
    await next_server.prepare()
    await next_server.start()
    try:
        assert await is_kept(next_server, 7)
    finally:
        await next_server.stop()
        assert await server.wait() == "signal SIGKILL"


def write_pid_file(data_dir: Path, pid: int) -> None:
    """As a server that was killed leaves it."""
    file = data_dir / "postgres" / "postmaster.pid"
    file.write_text(f"{pid}\n{file.parent}\n1700000000\n5432\n{data_dir / 'socket'}\n\n  1 1\nready   \n")
    owner = file.parent.stat()
    os.chown(file, owner.st_uid, owner.st_gid)
    file.chmod(0o600)


async def test_a_backend_that_outlives_its_postmaster_does_not_block(server: EmbeddedPostgres, data_dir: Path) -> None:
    await server.start()
    await keep(server, 3)
    connection = await asyncpg.connect(server.dsn)
    backend = await connection.fetchval("SELECT pg_backend_pid()")
    os.kill(backend, signal.SIGSTOP)  # it cannot notice
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    assert await server.wait() == "signal SIGKILL"
    await poll_until(lambda: [each.pid for each in processes_on(data_dir / "postgres")] == [backend], SECONDS_MAX)
    since = time.monotonic()
    await kill_orphans(data_dir / "postgres", data_dir / "socket")
    assert time.monotonic() - since < STOP_SECONDS_MAX / 2  # nobody is waited for who is not there
    connection.terminate()
    await server.start()
    assert await is_kept(server, 3)


async def test_a_server_that_does_not_end_is_told(
    data_dir: Path, bystander: Child, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pid_file(data_dir, 1)
    ended = psutil.Process(bystander.pid)
    await bystander.stop()
    monkeypatch.setattr(embedded, "processes_on", lambda cluster: [ended])
    with pytest.raises(CannotStart, match=r"another PostgreSQL runs on .* and does not stop: end it"):
        await kill_orphans(data_dir / "postgres", data_dir / "socket", grace_seconds=0.02)


async def test_a_killed_server_is_started_again_with_everything_committed(
    server: EmbeddedPostgres, caplog: pytest.LogCaptureFixture
) -> None:
    await server.start()
    await keep(server, 4)
    first = server.pid
    assert first is not None
    watching = asyncio.create_task(supervise(server))
    os.kill(first, signal.SIGKILL)
    await poll_until(lambda: "ended" in caplog.text, SECONDS_MAX)
    async with asyncio.timeout(SECONDS_MAX):
        while not await answers(server):
            await asyncio.sleep(0.02)
    assert await is_kept(server, 4)
    assert server.pid != first
    assert [record.getMessage() for record in caplog.records] == ["postgres ended (signal SIGKILL), restart in 0.2 s"]
    watching.cancel()


async def answers(server: EmbeddedPostgres, database: str = "buydesk") -> bool:
    try:
        connection = await asyncpg.connect(server.dsn_of(database))
    except (OSError, asyncpg.PostgresError):
        return False
    await connection.close()
    return True


async def test_the_log_is_kept_within_bounds_while_the_server_runs(
    server: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    await server.start()
    os.truncate(server.log_path, LOG_BYTES_MAX + 1)
    monkeypatch.setattr(embedded, "LOG_LOOK_SECONDS", 0.01)
    watching = asyncio.create_task(server.wait())
    await poll_until(lambda: server.log_path.stat().st_size < LOG_BYTES_MAX, SECONDS_MAX)
    assert not watching.done()
    watching.cancel()


async def test_a_server_that_ends_while_starting_says_why(data_dir: Path) -> None:
    server = EmbeddedPostgres(data_dir, further_settings={"shared_buffers": "nonsense"})
    await server.prepare()
    with pytest.raises(CannotStart, match=r"postgres ended while starting .*shared_buffers.*postgres\.log\)"):
        await server.start()


async def test_a_server_is_started_when_its_database_opens_and_not_before(
    server: EmbeddedPostgres, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await server.start()
    await maintain(server, "ALTER DATABASE buydesk ALLOW_CONNECTIONS false")
    await server.stop()

    monkeypatch.setattr(embedded, "START_SECONDS_MAX", 0.3)
    impatient = EmbeddedPostgres(data_dir)
    await impatient.prepare()
    with pytest.raises(
        CannotStart, match=r"postgres was not ready within 0\.3 s: .*not currently accepting connections"
    ):
        await impatient.start()
    assert impatient.pid is None

    starting = asyncio.create_task(server.start())
    await poll_until((data_dir / "socket" / ".s.PGSQL.5432").exists, SECONDS_MAX)
    async with asyncio.timeout(SECONDS_MAX):
        while not await answers(server, "postgres"):
            await asyncio.sleep(0.02)
    assert not starting.done()
    await maintain(server, "ALTER DATABASE buydesk ALLOW_CONNECTIONS true")
    await starting


async def maintain(server: EmbeddedPostgres, statement: str) -> None:
    connection = await asyncpg.connect(server.dsn_of("postgres"))
    await connection.execute(statement)
    await connection.close()


async def test_a_server_that_was_not_prepared_is_by_its_start(data_dir: Path) -> None:
    server = EmbeddedPostgres(data_dir)
    assert server.pid is None
    await server.stop()
    await server.start()
    assert await fetch(server, "SELECT 1") == 1
    await server.stop()


async def test_a_cluster_of_another_version_is_refused(open_directory: Path) -> None:
    with locked(open_directory / "older") as directory:
        (directory / "postgres").mkdir()
        (directory / "postgres" / "PG_VERSION").write_text("16\n")
        with pytest.raises(CannotStart, match="was made by PostgreSQL 16 and this is 18: use another --data-dir"):
            await EmbeddedPostgres(directory, account=server_account()).prepare()


async def test_a_directory_that_is_no_cluster_is_refused(open_directory: Path) -> None:
    with locked(open_directory / "other") as directory:
        (directory / "postgres").mkdir()
        with pytest.raises(CannotStart, match=r"cannot use .*PG_VERSION: No such file or directory; run as the user"):
            await EmbeddedPostgres(directory).prepare()


async def test_a_data_directory_with_too_long_a_path_is_refused_before_anything_is_made(open_directory: Path) -> None:
    with locked(open_directory / ("x" * 90)) as directory:
        with pytest.raises(CannotStart, match="use another --data-dir, with a shorter path"):
            await EmbeddedPostgres(directory).prepare()
        assert [each.name for each in directory.iterdir()] == ["lock"]


async def test_a_data_directory_that_the_account_cannot_enter_is_refused(open_directory: Path) -> None:
    stranger = Account("stranger", 64_000, 64_000)
    closed = open_directory / "closed"
    closed.mkdir(mode=0o700)
    with locked(closed / "data") as directory:
        with pytest.raises(CannotStart) as refused:
            await EmbeddedPostgres(directory, account=stranger).prepare()
        assert [each.name for each in directory.iterdir()] == ["lock"]
    assert str(refused.value) == (
        "PostgreSQL, which runs as the account stranger because the desk is root, cannot enter "
        f"{closed}: use another --data-dir, such as /var/lib/buydesk/data"
    )


@pytest.mark.parametrize(
    ("script", "seconds_max", "message"),
    [
        ("echo first; echo no space left; exit 1", 10, "initdb could not make .*: no space left"),
        ("exit 1", 10, "initdb could not make .*: it said nothing"),
        ("exec sleep 600", 0.1, r"initdb did not finish within 0\.1 s"),
    ],
)
async def test_an_initdb_that_fails_leaves_nothing_that_looks_like_a_cluster(
    open_directory: Path, monkeypatch: pytest.MonkeyPatch, script: str, seconds_max: float, message: str
) -> None:
    installed = open_directory / "broken"
    shutil.rmtree(installed, ignore_errors=True)
    (installed / "bin").mkdir(parents=True)
    (installed / "bin" / "initdb").write_text(f"#!/bin/sh\n{script}\n")
    (installed / "bin" / "initdb").chmod(0o755)
    monkeypatch.setattr(embedded, "reachable_programs", lambda *_: installed)
    monkeypatch.setattr(embedded, "INITDB_SECONDS_MAX", seconds_max)
    with locked(open_directory / "unfinished") as directory:
        abandoned = directory / "postgres.unfinished-1"
        abandoned.mkdir(exist_ok=True)
        server = EmbeddedPostgres(directory)
        with pytest.raises(CannotStart, match=message):
            await server.prepare()
        assert server.is_new
        assert not abandoned.exists()
