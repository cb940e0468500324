"""The command `buydesk`. Whatever keeps it from starting is one line on stderr and exit code 2."""

import click

from buydesk import __version__, signing_keys
from buydesk.cli.clients import audit, cap, clients, keys, pause, resume
from buydesk.cli.developing import listen, trigger
from buydesk.cli.shared import Commands, Live, desk_settings, given, of_a_desk
from buydesk.cli.shared import run as run_async
from buydesk.errors import CannotStart
from buydesk.money import parse_btc, parse_currency, parse_rate
from buydesk.observability import logs
from buydesk.observability.sentry import require_sentry
from buydesk.prices.anchors import CONFIRMED_MINUTES_MAX, NewConfirmation
from buydesk.settings.model import Settings, variable
from buydesk.settings.reading import read_settings, require_secrets
from buydesk.settings.secrets import KEY_PAIRS, SECRET_KEYS, TOKENS, new_token
from buydesk.settings.types import SANDBOX_FAULTS
from buydesk.topology import PORTS

# `up` and `serve` import what they need when they are called: `buydesk --help` answers at once, and the SQLAlchemy that
# `migrate` loads stays out of the services' memory.

Fault = click.Choice(SANDBOX_FAULTS)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="buydesk")
def main() -> None:
    """A bitcoin buy-order desk: never a duplicate, never over the cap, never an unproven price.

    \b
    buydesk up                    a whole desk on this machine, nothing else needed (sandbox prices)
    buydesk up --separate         the same, each service a supervised process of its own
    buydesk serve db_proxy        one service, set up by its environment, for containers
    buydesk migrate               bring the database at DATABASE_URL up to date
    buydesk secrets               new ones, for services to share
    buydesk clients create shop   a client; `buydesk keys create shop …` makes a key for it
    buydesk cap counts open …     give the room of settled and cancelled orders back
    buydesk pause --why …         place nothing new, until `buydesk resume`
    buydesk audit                 what operators did
    buydesk price show            the last prices that were sold at, and what is confirmed
    buydesk price confirm EUR …   sell at a price that is far from the last one
    buydesk listen                show a client's events as they happen, and forward them to a program
    buydesk trigger EVENT         make an event in a sandbox

    Every setting is an environment variable: `buydesk serve --help` lists them.
    """


@main.command()
@click.option("--data-dir", type=click.Path(), help="Where everything is kept.  [default: ./data, or ./data-live]")
@click.option("--port-offset", type=int, help="Shift all ports, so that several desks run side by side.")
@click.option("--host", help="The address to listen on.  [default: 127.0.0.1]")
@click.option("--feed", "price_feed", type=Live, help="Recorded prices, or the exchanges'.  [default: sandbox]")
@click.option("--replay-speed", type=float, help="How fast the sandbox's recorded time runs.  [default: 1]")
@click.option("--sandbox-fault", type=Fault, help="Let the sandbox's price sources misbehave, to see what happens.")
@click.option("--separate", is_flag=True, help="Each service in a process of its own, started again when it dies.")
def up(separate: bool, **given: object) -> None:
    """Run a whole desk: PostgreSQL (embedded, unless DATABASE_URL is set), migrations and all eight services.

    Ctrl-C or SIGTERM stops it, after finishing what was accepted. Its orders are there at the next start.
    """
    settings = read_settings(**{name: value for name, value in given.items() if value is not None})
    require_sentry(settings)
    from buydesk.runtime.up import up as run  # noqa: PLC0415

    logs.configure(settings.log_level)
    run_async(run(settings, separate=separate, say=click.echo))


def _settings_help() -> str:
    lines = ["\b", "Settings (environment variables):"]
    for name, field in Settings.model_fields.items():
        has_plain_default = field.default not in (None, "", ()) and field.default_factory is None
        lines.append(f"  {variable(name)}: {field.description}" + (f"  [{field.default}]" if has_plain_default else ""))
    return "\n".join(lines)


