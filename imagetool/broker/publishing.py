"""A new version of a line of artifacts, as the broker sees it: the floor moves, and who is refused from now on.

The artifact was made and pushed before: whoever asks in between still gets the key for the old version.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from sqlalchemy import Connection, delete, insert, select

from encfs.artifact import LoadedArtifact, open_payload
from encfs.errors import ConflictError, WrongKeyError
from encfs.format.descriptor import ContentDescriptor
from encfs.kbs.resource import recipient_key
from encfs.keys.recipients import NamedKey, Recipient, unwrap_with_key
from encfs.keys.secrets import SymmetricKey, wipe
from encfs.strictjson import show_name
from encfs.trust import KeyBinding
from imagetool.broker import log, state
from imagetool.broker.decisions import binding_of
from imagetool.broker.opening import OpenedBroker
from imagetool.broker.state import State
from imagetool.broker.tables import VERSIONS

_MAX_CONSUMERS = 10_000


@dataclass(frozen=True, slots=True)
class Consumer:
    """Who was given the key, by what its evidence shows, and what it opened with it last."""

    name: str
    tee: str
    client: str
    content_digest: str | None
    version: int | None
    released: int

    def to_json(self) -> dict[str, object]:
        return {
            "consumer": self.name,
            "tee": self.tee,
            "client": self.client,
            "content_digest": self.content_digest,
            "version": self.version,
            "last_release": self.released,
        }


@dataclass(frozen=True, slots=True)
class Release:
    """One version of a line: the content digests of its artifacts, several where an image is for several platforms."""

    artifact_id: str
    version: int
    digests: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Publication:
    """What a release changed. `conflicts` are what of the policy stands against the new version."""

    floor_before: int | None
    refused: tuple[Consumer, ...]
    conflicts: tuple[str, ...]


class HeldKey:
    """A key that the owner holds, as a provider: for opening what was encrypted to it."""

    def __init__(self, key: SymmetricKey, uri: str) -> None:
        self._key, self.uri = key, uri

    def unwrap(self, recipients: Sequence[Recipient], content_digest: str) -> bytearray:
        return unwrap_with_key(self._key, recipients, content_digest, self.uri)

    def close(self) -> None:
        self._key.wipe()


def held_key(opened: OpenedBroker, path: str) -> SymmetricKey:
    """The key of a resource, its `kid` being the resource; the caller wipes it.

    Raises: NotFoundError; KeyFileError for an opaque resource that is not 32 bytes.
    """
    with opened.database.transaction(durable=False) as connection:
        current = state.load_state(connection, opened.vault)
        return SymmetricKey(state.open_key(connection, opened.vault, current, path), f"kbs:///{path}")


@contextmanager
def held_provider(opened: OpenedBroker, path: str) -> Iterator[HeldKey]:
    """The key of a resource as a provider. Raises: as `held_key`."""
    provider = HeldKey(held_key(opened, path), f"kbs:///{path}")
    try:
        yield provider
    finally:
        provider.close()


def held_recipient(opened: OpenedBroker, path: str) -> tuple[NamedKey | SymmetricKey, KeyBinding] | None:
    """What to encrypt to for consumers of a resource, which the caller wipes, and what they refuse to open with it.

    None where the broker has no such resource. Raises: KeyFileError for an opaque resource that is no key.
    """
    with opened.database.transaction(durable=False) as connection:
        current = state.load_state(connection, opened.vault)
        entry = current.entries.get(path)
        if entry is None:
            return None
        content = state.open_key(connection, opened.vault, current, path)
    uri = f"kbs:///{path}"
    try:
        key, binding = recipient_key(content, uri)
    finally:
        wipe(content)
    if entry.kind == state.KEY:
        binding = binding_of(entry, current.policy.rule_for(path))
    return (SymmetricKey(key.secret, uri) if isinstance(key, SymmetricKey) else NamedKey(key, uri)), binding


def held_binding(opened: OpenedBroker, path: str) -> KeyBinding:
    """The refusals that go along with a broker's key, or would with one of that name. Raises: as `load_state`."""
    current = opened.load_state()
    return binding_of(current.entries.get(path), current.policy.rule_for(path))


def floor_of(opened: OpenedBroker, path: str) -> int | None:
    """The lowest version that the key is for. Raises: as `load_state`."""
    entry = opened.load_state().entries.get(path)
    return entry.min_version if entry is not None else None


