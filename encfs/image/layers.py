"""The layers of an image side by side, each a directory of its own: what the kernel's overlayfs stacks.

Not here: the stacking (`encfs.mount.assembly` by the kernel, `merged` without it).
"""

from __future__ import annotations

import stat
from collections.abc import Iterator, Sequence
from dataclasses import replace

from encfs.erofs.reader import ErofsReader
from encfs.erofs.structures import TYPE_DIRECTORY, TYPE_REGULAR
from encfs.erofs.tree import DirectoryEntry, Inode
from encfs.errors import FormatError
from encfs.image.conventions import kernel_xattrs
from encfs.image.stack import SHIFT, Images, join, split

#: Number of the root, which is in no image.
_ROOT = 1 << 57


def directory_of_all(mode: int = 0o555) -> Inode:
    """The inode of a root that is in no image."""
    return Inode(_ROOT, stat.S_IFDIR | mode, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0)


def numbered(count: int, prefix: bytes, kind: int) -> Iterator[tuple[bytes, int, int]]:
    """Name, index and type of the entries of such a root."""
    return ((b"%s%d" % (prefix, index), index, kind) for index in range(count))


class LayersTree(Images):
    """A root directory with the directories `0` (the lowest layer), `1` and so on.

    `user` shows opaque directories as overlayfs in a user namespace looks for them, and everything as owned by 0, for
    there no other owner may exist.
    """

    def __init__(self, images: Sequence[ErofsReader], *, user: bool = False) -> None:
        super().__init__(images)
        self.root = _ROOT
        self._user = user

    def inode(self, number: int) -> Inode:
        if number == _ROOT:
            return directory_of_all()
        inode = super().inode(number)
        return replace(inode, uid=0, gid=0) if self._user else inode

    def xattrs(self, inode: Inode) -> dict[bytes, bytes]:
        if inode.nid == _ROOT:
            return {}
        return kernel_xattrs(inode, super().xattrs(inode), user=self._user)

    def lookup(self, directory: Inode, name: bytes) -> int | None:
        if directory.nid == _ROOT:
            if not name.isdigit() or not int(name) < len(self.images) or name != b"%d" % int(name):
                return None
            index = int(name)
            return join(index, self.images[index].root)
        index, _ = split(directory.nid)
        nid = self._image(directory.nid).lookup(directory, name)
        return None if nid is None else join(index, nid)

    def entries(self, directory: Inode, start: int = 0) -> Iterator[DirectoryEntry]:
        if directory.nid == _ROOT:
            for name, index, kind in list(numbered(len(self.images), b"", TYPE_DIRECTORY))[start:]:
                yield DirectoryEntry(name, join(index, self.images[index].root), kind, index + 1)
            return
        index, _ = split(directory.nid)
        for entry in self._image(directory.nid).entries(directory, start):
            yield DirectoryEntry(entry.name, join(index, entry.nid), entry.type, entry.next)


class FilesTree:
    """A root directory with one file for each volume: `prefix` and its index. They are what the kernel's EROFS mounts.

    Nothing of the images is read here: the kernel's own reader does that.
    """

    def __init__(self, sizes: Sequence[int], prefix: bytes) -> None:
        self._sizes = tuple(sizes)
        self._prefix = prefix
        self.root = _ROOT
        self.inode_count = len(sizes) + 1
        self.block_count = sum(sizes) >> 12

    def inode(self, number: int) -> Inode:
        if number == _ROOT:
            return directory_of_all()
        index, _ = split(number)
        return Inode(number, stat.S_IFREG | 0o400, 0, 0, 1, self._sizes[index], 0, 0, 0, 0, 0, 0)

    def lookup(self, directory: Inode, name: bytes) -> int | None:
        for entry in self.entries(directory):
            if entry.name == name:
                return entry.nid
        return None

    def entries(self, directory: Inode, start: int = 0) -> Iterator[DirectoryEntry]:
        for name, index, kind in list(numbered(len(self._sizes), self._prefix, TYPE_REGULAR))[start:]:
            yield DirectoryEntry(name, _file_number(index), kind, index + 1)

    def extents(self, inode: Inode, offset: int, size: int) -> Iterator[tuple[int | None, int]]:
        end = min(offset + size, inode.size)
        if 0 <= offset < end:
            yield (inode.nid >> SHIFT << SHIFT) + offset, end - offset

    def readlink(self, inode: Inode) -> bytes:
        raise FormatError("there are no symbolic links beside the images")

    def xattrs(self, inode: Inode) -> dict[bytes, bytes]:
        return {}


def _file_number(index: int) -> int:
    """Never 0 or 1, which FUSE treats in its own way."""
    return join(index, 2)
