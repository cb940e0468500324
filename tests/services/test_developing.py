"""`buydesk listen` and `buydesk trigger`, on a desk that is up."""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from click.testing import CliRunner
from pydantic import SecretStr

from buydesk import cli
from buydesk.embedded.data_dir import secret_file
from buydesk.errors import CannotStart
from buydesk.events.model import EVENT_TYPES
from buydesk.runtime import developing
from buydesk.runtime.developing import listen, trigger
from buydesk.settings.model import Settings
from buydesk.topology import PORTS
from tests.desks import Running, desk_up
from tests.endpoints import endpoint
from tests.serving import free_port
from tests.signatures import valid_signatures


@pytest.fixture(scope="module")
async def desk(open_directory: Path) -> AsyncIterator[Running]:
    async with desk_up(open_directory / "developing") as running:
        yield running


@pytest.fixture
def given(desk: Running, open_directory: Path) -> Settings:
    return Settings(port_offset=desk.offset, data_dir=open_directory / "developing")


@contextlib.asynccontextmanager
async def listening(given: Settings, forward_to: str | None, key: str | None = None) -> AsyncIterator[list[str]]:
    """What it says while it listens."""
    said: list[str] = []
    task = asyncio.create_task(listen(given, key, forward_to, said.append))
    try:
        await until(said, 1)
        yield said
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(said: list[str], lines: int) -> None:
    async with asyncio.timeout(15):
        while len(said) < lines:
            await asyncio.sleep(0.01)


async def test_events_that_are_made_reach_a_local_program_as_webhooks(given: Settings) -> None:
    await trigger(given, None, "order.placed")
    async with endpoint() as at, listening(given, at.url) as said:
        secret = said[0].rpartition(" ")[2]
        for event in EVENT_TYPES:
            assert (await trigger(given, None, event)).startswith(f"{event}: order ")
        messages = await at.until_taken(5)
        await until(said, 6)
    types = [each.document["type"] for each in messages]
    assert types == ["order.placed", "order.placed", "order.settled", "order.placed", "order.cancelled"]
    for message in messages:
        assert valid_signatures(secret, message.headers, message.body) == 1
        assert message.headers["webhook-id"] == message.document["data"]["id"]
    first = messages[0].sequence
    assert said[0].startswith(f"Listening after event {first - 1}. ")
    assert re.fullmatch(rf"{first} order.placed [0-9a-f-]+ -> 204", said[1])
    assert [each.sequence for each in messages] == list(range(first, first + 5))
    # Each order has a key of its own, so that a desk takes it that asks for one.
    keys = {each.document["data"]["order"]["client_order_id"] for each in messages}
    assert len(keys) == 3
    assert all(re.fullmatch(r"trigger-[0-9a-f-]{36}", key) for key in keys)


async def test_events_are_told_without_a_program_too_and_what_a_program_answers(given: Settings) -> None:
    async with listening(given, None) as said:
        await trigger(given, None, "order.placed")
        await until(said, 2)
        assert re.fullmatch(r"\d+ order.placed [0-9a-f-]+", said[1])
        assert "whsec_" not in said[0]
    async with listening(given, f"http://127.0.0.1:{free_port()}/") as said:
        await trigger(given, None, "order.placed")
        await until(said, 2)
        assert said[1].endswith(" -> no answer (ClientConnectorError)")


async def test_processing_token_is_the_one_that_is_set_or_that_of_the_data_directory(
    given: Settings, tmp_path: Path
) -> None:
    token = secret_file(given.data_dir or tmp_path, "processing_tokens").read_text()
    elsewhere = given.model_copy(update={"data_dir": tmp_path})
    with pytest.raises(CannotStart, match="use the desk's --data-dir"):
        await trigger(elsewhere, None, "order.settled")
    both = Settings(port_offset=given.port_offset, processing_tokens=SecretStr(f"{token},older"))
    assert (await trigger(both, None, "order.settled")).startswith("order.settled")
    wrong = Settings(port_offset=given.port_offset, processing_tokens=SecretStr("wrong"))
    with pytest.raises(CannotStart, match=r"process_buy_orders refuses: .* \(unauthorized\)"):
        await trigger(wrong, None, "order.settled")


