"""How Alembic gets its connection: the one that `buydesk.backends.migrate` holds, lock included."""

from alembic import context

context.configure(connection=context.config.attributes["connection"])
context.run_migrations()
