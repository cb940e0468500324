"""`buydesk clients`, `keys` and `audit`, on a real database."""

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from click.testing import CliRunner, Result

from buydesk import cli
from buydesk.backends.postgres.clients import PostgresKeys
from buydesk.backends.postgres.ledger import PostgresLedger
from buydesk.backends.postgres.life import PostgresLife
from buydesk.backends.postgres.migrate import migrate
from buydesk.clients.audit import broken_entries
from buydesk.clients.keys import parse_key_text
from buydesk.clients.model import NewKey
from buydesk.clients.registry import LimitClient, Limits, RevokeKey, create_key, rotate_key
from buydesk.clients.scopes import SCOPES
from buydesk.embedded.postgres import EmbeddedPostgres
from buydesk.errors import CannotStart
from buydesk.orders.life import Closing
from buydesk.orders.model import Placed, Refused
from buydesk.runtime.registry import keep_operator_key
from tests.builders import priced_order, record, settings
from tests.databases import Databases, as_db_proxy, run
from tests.desks import environment
from tests.operators import operating

CREATE = ["keys", "create", "shop", "--scopes", "orders:read,orders:create"]


@dataclass
class Desk:
    dsn: str

    async def run(self, *arguments: str, **env: str) -> Result:
        # A thread of its own: the command makes a loop of its own.
        given = environment() | {"DATABASE_URL": self.dsn} | env
        return await asyncio.to_thread(CliRunner().invoke, cli.main, arguments, env=given)

    async def told(self, *arguments: str) -> str:
        result = await self.run(*arguments)
        assert result.exit_code == 0, result.output
        return result.stdout

    async def rows(self, query: str) -> list[tuple[Any, ...]]:
        connection = await asyncpg.connect(self.dsn)
        rows = [tuple(row) for row in await connection.fetch(query)]
        await connection.close()
        return rows


@pytest.fixture
async def desk(databases: Databases) -> AsyncIterator[Desk]:
    desk = Desk(await databases.new())
    await desk.told("clients", "create", "shop", "--cap", "1.5", "--largest", "0.25", "--why", "it's new")
    yield desk
    async with operating(desk.dsn) as own:
        assert list(broken_entries(await own.registry.acts(0, 1000))) == []


async def test_a_client_is_made_with_its_limits_and_these_may_change(desk: Desk) -> None:
    query = "SELECT cap_satoshi, order_satoshi_max, rate_per_minute FROM clients WHERE name = 'shop'"
    assert await desk.rows(query) == [(150_000_000, 25_000_000, None)]
    lines = (await desk.told("clients", "limit", "shop", "--cap", "2", "--why", "more")).splitlines()
    assert lines == [
        "NAME  ORDERS  USED        CAP         COUNTS  LARGEST ORDER  A DAY  MARKUP   A MINUTE  QUOTES   KEYS",
        "shop  0       0.00000000  2.00000000  stored  0.25000000     none   default  default   default  0",
    ]
    assert await desk.rows(query) == [(200_000_000, 25_000_000, None)]
    more = (
        "--largest",
        "none",
        "--daily",
        "EUR:1000",
        "--daily",
        "gbp:0.5",
        "--rate",
        "600/minute",
        "--quote-seconds",
        "90",
    )
    told = await desk.told("clients", "limit", "shop", *more, "--why", "trusted")
    assert told.splitlines()[1] == (
        "shop  0       0.00000000  2.00000000  stored  none           "
        "EUR:1000.00,GBP:0.50  default  600       90 s    0"
    )
    assert await desk.rows(query) == [(200_000_000, None, 600)]
    less = ("--daily", "GBP:none", "--rate", "none", "--cap", "none", "--quote-seconds", "none")
    await desk.told("clients", "limit", "shop", *less, "--why", "simpler")
    lines = (await desk.told("clients", "list")).splitlines()
    assert (
        "shop       0       0.00000000  none  stored  none           EUR:1000.00  default  default   default  0"
        in lines
    )
    await desk.told("clients", "create", "bank", "--rate", "5", "--daily", "USD:7")
    assert await desk.rows("SELECT client, currency, cents_max FROM daily_limits ORDER BY client") == [
        ("bank", "USD", 700),
        ("shop", "EUR", 100_000),
    ]
    [(after,)] = await desk.rows("SELECT after FROM audit WHERE number = 4")
    assert '"daily_cents_max" : {"EUR" : 100000}' in after.replace("{ ", "{").replace(" }", "}")


