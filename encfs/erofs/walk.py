"""Walk the tree of an image, bounded even where a hostile image makes a loop of directories, or reaches one twice."""

from __future__ import annotations

import stat
from collections.abc import Iterator

from encfs.erofs.reader import DirectoryEntry, ErofsReader, Inode
from encfs.errors import FormatError


def walk(reader: ErofsReader, top: Inode, path: bytes = b"") -> Iterator[tuple[bytes, Inode]]:
    """Everything below the directory `top` (itself not included) in preorder, siblings sorted: path and inode.

    `path` is put before every path. Memory grows with the depth only.

    Raises: FormatError for whatever the reader finds, for a directory that is reached from elsewhere than its parent,
    and for more directories than there are inodes.
    """
    visited = 0
    stack: list[tuple[bytes, Inode, Iterator[DirectoryEntry]]] = [(path, top, reader.entries(top))]
    while stack:
        prefix, directory, entries = stack[-1]
        for entry in entries:
            if entry.name in (b".", b".."):
                continue
            inode = reader.inode(entry.nid)
            below = prefix + b"/" + entry.name if prefix else entry.name
            if not stat.S_ISDIR(inode.mode):
                yield below, inode
                continue
            # A directory has one parent: this rules loops out. It could still stand in its parent many times.
            visited += 1
            if reader.lookup(inode, b"..") != directory.nid or visited >= reader.inode_count:
                raise FormatError(f"EROFS directory {entry.nid} is reached more than once")
            yield below, inode
            stack.append((below, inode, reader.entries(inode)))
            break
        else:
            stack.pop()
