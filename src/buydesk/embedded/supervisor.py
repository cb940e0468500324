"""Child processes: started until ready, watched, started again when they die or hang, stopped within a bounded time.

Every child leads a process group of its own, so that the terminal's Ctrl-C reaches only the desk, which stops its
children in order. A child of ours also watches a pipe (`SupervisorPipe`) that closes when the desk dies.
"""

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import subprocess
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from buydesk.embedded.accounts import Account
from buydesk.errors import CannotStart
from buydesk.times import CLOCK, Clock

RESTART_PAUSE_SECONDS_MIN = 0.2
RESTART_PAUSE_SECONDS_MAX = 2.0
STEADY_SECONDS = 10.0
READY_SECONDS_MAX = 30.0
GRACE_SECONDS = 10.0
POLL_SECONDS = 0.01
WATCH_SECONDS = 0.1
# So a child that hangs is killed after 5.5 to 6 seconds. One late answer alone proves nothing: the machine, or this
# process, may have been suspended.
PROBE_PAUSE_SECONDS = 0.5
PROBE_SECONDS_MAX = 1.5
MISSED_PROBES_MAX = 3
SUPERVISOR_FD_VARIABLE = "BUYDESK_SUPERVISOR_FD"

# linux/prctl.h: the signal that the kernel sends when the parent ends.
_PR_SET_PDEATHSIG = 1
_KEPT_VARIABLES = ("PATH", "LD_LIBRARY_PATH")

log = logging.getLogger(__name__)

Probe = Callable[[], Awaitable[bool]]


