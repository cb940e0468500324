"""Whether orders can be stored, as far as the last batches show it."""

import logging
import math
import time
from collections.abc import Sequence

from buydesk.errors import DeskError, InternalError, LedgerUnavailable, Overloaded
from buydesk.orders.model import Outcome, Placed, Refused

logger = logging.getLogger("buydesk.services.db_proxy")

# How long after orders could not be stored /readyz says so, if none was stored since, and how long the log waits before
# it says that they are stored again: a database that can hardly keep up would fill it.
FAILURE_SHOWN_SECONDS = 5.0
# For so long an order that was stored, or a look whether one could be, shows that orders can be stored.
STORING_SHOWN_SECONDS = 3.0
# Problems of the ledger's, not of an order.
_FAULTS = (InternalError, LedgerUnavailable, Overloaded)


class StoringMonitor:
    """Keeps in mind whether orders can be stored, and logs when that changes, with the server's reason."""

    def __init__(self) -> None:
        self._refusal: DeskError | None = None  # the last one of a batch, if nothing was stored since
        self._refused_at: float | None = None  # None when the log says that orders are stored
        self._stores_at = -math.inf  # when orders could be stored, unless a batch failed since

    def note_outcomes(self, outcomes: Sequence[Outcome]) -> None:
        """Takes note of a batch: one order that was stored is a proof, and what is stored already none."""
        if any(isinstance(each, Placed) for each in outcomes):
            self._refusal, self._stores_at = None, time.monotonic()
            if self._refused_at is not None and self._stores_at - self._refused_at > FAILURE_SHOWN_SECONDS:
                logger.info("orders are stored again")
                self._refused_at = None
            return
        problems = [each.problem for each in outcomes if isinstance(each, Refused)]
        if fault := next((each for each in problems if isinstance(each, _FAULTS)), None):
            self.note_refusal(fault)

    def note_refusal(self, refusal: DeskError) -> None:
        """Takes note that a batch, or all of its orders, could not be stored."""
        if self._refused_at is None:
            logger.warning("orders are refused: %s", refusal.for_operators)
        self._refusal, self._refused_at, self._stores_at = refusal, time.monotonic(), -math.inf

    def note_checked(self) -> None:
        """Takes note that an order could be stored now."""
        self._stores_at = time.monotonic()

    def note_unknown(self) -> None:
        """Takes note of a batch of which nobody knows whether it was stored."""
        self._stores_at = -math.inf

    @property
    def is_shown(self) -> bool:
        """Whether the last seconds show that orders can be stored."""
        return time.monotonic() - self._stores_at <= STORING_SHOWN_SECONDS

    def require_no_failure(self) -> None:
        """Raises LedgerUnavailable when orders could not be stored lately. Overload is no such failure."""
        if self._refused_at is None or time.monotonic() - self._refused_at > FAILURE_SHOWN_SECONDS:
            return
        if isinstance(self._refusal, LedgerUnavailable):
            raise self._refusal
        if isinstance(self._refusal, InternalError):
            detail = "Orders cannot be stored."
            raise LedgerUnavailable(detail, retry_after_seconds=1, server_said=self._refusal.server_said)