def require_opens(artifact: LoadedArtifact, provider: HeldKey) -> None:
    """Raises: WrongKeyError where the key does not open the artifact."""
    try:
        open_payload(artifact, [provider])
    except WrongKeyError:
        raise WrongKeyError(
            f"the broker's key {provider.uri} does not open the artifact",
            hint=f"encrypt it to that key: -r '{provider.uri}?broker=DIR'",
        ) from None


def one_release(contents: Sequence[ContentDescriptor]) -> Release:
    """The version that artifacts make together. Raises: ConflictError where they are not all of one."""
    first = contents[0]
    for content in contents:
        if (content.id, content.version) != (first.id, first.version):
            raise ConflictError(
                f"the index has version {first.version} of {show_name(first.id)} and version {content.version} of "
                f"{show_name(content.id)}: it is not one release",
                hint="encrypt the image for all its platforms at once, or release one with --platform",
            )
    return Release(first.id, first.version, tuple(dict.fromkeys(content.digest for content in contents)))


def publish(opened: OpenedBroker, path: str, release: Release) -> Publication:
    """Let the key be for this version and later ones of the line. Its artifacts were checked before, and open with it.

    Raises: RollbackError, ConflictError, NotFoundError.
    """
    opened.check_mark()
    before = floor_of(opened, path)
    with opened.database.transaction() as connection:
        now = opened.database.now(connection)
        after = state.raise_floor(connection, opened.vault, path, release.artifact_id, release.version)
        for digest in release.digests:
            connection.execute(delete(VERSIONS).where(VERSIONS.c.content_digest == digest))
            connection.execute(
                insert(VERSIONS).values(
                    content_digest=digest, artifact_id=release.artifact_id, version=release.version, released=now
                )
            )
        log.append(
            connection,
            opened.vault,
            time=now,
            event="floor-raised",
            path=path,
            members={
                "epoch": after.epoch,
                "artifact_id": release.artifact_id,
                "version": release.version,
                "content_digests": list(release.digests),
            },
        )
    opened.settle(after)
    with opened.database.reading() as connection:
        versions = _versions(connection, release.artifact_id)
        refused = [one for one in _consumers(connection, path, versions) if one.content_digest not in release.digests]
    others = [one for one, version in versions.items() if version == release.version and one not in release.digests]
    return Publication(
        before,
        tuple(one for one in refused if one.version is None or one.version < release.version),
        tuple(_conflicts(after, path, release, others)),
    )


def _versions(connection: Connection, artifact_id: str) -> dict[str, int]:
    columns = (VERSIONS.c.content_digest, VERSIONS.c.version)
    rows = connection.execute(select(*columns).where(VERSIONS.c.artifact_id == artifact_id))
    return {row.content_digest: row.version for row in rows}


def _consumers(connection: Connection, path: str, versions: Mapping[str, int]) -> list[Consumer]:
    """Everybody who was given the key, with their last release."""
    found: dict[str, Consumer] = {}
    for entry in log.entries(connection, path=path, released=True):
        name = _name(entry)
        digest, moment = entry.get("content_digest"), entry.get("time")
        if name not in found and len(found) >= _MAX_CONSUMERS:
            continue
        found[name] = Consumer(
            name,
            str(entry.get("tee")),
            str(entry.get("client")),
            digest if isinstance(digest, str) else None,
            versions.get(digest) if isinstance(digest, str) else None,
            moment if isinstance(moment, int) else 0,
        )
    return list(found.values())


def _name(entry: Mapping[str, object]) -> str:
    """What tells one consumer from another: its TPM's key or its chip, else its address."""
    claims = entry.get("claims")
    if isinstance(claims, dict):
        for claim in ("attestation_key", "chip_id"):
            value = claims.get(claim)
            if isinstance(value, str) and value.strip("0"):
                return f"{claim.replace('_', ' ')} {value[:16]}"
    return f"address {entry.get('client')}"


def _conflicts(after: State, path: str, release: Release, others: Sequence[str]) -> list[str]:
    rule = after.policy.rule_for(path)
    found: list[str] = []
    if rule is None:
        found.append(f"no rule of the policy is for {path}: nobody gets the key")
    else:
        if rule.content_digests and (missing := [one for one in release.digests if one not in rule.content_digests]):
            found.append(
                f"the rule {rule.pattern} is for other content: add {', '.join(missing)} to its content_digests"
            )
        if rule.artifact_id not in (None, release.artifact_id):
            found.append(f"the rule {rule.pattern} is for the artifact {rule.artifact_id}")
        if rule.min_version is not None and release.version < rule.min_version:
            found.append(f"the rule {rule.pattern} has the floor {rule.min_version}, above this version")
    if others:
        found.append(f"other content was released as version {release.version} before, and is not below the floor")
    return found