async def test_key_is_shown(given: Settings) -> None:
    with pytest.raises(CannotStart, match="create_buy_order refuses"):
        await trigger(given, "bd_test_nonsense", "order.placed")
    with pytest.raises(CannotStart, match="process_buy_orders refuses"):
        await listen(given, "bd_test_nonsense", None, print)


async def test_desk_that_is_away_or_sells_at_real_prices_is_told(
    given: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = Settings(port_offset=given.port_offset + 20_000)
    with pytest.raises(CannotStart, match="the desk does not answer"):
        await trigger(away, None, "order.placed")

    async def real(_: web.Request) -> web.StreamResponse:
        return web.json_response({"feed": "live"})

    async def busy(_: web.Request) -> web.StreamResponse:
        return web.Response(status=503, text="no time")

    async with endpoint(busy) as at:
        monkeypatch.setitem(PORTS, "api_cache_proxy", at.port)
        with pytest.raises(CannotStart, match="api_cache_proxy answers 503: no time"):
            await trigger(Settings(), None, "order.placed")
    async with endpoint(real) as at:
        monkeypatch.setitem(PORTS, "api_cache_proxy", at.port)
        with pytest.raises(CannotStart, match="in a sandbox only"):
            await trigger(Settings(), None, "order.placed")


async def test_listening_goes_on_when_the_desk_comes_back_or_has_time_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(developing, "PAUSE_SECONDS", 0.01)
    asked: list[str] = []
    event = {"sequence": 1, "type": "order.placed", "order": {"id": "x"}}

    async def respond(request: web.Request) -> web.StreamResponse:
        asked.append(request.path_qs)
        if len(asked) in (2, 3, 4):  # a client sends once more what a kept connection lost
            assert request.transport is not None
            request.transport.abort()
        if len(asked) in (5, 6):
            return web.Response(status=429 if len(asked) == 5 else 502, text="<html>not now</html>")
        if len(asked) == 7:
            return web.json_response({"data": [event], "next_after": 1})
        if len(asked) > 7:
            await asyncio.sleep(3600)
        return web.json_response({"data": [], "next_after": 0})

    async with endpoint(respond) as at:
        monkeypatch.setitem(PORTS, "process_buy_orders", at.port)
        async with listening(Settings(), None) as said:
            await until(said, 2)
    assert said[1] == "1 order.placed x"


async def command(*arguments: str, **env: str) -> Any:
    # A thread of its own: the command makes a loop of its own.
    return await asyncio.to_thread(CliRunner().invoke, cli.main, arguments, env=env)


async def test_commands_do_it(given: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = ("--port-offset", str(given.port_offset), "--data-dir", str(given.data_dir))
    made = await command("trigger", "order.cancelled", *desk)
    assert (made.exit_code, made.output.startswith("order.cancelled: order ")) == (0, True), made.output
    wrong = await command("trigger", "order.cancelled", "--key-file", str(tmp_path / "none"), *desk)
    assert (wrong.exit_code, "--key-file" in wrong.output) == (2, True)
    wrong = await command("listen", "--forward-to", "localhost:9000", *desk)
    assert (wrong.exit_code, "--forward-to must be an http://" in wrong.output) == (2, True)
    (tmp_path / "key").write_text("bd_test_x\n")
    asked: list[Any] = []

    async def follow(given: Settings, key: str | None, url: str | None, _: object) -> None:
        asked.append((given.port_offset, key, url))
        raise KeyboardInterrupt

    monkeypatch.setattr(developing, "listen", follow)
    arguments = ("--forward-to", "http://127.0.0.1:9000/hook", "--key-file", str(tmp_path / "key"))
    told = await command("listen", *arguments, *desk)
    assert asked == [(given.port_offset, "bd_test_x", "http://127.0.0.1:9000/hook")]
    assert told.output == "Stopped.\n"
