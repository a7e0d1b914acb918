"""Walk the tree of an image, bounded even where a hostile image makes a loop of directories, or reaches one twice."""

from __future__ import annotations

import stat
from collections.abc import Iterator

from encfs.erofs.structures import BLOCK_SIZE, DIRENT, MAX_PATH
from encfs.erofs.tree import Inode, Tree
from encfs.errors import FormatError


class WalkBounds:
    """What every walk of a tree has to check, one object for each walk.

    A directory has one parent, which its `..` names: that rules out loops. A directory could still stand in its parent
    under many names; but the names of each directory exist once in the image, so that more of them than the image has
    room for show it.
    """

    def __init__(self, reader: Tree) -> None:
        self._reader = reader
        self._names_left = reader.block_count * BLOCK_SIZE // (DIRENT.size + 1)

    def check(self, parent: Inode, child: Inode, path_size: int) -> None:
        """Count the name of `child` in `parent`, at a path of so many bytes.

        Raises: FormatError where it is one too many, where the path is longer than `MAX_PATH`, and where `child` is a
        directory with another parent.
        """
        self._names_left -= 1
        if self._names_left < 0 or path_size > MAX_PATH:
            raise FormatError(f"EROFS directory {parent.nid} has more names or longer paths than can be")
        if not stat.S_ISDIR(child.mode):
            return
        # The root is its own parent.
        if child.nid == self._reader.root or self._reader.lookup(child, b"..") != parent.nid:
            raise FormatError(f"EROFS directory {child.nid} is reached from elsewhere than its parent")


def walk(reader: Tree, top: Inode) -> Iterator[tuple[bytes, Inode]]:
    """Everything below the directory `top` (itself not included) in preorder, siblings sorted: path from `top`, inode.

    A level costs a few words of memory, whatever its directory's size. Raises FormatError for whatever the reader or
    `WalkBounds` finds.
    """
    bounds = WalkBounds(reader)
    path = bytearray()
    # Directory, where to go on in it, length of its path
    stack: list[tuple[Inode, int, int]] = [(top, 0, 0)]
    while stack:
        directory, position, path_size = stack.pop()
        for entry in reader.entries(directory, position):
            if entry.name in (b".", b".."):
                continue
            del path[path_size:]
            path += b"/" + entry.name if path else entry.name
            inode = reader.inode(entry.nid)
            bounds.check(directory, inode, len(path))
            yield bytes(path), inode
            if stat.S_ISDIR(inode.mode):
                stack += ((directory, entry.next, path_size), (inode, 0, len(path)))
                break
