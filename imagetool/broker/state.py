"""What the owner has set: the policy, and for each key its floor. One state, authenticated as a whole, with an epoch.

A MAC under the KEK covers the epoch, the policy and the list of keys with their floors and revisions; each sealed key
is bound to its revision. So whoever writes to the database without the KEK can neither change a rule or floor nor bring
a single old row back. Putting the whole database back is seen by a mark outside of it (`rollback.py`), and by every
broker that runs.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import rfc8785
from sqlalchemy import Connection, delete, insert, select, update

from encfs.errors import ConflictError, FormatError, IntegrityError, NotFoundError, RollbackError
from encfs.keys.secrets import wipe
from encfs.strictjson import show_name
from imagetool.broker.policy import Policy, parse_policy
from imagetool.broker.tables import RESOURCES, STATE
from imagetool.broker.vault import RowIdentity, SealedRow, Vault

#: Kinds of resources: a key, released with its refusals; or bytes that are released as they are.
KEY, OPAQUE = "key", "opaque"
_ALTERED = "restore it from a backup of yours; whoever wrote to it did not have the broker's KEK"


@dataclass(frozen=True, slots=True)
class Entry:
    """One key: its floor, and the epoch in which its row was sealed."""

    path: str
    kind: str
    artifact_id: str | None
    min_version: int | None
    revision: int


@dataclass(frozen=True, slots=True)
class State:
    """A state whose MAC was checked."""

    database_id: str
    epoch: int
    policy_text: str
    policy: Policy = field(repr=False)
    entries: Mapping[str, Entry] = field(repr=False)

    def identity(self, path: str) -> RowIdentity:
        """What the sealed row of a key is bound to. Raises: KeyError."""
        return _identity(self.entries[path], self.policy)


def database_id(connection: Connection) -> str | None:
    """The database's identity, not authenticated yet; None where it was never initialised."""
    return connection.execute(select(STATE.c.database_id)).scalar()


def create_state(connection: Connection) -> str:
    """Give a new database its identity; `store_initial` follows. Raises: ConflictError where it has one."""
    if database_id(connection) is not None:
        raise ConflictError(
            "the database belongs to a broker already", hint="copy that broker's directory to run a second one on it"
        )
    return secrets.token_hex(16)


def store_initial(connection: Connection, vault: Vault) -> State:
    """An empty policy, which denies everything, and no keys."""
    state = State(vault.database_id, 1, "", Policy({}), {})
    connection.execute(
        insert(STATE).values(id=1, database_id=vault.database_id, epoch=1, policy="", mac=_mac(vault, state))
    )
    return state


_EPOCH = select(STATE.c.epoch)


def epoch(connection: Connection) -> int:
    """The epoch as the database says it: to see whether something changed."""
    return int(connection.execute(_EPOCH).scalar_one())


def load_state(connection: Connection, vault: Vault, *, judged: bool = True) -> State:
    """The state, checked; in a transaction, or all of it from one moment otherwise not guaranteed.

    Raises: IntegrityError where it was altered, or belongs to another KEK; FormatError for a policy that is no longer
    accepted (not `judged`: only where it is malformed).
    """
    row = connection.execute(select(STATE)).one_or_none()
    if row is None or row.database_id != vault.database_id:
        raise IntegrityError("the broker's database lost its state, or is another one", hint=_ALTERED)
    columns = (RESOURCES.c.path, RESOURCES.c.kind, RESOURCES.c.artifact_id, RESOURCES.c.min_version)
    entries = {
        found.path: Entry(found.path, found.kind, found.artifact_id, found.min_version, found.revision)
        for found in connection.execute(select(*columns, RESOURCES.c.revision))
    }
    unread = State(row.database_id, row.epoch, row.policy, Policy({}), entries)
    if not vault.check("state", _content(unread), row.mac):
        raise IntegrityError(
            "the broker's database was altered: its policy, floors or list of keys are not those that were set",
            hint=_ALTERED,
        )
    try:
        return replace(unread, policy=parse_policy(row.policy, judged=judged))
    except FormatError as error:
        raise FormatError(f"the policy in the database: {error.message}", hint=error.hint) from None


def add_key(connection: Connection, vault: Vault, path: str, kind: str, content: bytes | bytearray, now: int) -> State:
    """Seal a key, which the caller wipes, under the rule that holds for its path. Raises: ConflictError."""
    state = load_state(connection, vault)
    if path in state.entries:
        raise ConflictError(f"the broker has a key {path} already", hint="remove it first, or choose another path")
    entry = Entry(path, kind, None, None, state.epoch + 1)
    row = vault.seal(_identity(entry, state.policy), content)
    connection.execute(
        insert(RESOURCES).values(
            path=path, kind=kind, revision=entry.revision, nonce=row.nonce, sealed=row.sealed, releases=0, created=now
        )
    )
    return _store(connection, vault, replace(state, entries={**state.entries, path: entry}))