async def test_a_client_has_markups_of_its_own_that_may_change(desk: Desk) -> None:
    query = "SELECT client, currency, markup_bp FROM markups ORDER BY client, currency"
    await desk.told("clients", "create", "bank", "--markup", "USD:0")
    told = await desk.told("clients", "limit", "shop", "--markup", "EUR:75", "--markup", "gbp:5000", "--why", "agreed")
    assert told.splitlines()[1].split()[-4:] == ["EUR:75,GBP:5000", "default", "default", "0"]
    assert await desk.rows(query) == [("bank", "USD", 0), ("shop", "EUR", 75), ("shop", "GBP", 5000)]
    await desk.told("clients", "limit", "shop", "--markup", "GBP:none", "--markup", "EUR:50", "--why", "agreed")
    assert await desk.rows(query) == [("bank", "USD", 0), ("shop", "EUR", 50)]
    states = await desk.rows(
        "SELECT before::jsonb -> 'markup_bp', after::jsonb -> 'markup_bp' FROM audit ORDER BY number"
    )
    assert states == [
        (None, "{}"),
        (None, '{"USD": 0}'),
        ("{}", '{"EUR": 75, "GBP": 5000}'),
        ('{"EUR": 75, "GBP": 5000}', '{"EUR": 50}'),
    ]


async def test_the_desk_is_paused_and_resumed_with_a_reason(desk: Desk) -> None:
    told = await desk.told("pause", "--why", "a fork")
    assert told == ("The desk is paused: it places nothing new and answers repeats. `buydesk resume` ends that.\n")
    assert (await desk.told("cap", "show")).endswith(" The desk is paused.\n")
    assert await desk.told("resume", "--why", "it is over") == "The desk places orders.\n"
    acts = await desk.rows("SELECT act, why FROM audit WHERE number > 1 ORDER BY number")
    assert acts == [("desk paused", "a fork"), ("desk resumed", "it is over")]
    assert await desk.rows("SELECT paused FROM exposure") == [(False,)]


async def test_a_key_is_shown_once_alone_and_only_its_hash_is_kept(desk: Desk) -> None:
    result = await desk.run(*CREATE)
    key = parse_key_text(result.stdout.strip())
    assert result.stdout == f"{key.text}\n"
    assert key.text not in result.stderr
    assert key.id in result.stderr
    [(digest, scopes)] = await desk.rows("SELECT digest, scopes FROM keys")
    assert (digest, scopes) == (key.digest, ["orders:create", "orders:read"])
    dump = str([await desk.rows(f"SELECT * FROM {table}") for table in ("keys", "audit", "clients")])  # noqa: S608
    assert key.text not in dump
    assert key.text[18:-6] not in dump
    listed = await desk.told("keys", "list", "shop")
    assert re.search(rf"^{key.id}  shop +valid  never +orders:create,orders:read$", listed, re.MULTILINE)
    assert (await desk.told("keys", "list", "other")).count("\n") == 1


async def test_a_key_ends_is_taken_from_its_networks_and_is_of_the_database_s_mode(databases: Databases) -> None:
    desk = Desk(await databases.new(livemode=True))
    options = ("--expires", "90d", "--allow-from", "192.0.2.0/24", "--allow-from", "2001:db8::1")
    text = (await desk.told("keys", "create", "anonymous", "--scopes", "orders:read", *options)).strip()
    assert parse_key_text(text).livemode
    query = "SELECT allow_from::text[], round(extract(epoch FROM expires_at - created_at) / 86400) FROM keys"
    assert await desk.rows(query) == [(["192.0.2.0/24", "2001:db8::1/128"], 90)]
    assert re.search(r"valid until 20\d\d-\d\d-\d\dT\d\d:\d\dZ  never", await desk.told("keys", "list"))


