"""What is written by a named query of its own, beside orders and closings: asked once, because twice it might do
harm."""

import asyncpg

from buydesk.backends.postgres.faults import raise_unless_of_an_item, unknown_outcome
from buydesk.backends.postgres.ledger import PostgresLedger
from buydesk.backends.postgres.sessions import FAULTS, Warned, fetching


async def write(ledger: PostgresLedger, query: str, *arguments: object) -> list[asyncpg.Record]:
    """The rows of a named query that writes.

    Raises Overloaded or LedgerUnavailable when it certainly did nothing, asyncpg.PostgresError when that is because of
    what it was given, and OutcomeUnknown when its answer was lost.
    """
    try:
        return await ledger.ask_once(fetching(query, *arguments))
    except asyncpg.PostgresError as error:
        raise_unless_of_an_item(error)
        raise
    except (*FAULTS, Warned) as error:
        raise unknown_outcome(error) from error
