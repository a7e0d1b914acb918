"""Encrypt a directory or file into an artifact. Not here: reading sources (`imagetool.sources`), the format."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from encfs.encoding import sha256_digest
from encfs.erofs.writer import ErofsWriter
from encfs.errors import EncfsError, MissingKeyError, StorageError, UsageError
from encfs.format.descriptor import (
    ARTIFACT_TYPE,
    CONTENT_TYPE,
    KEYRING_TYPE,
    MANIFEST_TYPE,
    SIGNATURE_TYPE,
    ContentDescriptor,
    build_content,
    build_manifest,
    is_valid_id,
)
from encfs.format.frames import check_frame_size
from encfs.format.writer import MIN_SEGMENT_SIZE, VolumeOptions, VolumeWriter, WrittenVolume
from encfs.keys.jwk import PrivateKey
from encfs.keys.keyring import create_keyring
from encfs.keys.payload import build_payload, commitment
from encfs.keys.recipients import RecipientKey
from encfs.oci.blobs import BlobSink, BlobWriter, Buffer, Descriptor
from encfs.progress import Progress
from encfs.signatures import sign
from encfs.strictjson import MAX_INTEGER
from imagetool.sources.directory import SourceOptions, add_source, measure_source

#: The image's UUID: constant, since it is stored in a volume that has a random id of its own.
_IMAGE_UUID = bytes(16)
#: The last second of the year 9999, which RFC 3339 can still write.
_LATEST_EPOCH = 253402300799


@dataclass(frozen=True, slots=True)
class EncryptOptions:
    """`artifact_id` names the line of releases (random where None); `version` its release, from 0 to 2^53-1."""

    artifact_id: str | None = None
    version: int = 0
    volume: VolumeOptions = field(default_factory=VolumeOptions)
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class EncryptResult:
    """What was made. Sizes in bytes: of the sources' contents, of the plaintext image, of all blobs."""

    content: ContentDescriptor
    manifest: Descriptor
    source_size: int
    image_size: int
    stored_size: int
    files: int
    seconds: float


def encrypt(
    source: Path,
    sink: BlobSink,
    recipients: Sequence[RecipientKey],
    *,
    signers: Sequence[PrivateKey] = (),
    options: EncryptOptions,
    tag: str | None,
    progress: Progress,
) -> EncryptResult:
    """Encrypt `source` for all `recipients`; the tag is moved last, and on failure what was written is taken back.

    Raises: UsageError, MissingKeyError, SourceError, NotFoundError, FormatError, what the sink raises.
    """
    started = time.monotonic()
    _check_options(options, recipients)
    epoch = source_date_epoch()
    tracked = _TrackedSink(sink)
    try:
        volume, files, source_size = _write_volume(source, tracked, options, epoch, progress)
        payload = build_payload([volume.secret])
        content = build_content(
            artifact_id=options.artifact_id or secrets.token_hex(16),
            version=options.version,
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(epoch)),
            suite=options.volume.suite,
            payload_commitment=commitment(payload),
            volumes=[volume.descriptor],
        )
        keyring = tracked.write_blob(create_keyring(payload, content.digest, recipients), KEYRING_TYPE)
        tracked.write_blob(content.content, CONTENT_TYPE)
        signatures = [tracked.write_blob(sign(content.content, key), SIGNATURE_TYPE) for key in signers]
        manifest = tracked.put_manifest(
            build_manifest(content, keyring, signatures), MANIFEST_TYPE, tag=tag, artifact_type=ARTIFACT_TYPE
        )
    except BaseException:
        tracked.take_back()
        raise
    finally:
        progress.end()
    return EncryptResult(
        content=content,
        manifest=manifest,
        source_size=source_size,
        image_size=volume.descriptor.size,
        stored_size=tracked.size + manifest.size,
        files=files,
        seconds=time.monotonic() - started,
    )


def source_date_epoch() -> int | None:
    """`SOURCE_DATE_EPOCH` (reproducible-builds.org), seconds since 1970; None where unset. Raises UsageError."""
    value = os.environ.get("SOURCE_DATE_EPOCH")
    if value is None:
        return None
    if not re.fullmatch(r"[0-9]{1,12}", value) or int(value) > _LATEST_EPOCH:
        raise UsageError("SOURCE_DATE_EPOCH is not a number of seconds since 1970")
    return int(value)


def _check_options(options: EncryptOptions, recipients: Sequence[RecipientKey]) -> None:
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


def _write_volume(
    source: Path, sink: BlobSink, options: EncryptOptions, epoch: int | None, progress: Progress
) -> tuple[WrittenVolume, int, int]:
    exclude = SourceOptions(options.exclude, epoch)
    progress.begin("encrypt", measure_source(source, exclude))
    writer = VolumeWriter(sink, options.volume)
    try:
        with ErofsWriter(writer, uuid=_IMAGE_UUID) as image:
            add_source(source, image, exclude, progress.advance)
            summary = image.finish()
        return writer.finish(), summary.inodes, summary.data_size
    except OSError as error:
        raise StorageError(f"cannot write the artifact: {error.strerror or error}") from error
    finally:
        writer.abort()


class _TrackedSink:
    """A sink that remembers the blobs it was given, so that a failed encryption can take them back."""

    def __init__(self, sink: BlobSink) -> None:
        self._sink = sink
        self._blobs: list[Descriptor] = []
        self._manifest: Descriptor | None = None

    @property
    def size(self) -> int:
        """Bytes of all blobs so far."""
        return sum(blob.size for blob in self._blobs)

    def create_blob(self) -> BlobWriter:
        return _TrackedWriter(self._sink.create_blob(), self._blobs)

    def write_blob(self, content: bytes, media_type: str) -> Descriptor:
        # Noted first: an interrupt may come when it is written, but before its descriptor is here.
        self._blobs.append(Descriptor(media_type, sha256_digest(content), len(content)))
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

    def close(self) -> None:
        self._sink.close()

    def take_back(self) -> None:
        """Remove every blob, as far as the sink can: all are of this encryption alone, since its keys are fresh.

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
    def __init__(self, writer: BlobWriter, blobs: list[Descriptor]) -> None:
        self._writer = writer
        self._blobs = blobs

    def write(self, data: Buffer) -> None:
        self._writer.write(data)

    def digest(self) -> str:
        return self._writer.digest()

    def commit(self, media_type: str) -> Descriptor:
        blob = self._writer.commit(media_type)
        self._blobs.append(blob)
        return blob

    def abort(self) -> None:
        self._writer.abort()
