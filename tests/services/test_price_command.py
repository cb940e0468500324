"""`buydesk price`: what an operator asks of a desk that runs, over real TCP."""

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from buydesk import cli
from buydesk.backends.memory.reports import MemoryReportStore
from buydesk.embedded.data_dir import secret_file
from buydesk.money import Currency
from buydesk.observability.reporter import Reporter
from buydesk.prices.anchors import Anchor, Confirmation
from buydesk.services import db_proxy
from buydesk.times import format_time, utc_now
from tests.builders import TOKEN, settings
from tests.model_anchors import ModelAnchors
from tests.model_keys import ModelKeys
from tests.model_ledger import ModelLedger
from tests.serving import free_port, served

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)
CONFIRM = ["price", "confirm", "eur", "--from", "15000", "--to", "16000", "--why", "it's the news"]
SHOW = ["price", "show"]


@dataclass
class Desk:
    anchors: ModelAnchors
    env: dict[str, str]

    async def run(self, arguments: list[str], **env: str) -> Result:
        # A thread of its own: the command makes a loop of its own.
        return await asyncio.to_thread(CliRunner().invoke, cli.main, arguments, env=self.env | env)


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    anchors, given = ModelAnchors(), settings()
    reporter = Reporter("db_proxy", MemoryReportStore(given), given)
    async with served(
        db_proxy.create_app(given, ModelLedger(), ModelLedger(), anchors, reporter, keys=ModelKeys())
    ) as url:
        yield Desk(anchors, {"BUYDESK_DB_PROXY_URL": url, "BUYDESK_PUBLISHING_TOKENS": TOKEN})


async def test_price_is_confirmed_for_a_quarter_of_an_hour_and_what_was_confirmed_is_told(desk: Desk) -> None:
    result = await desk.run(CONFIRM)
    [kept] = desk.anchors.confirmed
    assert (kept.currency, kept.low_e8, kept.high_e8) == (Currency.EUR, 15_000 * 10**8, 16_000 * 10**8)
    assert kept.why == "it's the news"
    assert timedelta(minutes=14) < kept.expires_at - utc_now() <= timedelta(minutes=15)
    ends = format_time(kept.expires_at)
    assert result.output == f"Confirmed: EUR 15000.00 to 16000.00 until {ends} (it's the news)\n"
    assert result.exit_code == 0


async def test_price_is_confirmed_for_as_long_as_asked(desk: Desk) -> None:
    assert (await desk.run([*CONFIRM, "--minutes", "2"])).exit_code == 0
    [kept] = desk.anchors.confirmed
    assert timedelta(minutes=1) < kept.expires_at - utc_now() <= timedelta(minutes=2)


async def test_last_prices_and_what_is_confirmed_are_shown(desk: Desk) -> None:
    desk.anchors.kept = {
        Currency.USD: Anchor(20_000 * 10**8, NOON),
        Currency.EUR: Anchor(4119191 * 10**6, NOON + timedelta(seconds=1)),
    }
    ends_at = utc_now() + timedelta(minutes=1)
    desk.anchors.confirmed = [Confirmation(Currency.GBP, 10**8, 2 * 10**8, "why not", ends_at)]
    assert (await desk.run(SHOW)).output.splitlines() == [
        "EUR 41191.91, the price of 2026-01-31T12:00:01.000000Z",
        "USD 20000.00, the price of 2026-01-31T12:00:00.000000Z",
        f"Confirmed: GBP 1.00 to 2.00 until {format_time(ends_at)} (why not)",
    ]


async def test_desk_that_has_no_last_price_says_so(desk: Desk) -> None:
    assert (await desk.run(SHOW)).output == "There is no last price yet.\n"


