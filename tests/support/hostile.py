"""What an adversary does to an artifact: other documents and blobs, with every digest that he may write made to fit.

The adversary owns the store: he writes manifests and keeps the digests in them consistent, and he serves other bytes
under a segment's or tree's digest, since random access checks no digest of a whole blob.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from encfs.artifact import load_artifact, open_artifact
from encfs.errors import EncfsError
from encfs.format.descriptor import (
    CONTENT_TYPE,
    KEYRING_TYPE,
    MANIFEST_TYPE,
    SIGNATURE_TYPE,
    ArtifactManifest,
    ContentDescriptor,
    parse_content,
    parse_manifest,
)
from encfs.keys.keyring import Keyring
from encfs.keys.payload import parse_payload
from encfs.keys.providers import KeyProvider, provider_from_uri
from encfs.oci.blobs import BlobSource
from encfs.trust import TrustPolicy
from tests.support.artifacts import ARTIFACT_ID, Keys, encrypt_tree
from tests.support.memory import MemoryStore


@dataclass(frozen=True, slots=True)
class Victim:
    """An artifact in memory, what it says when nobody has touched it, and who may read it."""

    store: MemoryStore
    plaintext: bytes
    keys: Keys
    version: int
    provider: KeyProvider = field(repr=False)

    @property
    def index(self) -> ArtifactManifest:
        assert self.store.latest is not None
        return parse_manifest(self.store.latest.content)

    @property
    def content(self) -> ContentDescriptor:
        return parse_content(self.blob(self.index.config.digest))

    @property
    def keyring(self) -> Keyring:
        return load_artifact(self.store).keyring

    @property
    def signatures(self) -> list[bytes]:
        return [self.blob(item.digest) for item in self.index.signatures]

    @property
    def tree_digest(self) -> str:
        return self.content.volumes[0].tree_digest

    @property
    def segment_digest(self) -> str:
        return self.content.volumes[0].segments[0].digest

    @property
    def trust(self) -> TrustPolicy:
        """Its owner's key and id, and its own version as the floor."""
        return TrustPolicy(keys=(self.keys.verifier,), artifact_id=ARTIFACT_ID, min_version=self.version)

    @property
    def secret_payload(self) -> bytes:
        """The payload's bytes, as every recipient knows them."""
        return bytes(self.keyring.open([self.provider]))

    @property
    def volume_key(self) -> bytes:
        return parse_payload(self.secret_payload, self.content.payload_commitment).volumes[0].key

    def blob(self, digest: str) -> bytes:
        return bytes(self.store.blobs[digest])

    def with_blob(self, digest: str, content: bytes | bytearray) -> MemoryStore:
        """Other bytes under the same digest; a bytearray may change later."""
        store = clone(self.store)
        store.blobs[digest] = content
        return store

    def with_documents(
        self,
        *,
        content: bytes | None = None,
        keyring: bytes | None = None,
        signatures: Sequence[bytes] | None = None,
    ) -> MemoryStore:
        """Other documents, and a manifest that names them by their right digests and sizes."""
        store = clone(self.store)
        assert store.latest is not None
        manifest = json.loads(store.latest.content)
        if content is not None:
            manifest["config"] = _written(store, content, CONTENT_TYPE)
        layers = manifest["layers"]
        if keyring is not None:
            layers = [item for item in layers if item["mediaType"] != KEYRING_TYPE]
            layers.append(_written(store, keyring, KEYRING_TYPE))
        if signatures is not None:
            layers = [item for item in layers if item["mediaType"] != SIGNATURE_TYPE]
            layers += [_written(store, item, SIGNATURE_TYPE) for item in signatures]
        manifest["layers"] = layers
        return with_manifest(store, json.dumps(manifest).encode())


def make_victim(
    tree: Path, keys: Keys, *, version: int = 1, hash_name: str = "blake3", frame_size: int = 4096
) -> Victim:
    """Encrypt `tree` into memory and read it once."""
    store = MemoryStore()
    encrypt_tree(tree, store, keys, version=version, hash_name=hash_name, frame_size=frame_size)
    provider = provider_from_uri(str(keys.recipient_file))
    trust = TrustPolicy(keys=(keys.verifier,), artifact_id=ARTIFACT_ID, min_version=version)
    return Victim(store, read_all(store, [provider], trust), keys, version, provider)


def read_all(source: BlobSource, keys: Sequence[KeyProvider], trust: TrustPolicy) -> bytes:
    """The plaintext of all volumes."""
    with open_artifact(source, keys=keys, trust=trust) as artifact:
        return b"".join(bytes(volume.read(0, volume.size)) for volume in artifact.volumes)


def attack(victim: Victim, store: BlobSource, trust: TrustPolicy | None = None) -> EncfsError | None:
    """The refusal that reading from `store` meets, or None where it gives exactly the victim's plaintext.

    Wrong bytes fail the test, and so does every exception that is no EncfsError. A message is one line.
    """
    refusal: EncfsError | None = None
    try:
        plaintext = read_all(store, [victim.provider], trust or victim.trust)
    except EncfsError as error:
        refusal = error
    if refusal is None:
        assert plaintext == victim.plaintext
    else:
        assert refusal.message
        assert "\n" not in str(refusal)
    return refusal


def clone(store: MemoryStore) -> MemoryStore:
    """A store that can be changed without changing the other."""
    other = copy.copy(store)
    other.blobs, other.tags = dict(store.blobs), dict(store.tags)
    return other


def with_manifest(store: MemoryStore, manifest: bytes) -> MemoryStore:
    """The same blobs under another manifest."""
    other = clone(store)
    other.put_manifest(manifest, MANIFEST_TYPE)
    return other


def flips(content: bytes, masks: Sequence[int] | None = None) -> Iterator[tuple[int, bytes]]:
    """Every position with its byte changed: by each of `masks`, or by a single bit that depends on the position."""
    for position in range(len(content)):
        for mask in masks or (1 << position % 8,):
            changed = bytearray(content)
            changed[position] ^= mask
            yield position, bytes(changed)


def _written(store: MemoryStore, content: bytes, media_type: str) -> dict[str, object]:
    blob = store.write_blob(content, media_type)
    return {"mediaType": media_type, "digest": blob.digest, "size": blob.size}


class SwitchingStore(MemoryStore):
    """A store whose blobs change between two reads: `choose(number of the read)` picks one of two contents."""

    def __init__(self, base: MemoryStore, digest: str, other: bytes, choose: Callable[[int], bool]) -> None:
        super().__init__()
        self.latest = base.latest
        self.count = 0
        self._choose, self._digest, self._contents = choose, digest, (base.blobs[digest], other)
        self.blobs = _Switching(base.blobs, self)

    def pick(self, digest: str) -> bytes | bytearray | None:
        """What the next read of `digest` sees; None where it is not the blob that changes."""
        if digest != self._digest:
            return None
        self.count += 1
        return self._contents[self._choose(self.count)]


class _Switching(dict[str, bytes | bytearray]):
    def __init__(self, blobs: dict[str, bytes | bytearray], store: SwitchingStore) -> None:
        super().__init__(blobs)
        self._store = store

    def __getitem__(self, digest: str) -> bytes | bytearray:
        picked = self._store.pick(digest)
        return super().__getitem__(digest) if picked is None else picked
