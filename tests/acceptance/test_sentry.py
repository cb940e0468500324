"""A real desk, in a process of its own, whose Sentry cannot be reached."""

import asyncio
import socket
from pathlib import Path

from tests.desks import desk_up


async def test_a_desk_whose_sentry_never_answers_takes_orders_and_stops_in_time(open_directory: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as hole:
        dsn = f"http://hunter2@127.0.0.1:{hole.getsockname()[1]}/42"
        async with desk_up(open_directory / "sentry", env={"SENTRY_DSN": dsn}) as desk:
            async with desk.client("create_buy_order") as client:
                for number in range(20):
                    mine = {"X-Request-Id": f"mine-{number}"}
                    answer = await client.post("/place_order/?currency=eur&amount=1", headers=mine)
                    assert (answer.status_code, answer.headers["x-request-id"]) == (201, f"mine-{number}")
            async with asyncio.timeout(10):
                assert await desk.stop() == 0
    assert "hunter2" not in desk.printed
