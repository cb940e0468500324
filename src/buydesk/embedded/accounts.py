"""Whose processes the embedded servers' are, and what that account can reach.

PostgreSQL refuses to run as root, and what needs no rights should have none. A desk that runs as root therefore
gives its servers to an account that exists already; every other desk runs them as its own user (then the account here
is None).
"""

import os
import pwd
from dataclasses import dataclass
from pathlib import Path

from buydesk.errors import CannotStart

_ENTER = 0o1  # of a program: run
_READ = 0o4


@dataclass(frozen=True)
class Account:
    """An account of this machine, other than root."""

    name: str
    uid: int
    gid: int


def server_account(cluster: Path | None = None) -> Account | None:
    """The account that the servers run as, None for the desk's own user.

    Who owns the cluster already goes on owning it. Raises CannotStart when the desk is root and there is no account.
    """
    if os.geteuid() != 0:
        return None
    if cluster is not None and cluster.exists() and (owner := cluster.stat()).st_uid != 0:
        return Account(f"with uid {owner.st_uid}", owner.st_uid, owner.st_gid)
    for name in ("postgres", "nobody"):
        try:
            found = pwd.getpwnam(name)
        except KeyError:
            continue
        return Account(name, found.pw_uid, found.pw_gid)
    raise CannotStart("no server runs as root, and there is no account postgres or nobody: run as another user")


def closed_part(account: Account | None, path: Path) -> Path | None:
    """The first directory on the way to the path, itself included, that the account cannot enter.

    None when all are open; parts that do not exist yet count as open, because the desk makes them so. Nothing is
    changed, and access control lists are not looked at.
    """
    if account is None:
        return None
    path = path.resolve()
    for part in (*reversed(path.parents), path):
        if not part.exists():
            return None
        if part.is_dir() and not _may(account, part, _ENTER):
            return part
    return None


def require_open(account: Account | None, path: Path, server: str) -> None:
    """Raises CannotStart when the account, as which the server runs, cannot get to the path."""
    closed = closed_part(account, path)
    if account is not None and closed is not None:
        raise CannotStart(
            f"{server}, which runs as the account {account.name} because the desk is root, cannot enter "
            f"{closed}: use another --data-dir, such as /var/lib/buydesk/data"
        )


def can_run(account: Account | None, program: Path) -> bool:
    """Can the account reach and run the program?"""
    return account is None or (closed_part(account, program) is None and _may(account, program.resolve(), _ENTER))


def can_read(account: Account | None, file: Path) -> bool:
    """Can the account reach and read the file?"""
    return account is None or (closed_part(account, file) is None and _may(account, file.resolve(), _READ))


def _may(account: Account, path: Path, bit: int) -> bool:
    status = path.stat()
    if status.st_uid == account.uid:
        bit <<= 6
    elif status.st_gid == account.gid:
        bit <<= 3
    return bool(status.st_mode & bit)
