"""The pages do what they say: their commands are run, the answers they show are compared with the real ones.

How the pages are written: a block of `sh` is run as it stands, in the order of the pages, against one new desk; a block
of `json`, `http` or `text` right below it is its answer. In an answer `…` stands for what is left out. Identifiers and
times are not compared, everything else is: the desk replays at speed 0, so prices stand still.
"""

import asyncio
import contextlib
import json
import re
import shutil
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from buydesk.clients.keys import KEY_PATTERN
from buydesk.errors import DeskError
from buydesk.settings.model import Settings, variable
from buydesk.topology import PORTS
from tests.desks import desk_up, free_offset
from tests.pages import REST, ROOT, SECONDS_MAX, Desk, Example, differences, differing_lines, examples, output, shell

# In the order in which they are read, and run against one desk.
PAGES = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in (
        "README.md",
        "docs/api.md",
        "docs/prices.md",
        "docs/containers.md",
        "docs/security.md",
        "CONTRIBUTING.md",
    )
}
README_WORDS_MAX = 1200
# Their commands need an engine and are not run here. deploy/smoke runs those for backup and restore, and
# test_operating.py holds it to that; the others nobody runs.
NEED_AN_ENGINE = {"docs/operating.md"}
# Its blocks are programs: test_integrating.py runs them.
OF_PROGRAMS = {"docs/integrating.md"}

NOT_RUN = {
    "make up": "it installs first; the desk here is started by the command behind it, and prints the same",
    "make up ARGS=--separate": "test_separate.py does, and takes its time",
    'make up ARGS="--sandbox-fault disagree"': "test_prices.py does, with every fault",
    "make test": "it runs this test",
    "make check": "CI runs it beside the tests",
    "make load": "test_load.py does",
    "docker compose up --build": "deploy/smoke does, where there is an engine",
    "docker compose up -d --wait --scale create_buy_order=3 --scale db_proxy=2": "as above",
    "docker compose up --build --exit-code-from tests tests; docker compose rm -fsv tests": "it runs `make test` again",
    "deploy/smoke": "CI runs it beside the tests",
}
# Codes that no client meets, and where they stay.
INTERNAL_CODES = {
    "key_refused": "db_proxy tells operate_desk",
    "price_superseded": "api_cache_proxy tells api_updater",
    "rates_unavailable": "api_cache_proxy tells those who count there",
    "source_failed": "api_updater logs it",
}

Rule = Callable[[Desk, Example], Awaitable[list[str]]]


async def elsewhere(_: Desk, example: Example) -> list[str]:
    """What needs an engine is not run here."""
    return [] if example.command in NOT_RUN else [f"give {example.command} a reason in NOT_RUN"]


async def dry_run(desk: Desk, example: Example) -> list[str]:
    """Make knows the target; what `make up` prints is what the desk has printed."""
    assert example.command in NOT_RUN, f"give {example.command} a reason in NOT_RUN"
    await output("make --dry-run" + example.command.removeprefix("make"))
    if example.language is None:
        return []
    await desk.running.until_printed("curl ")
    printed = [line for line in desk.running.lines if not line.startswith('{"time"')]
    return list(differing_lines(example.answer.splitlines(), desk.there("\n".join(printed)).splitlines()))


async def ask(desk: Desk, example: Example) -> list[str]:
    """The answer is JSON, and the one that is shown."""
    answer = desk.there(await output(desk.here(example.command)))
    if example.language is None:
        return ["a problem is answered"] if "code" in json.loads(answer) else []
    if example.language == "json":
        return list(differences(json.loads(example.answer), json.loads(answer)))
    head, _, body = answer.replace("\r\n", "\n").partition("\n\n")
    shown_head, _, shown_body = example.answer.partition("\n\n")
    lines = [*differing_lines(shown_head.splitlines(), head.splitlines())]
    return lines + list(differences(json.loads(shown_body), json.loads(body)))


async def finish(desk: Desk, example: Example) -> list[str]:
    """The commands succeed and say something."""
    return [] if await output(desk.here(example.command)) else ["nothing is printed"]


async def make_key(desk: Desk, example: Example) -> list[str]:
    """The commands succeed, for this desk, and show a key."""
    printed = await output(f"export BUYDESK_DATA_DIR={desk.data_dir}\n{desk.here(example.command)}")
    return [] if re.search(KEY_PATTERN, printed) else [printed]


async def serve(desk: Desk, example: Example) -> list[str]:
    """The service becomes ready, beside the desk's own on the same database, and ends well when told to."""
    service = example.command.split()[-1]
    offset = free_offset()
    # So that the signal reaches the service and not the shell.
    script = desk.here(example.command).replace("buydesk serve", "exec buydesk serve")
    readyz = f"http://127.0.0.1:{PORTS[service] + offset}/readyz"
    client = httpx2.AsyncClient(timeout=SECONDS_MAX)
    async with shell(script, BUYDESK_PORT_OFFSET=str(offset)) as process, client, asyncio.timeout(SECONDS_MAX):
        status = None
        while status != 200 and process.returncode is None:
            with contextlib.suppress(httpx2.ConnectError):
                status = (await client.get(readyz)).status_code
            await asyncio.sleep(0.02)
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        printed, _ = await process.communicate()
    return [] if (status, process.returncode) == (200, 0) else [printed.decode()]


# Every command block is of one of these forms, and of which it is says how it is run.
RULES: dict[str, Rule] = {
    r"make .*": dry_run,
    r"(docker compose|deploy/smoke).*": elsewhere,
    r"(\w+=\$\(curl .*\)\n)?curl (.|\n)*": ask,
    r"\. \.venv/bin/activate(\nbuydesk .*--help)+": finish,
    r"\. \.venv/bin/activate\nbuydesk clients create .*\nbuydesk keys create .*": make_key,
    r"\. \.venv/bin/activate(\nexport .*)+\nbuydesk migrate\nbuydesk serve \w+": serve,
}


