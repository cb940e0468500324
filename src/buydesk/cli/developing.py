"""The commands for those who develop against a desk."""

from pathlib import Path

import click

from buydesk import hosts
from buydesk.cli.shared import desk_settings, given, of_a_desk, run
from buydesk.errors import CannotStart
from buydesk.events.model import EVENT_TYPES

_key = click.option(
    "--key-file", type=click.Path(path_type=Path), help="Holds the client's key; without it, a desk that is open."
)


def _key_in(file: Path | None) -> str | None:
    try:
        return None if file is None else file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CannotStart(f"--key-file: {file} cannot be read") from error


def _program(text: str) -> str:
    if not hosts.is_http_url(text):
        raise ValueError("must be an http:// or https:// address")
    return text


@click.command()
@click.option("--forward-to", help="A local program, such as http://127.0.0.1:9000/hook, that gets each as a webhook.")
@_key
@of_a_desk
def listen(forward_to: str | None, key_file: Path | None, **desk: object) -> None:
    """Show the events of a client as they happen, and forward them to a program that is being developed.

    Each is posted once, as a webhook would bring it, signed with a secret that is shown at the start. Ctrl-C ends it.
    """
    url = None if forward_to is None else given("--forward-to", _program, forward_to)
    from buydesk.runtime.developing import listen as follow  # noqa: PLC0415

    try:
        run(follow(desk_settings(desk), _key_in(key_file), url, click.echo))
    except KeyboardInterrupt:
        click.echo("Stopped.")


@click.command()
@click.argument("event", type=click.Choice(EVENT_TYPES))
@_key
@of_a_desk
def trigger(event: str, key_file: Path | None, **desk: object) -> None:
    """Make an EVENT in a sandbox that is up: an order of 1.00 EUR is placed and, if need be, settled or cancelled."""
    from buydesk.runtime.developing import trigger as make  # noqa: PLC0415

    click.echo(run(make(desk_settings(desk), _key_in(key_file), event)))
