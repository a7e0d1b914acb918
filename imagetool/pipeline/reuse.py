"""Take layers over from an earlier artifact: volumes by their digests, with their keys, neither read nor written again.

Whoever sees both artifacts sees which layers they share, and who can open the earlier one can read those of the new
one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from encfs.artifact import Artifact, open_artifact
from encfs.erofs.reader import ErofsReader
from encfs.errors import UnsupportedError, UsageError
from encfs.format.descriptor import SEGMENT_TYPE, TREE_TYPE, VolumeDescriptor
from encfs.format.suite import Suite
from encfs.format.volume import VolumeReader
from encfs.format.writer import WrittenVolume
from encfs.image.artifact import AUXILIARY_PREFIX, LAYER_PREFIX, check_image_platform, choose_manifest
from encfs.image.config import parse_image_config
from encfs.image.manifest import Platform
from encfs.keys.providers import KeyProvider
from encfs.oci.blobs import BlobTarget, Descriptor
from encfs.oci.options import StoreOptions
from encfs.oci.reference import Reference
from encfs.oci.registry import Registry
from encfs.oci.store import open_source
from encfs.oci.transfer import copy_blobs
from encfs.progress import Progress
from encfs.trust import TrustPolicy
from imagetool.tar.recipe import Recipe


@dataclass(frozen=True, slots=True)
class TakenLayer:
    """A layer that was taken over: its two volumes, and a reader of its image."""

    volumes: tuple[WrittenVolume, WrittenVolume]
    reader: VolumeReader

    def image(self) -> ErofsReader:
        """Raises: FormatError, what the volume raises."""
        return ErofsReader(self.reader.read, self.reader.size)


@contextmanager
def opened_earlier(
    reference: Reference,
    options: StoreOptions,
    platform: Platform,
    *,
    keys: Sequence[KeyProvider],
    trust: TrustPolicy,
) -> Iterator[Artifact]:
    """An earlier artifact of the image, accepted by `trust`, with all of its volumes; of an index that for `platform`.

    Raises: as `encfs.artifact.open_artifact`; UsageError where an index has none for the platform.
    """
    source = open_source(reference, options)
    try:
        manifest = choose_manifest(source, source.document(), platform)
    except BaseException:
        source.close()
        raise
    with open_artifact(source, keys=keys, trust=trust, label=str(reference), manifest=manifest) as artifact:
        if artifact.payload.image_config is None:
            raise UsageError(
                f"{reference} is no container image", hint="--reuse takes an earlier artifact of the image"
            )
        check_image_platform(artifact, platform)
        yield artifact


def take_layers(
    earlier: Artifact, diff_ids: Sequence[str], suite: Suite, sink: BlobTarget, progress: Progress, concurrency: int
) -> dict[str, TakenLayer]:
    """Those of the layers that the earlier artifact has, by diff ID; their blobs are copied to the sink.

    A layer whose image has attributes of directories from the layers below is taken over only above the same layers.
    Raises: UnsupportedError where the artifact's algorithms are others; what the stores raise.
    """
    if earlier.content.suite != suite:
        raise UnsupportedError(
            "the earlier artifact has another hash than the new one",
            hint="choose the same --hash, or leave --reuse out",
        )
    config = earlier.payload.image_config
    before = parse_image_config(config).diff_ids if config is not None else ()
    volumes = _named_volumes(earlier)
    found: dict[str, TakenLayer] = {}
    for number, diff_id in enumerate(diff_ids):
        layer, auxiliary = volumes.get(LAYER_PREFIX + diff_id), volumes.get(AUXILIARY_PREFIX + diff_id)
        if layer is None or auxiliary is None or diff_id in found:
            continue
        same_below = tuple(diff_ids[: number + 1]) == before[: number + 1]
        if same_below or not Recipe(auxiliary[1]).inherits:
            found[diff_id] = TakenLayer((layer[0], auxiliary[0]), layer[1])
    if isinstance(sink, Registry):
        sink.prefer_mounting(earlier.source)
    blobs = [blob for taken in found.values() for volume in taken.volumes for blob in _blobs(volume.descriptor)]
    copy_blobs(earlier.source, sink, blobs, progress=progress, concurrency=concurrency)
    return found


_Volume = tuple[WrittenVolume, VolumeReader]


def _named_volumes(artifact: Artifact) -> dict[str, _Volume]:
    readers = {reader.id: reader for reader in artifact.volumes}
    volumes = {}
    for descriptor in artifact.content.volumes:
        secret = artifact.payload.volume(descriptor.id)
        volumes[secret.name] = WrittenVolume(descriptor, secret), readers[descriptor.id]
    return volumes


def _blobs(volume: VolumeDescriptor) -> Iterator[Descriptor]:
    yield Descriptor(TREE_TYPE, volume.tree_digest, volume.tree_size)
    for segment in volume.segments:
        yield Descriptor(SEGMENT_TYPE, segment.digest, segment.size)
