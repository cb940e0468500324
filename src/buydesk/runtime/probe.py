"""What a container's health check runs, every few seconds: is the service that runs in it ready?

The command `buydesk-probe` finds out from the command line of process 1 which service that is. It imports little:
the settings alone would take ten times as long as the rest.
"""

import os
import socket
from pathlib import Path

from buydesk.topology import PORTS

COMMAND_LINE = Path("/proc/1/cmdline")
SECONDS_MAX = 4.0
ANSWER_BYTES_MAX = 64 * 1024


def main() -> int:
    """Exit code 0 when what runs here is well; else what it said, or why it said nothing, is printed."""
    offset = int(os.environ.get("BUYDESK_PORT_OFFSET") or 0)
    command = COMMAND_LINE.read_text().split("\0")
    service = next((word for word in command if word in PORTS), None)
    wrong = _answer(PORTS[service] + offset) if service else "no service runs here"
    print(wrong or "ready")  # noqa: T201  # Docker keeps it
    return 1 if wrong else 0


def _answer(port: int) -> str:
    """ "" when the service there is ready, else what it said."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=SECONDS_MAX) as connection:
            connection.sendall(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            answer = b""
            while len(answer) < ANSWER_BYTES_MAX and (part := connection.recv(ANSWER_BYTES_MAX)):
                answer += part
    except OSError as error:
        return f"port {port}: {error}"
    return "" if answer.startswith(b"HTTP/1.1 200 ") else f"port {port}: {answer.decode(errors='replace')}"
