"""The command behind `make fuzz`. Starts a desk of its own, with sandbox prices, and ends it.

Exit code 1: a service did what its OpenAPI document does not say, or the document is wrong.
"""

import argparse
import asyncio
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx2

from buydesk.clients.keys import parse_key_text
from buydesk.clients.scopes import SCOPES
from buydesk.embedded.data_dir import secret_file
from buydesk.settings.types import COUNT_MAX
from buydesk.topology import PORTS
from fuzz.calls import Found
from fuzz.rounds import Services, fuzz
from tests.desks import Running, command, desk_up

CHANGED = "changed"
FAILED = 1
CALLS = 100_000
MINUTES_MAX = 30


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes the calls; returns the exit code."""
    asked = _parser().parse_args(arguments)
    print(f"seed {asked.seed}", flush=True)
    directory = Path(tempfile.mkdtemp(prefix="buydesk-fuzz-", dir=os.environ.get("TMPDIR", "/var/tmp")))  # noqa: S108
    try:
        directory.chmod(0o755)  # if root runs this, PostgreSQL's account has to get in
        found = asyncio.run(_on_a_desk(directory / "data", asked))
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    _tell(found)
    print(f"\n{found.made} calls, {len(found.failures)} failures, seed {asked.seed}")
    return FAILED if found.failures else 0


async def _on_a_desk(data_dir: Path, asked: argparse.Namespace) -> Found:
    # No rate: what is looked for is behind it.
    async with desk_up(data_dir, env={"BUYDESK_CLIENT_RATE_PER_MINUTE": str(COUNT_MAX)}) as desk:
        tokens = _tokens(data_dir)
        key = await command("keys", "create", "anonymous", "--scopes", ",".join(SCOPES), data_dir=data_dir)
        for service in ("create_buy_order", "db_proxy", "fetch_buy_orders", "operate_desk", "process_buy_orders"):
            tokens[service].append(key)
        # Somebody whose limits may be changed, and a key that may be ended, without harm to the other calls.
        await command("clients", "create", CHANGED, data_dir=data_dir)
        ended = await command("keys", "create", CHANGED, "--scopes", "orders:read", data_dir=data_dir)
        services = await _services(desk, tokens, parse_key_text(ended).id)
        return await asyncio.to_thread(
            fuzz, services, calls=asked.calls, seed=asked.seed, seconds_max=asked.minutes_max * 60
        )


def _tokens(data_dir: Path) -> dict[str, list[str]]:
    """What may be shown to each service, other than what makes a report a verified one."""
    shown = {
        "api_cache_proxy": ("counting_tokens", "publishing_tokens"),
        "db_proxy": (
            *("placing_tokens", "processing_tokens", "publishing_tokens", "reading_tokens"),
            "operating_tokens",
        ),
        "process_buy_orders": ("processing_tokens",),
    }
    return {service: [secret_file(data_dir, name).read_text() for name in shown.get(service, ())] for service in PORTS}


async def _services(desk: Running, tokens: Mapping[str, Sequence[str]], key_id: str) -> Services:
    """The desk's services, with an order, a price, a key and a webhook that are there as examples."""
    key = "fuzz"
    async with httpx2.AsyncClient() as client:
        placed = await client.post(
            f"{desk.url('create_buy_order')}/place_order/?currency=EUR&amount=1&client_order_id={key}"
        )
        order = placed.raise_for_status().json()["order"]
        # Where nobody listens.
        made = await client.post(f"{desk.url('process_buy_orders')}/webhooks", json={"url": "http://127.0.0.1:9/"})
        prices = desk.url("api_cache_proxy")
        record, sources = [(await client.get(f"{prices}{path}")).json() for path in ("/record", "/sources/")]
        stored = (await client.get(f"{desk.url('fetch_buy_orders')}/prices/{order['price_id']}")).json()
    return Services(
        urls={service: desk.url(service) for service in PORTS},
        tokens=tokens,
        parameters={
            "order_id": order["id"],
            "price_id": order["price_id"],
            "client": "anonymous",
            "client_order_id": key,
            "name": CHANGED,
            "key_id": key_id,
            "webhook_id": made.raise_for_status().json()["id"],
        },
        bodies={
            "api_cache_proxy": {"POST /add/": record, "POST /sources/": sources},
            "db_proxy": {"PUT /price/{price_id}": stored},
            "process_buy_orders": {"POST /webhooks/{webhook_id}/redeliver": {"after": 0}},
        },
    )


def _tell(found: Found) -> None:
    for operation, statuses in sorted(found.calls.items()):
        print(f"{operation:62}", "  ".join(f"{status}: {count}" for status, count in sorted(statuses.items())))
    for what, shown in sorted(found.failures.items()):
        print(f"\nFAILED {what}\n{shown}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="make fuzz ARGS=…", description="Calls made up from the OpenAPI documents: does each answer as it says?"
    )
    parser.add_argument("--calls", type=int, default=CALLS, help=f"at least so many in all ({CALLS})")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32), help="the same seed, the same calls")  # noqa: S311
    parser.add_argument("--minutes-max", type=float, default=MINUTES_MAX, help=f"begin no round after ({MINUTES_MAX})")
    return parser


if __name__ == "__main__":
    sys.exit(main())
