"""The commands of operators: who may call and buy how much, whether anything is sold, and what operators did."""

import functools
import re
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import click

from buydesk.cli.shared import desk_settings, given, of_a_desk, run
from buydesk.clients.keys import Key
from buydesk.clients.model import NewKey
from buydesk.clients.rates import PER_MINUTE_MAX
from buydesk.clients.registry import Limits, parse_network, parse_scope
from buydesk.errors import CannotStart
from buydesk.money import parse_amount, parse_btc, parse_currency, parse_markup
from buydesk.prices.anchors import WHY_CHARS_MAX
from buydesk.reading import parse_line
from buydesk.settings.types import QUOTE_SECONDS_MAX, QUOTE_SECONDS_MIN
from buydesk.times import utc_now

_UNITS = {"m": "minutes", "h": "hours", "d": "days"}
_RATE = re.compile(r"([0-9]{1,9})(?:/minute)?", re.ASCII)
_LASTS = re.compile(r"([1-9][0-9]{0,4})([mhd])", re.ASCII)


def _lasting(text: str) -> timedelta:
    found = _LASTS.fullmatch(text)
    if found is None:
        raise ValueError("must be a time such as 90d, 24h or 15m")
    return timedelta(**{_UNITS[found[2]]: int(found[1])})


def _scopes(text: str) -> list[str]:
    return sorted(map(parse_scope, set(text.split(","))))


def _rate(text: str) -> int:
    number = _RATE.fullmatch(text)
    if number is None or not 1 <= int(number[1]) <= PER_MINUTE_MAX:
        raise ValueError(f"must be a number of requests a minute from 1 to {PER_MINUTE_MAX}, such as 60/minute")
    return int(number[1])


def _quote_seconds(text: str) -> int:
    if not text.isdecimal() or not QUOTE_SECONDS_MIN <= int(text[:9]) <= QUOTE_SECONDS_MAX:
        raise ValueError(f"must be a number of seconds from {QUOTE_SECONDS_MIN} to {QUOTE_SECONDS_MAX}")
    return int(text)


def _reason(_: click.Context, __: click.Parameter, text: str | None) -> str:
    return "" if text is None else given("--why", lambda why: parse_line(why, WHY_CHARS_MAX), text)


_why = click.option("--why", callback=_reason, help="Kept for ever.")
_WHY = click.option("--why", callback=_reason, required=True, help="Kept for ever.")


@click.group()
def clients() -> None:
    """Clients: who may have orders, and their limits.

    Works in the desk's database: at DATABASE_URL, or in the data directory, whether the desk runs or not.
    """


def _limits(command: Callable[..., None]) -> Callable[..., None]:
    """The options for a client's limits, which the command gets as `limits`."""

    @functools.wraps(command)
    def with_limits(
        *arguments: object,
        cap: str | None,
        largest: str | None,
        daily: Sequence[str],
        markup: Sequence[str],
        rate: str | None,
        quote_seconds: str | None,
        **options: object,
    ) -> None:
        limits = _limits_of(
            cap=cap, largest=largest, daily=daily, markup=markup, rate=rate, quote_seconds=quote_seconds
        )
        command(*arguments, limits=limits, **options)

    with_option: Callable[..., None] = with_limits
    for option in (
        click.option("--quote-seconds", metavar="N", help="How long quotes may be valid.  [default: the desk's]"),
        click.option("--rate", metavar="N", help="Orders, reads, and look-ups a minute, each.  [default: the desk's]"),
        click.option(
            "--markup", multiple=True, metavar="EUR:75", help="On the market's rate, in 0.01 %.  [default: the desk's]"
        ),
        click.option("--daily", multiple=True, metavar="EUR:1000.00", help="What it may buy on a day of UTC."),
        click.option("--largest", metavar="BTC", help="The largest order."),
        click.option("--cap", metavar="BTC", help="All that it may buy."),
    ):
        with_option = option(with_option)
    return with_option


def _limits_of(
    *,
    cap: str | None,
    largest: str | None,
    daily: Sequence[str],
    markup: Sequence[str],
    rate: str | None,
    quote_seconds: str | None,
) -> Limits:
    """The limits that are given; `none` takes one away."""
    limits: dict[str, Any] = {}
    for limit, option, parse, text in (
        ("cap_satoshi", "--cap", parse_btc, cap),
        ("order_satoshi_max", "--largest", parse_btc, largest),
        ("rate_per_minute", "--rate", _rate, rate),
        ("quote_seconds_max", "--quote-seconds", _quote_seconds, quote_seconds),
    ):
        if text is not None:
            limits[limit] = None if text == "none" else given(option, parse, text)
    for limit, option, parse, texts in (
        ("daily_cents_max", "--daily", parse_amount, daily),
        ("markup_bp", "--markup", parse_markup, markup),
    ):
        for each in texts:
            currency, _, text = each.partition(":")
            value = None if text == "none" else given(option, parse, text)
            limits.setdefault(limit, {})[given(option, parse_currency, currency)] = value
    return Limits(**limits)


@clients.command("create")
@click.argument("name")
@_limits
@_why
@of_a_desk
def create_client(name: str, *, limits: Limits, why: str, **desk: object) -> None:
    """Make the client NAME. It has the limits that are given, and no others."""
    from buydesk.runtime import clients as acts  # noqa: PLC0415

    click.echo(run(acts.create_client(desk_settings(desk), name, limits, why)))