async def test_a_revoked_key_has_ended_and_a_rotated_one_ends_after_the_overlap(desk: Desk) -> None:
    first = parse_key_text((await desk.told(*CREATE)).strip())
    second = parse_key_text(
        (await desk.told("keys", "rotate", first.id, "--overlap", "15m", "--why", "a year")).strip()
    )
    query = (
        "SELECT id, client, scopes, round(extract(epoch FROM expires_at - now()) / 60) FROM keys ORDER BY created_at"
    )
    scopes = ["orders:create", "orders:read"]
    assert await desk.rows(query) == [(first.id, "shop", scopes, 15), (second.id, "shop", scopes, None)]
    told = await desk.told("keys", "revoke", second.id, "--why", "lost")
    assert told == f"The key {second.id} is revoked: no service takes it after 2 s.\n"
    assert re.search(rf"^{second.id}  shop +revoked ", await desk.told("keys", "list"), re.MULTILINE)
    result = await desk.run("keys", "rotate", second.id)
    assert (result.exit_code, result.output) == (2, "buydesk: The key has ended: create one.\n")
    await run(desk.dsn, "UPDATE keys SET expires_at = now()")
    assert "ended 20" in await desk.told("keys", "list")


async def test_a_key_that_ends_is_rotated_to_one_that_lasts_as_long(desk: Desk) -> None:
    first = parse_key_text((await desk.told(*CREATE, "--expires", "90d")).strip())
    await run(
        desk.dsn,
        "SET session_replication_role = replica; UPDATE keys SET created_at = now() - interval '89 d', "
        "expires_at = now() + interval '1 d'",
    )
    second = parse_key_text((await desk.told("keys", "rotate", first.id)).strip())
    query = "SELECT id, round(extract(epoch FROM expires_at - now()) / 86400) FROM keys ORDER BY created_at"
    assert await desk.rows(query) == [(first.id, 1), (second.id, 90)]


async def test_a_key_is_rotated_and_revoked_at_the_same_time(desk: Desk) -> None:
    async def rotate(key_id: str) -> str:
        try:
            async with operating(desk.dsn) as own:
                await rotate_key(own.registry, key_id, timedelta(hours=1), "a year", own.by)
        except CannotStart as error:
            return str(error)
        return "rotated"

    async def revoke(key_id: str) -> None:
        async with operating(desk.dsn) as own:
            await own.change(RevokeKey(key_id), "lost")

    for _ in range(20):
        async with operating(desk.dsn) as own:
            key = await create_key(own.registry, NewKey("shop", ["orders:read"]), "", own.by)
        told, _ = await asyncio.gather(rotate(key.id), revoke(key.id))
        assert told in ("rotated", "The key has ended: create one.")
        assert await desk.rows(f"SELECT revoked_at IS NOT NULL FROM keys WHERE id = '{key.id}'") == [(True,)]  # noqa: S608


async def test_what_was_before_an_act_is_what_the_act_before_it_left(desk: Desk) -> None:
    async def limit(cap_satoshi: int) -> None:
        async with operating(desk.dsn) as own:
            await own.change(LimitClient("shop", Limits(cap_satoshi=cap_satoshi)), "x")

    await asyncio.gather(*(limit(each) for each in range(1, 9)))
    states = await desk.rows("SELECT before, after FROM audit WHERE act = 'client limited' ORDER BY number")
    assert [before for before, _ in states[1:]] == [after for _, after in states[:-1]]


