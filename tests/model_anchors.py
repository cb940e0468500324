"""The model of where anchors are kept: plainly right, and nothing more."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from msgspec.structs import replace

from buydesk.money import Currency
from buydesk.prices.anchors import CONFIRMATIONS_MAX, Anchor, Confirmation, NewConfirmation, require_confirmable
from buydesk.times import utc_now


@dataclass
class ModelAnchors:
    """AnchorStore as one would explain it."""

    kept: dict[Currency, Anchor] = field(default_factory=dict)
    confirmed: list[Confirmation] = field(default_factory=list)
    now: Callable[[], datetime] = utc_now

    async def anchors(self) -> Mapping[Currency, Anchor]:
        return dict(self.kept)

    async def keep_anchors(self, anchors: Mapping[Currency, Anchor]) -> None:
        for currency, given in anchors.items():
            anchor = replace(given, as_of=min(given.as_of, self.now()))
            kept = self.kept.get(currency)
            if kept is None or kept.as_of < anchor.as_of or kept.as_of > self.now():
                self.kept[currency] = anchor

    async def confirmations(self) -> Sequence[Confirmation]:
        still = [each for each in self.confirmed if each.expires_at > self.now()]
        return sorted(still, key=lambda each: each.expires_at, reverse=True)[:CONFIRMATIONS_MAX]

    async def confirm(self, new: NewConfirmation) -> Confirmation:
        require_confirmable(new)
        ends_at = self.now() + timedelta(minutes=new.minutes)
        self.confirmed.append(Confirmation(new.currency, new.low_e8, new.high_e8, new.why, ends_at))
        return self.confirmed[-1]

    async def close(self) -> None:
        pass
