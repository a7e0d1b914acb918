"""The schema of the broker's database. Migrations (`migrations/`) make it; a test compares both."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Column,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
)

METADATA = MetaData()

#: One row: the identity of the database, the policy, and a MAC over all that the owner has set (`state.py`).
STATE = Table(
    "state",
    METADATA,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("database_id", String(32), nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("policy", Text, nullable=False),
    Column("mac", LargeBinary, nullable=False),
)

#: Keys. `sealed` is AES-256-GCM (`vault.py`); `releases` counts what was handed out.
RESOURCES = Table(
    "resources",
    METADATA,
    Column("path", String(512), primary_key=True),
    Column("kind", String(16), nullable=False),
    Column("artifact_id", String(255)),
    Column("min_version", BigInteger),
    Column("revision", BigInteger, nullable=False),
    Column("nonce", LargeBinary, nullable=False),
    Column("sealed", LargeBinary, nullable=False),
    Column("releases", BigInteger, nullable=False),
    Column("created", BigInteger, nullable=False),
)

#: Versions that `imagetool release` published: what a content digest in the log was.
VERSIONS = Table(
    "versions",
    METADATA,
    Column("content_digest", String(80), primary_key=True),
    Column("artifact_id", String(255), nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("released", BigInteger, nullable=False),
)

#: Handshakes under way. Times in milliseconds since 1970, by the database's clock.
SESSIONS = Table(
    "sessions",
    METADATA,
    Column("id", String(32), primary_key=True),
    Column("nonce", String(64), nullable=False),
    Column("version", String(16), nullable=False),
    Column("tee", String(32), nullable=False),
    Column("created", BigInteger, nullable=False),
    Column("expires", BigInteger, nullable=False),
    Column("attested", Integer, nullable=False),
    Column("public_key", Text),
    Column("evidence", LargeBinary),
    Column("certificates", LargeBinary),
    Index("sessions_by_expiry", "expires"),
)

#: Refused evidence of an interval (`refusals.py`): entries of the log, by address; those without, by TEE and reason.
REFUSALS = Table(
    "refusals",
    METADATA,
    Column("interval", BigInteger, primary_key=True, autoincrement=False),
    Column("kind", String(16), primary_key=True),
    Column("name", String(64), primary_key=True),
    Column("count", BigInteger, nullable=False),
)

#: The log: what was decided and why (`log.py`).
DECISIONS = Table(
    "decisions",
    METADATA,
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("path", String(512), nullable=False),
    Column("released", Integer, nullable=False),
    Column("entry", Text, nullable=False),
    Column("hash", LargeBinary, nullable=False),
    Column("mac", LargeBinary, nullable=False),
    Index("decisions_by_path", "path", "released", "sequence"),
)