async def test_every_act_is_on_record_with_who_did_it_and_why(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("getpass.getuser", lambda: "alice")
    key = parse_key_text((await desk.told(*CREATE)).strip())
    await desk.told("keys", "revoke", key.id, "--why", "lost in a bus")
    told = (await desk.told("audit")).splitlines()
    assert re.fullmatch(r"1 20\S+Z \S+@\S+ client created shop \(it's new\)", told[0])
    assert re.fullmatch(rf"2 20\S+Z alice@\S+ key created {key.id}", told[1])
    assert re.fullmatch(rf"3 20\S+Z alice@\S+ key revoked {key.id} \(lost in a bus\)", told[2])
    assert re.fullmatch(r"3 acts; none was changed or left out, the last hash is [0-9a-f]{64}\.", told[3])
    assert (await desk.told("audit", "--limit", "1")).splitlines() == told[2:]
    [(before, after)] = await desk.rows("SELECT before, after FROM audit WHERE number = 3")
    assert '"revoked_at" : null' in before
    assert '"revoked_at" : "20' in after


async def test_an_account_without_a_name_is_unknown(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise OSError("No username set in the environment")

    monkeypatch.setattr("getpass.getuser", nobody)
    await desk.told(*CREATE)
    assert await desk.rows("SELECT operator FROM audit WHERE number = 2") == [("unknown",)]


async def test_a_record_that_was_changed_is_told(databases: Databases) -> None:
    desk = Desk(await databases.new())
    assert await desk.told("audit") == "0 acts; none was changed or left out.\n"
    for name in ("one", "two", "three"):
        await desk.told("clients", "create", name)
    for statement in ("UPDATE audit SET why = 'another' WHERE number = 2", "DELETE FROM audit WHERE number = 1"):
        await run(desk.dsn, f"SET session_replication_role = replica; {statement}")
        result = await desk.run("audit")
        broken = statement[-1]
        assert result.output == (
            f"buydesk: the record of acts was changed: entry {broken} does not fit those before it\n"
        )


@pytest.mark.parametrize("why", ["", "two\nlines", "w" * 501])
async def test_a_reason_is_one_line_that_can_be_read(desk: Desk, why: str) -> None:
    for command in (["pause"], ["clients", "create", "x"]):
        result = await desk.run(*command, "--why", why)
        assert (result.exit_code, result.output.count("\n")) == (2, 1)
        assert "--why must be 1 to 500 characters without control characters" in result.output
    assert await desk.rows("SELECT count(*) FROM audit") == [(1,)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["clients", "create", "x", "--rate", "00000006012345678"],
            "--rate must be a number of requests a minute from",
        ),
        (["clients", "create", "shop"], "There is a client of this name already."),
        (["clients", "create", "Shop!"], "client: must have 1 to 32 characters: a to z, 0 to 9 and, but for the"),
        (["clients", "create", "x", "--cap", "a lot"], "--cap must be"),
        (["clients", "create", "x", "--largest", "0"], "largest_order: must be more than 0"),
        (["clients", "create", "x", "--daily", "CHF:1"], "--daily must be one of EUR, GBP, USD"),
        (["clients", "create", "x", "--daily", "EUR"], "--daily must be a decimal number"),
        (["clients", "create", "x", "--markup", "CHF:1"], "--markup must be one of EUR, GBP, USD"),
        (
            ["clients", "create", "x", "--markup", "EUR"],
            "--markup must be a whole number of basis points from 0 to 5000",
        ),
        (["clients", "create", "x", "--markup", "EUR:-1"], "--markup must be a whole number of basis points from 0"),
        (
            ["clients", "create", "x", "--quote-seconds", "901"],
            "--quote-seconds must be a number of seconds from 5 to 900",
        ),
        (["clients", "create", "x", "--quote-seconds", "-5"], "--quote-seconds must be a number of seconds from 5"),
        (["clients", "create", "x", "--markup", "EUR:5001"], "--markup must be a whole number of basis points from 0"),
        (["clients", "create", "x", "--rate", "0/minute"], "--rate must be a number of requests a minute from 1 to"),
        (["clients", "create", "x", "--rate", "a lot"], "--rate must be a number of requests a minute from 1 to"),
        (["clients", "limit", "nobody", "--cap", "1", "--why", "x"], "There is no client nobody."),
        (
            ["clients", "limit", "shop", "--why", "x"],
            "nothing to change: give --cap, --largest, --daily, --markup, --rate",
        ),
        (["keys", "create", "nobody", "--scopes", "orders:read"], "There is no client nobody."),
        (
            ["keys", "create", "shop", "--scopes", "orders:paint"],
            "--scopes has no scope orders:paint; there are clients:",
        ),
        ([*CREATE, "--expires", "soon"], "--expires must be a time such as 90d, 24h or 15m"),
        ([*CREATE, "--allow-from", "here"], "--allow-from must be an address or a network, such as 192.0.2.0/24"),
        (["keys", "revoke", "0" * 10, "--why", "x"], "There is no key 0000000000."),
        (["keys", "rotate", "0" * 10], "There is no key 0000000000."),
        (["audit", "--limit", "0"], "--limit must be at least 1"),
        (["cap", "set", "a lot", "--why", "x"], "BTC must be"),
        (["cap", "set", "21000000.00000001", "--why", "x"], "cap: must be at most 21,000,000 BTC"),
        (["cap", "set", "999999999999", "--why", "x"], "cap: must be at most 21,000,000 BTC"),
    ],
    ids=str,
)
async def test_what_cannot_be_done_is_one_line_and_changes_nothing(desk: Desk, arguments: list[str], said: str) -> None:
    result = await desk.run(*arguments)
    assert result.exit_code == 2
    assert said in result.output
    assert len(result.output.splitlines()) == 1
    assert await desk.rows("SELECT count(*) FROM audit") == [(1,)]


