"""Sessions of handshakes in the database, so that any broker, and one that was restarted, can go on with them.

    new: has a nonce  ->  attested: has the key pair's public half and the evidence that was bound to both

A nonce is used once: attesting is one conditional update. Times are the database's.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import secrets
from dataclasses import dataclass, field

from sqlalchemy import Connection, delete, func, insert, select, update

from encfs.attestation.evidence import Endorsements, Evidence
from encfs.attestation.kbs import digest_of_json, kind_of_tee
from encfs.kbs import protocol
from imagetool.broker.tables import SESSIONS

_NONCE_SIZE = 32
#: How far ahead of this database's clock a session may have begun, milliseconds: a clock that was set back.
_MAX_AHEAD = 5_000
#: Most sessions that are deleted in one transaction.
_PURGE = 2_000


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
    """One handshake. `expires` in milliseconds since 1970."""

    id: str = field(repr=False)
    nonce: str = field(repr=False)
    version: str
    tee: str
    expires: int
    attested: Attested | None = None

    @property
    def public_name(self) -> str:
        """What names it in the log: its id itself is a credential until it expires."""
        return hashlib.sha256(self.id.encode()).hexdigest()[:16]


def create(connection: Connection, version: str, tee: str, now: int, lifetime: int) -> Session:
    """A new session. `now` and `lifetime` in milliseconds."""
    session = Session(
        secrets.token_hex(16), base64.b64encode(os.urandom(_NONCE_SIZE)).decode(), version, tee, now + lifetime
    )
    connection.execute(
        insert(SESSIONS).values(
            id=session.id,
            nonce=session.nonce,
            version=version,
            tee=tee,
            created=now,
            expires=session.expires,
            attested=0,
        )
    )
    return session


def find(connection: Connection, identity: str, now: int) -> Session | None:
    """A session that has not expired."""
    row = connection.execute(select(SESSIONS).where(SESSIONS.c.id == identity)).one_or_none()
    if row is None or not row.created - _MAX_AHEAD <= now < row.expires:
        return None
    attested = None
    if row.attested:
        certificates = tuple(base64.b64decode(one) for one in json.loads(row.certificates))
        evidence = Evidence(kind_of_tee(row.tee), row.evidence, Endorsements(certificates))
        attested = bound(row.nonce, row.version, json.loads(row.public_key), evidence)
    return Session(row.id, row.nonce, row.version, row.tee, row.expires, attested)


def attest(connection: Connection, identity: str, proven: Attested) -> bool:
    """Whether the session was new and is attested now: only one of several requests with its nonce is."""
    certificates = [base64.b64encode(one).decode() for one in proven.evidence.endorsements.certificates]
    done = connection.execute(
        update(SESSIONS)
        .where(SESSIONS.c.id == identity, SESSIONS.c.attested == 0)
        .values(
            attested=1,
            public_key=json.dumps(proven.public_key),
            evidence=proven.evidence.content,
            certificates=json.dumps(certificates).encode(),
        )
    )
    return done.rowcount == 1


def end(connection: Connection, identity: str) -> None:
    """Forget a session whose evidence was refused: its nonce is spent."""
    connection.execute(delete(SESSIONS).where(SESSIONS.c.id == identity))


def purge(connection: Connection, now: int) -> int:
    """Delete expired sessions, not too many at once; how many are left."""
    old = select(SESSIONS.c.id).where(SESSIONS.c.expires <= now).limit(_PURGE)
    connection.execute(delete(SESSIONS).where(SESSIONS.c.id.in_(old.scalar_subquery())))
    return int(connection.execute(select(func.count()).select_from(SESSIONS)).scalar_one())
