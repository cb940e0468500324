"""Children are started until ready, watched, started again and stopped; they end with the desk."""

import asyncio
import logging
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import psutil
import pytest

from buydesk.embedded import supervisor as children
from buydesk.embedded.accounts import Account
from buydesk.embedded.supervisor import (
    SUPERVISOR_FD_VARIABLE,
    Child,
    describe_ending,
    poll_until,
    supervise,
    supervisor_pipe,
    switches_account,
    watch_supervisor,
)
from buydesk.errors import CannotStart
from buydesk.times import Clock

SLEEP = ("sleep", "600")
Make = Callable[..., Child]


def file_exists(path: Path) -> Callable[[], Awaitable[bool]]:
    async def probe() -> bool:
        return os.access(path, os.F_OK)

    return probe


async def never_ready() -> bool:
    return False


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    """Makes children of which none is left after the test."""
    made: list[Child] = []

    def one(*command: str, **options: object) -> Child:
        made.append(Child("sleeper", command, **options))  # type: ignore[arg-type]
        return made[-1]

    yield one
    for child in made:
        child.grace_seconds = 0.05
        await child.stop()


async def test_a_child_is_started_when_its_probe_says_so(make: Make, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    child = make("sh", "-c", 'sleep 0.05; touch "$0"; exec sleep 600', str(ready), is_ready=file_exists(ready))
    await child.start()
    assert ready.exists()
    assert child.pid is not None


async def test_a_child_leads_a_process_group_of_its_own(make: Make) -> None:
    child = make(*SLEEP)
    await child.start()
    assert child.pid is not None
    assert os.getpgid(child.pid) == child.pid != os.getpgid(0)


async def test_a_child_runs_in_the_environment_it_is_given_and_writes_where_it_is_told(
    make: Make, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    child = make("sh", "-c", "echo $ONLY; echo wrong >&2", env={"ONLY": "this"}, output=output)
    await child.start()
    assert await child.wait() == "exit code 0"
    assert output.read_text() == "this\nwrong\n"
    assert child.pid is None


async def test_a_child_that_ends_while_starting_cannot_start(make: Make) -> None:
    child = make("sh", "-c", "exit 3", is_ready=never_ready)
    with pytest.raises(CannotStart, match=r"sleeper ended while starting \(exit code 3\)"):
        await child.start()


async def test_a_child_that_is_not_ready_in_time_is_ended(make: Make) -> None:
    child = make(*SLEEP, is_ready=never_ready, ready_seconds_max=0.05)
    with pytest.raises(CannotStart, match=r"sleeper was not ready within 0\.05 s"):
        await child.start()
    assert child.pid is None
    assert await child.wait() == "signal SIGTERM"


async def test_a_start_that_is_cancelled_leaves_nothing_behind(make: Make) -> None:
    child = make(*SLEEP, is_ready=never_ready)
    starting = asyncio.create_task(child.start())
    await poll_until(lambda: child.pid is not None, 5)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert child.pid is None


async def test_a_missing_program_is_named(make: Make) -> None:
    with pytest.raises(CannotStart, match="sleeper: cannot run no-such-program: No such file"):
        await make("no-such-program").start()


async def test_stop_asks_first(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    child = make(*SLEEP)
    await child.start()
    await child.stop()
    assert await child.wait() == "signal SIGTERM"
    await child.stop()
    assert not caplog.records


async def test_stop_kills_the_whole_group_of_a_child_that_ignores_it(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    grandchild = tmp_path / "grandchild"
    script = 'trap "" TERM INT; sleep 600 & echo $! > "$0.new"; mv "$0.new" "$0"; wait'
    child = make(
        *("sh", "-c", script, str(grandchild)),
        is_ready=file_exists(grandchild),
        stop_signals=(signal.SIGINT, signal.SIGTERM),
        grace_seconds=0.05,
    )
    await child.start()
    await child.stop()
    assert await child.wait() == "signal SIGKILL"
    assert "sleeper did not stop within 0.1 s, killing it" in caplog.text
    async with asyncio.timeout(10):
        while not is_gone(int(grandchild.read_text())):  # killed, and gone when the system gets to it
            await asyncio.sleep(0.01)


async def test_a_child_that_never_started_has_ended_and_can_be_stopped() -> None:
    child = Child("sleeper", SLEEP)
    await child.stop()
    assert await child.wait() == "never started"
    assert child.pid is None


@pytest.mark.parametrize(
    ("returncode", "how"), [(0, "exit code 0"), (2, "exit code 2"), (-9, "signal SIGKILL"), (-40, "signal 40")]
)
def test_an_ending_is_described(returncode: int, how: str) -> None:
    assert describe_ending(returncode) == how


def test_no_account_is_switched_to_that_is_this_process_own() -> None:
    another = Account("another", os.geteuid() + 1, os.getegid())
    assert switches_account(None) is None
    assert switches_account(Account("own", os.geteuid(), os.getegid())) is None
    assert switches_account(another) is another


class Scripted(Child, Clock):
    """Runs for the seconds given, one run after the other; an error is a start that fails. Its clock is its own."""

    def __init__(self, *runs_seconds: float | Exception) -> None:
        super().__init__("scripted", ())
        self.seconds = 0.0
        self.pauses: list[float] = []
        self._runs = list(runs_seconds)

    async def start(self) -> None:
        if isinstance(self._runs[0], Exception):
            raise self._runs.pop(0)  # type: ignore[misc]

    async def wait(self) -> str:
        run = self._runs.pop(0)
        assert not isinstance(run, Exception)
        self.seconds += run
        return f"after {run:g} s"

    def monotonic(self) -> float:
        return self.seconds

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        if not self._runs:
            raise asyncio.CancelledError

    async def supervised(self) -> None:
        with pytest.raises(asyncio.CancelledError):
            await supervise(self, clock=self)


async def test_the_pause_before_a_restart_doubles_up_to_its_limit() -> None:
    scripted = Scripted(*[1.0] * 7)
    await scripted.supervised()
    assert scripted.pauses == [0.2, 0.4, 0.8, 1.6, 2.0, 2.0, 2.0]


async def test_the_pause_is_short_again_after_a_steady_run() -> None:
    scripted = Scripted(1.0, 1.0, 9.0, 10.0, 1.0)
    await scripted.supervised()
    assert scripted.pauses == [0.2, 0.4, 0.8, 0.2, 0.4]


async def test_a_start_that_fails_is_tried_again_and_told(caplog: pytest.LogCaptureFixture) -> None:
    scripted = Scripted(1.0, CannotStart("port in use"), CannotStart("port in use"), 1.0)
    await scripted.supervised()
    assert [record.getMessage() for record in caplog.records] == [
        "scripted ended (after 1 s), restart in 0.2 s",
        "scripted ended (port in use), restart in 0.4 s",
        "scripted ended (port in use), restart in 0.8 s",
        "scripted ended (after 1 s), restart in 1.6 s",
    ]


async def test_a_start_that_fails_in_an_unforeseen_way_is_logged_and_tried_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    scripted = Scripted(1.0, PermissionError(13, "no"), 1.0)
    await scripted.supervised()
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "scripted ended (after 1 s), restart in 0.2 s"),
        ("ERROR", "scripted could not be started"),
        ("WARNING", "scripted ended (PermissionError: [Errno 13] no), restart in 0.4 s"),
        ("WARNING", "scripted ended (after 1 s), restart in 0.8 s"),
    ]
    assert caplog.records[1].exc_info is not None


async def never() -> bool:
    await asyncio.Event().wait()
    return True


async def test_a_child_that_hangs_is_killed_and_started_again(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(children, "PROBE_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(children, "PROBE_SECONDS_MAX", 0.02)
    # It misses twice, answers, misses twice, cannot be asked, and hangs for good; the next one is well.
    broken = OSError("no file descriptor left")
    script = [False, None, True, False, None, broken, False, None, False]

    async def is_alive() -> bool:
        answer = script.pop(0) if script else True
        if isinstance(answer, OSError):
            raise answer
        return await never() if answer is None else answer

    child = make(*SLEEP, is_alive=is_alive)
    await child.start()
    first = child.pid
    watching = asyncio.create_task(supervise(child))
    with caplog.at_level(logging.WARNING, children.__name__):
        await poll_until(lambda: child.pid not in (None, first), 10)
    watching.cancel()
    assert script == []
    assert [record.getMessage() for record in caplog.records] == [
        "sleeper could not be asked whether it works",
        "sleeper hangs, killing it: it did not answer 3 times in a row",
        "sleeper ended (signal SIGKILL), restart in 0.2 s",
    ]


async def test_a_child_is_asked_no_more_once_it_has_ended_or_nobody_waits(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(children, "PROBE_PAUSE_SECONDS", 0.01)
    asked = 0

    async def is_alive() -> bool:
        nonlocal asked
        asked += 1
        return True

    child = make(*SLEEP, is_alive=is_alive)
    await child.start()
    waiting = asyncio.create_task(child.wait())
    while asked < 3:
        await asyncio.sleep(0.001)
    waiting.cancel()
    await asyncio.sleep(0)
    before = asked
    await asyncio.sleep(0.05)
    assert asked == before


async def test_a_killed_child_is_started_again_and_its_death_logged(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    child = make(*SLEEP)
    await child.start()
    first = child.pid
    assert first is not None
    watching = asyncio.create_task(supervise(child))
    with caplog.at_level(logging.WARNING, children.__name__):
        os.kill(first, signal.SIGKILL)
        await poll_until(lambda: child.pid not in (None, first), 10)
    watching.cancel()
    assert [record.getMessage() for record in caplog.records] == ["sleeper ended (signal SIGKILL), restart in 0.2 s"]


CHILD_OF_OURS = """
import asyncio
from buydesk.embedded.supervisor import watch_supervisor
from buydesk.settings.reading import read_settings

async def serve():
    told = asyncio.Event()
    watch_supervisor(read_settings().supervisor_fd, told.set)
    print("ready", flush=True)
    await told.wait()

asyncio.run(serve())
"""


async def test_a_child_ends_when_its_supervisor_is_gone(make: Make, tmp_path: Path) -> None:
    output = tmp_path / "output"

    async def ready() -> bool:
        return output.exists() and output.read_text() == "ready\n"

    with supervisor_pipe() as fd:
        child = make(
            *(sys.executable, "-c", CHILD_OF_OURS),
            env={**os.environ, SUPERVISOR_FD_VARIABLE: str(fd)},
            pass_fds=[fd],
            output=output,
            is_ready=ready,
        )
        await child.start()
    assert await asyncio.wait_for(child.wait(), 10) == "exit code 0"


async def test_the_watcher_is_told_once_and_only_when_the_pipe_closes() -> None:
    told: list[str] = []
    try:
        with supervisor_pipe() as fd:
            watched = os.dup(fd)
            watch_supervisor(watched, lambda: told.append("gone"))
            await asyncio.sleep(0)
            assert told == []
        await poll_until(lambda: bool(told), 5)
        await asyncio.sleep(0.01)
        assert told == ["gone"]
    finally:
        os.close(watched)


async def test_a_watcher_that_stopped_watching_is_not_told() -> None:
    told: list[str] = []
    try:
        with supervisor_pipe() as fd:
            watched = os.dup(fd)
            watch_supervisor(watched, lambda: told.append("gone"))()
        await asyncio.sleep(0.01)
        assert told == []
    finally:
        os.close(watched)


async def test_a_descriptor_that_is_no_pipe_is_refused() -> None:
    with tempfile.TemporaryFile() as file, pytest.raises(CannotStart, match="is no pipe: unset BUYDESK_SUPERVISOR_FD"):
        watch_supervisor(file.fileno(), lambda: None)
    with pytest.raises(CannotStart, match="BUYDESK_SUPERVISOR_FD=987654 is no pipe"):
        watch_supervisor(987654, lambda: None)


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
