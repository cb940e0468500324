"""Pages as documents: large ones two at a time, whoever else reads."""

import asyncio

import pytest

from buydesk.errors import Overloaded
from buydesk.limits import SLICE_ITEMS
from buydesk.orders.model import Anchor, Page, PageFrom
from buydesk.orders.paging import PageReader
from buydesk.orders.representations import order_document
from tests.builders import priced_order, settings
from tests.model_ledger import ModelLedger


class Ledger(ModelLedger):
    """The model, whose large pages come when `go` is set."""

    go: asyncio.Event
    asked: int = 0

    async def page(self, client: str | None, anchor: Anchor, page_size: int) -> Page:
        if page_size > SLICE_ITEMS:
            self.asked += 1
            await self.go.wait()
        return await super().page(client, anchor, page_size)


async def test_two_large_pages_are_read_at_a_time_and_short_ones_pass_them() -> None:
    ledger = Ledger()
    ledger.go = asyncio.Event()
    await ledger.place([priced_order(100 + each) for each in range(SLICE_ITEMS + 1)], 1)
    pages = PageReader(ledger, settings(reads_waiting_max=3))

    async def read(page_size: int) -> list[int]:
        page, documents = await pages.read(None, PageFrom(0), page_size, order_document)
        assert documents == [order_document(order) for order in page.orders]
        return [document.number for document in documents]

    readers = [asyncio.create_task(read(SLICE_ITEMS + 1)) for _ in range(5)]
    await asyncio.sleep(0)
    assert ledger.asked == 2
    assert await read(SLICE_ITEMS) == list(range(SLICE_ITEMS + 1, 1, -1))
    with pytest.raises(Overloaded):
        await read(SLICE_ITEMS + 1)
    ledger.go.set()
    assert await asyncio.gather(*readers) == [list(range(SLICE_ITEMS + 1, 0, -1))] * 5
