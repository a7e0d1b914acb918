"""Copy an artifact between stores, byte for byte: its manifest keeps its digest."""

from __future__ import annotations

from dataclasses import dataclass

from encfs.format.descriptor import ARTIFACT_TYPE, parse_manifest
from encfs.oci.blobs import BlobSource, BlobTarget, Descriptor
from encfs.oci.options import DEFAULT_CONCURRENCY
from encfs.oci.registry import Registry
from encfs.oci.transfer import copy_blobs
from encfs.progress import Progress


@dataclass(frozen=True, slots=True)
class CopyResult:
    """What was copied: blobs that were missing and their bytes, and blobs that were there already."""

    manifest: Descriptor
    copied: int
    copied_size: int
    present: int


def copy_artifact(
    source: BlobSource,
    sink: BlobTarget,
    *,
    tag: str | None,
    progress: Progress,
    concurrency: int = DEFAULT_CONCURRENCY,
) -> CopyResult:
    """Copy the artifact that the source's reference names; every blob's size and digest is verified on the way.

    Blobs that the sink has are passed over. The manifest is written, and the tag moved, last.
    Raises: FormatError, UnsupportedError, IntegrityError, what the stores raise.
    """
    manifest = source.manifest()
    parsed = parse_manifest(manifest.content)
    if isinstance(sink, Registry):
        sink.prefer_mounting(source)
    copied = copy_blobs(source, sink, (parsed.config, *parsed.blobs), progress=progress, concurrency=concurrency)
    written = sink.put_manifest(manifest.content, manifest.media_type, tag=tag, artifact_type=ARTIFACT_TYPE)
    return CopyResult(written, copied.copied, copied.copied_size, copied.present)
