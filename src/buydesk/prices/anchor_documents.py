"""Anchors as a JSON document, and back."""

from collections.abc import Mapping
from typing import Any

import msgspec

from buydesk.money import CURRENCIES, CURRENCIES_TEXT, Currency
from buydesk.prices.anchors import Anchor
from buydesk.prices.documents import document_of
from buydesk.reading import WrongMember, read


def anchors_document(anchors: Mapping[Currency, Anchor]) -> dict[str, dict[str, Any]]:
    """The anchors as JSON members, one for each currency."""
    return {currency.value: document_of(anchor) for currency, anchor in anchors.items()}


_Anchors = msgspec.defstruct("_Anchors", [(code, Anchor | msgspec.UnsetType, msgspec.UNSET) for code in CURRENCIES])


def anchors_from(document: object) -> dict[Currency, Anchor]:
    """The anchors of a document made by `anchors_document`; raises WrongMember for anything else."""
    found = msgspec.structs.asdict(read(_Anchors, document, "body"))
    for code in read(dict[str, Any], document):
        if code not in CURRENCIES:
            raise WrongMember(code, f"must be one of {CURRENCIES_TEXT}")
    return {CURRENCIES[code]: anchor for code, anchor in found.items() if anchor is not msgspec.UNSET}
