"""A desk that takes keys: made by the commands while it is down and while it runs, and what callers with them get."""

import asyncio
import re
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import httpx2
import pytest

from buydesk.clients.keys import new_key
from buydesk.settings.secrets import SECRET_KEYS, TOKENS
from buydesk.topology import PORTS
from tests.desks import Running, buydesk, command, free_offset
from tests.problems import assert_problem
from tests.serving import free_port

KEYS = {"BUYDESK_ACCESS": "keys"}
SCOPES = "orders:create,orders:read,events:read,webhooks:manage"
# In the address of an endpoint that nobody listens at.
TOKEN_OF_ENDPOINT = "hunter2hunter2"


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture
def answers() -> list[str]:
    """All that the desk has answered, heads included."""
    return []


@pytest.fixture
async def http(answers: list[str]) -> AsyncIterator[httpx2.AsyncClient]:
    async def keep(response: httpx2.Response) -> None:
        await response.aread()
        answers.append(f"{response.headers} {response.text}")

    async with httpx2.AsyncClient(timeout=20, event_hooks={"response": [keep]}) as client:
        yield client


async def show_everywhere(desk: Running, http: httpx2.AsyncClient, shown: Sequence[str], operator: str) -> None:
    """Shows each service everything, has it refused and has acts fail; and asks what else the services tell."""
    for service in PORTS:
        for secret in shown:
            for method, path in (("GET", "/get/"), ("GET", "/events"), ("POST", "/add/"), ("POST", "/pause")):
                await http.request(method, f"{desk.url(service)}{path}", headers=bearer(secret), json={})
        for path in ("/", "/readyz", "/openapi.json", "/nowhere"):
            await http.get(desk.url(service) + path, headers=bearer(operator))
        await http.get(f"{desk.url(service)}/metrics")
    acts, why = desk.url("operate_desk"), {"why": "a look at what is told"}
    for path, members, status in (
        ("/pause", {}, 200),
        ("/cap", {"cap": "0.00000001"}, 409),
        ("/keys", {"client": "nobody", "scopes": ["orders:read"]}, 404),
        ("/prices/confirm", {"currency": "EUR", "from": "2", "to": "1", "minutes": 1}, 422),
        ("/resume", {}, 200),
    ):
        answer = await http.post(acts + path, headers=bearer(operator), json=why | members)
        assert answer.status_code == status, answer.text
    for path in ("/clients", "/keys", "/audit?limit=1000", "/refusals?client=*"):
        assert (await http.get(acts + path, headers=bearer(operator))).status_code == 200
    for path in ("/status", "/reports?limit=1000"):
        assert (await http.get(desk.url("health_check") + path)).status_code == 200


async def keep_webhook(desk: Running, http: httpx2.AsyncClient, key: str) -> list[str]:
    """Has an endpoint that cannot be reached, and does all with it that can be done; its secrets, which only the two
    answers have told that are not kept."""
    hooks = f"{desk.url('process_buy_orders')}/webhooks"
    async with httpx2.AsyncClient(timeout=20, headers=bearer(key)) as unheard:
        url = f"http://127.0.0.1:{free_port()}/?token={TOKEN_OF_ENDPOINT}"
        made = (await unheard.post(hooks, json={"url": url})).json()
        rotated = (await unheard.post(f"{hooks}/{made['id']}/rotate_secret")).json()
    one = f"{hooks}/{made['id']}"
    for method, path, body in (
        ("GET", hooks, None),
        ("PATCH", one, {"description": "x"}),
        ("PATCH", one, {"url": f"https://10.0.0.1/?token={TOKEN_OF_ENDPOINT}"}),
        ("POST", f"{one}/test", None),
        ("POST", f"{one}/redeliver", {"after": 0}),
        ("GET", f"{one}/deliveries", None),
    ):
        await http.request(method, path, json=body, headers=bearer(key))
    return [made["secret"].removeprefix("whsec_"), rotated["secret"].removeprefix("whsec_")]


def assert_not_stored(data_dir: Path, secrets: Sequence[str]) -> None:
    """Nothing of these is in a file of the database."""
    stored = [path.read_bytes() for path in (data_dir / "postgres").rglob("*") if path.is_file()]
    assert any(TOKEN_OF_ENDPOINT.encode() in each for each in stored)  # so they would be there
    assert not any(secret.encode() in each for secret in secrets for each in stored)


