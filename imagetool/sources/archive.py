"""What `docker save` and `podman save` write: a tar archive with `manifest.json`, in the old layout of a directory for
each layer, or in the newer one of blobs; a layer may be a link to another member. Read in place, never unpacked.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from posixpath import normpath

from encfs.errors import FormatError, NotFoundError, SourceError, StorageError, UnsupportedError, UsageError
from encfs.image.compression import Compression
from encfs.image.config import MAX_CONFIG_SIZE, parse_image_config
from encfs.image.manifest import MAX_LAYERS, Platform
from encfs.oci.blobs import MAX_MANIFEST_SIZE
from encfs.strictjson import loads, show_name
from imagetool.sources.image import SourceImage, SourceImages, SourceLayer, check_layer_count, single_image
from imagetool.tar.reader import TarReader

_MANIFEST = "manifest.json"
_STEP = 1 << 20
_MAX_MEMBERS = 1 << 16
_MAX_LINKS = 4
#: What a compressed layer, or a compressed archive, begins with.
_MAGIC = {b"\x1f\x8b": Compression.GZIP, b"\x28\xb5\x2f\xfd": Compression.ZSTD}


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a member's contents lie in the archive (bytes); `link` where it is a symbolic link instead."""

    offset: int
    size: int
    link: str | None


class DockerArchive:
    """One archive file. Close it."""

    def __init__(self, path: str) -> None:
        """Raises: NotFoundError, StorageError; SourceError where it is no tar archive."""
        self._path = path
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            raise NotFoundError(
                f"{path} does not exist", hint="give what docker save or podman save has written"
            ) from None
        except OSError as error:
            raise StorageError(f"{path}: {error.strerror}") from None
        try:
            self._check_file()
            self._members = dict(self._index())
        except BaseException:
            os.close(self._file)
            raise

    def _check_file(self) -> None:
        if not stat.S_ISREG(os.fstat(self._file).st_mode):
            raise UsageError(f"{self._path} is no regular file", hint="an unpacked image layout is written oci:PATH")
        compression = _compression(os.pread(self._file, 4, 0))
        if compression is not Compression.NONE:
            raise UnsupportedError(
                f"{self._path} is compressed with {compression.value}",
                hint="decompress the file first; layers may be compressed",
            )

    def close(self) -> None:
        os.close(self._file)

    def images(self, platforms: Sequence[Platform] = ()) -> SourceImages:
        """The one image that is in it. Raises: UsageError where there are several, FormatError, UnsupportedError."""
        content = self._small(_MANIFEST, MAX_MANIFEST_SIZE)
        images = loads(content, limit=MAX_MANIFEST_SIZE, what=f"{_MANIFEST} of the archive")
        if not isinstance(images, list) or not images or not all(isinstance(image, dict) for image in images):
            raise FormatError(f"{self._path}: {_MANIFEST} lists no images")
        if len(images) > 1:
            raise UsageError(f"{self._path} holds {len(images)} images", hint="save the one that is meant by itself")
        config, layers = images[0].get("Config"), images[0].get("Layers")
        if not isinstance(config, str) or not isinstance(layers, list) or not len(layers) <= MAX_LAYERS:
            raise FormatError(f"{self._path}: {_MANIFEST} is malformed")
        exact = self._small(config, MAX_CONFIG_SIZE)
        parsed = parse_image_config(exact)
        check_layer_count(parsed, len(layers))
        found = [self._layer(name, diff_id) for name, diff_id in zip(layers, parsed.diff_ids, strict=True)]
        return single_image(SourceImage(exact, parsed, tuple(found)), platforms)

    def _layer(self, name: object, diff_id: str) -> SourceLayer:
        if not isinstance(name, str):
            raise FormatError(f"{self._path}: {_MANIFEST} is malformed")
        place = self._find(name)
        compression = _compression(self._read(place, 0, min(4, place.size)))
        return SourceLayer(diff_id, place.size, compression, lambda: self._stream(place))

    # -- members

    def _index(self) -> Iterator[tuple[str, _Place]]:
        source = _FileInput(self._file)
        for count, member in enumerate(TarReader(source, lambda _data: None, source.skip)):
            if count == _MAX_MEMBERS:
                raise SourceError(f"{self._path} holds more than {_MAX_MEMBERS} files, which no saved image does")
            name = _normal(os.fsdecode(member.name))
            if member.kind == stat.S_IFREG and member.extents is None:
                yield name, _Place(source.position, member.stored, None)
            elif member.kind in (0, stat.S_IFLNK):
                target = os.fsdecode(member.link_name)
                below = str(PurePosixPath(name).parent / target) if member.kind else target
                yield name, _Place(0, 0, _normal(below))

    def _find(self, name: str) -> _Place:
        wanted = _normal(name)
        for _ in range(_MAX_LINKS):
            place = self._members.get(wanted)
            if place is None:
                raise FormatError(f"{self._path} has no {show_name(wanted)}, which an image of it needs")
            if place.link is None:
                return place
            wanted = place.link
        raise FormatError(f"{self._path}: {show_name(name)} is a link to a link, and so on")

    def _small(self, name: str, limit: int) -> bytes:
        if name == _MANIFEST and name not in self._members:
            raise FormatError(
                f"{self._path} has no {_MANIFEST}", hint="it is not what docker save or podman save write"
            )
        place = self._find(name)
        if place.size > limit:
            raise FormatError(f"{self._path}: {show_name(name)} has {place.size} bytes, more than the {limit} allowed")
        return self._read(place, 0, place.size)

    def _stream(self, place: _Place) -> Iterator[bytes]:
        for offset in range(0, place.size, _STEP):
            yield self._read(place, offset, min(_STEP, place.size - offset))

    def _read(self, place: _Place, offset: int, size: int) -> bytes:
        try:
            data = os.pread(self._file, size, place.offset + offset)
        except OSError as error:
            raise StorageError(f"{self._path}: {error.strerror}") from None
        if len(data) != size:
            raise SourceError(f"{self._path} is cut short", hint="save the image again")
        return data


class _FileInput:
    """An archive file from its start (`imagetool.tar.reader.Input`)."""

    def __init__(self, file: int) -> None:
        self._file = file
        self.position = 0

    def readinto(self, buffer: memoryview, /) -> int:
        count = os.preadv(self._file, [buffer], self.position)
        self.position += count
        return count

    def skip(self, size: int) -> None:
        self.position += size


def _normal(name: str) -> str:
    return normpath("/" + name)[1:]


def _compression(head: bytes) -> Compression:
    for magic, compression in _MAGIC.items():
        if head.startswith(magic):
            return compression
    return Compression.NONE
