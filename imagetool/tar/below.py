"""Directories of the layers below, with their attributes: what a layer implies without naming it inherits them.

An archive may hold `usr/bin/new` without `usr/`: in the merged tree `usr/` has the attributes it had before, but
overlayfs shows those of the uppermost layer that has the directory. Everything lies in a temporary database.
"""

from __future__ import annotations

import stat

from encfs.erofs.reader import ErofsReader
from encfs.erofs.spool import open_temporary, storage_errors
from encfs.erofs.tree import Inode
from encfs.erofs.walk import walk
from encfs.erofs.writer import Entry
from encfs.erofs.xattrs import decode_inline_xattrs, encode_xattrs
from encfs.image.conventions import OPAQUE, is_opaque

_SCHEMA = "".join(
    f"CREATE TABLE {name} (path BLOB PRIMARY KEY, mode, uid, gid, mtime_ns, xattrs BLOB) WITHOUT ROWID;"
    for name in ("below", "current")
)
_BELOW = "path >= ? || x'2f' AND path < ? || x'30'"


class DirectoriesBelow:
    """Directories of all layers so far. One layer is told of at a time, and counts from `commit` on. Close it."""

    def __init__(self) -> None:
        self._database = open_temporary(_SCHEMA)

    def find(self, path: bytes) -> Entry | None:
        """A directory of the layers below the current one."""
        with storage_errors():
            row = self._database.execute("SELECT * FROM below WHERE path = ?", (path,)).fetchone()
        if row is None:
            return None
        _path, mode, uid, gid, mtime_ns, xattrs = row
        return Entry(path, mode, uid=uid, gid=gid, mtime_ns=mtime_ns, xattrs=tuple(decode_inline_xattrs(xattrs)))

    def directory(self, entry: Entry) -> None:
        """The current layer has a directory."""
        attributes = tuple(item for item in entry.xattrs if item[0] != OPAQUE)
        values = (entry.path, entry.mode, entry.uid, entry.gid, entry.mtime_ns, encode_xattrs(entry.path, attributes))
        with storage_errors():
            self._database.execute("INSERT OR REPLACE INTO current VALUES (?, ?, ?, ?, ?, ?)", values)

    def other(self, path: bytes) -> None:
        """The current layer has something else at a path: what was there is no directory any more."""
        self._remove("current", path)
        self.hidden(path)

    def hidden(self, path: bytes) -> None:
        """A path of the layers below is hidden with everything in it."""
        self._remove("below", path)

    def emptied(self, path: bytes) -> None:
        """What is in a directory of the layers below is hidden."""
        with storage_errors():
            if path:
                self._database.execute(f"DELETE FROM below WHERE {_BELOW}", (path, path))  # noqa: S608
            else:
                self._database.execute("DELETE FROM below WHERE path != x''")

    def _remove(self, table: str, path: bytes) -> None:
        with storage_errors():
            self._database.execute(
                f"DELETE FROM {table} WHERE path = ? OR ({_BELOW})",  # noqa: S608 (constants only)
                (path, path, path),
            )

    def commit(self) -> None:
        """The current layer is complete."""
        with storage_errors():
            self._database.execute("INSERT OR REPLACE INTO below SELECT * FROM current")
            self._database.execute("DELETE FROM current")

    def read(self, image: ErofsReader) -> None:
        """Take a whole layer from its image; no other may be begun. Raises: FormatError, what the volume raises."""
        root = image.inode(image.root)
        self._read_one(image, b"", root)
        for path, inode in walk(image, root):
            self._read_one(image, path, inode)
        self.commit()

    def _read_one(self, image: ErofsReader, path: bytes, inode: Inode) -> None:
        if not stat.S_ISDIR(inode.mode):
            self.hidden(path)
            return
        xattrs = image.xattrs(inode)
        if is_opaque(inode, xattrs):
            self.emptied(path)
        attributes = tuple(xattrs.items())
        self.directory(
            Entry(path, inode.mode, uid=inode.uid, gid=inode.gid, mtime_ns=inode.mtime_ns, xattrs=attributes)
        )

    def close(self) -> None:
        self._database.close()