async def test_a_desk_with_keys_from_its_first_start_to_a_key_that_is_revoked(
    open_directory: Path, http: httpx2.AsyncClient, answers: list[str]
) -> None:
    data_dir, offset = open_directory / "keyed", free_offset()
    up = ("up", "--data-dir", str(data_dir), "--port-offset", str(offset))
    async with buydesk(*up, offset=offset, env=KEYS) as desk:
        await desk.until_printed("there is no key. Make one (buydesk keys create --help)")
        assert await desk.process.wait() == 2
    # The desk is down: its database is started for the command.
    former = await command("keys", "create", "anonymous", "--scopes", SCOPES, data_dir=data_dir)
    canaries = [former]
    async with buydesk(*up, "--separate", offset=offset, env=KEYS) as desk:
        await desk.until_printed("Try it", 60)
        assert "keys: callers show one" in desk.printed
        assert re.search(r"cap +100\.00000000 of 100\.00000000 BTC can still be sold", desk.printed)
        place = f"{desk.url('create_buy_order')}/place_order/?currency=eur&amount=69"
        orders, exposure = f"{desk.url('fetch_buy_orders')}/get_orders/", f"{desk.url('fetch_buy_orders')}/exposure"
        assert_problem(await http.post(place), 401, "unauthorized")
        # It runs: the command finds its database.
        await command("clients", "create", "shop", "--cap", "0.01", "--why", "a shop", data_dir=data_dir)
        shop = await command("keys", "create", "shop", "--scopes", SCOPES, data_dir=data_dir)
        canaries.append(shop)
        for key, number in ((former, 1), (shop, 1), (former, 2), (shop, 2)):
            placed = await http.post(place, headers=bearer(key))
            assert placed.status_code == 201, placed.text
            assert placed.json()["order"]["number"] == number
            assert (await http.get(orders, headers=bearer(key))).json()["page"]["total"] == number
        capped = await http.post(place, headers=bearer(shop))
        assert assert_problem(capped, 409, "client_cap_exceeded")["cap"] == "0.01000000"
        assert (await http.get(exposure, headers=bearer(shop))).json()["cap"] == "0.01000000"
        assert (await http.get(exposure, headers=bearer(former))).json()["cap"] is None
        events = (await http.get(f"{desk.url('process_buy_orders')}/events", headers=bearer(shop))).json()["data"]
        assert [(event["sequence"], "client" in event["order"]) for event in events] == [(1, False), (2, False)]
        key_id = shop[8:18]
        await command("keys", "revoke", key_id, "--why", "lost", data_dir=data_dir)
        async with asyncio.timeout(10):
            while (await http.get(orders, headers=bearer(shop))).status_code == 200:
                await asyncio.sleep(0.1)
        assert_problem(await http.post(place, headers=bearer(shop)), 401, "unauthorized")
        assert (await http.post(place, headers=bearer(former))).status_code == 201
        assert key_id in await command("audit", data_dir=data_dir)
        operator = (data_dir / "operator-key").read_text()
        canaries += [operator, new_key(livemode=False).text]
        kinds = ("*-tokens", "*-signing-key", "webhook-keys")
        tokens = [path.read_text() for kind in kinds for path in data_dir.glob(kind)]
        webhook_secrets = await keep_webhook(desk, http, former)
        await show_everywhere(desk, http, [*canaries, *tokens], operator)
        assert await desk.stop() == 0
    written = [path.read_text(errors="replace") for path in data_dir.rglob("*.log")]
    assert len(written) >= 2
    assert len(tokens) == len(TOKENS) + len(SECRET_KEYS)
    assert_not_stored(data_dir, [*webhook_secrets, tokens[-1]])
    assert TOKEN_OF_ENDPOINT not in "\n".join([desk.printed, *written])
    told = "\n".join([desk.printed, *answers, *written])
    assert canaries[0][8:18] in told  # what is looked for is where it would be
    for secret in (*webhook_secrets, *(canary[18:-6] for canary in canaries), *tokens):
        assert secret not in told