@main.command(epilog=_settings_help())
@click.argument("service", type=click.Choice(sorted(PORTS)))
def serve(service: str) -> None:
    """Run one SERVICE, set up by environment variables only."""
    settings = read_settings()
    require_secrets(settings, service)
    require_sentry(settings)
    from buydesk.runtime.serve import serve as run  # noqa: PLC0415

    logs.configure(settings.log_level)
    run_async(run(settings, service))


@main.command()
@click.option("--cap", "cap_text", default="100", show_default=True, help="BTC that a new database may sell in all.")
@click.option("--wait", "wait_seconds", default=0.0, show_default=True, help="Seconds to wait for the database.")
def migrate(cap_text: str, wait_seconds: float) -> None:
    """Bring the database at DATABASE_URL up to date; of a new one, set mode (PRICE_FEED) and cap.

    An existing database keeps its cap and its mode. Keys of prices (BUYDESK_PRICE_KEYS) are added, and the account of
    db_proxy (BUYDESK_DB_PROXY_DATABASE_URL) gets its password and its rights.
    """
    settings = read_settings()
    if settings.database_url is None:
        raise CannotStart("DATABASE_URL is missing: say which database to migrate")
    cap_satoshi = given("--cap", parse_btc, cap_text)
    from buydesk.backends.postgres.accounts import account_of  # noqa: PLC0415
    from buydesk.backends.postgres.migrate import migrate as run  # noqa: PLC0415

    own_url = settings.db_proxy_database_url
    migrating = run(
        settings.database_url.get_secret_value(),
        livemode=settings.price_feed == "live",
        cap_satoshi=cap_satoshi,
        price_keys=settings.price_keys,
        account=None if own_url is None else account_of(own_url.get_secret_value()),
        wait_seconds=wait_seconds,
    )
    run_async(migrating)
    click.echo("The database is up to date.")


@main.command("secrets")
def new_secrets() -> None:
    """Show new secrets for services to share, as variables: tokens, and the keys that prices and quotes are signed
    with and secrets of webhooks derived from."""
    made = {name: new_token() for name in TOKENS}
    made |= {name: signing_keys.new_signing_key() for name in SECRET_KEYS}
    made |= {public_keys: signing_keys.public_key(made[name]) for name, public_keys in KEY_PAIRS.items()}
    for name, value in made.items():
        click.echo(f"{variable(name)}={value}")


@main.group()
def price() -> None:
    """See the last prices of a desk, and confirm one that it holds back. Works as `clients` does."""


@price.command()
@of_a_desk
def show(**desk: object) -> None:
    """Show the last price of each currency, and the confirmations that hold."""
    from buydesk.runtime.operating import last_prices  # noqa: PLC0415

    click.echo(run_async(last_prices(desk_settings(desk))))


@price.command()
@click.argument("currency")
@click.option("--from", "low", required=True, metavar="RATE", help="The least that a bitcoin may cost.")
@click.option("--to", "high", required=True, metavar="RATE", help="The most that it may cost.")
@click.option("--why", required=True, help="How you know; kept for ever.")
@click.option("--minutes", default=CONFIRMED_MINUTES_MAX, show_default=True, help="How long it holds; 15 at the most.")
@of_a_desk
def confirm(currency: str, low: str, high: str, why: str, minutes: int, **desk: object) -> None:
    """Let the desk sell at prices from RATE to RATE of CURRENCY, however far from the last one.

    The price itself comes from the sources all the same, and has to fulfil every other rule.
    """
    new = NewConfirmation(
        currency=given("CURRENCY", parse_currency, currency),
        low_e8=given("--from", parse_rate, low),
        high_e8=given("--to", parse_rate, high),
        why=why,
        minutes=minutes,
    )
    from buydesk.runtime.operating import confirm as run  # noqa: PLC0415

    click.echo(run_async(run(desk_settings(desk), new)))


for command in (clients, cap, pause, resume, keys, audit, listen, trigger):
    main.add_command(command)
