"""Production's Caddyfile in a real caddy on loopback: who gets in, and what is passed on."""

import http.server
import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from buydesk.errors import TYPE_PREFIX, DeskError

CADDYFILE = (Path(__file__).parents[2] / "deploy" / "Caddyfile").read_text(encoding="utf-8")
KEYS = {"shop": "a" * 64, "other": "b" * 64}
CLIENTS = "".join(f'"Bearer {key}" {client}\n' for client, key in KEYS.items())
REACHED = ["/place_order", "/place_order/?amount=1", "/get_orders/", "/get_orders/x", "/exposure", "/prices/x"]
NOT_REACHED = ["/", "/docs", "/metrics", "/readyz", "/add/", "/place_order/x"]


class Echo(http.server.BaseHTTPRequestHandler):
    """Stands in for the services: its answer is the request's headers."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(dict(self.headers)).encode())

    def log_message(self, *_: object) -> None: ...


@contextmanager
def proxy(directory: Path, clients: str | None) -> Iterator[httpx2.Client | None]:
    """A client of a caddy that has this file of clients, or None when that caddy does not start."""
    if shutil.which("caddy") is None:  # skipped only where it is missing, and never in CI
        (pytest.fail if "CI" in os.environ else pytest.skip)("no caddy on the PATH")
    with (
        http.server.ThreadingHTTPServer(("127.0.0.1", 0), Echo) as echo,
        socket.create_server(("127.0.0.1", 0)) as free,
    ):
        threading.Thread(target=echo.serve_forever).start()
        here = re.sub(r"dynamic a {[^}]*}", f"to 127.0.0.1:{echo.server_port}", CADDYFILE)
        (directory / "Caddyfile").write_text(here.replace("admin off", "admin off\ndefault_bind 127.0.0.1"))
        if clients is not None:
            (directory / "clients").write_text(clients)
        port = free.getsockname()[1]
        free.close()
        told = {"DESK_DOMAIN": f"http://127.0.0.1:{port}", "CLIENTS_FILE": str(directory / "clients")}
        command = ["caddy", "run", "--adapter", "caddyfile", "--config", str(directory / "Caddyfile")]
        environment = os.environ | told | {"XDG_DATA_HOME": str(directory), "XDG_CONFIG_HOME": str(directory)}
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)  # noqa: S603
        try:
            with httpx2.Client(base_url=told["DESK_DOMAIN"], timeout=10) as client:
                while process.poll() is None and not _listens(port):
                    time.sleep(0.02)
                yield client if process.poll() is None else None
        finally:
            process.terminate()
            process.wait()
            echo.shutdown()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def assert_problem(answer: httpx2.Response, code: str) -> None:
    known = DeskError.by_code[code]
    assert answer.headers["content-type"] == "application/problem+json"
    told = {name: value for name, value in answer.json().items() if name != "detail"}
    assert told == {
        "type": TYPE_PREFIX + code,
        "title": known.title,
        "status": known.status,
        "code": code,
    }
    assert answer.status_code == known.status


def test_only_clients_with_a_key_get_in_and_the_key_goes_no_further(tmp_path: Path) -> None:
    with proxy(tmp_path, CLIENTS) as client:
        assert client is not None
        for key in KEYS.values():
            for path in REACHED:
                answer = client.get(path, headers={"Authorization": f"Bearer {key}", "Idempotency-Key": "k"})
                assert answer.status_code == 200
                assert "Authorization" not in answer.json()
                assert answer.json()["Idempotency-Key"] == "k"
            for path in NOT_REACHED:
                assert_problem(client.get(path, headers={"Authorization": f"Bearer {key}"}), "not_found")
        shop = f"Bearer {KEYS['shop']}"
        wrong = [shop[:-1], shop + "a", shop.lower(), KEYS["shop"], "Bearer", "Bearer *", "*", "", f"{shop}, {shop}"]
        for headers in [{}, *({"Authorization": each} for each in wrong)]:
            for path in REACHED + NOT_REACHED:
                answer = client.get(path, headers=headers)
                assert_problem(answer, "unauthorized")
                assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("clients", [None, "", "\n", "# all withdrawn\n", '"" x\n', f"Bearer {KEYS['shop']}\n"])
def test_without_a_whole_line_of_a_client_nobody_gets_in(tmp_path: Path, clients: str | None) -> None:
    with proxy(tmp_path, clients) as client:
        if client is not None:  # else it has not started at all
            for headers in [{}, *({"Authorization": each} for each in ("", "Bearer", f"Bearer {KEYS['shop']}"))]:
                assert_problem(client.get("/get_orders/", headers=headers), "unauthorized")
