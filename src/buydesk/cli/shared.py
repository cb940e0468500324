"""What commands share: how they are run, and the options that say which desk is meant."""

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar

import click

from buydesk.errors import CannotStart
from buydesk.money import NotMoney
from buydesk.observability import logs
from buydesk.settings.model import Settings
from buydesk.settings.reading import read_settings

T = TypeVar("T")
Live = click.Choice(["sandbox", "live"])


class Commands(click.Group):
    """Turns what keeps a command from starting into one line."""

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command; exits with 2 for CannotStart."""
        try:
            return super().invoke(ctx)
        except CannotStart as error:
            click.echo(f"buydesk: {logs.redacted(str(error))}", err=True)
            ctx.exit(2)


def of_a_desk(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say which desk is asked."""
    for option in (
        click.option("--feed", "price_feed", type=Live, help="As it was started with.  [default: sandbox]"),
        click.option("--port-offset", type=int, help="As it was started with."),
        click.option("--data-dir", type=click.Path(), help="Of the desk.  [default: ./data, or ./data-live]"),
    ):
        command = option(command)
    return command


def desk_settings(desk: Mapping[str, object]) -> Settings:
    """The settings, with what those options say on top."""
    return read_settings(**{name: value for name, value in desk.items() if value is not None})


def given(name: str, parse: Callable[[str], T], text: str) -> T:
    """What the text of an option or argument is; raises CannotStart."""
    try:
        return parse(text)
    except (NotMoney, ValueError) as error:
        raise CannotStart(f"{name} {error}") from error


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """What it returns, run in uvloop."""
    import uvloop  # noqa: PLC0415

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(coroutine)
