"""Open an artifact: manifest, content digest, trust, keyring, volumes — in this order, each checked before the next.

`open_artifact` is the one way in for everything that reads plaintext. `load_artifact` stops before the keys: what it
gives is self-consistent, but its origin is not accepted by anybody yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Self

from encfs.errors import FormatError, IntegrityError, MissingKeyError
from encfs.format.descriptor import (
    CONTENT_TYPE,
    MAX_KEYRING_SIZE,
    MAX_SIGNATURE_SIZE,
    SEGMENT_TYPE,
    TREE_TYPE,
    ArtifactManifest,
    ContentDescriptor,
    VolumeDescriptor,
    parse_content,
    parse_manifest,
)
from encfs.format.volume import DEFAULT_CACHE_SIZE, VolumeReader
from encfs.keys.keyring import Keyring, parse_keyring
from encfs.keys.payload import Payload, parse_payload
from encfs.keys.providers import BoundProvider, KeyProvider
from encfs.keys.secrets import wipe
from encfs.oci.blobs import MAX_MANIFEST_SIZE, Blob, BlobSource, Descriptor, RawManifest
from encfs.tracing import span
from encfs.trust import Origin, TrustPolicy, check_binding, check_trust

#: Volumes whose trees are asked for at the same time.
_OPENING_THREADS = 8


@dataclass(frozen=True, slots=True)
class LoadedArtifact:
    """An artifact's public documents, their digests checked against one another. Its origin is not established."""

    manifest: RawManifest
    index: ArtifactManifest
    content: ContentDescriptor
    keyring: Keyring
    signatures: tuple[bytes, ...]

    @property
    def content_digest(self) -> str:
        return self.content.digest

    def check_trust(self, policy: TrustPolicy) -> Origin:
        """Raises TrustError's subclasses, UsageError for a contradictory policy."""
        return check_trust(
            content=self.content.content,
            artifact_id=self.content.id,
            version=self.content.version,
            envelopes=self.signatures,
            policy=policy,
        )

    def check_key(self, provider: KeyProvider) -> None:
        """Raises PinError, WrongIdError, RollbackError where what came with the provider's key refuses the artifact."""
        if isinstance(provider, BoundProvider):
            check_binding(
                provider.binding,
                content_digest=self.content_digest,
                artifact_id=self.content.id,
                version=self.content.version,
                key_name=provider.uri,
            )


@dataclass(frozen=True, slots=True)
class Artifact:
    """An accepted, opened artifact. Close it, or use it as a context manager.

    `volumes` are those that were wanted, in the descriptor's order.
    """

    content: ContentDescriptor
    payload: Payload
    origin: Origin
    volumes: tuple[VolumeReader, ...]
    source: BlobSource = field(repr=False)
    #: URI of the key provider that opened it.
    key_uri: str = ""
    #: `sha256:<hex>` of the manifest that it was opened by.
    manifest_digest: str = ""
    #: Where a mount goes on with what its reference does not name any more: what it names by now.
    superseded_by: str = ""

    @property
    def content_digest(self) -> str:
        """`sha256:<hex>` of the content descriptor: the artifact's identity."""
        return self.content.digest

    @property
    def volume_ids(self) -> tuple[bytes, ...]:
        """The ids of `volumes`."""
        return tuple(volume.id for volume in self.volumes)

    def close(self) -> None:
        for volume in self.volumes:
            volume.close()
        self.source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def load_artifact(source: BlobSource, manifest: RawManifest | None = None) -> LoadedArtifact:
    """Read manifest, descriptor, keyring and signatures of the artifact that the source's reference names.

    `manifest` is the artifact's where it was read before, as one of an image index is.

    Raises: FormatError, UnsupportedError, IntegrityError, NotFoundError, what the source raises.
    """
    manifest = manifest or source.manifest()
    index = parse_manifest(manifest.content)
    if index.config.media_type != CONTENT_TYPE:
        raise FormatError("the manifest's config is no content descriptor")
    content = parse_content(source.read_blob(index.config, limit=MAX_MANIFEST_SIZE))
    if content.digest != index.config.digest:
        raise IntegrityError("the content descriptor is not the one that the manifest names")
    keyring = parse_keyring(source.read_blob(index.keyring, limit=MAX_KEYRING_SIZE), content.digest)
    signatures = tuple(source.read_blob(item, limit=MAX_SIGNATURE_SIZE) for item in index.signatures)
    return LoadedArtifact(manifest, index, content, keyring, signatures)


