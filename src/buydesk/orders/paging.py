"""Pages of a ledger, read and written so that no order has to wait for them: large ones two at a time, in slices."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import TypeVar

from buydesk.limits import SLICE_ITEMS, Bulkhead, in_slices
from buydesk.orders.model import Anchor, Order, OrderLedger, Page
from buydesk.settings.model import Settings

# One is read while the other is written.
_LARGE_PAGES_AT_ONCE = 2

T = TypeVar("T")


class PageReader:
    """Reads pages of one ledger for one service."""

    def __init__(self, ledger: OrderLedger, settings: Settings) -> None:
        self._ledger = ledger
        self._large = Bulkhead(_LARGE_PAGES_AT_ONCE, settings.reads_waiting_max, settings.read_wait_seconds_max)

    async def read(
        self, client: str | None, anchor: Anchor, page_size: int, document: Callable[[Order], T]
    ) -> tuple[Page, list[T]]:
        """The page, of a client or of the desk, and the document of each of its orders; raises Overloaded,
        LedgerUnavailable."""
        async with self._large if page_size > SLICE_ITEMS else nullcontext():
            page = await self._ledger.page(client, anchor, page_size)
            return page, await in_slices(document, page.orders)
