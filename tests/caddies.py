"""Production's Caddyfile in a real caddy on loopback."""

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

CADDYFILE = (Path(__file__).parents[1] / "deploy" / "Caddyfile").read_text(encoding="utf-8")
DOMAIN = "desk.example.org"


@contextmanager
def caddy(directory: Path, to: Callable[[int], int], caddyfile: str = CADDYFILE) -> Iterator[int]:
    """The port of a caddy that takes plain HTTP for DOMAIN. `to` says where on this host a service is found that has
    the port in its container."""
    if shutil.which("caddy") is None:  # skipped only where it is missing, and never in CI
        (pytest.fail if "CI" in os.environ else pytest.skip)("no caddy on the PATH")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    directory.mkdir(exist_ok=True)
    here = re.sub(r"dynamic a {[^}]*port (\d+)[^}]*}", lambda found: f"to 127.0.0.1:{to(int(found[1]))}", caddyfile)
    (directory / "Caddyfile").write_text(here.replace("admin off", "admin off\ndefault_bind 127.0.0.1"))
    told = {"DESK_DOMAIN": f"http://{DOMAIN}:{port}"}
    command = ["caddy", "run", "--adapter", "caddyfile", "--config", str(directory / "Caddyfile")]
    environment = os.environ | told | {"XDG_DATA_HOME": str(directory), "XDG_CONFIG_HOME": str(directory)}
    with (directory / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stderr=log)  # noqa: S603
    try:
        while not _listens(port):
            assert process.poll() is None, (directory / "log").read_text()
            time.sleep(0.02)
        yield port
    finally:
        process.terminate()
        process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