def rules_of(command: str) -> list[Rule]:
    return [rule for form, rule in RULES.items() if re.fullmatch(form, command)]


@pytest.fixture(scope="session")
def curl() -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl on the PATH")


@pytest.mark.usefixtures("curl")
async def test_every_command_of_the_pages_works_as_written(open_directory: Path) -> None:
    data_dir = open_directory / "readme"
    async with desk_up(data_dir, "--replay-speed", "0") as running:
        desk = Desk(running, data_dir)
        for page, text in PAGES.items():
            for example in examples(text):
                [rule] = rules_of(example.command)
                wrong = await rule(desk, example)
                assert not wrong, f"{page}, line {example.line}: {example.command}\n" + "\n".join(wrong)
        assert await running.stop() == 0
    logged = [json.loads(line) for line in running.lines if line.startswith("{")]
    assert [each for each in logged if each["level"] != "INFO"] == []


EXAMPLES = [(page, example) for page, text in PAGES.items() for example in examples(text)]


@pytest.mark.parametrize("example", [pytest.param(each, id=f"{page}:{each.line}") for page, each in EXAMPLES])
def test_every_command_block_has_one_rule(example: Example) -> None:
    assert len(rules_of(example.command)) == 1


def test_every_page_with_commands_is_run_or_needs_an_engine() -> None:
    written = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in _written()}
    assert {page for page, text in written.items() if "```sh\n" in text} == PAGES.keys() | NEED_AN_ENGINE | OF_PROGRAMS


def test_what_is_not_run_stands_in_the_pages() -> None:
    assert {each.command for _, each in EXAMPLES} >= NOT_RUN.keys()


def test_readme_is_short() -> None:
    assert len(PAGES["README.md"].split()) <= README_WORDS_MAX


@pytest.mark.parametrize(
    "page",
    [
        "```python\n1\n```",
        "```json\n{}\n```",
        "```sh\nmake up\n```\nprints\n```text\nup\n```",
        "```sh\nmake up\n```\n```text\nup\n```\n```text\ndown\n```",
        "```sh\nmake up",
    ],
)
def test_a_block_that_nothing_would_look_at_is_found(page: str) -> None:
    with pytest.raises(AssertionError, match=r"block|answer|fence"):
        examples(page)


@pytest.mark.parametrize("command", ["rm -rf data", "buydesk up", "wget x"])
def test_a_command_of_an_unknown_form_has_no_rule(command: str) -> None:
    assert rules_of(command) == []


@pytest.mark.parametrize(
    ("shown", "real"),
    [
        ({"a": 1}, {"a": 2}),
        ({"a": 1}, {"a": 1, "b": 2}),
        ({"a": 1, REST: REST}, {"b": 2}),
        ({"a": 1}, {"a": True}),
        ({"a": "69.00"}, {"a": 69.0}),
        ([{"a": 1}], [{"a": 1}, {"a": 1}]),
        ([{"a": 1}, REST], []),
        ([1], {"0": 1}),
    ],
)
def test_an_answer_that_is_not_the_one_shown_is_found(shown: Any, real: Any) -> None:
    assert list(differences(shown, real)) != []


def shown_default(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def test_every_setting_is_documented_as_it_is() -> None:
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    documented = re.findall(r"^\| `(\w+)` \| (?:`(.+?)` )?\| (.+) \|$", page, re.MULTILINE)
    settings = [
        (
            variable(name),
            "" if field.default_factory or field.default in (None, ()) else shown_default(field.default),
            field.description,
        )
        for name, field in Settings.model_fields.items()
    ]
    assert sorted(documented) == sorted(settings)


def test_every_error_that_a_client_can_meet_is_documented() -> None:
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| (\d{3}) \| .+ \|$", PAGES["docs/api.md"], re.MULTILINE)
    documented = {code: int(status) for codes, status in rows for code in re.findall(r"\w+", codes)}
    assert documented == {code: error.status for code, error in DeskError.by_code.items() if code not in INTERNAL_CODES}


def test_every_port_is_documented() -> None:
    rows = re.findall(r"^\| (\w+) \| (\d+) \|", PAGES["docs/api.md"], re.MULTILINE)
    assert {service: int(port) for service, port in rows} == PORTS


def test_links_lead_somewhere() -> None:
    broken = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in _written()
        for target in re.findall(r"\]\(([^):]+)\)", page.read_text(encoding="utf-8"))
        if target != "docs/coverage.svg" and not _leads_somewhere(page, target)  # `make test` makes that one
    ]
    assert broken == []


@pytest.mark.parametrize(
    "target", ["nowhere.md", "README.md#nowhere", "#nowhere", "docs/api.md#access-", "LICENSE#top"]
)
def test_a_link_that_leads_nowhere_is_found(target: str) -> None:
    assert not _leads_somewhere(ROOT / "README.md", target)


@pytest.mark.parametrize("target", ["LICENSE", "docs/decisions", "#two-commands", "docs/api.md#access"])
def test_a_link_that_leads_somewhere_is_none_of_them(target: str) -> None:
    assert _leads_somewhere(ROOT / "README.md", target)


def _written() -> list[Path]:
    return [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]


def _leads_somewhere(page: Path, target: str) -> bool:
    """Whether there is such a file and, of a page, such a heading, by the names that forges give them."""
    file, has_anchor, anchor = target.partition("#")
    path = page.parent / file if file else page
    if not has_anchor or not path.exists():
        return path.exists()
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE) if path.suffix == ".md" else []
    return anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
