"""Which account PostgreSQL runs as, what that account can reach, and where the data directory is therefore."""

import os
import pwd
import stat
from pathlib import Path

import pytest

from buydesk.embedded import data_dir
from buydesk.embedded.accounts import Account, can_read, closed_part, server_account
from buydesk.embedded.data_dir import (
    ROOT_DATA_DIR,
    bound_log,
    default_data_dir,
    empty_log,
    finish_directory,
    locked,
    make_private,
    require_short_socket_path,
)
from buydesk.errors import CannotStart

STRANGER = Account("stranger", 64_000, 64_000)


def entry(name: str, uid: int) -> pwd.struct_passwd:
    return pwd.struct_passwd((name, "x", uid, uid + 1, "", "/", "/bin/false"))


@pytest.fixture
def open_path(open_directory: Path, request: pytest.FixtureRequest) -> Path:
    """A new directory that everybody can enter."""
    path = open_directory / str(request.node.name)
    path.mkdir()
    path.chmod(0o755)
    return path


@pytest.fixture
def accounts_of_root(monkeypatch: pytest.MonkeyPatch) -> dict[str, pwd.struct_passwd]:
    """This process is root's, and these are the machine's accounts."""
    found: dict[str, pwd.struct_passwd] = {}
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(pwd, "getpwnam", found.__getitem__)
    return found


def test_an_ordinary_user_runs_postgres_as_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert server_account() is None


def test_root_gives_postgres_to_an_account_that_exists(accounts_of_root: dict[str, pwd.struct_passwd]) -> None:
    accounts_of_root |= {"postgres": entry("postgres", 70), "nobody": entry("nobody", 65534)}
    assert server_account() == Account("postgres", 70, 71)
    del accounts_of_root["postgres"]
    assert server_account() == Account("nobody", 65534, 65535)
    del accounts_of_root["nobody"]
    with pytest.raises(CannotStart, match="no account postgres or nobody: run as another user"):
        server_account()


@pytest.mark.usefixtures("accounts_of_root")
def test_a_cluster_stays_with_its_owner(tmp_path: Path) -> None:
    owner = os.getuid() or STRANGER.uid
    os.chown(tmp_path, owner, -1)
    assert server_account(tmp_path) == Account(f"with uid {owner}", owner, tmp_path.stat().st_gid)


def test_a_cluster_that_is_new_or_of_root_has_no_such_owner(
    tmp_path: Path, accounts_of_root: dict[str, pwd.struct_passwd]
) -> None:
    accounts_of_root["nobody"] = entry("nobody", 65534)
    for cluster in (tmp_path / "new", Path("/")):
        found = server_account(cluster)
        assert found is not None
        assert found.name == "nobody"


@pytest.mark.parametrize(
    ("mode", "is_owner", "is_group", "is_open"),
    [
        (0o700, False, False, False),
        (0o711, False, False, True),
        (0o710, False, True, True),
        (0o701, False, True, False),
        (0o100, True, True, True),
        (0o011, True, True, False),
    ],
)
def test_a_directory_is_entered_by_the_bits_of_its_mode(
    open_path: Path, mode: int, is_owner: bool, is_group: bool, is_open: bool
) -> None:
    directory = open_path / "directory"
    directory.mkdir()
    status = directory.stat()
    account = Account("someone", status.st_uid + (not is_owner), status.st_gid + (not is_group))
    directory.chmod(mode)
    try:
        assert closed_part(account, directory) == (None if is_open else directory)
        assert stat.S_IMODE(directory.stat().st_mode) == mode
    finally:
        directory.chmod(0o700)


def test_the_first_closed_directory_on_the_way_is_found(open_path: Path) -> None:
    closed = open_path / "closed"
    (closed / "inner").mkdir(parents=True)
    closed.chmod(0o700)
    assert closed_part(STRANGER, closed / "inner" / "new" / "data") == closed
    assert closed_part(STRANGER, open_path / "new" / "data") is None
    assert closed_part(None, closed / "inner") is None


def test_a_file_is_readable_when_its_mode_and_its_way_allow_it(open_path: Path) -> None:
    file = open_path / "file"
    file.touch()
    file.chmod(0o644)
    assert can_read(STRANGER, file)
    assert can_read(None, file)
    file.chmod(0o640)
    assert not can_read(STRANGER, file)
    file.chmod(0o644)
    open_path.chmod(0o700)
    assert not can_read(STRANGER, file)


