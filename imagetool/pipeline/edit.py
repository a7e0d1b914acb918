"""Change what surrounds the content without touching it: signatures and recipients.

The content descriptor, and with it the content digest, stays the same; a new manifest is written, and tagged last. Of
an image index every artifact is changed, or the one for a platform, and a new index names them. After a failure what
was written is taken back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from encfs.artifact import LoadedArtifact, load_artifact
from encfs.errors import ConflictError
from encfs.format.descriptor import (
    ARTIFACT_TYPE,
    KEYRING_TYPE,
    MANIFEST_TYPE,
    MAX_SIGNATURES,
    SIGNATURE_TYPE,
    build_manifest,
)
from encfs.image.artifact import check_pin_names_one, for_each_artifact
from encfs.image.manifest import INDEX_TYPE, INDEX_TYPES, Platform, parse_image_index
from encfs.keys.jwk import PrivateKey, PublicKey
from encfs.keys.providers import KeyProvider
from encfs.keys.recipients import RecipientKey
from encfs.oci.blobs import BlobSource, BlobTarget, Descriptor, RawManifest
from encfs.signatures import sign
from encfs.trust import TrustPolicy
from imagetool.pipeline.publish import TrackedSink

#: Writes what an artifact gets anew; its new manifest.
_Change = Callable[[LoadedArtifact, TrackedSink], bytes]


def sign_artifact(
    source: BlobSource,
    sink: BlobTarget,
    key: PrivateKey,
    *,
    trust: TrustPolicy,
    tag: str | None,
    wanted: Platform | None = None,
) -> Descriptor:
    """Add a signature over the content descriptor; the new manifest's descriptor, or the new index's.

    `trust` says what makes the artifact the one the owner means to sign; `wanted` chooses in an index. Raises:
    TrustError's subclasses, ConflictError where there are 16 signatures already, KeyFileError; UsageError for a pin
    that cannot mean all of an index, or a platform that is not there; what the stores raise.
    """

    def add_signature(artifact: LoadedArtifact, tracked: TrackedSink) -> bytes:
        if len(artifact.signatures) >= MAX_SIGNATURES:
            raise ConflictError(f"the artifact carries {MAX_SIGNATURES} signatures already, the most that are allowed")
        envelope = sign(artifact.content.content, key)
        signatures = [*artifact.index.signatures, tracked.write_blob(envelope, SIGNATURE_TYPE)]
        return _manifest(artifact, artifact.index.keyring, signatures)

    return _edit(source, sink, add_signature, trust, tag, wanted)


def add_recipients(
    source: BlobSource,
    sink: BlobTarget,
    keys: Sequence[KeyProvider],
    recipients: Sequence[RecipientKey],
    *,
    trust: TrustPolicy,
    tag: str | None,
    wanted: Platform | None = None,
) -> Descriptor:
    """Wrap the artifact's content-encryption key for more recipients. Raises: as `sign_artifact`, and key errors."""

    def add(artifact: LoadedArtifact, tracked: TrackedSink) -> bytes:
        content = artifact.keyring.add_recipients(keys, recipients, artifact.check_key)
        return _manifest(artifact, tracked.write_blob(content, KEYRING_TYPE), artifact.index.signatures)

    return _edit(source, sink, add, trust, tag, wanted)


def remove_recipient(
    source: BlobSource,
    sink: BlobTarget,
    selector: int | str | PublicKey,
    *,
    trust: TrustPolicy,
    tag: str | None,
    wanted: Platform | None = None,
) -> Descriptor:
    """Drop one recipient's entry. It may have kept the key: only a new version under fresh keys revokes access.

    In an image index a number must mean the same recipient in all artifacts.

    Raises: as `sign_artifact`; NotFoundError where no recipient fits, UsageError for the last one.
    """
    meant: set[tuple[str, str]] = set()

    def remove(artifact: LoadedArtifact, tracked: TrackedSink) -> bytes:
        if isinstance(selector, int):
            meant.update(
                (one.kind, one.kid or one.service) for one in artifact.keyring.recipients if one.index == selector
            )
            if len(meant) > 1:
                raise ConflictError(
                    f"recipient {selector} is not the same in all artifacts of the index",
                    hint="name it by its key id or key file, or choose an artifact with --platform",
                )
        content = artifact.keyring.remove_recipient(selector)
        return _manifest(artifact, tracked.write_blob(content, KEYRING_TYPE), artifact.index.signatures)

    return _edit(source, sink, remove, trust, tag, wanted)


def _edit(
    source: BlobSource, sink: BlobTarget, change: _Change, trust: TrustPolicy, tag: str | None, wanted: Platform | None
) -> Descriptor:
    document = source.document()
    check_pin_names_one(document, trust.pin, wanted)
    tracked = TrackedSink(sink)

    def changed(manifest: RawManifest, _: Platform | None) -> tuple[str, bytes]:
        artifact = load_artifact(source, manifest)
        artifact.check_trust(trust)
        return manifest.digest, change(artifact, tracked)

    try:
        edited = for_each_artifact(source, document, changed, wanted)
        if document.media_type in INDEX_TYPES:
            replaced = {old: tracked.write_manifest(content, MANIFEST_TYPE) for old, content in edited}
            return tracked.put_manifest(_index(document, replaced), INDEX_TYPE, tag=tag)
        ((_, content),) = edited
        return tracked.put_manifest(content, MANIFEST_TYPE, tag=tag, artifact_type=ARTIFACT_TYPE)
    except BaseException:
        tracked.take_back()
        raise


def _index(document: RawManifest, replaced: dict[str, Descriptor]) -> bytes:
    """The same index with other manifests in the place of some."""
    index = parse_image_index(document.content, document.media_type)
    kept = {entry.descriptor.digest: entry.descriptor for entry in index.entries}
    return index.rewritten(kept | replaced)


def _manifest(artifact: LoadedArtifact, keyring: Descriptor, signatures: Sequence[Descriptor]) -> bytes:
    return build_manifest(
        artifact.content, replace(keyring, media_type=KEYRING_TYPE), signatures, artifact.index.annotations
    )
