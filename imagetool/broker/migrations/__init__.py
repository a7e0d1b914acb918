"""Migrations of the broker's database, by alembic; run from Python only (`database.migrate`)."""

from __future__ import annotations

#: The newest revision, so that a server need not load alembic to see that it is up to date.
HEAD = "0002"
