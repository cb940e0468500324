"""Webhooks of a whole desk whose processes are killed: `make chaos ARGS=webhooks` does more of it."""

from pathlib import Path

import pytest

from chaos.plans import Plan
from chaos.webhooks import deliver_all

ORDERS = 1000


@pytest.mark.timeout(300)
async def test_every_endpoint_gets_every_event_in_order_while_what_delivers_is_killed(open_directory: Path) -> None:
    plan = Plan(open_directory / "webhooks", seed=1, rounds=1)
    plan.directory.mkdir(mode=0o755)
    verdict = await deliver_all(plan, ORDERS)
    assert verdict.wrong == []
    assert verdict.seen["events"] == 2 * ORDERS
    assert int(str(verdict.seen["kills"])) >= 3
