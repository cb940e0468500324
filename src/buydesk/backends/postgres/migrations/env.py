"""What Alembic has to know to write a migration down as SQL (`buydesk.backends.postgres.migrate`)."""

from alembic import context

context.configure(dialect_name="postgresql")
context.run_migrations()
