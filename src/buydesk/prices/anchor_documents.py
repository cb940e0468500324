"""Anchors and confirmations as JSON documents, and back. What is no such document raises WrongMember."""

from collections.abc import Mapping
from typing import Any

import msgspec

from buydesk.money import CURRENCIES, CURRENCIES_TEXT, Currency, format_rate
from buydesk.prices.anchors import Anchor, Confirmation, NewConfirmation
from buydesk.reading import WrongMember, read
from buydesk.times import format_time


def anchors_document(anchors: Mapping[Currency, Anchor]) -> dict[str, dict[str, str]]:
    """The anchors as JSON members, one for each currency."""
    return {
        currency.value: {"rate": format_rate(anchor.rate_e8), "as_of": format_time(anchor.as_of)}
        | ({} if anchor.dollar_e8 is None else {"dollar": format_rate(anchor.dollar_e8)})
        for currency, anchor in anchors.items()
    }


_Anchors = msgspec.defstruct("_Anchors", [(code, Anchor | msgspec.UnsetType, msgspec.UNSET) for code in CURRENCIES])


def anchors_from(document: object) -> dict[Currency, Anchor]:
    """The anchors of a document made by `anchors_document`."""
    found = msgspec.structs.asdict(read(_Anchors, document, "body"))
    for code in read(dict[str, Any], document):
        if code not in CURRENCIES:
            raise WrongMember(code, f"must be one of {CURRENCIES_TEXT}")
    return {CURRENCIES[code]: anchor for code, anchor in found.items() if anchor is not msgspec.UNSET}


def confirmation_document(confirmation: Confirmation) -> dict[str, str]:
    """The confirmation as JSON members."""
    return _range_document(confirmation) | {"expires_at": format_time(confirmation.expires_at)}


def confirmation_from(document: object) -> Confirmation:
    """The confirmation of a document made by `confirmation_document`."""
    return read(Confirmation, document)


def new_confirmation_document(new: NewConfirmation) -> dict[str, str | int]:
    """What is sent to have a price confirmed."""
    return {**_range_document(new), "minutes": new.minutes}


def _range_document(confirmation: NewConfirmation | Confirmation) -> dict[str, str]:
    return {
        "currency": confirmation.currency.value,
        "from": format_rate(confirmation.low_e8),
        "to": format_rate(confirmation.high_e8),
        "why": confirmation.why,
    }