@dataclass(eq=False)
class Child:
    """One command, run in a process group of its own.

    `is_ready` is asked until it says so, `ready_seconds_max` at the longest; without it a child is ready at once.
    `is_alive` is asked for as long as somebody waits for the child's end, and a child that is not is killed; without it
    none is.
    `output` is a file for what the command prints, by default the desk's own output. `stop_signals` are sent one after
    the other, each with `grace_seconds`.
    """

    name: str
    command: Sequence[str]
    _: KW_ONLY
    env: Mapping[str, str] | None = None
    is_ready: Probe | None = None
    ready_seconds_max: float = READY_SECONDS_MAX
    is_alive: Probe | None = None
    pass_fds: Sequence[int] = ()
    stop_signals: Sequence[signal.Signals] = (signal.SIGTERM,)
    grace_seconds: float = GRACE_SECONDS
    output: Path | None = None
    account: Account | None = None
    _process: "subprocess.Popen[bytes] | None" = field(default=None, init=False)

    @property
    def pid(self) -> int | None:
        """The process, None when none runs."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    async def start(self) -> None:
        """Runs the command and returns when it is ready. Raises CannotStart, and leaves nothing behind."""
        try:
            self._process = self._run()
        except OSError as error:
            raise CannotStart(f"{self.name}: cannot run {self.command[0]}: {error.strerror}") from error
        try:
            async with asyncio.timeout(self.ready_seconds_max):
                if self.is_ready is not None:
                    await self._until_ready(self._process, self.is_ready)
        except BaseException as error:
            await self.stop()
            if isinstance(error, TimeoutError):
                raise CannotStart(f"{self.name} was not ready within {self.ready_seconds_max:g} s") from None
            raise

    async def wait(self) -> str:
        """Returns when it has ended, saying how: ``exit code 1``, ``signal SIGKILL``. At once when none runs."""
        if self._process is None:
            return "never started"
        process = self._process
        watching = asyncio.create_task(self._kill_when_hung(process))
        try:
            await poll_until(lambda: process.poll() is not None, pause_seconds=WATCH_SECONDS)
        finally:
            watching.cancel()
        return describe_ending(process.returncode)

    async def _kill_when_hung(self, process: "subprocess.Popen[bytes]") -> None:
        if self.is_alive is None:
            return
        missed = 0
        while missed < MISSED_PROBES_MAX:
            await asyncio.sleep(PROBE_PAUSE_SECONDS)
            missed += 1
            try:
                async with asyncio.timeout(PROBE_SECONDS_MAX):
                    if await self.is_alive():
                        missed = 0
            except TimeoutError:
                pass
            except Exception:  # a probe that breaks says nothing about the child
                log.exception("%s could not be asked whether it works", self.name)
                missed = 0
        log.warning("%s hangs, killing it: it did not answer %d times in a row", self.name, missed)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    async def stop(self) -> None:
        """Ends the process: each stop signal with its grace, then SIGKILL to the group. Harmless when none runs."""
        if self._process is None:
            return
        for stop_signal in self.stop_signals:
            if self.pid is None:
                return
            self._process.send_signal(stop_signal)
            with contextlib.suppress(TimeoutError):
                await poll_until(lambda: self.pid is None, self.grace_seconds)
                return
        log.warning("%s did not stop within %g s, killing it", self.name, self.grace_seconds * len(self.stop_signals))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await poll_until(lambda: self.pid is None)

    def _run(self) -> "subprocess.Popen[bytes]":
        output = None if self.output is None else self.output.open("ab")
        with output or contextlib.nullcontext():
            return subprocess.Popen(  # noqa: S603
                self.command,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=None if output is None else subprocess.STDOUT,
                pass_fds=self.pass_fds,
                start_new_session=True,
                **account_arguments(self.account),
            )

    async def _until_ready(self, process: "subprocess.Popen[bytes]", is_ready: Probe) -> None:
        while True:
            ready = await is_ready()
            # Looked at after the probe: another process may be the one that answers.
            if process.poll() is not None:
                raise CannotStart(f"{self.name} ended while starting ({describe_ending(process.returncode)})")
            if ready:
                return
            await asyncio.sleep(POLL_SECONDS)


async def supervise(child: Child, *, clock: Clock = CLOCK) -> None:
    """Starts the child, which runs already, again whenever it ends; never returns. Cancel it before you stop the child.

    The pause before a start doubles from RESTART_PAUSE_SECONDS_MIN to _MAX, and is short again after a run of
    STEADY_SECONDS.
    """
    pause = RESTART_PAUSE_SECONDS_MIN
    how = await child.wait()
    while True:
        log.warning("%s ended (%s), restart in %g s", child.name, how, pause)
        await clock.sleep(pause)
        pause = min(pause * 2, RESTART_PAUSE_SECONDS_MAX)
        try:
            await child.start()
        except Exception as error:
            how = str(error)
            if not isinstance(error, CannotStart):
                # Whatever it is, the next start may do better; nobody would notice that the watching had ended.
                log.exception("%s could not be started", child.name)
                how = f"{type(error).__name__}: {error}"
            continue
        started = clock.monotonic()
        how = await child.wait()
        if clock.monotonic() - started >= STEADY_SECONDS:
            pause = RESTART_PAUSE_SECONDS_MIN


@contextlib.contextmanager
def supervisor_pipe() -> Iterator[int]:
    """A pipe whose writing end only this process holds: who reads the other end, which this is, learns that this
    process is gone. A child gets it among its `pass_fds`, and its number as SUPERVISOR_FD_VARIABLE."""
    fd, held = os.pipe()
    try:
        yield fd
    finally:
        os.close(held)
        os.close(fd)


def watch_supervisor(fd: int, on_gone: Callable[[], object]) -> Callable[[], object]:
    """Calls `on_gone` once, in the running loop, when the supervisor's end of the pipe closes; returns how to stop.

    Raises CannotStart when `fd` (`settings.supervisor_fd`) is no pipe of a supervisor.
    """
    loop = asyncio.get_running_loop()

    def gone() -> None:
        loop.remove_reader(fd)
        on_gone()

    try:
        os.set_inheritable(fd, False)  # Its own children are not the supervisor's.
        loop.add_reader(fd, gone)
        with contextlib.suppress(AttributeError):  # only Linux has it
            # A child that is stopped (SIGSTOP) when the supervisor dies goes on, sees the pipe closed, and ends.
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGCONT)
    except OSError as error:
        mend = f"unset {SUPERVISOR_FD_VARIABLE}, only `buydesk up --separate` sets it"
        raise CannotStart(f"{SUPERVISOR_FD_VARIABLE}={fd} is no pipe: {mend}") from error
    return partial(loop.remove_reader, fd)


def minimal_environment() -> dict[str, str]:
    """For servers: nothing of the desk's own, no variables that change what runs, no secrets for others to see."""
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    return kept | {"LC_ALL": "C.UTF-8", "TZ": "UTC"}


def describe_ending(returncode: int) -> str:
    """``exit code 1`` or ``signal SIGKILL``."""
    if returncode >= 0:
        return f"exit code {returncode}"
    try:
        return f"signal {signal.Signals(-returncode).name}"
    except ValueError:  # a real-time signal has a number only
        return f"signal {-returncode}"


def switches_account(account: Account | None) -> Account | None:
    """The account to change to, None when it is this process's own: only root may even ask for a change."""
    return None if account is None or account.uid == os.geteuid() else account


def account_arguments(account: Account | None) -> dict[str, Any]:
    """What makes `subprocess` run a program as the account, with none of the groups of this process."""
    switch = switches_account(account)
    return {"user": switch.uid, "group": switch.gid, "extra_groups": []} if switch else {}


async def poll_until(
    done: Callable[[], bool], seconds_max: float | None = None, pause_seconds: float = POLL_SECONDS
) -> None:
    """Asks again and again; raises TimeoutError. For what no loop can tell us in a portable way, such
    as the end of a child that is not the loop's own."""
    async with asyncio.timeout(seconds_max):
        while not done():  # noqa: ASYNC110
            await asyncio.sleep(pause_seconds)
