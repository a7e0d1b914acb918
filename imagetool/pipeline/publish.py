"""Make an artifact of volumes that have been written: what all encryptions share, and how a failed one leaves nothing.

Not here: where the volumes' contents come from (`encrypt`, `encrypt_image`).
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from encfs.encoding import sha256_digest
from encfs.errors import EncfsError, MissingKeyError, UsageError
from encfs.format.descriptor import (
    CONTENT_TYPE,
    KEYRING_TYPE,
    SIGNATURE_TYPE,
    ContentDescriptor,
    build_content,
    build_manifest,
    is_valid_id,
)
from encfs.format.frames import check_frame_size
from encfs.format.writer import MIN_SEGMENT_SIZE, VolumeOptions, WrittenVolume
from encfs.keys.jwk import PrivateKey
from encfs.keys.keyring import create_keyring
from encfs.keys.payload import build_payload, commitment
from encfs.keys.recipients import RecipientKey
from encfs.oci.blobs import BlobTarget, BlobWriter, Buffer, Descriptor
from encfs.signatures import sign
from encfs.strictjson import MAX_INTEGER

#: An image's UUID: constant, since it is stored in a volume that has a random id of its own.
IMAGE_UUID = bytes(16)
#: The last second of the year 9999, which RFC 3339 can still write.
_LATEST_EPOCH = 253402300799


@dataclass(frozen=True, slots=True)
class ArtifactOptions:
    """`artifact_id` names the line of releases (random where None); `version` its release, from 0 to 2^53-1."""

    artifact_id: str | None = None
    version: int = 0
    volume: VolumeOptions = field(default_factory=VolumeOptions)


def source_date_epoch() -> int | None:
    """`SOURCE_DATE_EPOCH` (reproducible-builds.org), seconds since 1970; None where unset. Raises UsageError."""
    value = os.environ.get("SOURCE_DATE_EPOCH")
    if value is None:
        return None
    if not re.fullmatch(r"[0-9]{1,12}", value) or int(value) > _LATEST_EPOCH:
        raise UsageError("SOURCE_DATE_EPOCH is not a number of seconds since 1970")
    return int(value)


def check_options(options: ArtifactOptions, recipients: Sequence[RecipientKey]) -> None:
    """Raises: MissingKeyError, UsageError, FormatError for a frame size."""
    if not recipients:
        raise MissingKeyError("no recipient was given", hint="pass -r KEY or --passphrase-file FILE")
    if options.artifact_id is not None and not is_valid_id(options.artifact_id):
        raise UsageError(
            "the artifact's id is not of 1 to 255 letters, digits and ._/@:+- that begin with a letter or digit"
        )
    if not 0 <= options.version <= MAX_INTEGER:
        raise UsageError(f"artifact version {options.version} is not from 0 to 2^53-1")
    check_frame_size(options.volume.frame_size)
    if options.volume.segment_size < MIN_SEGMENT_SIZE:
        raise UsageError(f"a segment of {options.volume.segment_size} bytes is smaller than {MIN_SEGMENT_SIZE}")


def write_documents(
    volumes: Sequence[WrittenVolume],
    sink: TrackedSink,
    recipients: Sequence[RecipientKey],
    signers: Sequence[PrivateKey],
    options: ArtifactOptions,
    *,
    image_config: bytes | None = None,
) -> tuple[ContentDescriptor, bytes]:
    """Write content descriptor, keyring and signatures; the descriptor, and the manifest that is still to be put.

    Raises: FormatError, UnsupportedError where it is too large, what the sink raises.
    """
    payload = build_payload([volume.secret for volume in volumes], image_config)
    content = build_content(
        artifact_id=options.artifact_id or secrets.token_hex(16),
        version=options.version,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(source_date_epoch())),
        suite=options.volume.suite,
        payload_commitment=commitment(payload),
        volumes=[volume.descriptor for volume in volumes],
    )
    keyring = sink.write_blob(create_keyring(payload, content.digest, recipients), KEYRING_TYPE)
    sink.write_blob(content.content, CONTENT_TYPE)
    signatures = [sink.write_blob(sign(content.content, key), SIGNATURE_TYPE) for key in signers]
    return content, build_manifest(content, keyring, signatures)


class TrackedSink:
    """A sink that remembers which blobs it was the first to get, so that a failure can take them back.

    What encryption makes nobody else has, since its keys are fresh; layers that are given back somebody may have.
    """

    def __init__(self, sink: BlobTarget) -> None:
        self._sink = sink
        self._blobs: list[Descriptor] = []
        self.size = 0
        self._manifest: Descriptor | None = None

    def create_blob(self) -> BlobWriter:
        return _TrackedWriter(self._sink.create_blob(), self._note)

    def _note(self, blob: Descriptor) -> None:
        """Before it is written: an interrupt may come when it is there, but before its descriptor is here."""
        self.size += blob.size
        if not self._sink.has_blob(blob):
            self._blobs.append(blob)

    def write_blob(self, content: bytes, media_type: str) -> Descriptor:
        self._note(Descriptor(media_type, sha256_digest(content), len(content)))
        return self._sink.write_blob(content, media_type)

    def has_blob(self, descriptor: Descriptor) -> bool:
        return self._sink.has_blob(descriptor)

    def remove_blob(self, descriptor: Descriptor) -> None:
        self._sink.remove_blob(descriptor)

    def put_manifest(
        self, content: bytes, media_type: str, *, tag: str | None = None, artifact_type: str | None = None
    ) -> Descriptor:
        self._manifest = Descriptor(media_type, sha256_digest(content), len(content))
        return self._sink.put_manifest(content, media_type, tag=tag, artifact_type=artifact_type)

    def write_manifest(self, content: bytes, media_type: str) -> Descriptor:
        self._note(Descriptor(media_type, sha256_digest(content), len(content)))
        return self._sink.write_manifest(content, media_type)

    def close(self) -> None:
        self._sink.close()

    def take_back(self) -> None:
        """Remove every blob that was not there before, as far as the sink can.

        Where the manifest has come to be there all the same, as it may when an interrupt comes at the very end, they
        stay: without them the tag would name an artifact that is not whole.
        """
        with contextlib.suppress(EncfsError):
            if self._manifest is not None and self._sink.has_blob(self._manifest):
                return
        for blob in self._blobs:
            # Why the encryption failed is what the caller has to hear.
            with contextlib.suppress(EncfsError):
                self._sink.remove_blob(blob)


class _TrackedWriter:
    def __init__(self, writer: BlobWriter, note: Callable[[Descriptor], None]) -> None:
        self._writer = writer
        self._note = note
        self._size = 0

    def write(self, data: Buffer) -> None:
        self._size += memoryview(data).nbytes
        self._writer.write(data)

    def digest(self) -> str:
        return self._writer.digest()

    def commit(self, media_type: str) -> Descriptor:
        self._note(Descriptor(media_type, self._writer.digest(), self._size))
        return self._writer.commit(media_type)

    def abort(self) -> None:
        self._writer.abort()
