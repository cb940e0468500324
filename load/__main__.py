"""The command behind `make load`: Locust with this desk's users, on this machine.

The desk is one without a limit for callers that show no key: BUYDESK_ANONYMOUS_RATE=off.
Without `--ui` few users work for a short time and the exit code tells whether all went well (1: there were failures).
With it the page at http://127.0.0.1:8089 starts and stops them. Every other option is Locust's; a later one wins.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

LOCUSTFILE = Path(__file__).with_name("locustfile.py")
SHORT = ("--headless", "--users", "20", "--spawn-rate", "10", "--run-time", "20s", "--only-summary")
PAGE = ("--web-host", "127.0.0.1", "--web-port", "8089")


def command(arguments: Sequence[str]) -> list[str]:
    """Locust's command line for ours."""
    defaults = PAGE if "--ui" in arguments else SHORT
    given = [each for each in arguments if each != "--ui"]
    return [sys.executable, "-m", "locust", "--locustfile", str(LOCUSTFILE), *defaults, *given]


if __name__ == "__main__":
    line = command(sys.argv[1:])
    os.execv(line[0], line)  # noqa: S606  # no shell is the point: signals and the exit code are Locust's own
