"""Verify an artifact: all of its ciphertext without a key, and with one also that every frame opens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from encfs.artifact import LoadedArtifact, load_artifact, open_payload, open_volume, open_volume_blobs
from encfs.format.verification import verify_volume
from encfs.format.volume import VolumeReader
from encfs.image.artifact import check_listed_platform
from encfs.image.config import parse_image_config
from encfs.image.manifest import Platform
from encfs.keys.payload import Payload
from encfs.keys.providers import KeyProvider
from encfs.oci.blobs import BlobSource, RawManifest
from encfs.progress import Progress
from encfs.trust import Origin, TrustPolicy

_READ_SIZE = 1 << 20


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """What was verified. `origin` is None where no trust option was given; `decrypted` whether frames were opened."""

    artifact: LoadedArtifact
    origin: Origin | None
    frames: int
    stored_size: int
    decrypted: bool


def verify(
    source: BlobSource,
    manifest: RawManifest | None = None,
    *,
    listed: Platform | None = None,
    keys: Sequence[KeyProvider] = (),
    trust: TrustPolicy | None,
    progress: Progress,
) -> VerifyResult:
    """Check digests, roots, every node and frame; the origin if `trust` is given; decryption if `keys` are.

    `manifest` is the artifact's where it was read before, as one of an image index is, `listed` the platform that the
    index says it is for, which is checked where there are `keys`.
    Raises: IntegrityError, FormatError, TrustError's subclasses, key errors, what the source raises.
    """
    artifact = load_artifact(source, manifest)
    origin = artifact.check_trust(trust) if trust is not None else None
    payload = open_payload(artifact, keys) if keys else None
    if payload is not None:
        _check_platform(payload, listed)
    frames = stored = 0
    progress.begin("verify", sum(volume.stored_size for volume in artifact.content.volumes))
    try:
        for descriptor in artifact.content.volumes:
            tree, segments = open_volume_blobs(source, descriptor)
            try:
                checked = verify_volume(descriptor, artifact.content.suite, tree, segments, progress)
            finally:
                for blob in (tree, *segments):
                    blob.close()
            frames += checked.frames
            stored += checked.stored_size
        if payload is not None:
            progress.begin("decrypt", sum(volume.size for volume in artifact.content.volumes))
            for descriptor in artifact.content.volumes:
                key = payload.volume(descriptor.id).key
                _read_all(open_volume(source, artifact.content, descriptor, key), progress)
    finally:
        progress.end()
    return VerifyResult(artifact, origin, frames, stored, payload is not None)


def _check_platform(payload: Payload, listed: Platform | None) -> None:
    if payload.image_config is not None:
        check_listed_platform(parse_image_config(payload.image_config), listed)


def _read_all(volume: VolumeReader, progress: Progress) -> None:
    buffer = memoryview(bytearray(_READ_SIZE))
    try:
        for offset in range(0, volume.size, _READ_SIZE):
            progress.advance(volume.read_into(offset, buffer))
    finally:
        volume.close()
        buffer[:] = bytes(_READ_SIZE)
