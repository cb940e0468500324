"""Checks what no linter knows: run by `make check`. Prints what is wrong, one line each; exit code 1 if anything is."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from pip._internal.models.index import PyPI

FUNCTION_LINES_MAX = 70
SOURCE_LINES_MAX = 400
VENDORED = "src/buydesk/http/swagger/"
# Words that say nothing of what a thing does (CONTRIBUTING.md); in names only.
EMPTY_WORDS = re.compile(r"(?i:_|\b)(manager|helper|util)s?(?=_|\b|[A-Z])|(Manager|Helper|Util)")


def main() -> int:
    files = [path for path in _listed() if path.exists()]
    found = [*registry_hosts(files), *shapes(files), *missing_pins(), *missing_pages(), *undated_records()]
    print(*found, sep="\n", end="\n" if found else "")
    return bool(found)


def registry_hosts(files: list[Path]) -> Iterator[str]:
    """No file names a package registry: the name would be fetched from where the user's own settings do not say."""
    hosts = [host.encode() for host in (PyPI.netloc, PyPI.file_storage_domain)]
    for path in files:
        content = path.read_bytes()
        if any(host in content for host in hosts):
            yield f"{path}: names the host of a package registry"


def shapes(files: list[Path]) -> Iterator[str]:
    """Functions stay short, and names say something."""
    for path in files:
        if path.suffix != ".py":
            continue
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if path.is_relative_to("src") and lines > SOURCE_LINES_MAX:
            yield f"{path}: has {lines} lines, more than {SOURCE_LINES_MAX}"
        if EMPTY_WORDS.search(path.stem):
            yield f"{path}: the file's name says nothing"
        for node in ast.walk(ast.parse(path.read_bytes())):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            if EMPTY_WORDS.search(node.name):
                yield f"{path}:{node.lineno}: the name {node.name} says nothing"
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > FUNCTION_LINES_MAX and not isinstance(node, ast.ClassDef):
                yield f"{path}:{node.lineno}: {node.name} has {lines} lines, more than {FUNCTION_LINES_MAX}"


def missing_pins() -> Iterator[str]:
    """What is asked for is pinned: `make lock` was run after the last edit."""
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    extras = {_name(each) for extra in project["optional-dependencies"].values() for each in extra}
    asked = {"setup": _asked("setup"), "run": set(map(_name, project["dependencies"]))}
    asked["image"] = asked["run"] - _asked("not-in-image") | extras
    asked["load"] = _asked("load")
    asked["chaos"] = _asked("chaos")
    asked["dev"] = asked["run"] | extras | asked["load"] | _asked("dev")
    for part, names in asked.items():
        text = Path(f"requirements/{part}.txt").read_text()
        pinned = set(re.findall(r"^([a-z0-9-]+)==", text, re.MULTILINE))
        for name in sorted(names - pinned):
            yield f"requirements/{part}.txt: {name} is not pinned: run make lock"
        if "://" in text:
            yield f"requirements/{part}.txt: holds an address: run make lock with no index of your own"


def missing_pages() -> Iterator[str]:
    """The pages a reader looks for, and that they speak of this version."""
    [version] = re.findall(r'__version__ = "(.*)"', Path("src/buydesk/__init__.py").read_text())
    wanted = {
        "README.md": ["](docs/coverage.svg)"],
        "CHANGELOG.md": [f"## {version}", "## Unreleased"],
        "CONTRIBUTING.md": ["make check"],
        "docs/coverage.svg": ["coverage"],
        "docs/decisions/README.md": [path.name for path in sorted(Path("docs/decisions").glob("[0-9]*.md"))],
    }
    for page, texts in wanted.items():
        content = Path(page).read_text() if Path(page).exists() else ""
        # A changelog may speak of the version or of what is unreleased; everything else must hold all.
        holds = any if page == "CHANGELOG.md" else all
        if not Path(page).exists() or not holds(text in content for text in texts):
            yield f"{page}: must exist and hold {', '.join(texts)}"


def undated_records() -> Iterator[str]:
    """Every decision has a date and a status; one that is superseded and the later one link to each other."""
    form = re.compile(r"\A# .+\n\nDate: \d{4}-\d\d-\d\d · Status: (?:accepted|superseded by (\d{4}).*)\n")
    records = {path.name: path.read_text() for path in sorted(Path("docs/decisions").glob("[0-9]*.md"))}
    for name, text in records.items():
        found = form.search(text)
        if not found:
            yield f"docs/decisions/{name}: has no date and status below its title"
        elif later := found[1]:
            both = [other for other in records if other.startswith(later) and f"]({other})" in text]
            if not any(other > name and f"]({name})" in records[other] for other in both):
                yield f"docs/decisions/{name}: this record and {later}, which supersedes it, do not link to each other"


def _asked(part: str) -> set[str]:
    lines = Path(f"requirements/{part}.in").read_text().splitlines()
    return {_name(line) for line in lines if line and not line.startswith("#")}


def _name(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9-]", requirement, maxsplit=1)[0].lower()


def _listed() -> list[Path]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    return [Path(name) for name in names if name and not name.startswith(VENDORED)]


if __name__ == "__main__":
    sys.exit(main())
