"""Container images from any store: one of a manifest, or those of the platforms of an index; or of an archive.

Not here: what an image is (`image`), `docker save`'s archives (`archive`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager

from encfs.errors import UnsupportedError
from encfs.image.artifact import check_listed_platform
from encfs.image.config import MAX_CONFIG_SIZE, parse_image_config
from encfs.image.manifest import (
    CONFIG_TYPES,
    ImageManifest,
    Platform,
    chosen_entries,
    parse_image,
    parse_image_manifest,
)
from encfs.image.mediatypes import LAYER_TYPES
from encfs.oci.blobs import BlobSource, Descriptor
from encfs.oci.options import StoreOptions
from encfs.oci.reference import Reference
from encfs.oci.store import open_source
from encfs.strictjson import show_name
from imagetool.sources.archive import DockerArchive
from imagetool.sources.image import SourceImage, SourceImages, SourceLayer, check_layer_count, single_image

_ENCRYPTED_SUFFIX = "+encrypted"


@contextmanager
def opened_images(
    reference: Reference, options: StoreOptions, platforms: Sequence[Platform] = ()
) -> Iterator[SourceImages]:
    """The images of a reference, of whatever transport, readable while this lasts. Raises: as `load_images`."""
    if reference.transport == "docker-archive":
        with closing(DockerArchive(reference.path)) as archive:
            yield archive.images(platforms)
    else:
        with closing(open_source(reference, options)) as source:
            yield load_images(source, platforms)


def load_images(source: BlobSource, platforms: Sequence[Platform] = ()) -> SourceImages:
    """The image that the source's reference names, or those of an index: all, or of the given platforms.

    With a single platform given, one image is asked for, and no index. No layer is read.
    Raises: UsageError where a platform is missing; FormatError; UnsupportedError where it is no container image, or an
    index within an index; what the source raises.
    """
    raw = source.document()
    image = parse_image(raw)
    if isinstance(image, ImageManifest):
        loaded = _load_image(source, image)
        return single_image(loaded, platforms)
    images = []
    for entry in chosen_entries(image, platforms):
        content = source.document(entry.descriptor.digest).content
        loaded = _load_image(source, parse_image_manifest(content, entry.descriptor.media_type))
        check_listed_platform(loaded.parsed, entry.platform)
        images.append(loaded)
    if not images:
        raise UnsupportedError("the image index lists no image")
    return SourceImages(tuple(images), is_index=len(platforms) != 1 or len(images) > 1)


def _load_image(source: BlobSource, manifest: ImageManifest) -> SourceImage:
    if manifest.config.media_type not in CONFIG_TYPES:
        raise UnsupportedError(
            f"the reference is of the type {show_name(manifest.config.media_type)}, no container image",
            hint="a directory or file is encrypted by its path",
        )
    config = source.read_blob(manifest.config, limit=MAX_CONFIG_SIZE)
    parsed = parse_image_config(config)
    check_layer_count(parsed, len(manifest.layers))
    layers = zip(manifest.layers, parsed.diff_ids, strict=True)
    return SourceImage(config, parsed, tuple(_layer(source, blob, diff_id) for blob, diff_id in layers))


def _layer(source: BlobSource, blob: Descriptor, diff_id: str) -> SourceLayer:
    known = LAYER_TYPES.get(blob.media_type)
    if known is None:
        encrypted = blob.media_type.endswith(_ENCRYPTED_SUFFIX)
        raise UnsupportedError(
            f"a layer of the image is of the type {show_name(blob.media_type)}, which is no tar archive",
            hint="decrypt it with imagetool ocicrypt decrypt first" if encrypted else None,
        )
    return SourceLayer(diff_id, blob.size, known.compression, lambda: source.stream_blob(blob))
