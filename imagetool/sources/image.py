"""A container image as a source: its config and its layers, wherever they come from.

Layers are streams of their plain tar bytes; whoever reads one checks its diff ID (`SourceLayer.diff_id`). Not here:
where they come from (`stored`, `archive`), what is in a layer (`imagetool.tar`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from encfs.errors import FormatError, UnsupportedError
from encfs.image.compression import Compression, allowed_size, decompressed
from encfs.image.config import ImageConfig
from encfs.image.manifest import Platform


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


def single_image(image: SourceImage, platforms: Sequence[Platform]) -> SourceImages:
    """An image without an index. Raises: UnsupportedError where another platform is asked for."""
    for platform in platforms:
        if not image.platform.matches(platform):
            raise UnsupportedError(f"the image is for {image.platform}, not for {platform}")
    return SourceImages((image,), is_index=False)


def check_layer_count(config: ImageConfig, layers: int) -> None:
    """Raises: FormatError where manifest and config disagree, or there are none."""
    if len(config.diff_ids) != layers or not layers:
        raise FormatError(f"the image's manifest lists {layers} layers, its config {len(config.diff_ids)}")
