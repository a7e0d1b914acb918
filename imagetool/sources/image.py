"""Container images as a source: one of a manifest, or those of the platforms of an index, from any store.

Layers are streams of their plain tar bytes; whoever reads one checks its diff ID (`SourceLayer.diff_id`). Not here:
`docker save`'s archives (`archive`), what is in a layer (`imagetool.tar`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field

from encfs.errors import FormatError, UnsupportedError
from encfs.image.artifact import check_listed_platform
from encfs.image.compression import Compression, allowed_size, decompressed
from encfs.image.config import MAX_CONFIG_SIZE, ImageConfig, parse_image_config
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

_ENCRYPTED_SUFFIX = "+encrypted"


@dataclass(frozen=True, slots=True)
class SourceLayer:
    """One layer. `size` is that of its blob (bytes); `read` streams the blob, its digest verified by the end."""

    diff_id: str
    size: int
    compression: Compression
    read: Callable[[], Iterator[bytes]] = field(repr=False)

    def tar(self, advance: Callable[[int], None], *, maximum: int | None = None, what: str) -> Iterator[bytes]:
        """The plain tar archive; `advance` hears of the blob's bytes. Raises: FormatError, what the store raises."""
        limit = allowed_size(self.size, maximum)
        return decompressed(self._watched(advance), self.compression, limit=limit, what=what)

    def _watched(self, advance: Callable[[int], None]) -> Iterator[bytes]:
        for chunk in self.read():
            yield chunk
            advance(len(chunk))


@dataclass(frozen=True, slots=True)
class SourceImage:
    """The image of one platform. `config` has the exact bytes; layers lowest first."""

    config: bytes = field(repr=False)
    parsed: ImageConfig
    layers: tuple[SourceLayer, ...]

    @property
    def platform(self) -> Platform:
        return Platform(self.parsed.os, self.parsed.architecture, self.parsed.variant)

    @property
    def size(self) -> int:
        """Bytes of all layers' blobs."""
        return sum(layer.size for layer in self.layers)


@dataclass(frozen=True, slots=True)
class SourceImages:
    """What a reference names: `is_index` where it is a list of platforms, if of one only."""

    images: tuple[SourceImage, ...]
    is_index: bool


@contextmanager
def opened_images(
    reference: Reference, options: StoreOptions, platforms: Sequence[Platform] = ()
) -> Iterator[SourceImages]:
    """The images of a reference, of whatever transport, readable while this lasts. Raises: as `load_images`."""
    if reference.transport == "docker-archive":
        from imagetool.sources.archive import DockerArchive

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


def single_image(image: SourceImage, platforms: Sequence[Platform]) -> SourceImages:
    """An image without an index. Raises: UnsupportedError where another platform is asked for."""
    for platform in platforms:
        if not image.platform.matches(platform):
            raise UnsupportedError(f"the image is for {image.platform}, not for {platform}")
    return SourceImages((image,), is_index=False)


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


def check_layer_count(config: ImageConfig, layers: int) -> None:
    """Raises: FormatError where manifest and config disagree, or there are none."""
    if len(config.diff_ids) != layers or not layers:
        raise FormatError(f"the image's manifest lists {layers} layers, its config {len(config.diff_ids)}")


def _layer(source: BlobSource, blob: Descriptor, diff_id: str) -> SourceLayer:
    known = LAYER_TYPES.get(blob.media_type)
    if known is None:
        encrypted = blob.media_type.endswith(_ENCRYPTED_SUFFIX)
        raise UnsupportedError(
            f"a layer of the image is of the type {show_name(blob.media_type)}, which is no tar archive",
            hint="decrypt it with imagetool ocicrypt decrypt first" if encrypted else None,
        )
    return SourceLayer(diff_id, blob.size, known.compression, lambda: source.stream_blob(blob))
