"""The PostgreSQL server that `buydesk up` and the tests run themselves, out of a wheel.

It is a child of the desk and listens on a unix socket in the desk's data directory only.
"""

import asyncio
import contextlib
import secrets
import shutil
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Literal
from urllib.parse import quote

import asyncpg
import psutil

from buydesk.embedded.accounts import Account, require_open, server_account
from buydesk.embedded.data_dir import (
    CLUSTER,
    SOCKETS,
    bound_log,
    empty_log,
    finish_directory,
    make_private,
    require_short_socket_path,
)
from buydesk.embedded.programs import installed_programs, reachable_programs
from buydesk.embedded.supervisor import Child, account_arguments, minimal_environment, poll_until
from buydesk.errors import CannotStart

Version = Literal[16, 18]

DATABASE = "buydesk"
USER = "buydesk"
MAINTENANCE_DATABASE = "postgres"
LOG_LOOK_SECONDS = 60.0
INITDB_SECONDS_MAX = 60.0
START_SECONDS_MAX = 30.0
STOP_SECONDS_MAX = 10.0
ORPHANS_SECONDS_MAX = 1.0
CONNECT_SECONDS_MAX = 5.0

_PORT = "5432"  # only names the socket
# One after the other; backends that have no postmaster any more need a stronger one at last.
_STOP_SIGNALS = (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL)

# Durable whatever postgresql.conf says; otherwise modest, one desk's worth.
_SETTINGS: Mapping[str, str] = {
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    "fsync": "on",
    "full_page_writes": "on",
    "synchronous_commit": "on",
    "max_connections": "100",
    # Keys are random: with millions stored, every order touches another page of their index. It is taken as it is used.
    "shared_buffers": "256MB",
    "max_logical_replication_workers": "0",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "logging_collector": "off",
    "log_min_messages": "warning",
    "log_min_error_statement": "panic",  # statements carry what clients sent
}
_SETTINGS_OF: Mapping[int, Mapping[str, str]] = {16: {}, 18: {"io_method": "sync"}}  # three processes fewer


