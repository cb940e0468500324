"""A standby of a desk's server, on the same machine: what a desk costs whose commits wait for one."""

import asyncio
import contextlib
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import psutil

from bench.desk import Desk
from bench.processes import BenchFailed, last_lines, running

START_SECONDS_MAX = 30.0
POLL_SECONDS = 0.05
NAME = "bench"


@contextlib.asynccontextmanager
async def standby_of(desk: Desk, directory: Path) -> AsyncIterator[None]:
    """While entered, a standby follows the desk's server; nobody waits for it before `waiting` says so."""
    postmaster = psutil.Process(int((desk.data_dir / "postgres" / "postmaster.pid").read_text().split("\n")[0]))
    cluster, log = directory / "standby", directory / "standby.log"
    await _copy(desk, cluster)
    (cluster / "standby.signal").touch()
    settings = {
        "listen_addresses": "",
        "unix_socket_directories": str(desk.socket_dir),
        "port": "5433",  # only names the socket
        "primary_conninfo": f"host={desk.socket_dir} port=5432 user=buydesk application_name={NAME}",
        "shared_buffers": "256MB",
    }
    uid, gid = postmaster.uids().real, postmaster.gids().real
    for each in (cluster, *cluster.rglob("*")):
        os.chown(each, uid, gid)
    as_its_owner = ("setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups") if os.geteuid() == 0 else ()
    options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
    async with running((*as_its_owner, postmaster.exe(), "-D", str(cluster), *options), log):
        try:
            await _until(desk, "state", "streaming")
        except TimeoutError as error:
            raise BenchFailed(f"the standby does not follow; its log ends:\n{last_lines(log)}") from error
        yield


@contextlib.asynccontextmanager
async def waiting(desk: Desk) -> AsyncIterator[None]:
    """While entered, every commit of the desk's server waits for the standby."""
    async with desk.database() as database:
        await database.execute(f"ALTER SYSTEM SET synchronous_standby_names = '{NAME}'")
        try:
            await database.execute("SELECT pg_reload_conf()")
            await _until(desk, "sync_state", "sync")
            yield
        finally:
            await database.execute("ALTER SYSTEM RESET synchronous_standby_names")
            await database.execute("SELECT pg_reload_conf()")


async def _copy(desk: Desk, cluster: Path) -> None:
    """A base backup by hand: the wheel's server comes to another account without pg_basebackup."""
    async with desk.database() as database:
        await database.fetchval("SELECT pg_backup_start('bench', fast => true)")
        left_out = shutil.ignore_patterns("postmaster.*", "pg_wal", "pg_replslot")
        await asyncio.to_thread(shutil.copytree, desk.data_dir / "postgres", cluster, ignore=left_out)
        label = await database.fetchval("SELECT labelfile FROM pg_backup_stop(wait_for_archive => false)")
    (cluster / "backup_label").write_text(label)
    for each in ("pg_wal", "pg_replslot"):
        (cluster / each).mkdir(mode=0o700)


async def _until(desk: Desk, column: str, expected: str) -> None:
    """Returns when what the server says of its standby is so; raises TimeoutError."""
    async with desk.database() as database, asyncio.timeout(START_SECONDS_MAX):
        while True:
            if await database.fetchval(f"SELECT max({column}) FROM pg_stat_replication") == expected:  # noqa: S608  # ours
                return
            await asyncio.sleep(POLL_SECONDS)
