"""Copy an artifact, or an index of them, between stores, byte for byte: manifests keep their digests."""

from __future__ import annotations

from dataclasses import dataclass

from encfs.errors import UnsupportedError
from encfs.format.descriptor import ARTIFACT_TYPE, ArtifactManifest, parse_manifest
from encfs.image.artifact import for_each_artifact
from encfs.image.manifest import INDEX_TYPES, Platform, parse_image_index
from encfs.oci.blobs import BlobSource, BlobTarget, Descriptor, RawManifest
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


def check_copyable(source: BlobSource, document: RawManifest, wanted: Platform | None = None) -> None:
    """Before anything is made at the destination: whether a reference is an artifact, or an index of nothing else.

    Raises: as `copy_artifact`.
    """
    if wanted is None and document.media_type in INDEX_TYPES:
        index = parse_image_index(document.content, document.media_type)
        if any(entry.is_attestation for entry in index.entries):
            raise UnsupportedError(
                "the image index lists attestations besides artifacts", hint="copy it with skopeo copy --all"
            )
    for _ in for_each_artifact(source, document, lambda manifest, _: parse_manifest(manifest.content), wanted):
        pass


def copy_artifact(
    source: BlobSource,
    sink: BlobTarget,
    *,
    tag: str | None,
    wanted: Platform | None = None,
    progress: Progress,
    concurrency: int = DEFAULT_CONCURRENCY,
) -> CopyResult:
    """Copy the artifact that the source's reference names; every blob's size and digest is verified on the way.

    Of an image index every artifact is copied and then the index, or the one artifact for the `wanted` platform alone.
    Blobs that the sink has are passed over. What is named is written, and the tag moved, last.
    Raises: UsageError for a platform that is not there; FormatError, UnsupportedError, IntegrityError, what the stores
    raise.
    """
    document = source.document()
    check_copyable(source, document, wanted)
    if isinstance(sink, Registry):
        sink.prefer_mounting(source)
    whole_index = wanted is None and document.media_type in INDEX_TYPES
    copied = size = present = 0

    def copy_one(manifest: RawManifest, _: Platform | None) -> RawManifest:
        nonlocal copied, size, present
        parsed = parse_manifest(manifest.content)
        done = copy_blobs(source, sink, artifact_blobs(parsed), progress=progress, concurrency=concurrency)
        copied, size, present = copied + done.copied, size + done.copied_size, present + done.present
        if whole_index:
            sink.write_manifest(manifest.content, manifest.media_type)
        return manifest

    (*_, last) = for_each_artifact(source, document, copy_one, wanted)
    if whole_index:
        written = sink.put_manifest(document.content, document.media_type, tag=tag)
    else:
        written = sink.put_manifest(last.content, last.media_type, tag=tag, artifact_type=ARTIFACT_TYPE)
    return CopyResult(written, copied, size, present)


def artifact_blobs(manifest: ArtifactManifest) -> tuple[Descriptor, ...]:
    """All blobs that an artifact's manifest names."""
    return (manifest.config, *manifest.blobs)
