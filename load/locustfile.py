"""Locust's users of a running desk: buyers who send again after a lost answer, buyers who do not, readers, bursts.

What counts as a failure: a broken promise (`promises.py`; its text starts with BROKEN PROMISE), and an answer that the
client did not ask for, a 503 or a lost connection included, even where the buyer gets its order by sending it again. An
order that does not fit under the cap is no failure, but a line of its own.

    python -m locust --locustfile load/locustfile.py     (or `make load`, which says what to do by default)
"""

import http.client
import random
import time
import uuid
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import gevent
from locust import events, task
from locust.env import Environment

from load.client import BROKEN, NO_ROOM, PATIENCE_SECONDS, Answer, Client, Judge, pause_seconds
from load.promises import Asked, Document, Placed, Walk, in_exposure, in_order, in_record, in_repeats, in_replay

# Pauses between tries are as the desk asks for (Retry-After), and as many as this.
TRIES_MAX = 8
PAGES_MAX = 20
BURST_ORDERS = 12
BURST_REPEATS = 4

_placed = Placed()


class Buyer(Client):
    """Places orders."""

    abstract = True

    def new_order(self, *, with_key: bool) -> Asked:
        """Mostly small, so that the cap lasts; one in two hundred can never fit."""
        currency = random.choice(("EUR", "GBP", "USD"))
        cents = 99_999_999_999 if random.random() < 0.005 else random.randint(1, 5_000)
        key = f"{self.identity.name}-{uuid.uuid4().hex}" if with_key else None
        return Asked(currency, f"{cents // 100}.{cents % 100:02}", key)

    def place(self, asked: Asked, name: str, judge: Judge) -> Answer:
        """Sends the order once, by query or by JSON."""
        headers = {"Idempotency-Key": asked.key} if asked.key else {}
        request: dict[str, Any] = {"headers": headers, "json": {"currency": asked.currency, "amount": asked.amount}}
        path = "/place_order/"
        if random.random() < 0.5:
            request.pop("json")
            path += f"?currency={asked.currency.lower()}&amount={asked.amount}"
        return self.ask("POST", "create_buy_order", path, f"/place_order/ ({name})", judge, **request)

    @staticmethod
    def new(asked: Asked) -> Judge:
        """The order that was asked for, and no number that another order has."""
        return lambda answer: (
            (None if answer.status == 201 else f"an order was placed with {answer.status}")
            or in_order(answer.document["order"], asked)
            or _placed.broken_by(answer.document["order"])
        )

    @staticmethod
    def repeated(first: Answer) -> Judge:
        """The first answer again."""
        return lambda answer: in_replay(first.body, answer.body, _is_replay(answer))


def _is_replay(answer: Answer) -> bool:
    return answer.headers.get("idempotent-replayed") == "true"


class BuyerWithKey(Buyer):
    """Sends until there is an answer: with a key that does no harm."""

    weight = 6

    @task
    def buy(self) -> None:
        """Now and then the answer is lost; now and then the buyer asks again, or asks for the order by its key."""
        asked = self.new_order(with_key=True)
        if random.random() < 0.2:
            self.lose_the_answer(asked)
        first = self.until_answered(asked, "with key", self.new(asked))
        if not first.is_good:
            return
        if random.random() < 0.3:
            self.until_answered(asked, "same key again", self.repeated(first))
        if random.random() < 0.2:
            self.look_up(asked, first.document["order"])

    def until_answered(self, asked: Asked, name: str, judge: Judge) -> Answer:
        """Sends the same again after a lost answer or a refusal that may pass, at most TRIES_MAX times."""
        answer = self.place(asked, name, judge)
        for _ in range(TRIES_MAX - 1):
            if answer.status and answer.status < 500 and answer.status != 429:
                break
            gevent.sleep(pause_seconds(answer))
            answer = self.place(asked, name, judge)
        return answer

    def look_up(self, asked: Asked, order: Document) -> None:
        """Did my order go through?"""

        def judge(answer: Answer) -> str | None:
            return None if answer.document == order else "by its key the order is another"

        path = f"/get_orders/?client_order_id={asked.key}"
        self.ask("GET", "fetch_buy_orders", path, "/get_orders/ (by key)", judge)

    def lose_the_answer(self, asked: Asked) -> None:
        """Sends the order and hangs up; whether it is placed is open."""
        address = urlsplit(self.url("create_buy_order"))
        if address.scheme != "http" or address.hostname is None:
            return
        started = time.perf_counter()
        connection = http.client.HTTPConnection(address.hostname, address.port, timeout=PATIENCE_SECONDS)
        failure: Exception | None = None
        try:
            query = f"?currency={asked.currency}&amount={asked.amount}&client_order_id={asked.key}"
            connection.request("POST", f"{address.path}/place_order/{query}", headers=dict(self.identity.headers))
            gevent.sleep(random.uniform(0, 0.01))
        except OSError as error:
            failure = error
        finally:
            connection.close()
        self.count("/place_order/ (hung up, answer lost)", time.perf_counter() - started, failure)