def open_artifact(
    source: BlobSource,
    *,
    keys: Sequence[KeyProvider],
    trust: TrustPolicy,
    cache_size: int = DEFAULT_CACHE_SIZE,
    label: str = "",
    wanted: Callable[[str], bool] | None = None,
    manifest: RawManifest | None = None,
) -> Artifact:
    """Accept an artifact by `trust`, unwrap its keyring with one of `keys`, and open its volumes. O(1) in its size.

    `cache_size` is the bytes of plaintext each volume may keep; `label` names the artifact in messages. `wanted` says
    by its name whether a volume is to be opened (all of them by default); `manifest` as for `load_artifact`.
    Raises: TrustError's subclasses before any key is asked for; MissingKeyError, WrongKeyError, KeyProviderError;
    FormatError, IntegrityError; what the source raises. Takes `source` over: the artifact closes it, or this function
    where it fails.
    """
    try:
        loaded = load_artifact(source, manifest)
        origin = loaded.check_trust(trust)
        opened_by: list[str] = []
        payload = open_payload(loaded, keys, lambda provider: opened_by.append(provider.uri))
        chosen = [one for one in loaded.content.volumes if wanted is None or wanted(payload.volume(one.id).name)]
        volumes = _open_volumes(source, loaded.content, chosen, payload, cache_size, label or loaded.content_digest)
    except BaseException:
        source.close()
        raise
    return Artifact(loaded.content, payload, origin, volumes, source, opened_by[-1], loaded.manifest.digest)


def opened_anew(artifact: Artifact, source: BlobSource, cache_size: int = DEFAULT_CACHE_SIZE) -> Artifact:
    """The same artifact over a new store, of which nothing but blobs is asked: it was accepted, its keys are here.

    For a process that was forked from the one that opened it, whose threads, locks and connections are of no use there.
    Raises: what the source raises. Takes `source` over, as `open_artifact`.
    """
    wanted = set(artifact.volume_ids)
    chosen = [one for one in artifact.content.volumes if one.id in wanted]
    label = artifact.volumes[0].label if artifact.volumes else artifact.content_digest
    try:
        volumes = _open_volumes(source, artifact.content, chosen, artifact.payload, cache_size, label)
    except BaseException:
        source.close()
        raise
    return replace(artifact, volumes=volumes, source=source)


def content_digest_of(manifest: RawManifest) -> str:
    """The content digest that an artifact's manifest claims; nothing is opened for it. Raises: as `parse_manifest`."""
    return parse_manifest(manifest.content).config.digest


def open_payload(
    loaded: LoadedArtifact, keys: Sequence[KeyProvider], opened_by: Callable[[KeyProvider], None] | None = None
) -> Payload:
    """Unwrap the keyring and check its payload against the descriptor's commitment. Call `check_trust` first.

    What came with the key that opens it may refuse the artifact (`encfs.trust.check_binding`). `opened_by` is told
    whose key it was.

    Raises: MissingKeyError, WrongKeyError, KeyProviderError, IntegrityError, FormatError; PinError, WrongIdError,
    RollbackError by what came with the key.
    """
    if not keys:
        raise MissingKeyError("no key was given to open the artifact", hint="pass -k KEYURI, for example -k owner.jwk")

    used: list[str] = []

    def accept(provider: KeyProvider) -> None:
        loaded.check_key(provider)
        used.append(provider.uri)
        if opened_by is not None:
            opened_by(provider)

    with span("key.release") as traced:
        content = loaded.keyring.open(keys, accept)
        traced["encfs.key.provider"] = used[-1].partition(":")[0]
    try:
        return parse_payload(content, loaded.content.payload_commitment)
    finally:
        wipe(content)


def _open_volumes(
    source: BlobSource,
    content: ContentDescriptor,
    descriptors: Sequence[VolumeDescriptor],
    payload: Payload,
    cache_size: int,
    label: str,
) -> tuple[VolumeReader, ...]:
    """Several side by side: each asks the store for the top of its tree."""

    def open_one(descriptor: VolumeDescriptor) -> VolumeReader:
        key = payload.volume(descriptor.id).key
        return open_volume(source, content, descriptor, key, cache_size=cache_size, label=label)

    if len(descriptors) == 1:
        return (open_one(descriptors[0]),)
    with ThreadPoolExecutor(_OPENING_THREADS, thread_name_prefix="open") as pool:
        opening = [pool.submit(open_one, descriptor) for descriptor in descriptors]
    failures = [error for one in opening if (error := one.exception()) is not None]
    if failures:
        for one in opening:
            if one.exception() is None:
                one.result().close()
        raise failures[0]
    return tuple(one.result() for one in opening)


def open_volume(
    source: BlobSource,
    content: ContentDescriptor,
    descriptor: VolumeDescriptor,
    key: bytes,
    *,
    cache_size: int = DEFAULT_CACHE_SIZE,
    label: str = "",
) -> VolumeReader:
    """One volume, which closes its blobs. Raises: as `VolumeReader`, with the blobs closed; what the source raises."""
    tree, segments = open_volume_blobs(source, descriptor)
    try:
        return VolumeReader(descriptor, content.suite, key, tree, segments, cache_size=cache_size, label=label)
    except BaseException:
        for blob in (tree, *segments):
            blob.close()
        raise


def open_volume_blobs(source: BlobSource, descriptor: VolumeDescriptor) -> tuple[Blob, tuple[Blob, ...]]:
    """The tree and segments of a volume, by the digests in the descriptor, never by their order in a manifest."""
    blobs: list[Blob] = []
    try:
        blobs.append(source.open_blob(Descriptor(TREE_TYPE, descriptor.tree_digest, descriptor.tree_size)))
        blobs.extend(source.open_blob(Descriptor(SEGMENT_TYPE, s.digest, s.size)) for s in descriptor.segments)
    except BaseException:
        for blob in blobs:
            blob.close()
        raise
    return blobs[0], tuple(blobs[1:])
