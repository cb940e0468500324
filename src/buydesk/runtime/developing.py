"""What the commands `listen` and `trigger` do, for those who develop against a desk: events reach a local program as a
webhook would bring them, and a sandbox makes some."""

import asyncio
import contextlib
import secrets
import uuid
from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import aiohttp
import msgspec
from standardwebhooks.webhooks import Webhook as Signer

from buydesk.embedded.data_dir import default_data_dir, secret_file
from buydesk.errors import CannotStart
from buydesk.events.documents import Message
from buydesk.events.signing import PREFIX
from buydesk.settings.model import Settings
from buydesk.times import utc_now

WAIT_SECONDS = 20
PAGE_EVENTS = 1000
PAUSE_SECONDS = 1.0
SECRET_BYTES = 32
FORWARD_SECONDS_MAX = 10.0
ANSWER_SECONDS_MAX = 30.0
SAID_CHARS_MAX = 500

Say = Callable[[str], None]


class _NotNow(CannotStart):
    """A refusal that passes by itself."""


class _Desk:
    """A desk that is up, as its client sees it."""

    def __init__(self, settings: Settings, key: str | None, session: aiohttp.ClientSession) -> None:
        self._settings = settings
        self._headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._session = session

    async def ask(self, service: str, path: str, body: object = None, headers: Mapping[str, str] | None = None) -> Any:
        """What the service answers; raises CannotStart for a refusal, and aiohttp.ClientError without an answer."""
        url = self._settings.own_url(service) + path
        method = "GET" if body is None else "POST"
        timeout = aiohttp.ClientTimeout(total=ANSWER_SECONDS_MAX)
        given = self._headers if headers is None else headers
        async with self._session.request(method, url, json=body, headers=given, timeout=timeout) as response:
            if response.status == 429 or response.status >= 500:  # maybe by a proxy, whose answer is no JSON
                raise _NotNow(f"{service} answers {response.status}: {(await response.text())[:SAID_CHARS_MAX]}")
            document = await response.json(content_type=None)
            if response.status >= 400:
                raise CannotStart(f"{service} refuses: {document['detail']} ({document['code']})")
            return document


@contextlib.asynccontextmanager
async def _desk(settings: Settings, key: str | None) -> AsyncIterator[_Desk]:
    async with aiohttp.ClientSession() as session:
        try:
            yield _Desk(settings, key, session)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise CannotStart(
                f"the desk does not answer ({type(error).__name__}): is it up, at these ports?"
            ) from error


async def listen(settings: Settings, key: str | None, forward_to: str | None, say: Say) -> None:
    """Tells the events of the key's client as they happen, for ever, and posts each to `forward_to` as a webhook would:
    once, with a signature by a secret that is told at the start. Raises CannotStart."""
    secret = PREFIX + b64encode(secrets.token_bytes(SECRET_BYTES)).decode()
    async with _desk(settings, key) as desk:
        after = 0
        while (newest := await _newest(desk, after)) > after:
            after = newest
        say(f"Listening after event {after}." + (f" Messages are signed with {secret}" if forward_to else ""))
        while True:
            try:
                page = await desk.ask("process_buy_orders", f"/events?after={after}&wait={WAIT_SECONDS}")
            except (aiohttp.ClientError, TimeoutError, _NotNow):
                await asyncio.sleep(PAUSE_SECONDS)  # it is being started again, or too much is asked of it
                continue
            for event in page["data"]:
                said = "" if forward_to is None else f" -> {await _forward(forward_to, secret, event)}"
                say(f"{event['sequence']} {event['type']} {event['order']['id']}{said}")
            after = page["next_after"]


async def _newest(desk: _Desk, after: int) -> int:
    """The number of the last event of a page."""
    page = await desk.ask("process_buy_orders", f"/events?after={after}&limit={PAGE_EVENTS}")
    return int(page["next_after"])


async def _forward(url: str, secret: str, event: Mapping[str, Any]) -> str:
    """Posts the event; what came of it, for people."""
    body = msgspec.json.encode(Message(event["type"], event["created_at"], event))
    at = utc_now()
    headers = {
        "Content-Type": "application/json",
        "webhook-id": event["id"],
        "webhook-timestamp": str(int(at.timestamp())),
        "webhook-signature": Signer(secret).sign(event["id"], at, body.decode()),
    }
    timeout = aiohttp.ClientTimeout(total=FORWARD_SECONDS_MAX)
    try:
        async with (
            aiohttp.ClientSession() as session,
            session.post(url, data=body, headers=headers, timeout=timeout, allow_redirects=False) as response,
        ):
            return str(response.status)
    except (aiohttp.ClientError, TimeoutError) as error:
        return f"no answer ({type(error).__name__})"


async def trigger(settings: Settings, key: str | None, event: str) -> str:
    """Makes an event in a sandbox: an order is placed and, if that is wanted, settled or cancelled. Raises CannotStart,
    also for a desk that is none."""
    async with _desk(settings, key) as desk:
        if (await desk.ask("api_cache_proxy", "/record"))["feed"] != "sandbox":
            raise CannotStart("this desk sells at real prices: events are made in a sandbox only")
        order = (await desk.ask("create_buy_order", "/place_order/", _new_order()))["order"]
        if event != "order.placed":
            act, body = (
                ("settle", {}) if event == "order.settled" else ("cancel", {"reason": "made by buydesk trigger"})
            )
            shown = {"Authorization": f"Bearer {_processing_token(settings)}"}
            await desk.ask("process_buy_orders", f"/orders/{order['id']}/{act}", body, shown)
    return f"{event}: order {order['id']}"


def _new_order() -> dict[str, str]:
    # With a key, which the desk may ask for.
    return {"currency": "EUR", "amount": "1.00", "client_order_id": f"trigger-{uuid.uuid4()}"}


def _processing_token(settings: Settings) -> str:
    """The token for processors of the desk in the data directory, unless one is given."""
    if "processing_tokens" in settings.model_fields_set:
        return settings.processing_tokens.get_secret_value().partition(",")[0]
    path = secret_file(settings.data_dir or default_data_dir(settings.port_offset), "processing_tokens")
    try:
        return path.read_text().strip().partition(",")[0]
    except OSError as error:
        raise CannotStart(f"cannot read {path} ({error.strerror}): use the desk's --data-dir") from error