async def test_a_client_s_cap_is_not_less_than_it_has_bought(desk: Desk) -> None:
    await run(desk.dsn, "UPDATE clients SET placed_satoshi = 100000000 WHERE name = 'shop'")
    result = await desk.run("clients", "limit", "shop", "--cap", "0.5", "--why", "less")
    assert result.output == "buydesk: The client has bought more than its cap would be.\n"


async def test_the_cap_is_set_and_gives_room_back_when_it_counts_open_orders_only(desk: Desk) -> None:
    assert await desk.told("cap", "show") == "0.00000000 of 100.00000000 BTC are sold, counting stored orders.\n"
    told = await desk.told("cap", "set", "0.001", "--why", "a small desk")
    assert told == "0.00000000 of 0.00100000 BTC are sold, counting stored orders.\n"
    price, ledger = record(10_000 * 10**8), PostgresLedger(as_db_proxy(desk.dsn), settings(), livemode=False)
    orders = [priced_order(1000, price=price), priced_order(1000, price=price)]  # 10.00 each, which buy 0.001 BTC
    first, second = await ledger.place(orders, 5)
    assert isinstance(first, Placed)
    assert isinstance(second, Refused)
    assert second.problem.code == "exposure_cap_exceeded"
    life = PostgresLife(ledger)
    await life.close_orders([Closing(first.order.id, "settled", None)])
    assert isinstance((await ledger.place(orders[1:], 5))[0], Refused)
    told = await desk.told("cap", "counts", "open", "--why", "what is settled is delivered")
    assert told == "0.00000000 of 0.00100000 BTC are sold, counting open orders.\n"
    assert isinstance((await ledger.place(orders[1:], 5))[0], Placed)
    await ledger.close()
    for arguments in (("counts", "stored"), ("set", "0.0009")):
        result = await desk.run("cap", *arguments, "--why", "back")
        assert result.output == "buydesk: More is sold already than the cap would be.\n"
    assert await desk.told("cap", "show") == "0.00100000 of 0.00100000 BTC are sold, counting open orders.\n"
    acts = await desk.rows("SELECT act, subject, before, after FROM audit WHERE number > 1 ORDER BY number")
    assert acts == [
        ("cap set", "desk", state("10000000000", "false"), state("100000", "false")),
        ("cap counts set", "desk", state("100000", "false"), state("100000", "true")),
    ]


