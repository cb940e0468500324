"""The journal: what clients asked and were told, and which faults there were, a line of JSON each, written at once.

What was sent stands there before it is sent: a buyer that dies leaves nothing that the judge does not know of.
"""

import json
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

Event = dict[str, Any]

SENT, ANSWERED, LOOKED_UP, FAULT = "sent", "answered", "looked up", "fault"


@dataclass(frozen=True)
class Answer:
    """What a client was told: a status, and the JSON document that came with it. Status 0 is no answer."""

    status: int
    document: Any = None


class Journal:
    """Appends to a file. `t` of an event is monotonic time, in seconds; `at` is the time of day."""

    def __init__(self, path: Path, seed: int) -> None:
        self.path = path
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._write("begun", seed=seed)

    def sent(self, key: str, body: Event) -> None:
        """An order is about to be sent."""
        self._write(SENT, key=key, body=body)

    def answered(self, key: str, answer: Answer) -> None:
        """What its client was told."""
        self._write(ANSWERED, key=key, status=answer.status, document=answer.document)

    def looked_up(self, key: str, answer: Answer, *, is_final: bool) -> None:
        """What a look-up by key said; `is_final` after the time in `final_after`."""
        self._write(LOOKED_UP, key=key, status=answer.status, document=answer.document, is_final=is_final)

    def fault(self, what: str) -> None:
        """Something was hurt, or left alone again."""
        self._write(FAULT, fault=what)

    def _write(self, what: str, **event: Any) -> None:
        moment = {"what": what, "t": round(time.monotonic(), 4), "at": datetime.now(UTC).isoformat()}
        self._file.write(json.dumps(moment | event) + "\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def read(path: Path) -> list[Event]:
    """The events of a journal."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
