"""The log: every decision and every change by the owner, in one chain over all brokers of a database.

    hash = SHA-256(hash before || entry)     entry: canonical JSON (RFC 8785) with its sequence number
    mac  = HMAC-SHA256(log key, hash)

The chain shows what was changed, dropped from its middle or put in; the MAC, under a key that comes from the KEK, that
an entry was written by a broker. An end that was cut off is seen by whoever kept an earlier `LogHead`, and by itself
where it reaches back beyond the owner's last change, whose epoch is authenticated apart from the log.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import rfc8785
from sqlalchemy import Connection, insert, select

from encfs.errors import FormatError, IntegrityError, UsageError
from encfs.strictjson import loads_object
from imagetool.broker.tables import DECISIONS
from imagetool.broker.vault import Vault

_GENESIS = bytes(32)
#: Events of the owner's changes, each of which leads to an epoch of its own.
_BY_OWNER = frozenset({"init", "key-added", "key-removed", "policy-set", "floor-raised"})
_MAX_ENTRY = 64 << 10
_PAGE = 1000


@dataclass(frozen=True, slots=True)
class LogHead:
    """Where the log ends: the sequence number of its last entry (0: none), and the hash there."""

    sequence: int
    hash: bytes

    def __str__(self) -> str:
        return f"{self.sequence}:{self.hash.hex()}"


def parse_head(text: str) -> LogHead:
    """Raises: UsageError."""
    number, _, digest = text.partition(":")
    if not (number.isascii() and number.isdecimal() and len(number) < 17 and len(digest) == 64):
        raise UsageError("an earlier head of the log is written SEQUENCE:HASH", hint="as --verify printed it")
    try:
        return LogHead(int(number), bytes.fromhex(digest))
    except ValueError:
        raise UsageError("the hash of an earlier head is not hexadecimal") from None


_LAST = select(DECISIONS.c.sequence, DECISIONS.c.hash).order_by(DECISIONS.c.sequence.desc()).limit(1)
_INSERT = insert(DECISIONS)


def append(
    connection: Connection, vault: Vault, *, time: int, event: str, path: str, members: Mapping[str, object]
) -> int:
    """Write an entry at the end, inside of a writing transaction; its sequence number. `time` in milliseconds."""
    last = connection.execute(_LAST).one_or_none()
    sequence, before = (last.sequence + 1, last.hash) if last is not None else (1, _GENESIS)
    entry = rfc8785.dumps({"sequence": sequence, "time": time, "event": event, "path": path, **members})  # type: ignore[dict-item]
    digest = hashlib.sha256(before + entry).digest()
    connection.execute(
        _INSERT,
        {
            "sequence": sequence,
            "path": path,
            "released": int(event == "released"),
            "entry": entry.decode(),
            "hash": digest,
            "mac": vault.mac("log", digest),
        },
    )
    return sequence


def entries(
    connection: Connection, *, path: str | None = None, released: bool | None = None, after: int = 0
) -> Iterator[dict[str, object]]:
    """The entries as documents, oldest first, in constant memory. Nothing of them is checked: see `verify`."""
    while True:
        query = select(DECISIONS.c.sequence, DECISIONS.c.entry).where(DECISIONS.c.sequence > after)
        if path is not None:
            query = query.where(DECISIONS.c.path == path)
        if released is not None:
            query = query.where(DECISIONS.c.released == int(released))
        page = connection.execute(query.order_by(DECISIONS.c.sequence).limit(_PAGE)).all()
        for row in page:
            yield loads_object(row.entry.encode(), limit=_MAX_ENTRY, what=f"entry {row.sequence} of the log")
        if len(page) < _PAGE:
            return
        after = page[-1].sequence


def verify(connection: Connection, vault: Vault, earlier: LogHead | None = None, *, epoch: int = 0) -> LogHead:
    """Check the whole chain, and that an earlier head is in it; where it ends.

    `epoch` is the state's (`state.py`), looked at before: the owner's change that led to it has to be in the log.

    Raises: IntegrityError naming the first entry that is wrong.
    """
    head, changed = LogHead(0, _GENESIS), 0
    found = earlier is None or earlier == head
    while True:
        page = connection.execute(
            select(DECISIONS).where(DECISIONS.c.sequence > head.sequence).order_by(DECISIONS.c.sequence).limit(_PAGE)
        ).all()
        for row in page:
            head, document = _checked(row.sequence, row.entry, row.hash, row.mac, row.path, row.released, head, vault)
            found = found or head == earlier
            if document.get("event") in _BY_OWNER and isinstance(number := document.get("epoch"), int):
                changed = max(changed, number)
        if len(page) < _PAGE:
            break
    if not found:
        raise IntegrityError(
            f"the log does not hold the earlier head {earlier}: its end was cut off, or it was rewritten",
            hint="compare with a backup or an exported log",
        )
    if changed < epoch:
        raise IntegrityError(
            f"the log ends before the owner's last change (epoch {epoch}): its end was cut off",
            hint="compare with a backup or an exported log",
        )
    return head


def _checked(
    sequence: int, entry: str, digest: bytes, mac: bytes, path: str, released: int, before: LogHead, vault: Vault
) -> tuple[LogHead, dict[str, object]]:
    wrong = IntegrityError(
        f"the log is not as it was written: entry {before.sequence + 1} is missing or altered",
        hint="compare with a backup or an exported log",
    )
    if sequence != before.sequence + 1:
        raise wrong
    if not hmac.compare_digest(hashlib.sha256(before.hash + entry.encode()).digest(), digest):
        raise wrong
    if not vault.check("log", digest, mac):
        raise wrong
    try:
        document = loads_object(entry.encode(), limit=_MAX_ENTRY, what="the entry")
    except FormatError:
        raise wrong from None
    # The columns that queries go by are copies of what the entry says.
    if (document.get("sequence"), document.get("path")) != (sequence, path):
        raise wrong
    if (document.get("event") == "released") != bool(released):
        raise wrong
    return LogHead(sequence, digest), document