class BuyerWithoutKey(Buyer):
    """Sends each order once: every request is a new one."""

    weight = 2

    @task
    def buy(self) -> None:
        """Places one order."""
        asked = self.new_order(with_key=False)
        self.place(asked, "no key", self.new(asked))


class Burst(Buyer):
    """Everybody at once: all bursts of all workers begin at the same moment."""

    weight = 1

    @task
    def burst(self) -> None:
        """Several orders at a time, and one of them several times under one key."""
        seconds: float = self.environment.parsed_options.burst_seconds
        gevent.sleep(seconds - time.time() % seconds)
        once = [self.new_order(with_key=True) for _ in range(BURST_ORDERS)]
        same = self.new_order(with_key=True)
        sent = [gevent.spawn(self.place, each, "burst", self.new(each)) for each in once]
        alike = [gevent.spawn(self.place, same, "burst, one key", self.new(same)) for _ in range(BURST_REPEATS)]
        gevent.joinall([*sent, *alike])
        answers = [each.value for each in alike if each.value is not None and each.value.is_good]
        if answers:
            self.place(same, "burst, same key again", self.repeated(answers[0]))
        broken = in_repeats([(answer.body, _is_replay(answer)) for answer in answers])
        if broken:
            self.count("/place_order/ (burst, one key)", 0, Exception(BROKEN + broken))


class Reader(Client):
    """Reads pages by their links, and looks deep into the past."""

    weight = 4

    @task(5)
    def follow(self) -> None:
        """From the newest orders on, then back for what came meanwhile."""
        walk = Walk()
        first = answer = self.page(f"/get_orders/?start=0&page_size={random.choice((3, 10, 100))}", "first", walk)
        for _ in range(PAGES_MAX):
            if not answer.is_good or "next" not in answer.document["_links"]:
                break
            answer = self.page(answer.document["_links"]["next"]["href"], "next", walk)
        if first.is_good:
            path = first.document["_links"]["prev"]["href"]
            self.ask("GET", "fetch_buy_orders", path, "/get_orders/ (newer)", _of(walk.broken_by_newer))

    @task(2)
    def deep(self) -> None:
        """A page far back takes no longer than the first."""
        first = self.page("/get_orders/?start=0&page_size=10", "first", Walk())
        if first.is_good and first.document["page"]["total"] > 10:
            total = first.document["page"]["total"]
            self.page(f"/get_orders/?start={random.randint(total // 2, total - 1)}&page_size=10", "deep", Walk())

    @task(2)
    def exposure(self) -> None:
        """The room under the cap."""
        self.ask("GET", "fetch_buy_orders", "/exposure", "/exposure", _of(in_exposure))

    def page(self, path: str, name: str, walk: Walk) -> Answer:
        """The next page of a walk."""
        return self.ask("GET", "fetch_buy_orders", path, f"/get_orders/ ({name})", _of(walk.broken_by_next))


def _of(broken_by: Callable[[Document], str | None]) -> Judge:
    return lambda answer: broken_by(answer.document)


class PriceReader(Client):
    """Watches the price."""

    weight = 2

    @task(4)
    def record(self) -> None:
        """The record, with its proof; how late it is by the clock of the desk itself."""

        def judge(answer: Answer) -> str | None:
            return in_record(answer.document, parsedate_to_datetime(answer.headers["date"]))

        self.ask("GET", "api_cache_proxy", "/record", "/record", judge)

    @task(1)
    def coindesk(self) -> None:
        """As the programs written for CoinDesk's retired document."""

        def judge(answer: Answer) -> str | None:
            return None if answer.document["bpi"]["USD"]["rate_float"] > 0 else "no price"

        self.ask("GET", "api_cache_proxy", "/v1/bpi/currentprice.json", "/v1/bpi/currentprice.json", judge)


@events.quitting.add_listener  # type: ignore[untyped-decorator]
def _sum_up(environment: Environment, **_: object) -> None:
    """Where no page is open, what counts is said in one line; workers leave that to their master."""
    options = environment.parsed_options
    if options is None or options.worker:
        return
    errors = list(environment.stats.errors.values())
    broken = sum(each.occurrences for each in errors if BROKEN in str(each.error))
    refused = sum(each.num_requests for each in environment.stats.entries.values() if each.name.endswith(NO_ROOM))
    other = sum(each.occurrences for each in errors) - broken
    print(
        f"{environment.stats.total.num_requests} requests, {broken} broken promises, {other} other failures, "
        f"{refused} orders without room under the cap"
    )
