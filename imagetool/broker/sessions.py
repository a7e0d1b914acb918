"""Sessions of handshakes, so that any broker of a database, and one that was restarted, can go on with them.

    begun:  in the client's cookie alone (`tickets.py`)
    spent:  a row in the database; with the key pair's public half and evidence that was bound to both where it
            attested, without them where its evidence was refused

A nonce is used once: only one request puts the row there. It stays until the session is over, so a cookie that is
valid always finds it. Times are the database's.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, bindparam, delete, func, select
from sqlalchemy.dialects import postgresql, sqlite

from encfs.attestation.evidence import Endorsements, Evidence
from encfs.attestation.kbs import digest_of_json, kind_of_tee
from encfs.kbs import protocol
from imagetool.broker.tables import SESSIONS

_NONCE_SIZE = 32
#: How far ahead of this database's clock a session may have begun, milliseconds: a clock that was set back.
_MAX_AHEAD = 5_000
#: Most sessions that are deleted in one transaction.
_PURGE = 4_000


@dataclass(frozen=True, slots=True)
class Attested:
    """What a session is bound to: the public half of its key pair (JWK), and evidence that must have `report_data`.

    The report data is never stored: it follows from nonce and public key, so that a row in which somebody put another
    key does not fit its evidence.
    """

    public_key: dict[str, str]
    report_data: bytes = field(repr=False)
    evidence: Evidence


def bound(nonce: str, version: str, public_key: dict[str, str], evidence: Evidence) -> Attested:
    """Raises: FormatError where the key has no canonical form."""
    data = protocol.runtime_data(nonce, public_key, version)
    return Attested(public_key, digest_of_json(data), evidence)


@dataclass(frozen=True, slots=True)
class Session:
    """One handshake. `created` and `expires` in milliseconds since 1970."""

    nonce: str = field(repr=False)
    version: str
    tee: str
    created: int
    expires: int

    @property
    def id(self) -> str:
        """Its row's name, 32 hexadecimal digits."""
        return hashlib.sha256(self.nonce.encode()).hexdigest()[:32]

    @property
    def public_name(self) -> str:
        """What names it in the log, and tells nothing of it."""
        return hashlib.sha256(self.id.encode()).hexdigest()[:16]

    def holds_at(self, now: int) -> bool:
        """Whether it has begun and is not over yet."""
        return self.created - _MAX_AHEAD <= now < self.expires


def begin(version: str, tee: str, now: int, lifetime: int) -> Session:
    """A new session with its nonce. `now` and `lifetime` in milliseconds."""
    return Session(base64.b64encode(os.urandom(_NONCE_SIZE)).decode(), version, tee, now, now + lifetime)


def from_row(row: Any) -> tuple[Session, Attested] | None:
    """The session of a row of the table, and what it is bound to; None where its evidence was refused."""
    if not row.attested:
        return None
    certificates = tuple(base64.b64decode(one) for one in json.loads(row.certificates))
    evidence = Evidence(kind_of_tee(row.tee), row.evidence, Endorsements(certificates))
    attested = bound(row.nonce, row.version, json.loads(row.public_key), evidence)
    return Session(row.nonce, row.version, row.tee, row.created, row.expires), attested


def attest(connection: Connection, session: Session, proven: Attested) -> bool:
    """Whether the nonce was not used before; the session is attested then."""
    certificates = [base64.b64encode(one).decode() for one in proven.evidence.endorsements.certificates]
    return _spend(
        connection,
        session,
        attested=1,
        public_key=json.dumps(proven.public_key),
        evidence=proven.evidence.content,
        certificates=json.dumps(certificates).encode(),
    )


def refuse(connection: Connection, session: Session) -> bool:
    """Whether the nonce was not used before; it is used up then, for nothing."""
    return _spend(connection, session, attested=0, public_key=None, evidence=None, certificates=None)


def purge(connection: Connection, now: int) -> int:
    """Delete sessions that are over, not too many at once; how many are left."""
    connection.execute(_DELETE, {"now": now})
    return int(connection.execute(_COUNT).scalar_one())


def _spend(connection: Connection, session: Session, **members: object) -> bool:
    values = members | {
        "id": session.id,
        "nonce": session.nonce,
        "version": session.version,
        "tee": session.tee,
        "created": session.created,
        "expires": session.expires,
    }
    return connection.execute(_INSERT[connection.dialect.name], values).one_or_none() is not None


# Made once: making a statement takes longer than executing it.
_INSERT = {
    "sqlite": sqlite.insert(SESSIONS).on_conflict_do_nothing().returning(SESSIONS.c.id),
    "postgresql": postgresql.insert(SESSIONS).on_conflict_do_nothing().returning(SESSIONS.c.id),
}
_OVER = select(SESSIONS.c.id).where(SESSIONS.c.expires <= bindparam("now")).limit(_PURGE)
_DELETE = delete(SESSIONS).where(SESSIONS.c.id.in_(_OVER.scalar_subquery()))
_COUNT = select(func.count()).select_from(SESSIONS)
