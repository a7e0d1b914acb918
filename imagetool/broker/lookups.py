"""What a request for a key needs of the database, in one statement; and the count of a key's releases."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, bindparam, select, update

from imagetool.broker import sessions
from imagetool.broker.sessions import Attested, Session
from imagetool.broker.tables import RESOURCES, SESSIONS, STATE, VERSIONS
from imagetool.broker.vault import SealedRow


@dataclass(frozen=True, slots=True)
class Found:
    """What the database has for a request: the epoch, the session, the key's sealed row, the version of the content."""

    epoch: int
    session: tuple[Session, Attested] | None
    row: SealedRow | None
    version: int | None


# Made once: making a statement takes longer than executing it.
_LOOK_UP = select(
    STATE.c.epoch,
    *SESSIONS.c,
    RESOURCES.c.nonce.label("key_nonce"),
    RESOURCES.c.sealed,
    VERSIONS.c.version.label("content_version"),
).select_from(
    STATE.outerjoin(SESSIONS, SESSIONS.c.id == bindparam("session"))
    .outerjoin(RESOURCES, RESOURCES.c.path == bindparam("wanted"))
    .outerjoin(VERSIONS, VERSIONS.c.content_digest == bindparam("digest"))
)
_COUNT = update(RESOURCES).where(RESOURCES.c.path == bindparam("counted")).values(releases=RESOURCES.c.releases + 1)
_COUNT_BELOW = _COUNT.where(RESOURCES.c.releases < bindparam("most"))


def look_up(connection: Connection, session: str, path: str, content_digest: str | None) -> Found:
    """Everything about a request, of one moment. `session` is its id."""
    row = connection.execute(_LOOK_UP, {"session": session, "wanted": path, "digest": content_digest}).one()
    return Found(
        row.epoch,
        sessions.from_row(row) if row.id is not None else None,
        SealedRow(row.key_nonce, row.sealed) if row.sealed is not None else None,
        row.content_version,
    )


def count_release(connection: Connection, path: str, most: int | None) -> bool:
    """Whether the key was handed out fewer than `most` times; it is counted then. In a transaction that writes."""
    if most is None:
        return connection.execute(_COUNT, {"counted": path}).rowcount == 1
    return connection.execute(_COUNT_BELOW, {"counted": path, "most": most}).rowcount == 1
