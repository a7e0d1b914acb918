"""What `docker save` and `podman save` write: a tar archive with `manifest.json`, in the old layout of a directory for
each layer, or in the newer one of blobs; a layer may be a link to another member. Read in place, never unpacked.
"""

from __future__ import annotations

from collections.abc import Sequence

from encfs.errors import FormatError, UsageError
from encfs.image.compression import Compression
from encfs.image.config import MAX_CONFIG_SIZE, parse_image_config
from encfs.image.manifest import MAX_LAYERS, Platform
from encfs.oci.blobs import MAX_MANIFEST_SIZE
from encfs.strictjson import loads
from encfs.tar.file import TarFile
from imagetool.sources.image import SourceImage, SourceImages, SourceLayer, check_layer_count, single_image

_MANIFEST = "manifest.json"
#: What a compressed layer begins with.
_MAGIC = {b"\x1f\x8b": Compression.GZIP, b"\x28\xb5\x2f\xfd": Compression.ZSTD}


class DockerArchive:
    """One archive file. Close it."""

    def __init__(self, path: str) -> None:
        """Raises: as `encfs.tar.file.TarFile`."""
        self._path = path
        self._tar = TarFile(path, hint="give what docker save or podman save has written")

    def close(self) -> None:
        self._tar.close()

    def images(self, platforms: Sequence[Platform] = ()) -> SourceImages:
        """The one image that is in it. Raises: UsageError where there are several, FormatError, UnsupportedError."""
        if _MANIFEST not in self._tar.members:
            raise FormatError(
                f"{self._path} has no {_MANIFEST}",
                hint="it is not what docker save or podman save write; an archive of a layout is written oci-archive:",
            )
        content = self._tar.small(_MANIFEST, MAX_MANIFEST_SIZE)
        images = loads(content, limit=MAX_MANIFEST_SIZE, what=f"{_MANIFEST} of the archive")
        if not isinstance(images, list) or not images or not all(isinstance(image, dict) for image in images):
            raise FormatError(f"{self._path}: {_MANIFEST} lists no images")
        if len(images) > 1:
            raise UsageError(f"{self._path} holds {len(images)} images", hint="save the one that is meant by itself")
        config, layers = images[0].get("Config"), images[0].get("Layers")
        if not isinstance(config, str) or not isinstance(layers, list) or not len(layers) <= MAX_LAYERS:
            raise FormatError(f"{self._path}: {_MANIFEST} is malformed")
        exact = self._tar.small(config, MAX_CONFIG_SIZE)
        parsed = parse_image_config(exact)
        check_layer_count(parsed, len(layers))
        found = [self._layer(name, diff_id) for name, diff_id in zip(layers, parsed.diff_ids, strict=True)]
        return single_image(SourceImage(exact, parsed, tuple(found)), platforms)

    def _layer(self, name: object, diff_id: str) -> SourceLayer:
        if not isinstance(name, str):
            raise FormatError(f"{self._path}: {_MANIFEST} is malformed")
        place = self._tar.find(name)
        compression = _compression(self._tar.read(place, 0, min(4, place.size)))
        return SourceLayer(diff_id, place.size, compression, lambda: self._tar.stream(place))


def _compression(head: bytes) -> Compression:
    for magic, compression in _MAGIC.items():
        if head.startswith(magic):
            return compression
    return Compression.NONE
