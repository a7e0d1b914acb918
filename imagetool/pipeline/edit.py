"""Change what surrounds the content without touching it: signatures and recipients.

The content descriptor, and with it the content digest, stays the same; a new manifest is written, and tagged last.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from encfs.keys.jwk import PrivateKey, PublicKey
from encfs.keys.providers import KeyProvider
from encfs.keys.recipients import RecipientKey
from encfs.oci.blobs import BlobSink, BlobSource, Descriptor
from encfs.signatures import sign
from encfs.trust import TrustPolicy


def sign_artifact(
    source: BlobSource, sink: BlobSink, key: PrivateKey, *, trust: TrustPolicy, tag: str | None
) -> Descriptor:
    """Add a signature over the content descriptor; the new manifest's descriptor.

    `trust` says what makes the artifact the one the owner means to sign. Raises: TrustError's subclasses, ConflictError
    where there are 16 signatures already, KeyFileError, what the stores raise.
    """
    artifact = load_artifact(source)
    artifact.check_trust(trust)
    if len(artifact.signatures) >= MAX_SIGNATURES:
        raise ConflictError(f"the artifact carries {MAX_SIGNATURES} signatures already, the most that are allowed")
    envelope = sign(artifact.content.content, key)
    signatures = [*artifact.index.signatures, sink.write_blob(envelope, SIGNATURE_TYPE)]
    return _put(sink, artifact, artifact.index.keyring, signatures, tag)


def add_recipients(
    source: BlobSource,
    sink: BlobSink,
    keys: Sequence[KeyProvider],
    recipients: Sequence[RecipientKey],
    *,
    trust: TrustPolicy,
    tag: str | None,
) -> Descriptor:
    """Wrap the artifact's content-encryption key for more recipients. Raises: as `sign_artifact`, and key errors."""
    artifact = load_artifact(source)
    artifact.check_trust(trust)
    content = artifact.keyring.add_recipients(keys, recipients, artifact.check_key)
    return _put(sink, artifact, sink.write_blob(content, KEYRING_TYPE), artifact.index.signatures, tag)


def remove_recipient(
    source: BlobSource, sink: BlobSink, selector: int | str | PublicKey, *, trust: TrustPolicy, tag: str | None
) -> Descriptor:
    """Drop one recipient's entry. It may have kept the key: only a new version under fresh keys revokes access.

    Raises: as `sign_artifact`; NotFoundError where no recipient fits, UsageError for the last one.
    """
    artifact = load_artifact(source)
    artifact.check_trust(trust)
    content = artifact.keyring.remove_recipient(selector)
    return _put(sink, artifact, sink.write_blob(content, KEYRING_TYPE), artifact.index.signatures, tag)


def _put(
    sink: BlobSink,
    artifact: LoadedArtifact,
    keyring: Descriptor,
    signatures: Sequence[Descriptor],
    tag: str | None,
) -> Descriptor:
    manifest = build_manifest(
        artifact.content, replace(keyring, media_type=KEYRING_TYPE), signatures, artifact.index.annotations
    )
    return sink.put_manifest(manifest, MANIFEST_TYPE, tag=tag, artifact_type=ARTIFACT_TYPE)
