"""Whether orders can be stored, as far as the last batches show it."""

import logging
import math
import time
from collections.abc import Sequence

from buydesk.errors import DeskError, InternalError, LedgerUnavailable, OutcomeUnknown, Overloaded
from buydesk.orders.model import Outcome, Placed, Refused

logger = logging.getLogger("buydesk.services.db_proxy")

# How long after orders could not be stored /readyz says so, if none was stored since, and how long the log waits before
# it says that they are stored again: a database that can hardly keep up would fill it.
FAILURE_SHOWN_SECONDS = 5.0
# For so long an order that was stored, or a look whether one could be, shows that orders can be stored.
STORING_SHOWN_SECONDS = 3.0
# Problems of the ledger's, not of an order; and those of them that waiting does not end.
_FAULTS = (InternalError, LedgerUnavailable, Overloaded)
_LASTING = (InternalError, LedgerUnavailable)


class StoringMonitor:
    """Keeps in mind whether orders can be stored, and logs when that changes, with the server's reason."""

    def __init__(self) -> None:
        self._failure: DeskError | None = None  # of the batches since something was stored, if any failed
        self._failures = 0  # how many of them did
        self._failed_at = -math.inf
        self._refused_at: float | None = None  # None when the log says that orders are stored
        self._stores_at = -math.inf  # when orders could be stored, unless a batch failed since

    def note_outcomes(self, outcomes: Sequence[Outcome]) -> None:
        """Takes note of a batch: one order that was stored is a proof, and what is stored already none."""
        if any(isinstance(each, Placed) for each in outcomes):
            self._failure, self._failures, self._stores_at = None, 0, time.monotonic()
            if self._refused_at is not None and self._stores_at - self._refused_at > FAILURE_SHOWN_SECONDS:
                logger.info("orders are stored again")
                self._refused_at = None
            return
        problems = [each.problem for each in outcomes if isinstance(each, Refused)]
        if fault := next((each for each in problems if isinstance(each, _FAULTS)), None):
            self.note_failure(fault)

    def note_failure(self, failure: DeskError) -> None:
        """Takes note that a batch, or all of its orders, could not be stored, or that nobody knows whether it was."""
        self._failures += 1
        self._failed_at, self._stores_at = time.monotonic(), -math.inf
        if not isinstance(self._failure, _LASTING):
            self._failure = failure
        if not isinstance(failure, OutcomeUnknown):
            if self._refused_at is None:
                logger.warning("orders are refused: %s", failure.for_operators)
            self._refused_at = self._failed_at

    def note_checked(self) -> None:
        """Takes note that an order could be stored now."""
        self._stores_at = time.monotonic()

    @property
    def is_shown(self) -> bool:
        """Whether the last seconds show that orders can be stored."""
        return time.monotonic() - self._stores_at <= STORING_SHOWN_SECONDS

    def require_no_failure(self) -> None:
        """Raises LedgerUnavailable when orders could not be stored lately, for a reason that waiting does not end."""
        if isinstance(self._failure, LedgerUnavailable) and self._failed_lately:
            raise self._failure
        if isinstance(self._failure, InternalError):
            self._require_none_lately()

    def require_progress(self) -> None:
        """Raises LedgerUnavailable when nothing was stored between two batches that failed: that one was too much is no
        failure."""
        if self._failures > 1:
            self._require_none_lately()

    @property
    def _failed_lately(self) -> bool:
        return time.monotonic() - self._failed_at <= FAILURE_SHOWN_SECONDS

    def _require_none_lately(self) -> None:
        if self._failure is not None and self._failed_lately:
            said = self._failure.server_said
            raise LedgerUnavailable("Orders cannot be stored.", retry_after_seconds=1, server_said=said)