def state(cap_satoshi: str, counts_open: str) -> str:
    return f'{{"cap_satoshi" : {cap_satoshi}, "cap_counts_open" : {counts_open}, "paused" : false}}'


async def test_a_client_s_cap_counts_what_it_is_told(desk: Desk) -> None:
    told = await desk.told("cap", "counts", "open", "--client", "shop", "--why", "as agreed")
    assert told == "The cap of the client shop counts open orders.\n"
    assert re.search(r"^shop .* 1\.50000000  open +0\.25000000 ", await desk.told("clients", "list"), re.MULTILINE)
    [(act, subject)] = await desk.rows("SELECT act, subject FROM audit WHERE number = 2")
    assert (act, subject) == ("cap counts set", "shop")
    result = await desk.run("cap", "counts", "open", "--client", "nobody", "--why", "x")
    assert result.output == "buydesk: There is no client nobody.\n"


async def test_only_the_owner_of_the_database_acts(desk: Desk) -> None:
    for arguments in (
        ("clients", "create", "x"),
        tuple(CREATE),
        ("keys", "revoke", "0" * 10, "--why", "x"),
        ("cap", "set", "1", "--why", "x"),
    ):
        result = await desk.run(*arguments, DATABASE_URL=as_db_proxy(desk.dsn))
        assert result.exit_code == 2
    told = "buydesk: the account in DATABASE_URL may not do this: use that of the database's owner\n"
    assert (await desk.run(*CREATE, DATABASE_URL=as_db_proxy(desk.dsn))).output == told


async def test_a_database_that_cannot_be_used_is_told_without_its_address(desk: Desk) -> None:
    nowhere = "postgresql://u:hunter2@127.0.0.1:1/x"
    result = await desk.run("clients", "list", DATABASE_URL=nowhere)
    assert result.output == "buydesk: cannot use the database (ConnectionRefusedError): check it and its server\n"
    await run(desk.dsn, "ALTER TABLE keys RENAME TO keys_of_before")
    result = await desk.run("keys", "list")
    assert result.output == "buydesk: the database is of an older version: run `buydesk migrate`\n"
    await run(desk.dsn, "ALTER TABLE keys_of_before RENAME TO keys")


async def test_the_database_in_a_data_directory_is_started_for_the_command_unless_it_runs(open_directory: Path) -> None:
    data_dir = open_directory / "down"
    data_dir.mkdir(mode=0o711)
    postgres = EmbeddedPostgres(data_dir)
    desk, options = Desk(""), ("--data-dir", str(data_dir))
    await postgres.start()
    try:
        await migrate(postgres.dsn, livemode=False, cap_satoshi=1)
        await desk.told("clients", "create", "one", *options)
    finally:
        await postgres.stop()
    await desk.told("clients", "create", "two", *options)
    assert [line.split()[0] for line in (await desk.told("clients", "list", *options)).splitlines()[1:]] == [
        *("anonymous", "one", "two")
    ]
    with pytest.raises(OSError, match="No such file"):
        await asyncpg.connect(postgres.dsn)


async def test_a_key_for_operators_is_kept_until_the_database_does_not_take_it(desk: Desk, tmp_path: Path) -> None:
    file = tmp_path / "operator-key"
    await keep_operator_key(desk.dsn, file)
    text = file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600
    [(key_id, client, scopes)] = await desk.rows("SELECT id, client, scopes FROM keys")
    assert (key_id, client, sorted(scopes)) == (parse_key_text(text).id, "operator", sorted(SCOPES))
    await keep_operator_key(desk.dsn, file)
    assert file.read_text() == text
    await desk.told("keys", "revoke", key_id, "--why", "lost")
    await keep_operator_key(desk.dsn, file)
    assert file.read_text() != text
    counted = "SELECT count(*), count(revoked_at) FROM keys WHERE client = 'operator'"
    assert await desk.rows(counted) == [(2, 1)]
    for gone, total in (("not a key", 3), ("", 4)):  # then the one that was kept is of no use to whoever has it
        file.write_text(gone)
        await keep_operator_key(desk.dsn, file)
        assert await desk.rows(counted) == [(total, total - 1)]


