"""What a tree of files is to who reads it: inodes, names, contents at addresses. An image is one, and layers merged.

Not here: where the bytes at an address come from (`read`, a volume), and what a tree is made of (`reader`, and
`encfs.image` for trees of several images).
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from encfs.erofs.structures import printable
from encfs.errors import NotFoundError

#: Bytes of an image by (offset, size): verified, or an exception.
Read = Callable[[int, int], bytes | memoryview]

#: Kinds of files by `stat.S_IFMT(mode)`, as lists of files call them.
_KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFCHR: "character-device",
    stat.S_IFBLK: "block-device",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}
#: As many as the kernel follows in one path.
_MAX_SYMLINKS = 40


@dataclass(frozen=True, slots=True)
class Inode:
    """One inode. `mode` is the whole `st_mode`, `rdev` as `os.makedev` has it, `size` in bytes.

    The last four say where its data are: on-disk layout, the field `u`, where its xattrs begin in the image and their
    size.
    """

    nid: int
    mode: int
    uid: int
    gid: int
    nlink: int
    size: int
    rdev: int
    mtime_ns: int
    layout: int
    start: int
    xattr_offset: int
    xattr_size: int

    @property
    def kind(self) -> str:
        """`file`, `directory`, `symlink`, `character-device`, `block-device`, `fifo` or `socket`."""
        return _KINDS[stat.S_IFMT(self.mode)]


@dataclass(frozen=True, slots=True)
class DirectoryEntry:
    """One name of a directory. `type` is the on-disk number; `next` resumes behind the entry, and is never 0."""

    name: bytes
    nid: int
    type: int
    next: int


class ServedTree(Protocol):
    """What a mount needs of a tree.

    Thread-safe. Every method raises FormatError where what is read is malformed, and what reading it raises.
    """

    root: int
    inode_count: int
    #: Blocks of 4 KiB that metadata and contents take at most: a bound for walks.
    block_count: int

    def inode(self, nid: int, /) -> Inode:
        """The inode with this number. Numbers come from `root`, `lookup` and `entries`."""

    def lookup(self, directory: Inode, name: bytes, /) -> int | None:
        """The number behind a name (`..` is one), None where there is no such name."""

    def entries(self, directory: Inode, start: int = 0, /) -> Iterator[DirectoryEntry]:
        """The entries of a directory, `.` and `..` among them, from 0 or from the `next` of an entry."""

    def readlink(self, inode: Inode, /) -> bytes: ...

    def xattrs(self, inode: Inode, /) -> dict[bytes, bytes]: ...

    def extents(self, inode: Inode, offset: int, size: int, /) -> Iterator[tuple[int | None, int]]:
        """Where contents lie: (address, or None for a hole; length), tiling what of the range is in the file."""


class Tree(ServedTree, Protocol):
    """What can also be read without a mount."""

    def read(self, inode: Inode, offset: int, size: int, /) -> bytes: ...

    def resolve(self, path: bytes, follow: bool = True) -> Inode: ...


def resolve(tree: Tree, path: bytes, follow: bool = True) -> Inode:
    """The inode at a path from the root; symbolic links stay within the tree, the last one only with `follow`.

    Raises: NotFoundError where there is nothing at the path, or more than 40 symbolic links on it.
    """
    ancestors = [tree.inode(tree.root)]
    pending = path.split(b"/")[::-1]
    links = 0
    current = ancestors[0]
    while pending:
        name = pending.pop()
        if not stat.S_ISDIR(current.mode):
            raise NotFoundError(f"{printable(path)}: not a directory on the way")
        if name in (b"", b"."):
            continue
        if name == b"..":
            if len(ancestors) > 1:
                ancestors.pop()
            current = ancestors[-1]
            continue
        nid = tree.lookup(current, name)
        if nid is None:
            raise NotFoundError(f"{printable(path)}: no such file or directory in the image")
        current = tree.inode(nid)
        if stat.S_ISLNK(current.mode) and (follow or pending):
            links += 1
            if links > _MAX_SYMLINKS:
                raise NotFoundError(f"{printable(path)}: too many levels of symbolic links")
            target = tree.readlink(current)
            if target.startswith(b"/"):
                del ancestors[1:]
            current = ancestors[-1]
            pending += target.split(b"/")[::-1]
        elif stat.S_ISDIR(current.mode):
            ancestors.append(current)
    return current
