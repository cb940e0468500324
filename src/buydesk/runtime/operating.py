"""What the command `price` prints: the last prices, and what operators confirm."""

from buydesk.clients.registry import confirm_price
from buydesk.money import format_rate
from buydesk.prices.anchors import Confirmation, NewConfirmation
from buydesk.runtime.registry import desk_of
from buydesk.settings.model import Settings
from buydesk.times import format_time


async def confirm(settings: Settings, new: NewConfirmation) -> str:
    """Confirms a price; returns what was confirmed, and until when. Raises CannotStart when it was not."""
    async with desk_of(settings) as desk:
        return f"Confirmed: {_line(await confirm_price(desk.registry, new, desk.by))}"


async def last_prices(settings: Settings) -> str:
    """The last price of each currency and the confirmations that hold, as lines. Raises CannotStart."""
    async with desk_of(settings) as desk:
        anchors, confirmations = await desk.anchors.anchors(), await desk.anchors.confirmations()
    lines = [
        f"{currency} {format_rate(anchor.rate_e8)}, the price of {format_time(anchor.as_of)}"
        for currency, anchor in sorted(anchors.items())
    ]
    lines = lines or ["There is no last price yet."]
    return "\n".join([*lines, *(f"Confirmed: {_line(each)}" for each in confirmations)])


def _line(confirmation: Confirmation) -> str:
    rates = f"{format_rate(confirmation.low_e8)} to {format_rate(confirmation.high_e8)}"
    return f"{confirmation.currency} {rates} until {format_time(confirmation.expires_at)} ({confirmation.why})"