async def test_token_is_found_in_the_data_directory_of_a_desk_that_up_started(desk: Desk, tmp_path: Path) -> None:
    secret_file(tmp_path, "publishing_tokens").write_text(f"{TOKEN}\n")
    del desk.env["BUYDESK_PUBLISHING_TOKENS"]
    assert (await desk.run([*SHOW, "--data-dir", str(tmp_path)])).exit_code == 0
    assert (await desk.run(SHOW, BUYDESK_DATA_DIR=str(tmp_path))).exit_code == 0


@pytest.mark.parametrize(
    ("options", "directory"),
    [([], "data"), (["--port-offset", "7"], "data-7"), (["--feed", "live", "--port-offset", "7"], "data-live-7")],
)
async def test_data_directory_is_by_default_the_one_that_up_takes(
    desk: Desk, options: list[str], directory: str, open_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(open_directory)
    (open_directory / directory).mkdir()
    secret_file(open_directory / directory, "publishing_tokens").write_text(TOKEN)
    del desk.env["BUYDESK_PUBLISHING_TOKENS"]
    assert (await desk.run([*SHOW, *options])).exit_code == 0


def assert_one_line(result: Result, said: str) -> None:
    assert result.exit_code == 2
    assert result.output == f"buydesk: {said}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([*CONFIRM[:2], "CHF", *CONFIRM[3:]], "CURRENCY must be one of EUR, GBP, USD"),
        ([*CONFIRM, "--from", "x"], "--from must be plain decimal text with at most 8 places, such as 0.00167509"),
        ([*CONFIRM, "--to", "0.5"], "--to must be an exchange rate between 1 and 10000000000"),
        ([*CONFIRM, "--to", "14999.99"], "to: must not be less than from"),
        ([*CONFIRM, "--why", ""], "why: must be 1 to 500 printable characters on one line"),
        ([*CONFIRM, "--minutes", "16"], "minutes: must be a whole number from 1 to 15"),
    ],
)
async def test_what_cannot_be_confirmed_is_refused_in_one_line(desk: Desk, arguments: list[str], said: str) -> None:
    assert_one_line(await desk.run(arguments), said)
    assert desk.anchors.confirmed == []


@pytest.mark.parametrize("arguments", [SHOW, CONFIRM])
async def test_desk_that_does_not_answer_is_told_in_one_line_with_its_address(desk: Desk, arguments: list[str]) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    result = await desk.run(arguments, BUYDESK_DB_PROXY_URL=nowhere)
    assert_one_line(result, f"db_proxy gave no answer (ClientConnectorError). It was asked at {nowhere}.")


@pytest.mark.parametrize("arguments", [SHOW, CONFIRM])
async def test_wrong_token_is_told_in_one_line(desk: Desk, arguments: list[str]) -> None:
    result = await desk.run(arguments, BUYDESK_PUBLISHING_TOKENS="wrong")
    where = f"It was asked at {desk.env['BUYDESK_DB_PROXY_URL']}."
    assert result.output.startswith("buydesk: db_proxy answered unauthorized: ")
    assert result.output.endswith(f"{where}\n")
    assert (result.exit_code, result.output.count("\n")) == (2, 1)


@pytest.mark.parametrize("arguments", [SHOW, CONFIRM])
async def test_directory_without_a_desk_is_told_in_one_line(desk: Desk, arguments: list[str], tmp_path: Path) -> None:
    del desk.env["BUYDESK_PUBLISHING_TOKENS"]
    result = await desk.run([*arguments, "--data-dir", str(tmp_path)])
    says = f"no desk has been started in {tmp_path}: use its --data-dir, or set BUYDESK_PUBLISHING_TOKENS"
    assert_one_line(result, says)


async def test_token_that_cannot_be_read_is_told_in_one_line(desk: Desk, tmp_path: Path) -> None:
    del desk.env["BUYDESK_PUBLISHING_TOKENS"]
    file = secret_file(tmp_path, "publishing_tokens")
    file.mkdir()  # root could read any file
    result = await desk.run([*SHOW, "--data-dir", str(tmp_path)])
    assert_one_line(result, f"cannot read {file}: {os.strerror(21)}; run this as whoever runs the desk")
