"""One client of the desk: who it is, how it asks, and how what came back is counted."""

import json
import uuid
from argparse import ArgumentParser
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from locust import FastHttpUser, between, events
from locust.env import Environment

BROKEN = "BROKEN PROMISE: "
NO_ROOM = "409 exposure_cap_exceeded"
PORTS = {"create_buy_order": 8001, "fetch_buy_orders": 8020, "api_cache_proxy": 8002}

# Longer than the desk takes to answer, one way or another.
PATIENCE_SECONDS = 15.0
PAUSE_SECONDS_MAX = 5.0


class Identity(NamedTuple):
    """Who a load user is: a name that its keys begin with, and the headers that show it to the desk."""

    name: str
    headers: Mapping[str, str]


def new_identity(kind: str) -> Identity:
    """Somebody whom the desk does not know yet. The one place where load users get what tells them apart."""
    name = f"load-{kind}-{uuid.uuid4().hex[:12]}"
    return Identity(name, {"User-Agent": name})


class Answer(NamedTuple):
    """What came back. `document` is None unless it is JSON, `status` 0 when nothing came; `is_good` says that it is
    what was asked for, `refused_by` in few words what it is otherwise."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    document: Any
    is_good: bool = False
    refused_by: str = ""


Judge = Callable[[Answer], str | None]


@events.init_command_line_parser.add_listener  # type: ignore[untyped-decorator]
def _add_options(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("Desk options", "Where the desk is; by default at the ports of --host.")
    for service, port in PORTS.items():
        option = f"--{service.replace('_', '-')}"
        # The environment variable is Locust's extension of argparse.
        group.add_argument(option, default="", metavar="URL", env_var=f"LOAD_{service.upper()}", help=f"port {port}")
    group.add_argument("--port-offset", type=int, default=0, env_var="LOAD_PORT_OFFSET", help="added to the ports")
    group.add_argument("--burst-seconds", type=float, default=10, help="between two bursts")


class Client(FastHttpUser):
    """A client of the desk, with an identity of its own."""

    abstract = True
    host = "http://127.0.0.1"
    network_timeout = PATIENCE_SECONDS
    connection_timeout = PATIENCE_SECONDS
    wait_time = between(0.2, 1.5)

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self.identity = new_identity(type(self).__name__)

    def url(self, service: str) -> str:
        """Where the service is, without a trailing slash."""
        options = self.environment.parsed_options
        given: str = getattr(options, service, "")
        port = PORTS[service] + getattr(options, "port_offset", 0)
        return given.rstrip("/") or f"{str(self.host).rstrip('/')}:{port}"

    def ask(self, method: str, service: str, path: str, name: str, judge: Judge, **request: Any) -> Answer:
        """Sends one request and counts it below `name`; what `judge` says of a 200 or 201 is a broken promise."""
        headers = {**self.identity.headers, **request.pop("headers", {})}
        url = self.url(service) + path
        with self.client.request(
            method, url, name=name, headers=headers, catch_response=True, allow_redirects=False, **request
        ) as response:
            answer = _answer(response)
            if answer.status in (200, 201):
                broken = _judged(judge, answer)
                response.failure(BROKEN + broken) if broken else response.success()
                return answer._replace(is_good=not broken)
            refused_by = _refused_by(answer, getattr(response, "error", None))
            if refused_by == NO_ROOM:
                response.request_meta["name"] = f"{name} → {NO_ROOM}"
                response.success()
            else:
                response.failure(refused_by)
            return answer._replace(refused_by=refused_by)

    def count(self, name: str, seconds: float, failure: Exception | None) -> None:
        """Counts what Locust's client did not send, or did not see."""
        self.environment.events.request.fire(
            request_type="POST",
            name=name,
            response_time=seconds * 1000,
            response_length=0,
            exception=failure,
            context={},
        )


def _answer(response: Any) -> Answer:
    body = response.content or b""
    try:
        document = json.loads(body)
    except ValueError:
        document = None
    return Answer(response.status_code, response.headers or {}, body, document)


def _judged(judge: Judge, answer: Answer) -> str | None:
    """What the judge says; an answer that it cannot read is broken too."""
    try:
        return judge(answer)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        return f"the answer has not the documented shape ({type(error).__name__}: {error})"


def _refused_by(answer: Answer, error: Exception | None) -> str:
    code = answer.document.get("code", "") if isinstance(answer.document, dict) else ""
    return f"{answer.status} {code}".strip() if answer.status else f"no answer ({type(error).__name__})"


def pause_seconds(answer: Answer) -> float:
    seconds = answer.headers.get("retry-after", "")
    return min(float(seconds), PAUSE_SECONDS_MAX) if seconds.isdigit() else 0.5