class EmbeddedPostgres(Child):
    """A PostgreSQL server of our own, in a data directory that is `claimed`.

    `further_settings` are for tests; the product's server keeps every promise of durability.
    """

    def __init__(
        self,
        data_dir: Path,
        version: Version = 18,
        *,
        account: Account | None = None,
        further_settings: Mapping[str, str] | None = None,
    ) -> None:
        data_dir = data_dir.resolve()
        self._data_dir = data_dir
        self._version = version
        self._cluster = data_dir / CLUSTER
        self._socket_dir = data_dir / SOCKETS
        # What the server says; at most about LOG_BYTES_MAX bytes, from the last start on.
        self.log_path = data_dir / "postgres.log"
        self._settings = {
            **_SETTINGS,
            **_SETTINGS_OF[version],
            "unix_socket_directories": '"' + str(self._socket_dir).replace('"', '""') + '"',
            **(further_settings or {}),
        }
        self._refusal = ""  # what the server last said to a connection while it was starting
        super().__init__(
            "postgres",
            (),  # of which `prepare` knows where the programs are
            env=minimal_environment(),
            is_ready=self._is_ready,
            ready_seconds_max=START_SECONDS_MAX,
            # Fast shutdown, then at once (the next start recovers).
            stop_signals=(signal.SIGINT, signal.SIGQUIT),
            grace_seconds=STOP_SECONDS_MAX,
            output=self.log_path,
            account=account or server_account(self._cluster),
        )

    @property
    def is_new(self) -> bool:
        """Must `prepare` make a cluster first (which takes a second)?"""
        return not self._cluster.exists()

    @property
    def dsn(self) -> str:
        """The desk's database, as asyncpg, SQLAlchemy and psql understand it."""
        return self.dsn_of(DATABASE)

    def dsn_of(self, database: str) -> str:
        return f"postgresql://{USER}@/{database}?host={quote(str(self._socket_dir), safe='/')}&port={_PORT}"

    async def prepare(self) -> None:
        """Makes the cluster when there is none; raises CannotStart when there cannot be one here."""
        require_short_socket_path(self._socket_dir / f".s.PGSQL.{_PORT}")
        require_open(self.account, self._data_dir, "PostgreSQL")
        try:
            programs = await asyncio.to_thread(
                reachable_programs, installed_programs(self._version), self._data_dir, self.account
            )
            make_private(self._socket_dir, self.account)
            if self.is_new:
                await asyncio.to_thread(self._make_cluster, programs)
            found = (self._cluster / "PG_VERSION").read_text().strip()
        except OSError as error:
            raise CannotStart(
                f"cannot use {error.filename or self._data_dir}: {error.strerror}; "
                "run as the user who made it, or use another --data-dir"
            ) from error
        if found != str(self._version):
            raise CannotStart(
                f"{self._cluster} was made by PostgreSQL {found} and this is {self._version}: use another --data-dir"
            )
        self.command = [
            str(programs / "bin" / "postgres"),
            *("-D", str(self._cluster), "-p", _PORT),
            *(part for name, value in self._settings.items() for part in ("-c", f"{name}={value}")),
        ]

    async def start(self) -> None:
        """Returns when the desk's database accepts connections; ends first what an earlier desk left running.

        The first start prepares it. Raises CannotStart.
        """
        if not self.command:
            await self.prepare()
        await kill_orphans(self._cluster, self._socket_dir)
        empty_log(self.log_path)
        self._refusal = ""
        try:
            await super().start()
        except CannotStart as error:
            raise CannotStart(f"{error}: {self._refusal or _complaint(self.log_path)} (see {self.log_path})") from error

    async def wait(self) -> str:
        """Returns when the server has ended, saying how; keeps its log within bounds meanwhile."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOG_LOOK_SECONDS):
                    return await super().wait()
            bound_log(self.log_path)

    def _make_cluster(self, programs: Path) -> None:
        """A cluster is there whole and on disk, or not at all: it gets its name last."""
        for abandoned in self._data_dir.glob("postgres.unfinished-*"):
            shutil.rmtree(abandoned, ignore_errors=True)
        # A name that no interrupted initdb can still be writing to.
        unfinished = self._data_dir / f"postgres.unfinished-{secrets.token_hex(4)}"
        make_private(unfinished, self.account)
        try:
            done = self._initdb(programs, unfinished)
        except subprocess.TimeoutExpired:
            raise CannotStart(f"initdb did not finish within {INITDB_SECONDS_MAX:g} s: is the disk too slow?") from None
        if done.returncode != 0:
            said = done.stdout.decode(errors="replace").strip().splitlines() or ["it said nothing"]
            raise CannotStart(f"initdb could not make {unfinished}: {said[-1]}")
        finish_directory(unfinished, self._cluster)

    def _initdb(self, programs: Path, directory: Path) -> "subprocess.CompletedProcess[bytes]":
        return subprocess.run(  # noqa: S603
            [
                str(programs / "bin" / "initdb"),
                *("-D", str(directory), "-U", USER, "-E", "UTF8", "--locale=C.UTF-8", "-A", "trust"),
                # finish_directory syncs: initdb takes one file after the other, half a second more.
                *("--no-sync", "--no-instructions"),
            ],
            env=minimal_environment(),
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            timeout=INITDB_SECONDS_MAX,
            check=False,
            **account_arguments(self.account),
        )

    async def _is_ready(self) -> bool:
        """As pg_ctl sees it, by the state that the postmaster writes into its pid file; and the database is there."""
        lines = _pid_file_lines(self._cluster)
        if len(lines) < 8 or lines[0] != str(self.pid) or lines[7].strip() != "ready":
            return False
        try:
            await self._open_database()
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            self._refusal = str(error)
            return False
        return True

    async def _open_database(self) -> None:
        try:
            connection = await self._connect(DATABASE)
        except asyncpg.InvalidCatalogNameError:
            connection = await self._connect(MAINTENANCE_DATABASE)
            await connection.execute(f"CREATE DATABASE {DATABASE}")
        await connection.close(timeout=CONNECT_SECONDS_MAX)

    async def _connect(self, database: str) -> "asyncpg.Connection[asyncpg.Record]":
        return await asyncpg.connect(self.dsn_of(database), timeout=CONNECT_SECONDS_MAX)


async def kill_orphans(cluster: Path, socket_dir: Path, grace_seconds: float = STOP_SECONDS_MAX) -> None:
    """Ends what still runs on the cluster after a desk that was killed, so that a server of ours can start.

    A process counts when it is a postgres that works in the cluster's directory, whatever pid the lock files name: that
    may be another program's by now. Raises CannotStart when one does not end.
    """
    lock_files = [cluster / "postmaster.pid", socket_dir / f".s.PGSQL.{_PORT}.lock"]
    if not any(file.exists() for file in lock_files):
        return
    for stop_signal in _STOP_SIGNALS:
        left = processes_on(cluster)
        # The postmaster ends its backends in order. Without one they end by themselves, at once, if they can at all.
        postmaster = [process for process in left if [str(process.pid)] == _pid_file_lines(cluster)[:1]]
        for process in left if stop_signal is signal.SIGKILL else postmaster or left:
            with contextlib.suppress(psutil.Error):
                process.send_signal(stop_signal)
        with contextlib.suppress(TimeoutError):
            # Not waited for as processes: nobody may ever reap them.
            seconds = grace_seconds if postmaster else min(grace_seconds, ORPHANS_SECONDS_MAX)
            await poll_until(lambda: not processes_on(cluster), seconds)
            break
    else:
        raise CannotStart(f"another PostgreSQL runs on {cluster} and does not stop: end it, or use another --data-dir")
    # Nobody is left, but with one of these postgres refuses to start when some other program has the pid now.
    for file in lock_files:
        file.unlink(missing_ok=True)


def processes_on(cluster: Path) -> list[psutil.Process]:
    """The processes of any PostgreSQL server that works on the cluster."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.name() == "postgres" and _works_on(process, cluster):
                found.append(process)
    return found


def _works_on(process: psutil.Process, cluster: Path) -> bool:
    try:
        return Path(process.cwd()).samefile(cluster)
    except psutil.AccessDenied:
        # Root in a container may not look into another account's process, but at how it was started.
        return str(cluster) in process.cmdline()


def _complaint(path: Path) -> str:
    """What the server ended of, as its log says."""
    lines = path.read_text(errors="replace").strip().splitlines()
    fatal = [line for line in lines if "FATAL" in line or "PANIC" in line]
    return (fatal or lines or ["it said nothing"])[-1]


def _pid_file_lines(cluster: Path) -> list[str]:
    try:
        return (cluster / "postmaster.pid").read_text().splitlines()
    except FileNotFoundError:
        return []
