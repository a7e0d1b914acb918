"""What alembic runs: all migrations on the connection that `database.migrate` hands over, in its transaction."""

from __future__ import annotations

from alembic import context

from imagetool.broker.tables import METADATA

context.configure(connection=context.config.attributes["connection"], target_metadata=METADATA)
context.run_migrations()