@clients.command("limit")
@click.argument("name")
@_limits
@_WHY
@of_a_desk
def limit_client(name: str, *, limits: Limits, why: str, **desk: object) -> None:
    """Change these limits of the client NAME; the others stay. `none` takes one away, as in `--daily EUR:none`."""
    from buydesk.runtime import clients as acts  # noqa: PLC0415

    if limits == Limits():
        raise CannotStart("nothing to change: give --cap, --largest, --daily, --markup, --rate or --quote-seconds")
    click.echo(run(acts.limit_client(desk_settings(desk), name, limits, why)))


@clients.command("list")
@of_a_desk
def list_clients(**desk: object) -> None:
    """Show all clients."""
    from buydesk.runtime import clients as acts  # noqa: PLC0415

    click.echo(run(acts.clients(desk_settings(desk))))


@click.group()
def cap() -> None:
    """The desk's cap: what may be sold in all, and which orders count. Works as `clients` does."""


@cap.command("show")
@of_a_desk
def show_cap(**desk: object) -> None:
    """Show the cap, and what is used of it."""
    from buydesk.runtime import clients as acts  # noqa: PLC0415

    click.echo(run(acts.desk_cap(desk_settings(desk))))


@cap.command("set")
@click.argument("btc")
@_WHY
@of_a_desk
def set_cap(btc: str, why: str, **desk: object) -> None:
    """Let the desk sell BTC in all; not less than it has sold."""
    from buydesk.runtime import clients as acts  # noqa: PLC0415

    click.echo(run(acts.set_cap(desk_settings(desk), given("BTC", parse_btc, btc), why)))


@cap.command("counts")
@click.argument("orders", type=click.Choice(["open", "stored"]))
@click.option("--client", help="Of the cap of this client.  [default: of the desk's]")
@_WHY
@of_a_desk
def set_cap_counts(orders: str, client: str | None, why: str, **desk: object) -> None:
    """Count open orders only, so that one that is settled or cancelled gives its room back, or all that were ever
    stored."""
    from buydesk.runtime import clients as acts  # noqa: PLC0415

    click.echo(run(acts.set_cap_counts(desk_settings(desk), client, why, open_only=orders == "open")))


@click.command()
@_WHY
@of_a_desk
def pause(why: str, **desk: object) -> None:
    """Place nothing new, on every service at once; repeats are answered. Works as `clients` does."""
    from buydesk.runtime import clients as acts  # noqa: PLC0415

    click.echo(run(acts.pause(desk_settings(desk), why)))


@click.command()
@_WHY
@of_a_desk
def resume(why: str, **desk: object) -> None:
    """Place orders again."""
    from buydesk.runtime import clients as acts  # noqa: PLC0415

    click.echo(run(acts.resume(desk_settings(desk), why)))


@click.group()
def keys() -> None:
    """Keys, by which clients are known. Works as `clients` does."""


def _show(key: Key) -> None:
    """The key on stdout, alone, so that a program can take it; what there is to say of it on stderr."""
    click.echo(f"The key {key.id}, which is not shown again:", err=True)
    click.echo(key.text)


@keys.command("create")
@click.argument("client")
@click.option("--scopes", required=True, help="What it permits, separated by commas.")
@click.option("--expires", metavar="90d", help="When it ends, from now.  [default: never]")
@click.option("--allow-from", multiple=True, metavar="CIDR", help="Where it may be used.  [default: everywhere]")
@click.option("--rate", metavar="N", help="Orders, reads, and look-ups a minute, each, beside its client's limit.")
@_why
@of_a_desk
def create_key(
    client: str, *, scopes: str, why: str, expires: str | None, allow_from: Sequence[str], rate: str | None, **desk: Any
) -> None:
    """Make a key for CLIENT, and show it, once."""
    from buydesk.runtime import clients as acts  # noqa: PLC0415

    new = NewKey(
        client,
        given("--scopes", _scopes, scopes),
        [given("--allow-from", parse_network, each) for each in allow_from],
        None if expires is None else utc_now() + given("--expires", _lasting, expires),
        None if rate is None else given("--rate", _rate, rate),
    )
    _show(run(acts.create_key(desk_settings(desk), new, why)))


@keys.command("list")
@click.argument("client", required=False)
@of_a_desk
def list_keys(client: str | None, **desk: object) -> None:
    """Show the keys of CLIENT, or all: never the keys themselves, which nobody has."""
    from buydesk.runtime import clients as acts  # noqa: PLC0415

    click.echo(run(acts.keys(desk_settings(desk), client)))


@keys.command("revoke")
@click.argument("key_id", metavar="ID")
@_WHY
@of_a_desk
def revoke_key(key_id: str, why: str, **desk: object) -> None:
    """End the key with this ID now."""
    from buydesk.runtime import clients as acts  # noqa: PLC0415

    click.echo(run(acts.revoke_key(desk_settings(desk), key_id, why)))


@keys.command("rotate")
@click.argument("key_id", metavar="ID")
@click.option("--overlap", default="24h", show_default=True, help="How long the old one is taken beside the new one.")
@_why
@of_a_desk
def rotate_key(key_id: str, overlap: str, why: str, **desk: object) -> None:
    """Make a key that permits the same as that with this ID, show it, once, and end the old one later."""
    from buydesk.runtime import clients as acts  # noqa: PLC0415

    _show(run(acts.rotate_key(desk_settings(desk), key_id, given("--overlap", _lasting, overlap), why)))


@click.command()
@click.option("--limit", default=20, show_default=True, help="At most so many, the last ones.")
@of_a_desk
def audit(limit: int, **desk: object) -> None:
    """Show what operators did, once it is sure that the record was not changed."""
    from buydesk.runtime import clients as acts  # noqa: PLC0415

    if limit < 1:
        raise CannotStart("--limit must be at least 1")
    click.echo(run(acts.audit(desk_settings(desk), limit)))
