"""Several volumes in one space of addresses, and the images in them in one space of inode numbers.

Volume i has the addresses and numbers from i * 2^44 on: an image has at most 2^44 bytes (16 TiB), and fewer inodes than
bytes. So one daemon, one read-ahead and one extraction serve them all. Not here: what the layers of a container image
mean together (`merged`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from encfs.erofs.reader import ErofsReader
from encfs.erofs.tree import Inode, Read
from encfs.errors import FormatError, UnsupportedError
from encfs.format.plaintext import Volume

#: Bits of an address, or of an inode number, within its volume.
SHIFT = 44
_MASK = (1 << SHIFT) - 1
#: The kernel's overlayfs takes no more layers than this, and numbers stay below those that FUSE treats in its own way.
MAX_VOLUMES = 500


class _Sum:
    """The counters of all volumes, added."""

    def __init__(self, volumes: Sequence[Volume]) -> None:
        self._volumes = volumes

    def to_json(self) -> dict[str, int]:
        total: dict[str, int] = {}
        for volume in self._volumes:
            for name, count in volume.stats.to_json().items():
                total[name] = total.get(name, 0) + count
        return total


class VolumeStack:
    """Reads of all volumes by address. Thread-safe if they are. `size` is the bytes of all of them together."""

    def __init__(self, volumes: Sequence[Volume]) -> None:
        """Takes the volumes over. Raises: UnsupportedError where there are too many, or one is too large."""
        if len(volumes) > MAX_VOLUMES or any(volume.size > _MASK for volume in volumes):
            raise UnsupportedError(
                f"an image of {len(volumes)} layers cannot be read", hint=f"at most {MAX_VOLUMES}, each below 16 TiB"
            )
        self.volumes = tuple(volumes)
        self.size = sum(volume.size for volume in volumes)
        self.stats = _Sum(self.volumes)

    def read(self, offset: int, size: int, /) -> memoryview:
        """At most `size` verified bytes, fewer only at a volume's end. Raises: as the volume."""
        buffer = memoryview(bytearray(size))
        return buffer[: self.read_into(offset, buffer)]

    def read_into(self, offset: int, buffer: memoryview, /) -> int:
        return self.volumes[offset >> SHIFT].read_into(offset & _MASK, buffer)

    def try_read_into(self, offset: int, buffer: memoryview, /) -> int | None:
        return self.volumes[offset >> SHIFT].try_read_into(offset & _MASK, buffer)

    def close(self) -> None:
        for volume in self.volumes:
            volume.close()


def split(number: int) -> tuple[int, int]:
    """The volume's index and the number or address within it."""
    return number >> SHIFT, number & _MASK


def join(index: int, number: int) -> int:
    """Raises: FormatError for a number that no inode of an image can have."""
    if number > _MASK:
        raise FormatError(f"EROFS inode {number} lies beyond the end of the image")
    return index << SHIFT | number


def open_readers(read: Read, sizes: Sequence[int]) -> tuple[ErofsReader, ...]:
    """The images of a stack's volumes (of `sizes` bytes), all behind one `read`. Raises: as `ErofsReader`."""

    def of_volume(base: int) -> Read:
        return lambda offset, size: read(base + offset, size)

    return tuple(ErofsReader(of_volume(index << SHIFT), size) for index, size in enumerate(sizes))


class Images:
    """Inodes of several images by joint numbers. The base of trees that are made of them. Thread-safe."""

    def __init__(self, images: Sequence[ErofsReader]) -> None:
        self.images = tuple(images)
        self.inode_count = sum(image.inode_count for image in images)
        self.block_count = sum(image.block_count for image in images)

    def inode(self, number: int) -> Inode:
        """Raises: FormatError for a number of no image; as `ErofsReader.inode`."""
        index, nid = split(number)
        return replace(self._image(number).inode(nid), nid=join(index, nid))

    def readlink(self, inode: Inode) -> bytes:
        return self._image(inode.nid).readlink(replace(inode, nid=inode.nid & _MASK))

    def xattrs(self, inode: Inode) -> dict[bytes, bytes]:
        return self._image(inode.nid).xattrs(inode)

    def read(self, inode: Inode, offset: int, size: int) -> bytes:
        return self._image(inode.nid).read(inode, offset, size)

    def extents(self, inode: Inode, offset: int, size: int) -> Iterator[tuple[int | None, int]]:
        """As `ErofsReader.extents`, with the addresses of the stack."""
        base = inode.nid & ~_MASK
        for place, length in self._image(inode.nid).extents(inode, offset, size):
            yield None if place is None else base + place, length

    def _image(self, number: int) -> ErofsReader:
        index = number >> SHIFT
        if not 0 <= index < len(self.images):
            raise FormatError(f"EROFS inode {number} is of no image")
        return self.images[index]
