"""The data directory: where it is, that one desk at a time uses it, and that what gets its name there is whole.

In it: ``lock``, the secrets that services share (``*-tokens``, ``*-signing-key``, ``webhook-keys``), ``operator-key``,
``replay.json`` (the sandbox's position), ``postgres`` (the cluster), ``socket`` (PostgreSQL's and, of separate
services, ``redis.sock``), ``postgres.log``, ``redis.log``; for root ``programs`` (copies out of the wheel). Nobody else
can open any of it, but for those copies.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from buydesk.embedded.accounts import Account, closed_part, server_account
from buydesk.embedded.supervisor import switches_account
from buydesk.errors import CannotStart

SOCKET_PATH_BYTES_MAX = 107
LOG_BYTES_MAX = 16 * 1024 * 1024
ROOT_DATA_DIR = Path("/var/lib/buydesk")
CLUSTER = "postgres"
SOCKETS = "socket"

_SYNC_THREADS = 16


def default_data_dir(port_offset: int, *, is_live: bool = False) -> Path:
    """Where a desk keeps everything by default: ``data`` in the working directory, ``data-live`` of a live desk, with
    ``-N`` for a port offset N.

    As root, when PostgreSQL's account cannot get there, the directory of that name in ROOT_DATA_DIR.
    """
    name = "data" + ("-live" if is_live else "") + (f"-{port_offset}" if port_offset else "")
    nearby = Path.cwd() / name
    return nearby if closed_part(server_account(), nearby) is None else ROOT_DATA_DIR / name


def secret_file(data_dir: Path, name: str) -> Path:
    """Where a secret that services share is kept."""
    return data_dir / name.replace("_", "-")


@contextlib.contextmanager
def locked(data_dir: Path) -> Iterator[Path]:
    """The data directory, absolute, made when it is new and locked while this desk uses it; raises CannotStart."""
    directory = data_dir.resolve()
    try:
        _make_directory(directory)
        # Who can open it can hold it.
        touch_private(directory / "lock")
        lock = (directory / "lock").open("ab")
    except OSError as error:
        raise CannotStart(f"cannot write in {directory}: {error.strerror}; use another --data-dir") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CannotStart(
                f"another desk is running in {directory}: stop it, or use another --data-dir or --port-offset"
            ) from None
        yield directory


def touch_private(file: Path) -> None:
    """Makes the file when it is new; only its owner can open it, whatever it was before. Raises OSError."""
    file.touch(mode=0o600)
    if file.stat().st_mode & 0o077:
        file.chmod(0o600)


def read_private(file: Path) -> str:
    """The text of the file, "" of a new one; only its owner can open it from now on."""
    touch_private(file)
    return file.read_text().strip()


def write_private(file: Path, text: str) -> None:
    """Puts the text on disk, whole, in a file that only its owner can read."""
    unfinished = file.with_suffix(".unfinished")
    unfinished.unlink(missing_ok=True)
    unfinished.touch(mode=0o600)
    with unfinished.open("w") as open_file:
        open_file.write(text)
        open_file.flush()
        os.fsync(open_file.fileno())
    unfinished.rename(file)


def make_private(directory: Path, account: Account | None) -> None:
    """Makes the directory when it is new, for the account; nobody else can enter it. Raises CannotStart."""
    if directory.exists():
        return
    switch = switches_account(account)
    try:
        directory.mkdir(mode=0o700)
        os.chown(directory, switch.uid if switch else -1, switch.gid if switch else -1)
    except OSError as error:
        raise CannotStart(f"cannot make {directory}: {error.strerror}; use another --data-dir") from error


def finish_directory(unfinished: Path, name: Path) -> None:
    """Gives a directory its name once everything in it is on disk: after a crash it is there whole or not at all."""
    paths = [Path(top) / each for top, _, files in os.walk(unfinished) for each in (".", *files)]
    # The disk takes many at once: a thousand files one after the other cost half a second.
    with ThreadPoolExecutor(_SYNC_THREADS) as threads:
        list(threads.map(_sync, paths))
    unfinished.rename(name)
    _sync(name.parent)


def require_short_socket_path(path: Path) -> None:
    """Raises CannotStart when the system's addresses have no room for the path."""
    length = len(os.fsencode(path))
    if length > SOCKET_PATH_BYTES_MAX:
        raise CannotStart(
            f"the path of the socket {path} has {length} bytes and {SOCKET_PATH_BYTES_MAX} are allowed: "
            "use another --data-dir, with a shorter path"
        )


def empty_log(path: Path) -> None:
    """For a new run; only this account can read it. Raises CannotStart."""
    try:
        touch_private(path)
        os.truncate(path, 0)
    except OSError as error:
        raise CannotStart(f"cannot write {path}: {error.strerror}; use another --data-dir") from error


def bound_log(path: Path, bytes_max: int = LOG_BYTES_MAX) -> None:
    """Empties the file when it is too long, where it can; a writer that appends goes on at its new end."""
    with contextlib.suppress(OSError):
        if path.stat().st_size > bytes_max:
            os.truncate(path, 0)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _make_directory(directory: Path) -> None:
    """Changes nothing that is there. Others can pass root's, as PostgreSQL's account must; they cannot look inside."""
    for part in (*reversed(directory.parents), directory):
        if not part.exists():
            part.mkdir(exist_ok=True)
            part.chmod(0o755 if part != directory else 0o711 if os.geteuid() == 0 else 0o700)
