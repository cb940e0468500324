"""PostgreSQL's faults: what an error of the server or the driver means for a batch, or a read."""

import asyncpg

from buydesk.backends.postgres.sessions import Warned
from buydesk.errors import InternalError, LedgerUnavailable, OutcomeUnknown, Overloaded

# SQLSTATE classes in which PostgreSQL says that no item can be placed now: read-only, not our tables or rights, out of
# resources, I/O errors.
_CANNOT_WORK = ("25", "42", "53", "58")
# After these a batch may well be stored the next time.
_TOOK_TOO_LONG = (asyncpg.QueryCanceledError, asyncpg.LockNotAvailableError, asyncpg.TransactionRollbackError)


def is_definite(error: asyncpg.PostgresError) -> bool:
    """Whether the transaction was certainly rolled back: the server said so and lives, or it was never asked.

    Lost connections (class 08) are PostgresErrors of asyncpg too, and a session that is ended (fatal; class 57P) may be
    past its commit.
    """
    state = error.sqlstate or "08000"
    return error.severity_en in (None, "ERROR") and not state.startswith(("08", "40003", "57P"))


def raise_unless_of_an_item(error: asyncpg.PostgresError) -> None:
    """Returns when the batch was rolled back because of something in it; otherwise raises what it means."""
    if not is_definite(error):
        raise unknown_outcome(error) from error
    if isinstance(error, _TOOK_TOO_LONG):
        detail = "The database took too long."
        raise Overloaded(detail, retry_after_seconds=1, server_said=_said(error)) from error
    if error.sqlstate[:2] in _CANNOT_WORK:
        raise unavailable(error) from error


def unavailable(error: Exception) -> LedgerUnavailable:
    """The error for what certainly was not done, because PostgreSQL cannot be used."""
    if isinstance(error, (asyncpg.UndefinedTableError, asyncpg.UndefinedColumnError, asyncpg.UndefinedFunctionError)):
        detail = "The database does not have the tables that this program needs: run `buydesk migrate`."
    elif isinstance(error, asyncpg.LockNotAvailableError):
        detail = "Another session of PostgreSQL holds a lock that the ledger needs."
    else:
        detail = f"PostgreSQL cannot be used ({type(error).__name__})."
    return LedgerUnavailable(detail, retry_after_seconds=1, server_said=_said(error))


def not_storable(error: asyncpg.PostgresError) -> InternalError:
    """The error for the one order that PostgreSQL refused to store."""
    detail = "The order cannot be stored; it certainly was not. It has been logged."
    return InternalError(detail, server_said=_said(error))


def unknown_outcome(error: Exception) -> OutcomeUnknown:
    """The error for a batch whose answer was lost: it may be stored."""
    return OutcomeUnknown(f"PostgreSQL gave no answer ({type(error).__name__}).", server_said=_said(error))


def _said(error: Exception) -> str:
    """The server's own words, without the values that it puts into its detail."""
    return str(error.args[0]) if isinstance(error, (asyncpg.PostgresError, Warned)) else ""
