"""Somebody who buys from a desk and looks at its prices, over HTTP; and desks whose prices grow old fast."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import httpx2

from buydesk.orders.documents import order_from
from buydesk.orders.model import ANONYMOUS, REPRESENTATION
from buydesk.prices.documents import record_from
from tests.desks import Running
from tests.exchanges import MIDS
from tests.proof import discrepancies

SECONDS_MAX = 60.0
# Only faster than in real life: nothing else is changed.
QUICK = {
    "BUYDESK_FEED_INTERVAL_SECONDS": "0.4",
    "BUYDESK_QUOTE_AGE_SECONDS_MAX": "3",
    "BUYDESK_PRICE_TTL_SECONDS": "5",
    "BUYDESK_PRICE_REFRESH_SECONDS": "0.1",
    "BUYDESK_SOURCE_COOLDOWN_SECONDS": "0.5",
    "BUYDESK_SOURCE_COOLDOWN_SECONDS_MAX": "1",
}
ONE = dict.fromkeys(MIDS, Decimal("1.005"))
LONG_AGO = datetime(2026, 1, 1, tzinfo=UTC)
# What the sandbox's first minute costs.
CLOSES = {"EUR": "20572.78", "GBP": "18271.51", "USD": "21712.51"}


@dataclass(frozen=True)
class Client:
    """Somebody who uses a desk over HTTP, and nothing else."""

    desk: Running
    http: httpx2.AsyncClient

    async def get(self, service: str, path: str) -> httpx2.Response:
        return await self.http.get(self.desk.url(service) + path)

    async def buy(self, key: str | None = None, currency: str = "eur") -> httpx2.Response:
        headers = {"Idempotency-Key": key} if key else {}
        url = f"{self.desk.url('create_buy_order')}/place_order/?currency={currency}&amount=69"
        return await self.http.post(url, headers=headers)

    async def record(self) -> dict[str, Any]:
        found: dict[str, Any] = (await self.get("api_cache_proxy", "/record")).json()
        return found

    async def uses(self, sources: set[str]) -> bool:
        """Whether the present price is of exactly these sources."""
        record = await self.record()
        return "id" in record and {quote["source"] for quote in record["sources"]["used"]} == sources

    async def is_refused(self, currency: str = "eur") -> bool:
        return (await self.buy(currency=currency)).status_code != 201

    async def sells(self, currency: str = "eur") -> bool:
        return not await self.is_refused(currency)

    async def rate(self, currency: str = "eur") -> Decimal | None:
        """What an order now is sold at, None when it is refused."""
        answer = await self.buy(currency=currency)
        return Decimal(answer.json()["order"]["exchange_rate"]) if answer.status_code == 201 else None

    async def sells_at(self, rate: Decimal, currency: str = "eur") -> bool:
        """Whether an order is sold at this rate, give or take what half a cent in a quote makes of it."""
        found = await self.rate(currency)
        return found is not None and abs(found - rate) <= Decimal("0.01")

    async def says(self, name: str, words: str) -> bool:
        """Whether the source's present state in /sources has these words."""
        [found] = [
            each for each in (await self.get("api_cache_proxy", "/sources")).json()["sources"] if each["source"] == name
        ]
        return words in found["detail"]

    async def is_well(self, name: str) -> bool:
        return not (await self.source(name))["detail"]

    async def assert_order_refused(self, code: str, words: str, currency: str = "eur", seconds_max: int = 60) -> int:
        """What an order in the currency is told; the seconds after which it is told to come again."""
        answer = await self.buy(currency=currency)
        assert (answer.status_code, answer.json()["code"]) == (503, code), answer.text
        assert words in answer.json()["detail"]
        seconds = int(answer.headers["retry-after"])
        assert 1 <= seconds <= seconds_max
        return seconds

    async def assert_refused_for(self, seconds: float, currency: str = "eur") -> None:
        """Nothing at all is sold for so long."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            answer = await self.buy(currency=currency)
            assert answer.status_code == 503, answer.text
            await asyncio.sleep(0.1)

    async def source(self, name: str) -> dict[str, Any]:
        [found] = [each for each in (await self.part("sources"))["sources"] if each["source"] == name]
        return dict(found)

    async def part(self, name: str) -> dict[str, Any]:
        """A part of the desk's status."""
        found: dict[str, Any] = (await self.get("health_check", "/status")).json()[name]
        return found

    async def has_level(self, name: str, level: str) -> bool:
        return bool((await self.part(name))["level"] == level)

    async def reports(self, level: str) -> str:
        return (await self.get("health_check", f"/reports?level={level}&service=api_updater")).text

    async def prove_all(self) -> int:
        """Proves every order from what the desk shows; how many there are."""
        orders = (await self.get("fetch_buy_orders", "/get_orders/?page_size=1000")).json()["data"]
        for shown in orders:
            record = record_from((await self.get("fetch_buy_orders", f"/prices/{shown['price_id']}")).json())
            hidden = {"desk_number": shown["number"], "client": ANONYMOUS, "metadata_text": None}
            order = order_from(shown | hidden | {"representation": REPRESENTATION})
            assert discrepancies(order, record) == []
            assert len({quote.source for quote in record.used}) >= 2
        return len(orders)

    async def assert_refused(self, code: str) -> None:
        """What the client sees, on every path, while there is no price."""
        for answer in (
            await self.buy(),
            await self.get("api_cache_proxy", "/record"),
            await self.get("api_cache_proxy", "/v1/bpi/currentprice.json"),
            await self.get("api_cache_proxy", "/v1/bpi/currentprice/EUR.json"),
        ):
            assert (answer.status_code, answer.json()["code"]) == (503, code), answer.text
            assert answer.headers["content-type"] == "application/problem+json"
            assert int(answer.headers["retry-after"]) >= 1
            assert ("as_of" in answer.json()) == (code != "price_unavailable")
        assert (await self.get("create_buy_order", "/readyz")).json()["missing"][0]["what"] == "price"
        assert not (await self.part("price"))["ok"]


async def until(holds: Callable[..., Awaitable[bool]], *given: object) -> None:
    async with asyncio.timeout(SECONDS_MAX):
        while not await holds(*given):
            await asyncio.sleep(0.05)
