"""Pages whose commands are run: what stands in them, for which desk, and how answers are compared with those shown."""

import asyncio
import contextlib
import re
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from buydesk.embedded.postgres import EmbeddedPostgres
from tests.desks import Running, environment

ROOT = Path(__file__).parents[1]
SECONDS_MAX = 30
REST = "…"
MASKS = {
    r"whsec_[A-Za-z0-9+/]{43}=": "<secret>",
    r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}": "<id>",
    r"(?<![\w-])([\w-]{86}|[\w-]{43})(?![\w-])": "<key or signature>",
    # Replayed minutes are of 2023 and stand still.
    r"(?!2023)\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{6})?(Z|\+00:00)": "<time>",
    r"[A-Z][a-z]{2} \d{1,2}, \d{4}( at)? \d\d:\d\d(:\d\d)? (UTC|GMT|BST)": "<time>",
    r"after \d+\.\d s": "after <seconds>",
    r" {2,}": " ",  # columns, whose width depends on the ports
}


@dataclass(frozen=True)
class Example:
    """A command block and the answer below it; `language` is None when there is none."""

    line: int
    command: str
    language: str | None
    answer: str


@dataclass(frozen=True)
class Desk:
    """The desk that the examples are run against, and where it keeps everything."""

    running: Running
    data_dir: Path

    def here(self, text: str) -> str:
        """A page's text, for this desk."""
        here = re.sub(
            r"(127\.0\.0\.1:)(80\d\d)", lambda found: f"{found[1]}{int(found[2]) + self.running.offset}", text
        )
        here = re.sub(r"(DATABASE_URL=)\S+", lambda found: f"{found[1]}'{EmbeddedPostgres(self.data_dir).dsn}'", here)
        return here.replace(".venv/", f"{sys.prefix}/").replace("cat data/", f"cat {self.data_dir}/")

    def there(self, text: str) -> str:
        """The desk's text, as the pages have it."""
        offset = self.running.offset
        there = re.sub(r"(127\.0\.0\.1:)(\d+)", lambda found: f"{found[1]}{int(found[2]) - offset}", text)
        return there.replace(str(self.data_dir), "/path/to/buydesk/data")


def program_of(page: str, language: str) -> str:
    """The blocks of a language, one below the other."""
    return "\n\n\n".join(re.findall(rf"^```{language}\n(.*?)\n```$", page, re.MULTILINE | re.DOTALL)) + "\n"


def without_programs(page: str, *languages: str) -> str:
    """The page with a line of each block of these languages in the place of the block."""
    return re.sub(rf"^```({'|'.join(languages)})\n.*?\n```$", r"(\1)", page, flags=re.MULTILINE | re.DOTALL)


def examples(page: str) -> list[Example]:
    """The command blocks of a page; raises AssertionError for a block that is none and no answer to one."""
    found: list[Example] = []
    end_of_command = -1
    for block in re.finditer(r"^```(\w*)\n(.*?)\n```$", page, re.MULTILINE | re.DOTALL):
        line = page.count("\n", 0, block.start()) + 1
        language, text = block.groups()
        if language == "sh":
            found.append(Example(line, text, None, ""))
            end_of_command = block.end()
            continue
        assert language in ("json", "http", "text"), f"line {line}: a block of {language or 'no language'}"
        assert end_of_command >= 0, f"line {line}: no command before this answer"
        assert not page[end_of_command : block.start()].strip(), f"line {line}: no command right above this answer"
        found[-1] = Example(found[-1].line, found[-1].command, language, text)
        end_of_command = -1
    assert page.count("```") == sum(2 if each.language is None else 4 for each in found), "a fence is no block's"
    return found


def _masked(text: str) -> str:
    for pattern, mask in MASKS.items():
        text = re.sub(pattern, mask, text)
    return text


def differences(shown: Any, real: Any, where: str = "answer") -> Iterator[str]:
    """What differs between an answer as shown and the real one."""
    if isinstance(shown, dict) and isinstance(real, dict):
        for name in shown.keys() - {REST}:
            if name in real:
                yield from differences(shown[name], real[name], f"{where}.{name}")
            else:
                yield f"{where}.{name} is not in the real one"
        if REST not in shown:
            yield from (f"{where}.{name} is not shown" for name in real.keys() - shown.keys())
    elif isinstance(shown, list) and isinstance(real, list):
        items = shown[:-1] if shown[-1:] == [REST] else shown
        if len(items) > len(real) or (items is shown and len(items) < len(real)):
            yield f"{where} has {len(real)} items and {len(items)} are shown"
        for number, (item, real_item) in enumerate(zip(items, real, strict=False)):
            yield from differences(item, real_item, f"{where}.{number}")
    elif isinstance(shown, str) and isinstance(real, str):
        if _masked(shown) != _masked(real):
            yield f"{where} is {real!r} and {shown!r} is shown"
    elif type(shown) is not type(real) or shown != real:
        yield f"{where} is {real!r} and {shown!r} is shown"


def differing_lines(shown: list[str], real: list[str]) -> Iterator[str]:
    """What differs between lines; with a line of `…` others may stand between and after those shown."""
    wanted, found = [_masked(line) for line in shown if line != REST], [_masked(line) for line in real]
    if REST in shown:
        yield from (f"there is no line {line!r}" for line in wanted if line not in found)
    elif wanted != found:
        yield "\n".join(["printed is", *found, "and shown is", *wanted])


async def output(script: str, cwd: Path = ROOT, **env: str) -> str:
    """What the script prints; it must succeed."""
    async with shell(f"set -euo pipefail\n{script}", cwd, **env) as process, asyncio.timeout(SECONDS_MAX):
        printed, _ = await process.communicate()
    assert process.returncode == 0, printed.decode()
    return printed.decode()


@contextlib.asynccontextmanager
async def shell(script: str, cwd: Path = ROOT, **env: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *("bash", "-c", script), cwd=cwd, env=environment(**env), stdout=asyncio.subprocess.PIPE
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
