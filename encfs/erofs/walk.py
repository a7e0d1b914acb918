"""Walk the tree of an image, bounded even where a hostile image makes a loop of directories, or reaches one twice."""

from __future__ import annotations

import stat
from collections.abc import Iterator

from encfs.erofs.reader import ErofsReader, Inode
from encfs.erofs.structures import BLOCK_SIZE, DIRENT, MAX_PATH
from encfs.errors import FormatError


def walk(reader: ErofsReader, top: Inode) -> Iterator[tuple[bytes, Inode]]:
    """Everything below the directory `top` (itself not included) in preorder, siblings sorted: path from `top`, inode.

    A level costs a few words of memory, whatever its directory's size.

    Raises: FormatError for whatever the reader finds, for a path of more than `MAX_PATH` bytes, for a directory that
    is reached from elsewhere than its parent, and for more names than the image has room for.
    """
    names_left = reader.block_count * BLOCK_SIZE // (DIRENT.size + 1)
    path = bytearray()
    # Directory, where to go on in it, length of its path
    stack: list[tuple[Inode, int, int]] = [(top, 0, 0)]
    while stack:
        directory, position, path_size = stack.pop()
        del path[path_size:]
        for entry in reader.entries(directory, position):
            if entry.name in (b".", b".."):
                continue
            # The names of each directory exist once: more of them means that a directory stands in its parent twice.
            names_left -= 1
            inode = reader.inode(entry.nid)
            del path[path_size:]
            path += b"/" + entry.name if path else entry.name
            if names_left < 0 or len(path) > MAX_PATH:
                raise FormatError(f"EROFS directory {directory.nid} has more names or longer paths than can be")
            if not stat.S_ISDIR(inode.mode):
                yield bytes(path), inode
                continue
            # A directory has one parent: this rules loops out.
            if reader.lookup(inode, b"..") != directory.nid:
                raise FormatError(f"EROFS directory {entry.nid} is reached from elsewhere than its parent")
            yield bytes(path), inode
            stack += ((directory, entry.next, path_size), (inode, 0, len(path)))
            break
