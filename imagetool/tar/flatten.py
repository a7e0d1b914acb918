"""All layers of an image made into one tree, lowest first, in one EROFS image without overlayfs's conventions.

The layers are read twice: once for their headers, to know what upper layers hide, and once for what is left. So
contents that no path leads to any more are not in the image, but for those of entries that their own layer replaces.
"""

from __future__ import annotations

import stat
from typing import Final

from encfs.erofs.spool import open_temporary, storage_errors
from encfs.erofs.writer import ErofsWriter
from encfs.tar.reader import TarReader
from imagetool.tar.layer import SparseBudget, Whiteout, classify

_SCHEMA: Final = """
CREATE TABLE entry (path BLOB, layer INTEGER, directory INTEGER, PRIMARY KEY (path, layer)) WITHOUT ROWID;
CREATE TABLE marker (path BLOB, layer INTEGER, opaque INTEGER, PRIMARY KEY (path, layer, opaque)) WITHOUT ROWID;
CREATE TABLE target (path BLOB, layer INTEGER, PRIMARY KEY (path, layer)) WITHOUT ROWID;
"""
_HIDES: Final = """
SELECT EXISTS (SELECT 1 FROM entry WHERE path = ?1 AND layer > ?2)
    OR EXISTS (SELECT 1 FROM marker WHERE path = ?1 AND layer > ?2 AND NOT opaque)
"""
_HIDES_BELOW: Final = """
SELECT EXISTS (SELECT 1 FROM entry WHERE path = ?1 AND layer > ?2 AND NOT directory)
    OR EXISTS (SELECT 1 FROM marker WHERE path = ?1 AND layer > ?2)
"""


class FlattenPlan:
    """What is in which layer, in a temporary database. Close it."""

    def __init__(self) -> None:
        self._database = open_temporary(_SCHEMA)

    def read(self, source: TarReader, layer: int) -> None:
        """Take note of a layer's headers. Raises: SourceError, what the source raises."""
        budget = SparseBudget()
        for member in source:
            item = classify(member)
            budget.take(member)
            with storage_errors():
                if isinstance(item, Whiteout):
                    self._database.execute(
                        "INSERT OR IGNORE INTO marker VALUES (?, ?, ?)", (item.path, layer, item.opaque)
                    )
                elif item is not None:
                    values = (item.path, layer, stat.S_ISDIR(item.mode))
                    self._database.execute("INSERT OR REPLACE INTO entry VALUES (?, ?, ?)", values)
                    if item.link_to is not None:
                        self._database.execute("INSERT OR IGNORE INTO target VALUES (?, ?)", (item.link_to, layer))

    def write(self, source: TarReader, layer: int, image: ErofsWriter) -> None:
        """Add what a layer changes to an image that replaces (`ErofsWriter`'s `replace`).

        Raises: SourceError naming the path; StorageError; what source and sink raise.
        """
        with storage_errors():
            # Markers speak of the layers below, wherever they stand.
            for path, opaque in self._database.execute("SELECT path, opaque FROM marker WHERE layer = ?", (layer,)):
                image.remove(path, contents_only=bool(opaque))
        for member in source:
            item = classify(member)
            if item is None or isinstance(item, Whiteout):
                continue
            if item.size and self._is_hidden(item.path, layer) and not self._is_target(item.path, layer):
                continue
            image.add(item, source, member.extents)

    def _is_hidden(self, path: bytes, layer: int) -> bool:
        with storage_errors():
            if self._database.execute(_HIDES, (path, layer)).fetchone()[0]:
                return True
            while path:
                path = path.rpartition(b"/")[0]
                if self._database.execute(_HIDES_BELOW, (path, layer)).fetchone()[0]:
                    return True
        return False

    def _is_target(self, path: bytes, layer: int) -> bool:
        with storage_errors():
            query = "SELECT 1 FROM target WHERE path = ? AND layer = ?"
            return self._database.execute(query, (path, layer)).fetchone() is not None

    def close(self) -> None:
        self._database.close()