async def test_a_key_for_operators_lets_no_client_in(databases: Databases, tmp_path: Path) -> None:
    dsn = await databases.new()
    await keep_operator_key(dsn, tmp_path / "operator-key")
    ledger = PostgresLedger(as_db_proxy(dsn), settings(), livemode=False)
    with pytest.raises(CannotStart, match="there is no key"):
        await PostgresKeys(ledger).require_any()
    await ledger.close()


async def test_a_data_directory_without_a_desk_is_told(desk: Desk, tmp_path: Path) -> None:
    result = await desk.run("clients", "list", "--data-dir", str(tmp_path / "none"), DATABASE_URL="")
    assert result.output == (
        f"buydesk: no desk has been started in {tmp_path / 'none'}: use its --data-dir, or set DATABASE_URL\n"
    )


async def test_no_hand_that_writes_sql_acts_unnoticed_in_one_transaction(databases: Databases) -> None:
    dsn = await databases.new()
    with pytest.raises(CannotStart, match="There is no client"):
        async with operating(dsn) as own:
            await own.change(LimitClient("nobody", Limits()), "")
    connection = await asyncpg.connect(dsn)
    with pytest.raises(asyncpg.UniqueViolationError):
        await connection.execute("SELECT create_client('a', 'b', 'c', 'anonymous', '{}')")
    assert await connection.fetchval("SELECT count(*) FROM audit") == 0
    await connection.close()


async def test_an_act_that_has_to_wait_gives_up_and_leaves_orders_alone(desk: Desk) -> None:
    owner = await asyncpg.connect(desk.dsn)
    async with owner.transaction():
        await owner.execute("LOCK audit IN SHARE ROW EXCLUSIVE MODE")
        pausing = asyncio.create_task(desk.run("pause", "--why", "a fork"))
        await asyncio.sleep(0.5)
        ledger = PostgresLedger(as_db_proxy(desk.dsn), settings(), livemode=False)
        assert isinstance((await ledger.place([priced_order()], 5))[0], Placed)  # it holds nothing while it waits
        result = await pausing
        assert (result.exit_code, result.output.count("\n")) == (2, 1)
        assert "the database failed meanwhile (LockNotAvailableError)" in result.output
    assert isinstance((await ledger.place([priced_order()], 5))[0], Placed)
    await ledger.close()
    await owner.close()


async def test_a_database_that_fails_meanwhile_is_told(databases: Databases) -> None:
    dsn = await databases.new()
    other = await asyncpg.connect(dsn)

    async def cut_off() -> None:
        async with operating(dsn) as own:
            await other.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
            await own.registry.clients("", 10)

    with pytest.raises(CannotStart, match=r"the database failed meanwhile \(.+\): `buydesk audit` shows"):
        await cut_off()
    await other.close()


async def test_a_server_in_the_data_directory_that_takes_nobody_is_told(open_directory: Path) -> None:
    data_dir = open_directory / "full"
    data_dir.mkdir(mode=0o711)
    postgres = EmbeddedPostgres(data_dir)
    await postgres.start()
    try:
        await migrate(postgres.dsn, livemode=False, cap_satoshi=1)
        await run(postgres.dsn.replace("/buydesk?", "/postgres?"), "ALTER DATABASE buydesk ALLOW_CONNECTIONS false")
        result = await Desk("").run("clients", "list", "--data-dir", str(data_dir))
        assert (result.exit_code, result.exception.__class__) == (2, SystemExit)
        assert re.fullmatch(r"buydesk: cannot use the database \(\w+\): check it and its server\n", result.output)
    finally:
        await postgres.stop()