def remove_key(connection: Connection, vault: Vault, path: str) -> State:
    """Raises: NotFoundError."""
    state = load_state(connection, vault)
    _require(state, path)
    connection.execute(delete(RESOURCES).where(RESOURCES.c.path == path))
    return _store(
        connection, vault, replace(state, entries={name: one for name, one in state.entries.items() if name != path})
    )


def set_policy(connection: Connection, vault: Vault, text: str) -> tuple[State, list[str]]:
    """Put a policy in force: the new state, and the paths whose rule changed, which were sealed anew.

    Raises: FormatError for a malformed policy; IntegrityError where a key does not open.
    """
    state = load_state(connection, vault, judged=False)
    changed = replace(state, policy_text=text, policy=parse_policy(text))
    entries = dict(state.entries)
    moved = [path for path in sorted(entries) if _rule_of(state, path) != _rule_of(changed, path)]
    for path in moved:
        entry = replace(entries[path], revision=state.epoch + 1)
        entries[path] = _reseal(connection, vault, state, entry, changed.policy)
    return _store(connection, vault, replace(changed, entries=entries)), moved


def raise_floor(connection: Connection, vault: Vault, path: str, artifact_id: str, version: int) -> State:
    """Let a key be for one artifact id and no version below `version` from now on. A floor never goes down.

    Raises: NotFoundError; RollbackError for a version below the floor; ConflictError for another artifact's id or an
    opaque resource, which cannot carry a floor.
    """
    state = load_state(connection, vault)
    entry = _require(state, path)
    if entry.kind != KEY:
        raise ConflictError(f"{path} is an opaque resource, which carries no floor", hint="add it as a key")
    if entry.artifact_id not in (None, artifact_id):
        raise ConflictError(
            f"the key {path} is for the artifact {show_name(entry.artifact_id)}, not for {show_name(artifact_id)}",
            hint="give each line of releases a key of its own",
        )
    if entry.min_version is not None and version < entry.min_version:
        raise RollbackError(
            f"version {version} is below the floor {entry.min_version} of the key {path}",
            hint="a floor never goes down; release a newer version",
        )
    entry = replace(entry, artifact_id=artifact_id, min_version=version, revision=state.epoch + 1)
    entry = _reseal(connection, vault, state, entry, state.policy)
    return _store(connection, vault, replace(state, entries={**state.entries, path: entry}))


def open_key(connection: Connection, vault: Vault, state: State, path: str) -> bytearray:
    """The content of a key, to be wiped by the caller. Raises: NotFoundError, IntegrityError."""
    _require(state, path)
    columns = (RESOURCES.c.nonce, RESOURCES.c.sealed)
    row = connection.execute(select(*columns).where(RESOURCES.c.path == path)).one_or_none()
    if row is None:
        raise IntegrityError(f"the key {path} is missing in the broker's database", hint=_ALTERED)
    return vault.open(state.identity(path), SealedRow(row.nonce, row.sealed))


def _reseal(connection: Connection, vault: Vault, state: State, entry: Entry, policy: Policy) -> Entry:
    content = open_key(connection, vault, state, entry.path)
    try:
        row = vault.seal(_identity(entry, policy), content)
    finally:
        wipe(content)
    connection.execute(
        update(RESOURCES)
        .where(RESOURCES.c.path == entry.path)
        .values(
            artifact_id=entry.artifact_id,
            min_version=entry.min_version,
            revision=entry.revision,
            nonce=row.nonce,
            sealed=row.sealed,
        )
    )
    return entry


def _store(connection: Connection, vault: Vault, state: State) -> State:
    stored = replace(state, epoch=state.epoch + 1)
    connection.execute(
        update(STATE)
        .where(STATE.c.id == 1)
        .values(epoch=stored.epoch, policy=stored.policy_text, mac=_mac(vault, stored))
    )
    return stored


def _require(state: State, path: str) -> Entry:
    try:
        return state.entries[path]
    except KeyError:
        raise NotFoundError(f"the broker has no key {path}", hint="imagetool broker key list shows them") from None


def _identity(entry: Entry, policy: Policy) -> RowIdentity:
    rule = policy.rule_for(entry.path)
    return RowIdentity(
        entry.path,
        entry.kind,
        rule.digest if rule is not None else "",
        entry.artifact_id,
        entry.min_version,
        entry.revision,
    )


def _rule_of(state: State, path: str) -> str:
    return state.identity(path).rule


def _mac(vault: Vault, state: State) -> bytes:
    return vault.mac("state", _content(state))


def _content(state: State) -> bytes:
    return rfc8785.dumps(
        {
            "database": state.database_id,
            "epoch": state.epoch,
            "policy": state.policy_text,
            "keys": [
                [one.path, one.kind, one.artifact_id, one.min_version, one.revision]
                for _, one in sorted(state.entries.items())
            ],
        }
    )