def test_the_data_directory_is_here_unless_postgres_cannot_get_here(
    open_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(open_path)
    assert default_data_dir(0) == open_path / "data"
    monkeypatch.setattr(data_dir, "server_account", lambda: STRANGER)
    assert default_data_dir(0) == open_path / "data"
    assert default_data_dir(7) == open_path / "data-7"
    assert default_data_dir(7, is_live=True) == open_path / "data-live-7"
    open_path.chmod(0o700)
    assert default_data_dir(0) == ROOT_DATA_DIR / "data"
    assert default_data_dir(7) == ROOT_DATA_DIR / "data-7"
    assert not ROOT_DATA_DIR.joinpath("data-7").exists()


@pytest.mark.parametrize(("uid", "mode"), [(0, 0o711), (1000, 0o700)])
def test_a_new_data_directory_is_closed_and_its_way_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uid: int, mode: int
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    with locked(tmp_path / "a" / "b") as directory:
        assert directory == tmp_path / "a" / "b"
        assert stat.S_IMODE(directory.stat().st_mode) == mode
        assert stat.S_IMODE(directory.parent.stat().st_mode) == 0o755


def test_a_directory_that_is_there_is_not_changed(tmp_path: Path) -> None:
    tmp_path.chmod(0o750)
    with locked(tmp_path):
        assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o750


def test_a_second_desk_on_the_directory_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    refusal = f"another desk is running in {tmp_path}: stop it, or use another --data-dir or --port-offset"
    with locked(tmp_path), pytest.raises(CannotStart) as refused, locked(tmp_path):
        pass
    assert str(refused.value) == refusal
    with locked(tmp_path):
        pass


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(CannotStart) as refused, locked(file / "data"):
        pass
    assert str(refused.value) == f"cannot write in {file / 'data'}: Not a directory; use another --data-dir"


@pytest.mark.parametrize("before", [None, 0o644, 0o666])
def test_nobody_else_can_hold_the_lock(tmp_path: Path, before: int | None) -> None:
    lock = tmp_path / "lock"
    if before is not None:
        lock.touch()
        lock.chmod(before)
    with locked(tmp_path):
        assert stat.S_IMODE(lock.stat().st_mode) == 0o600


def test_a_private_directory_is_made_once_and_for_the_account(tmp_path: Path) -> None:
    make_private(tmp_path / "new", None)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700
    (tmp_path / "new").chmod(0o750)
    make_private(tmp_path / "new", STRANGER)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o750
    assert (tmp_path / "new").stat().st_uid == os.geteuid()
    (tmp_path / "file").touch()
    with pytest.raises(CannotStart, match=r"^cannot make .*/file/new: Not a directory; use another --data-dir$"):
        make_private(tmp_path / "file" / "new", None)


def test_a_socket_path_has_107_bytes_at_the_most() -> None:
    require_short_socket_path(Path("/" + "x" * 106))
    with pytest.raises(CannotStart, match="has 108 bytes and 107 are allowed: use another --data-dir, with a shorter"):
        require_short_socket_path(Path("/" + "x" * 105 + "é"))


def test_a_finished_directory_has_its_name_and_all_its_files(tmp_path: Path) -> None:
    (tmp_path / "unfinished" / "inner").mkdir(parents=True)
    (tmp_path / "unfinished" / "inner" / "file").write_text("all")
    finish_directory(tmp_path / "unfinished", tmp_path / "name")
    assert (tmp_path / "name" / "inner" / "file").read_text() == "all"
    assert not (tmp_path / "unfinished").exists()


def test_a_log_is_emptied_at_a_start_and_when_it_is_too_long(tmp_path: Path) -> None:
    log = tmp_path / "log"
    empty_log(log)
    assert stat.S_IMODE(log.stat().st_mode) & 0o077 == 0
    with log.open("a") as writer:
        writer.write("12345")
        writer.flush()
        bound_log(log, bytes_max=5)
        assert log.read_text() == "12345"
        bound_log(log, bytes_max=4)
        writer.write("6")
    assert log.read_text() == "6"
    empty_log(log)
    assert log.read_text() == ""
    log.unlink()
    bound_log(log)
    with pytest.raises(CannotStart, match=r"cannot write .*: Not a directory; use another --data-dir"):
        empty_log(Path("/dev/null/log"))
