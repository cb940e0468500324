"""The Redis (or Valkey) server that `buydesk up --separate` and the tests run themselves, where there is one.

It is a child of the desk, runs as the account that PostgreSQL has, and listens on a unix socket in the desk's data
directory only.
"""

import asyncio
import contextlib
import socket
import struct
from pathlib import Path
from urllib.parse import quote

import psutil

from buydesk.embedded.accounts import require_open, server_account
from buydesk.embedded.data_dir import CLUSTER, SOCKETS, empty_log, make_private, require_short_socket_path
from buydesk.embedded.supervisor import POLL_SECONDS, Child, minimal_environment
from buydesk.errors import CannotStart

MEMORY = "64mb"
START_SECONDS_MAX = 10.0
STOP_SECONDS_MAX = 5.0


class EmbeddedRedis(Child):
    """A server of our own in a directory that is `claimed`: a cache, nothing survives its end."""

    def __init__(self, directory: Path, program: Path) -> None:
        directory = directory.resolve()
        self._directory = directory
        self._socket = directory / SOCKETS / "redis.sock"
        self._log = directory / "redis.log"
        super().__init__(
            "redis",
            [
                str(program),
                *("--port", "0", "--unixsocket", str(self._socket), "--unixsocketperm", "700"),
                *("--save", "", "--appendonly", "no", "--dir", str(directory / SOCKETS), "--loglevel", "warning"),
                # Everything in it can be had again, and what is read all the time stays.
                *("--maxmemory", MEMORY, "--maxmemory-policy", "allkeys-lru"),
            ],
            env=minimal_environment(),
            is_ready=self._replies,
            ready_seconds_max=START_SECONDS_MAX,
            is_alive=self._replies,  # and killed if not: it is a cache, nothing is lost with it
            grace_seconds=STOP_SECONDS_MAX,
            output=self._log,
            account=server_account(directory / CLUSTER),
        )

    @property
    def url(self) -> str:
        return f"unix://{quote(str(self._socket), safe='/')}?db=0"

    async def start(self) -> None:
        """Returns when it answers; ends first what an earlier desk left running. Raises CannotStart."""
        require_short_socket_path(self._socket)
        require_open(self.account, self._directory, "Redis")
        make_private(self._socket.parent, self.account)
        try:
            await self._kill_leftover()
        except OSError as error:  # a time-out is one, too
            raise CannotStart(f"{self._socket} is in use and cannot be freed: use another --data-dir") from error
        empty_log(self._log)
        await super().start()

    async def _kill_leftover(self) -> None:
        """Kills the server that listens at our socket, if it is one that was started to do so: it is a cache, nothing
        is lost with it. Returns when nobody listens any more; raises OSError, TimeoutError."""
        async with asyncio.timeout(STOP_SECONDS_MAX):
            while pid := self._listener():
                with contextlib.suppress(psutil.NoSuchProcess):
                    server = psutil.Process(pid)
                    if str(self._socket) in " ".join(server.cmdline()):
                        server.kill()
                await asyncio.sleep(POLL_SECONDS)

    def _listener(self) -> int | None:
        """The process that listens at our socket; raises OSError."""
        with socket.socket(socket.AF_UNIX) as asking, contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            asking.settimeout(STOP_SECONDS_MAX)
            asking.connect(str(self._socket))
            pid: int = struct.unpack("3i", asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
            return pid
        return None

    async def _replies(self) -> bool:
        """Whether it says anything, be it that it has too many clients."""
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_unix_connection(self._socket)
            with contextlib.closing(writer):
                writer.write(b"PING\r\n")
                return bool(await reader.readline())
        return False
