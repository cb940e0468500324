"""What is logged within, as JSON lines: each as the log would show it, read again."""

import contextlib
import json
import logging
from collections.abc import Iterator
from typing import Any

from buydesk.observability import logs


class _Lines(logging.Handler):
    def __init__(self, lines: list[dict[str, Any]]) -> None:
        super().__init__()
        self.setFormatter(logs._JsonLines())
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(json.loads(self.format(record)))


@contextlib.contextmanager
def logged(name: str = "buydesk", level: int = logging.INFO) -> Iterator[list[dict[str, Any]]]:
    """The lines of this logger and those below it."""
    lines: list[dict[str, Any]] = []
    logger, handler = logging.getLogger(name), _Lines(lines)
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield lines
    finally:
        logger.setLevel(before)
        logger.removeHandler(handler)
