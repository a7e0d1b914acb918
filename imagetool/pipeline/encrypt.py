"""Encrypt a directory or file into an artifact. Not here: reading sources (`imagetool.sources`), the format."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from encfs.erofs.structures import BLOCK_SIZE
from encfs.erofs.writer import ErofsWriter
from encfs.errors import StorageError
from encfs.format.descriptor import ARTIFACT_TYPE, MANIFEST_TYPE, ContentDescriptor
from encfs.format.writer import VolumeWriter, WrittenVolume
from encfs.keys.jwk import PrivateKey
from encfs.keys.recipients import RecipientKey
from encfs.oci.blobs import BlobSink, BlobTarget, Descriptor
from encfs.progress import Progress
from imagetool.pipeline.publish import (
    IMAGE_UUID,
    ArtifactOptions,
    TrackedSink,
    check_options,
    source_date_epoch,
    write_documents,
)
from imagetool.sources.directory import SourceOptions, add_source, measure_source

#: Frames of sources whose files are large: models are read in sequence or by the tensor, on several threads, which
#: contend for the interpreter's lock at every frame.
LARGE_FRAME_SIZE = 256 << 10
#: Mean bytes of a file from which on files count as large.
_LARGE_FILES = 1 << 20


@dataclass(frozen=True, slots=True)
class EncryptOptions(ArtifactOptions):
    """`exclude` as `imagetool.sources.directory.SourceOptions` has it.

    With `adapt_frames` sources of large files get frames of `LARGE_FRAME_SIZE` instead of `volume.frame_size`.
    """

    exclude: tuple[str, ...] = ()
    adapt_frames: bool = False


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
    sink: BlobTarget,
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
    check_options(options, recipients)
    epoch = source_date_epoch()
    tracked = TrackedSink(sink)
    try:
        volume, files, source_size = _write_volume(source, tracked, options, epoch, progress)
        content, document = write_documents([volume], tracked, recipients, signers, options)
        manifest = tracked.put_manifest(document, MANIFEST_TYPE, tag=tag, artifact_type=ARTIFACT_TYPE)
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


def _write_volume(
    source: Path, sink: BlobSink, options: EncryptOptions, epoch: int | None, progress: Progress
) -> tuple[WrittenVolume, int, int]:
    exclude = SourceOptions(options.exclude, epoch)
    measure = measure_source(source, exclude)
    volume = options.volume
    if options.adapt_frames and measure.size >= _LARGE_FILES * max(1, measure.files):
        volume = replace(volume, frame_size=LARGE_FRAME_SIZE)
    progress.begin("encrypt", measure.size)
    writer = VolumeWriter(sink, volume)
    try:
        with ErofsWriter(writer, uuid=IMAGE_UUID, alignment=max(BLOCK_SIZE, volume.frame_size)) as image:
            add_source(source, image, exclude, progress.advance)
            summary = image.finish()
        return writer.finish(), summary.inodes, summary.data_size
    except OSError as error:
        raise StorageError(f"cannot write the artifact: {error.strerror or error}") from error
    finally:
        writer.abort()
