"""Counts of requests at api_cache_proxy."""

from collections.abc import Sequence
from typing import Any, ClassVar

from buydesk.backends.remote import RemoteService
from buydesk.clients.rates import Count, Lot, RateStore
from buydesk.errors import RatesUnavailable
from buydesk.reading import read


class RemoteRateStore(RemoteService, RateStore):
    """Asked again when a kept connection turns out to be cut: at worst a lot is counted twice, for a minute."""

    service = "api_cache_proxy"
    unavailable = RatesUnavailable
    tokens: ClassVar = {"POST": "counting_tokens"}

    async def take(self, lots: Sequence[Lot]) -> Sequence[Count]:
        def counts(document: Any) -> list[Count]:
            return [read(Count, each) for each, _ in zip(document["data"], lots, strict=True)]

        return await self.ask(counts, "/rates/", body={"lots": lots})
