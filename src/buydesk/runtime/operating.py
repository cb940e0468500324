"""What an operator asks a desk that runs: its last prices, and to sell at a price that it holds back."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from pydantic import SecretStr

from buydesk.backends.remote import RemoteAnchorStore
from buydesk.embedded.data_dir import default_data_dir, secret_file
from buydesk.errors import CannotStart, DeskError, InvalidRequest
from buydesk.money import format_rate
from buydesk.prices.anchors import Confirmation, NewConfirmation
from buydesk.settings.model import Settings, variable
from buydesk.times import format_time

_TOKENS = "publishing_tokens"


def with_kept_token(settings: Settings) -> Settings:
    """The settings, with the token of the desk that `up` runs in the data directory unless there is one in them.

    Raises CannotStart when there is none, or when it is not this account's to read.
    """
    if _TOKENS in settings.model_fields_set:
        return settings
    is_live = settings.price_feed == "live"
    file = secret_file(settings.data_dir or default_data_dir(settings.port_offset, is_live=is_live), _TOKENS)
    return settings.model_copy(update={_TOKENS: SecretStr(_token(file.resolve()))})


def _token(file: Path) -> str:
    try:
        return file.read_text().strip()
    except FileNotFoundError:
        where = f"no desk has been started in {file.parent}: use its --data-dir"
        raise CannotStart(f"{where}, or set {variable(_TOKENS)}") from None
    except OSError as error:
        raise CannotStart(f"cannot read {file}: {error.strerror}; run this as whoever runs the desk") from error


async def confirm(settings: Settings, new: NewConfirmation) -> str:
    """Confirms a price; returns what was confirmed, and until when. Raises CannotStart when it was not."""
    async with _anchor_store(settings) as store:
        return f"Confirmed: {_line(await store.confirm(new))}"


async def last_prices(settings: Settings) -> str:
    """The last price of each currency and the confirmations that hold, as lines. Raises CannotStart."""
    async with _anchor_store(settings) as store:
        anchors, confirmations = await store.anchors(), await store.confirmations()
    lines = [
        f"{currency} {format_rate(anchor.rate_e8)}, the price of {format_time(anchor.as_of)}"
        for currency, anchor in sorted(anchors.items())
    ]
    lines = lines or ["There is no last price yet."]
    return "\n".join([*lines, *(f"Confirmed: {_line(each)}" for each in confirmations)])


@contextlib.asynccontextmanager
async def _anchor_store(settings: Settings) -> AsyncIterator[RemoteAnchorStore]:
    """The desk's, while entered; what it refuses becomes a CannotStart."""
    url = settings.url("db_proxy")
    store = RemoteAnchorStore(url, settings)
    try:
        yield store
    except InvalidRequest as error:
        raise CannotStart(error.detail) from error
    except DeskError as error:
        raise CannotStart(f"{error.detail} It was asked at {url}.") from error
    finally:
        await store.close()


def _line(confirmation: Confirmation) -> str:
    rates = f"{format_rate(confirmation.low_e8)} to {format_rate(confirmation.high_e8)}"
    return f"{confirmation.currency} {rates} until {format_time(confirmation.expires_at)} ({confirmation.why})"
